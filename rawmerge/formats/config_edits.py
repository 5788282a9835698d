"""Edits of `config.json` that an adapter can call for: a larger vocabulary, a head that the base does not have.

Each takes the base's config and its text, which may have been edited before, and leaves every other byte as it was.
Where the config does not say enough for one right answer, the edit says so; the caller decides what becomes of it.

Source: transformers 5.23 `configuration_utils.py` (`num_labels`, `id2label`, `get_text_config`) and
`modeling_utils.py` (`resize_token_embeddings`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rawmerge.formats.config_text import insert_value, replace_values
from rawmerge.formats.model_config import TEXT_KEYS, ModelConfig

VOCAB_KEY: Final = "vocab_size"
#: Other names of the same number: Flaubert's and XLM's, XLNet's, ChatGLM's.
_VOCAB_KEYS: Final = (VOCAB_KEY, "n_words", "n_token", "padded_vocab_size")
#: What transformers takes for the number of labels where a config does not say; it then writes none either.
DEFAULT_LABELS: Final = 2
_LABEL_KEYS: Final = ("id2label", "label2id", "num_labels", "_num_labels")

_Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VocabEdit:
    """A config's text with another vocabulary size.

    Attributes:
        text: the edited text.
        is_certain: whether the config left one way to do it; if not, `text` is the likeliest.
    """

    text: str
    is_certain: bool


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """What a config says about the head on top of the model.

    Attributes:
        architectures: class names; empty where it does not say.
        num_labels: number of labels, None where it does not say (transformers then takes two).
        problem_type: `regression`, `single_label_classification`, `multi_label_classification`, or empty.
    """

    architectures: tuple[str, ...]
    num_labels: int | None
    problem_type: str


def with_vocab_size(config: ModelConfig, text: str, old_rows: int, new_rows: int) -> VocabEdit:
    """Return `text` with the vocabulary size of the text model set to `new_rows`.

    Sizes that equal `old_rows` change, at the top and in nested text configs; those of other nested configs, such as
    a vision tower's own text side, never do. The innermost text config gets a size where it states none.

    Args:
        config: the base's config.
        text: its text, edited or not.
        old_rows: rows of the base's input embedding.
        new_rows: rows of the input embedding in the output.
    """
    sizes = dict(_stated_sizes(config))
    inner = {path: _sizes_at(path, sizes) for path in _innermost_text_configs(config)}
    silent = [path for path, stated in inner.items() if not stated]
    equal = {path for path, size in sizes.items() if size == old_rows}
    edited = replace_values(text, dict.fromkeys(equal or (sizes if len(sizes) == 1 else ()), new_rows))
    if len(inner) > 1 or not silent:
        matching = [path for path, stated in inner.items() if old_rows in stated]
        return VocabEdit(edited, len(matching) == 1 and not silent and not _is_padded(sizes))
    if not text or (silent == [()] and old_rows in _sizes_elsewhere(config.fields)):
        return VocabEdit(edited, False)
    is_certain = config.is_of_transformers and len(equal) == len(sizes)
    return VocabEdit(insert_value(edited, VOCAB_KEY, new_rows, silent[0]), is_certain)


def head_facts(config: ModelConfig) -> HeadFacts:
    """Return what the config says about its head; a field of a wrong type counts as missing."""
    problem_type = config.fields.get("problem_type")
    return HeadFacts(
        config.architectures, _stated_labels(config), problem_type if isinstance(problem_type, str) else ""
    )


def with_labels(config: ModelConfig, text: str, count: int) -> str | None:
    """Return `text` for a head of `count` labels, or None where the config says something else about its labels.

    A config that does not say gets `id2label` and `label2id` as transformers writes them; for two labels it writes
    none, nor does this.

    Args:
        config: the base's config.
        text: its text, edited or not.
        count: rows of the classification head.
    """
    if head_facts(config).problem_type == "single_label_classification" and count == 1:
        return None  # transformers refuses to load that
    if any(key in config.fields for key in _LABEL_KEYS):
        return text if _stated_labels(config) == count else None
    if count == DEFAULT_LABELS:
        return text
    labels = {str(index): f"LABEL_{index}" for index in range(count)}
    edited = insert_value(text, "id2label", labels)
    return insert_value(edited, "label2id", {label: int(index) for index, label in labels.items()})


def _stated_sizes(config: ModelConfig) -> Iterator[tuple[_Path, int]]:
    """Yield the path and value of each vocabulary size of the text model."""
    for path, fields in config.text_sides():
        yield from (((*path, key), fields[key]) for key in _VOCAB_KEYS if type(fields.get(key)) is int)


def _innermost_text_configs(config: ModelConfig) -> list[_Path]:
    return [path for path, fields in config.text_sides() if not any(_is_text_config(*item) for item in fields.items())]


def _is_text_config(key: str, value: object) -> bool:
    return key in TEXT_KEYS and isinstance(value, dict)


def _sizes_at(path: _Path, stated: Mapping[_Path, int]) -> list[int]:
    return [size for stated_path, size in stated.items() if stated_path[:-1] == path]


def _sizes_elsewhere(fields: Mapping[str, Any]) -> list[object]:
    """Return the vocabulary sizes of nested configs that are no text configs by their names."""
    nested = [value for key, value in fields.items() if isinstance(value, dict) and key not in TEXT_KEYS]
    return [value[VOCAB_KEY] for value in nested if VOCAB_KEY in value]


def _is_padded(sizes: Mapping[_Path, int]) -> bool:
    """Whether a size with padding is stated beside the plain one; custom code decides which of them counts."""
    return any(path[-1] == "padded_vocab_size" for path in sizes)


def _stated_labels(config: ModelConfig) -> int | None:
    """Return the number of labels as transformers reads it: `id2label` goes before `num_labels`."""
    table: Any = config.fields.get("id2label")
    if isinstance(table, dict):
        return len(table)
    stated = config.fields.get("num_labels")
    return stated if type(stated) is int else None
