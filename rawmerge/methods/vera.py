"""VeRA: W + (b * B) @ (d * A), with trained vectors b and d, and one random pair A, B for all modules.

Source: PEFT 0.21.2 `tuners/vera/layer.py` `Linear.get_delta_weight`; `tuners/vera/model.py` `_kaiming_init`,
`VeraModel._find_dim` and `_init_vera_A_vera_B`, for adapters that do not hold the pair. Such a pair is rounded to the
base's dtype, as it was in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, switch, whole_number
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.randomness import (
    generator_of,
    kaiming_uniform,
    largest_shape,
    matrix_of_linear,
    seed_field,
)

if TYPE_CHECKING:
    import torch

_VECTORS: Final = ("lambda_b", "lambda_d")
_PAIR: Final = ("A", "B")


class VeraMethod:
    """The delta of one module, as a LoRA pair."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the pair A, B is drawn where it is not among the tensors.

        Of PVeRA's A and d, only the first half, which makes the mean, is used.
        """
        dtype, is_transposed = context.compute_dtype, bool(settings["is_transposed"])
        shared_a, shared_b = (tensors["A"], tensors["B"]) if "A" in tensors else _drawn(settings, context)
        rank = shared_b.shape[1]
        outputs, inputs = context.shape[::-1] if is_transposed else context.shape
        vector_b, vector_d = (tensors[role].to(dtype).unsqueeze(-1) for role in _VECTORS)
        return PreparedLora(
            lora_a=vector_d[:rank] * shared_a[:rank, :inputs].to(dtype),
            lora_b=vector_b * shared_b[:outputs].to(dtype),
            scaling=1.0,
            is_transposed=is_transposed,
            rounding_dtype=None,
        )


def _drawn(settings: Mapping[str, Setting], context: TileContext) -> list[torch.Tensor]:
    sizes = ("seed", "a_rows", "rank", "inputs", "outputs")
    pair = _draw(*(int(number(settings, name)) for name in sizes))
    return [tensor.to(context.base_dtype) for tensor in pair]


@lru_cache(maxsize=1)  # all modules of an adapter share the pair
def _draw(seed: int, a_rows: int, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (a_rows, inputs) and B (outputs, rank), float32."""
    import torch

    generator = generator_of(seed)
    shared_a = kaiming_uniform((a_rows, inputs), inputs, 0.0, torch.float32, generator)
    return shared_a, kaiming_uniform((outputs, rank), rank, 0.0, torch.float32, generator)


class VeraKind(AdapterKind):
    """VERA, vector-based random matrix adaptation."""

    peft_type: ClassVar[str] = "VERA"
    title: ClassVar[str] = "VeRA"
    formula: ClassVar[str] = "W + (b*B)@(d*A)"
    parts: ClassVar[Mapping[str, str]] = {f"vera_{role}": role for role in _VECTORS}
    shared: ClassVar[Mapping[str, str]] = {f"vera_{role}": role for role in _PAIR}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(256, 1), "projection_prng_key": seed_field(0), "save_projection": switch(True)},
        ignored=("vera_dropout", "d_initial", "init_weights"),
        rank="r",
    )
    methods: ClassVar[Mapping[str, Method]] = {"vera": VeraMethod()}
    #: How many rows A and d have for each of the rank.
    rows_per_rank: ClassVar[int] = 1

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, -1)."""
        vector = shapes.get("lambda_b", ())
        return (vector[0], -1) if len(vector) == 1 else None

    def needs_all_targets(self, values: Mapping[str, Any]) -> bool:
        """Whether projections are drawn: they are as large as the largest module's, and all modules share them."""
        return not values["save_projection"]

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; the random pair is as large as the adapter's largest modules."""
        rank, (rows, columns) = module.rank, matrix_of_linear(module)
        a_rows = rank * self.rows_per_rank
        module.expect("lambda_b", rows)
        module.expect("lambda_d", a_rows)
        outputs, inputs = largest_shape(module)
        settings: dict[str, Setting] = {"is_transposed": module.needs_transpose}
        working = 8 * rank * (rows + columns)
        if module.values["save_projection"]:
            module.expect("A", a_rows, inputs)
            module.expect("B", outputs, rank)
            yield PlannedUpdate("vera", (*_VECTORS, *_PAIR), settings, working_bytes=working)
            return
        settings |= {"seed": module.values["projection_prng_key"], "rank": rank, "a_rows": a_rows}
        settings |= {"inputs": inputs, "outputs": outputs}
        drawn = 8 * (a_rows * inputs + outputs * rank)
        yield PlannedUpdate("vera", _VECTORS, settings, working_bytes=working + drawn)
