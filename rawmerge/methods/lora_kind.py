"""LoRA with its variants: which of them a config asks for, and what that does to a module.

Source: PEFT 0.21.2 `tuners/lora/layer.py` `resolve_lora_variant`, `tuners/lora/variants.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final

from rawmerge.formats.adapter_fields import LORA, LORA_VARIANT_FIELDS
from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods import expert_lora, lora, lora_bias, token_rows
from rawmerge.methods.interface import AdapterKind, Method, ModuleFacts, PlannedUpdate, Shape, TargetModule

_BIAS_ROLE: Final = "lora_b_bias"


class LoraKind(AdapterKind):
    """LORA: pairs on linear, transposed, embedding and convolution weights, and on bare parameters."""

    peft_type: ClassVar[str] = LORA
    title: ClassVar[str] = "LoRA"
    formula: ClassVar[str] = "W + s·B@A"
    modules: ClassVar[str] = "Linear, Conv1D, Conv1d/2d/3d, Embedding, experts"
    parts: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[Mapping[str, str]] = {}
    in_parts: ClassVar[tuple[str, ...]] = (lora.KIND,)
    fields: ClassVar[KindFields] = LORA_VARIANT_FIELDS
    methods: ClassVar[Mapping[str, Method]] = {
        lora.KIND: lora.LoraMethod(),
        lora_bias.KIND: lora_bias.LoraBiasMethod(),
        expert_lora.KIND: expert_lora.ExpertLoraMethod(),
        token_rows.KIND: token_rows.TokenRowsMethod(),
    }

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (out, in, *kernel) of B @ A."""
        shape_a, shape_b = (shapes[role] for roles in lora.PAIRS for role in roles if role in shapes)
        return (shape_b[0], *shape_a[1:]) if shape_a and shape_b else ()

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the pair's update, and its bias's."""
        yield self._pair(module)
        if _BIAS_ROLE in module.shapes:
            yield from _bias(module)

    def _pair(self, module: TargetModule) -> PlannedUpdate:
        facts = ModuleFacts(
            base_shape=module.base_shape,
            rank=module.rank,
            scaling=module.scaling,
            square_is_transposed=module.is_transposed,
            rounds_delta=module.rounds_delta,
        )
        roles = [role for roles in lora.PAIRS for role in roles if role in module.shapes]
        settings = lora.LoraMethod().settings({role: module.shapes[role] for role in roles}, facts)
        return PlannedUpdate(lora.KIND, tuple(roles), settings)


def _bias(module: TargetModule) -> Iterator[PlannedUpdate]:
    shape = module.shapes[_BIAS_ROLE]
    facts = ModuleFacts(module.bias_shape or shape, module.rank, module.scaling, None)
    settings = lora_bias.LoraBiasMethod().settings({_BIAS_ROLE: shape}, facts)
    yield PlannedUpdate(lora_bias.KIND, (_BIAS_ROLE,), settings, parameter="bias")
