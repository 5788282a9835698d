"""`adapter_config.json` of a PEFT adapter: text to `AdapterConfig`, or a refusal that names every field.

Source: PEFT 0.21.2 `tuners/lora/config.py` (fields), `tuners/lora/layer.py` (scaling) and `utils/other.py`
`get_pattern_key` (patterns). What a field means for a merge is stated once, in the tables below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from rawmerge.errors import AdapterError, Problem, ProblemCollector, UnsupportedAdapterError
from rawmerge.formats.adapter_fields import (
    COMMON_FIELDS,
    COMMON_IGNORED,
    LORA,
    LORA_VARIANT_FIELDS,
    unknown_field,
    unsupported_lora_fields,
)
from rawmerge.formats.adapter_values import bad_common_values, bad_kind_values, bad_values
from rawmerge.formats.kind_fields import KindFields
from rawmerge.formats.patterns import first_match
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

CONFIG_NAME: Final = "adapter_config.json"
#: Heads that PEFT adds to `modules_to_save` by itself: task type to module names (`peft_model.py`).
TASK_HEADS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the config says about a merge; ranks and alphas as PEFT resolves them.

    Attributes:
        kind: `peft_type`.
        values: the kind's own fields, defaults in the place of absent ones; of LoRA those that choose a variant.
        rank: `r`, inner dimension of a pair unless `rank_pattern` says otherwise.
        alpha: `lora_alpha`, numerator of the scaling unless `alpha_pattern` says otherwise.
        rank_pattern: key (a regular expression on the end of a module path) to rank, first match wins.
        alpha_pattern: the same for alpha.
        use_rslora: scaling is alpha / sqrt(rank) instead of alpha / rank.
        fan_in_fan_out: PEFT's flag for weights stored (in, out); that of the module it visited last.
        modules_to_save: names of modules that the adapter stores whole.
        base_model_name: `base_model_name_or_path`, or empty.
        bias: which biases were trained and are stored: `none`, `all` or `lora_only`, those of targeted modules.
        lora_bias: pairs have a bias too, scaled as they are.
        target_parameters: bare parameters that have pairs, as for `matches_target`; the names of pairs lack them.
        token_indices: module (any path that ends in it, dot or not) to its trained rows, in the order of the stored
            rows; the module "" is the model's input embedding.
        layer_replication: ranges of the base's layers that the trained model's layers are, one range after another.
        ensure_weight_tying: what is trained on the input embedding holds for a tied output embedding too.
        lora_b_layout: order of an experts' lora_B, one of `LORA_B_LAYOUTS`, or empty: PEFT's.
        revision: commit or branch of the base, or empty.
        task_type: PEFT's kind of head, as `CAUSAL_LM`, or empty.
        peft_version: version of PEFT that saved the adapter, or empty: before 0.18.
        base_model_class: class of the trained model, or empty; PEFT states it where there is no task type.
        target_modules: modules that were to have pairs: a regular expression, or names as for `matches_target`.
        exclude_modules: modules that were not, in the same two ways.
        layers_to_transform: numbers of the layers that were to have them; none for all.
        layers_pattern: names of the lists of modules that these numbers are about; none for any.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    base_model_name: str = ""
    bias: str = "none"
    lora_bias: bool = False
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layer_replication: tuple[tuple[int, int], ...] = ()
    ensure_weight_tying: bool = False
    lora_b_layout: str = ""
    revision: str = ""
    task_type: str = ""
    peft_version: str = ""
    base_model_class: str = ""
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    kind: str = LORA
    values: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module_path: str) -> int:
        """Return the rank that the config states for a module (path without `base_model.model.`).

        Raises:
            AdapterError: finding it takes too many steps; so does `alpha_of`.
        """
        return _of_pattern(self.rank_pattern, module_path, self.rank, "rank_pattern")

    def alpha_of(self, module_path: str) -> float:
        """Return the alpha that the config states for a module."""
        return _of_pattern(self.alpha_pattern, module_path, self.alpha, "alpha_pattern")

    def scaling_of(self, module_path: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) with rsLoRA: dimensionless."""
        rank, alpha = self.rank_of(module_path), self.alpha_of(module_path)
        if not rank:  # a kind without
            return 0.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def matches_target(targets: Iterable[str], path: str) -> bool:
    """Return whether a list of targets names `path`: it, or the end of it at a dot.

    Source: PEFT `tuners/tuners_utils.py` `check_target_module_exists` and `_inject_parameters`.
    """
    return any(path == target or path.endswith(f".{target}") for target in targets)


def is_saved_module(config: AdapterConfig, module_path: str) -> bool:
    """Return whether PEFT stores a module whole, or one above it: any path that ends in a name, dot or not.

    Source: PEFT `utils/other.py` `_set_trainable`.
    """
    names = (*config.modules_to_save, *TASK_HEADS.get(config.task_type, ()))
    ends = (end for end, character in enumerate(f"{module_path}.") if character == ".")
    return any(module_path.endswith(names, 0, end) for end in ends)


def _of_pattern(table: Mapping[str, _T], module_path: str, default: _T, field: str) -> _T:
    found = first_match(table, module_path, field) if table else None
    if found is not None:
        return found
    return table.get(module_path, default)  # PEFT takes a key that is the path itself, whatever it means as a regex


def parse_adapter_config(
    raw: bytes, path: str, kinds: Mapping[str, KindFields] | None = None, refused: Mapping[str, str] | None = None
) -> AdapterConfig:
    """Return the config, if every field in it can be followed.

    Args:
        raw: the file's bytes.
        path: where it lies, for messages.
        kinds: fields of the kinds that are merged beside LoRA, by `peft_type`.
        refused: kinds that cannot be merged, to the reason.

    Raises:
        AdapterError: not strict JSON, or a field of a wrong type or value; all such fields at once.
        UnsupportedAdapterError: another PEFT type, or fields that this version refuses; all of them at once.
    """
    try:
        fields = parse_json_object(raw)
    except StrictJsonError as error:
        raise AdapterError(Problem(path, "an adapter config of strict JSON", str(error))) from error
    known = kinds or {}
    _check_type(fields, tuple(dict.fromkeys((LORA, *known))), refused or {})
    kind = fields["peft_type"]
    return _parse_lora(fields) if kind == LORA else _parse_kind(fields, known[kind])


def _parse_lora(fields: Mapping[str, Any]) -> AdapterConfig:
    problems = ProblemCollector()
    problems.add(UnsupportedAdapterError, unsupported_lora_fields(fields))
    problems.add(AdapterError, [*bad_values(fields), *bad_kind_values(fields, LORA_VARIANT_FIELDS)])
    problems.raise_if_any()
    return replace(
        _common_config(fields, LORA_VARIANT_FIELDS),
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        use_rslora=bool(fields.get("use_rslora")),
        lora_bias=bool(fields.get("lora_bias")),
        target_parameters=tuple(fields.get("target_parameters") or ()),
        token_indices=_token_indices(fields.get("trainable_token_indices") or {}),
        layer_replication=tuple((start, end) for start, end in fields.get("layer_replication") or ()),
        ensure_weight_tying=bool(fields.get("ensure_weight_tying")),
        lora_b_layout=fields.get("lora_B_layout") or "",
    )


def _parse_kind(fields: Mapping[str, Any], kind: KindFields) -> AdapterConfig:
    problems = ProblemCollector()
    patterns = {"rank_pattern": kind.rank, "alpha_pattern": kind.alpha}
    has_patterns = {name for name, of in patterns.items() if of and name not in kind.followed}
    known = {*COMMON_FIELDS, *COMMON_IGNORED, *kind.followed, *kind.ignored, *has_patterns, kind.token_indices}
    problems.add(UnsupportedAdapterError, (unknown_field(*item) for item in fields.items() if _is_set(item, known)))
    problems.add(AdapterError, [*bad_common_values(fields, has_patterns), *bad_kind_values(fields, kind)])
    problems.raise_if_any()
    config = _common_config(fields, kind)
    return replace(
        config,
        rank=config.values.get(kind.rank) or 0,
        alpha=float(config.values.get(kind.alpha) or 0),
        rank_pattern=fields.get("rank_pattern") or {} if "rank_pattern" in has_patterns else {},
        alpha_pattern=fields.get("alpha_pattern") or {} if "alpha_pattern" in has_patterns else {},
        token_indices=_token_indices(fields.get(kind.token_indices) or {}),
    )


def _common_config(fields: Mapping[str, Any], kind: KindFields) -> AdapterConfig:
    """Return the config with all that is the same for every kind."""
    stated = {name: fields.get(name) for name in kind.followed}
    return AdapterConfig(
        rank=0,
        alpha=0.0,
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        base_model_name=fields.get("base_model_name_or_path") or "",
        bias=fields.get("bias") or "none",
        revision=fields.get("revision") or "",
        task_type=fields.get("task_type") or "",
        peft_version=fields.get("peft_version") or "",
        base_model_class=(fields.get("auto_mapping") or {}).get("base_model_class") or "",
        target_modules=_pattern_or_names(fields.get("target_modules") or ()),
        exclude_modules=_pattern_or_names(fields.get("exclude_modules") or ()),
        layers_to_transform=_layer_numbers(fields.get("layers_to_transform")),
        layers_pattern=_names(fields.get("layers_pattern")),
        kind=fields["peft_type"],
        values={name: kind.followed[name].default if value is None else value for name, value in stated.items()},
    )


def _is_set(item: tuple[str, Any], known: set[str]) -> bool:
    name, value = item
    return bool(value) and name not in known


def _token_indices(value: Mapping[str, list[int]] | list[int]) -> Mapping[str, tuple[int, ...]]:
    tables = {"": value} if isinstance(value, list) else value
    return {module: tuple(indices) for module, indices in tables.items()}


def _layer_numbers(value: object) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    return tuple(number for number in numbers if type(number) is int)


def _names(value: object) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    return tuple(name for name in names if isinstance(name, str) and name)


def _pattern_or_names(value: str | Iterable[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _check_type(fields: Mapping[str, Any], known: tuple[str, ...], refused: Mapping[str, str]) -> None:
    peft_type = fields.get("peft_type")
    if peft_type in known:
        return
    if isinstance(peft_type, str) and peft_type in refused:
        hint = f"{refused[peft_type]}{_parts_of_mixture(fields)}"
        raise UnsupportedAdapterError(Problem("peft_type", "a kind that can be merged", peft_type, hint))
    found = "none" if peft_type is None else ascii(peft_type)[:80]
    listed = f"one of {', '.join(known)}"
    hint = "a newer PEFT may have more kinds" if peft_type else "is this the folder of a PEFT adapter?"
    raise UnsupportedAdapterError(Problem("peft_type", listed, found, hint))


def _parts_of_mixture(fields: Mapping[str, Any]) -> str:
    """Return the adapters that a mixture of adapters names, to merge them one by one."""
    adapters = fields.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        return ""
    listed = ", ".join(f"{ascii(name)[:80]} ({ascii(path)[:160]})" for name, path in list(adapters.items())[:20])
    return f": {listed}"
