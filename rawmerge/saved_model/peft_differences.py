"""Where what LLaMA-Factory saves is not what an adapter was trained to, so that rawmerge refuses it or tells it.

Source: PEFT 0.21.2 `utils/transformers_weight_conversion.py`, which rewrites the config and the tensors of LoRA made
with transformers 4 for experts that transformers 5 holds fused; `tuners/tuners_utils.py` (`replicate_layers`) and
`utils/other.py` (`ModulesToSaveWrapper`, one for each module that is named).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from rawmerge.errors import PlanError, Problem, quote
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.comparison import same_values
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.tie import Tie, find_tie
from rawmerge.merge_plan import MergePlan

LEAVE_OUT: Final = "leave --like llamafactory (--as-llamafactory) out"
#: Families in which PEFT makes pairs on single experts fit the fused ones: by a target of one of these names that it
#: takes out of target_modules for good, so that no other module of that name has its pair loaded.
_MIXTRAL: Final = frozenset({"mixtral", "minimax", "minimax_m2"})
_QWEN2_MOE: Final = frozenset(
    """
    Dots3NoteTextModel UnlimitedOcrTextModel afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1
    ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum
    olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open
    """.split()  # noqa: SIM905  # a list would take a line for each
)
FUSED_TARGETS: Final = {
    **dict.fromkeys(_MIXTRAL, frozenset({"w1", "w2", "w3"})),
    **dict.fromkeys(_QWEN2_MOE, frozenset({"gate_proj", "up_proj", "down_proj"})),
}
_PREFIX: Final = "base_model.model."
_SINGLE: Final = re.compile(r"(.*\bexperts\.[0-9]{1,9}\.[^.]+)\.")
_LORA: Final = ".lora_"


def check_adapter(base: BaseCheckpoint, adapter: Adapter) -> None:
    """Refuse an adapter of which LLaMA-Factory saves nothing, or other tensors than rawmerge writes.

    Raises:
        PlanError: it repeats layers, or replaces both sides of a tie each by its own.
    """
    problems = [*_layer_problems(adapter), *_tie_problems(base, adapter)]
    if problems:
        raise PlanError(*problems)


def _layer_problems(adapter: Adapter) -> Iterator[Problem]:
    if adapter.config.layer_replication:
        found = "layer_replication, after which transformers refuses to save PEFT's model, for layers share tensors"
        yield Problem("layer_replication", "an adapter for the base's own layers", found, LEAVE_OUT)


def _tie_problems(base: BaseCheckpoint, adapter: Adapter) -> Iterator[Problem]:
    saved, is_kept = tuple(adapter.config.modules_to_save), adapter.config.ensure_weight_tying
    tie = find_tie(base.config, DiskNames(base, "")) if saved and not is_kept else None
    if tie is None or not all(name.removesuffix(".weight").endswith(saved) for name in (tie.input, tie.output)):
        return
    if _is_one(base, tie):
        found = f"both sides replaced, {quote(tie.input)} and {quote(tie.output)}: PEFT unties them and two are saved"
        yield Problem("modules_to_save", "embeddings that stay tied, as ensure_weight_tying says", found, LEAVE_OUT)


def _is_one(base: BaseCheckpoint, tie: Tie) -> bool:
    """Whether loaders find one tensor in the tie: where the disk holds two that differ, they keep them apart."""
    one, other = base.tensors[tie.input], base.tensors.get(tie.output)
    return other is None or same_values(one, other, one.dtype)


def not_loaded_by_peft(plan: MergePlan, base: BaseCheckpoint) -> list[str]:
    """Return the output tensors that rawmerge changes by tensors of an adapter that PEFT does not load.

    Args:
        plan: of one or several adapters.
        base: that which it was made for.
    """
    family, targets = DiskNames(base, "").family, FUSED_TARGETS.get(base.config.model_type, frozenset())

    def is_left_out(name: str) -> bool:
        is_lora = _LORA in name
        single = _SINGLE.match(name.removeprefix(_PREFIX))
        if single and family.fused_place(family.canonical(f"{single[1]}.weight")):
            return not (is_lora and targets)
        return is_lora and name.partition(_LORA)[0].rpartition(".")[2] in targets

    uses = (use for use in plan.adapter_uses if use.use == "updates" and is_left_out(use.name))
    return list(dict.fromkeys(use.tensor_name for use in uses))
