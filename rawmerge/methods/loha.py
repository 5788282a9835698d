"""LoHa: W + alpha / r * ((w1_a @ w1_b) * (w2_a @ w2_b)), each product a factor of the elementwise one.

Source: PEFT 0.21.2 `tuners/loha/layer.py`: `HadaWeight.forward`, `HadaWeightCP.forward` (convolutions with
`use_effective_conv2d`), `LoHaLayer.get_delta_weight`; the sum in `tuners/lycoris_utils.py` `LycorisLayer.merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, finite_number, whole_number
from rawmerge.methods.delta import PreparedDelta, row_delta, upcast, whole_delta
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

_FACTORS: Final = ("w1_a", "w1_b", "w2_a", "w2_b")
_KERNELS: Final = ("t1", "t2")


class LohaMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; with `t1` and `t2` the delta is made whole."""
        own, scaling = upcast(tensors, context), number(settings, "scaling")
        if "t1" in own:
            first, second = (_rebuilt(own[f"t{k}"], own[f"w{k}_a"], own[f"w{k}_b"]) for k in (1, 2))
            return whole_delta(first * second * scaling)
        return _row_local(own, scaling)


def _row_local(own: Mapping[str, torch.Tensor], scaling: float) -> PreparedDelta:
    product = partial(_rows, tuple(own[role] for role in _FACTORS), scaling)
    return row_delta(product, (own["w1_a"].shape[0], own["w1_b"].shape[1]))


def _rows(factors: tuple[torch.Tensor, ...], scaling: float, start: int, stop: int) -> torch.Tensor:
    """Return rows of the delta, given w1_a, w1_b, w2_a, w2_b."""
    first = factors[0][start:stop] @ factors[1]
    return first.mul_(factors[2][start:stop] @ factors[3]).mul_(scaling)


def _rebuilt(kernel: torch.Tensor, out_factor: torch.Tensor, in_factor: torch.Tensor) -> torch.Tensor:
    """Return (out, in, *kernel) from (r, r, *kernel), (r, out) and (r, in)."""
    import torch

    return torch.einsum("i j ..., j r, i p -> p r ...", kernel, in_factor, out_factor)


class LohaKind(AdapterKind):
    """LOHA, low-rank Hadamard products."""

    peft_type: ClassVar[str] = "LOHA"
    title: ClassVar[str] = "LoHa"
    formula: ClassVar[str] = "W + s·(w1a@w1b)*(w2a@w2b)"
    modules: ClassVar[str] = "Linear, Conv1d, Conv2d"
    parts: ClassVar[Mapping[str, str]] = {f"hada_{role}": role for role in (*_FACTORS, *_KERNELS)}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(8, 1), "alpha": finite_number(8)},
        ignored=("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"),
        rank="r",
        alpha="alpha",
    )
    methods: ClassVar[Mapping[str, Method]] = {"loha": LohaMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in): of convolutions (out, in * kernel), or (out, in, *kernel)."""
        left, right = shapes.get("w1_a", ()), shapes.get("w1_b", ())
        if len(left) != 2 or len(right) != 2:
            return None
        return (left[1], right[1], *shapes["t1"][2:]) if "t1" in shapes else (left[0], right[1])

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        rank, (rows, columns) = module.rank, module.matrix_shape
        has_kernel = any(role in module.shapes for role in _KERNELS)
        for half in ("w1", "w2"):
            if has_kernel:
                module.expect(f"{half}_a", rank, module.base_shape[0])
                module.expect(f"{half}_b", rank, module.base_shape[1])
            else:
                module.expect(f"{half}_a", rows, rank)
                module.expect(f"{half}_b", rank, columns)
        for role in _KERNELS if has_kernel else ():
            module.expect(role, rank, rank, *module.base_shape[2:])
        roles = (*_FACTORS, *(_KERNELS if has_kernel else ()))
        working = 3 * prod(module.base_shape) * 4 if has_kernel else 0
        yield PlannedUpdate("loha", roles, {"scaling": module.scaling}, working_bytes=working)
