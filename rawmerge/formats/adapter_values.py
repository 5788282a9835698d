"""What each field of `adapter_config.json` may hold; what it means is in `adapter_config`.

Source: PEFT 0.21.2 `tuners/lora/config.py` (types, and `__post_init__`) and `utils/other.py`
`set_additional_trainable_modules` (token indices beside `modules_to_save`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from rawmerge.errors import Problem
from rawmerge.formats.kind_fields import KindFields
from rawmerge.formats.patterns import MAX_CHARACTERS, MAX_PATTERNS, MAX_REPEATS, as_regex, compiled, may_explode

#: Trained token rows, all modules together; vocabularies have up to some 300,000.
MAX_TOKEN_INDICES: Final = 2**20
#: Modules that are stored whole: each is looked for in the name of each tensor.
MAX_SAVED_MODULES: Final = 10_000
#: Layers of the model that `layer_replication` describes.
MAX_LAYERS: Final = 10_000
#: Values of `bias`: which trained biases the file holds.
BIASES: Final = ("none", "all", "lora_only")


def bad_values(fields: Mapping[str, Any]) -> Iterable[Problem]:
    """Yield a problem for every field of a LoRA config that has a wrong type or value; null counts as unset."""
    if not _is_rank(fields.get("r")):
        yield Problem("r", "a positive whole number", _describe(fields, "r"))
    if not _is_alpha(fields.get("lora_alpha")):
        hint = "without alpha the scaling is unknown; take it from the training script"
        yield Problem("lora_alpha", "a finite number other than 0", _describe(fields, "lora_alpha"), hint)
    yield from _bad_pattern(fields, "rank_pattern", _is_rank)
    yield from _bad_pattern(fields, "alpha_pattern", _is_alpha)
    for name, (is_valid, expected) in _CHECKS.items():
        if fields.get(name) is not None and not is_valid(fields[name]):
            yield Problem(name, expected, _describe(fields, name))
    yield from _saved_and_trained(fields)


def bad_common_values(fields: Mapping[str, Any], patterns: Iterable[str]) -> Iterable[Problem]:
    """Yield a problem for every field of a wrong type or value among those that all kinds have, and the patterns."""
    for name, (is_valid, expected) in _CHECKS.items():
        if name in _OF_ALL_KINDS and fields.get(name) is not None and not is_valid(fields[name]):
            yield Problem(name, expected, _describe(fields, name))
    bias = fields.get("bias")
    if bias is not None and not (isinstance(bias, str) and _BIAS.fullmatch(bias)):
        yield Problem("bias", "none, all, or the kind's own biases", _describe(fields, "bias"))
    for name in sorted(patterns):
        yield from _bad_pattern(fields, name, _is_rank if name == "rank_pattern" else _is_alpha)


def bad_kind_values(fields: Mapping[str, Any], kind: KindFields) -> Iterable[Problem]:
    """Yield a problem for every field of a kind's own that has a value it cannot have; null counts as unset."""
    for name, known in kind.followed.items():
        value = fields.get(name)
        if (value is None and known.is_required) or (value is not None and not known.check(value)):
            yield Problem(name, known.expected, _describe(fields, name))
    indices = fields.get(kind.token_indices)
    if indices is not None and not _is_token_indices(indices):
        yield Problem(kind.token_indices, _CHECKS["trainable_token_indices"][1], _describe(fields, kind.token_indices))


def _bad_pattern(fields: Mapping[str, Any], name: str, is_valid: Any) -> Iterable[Problem]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        yield Problem(name, "a table from module pattern to number", _describe(fields, name))
        return
    if len(pattern) > MAX_PATTERNS:
        yield Problem(name, f"at most {MAX_PATTERNS} patterns", str(len(pattern)))
        return
    for key, value in pattern.items():
        if not is_valid(value):
            yield Problem(f"{name}[{key[:80]!r}]", "a number that can be used", ascii(value)[:80])
        yield from _bad_key(f"{name}[{key[:80]!r}]", key)


def _bad_key(subject: str, key: str) -> Iterable[Problem]:
    if len(key) > MAX_CHARACTERS:
        yield Problem(subject, f"a pattern of at most {MAX_CHARACTERS} characters", f"one of {len(key)}")
        return
    try:
        compiled(as_regex(key))  # as it will be used: flags are legal at the start only
    except (re.error, RecursionError, OverflowError) as error:
        yield Problem(subject, "a regular expression", str(error)[:120])
    if may_explode(key):
        expected = f"at most {MAX_REPEATS} repeats, and none of a group: others can take for ever"
        yield Problem(subject, expected, "more", "list the modules one by one")


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: object) -> bool:
    is_number = (type(value) is int and abs(value) < 2**53) or (type(value) is float and math.isfinite(value))
    return is_number and value != 0


def _describe(fields: Mapping[str, Any], name: str) -> str:
    return ascii(fields[name])[:80] if name in fields else "nothing"


def _saved_and_trained(fields: Mapping[str, Any]) -> Iterable[Problem]:
    """Refuse what PEFT refuses to train: a module both whole and by its rows has no order to be written in."""
    tables, saved = fields.get("trainable_token_indices"), fields.get("modules_to_save")
    if isinstance(tables, dict) and isinstance(saved, list):
        names = {name for name in saved if isinstance(name, str)}
        for module in sorted(names & tables.keys()):
            found = f"{module[:80]!r} in both"
            yield Problem("trainable_token_indices", "modules that are not in modules_to_save", found)


def _is_switch(value: object) -> bool:
    return not value or isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of_names(value: object) -> bool:
    return not value or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_list_of_modules(value: Any) -> bool:
    return _is_list_of_names(value) and len(value or ()) <= MAX_SAVED_MODULES


def _is_list_of_parameters(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_names_or_pattern(value: object) -> bool:
    return isinstance(value, str) or _is_list_of_names(value)


def _is_auto_mapping(value: object) -> bool:
    return not value or (isinstance(value, dict) and isinstance(value.get("base_model_class") or "", str))


def _is_token_indices(value: Any) -> bool:
    tables: dict[str, Any] = value if isinstance(value, dict) else {"a list": value}
    if not all(tables) or not all(map(_is_index_list, tables.values())):
        return False
    return sum(map(len, tables.values())) <= MAX_TOKEN_INDICES


def _is_index_list(value: object) -> bool:
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < 2**31 for index in value):
        return False
    return len(set(value)) == len(value)


def _is_replication(value: Any) -> bool:
    if not isinstance(value, list) or not all(map(_is_layer_range, value)):
        return False
    total: int = sum(end - start for start, end in value)
    return total <= MAX_LAYERS


def _is_layer_range(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(number) is int for number in value):
        return False
    return bool(0 <= value[0] < value[1] <= MAX_LAYERS)


_BIAS: Final = re.compile(r"none|all|[a-z0-9_]+_only")
_OF_ALL_KINDS: Final = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "modules_to_save",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    ]
)
#: Field -> (whether a value that is not null is one of it, what it is).
_CHECKS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "use_rslora": (_is_switch, "true or false"),
    "fan_in_fan_out": (_is_switch, "true or false"),
    "lora_bias": (_is_switch, "true or false"),
    "ensure_weight_tying": (_is_switch, "true or false"),
    "bias": (lambda value: value in BIASES, f"one of {', '.join(BIASES)}"),
    "modules_to_save": (_is_list_of_modules, f"a list of module names, at most {MAX_SAVED_MODULES}"),
    "target_parameters": (_is_list_of_parameters, "a list of parameter names"),
    "target_modules": (_is_names_or_pattern, "a pattern or a list of module names"),
    "exclude_modules": (_is_names_or_pattern, "a pattern or a list of module names"),
    "trainable_token_indices": (
        _is_token_indices,
        f"whole numbers, none twice, at most {MAX_TOKEN_INDICES}: a list, or a table from module to list",
    ),
    "layer_replication": (_is_replication, f"a list of [start, end], start < end, of at most {MAX_LAYERS} layers"),
    "base_model_name_or_path": (_is_text, "text"),
    "revision": (_is_text, "text"),
    "task_type": (_is_text, "text"),
    "peft_version": (_is_text, "text"),
    "auto_mapping": (_is_auto_mapping, "a table whose base_model_class is a name"),
}
