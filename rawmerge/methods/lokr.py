"""LoKr: W + alpha / r * kron(w1, w2), each factor whole or a product of two.

Source: PEFT 0.21.2 `tuners/lokr/layer.py`: `LoKrLayer.get_delta_weight`, `make_kron`, `make_weight_cp`
(convolutions with `use_effective_conv2d`); the sum in `tuners/lycoris_utils.py` `LycorisLayer.merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, finite_number, whole_number
from rawmerge.methods.delta import PreparedDelta, upcast, whole_delta
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

if TYPE_CHECKING:
    import torch

_ROLES: Final = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
_CONV1D_DIMENSIONS: Final = 3


class LokrMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the factors are made whole, their Kronecker product only as rows are asked for."""
        import torch

        own, scaling = upcast(tensors, context), number(settings, "scaling")
        first = own["w1"] if "w1" in own else own["w1_a"] @ own["w1_b"]
        second = own["w2"] if "w2" in own else _product(own)
        if second.dim() == _CONV1D_DIMENSIONS:
            # PEFT gives w1 no third dimension here, so that its product has (inputs, kernel) in another order
            return whole_delta(torch.kron(first, second.contiguous()).mul_(scaling).reshape(context.shape))
        return _row_local(first, second.flatten(1), scaling)


def _product(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return w2: (out, in * kernel) from (out, r) and (r, in * kernel), or (out, in, *kernel) with `t2`."""
    import torch

    if "t2" not in own:
        return own["w2_a"] @ own["w2_b"]
    return torch.einsum("i j k l, i p, j r -> p r k l", own["t2"], own["w2_a"], own["w2_b"])


def _row_local(first: torch.Tensor, second: torch.Tensor, scaling: float) -> PreparedDelta:
    """Return the update that adds kron(first, second), both matrices; an element of it is a product of two alone."""
    return PreparedDelta(partial(kronecker_rows, first, second, scaling))


def kronecker_rows(first: torch.Tensor, second: torch.Tensor, scaling: float, start: int, stop: int) -> torch.Tensor:
    """Return rows of scaled `kron(first, second)`: row i is that of first's i // n and second's i % n."""
    import torch

    row = torch.arange(start, stop, device=first.device)
    left, right = first[row // len(second)], second[row % len(second)]
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1).mul_(scaling)


class LokrKind(AdapterKind):
    """LOKR, low-rank Kronecker products."""

    peft_type: ClassVar[str] = "LOKR"
    title: ClassVar[str] = "LoKr"
    formula: ClassVar[str] = "W + s·kron(w1, w2)"
    modules: ClassVar[str] = "Linear, Conv1d, Conv2d"
    parts: ClassVar[Mapping[str, str]] = {f"lokr_{role}": role for role in _ROLES}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(8, 1), "alpha": finite_number(8)},
        # the factors' shapes tell how they were cut
        ignored=(
            "rank_dropout",
            "rank_dropout_scale",
            "module_dropout",
            "init_weights",
            "use_effective_conv2d",
            "decompose_both",
            "decompose_factor",
        ),
        rank="r",
        alpha="alpha",
    )
    methods: ClassVar[Mapping[str, Method]] = {"lokr": LokrMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in); of convolutions (out, in * kernel), or (out, in, *kernel)."""
        first, second = _factor_shape(shapes, "w1"), _factor_shape(shapes, "w2")
        if len(first) != 2 or len(second) < 2:
            return None
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        out_factor, in_factor = self._check_first(module)
        roles: tuple[str, ...] = ("w1",) if "w1" in module.shapes else ("w1_a", "w1_b")
        roles += self._check_second(module, module.base_shape[0] // out_factor, in_factor)
        delta, second = prod(module.base_shape), prod(module.base_shape) // (out_factor * in_factor)
        is_whole = "w2" in module.shapes and len(module.shapes["w2"]) == _CONV1D_DIMENSIONS
        working = 8 * (2 * delta if is_whole else second + out_factor * in_factor)
        yield PlannedUpdate("lokr", roles, {"scaling": module.scaling}, working_bytes=working)

    def _check_first(self, module: TargetModule) -> tuple[int, int]:
        """Return the shape of w1."""
        if "w1" in module.shapes:
            module.expect("w1", -1, -1)
        else:
            module.expect("w1_a", -1, module.rank)
            module.expect("w1_b", module.rank, -1)
        first = _factor_shape(module.shapes, "w1")
        outputs, inputs = (*module.base_shape, 1)[:2]
        role = "w1" if "w1" in module.shapes else "w1_a"
        if outputs % first[0] or inputs % first[1]:
            expected = f"a shape whose numbers divide the base's {[outputs, inputs]}"
            module.refuse(role, expected, f"shape {list(first)}", "is this the base the adapter was trained on?")
        return first[0], first[1]

    def _check_second(self, module: TargetModule, rows: int, in_factor: int) -> tuple[str, ...]:
        """Return the roles of w2, which has these rows and the base's inputs over `in_factor`."""
        columns, kernel = (*module.base_shape, 1)[1] // in_factor, module.base_shape[2:]
        if "w2" in module.shapes:
            module.expect("w2", rows, columns, *kernel)
            return ("w2",)
        if "t2" in module.shapes:
            module.expect("w2_a", module.rank, rows)
            module.expect("w2_b", module.rank, columns)
            # of a one-dimensional kernel too, PEFT makes a two-dimensional one
            module.expect("t2", module.rank, module.rank, *(*kernel, 1)[: max(2, len(kernel))])
            return ("w2_a", "w2_b", "t2")
        module.expect("w2_a", rows, module.rank)
        module.expect("w2_b", module.rank, columns * prod(kernel))
        return ("w2_a", "w2_b")


def _factor_shape(shapes: Mapping[str, Shape], factor: str) -> Shape:
    """Return the shape of w1 or w2, as a matrix where it is a plain product; () where the tensors are none."""
    if factor in shapes:
        return shapes[factor]
    left, right = shapes.get(f"{factor}_a", ()), shapes.get(f"{factor}_b", ())
    if len(left) != 2 or len(right) != 2:
        return ()
    if factor == "w2" and "t2" in shapes:
        kernel = shapes["t2"][2:]
        return (left[1], right[1] * prod(kernel))
    return (left[0], right[1])
