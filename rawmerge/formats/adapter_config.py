"""`adapter_config.json` of a PEFT adapter: text to `AdapterConfig`, or a refusal that names every field.

Source: PEFT 0.21.2 `tuners/lora/config.py` (fields), `tuners/lora/layer.py` (scaling) and `utils/other.py`
`get_pattern_key` (patterns). What a field means for a merge is stated once, in the tables below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from rawmerge.errors import AdapterError, Problem, ProblemCollector, UnsupportedAdapterError
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

CONFIG_NAME: Final = "adapter_config.json"
SUPPORTED_TYPES: Final = ("LORA",)

#: Fields that change the merge, and are followed.
SUPPORTED_FIELDS: Final = frozenset(
    ["alpha_pattern", "fan_in_fan_out", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "use_rslora"]
)
#: Fields that say how the adapter was trained, or repeat what its tensors say; they do not change a merge.
IGNORED_FIELDS: Final = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
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
    "bias": "trained biases are not merged yet; PEFT can",
    "ensure_weight_tying": "adapters on tied weights are not merged yet; PEFT can",
    "kasa_config": "KaSA changes the base before the delta is added; not merged yet; PEFT can",
    "layer_replication": "replicated layers are not written yet",
    "lora_bias": "a bias in lora_B is not merged yet; PEFT can",
    "megatron_config": "Megatron shards are not PEFT tensors",
    "monteclora_config": "MonteCLoRA is not merged yet; PEFT can",
    "target_parameters": "LoRA on bare parameters (fused experts) is not merged yet; PEFT can",
    "trainable_token_indices": "trained token rows are not merged yet; PEFT can",
    "use_bdlora": "block-diagonal LoRA is not merged yet; PEFT can",
    "use_dora": "DoRA is not merged yet; PEFT can",
    "use_qalora": "QALoRA merges into quantised weights only",
    "velora_config": "VeLoRA is not merged yet; PEFT can",
}
#: Values of `init_lora_weights` after which the stored pair is a plain LoRA on the unchanged base.
PLAIN_INITS: Final = frozenset({"eva", "gaussian", "orthogonal"})


_T = TypeVar("_T")


#: Repeats (`*`, `+`, `{…}`) that a pattern may have: each one more multiplies the time by the path's length.
MAX_REPEATS: Final = 4


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the config says about a merge; ranks and alphas as PEFT resolves them.

    Attributes:
        rank: `r`, inner dimension of a pair unless `rank_pattern` says otherwise.
        alpha: `lora_alpha`, numerator of the scaling unless `alpha_pattern` says otherwise.
        rank_pattern: key (a regular expression on the end of a module path) to rank, first match wins.
        alpha_pattern: the same for alpha.
        use_rslora: scaling is alpha / sqrt(rank) instead of alpha / rank.
        fan_in_fan_out: PEFT's flag for weights stored (in, out); that of the module it visited last.
        modules_to_save: names of modules that the adapter stores whole.
        base_model_name: `base_model_name_or_path`, for information.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    base_model_name: str

    def rank_of(self, module_path: str) -> int:
        """Return the rank that the config states for a module (path without `base_model.model.`)."""
        return _first_match(self.rank_pattern, module_path, self.rank)

    def alpha_of(self, module_path: str) -> float:
        """Return the alpha that the config states for a module."""
        return _first_match(self.alpha_pattern, module_path, self.alpha)

    def scaling_of(self, module_path: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) with rsLoRA: dimensionless."""
        rank, alpha = self.rank_of(module_path), self.alpha_of(module_path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _first_match(pattern: Mapping[str, _T], module_path: str, default: _T) -> _T:
    for key, value in pattern.items():
        if _compiled(key).match(module_path):
            return value
    return pattern.get(module_path, default)  # PEFT takes a key that is the path itself, whatever it means as a regex


@lru_cache(maxsize=65536)  # one key per module is common, and more than re keeps
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(_as_regex(key))


def _as_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def parse_adapter_config(raw: bytes, path: str) -> AdapterConfig:
    """Return the config, if every field in it can be followed.

    Raises:
        AdapterError: not strict JSON, or a field of a wrong type or value; all such fields at once.
        UnsupportedAdapterError: another PEFT type, or fields that this version refuses; all of them at once.
    """
    try:
        fields = parse_json_object(raw)
    except StrictJsonError as error:
        raise AdapterError(Problem(path, "an adapter config of strict JSON", str(error))) from error
    _check_type(fields)
    problems = ProblemCollector()
    problems.add(UnsupportedAdapterError, _unsupported_fields(fields))
    problems.add(AdapterError, _bad_values(fields))
    problems.raise_if_any()
    return AdapterConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        use_rslora=bool(fields.get("use_rslora")),
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        base_model_name=str(fields.get("base_model_name_or_path") or ""),
    )


def _check_type(fields: Mapping[str, Any]) -> None:
    peft_type = fields.get("peft_type")
    if peft_type in SUPPORTED_TYPES:
        return
    known = ", ".join(SUPPORTED_TYPES)
    found = "none" if peft_type is None else ascii(peft_type)[:80]
    hint = f"this version merges {known}" if peft_type else "is this the folder of a PEFT adapter?"
    raise UnsupportedAdapterError(Problem("peft_type", f"one of {known}", found, hint))


def _unsupported_fields(fields: Mapping[str, Any]) -> Iterable[Problem]:
    for name, value in fields.items():
        if not value or (name == "bias" and value == "none"):
            continue
        if name in REFUSED_FIELDS:
            yield Problem(name, "it to be unset", ascii(value)[:80], REFUSED_FIELDS[name])
        elif name == "init_lora_weights":
            yield from _unsupported_init(value)
        elif name not in SUPPORTED_FIELDS and name not in IGNORED_FIELDS:
            hint = "a newer PEFT may mean something by it that would be lost; remove it if you know it does not"
            yield Problem(name, "a config field that rawmerge knows", ascii(value)[:80], hint)


def _unsupported_init(value: object) -> Iterable[Problem]:
    if value is not True and not (isinstance(value, str) and value.lower() in PLAIN_INITS):
        hint = "it changed the base in training; PEFT converts such adapters: path_initial_model_for_weight_conversion"
        plain = ", ".join(sorted(PLAIN_INITS))
        yield Problem("init_lora_weights", f"true, false or one of {plain}", ascii(value)[:80], hint)


def _bad_values(fields: Mapping[str, Any]) -> Iterable[Problem]:
    if not _is_rank(fields.get("r")):
        yield Problem("r", "a positive whole number", _describe(fields, "r"))
    if not _is_alpha(fields.get("lora_alpha")):
        hint = "without alpha the scaling is unknown; take it from the training script"
        yield Problem("lora_alpha", "a finite number other than 0", _describe(fields, "lora_alpha"), hint)
    yield from _bad_pattern(fields, "rank_pattern", _is_rank)
    yield from _bad_pattern(fields, "alpha_pattern", _is_alpha)
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(fields.get(name) or False, bool):
            yield Problem(name, "true or false", _describe(fields, name))
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        yield Problem("modules_to_save", "a list of module names", _describe(fields, "modules_to_save"))


def _bad_pattern(fields: Mapping[str, Any], name: str, is_valid: Any) -> Iterable[Problem]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        yield Problem(name, "a table from module pattern to number", _describe(fields, name))
        return
    for key, value in pattern.items():
        if not is_valid(value):
            yield Problem(f"{name}[{key[:80]!r}]", "a number that can be used", ascii(value)[:80])
        try:
            re.compile(_as_regex(key))  # as it will be used: flags are legal at the start only
        except (re.error, RecursionError, OverflowError) as error:
            yield Problem(f"{name}[{key[:80]!r}]", "a regular expression", str(error)[:120])
        if _may_explode(key):
            expected = f"at most {MAX_REPEATS} repeats, and none of a group: others can take for ever"
            yield Problem(f"{name}[{key[:80]!r}]", expected, "more", "list the modules one by one")


def _may_explode(key: str) -> bool:
    """Whether matching could take exponential time, or a high power of the path's length."""
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", key)
    return len(re.findall(r"[*+{]", plain)) > MAX_REPEATS or bool(re.search(r"\)[*+{]", plain))


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: object) -> bool:
    is_number = (type(value) is int and abs(value) < 2**53) or (type(value) is float and math.isfinite(value))
    return is_number and value != 0


def _describe(fields: Mapping[str, Any], name: str) -> str:
    return ascii(fields[name])[:80] if name in fields else "nothing"
