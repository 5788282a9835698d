"""What each field of `adapter_config.json` leads to: followed, without effect, or refused.

Source: PEFT 0.21.2 `tuners/lora/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rawmerge.errors import Problem
from rawmerge.formats.kind_fields import Field, KindFields, switch

LORA: Final = "LORA"

#: Fields that change the merge and are followed, or that tell whether base and adapter belong together.
SUPPORTED_FIELDS: Final = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "layer_replication",
        "lora_B_layout",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    ]
)
#: Fields that say how the adapter was trained, or repeat what its tensors say; they do not change a merge.
IGNORED_FIELDS: Final = frozenset(
    [
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
    ]
)
#: Fields that change the merge in a way this version does not do; refused by name when set.
REFUSED_FIELDS: Final = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only, so it has no place in the weights",
    "arrow_config": "Arrow routes each token between adapters, so it has no place in the weights",
    "megatron_config": "Megatron shards are not PEFT tensors",
    "use_qalora": "QALoRA merges into quantised weights only",
}
#: Values of `init_lora_weights` after which the stored pair is a plain LoRA on the unchanged base.
PLAIN_INITS: Final = frozenset({"eva", "gaussian", "orthogonal"})
#: Values whose change of the base can be repeated, or that change how the delta is rounded.
REPEATED_INITS: Final = frozenset({"pissa", "olora", "mica"})
#: Why the base of other values cannot be had again.
REFUSED_INITS: Final = {
    "corda": "CorDA changed the base in training by what it saw of some data, which the adapter does not hold",
    "loftq": "LoftQ replaced the base by the residual of its quantisation",
    "lora_ga": "LoRA-GA changed the base in training by a gradient, which the adapter does not hold",
    "pissa_niter_": "PiSSA's fast singular value decomposition draws random numbers that the adapter does not hold",
}
#: LoRA's fields that choose a variant; what they mean is in `methods/lora_kind`.
LORA_VARIANT_FIELDS: Final = KindFields(
    followed={
        "use_dora": switch(False),
        "init_lora_weights": Field(lambda _: True, "true, false or a name", True),  # `_unsupported_init` checks it
        "kasa_config": Field(lambda value: isinstance(value, dict), "a table"),
        "use_bdlora": Field(lambda value: isinstance(value, dict), "a table"),
    },
    ignored=("velora_config", "monteclora_config"),
)
#: Fields of every kind that are followed, or that tell whether base and adapter belong together.
COMMON_FIELDS: Final = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    ]
)
#: Fields of every kind that do not change a merge.
COMMON_IGNORED: Final = frozenset(["inference_mode", "layers_pattern", "layers_to_transform", "runtime_config"])
#: How the columns of an experts' lora_B are ordered, as Unsloth marks it: PEFT's way, or Unsloth's of old.
LORA_B_LAYOUTS: Final = ("rank_major", "grouped_by_expert")


def unsupported_lora_fields(fields: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield a problem for every field that a LoRA config sets and rawmerge does not follow, with the reason."""
    known = {*SUPPORTED_FIELDS, *IGNORED_FIELDS, *LORA_VARIANT_FIELDS.followed, *LORA_VARIANT_FIELDS.ignored}
    for name, value in fields.items():
        if name == "init_lora_weights":
            yield from _unsupported_init(value)
        elif not value:
            continue
        elif name in REFUSED_FIELDS:
            yield Problem(name, "it to be unset", ascii(value)[:80], REFUSED_FIELDS[name])
        elif name == "lora_B_layout" and value not in LORA_B_LAYOUTS:
            yield Problem(name, f"one of {', '.join(LORA_B_LAYOUTS)}", ascii(value)[:80])
        elif name not in known:
            yield unknown_field(name, value)


def unknown_field(name: str, value: object) -> Problem:
    """Return why a field that nobody knows is refused."""
    hint = "a newer PEFT may mean something by it that would be lost; remove it if you know it does not"
    return Problem(name, "a config field that rawmerge knows", ascii(value)[:80], hint)


def _unsupported_init(value: object) -> Iterable[Problem]:
    known = PLAIN_INITS | REPEATED_INITS
    if not value or value is True or (isinstance(value, str) and value.lower() in known):
        return
    reason = next((why for name, why in REFUSED_INITS.items() if str(value).lower().startswith(name)), "")
    converted = "PEFT converts such adapters: path_initial_model_for_weight_conversion"
    hint = f"{reason or 'it may have changed the base in training'}; {converted}"
    expected = f"true, false or one of {', '.join(sorted(known))}"
    yield Problem("init_lora_weights", expected, ascii(value)[:80], hint)
