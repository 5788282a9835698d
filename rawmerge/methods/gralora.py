"""GraLoRA: a LoRA pair for each of k x k blocks of W, of rank r / k, and one pair for all of it if `hybrid_r`.

Source: PEFT 0.21.2 `tuners/gralora/layer.py` `Linear.get_delta_weight`. PEFT multiplies by factors in which most
numbers are zero, (in, r) for each block of outputs; so does this, for the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

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
from rawmerge.methods.lora import WHOLE_ELEMENTS

if TYPE_CHECKING:
    import torch

_BLOCKS = ("a", "b")
_HYBRID = ("general_a", "general_b")


class GraloraMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; `a` is (k, in / k, r), `b` (k, r, out / k), the general pair (h, in) and (out, h)."""
        own, scaling = upcast(tensors, context), number(settings, "scaling")
        product = _product(own, bool(settings["is_transposed"]))

        def rows(start: int, stop: int) -> torch.Tensor:
            return product(start, stop).mul_(scaling)

        if context.shape[0] * context.shape[1] <= WHOLE_ELEMENTS:
            return whole_delta(_whole(own, bool(settings["is_transposed"])) * scaling)
        return PreparedDelta(rows)


def _scattered(factor: torch.Tensor) -> torch.Tensor:
    """Return (k, in, r): for each block of outputs, its r / k ranks of each block of inputs, zero for other blocks."""
    import torch

    count, inputs, rank = factor.shape
    spread = torch.zeros(count, count, inputs, count, rank // count, dtype=factor.dtype)
    parts = factor.view(count, inputs, count, rank // count)
    for block in range(count):
        spread[:, block, :, block] = parts[block].transpose(0, 1)
    return spread.view(count, count * inputs, rank)


def _whole(own: Mapping[str, torch.Tensor], is_transposed: bool) -> torch.Tensor:
    """Return the unscaled delta as the base is stored, by PEFT's own calls."""
    import torch

    inputs = own["a"].shape[0] * own["a"].shape[1]
    delta = torch.einsum("ikr, kro -> iko", _scattered(own["a"]).transpose(0, 1), own["b"]).reshape(inputs, -1)
    if "general_a" in own:
        delta += (own["general_b"] @ own["general_a"]).T
    return delta if is_transposed else delta.T


def _product(own: Mapping[str, torch.Tensor], is_transposed: bool) -> Callable[[int, int], torch.Tensor]:
    """Return what gives rows of the unscaled delta as the base is stored."""
    import torch

    spread, right = _scattered(own["a"]), own["b"]
    height = right.shape[2]

    def of_inputs(start: int, stop: int) -> torch.Tensor:
        delta = torch.cat([spread[block, start:stop] @ right[block] for block in range(len(right))], dim=1)
        if "general_a" in own:
            delta += (own["general_b"] @ own["general_a"][:, start:stop]).T
        return delta

    def of_outputs(start: int, stop: int) -> torch.Tensor:
        parts = []
        for block in range(start // height, -(-stop // height)):
            first, last = max(start - block * height, 0), min(stop - block * height, height)
            parts.append((spread[block] @ right[block][:, first:last]).T)
        delta = torch.cat(parts)
        if "general_a" in own:
            delta += own["general_b"][start:stop] @ own["general_a"]
        return delta

    return of_inputs if is_transposed else of_outputs


class GraloraKind(AdapterKind):
    """GRALORA, granular low-rank adaptation."""

    peft_type: ClassVar[str] = "GRALORA"
    title: ClassVar[str] = "GraLoRA"
    formula: ClassVar[str] = "W_jn + s·(A_nj@B_jn)ᵀ, + s·B@A if hybrid"
    parts: ClassVar[Mapping[str, str]] = {
        "gralora_A": "a",
        "gralora_B": "b",
        "gralora_A_general.weight": "general_a",
        "gralora_B_general.weight": "general_b",
    }
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(32, 1),
            "hybrid_r": whole_number(0),
            "alpha": finite_number(64),
            "gralora_k": whole_number(2, 1),
        },
        ignored=("gralora_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"gralora": GraloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in)."""
        left, right = shapes.get("a", ()), shapes.get("b", ())
        return (right[0] * right[2], left[0] * left[1]) if len(left) == len(right) == 3 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        (rows, columns), values = module.matrix_shape, module.values
        rank, hybrid, count = values["r"], values["hybrid_r"], values["gralora_k"]
        if rows % count or columns % count or rank % count:
            expected = f"a gralora_k that divides r {rank}, {rows} outputs and {columns} inputs"
            module.refuse("a", expected, f"gralora_k {count}")
        module.expect("a", count, columns // count, rank)
        module.expect("b", count, rank, rows // count)
        if hybrid:
            module.expect("general_a", hybrid, columns)
            module.expect("general_b", rows, hybrid)
        settings = {"scaling": values["alpha"] / (rank + hybrid), "is_transposed": module.needs_transpose}
        working = 4 * (rank * (count + 1) * columns + rank * rows + hybrid * (rows + columns))
        yield PlannedUpdate("gralora", (*_BLOCKS, *(_HYBRID if hybrid else ())), settings, working_bytes=working)
