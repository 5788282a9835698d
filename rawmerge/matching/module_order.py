"""The order in which a model registers its modules, which some kinds draw numbers in.

Of transformers' common families it is known: `scripts/make_module_order.py` copied it into module_order.json. There,
`base` is the tree of the bare model's Linear, Conv1D and Embedding layers and `heads` that of what classes put behind
it, children in the order in which they are registered, `*` for numbers, which are registered in theirs.

Source: PEFT 0.21.2 `tuners/tinylora/model.py` `_build_target_key_mapping` and `tuners/unilora/model.py`
`_assign_unilora_indices_and_scales`, which go through `named_modules()`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from rawmerge.families import base_prefixes
from rawmerge.formats.model_config import ModelConfig

_Tree: TypeAlias = Mapping[str, Any]
#: Which of the two trees, then in each level which child, and its number.
_Key: TypeAlias = tuple[tuple[int, int], ...]
#: No model has more layers than numbers of this length count.
_LONGEST_NUMBER: Final = 9


def registration_order(config: ModelConfig, paths: Sequence[str]) -> Sequence[str] | None:
    """Return module paths in the order in which the model registers them; None where that is not known.

    Args:
        config: the base's config.
        paths: paths of layers in the trained model, with the name of the bare model in front or without it.
    """
    trees = _trees().get(config.model_type) if config.is_of_transformers else None
    if trees is None:
        return None
    prefixes = [f"{prefix}." for prefix in base_prefixes([config.model_type])]
    keys = {path: _key(path, trees, prefixes) for path in paths}
    known = {path: key for path, key in keys.items() if key is not None}
    # two paths of one layer, as with and without the bare model's name, are not of one model
    return sorted(known, key=known.__getitem__) if len(set(known.values())) == len(paths) else None


@dataclass(frozen=True, slots=True)
class KnownLayers:
    """What every class of a model has, and what some have.

    Attributes:
        stack: path, in the bare model, of the one list of layers.
        outside: paths of Linear, Conv1D and Embedding modules outside it, `*` for numbers.
    """

    stack: str
    outside: tuple[str, ...]


def known_layers(config: ModelConfig) -> KnownLayers | None:
    """Return what is known of a model's layers; None where its order is not, or where it has several stacks."""
    trees = _trees().get(config.model_type) if config.is_of_transformers else None
    if trees is None:
        return None
    base, heads = (list(_leaves(tree)) for tree in trees)
    stacks = {path.partition(".*")[0] for path in base if ".*" in path}
    outside = [path for path in base if ".*" not in path]
    return KnownLayers(stacks.pop(), (*outside, *heads)) if len(stacks) == 1 else None


def _leaves(tree: _Tree) -> Iterator[str]:
    for name, below in tree.items():
        yield from (f"{name}.{path}" for path in _leaves(below)) if below else (name,)


def _key(path: str, trees: Sequence[_Tree], prefixes: Iterable[str]) -> _Key | None:
    """Return what a layer is sorted by, None where no tree has it."""
    ways = [path, *(path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix))]
    for way in ways:
        for number, tree in enumerate(trees):
            if place := _place(tree, way):
                return ((number, 0), *place)
    return None


def _place(tree: _Tree, path: str) -> _Key | None:
    found = []
    for segment in path.split("."):
        is_number = segment.isascii() and segment.isdigit() and len(segment) <= _LONGEST_NUMBER
        folded = "*" if is_number else segment
        if folded not in tree:
            return None
        found.append((list(tree).index(folded), int(segment) if is_number else 0))
        tree = tree[folded]
    return None if tree else tuple(found)


@lru_cache(maxsize=1)
def _trees() -> Mapping[str, Sequence[_Tree]]:
    """Return model type to its trees, that of the bare model first."""
    data = json.loads(Path(__file__).parent.with_name("module_order.json").read_bytes())
    return {name: (order["base"], order["heads"]) for order in data["orders"] for name in order["types"]}
