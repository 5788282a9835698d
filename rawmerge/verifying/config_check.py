"""What a checkpoint's `config.json` says of its tensors, against them: vocabulary, tied embeddings, shape, dtype.

Silence is better than a false alarm: configs leave out and overstate much that loaders do not mind, so only what no
loader can follow is a problem. Rows beyond `vocab_size` are padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from rawmerge.dtypes import DTYPES, OUTPUT_DTYPES
from rawmerge.errors import Problem, RefusedError, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import DTYPE_KEYS, TIE_KEY, TIED_BY_DEFAULT, ModelConfig
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.comparison import sample_rows_equal
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.embedding_names import OUTPUT_EMBEDDINGS, is_embedding, module_of
from rawmerge.matching.tie import Tie, find_tie
from rawmerge.verifying.model_shape import INPUT_MODULES, is_quantised, shape_problems

_CODES: Final = {**OUTPUT_DTYPES, "float64": "F64"}
_VOCAB_KEYS: Final = ("vocab_size", "n_words", "n_token")
#: Parts of names that an output projection may have where it is not a plain tensor.
_HEADS: Final = frozenset({*OUTPUT_EMBEDDINGS, "output", "output_layer", "head"})
#: sentence-transformers' file: models that it loads have no use for an output projection.
_OF_EMBEDDERS: Final = "modules.json"
#: Rows of two embeddings that are compared.
_ROWS: Final = 64


def config_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield what the config says and no loader can find in the tensors."""
    yield from _vocabulary_problems(found)
    yield from _head_problems(found)
    yield from shape_problems(found)


def config_notes(found: BaseCheckpoint) -> Iterator[str]:
    """Yield what is odd, and may be meant."""
    yield from _dtype_notes(found)
    yield from _tie_notes(found)


def _vocabulary_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield that no embedding has as many rows as the smallest vocabulary that is stated."""
    sides = [fields for _, fields in found.config.text_sides()]
    sizes = [fields[key] for fields in sides for key in _VOCAB_KEYS if type(fields.get(key)) is int]
    rows = {
        name: at.shape[0]
        for name, at in found.tensors.items()
        if is_embedding(name) and len(at.shape) == 2 and DTYPES[at.dtype].is_mergeable
    }
    inputs = [name for name in rows if module_of(name) in INPUT_MODULES]
    if sizes and inputs and max(rows.values()) < min(sizes) and not is_quantised(found.config):
        name = max(inputs, key=lambda name: rows[name])
        hint = f"{CONFIG_NAME} is of another vocabulary: set vocab_size to {rows[name]}, or take the right file"
        yield Problem(name, f"{min(sizes)} rows or more, by vocab_size in {CONFIG_NAME}", f"{rows[name]}", hint)


def _head_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield that the output projection is neither stored nor tied to the input embedding."""
    config = found.config
    if not _is_untied(config) or is_quantised(config) or (found.is_directory and _is_embedder(found)):
        return
    tie = _find_tie(found, ModelConfig(config.text, {**config.fields, TIE_KEY: True}))
    # without a prefix it is the inner model alone, which was saved without a head
    if tie is None or not tie.is_certain or tie.is_written or tie.input.count(".") < 2:
        return
    if not any(_HEADS & set(name.split(".")) for name in found.tensors):
        hint = f"if {quote(tie.input)} is meant to be both, set {TIE_KEY} to true; else the tensor is lost"
        yield Problem(tie.output, f"this tensor, for {TIE_KEY} is false in {CONFIG_NAME}", "no such tensor", hint)


def _is_untied(config: ModelConfig) -> bool:
    """Whether the config says that nothing is tied, and leaves no nested config to its family's own ways."""
    sides = [fields for _, fields in config.text_sides()]
    says_so = any(fields.get(TIE_KEY) is False for fields in sides)
    is_said = all(TIE_KEY in fields or str(fields.get("model_type")) not in TIED_BY_DEFAULT for fields in sides)
    return says_so and is_said and not config.ties_embeddings and config.is_of_transformers


def _is_tied(config: ModelConfig) -> bool:
    """Whether the config's embeddings are tied for certain; of nested configs, some classes pass over the tie."""
    is_nested = len(list(config.text_sides())) > 1
    return config.fields.get(TIE_KEY) is True if is_nested else config.ties_embeddings


def _is_embedder(found: BaseCheckpoint) -> bool:
    return (found.root / _OF_EMBEDDERS).exists()


def _find_tie(found: BaseCheckpoint, config: ModelConfig) -> Tie | None:
    try:
        return find_tie(config, DiskNames(found, ""))
    except RefusedError:  # names of which nothing is known
        return None


def _dtype_notes(found: BaseCheckpoint) -> Iterator[str]:
    if is_quantised(found.config):
        return
    sides = (fields for _, fields in found.config.text_sides())
    stated = next((value for fields in sides for key in DTYPE_KEYS if (value := _dtype_name(fields.get(key)))), "")
    code = _CODES.get(stated)
    stored = Counter(at.dtype for at in found.tensors.values() if DTYPES[at.dtype].is_mergeable)
    if code and stored and code not in stored:
        yield f"{CONFIG_NAME} says {stated}, and most of the tensors are {stored.most_common(1)[0][0]}"


def _dtype_name(value: Any) -> str:
    return value.removeprefix("torch.") if isinstance(value, str) else ""


def _tie_notes(found: BaseCheckpoint) -> Iterator[str]:
    """Yield that a tie's other side is stored too, with other values."""
    tie = _find_tie(found, found.config) if _is_tied(found.config) else None
    if tie is None or not tie.is_certain or not tie.is_written:
        return
    inner, outer = found.tensors[tie.input], found.tensors[tie.output]
    are_alike = inner.dtype == outer.dtype and inner.shape == outer.shape and DTYPES[inner.dtype].is_mergeable
    if are_alike and sample_rows_equal(inner, outer, _ROWS, inner.dtype) < 1:
        yield (
            f"{CONFIG_NAME} ties {quote(tie.output)} to {quote(tie.input)}, and both are stored, with other values: "
            "loaders differ in which they take"
        )
