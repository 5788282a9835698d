"""How deep and how wide `config.json` says that a text model is, against the tensors.

Silence is better than a false alarm, so a number of layers, or a width, that stands anywhere in the config as one is no
problem: families have their own fields for layers that predict further tokens, for shared layers, for narrow
embeddings. Only models of transformers' own classes are looked at, by the fields that nearly all of them have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import Problem
from rawmerge.families import base_prefixes
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import ModelConfig
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of

#: Last parts of the names of modules that tokens enter by.
INPUT_MODULES: Final = frozenset({*INPUT_EMBEDDINGS, "embeddings", "input_embedding", "token_embedding"})
_DEPTH_KEYS: Final = ("num_hidden_layers", "n_layer")
_WIDTH_KEYS: Final = ("hidden_size", "n_embd")
#: In names of fields that count layers, or groups of them.
_LAYERS: Final = re.compile("layer|depth|block|group")
#: In names of fields that count the layers behind the last, which predict further tokens.
_FURTHER: Final = re.compile("nextn|next_n|mtp|predict")
#: A config with more descriptions of text models than these is a stranger's joke.
_MAX_SIDES: Final = 16
#: Families whose files count something else than layers.
_OTHER_COUNTS: Final = frozenset({"dory"})
#: In names of fields that are the width of something that tokens become.
_WIDTHS: Final = re.compile("hidden|emb|model|dim")
_SENSES: Final = re.compile("vision|visual|image|video|audio|speech")
_STACK: Final = re.compile(r"(?P<stack>(?:[^.]+\.)*?(?:layers|layer|h|blocks|block))\.(?P<number>\d{1,6})\.")


def shape_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield that the text model has another number of layers, or another width, than its config states anywhere."""
    config = found.config
    if not (found.is_directory and config.is_of_transformers and base_prefixes([config.model_type])):
        return
    widths = {
        name: at.shape[1]
        for name, at in found.tensors.items()
        if module_of(name) in INPUT_MODULES and len(at.shape) == 2 and DTYPES[at.dtype].is_mergeable
    }
    if not config.model_types & _OTHER_COUNTS:
        yield from _depth_problems(found, widths)
    if not is_quantised(config):
        yield from _width_problems(config, widths)


def is_quantised(config: ModelConfig) -> bool:
    """Whether a config describes packed weights, whose shapes say little."""
    return any(fields.get("quantization_config") for _, fields in config.text_sides())


def _width_problems(config: ModelConfig, widths: Mapping[str, int]) -> Iterator[Problem]:
    stated = _stated(config, _WIDTH_KEYS)
    if stated and widths and set(widths.values()).isdisjoint(_widths(config.fields)):
        (key, size), (name, width) = stated[-1], next(iter(widths.items()))
        hint = f"{CONFIG_NAME} is of another model: take the right file"
        yield Problem(name, f"{size} columns, by {key} in {CONFIG_NAME}", f"{width}", hint)


def _depth_problems(found: BaseCheckpoint, embeddings: Mapping[str, int]) -> Iterator[Problem]:
    stated, depths = _stated(found.config, _DEPTH_KEYS), _depths(found, embeddings)
    known = set(_counts(found.config.fields, _LAYERS))
    further = set(_counts(found.config.fields, _FURTHER))
    known |= {count + more for _, count in stated[:_MAX_SIDES] for more in further}
    if depths and 0 < len(stated) <= _MAX_SIDES and known.isdisjoint(depths.values()):
        (key, count), (stack, depth) = stated[-1], max(depths.items(), key=lambda item: item[1])
        hint = (
            f"layers were lost or added, or {CONFIG_NAME} is of another model; if they are right, set {key} to {depth}"
        )
        yield Problem(stack, f"{count} layers, by {key} in {CONFIG_NAME}", f"{depth}", hint)


def _depths(found: BaseCheckpoint, embeddings: Mapping[str, int]) -> dict[str, int]:
    """Return each stack of layers beside an input embedding: its name, and the number of its layers."""
    fronts = {name.rpartition(".")[0].rpartition(".")[0].removesuffix("embeddings").rstrip(".") for name in embeddings}
    depths: dict[str, int] = {}
    for name in found.tensors:
        match = _STACK.match(name)
        if match and any(not front or name.startswith(f"{front}.") for front in fronts):
            depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["number"]) + 1)
    return depths


def _stated(config: ModelConfig, keys: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return each of these fields of the configs that describe text, outer ones first."""
    sides = [fields for _, fields in config.text_sides()]
    return [(key, fields[key]) for fields in sides for key in keys if type(fields.get(key)) is int]


def _counts(value: Any, keys: re.Pattern[str], key: str = "") -> Iterator[int]:
    """Yield each number of layers that stands in a config: whole numbers, and the lengths of lists."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _counts(item, keys, name)
    elif keys.search(key):
        if isinstance(value, list):
            yield len(value)
            yield from (item for item in value if type(item) is int)
        elif type(value) is int:
            yield value


def _widths(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield each width of an embedding that stands in a config: none of those of parts that see or hear."""
    for key, value in fields.items():
        if isinstance(value, dict) and not _SENSES.search(key):
            yield from _widths(value)
        elif type(value) is int and _WIDTHS.search(key):
            yield value
