"""What each field of `adapter_config.json` leads to: followed, without effect, or refused.

Source: PEFT 0.21.2 `tuners/lora/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rawmerge.errors import Problem
from rawmerge.formats.kind_fields import Field, KindFields, is_finite, switch

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


def _is_kasa(value: Any) -> bool:
    """Whether a value is KaSA's table: weights of losses, which do not change a merge."""
    numbers = value.values() if isinstance(value, dict) and value.keys() <= {"beta", "gamma"} else [""]
    return all(number is None or is_finite(number) for number in numbers)


def _is_bdlora(value: Any) -> bool:
    """Whether a value is BD-LoRA's table."""
    if not isinstance(value, dict) or not value.keys() <= {*_BLOCK_LISTS, "nblocks", "match_strict"}:
        return False
    lists = [value.get(name) or [] for name in _BLOCK_LISTS]
    count = value.get("nblocks", 1)
    return (
        all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        and type(count) is int
        and 0 < count < 2**31
        and isinstance(value.get("match_strict", True), bool)
    )


_BLOCK_LISTS: Final = ("target_modules_bd_a", "target_modules_bd_b")
#: LoRA's fields that choose a variant; what they mean is in `methods/lora_kind`.
LORA_VARIANT_FIELDS: Final = KindFields(
    followed={
        "use_dora": switch(False),
        "init_lora_weights": Field(lambda _: True, "true, false or a name", True),  # `_unsupported_init` checks it
        "kasa_config": Field(_is_kasa, "a table of beta and gamma, finite numbers"),
        "use_bdlora": Field(
            _is_bdlora,
            f"a table of {', '.join(_BLOCK_LISTS)} (names), nblocks (1 or more), match_strict (true or false)",
        ),
    },
    ignored=("velora_config", "monteclora_config"),
)
#: Fields that each make LoRA a variant of it; PEFT knows no two at a time, nor one of them on bare parameters.
_VARIANTS: Final = ("use_dora", "kasa_config", "use_bdlora", "velora_config", "monteclora_config")
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
    yield from _impossible_variants(fields)


def lora_variants(values: Mapping[str, Any]) -> list[str]:
    """Return the names of fields that make LoRA a variant of it, or that change the base before it is trained."""
    init = values.get("init_lora_weights")
    is_special = isinstance(init, str) and init.lower() in REPEATED_INITS
    return [name for name in _VARIANTS if values.get(name) not in (None, False)] + ["init_lora_weights"] * is_special


def changes_base(values: Mapping[str, Any]) -> bool:
    """Return whether weights were not the base's own any more when their pairs were trained."""
    init = values.get("init_lora_weights")
    return values.get("kasa_config") is not None or (isinstance(init, str) and init.lower() in {"pissa", "olora"})


def _impossible_variants(fields: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield a problem for each pair of a LoRA config's fields that PEFT does not train together."""
    chosen = lora_variants(fields)
    if chosen and fields.get("target_parameters"):
        yield Problem(chosen[0], "plain LoRA with target_parameters, for PEFT trains nothing else there", "a variant")
    if changes_base({"init_lora_weights": fields.get("init_lora_weights")}):
        chosen.remove("init_lora_weights")  # what PiSSA and OLoRA did to the base is over before a variant begins
    if len(chosen) > 1:
        yield Problem(chosen[1], "one variant of LoRA at a time", f"it beside {chosen[0]}")
    if fields.get("lora_bias") and fields.get("use_dora"):
        yield Problem("lora_bias", "it to be unset, for PEFT does not train DoRA with it", "it beside use_dora")


def unknown_field(name: str, value: object) -> Problem:
    """Return why a field that nobody knows is refused."""
    hint = "a newer PEFT may mean something by it that would be lost; remove it if you know it does not"
    return Problem(name, "a config field that rawmerge knows", ascii(value)[:80], hint)


def _unsupported_init(value: object) -> Iterable[Problem]:
    known = PLAIN_INITS | REPEATED_INITS
    # PEFT compares PiSSA's name letter by letter, so nothing was trained with "PiSSA"
    is_known = isinstance(value, str) and (value if value.lower() == "pissa" else value.lower()) in known
    if not value or value is True or is_known:
        return
    reason = next((why for name, why in REFUSED_INITS.items() if str(value).lower().startswith(name)), "")
    converted = "PEFT converts such adapters: path_initial_model_for_weight_conversion"
    hint = f"{reason or 'it may have changed the base in training'}; {converted}"
    expected = f"true, false or one of {', '.join(sorted(known))}"
    yield Problem("init_lora_weights", expected, ascii(value)[:80], hint)
