"""RandLoRA: W + alpha / r * (B @ A') of full rank, A' being a random A times trained vectors; A, B serve all modules.

Source: PEFT 0.21.2 `tuners/randlora/layer.py` `RandLoraLayer.update_layer`, `Linear.get_scaled_bases`,
`get_delta_weight` and `merge`; `tuners/randlora/model.py` `_init_randlora_A_randlora_B` and its sparse sister, for
adapters that do not hold the bases. Such bases are rounded to the base's dtype, as they were in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from rawmerge.formats.kind_fields import KindFields, finite_number, switch, whole_number
from rawmerge.methods.delta import row_delta
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.randomness import (
    generator_of,
    kaiming_uniform,
    largest_shape,
    matrix_of_linear,
    seed_field,
)

if TYPE_CHECKING:
    import torch

_VECTORS: Final = ("lambda", "gamma")
_BASES: Final = ("A", "B")
_COPIES: Final = {"A": "copy_A", "B": "copy_B"}
_COPY_REASON: Final = "a copy of the basis that all modules share; PEFT, too, uses that one"


class RandloraMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the bases are drawn where they are not among the tensors."""
        basis_a, basis_b = (tensors["A"], tensors["B"]) if "A" in tensors else _drawn(settings, context)
        dtype, is_transposed = context.compute_dtype, bool(settings["is_transposed"])
        vectors, scales = (tensors[role].to(dtype) for role in _VECTORS)
        high, low = max(context.shape), min(context.shape)
        # A's factors are ordered by (rank, basis), B's by (basis, rank), and yet multiplied; so PEFT trained them
        update_a = vectors[:, :, None] * basis_a[:, :, :low].to(dtype)
        update_a = update_a.mul_(scales[None]).flatten(0, 1)
        update_b = basis_b[:high, : len(scales)].to(dtype).flatten(1)
        outputs, inputs = context.shape[::-1] if is_transposed else context.shape
        rows = _PRODUCTS[inputs <= outputs, is_transposed]
        product = partial(_scaled, rows, update_a, update_b, number(settings, "scaling"))
        return row_delta(product, (context.shape[0], context.shape[1]), context.rounding_dtype)


def _scaled(
    rows: _Rows, update_a: torch.Tensor, update_b: torch.Tensor, scaling: float, start: int, stop: int
) -> torch.Tensor:
    return rows(update_a, update_b, slice(start, stop)) * scaling


#: Given updates A (rank * bases, lower dimension) and B (higher dimension, rank * bases): rows of the unscaled delta.
_Rows: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]"
#: As PEFT's own product goes: whether inputs are the lower dimension, and whether the base is stored (in, out).
_PRODUCTS: Final[dict[tuple[bool, bool], _Rows]] = {
    (True, True): lambda a, b, rows: a.T[rows] @ b.T,
    (True, False): lambda a, b, rows: (a.T @ b[rows].T).T,
    (False, True): lambda a, b, rows: b[rows] @ a,
    (False, False): lambda a, b, rows: (b @ a[:, rows]).T,
}


def _drawn(settings: Mapping[str, Setting], context: TileContext) -> list[torch.Tensor]:
    sizes = (int(number(settings, name)) for name in ("seed", "rank", "high", "low"))
    sparsity = number(settings, "sparsity")
    bases = _draw_sparse(*sizes, sparsity) if sparsity else _draw(*sizes)
    return [basis.to(context.base_dtype) for basis in bases]


@lru_cache(maxsize=1)  # all modules of an adapter share the bases
def _draw(seed: int, rank: int, high: int, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, 1, low) and B (high, bases, rank), drawn in bfloat16, of standard deviation 1."""
    import torch

    generator, bases = generator_of(seed), base_count(low, rank)
    slope, dtype = math.sqrt(5), torch.bfloat16
    basis_a = kaiming_uniform((rank, 1, low), low, slope, dtype, generator)
    basis_b = torch.empty(high, bases, rank, dtype=dtype)
    for index in range(bases):
        basis_b[:, index : index + 1] = kaiming_uniform((high, 1, rank), rank, slope, dtype, generator)
    return basis_a.div_(basis_a.std()), basis_b.div_(basis_b.std())


@lru_cache(maxsize=1)
def _draw_sparse(seed: int, rank: int, high: int, low: int, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of -1, 0 and 1 before the division, in float32; about 1 in `sparsity` is not 0."""
    import torch

    generator = generator_of(seed)
    shapes = ((rank, 1, low), (high, base_count(low, rank), rank))
    drawn = [torch.rand(shape, generator=generator) for shape in shapes]
    first, second = (_signs(basis, 1 / (2 * sparsity)) for basis in drawn)
    return first.div_(first.std()), second.div_(second.std())


def _signs(drawn: torch.Tensor, share: float) -> torch.Tensor:
    import torch

    signs = torch.zeros_like(drawn)
    signs[drawn < share] = -1
    signs[drawn > 1 - share] = 1
    return signs


def base_count(dimension: int, rank: int) -> int:
    """Return how many bases of a rank it takes to fill a dimension."""
    return -(-dimension // rank)


class RandloraKind(AdapterKind):
    """RANDLORA, random bases of full rank."""

    peft_type: ClassVar[str] = "RANDLORA"
    title: ClassVar[str] = "RandLoRA"
    formula: ClassVar[str] = "W + s·B@(l*A*g), A and B random"
    parts: ClassVar[Mapping[str, str]] = {
        **{f"randlora_{role}": role for role in _VECTORS},
        **{f"randlora_{role}": copy for role, copy in _COPIES.items()},
    }
    shared: ClassVar[Mapping[str, str]] = {f"randlora_{role}": role for role in _BASES}
    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(_COPIES.values(), _COPY_REASON)
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(32, 1),
            "randlora_alpha": finite_number(640),
            "projection_prng_key": seed_field(0),
            "save_projection": switch(True),
            "sparse": switch(False),
            "very_sparse": switch(False),
        },
        ignored=("randlora_dropout", "init_weights"),
        rank="r",
        alpha="randlora_alpha",
    )
    methods: ClassVar[Mapping[str, Method]] = {"randlora": RandloraMethod()}

    def needs_all_targets(self, values: Mapping[str, Any]) -> bool:
        """Whether projections are drawn: they are as large as the largest module's, and all modules share them."""
        return not values["save_projection"]

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; the bases are as large as the adapter's largest modules."""
        rank, shape = module.rank, matrix_of_linear(module)
        bases = base_count(min(shape), rank)
        module.expect("lambda", rank, bases)
        module.expect("gamma", bases, min(shape))
        largest = largest_shape(module)
        high, low = max(largest), min(largest)
        settings: dict[str, Setting] = {"scaling": module.scaling, "is_transposed": module.needs_transpose}
        working = 4 * rank * bases * sum(shape)
        if module.values["save_projection"]:
            module.expect("A", rank, 1, low)
            module.expect("B", high, base_count(low, rank), rank)
            for role, copy in _COPIES.items():
                if copy in module.shapes:
                    module.expect(copy, *module.shared[role])
            yield PlannedUpdate("randlora", (*_VECTORS, *_BASES), settings, working_bytes=working)
            return
        self._refuse_copies(module)
        settings |= {"seed": module.values["projection_prng_key"], "rank": rank, "high": high, "low": low}
        settings["sparsity"] = _sparsity(module, low)
        # at most two float32 copies of B at once, and a mask
        working += 9 * rank * (low + high * base_count(low, rank))
        yield PlannedUpdate("randlora", _VECTORS, settings, working_bytes=working)

    def _refuse_copies(self, module: TargetModule) -> None:
        for copy in _COPIES.values():
            if copy in module.shapes:
                hint = "with save_projection false PEFT draws the bases anew and leaves this one unused"
                module.refuse(copy, "no basis, as the config says", "one", hint)


def _sparsity(module: TargetModule, low: int) -> float:
    if module.values["very_sparse"]:
        return math.sqrt(low)
    return 3.0 if module.values["sparse"] else 0.0
