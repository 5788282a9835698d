"""Where a module stands among those of the adapter in the order in which the model registers them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from rawmerge.methods.interface import Peer, TargetModule, UnmergeableError


def registered_peers(module: TargetModule) -> list[Peer]:
    """Return all modules of the adapter in that order.

    Raises:
        UnmergeableError: the order is not known.
    """
    by_path = {peer.path: peer for peer in module.peers}
    return [by_path[path] for path in registered_places(module)]


def registered_places(module: TargetModule) -> Mapping[str, int]:
    """Return path to place of all modules of the adapter, in that order.

    Raises:
        UnmergeableError: the order is not known.
    """
    places = _places(_Question(module))
    if places is None:
        hint = "it is recorded for transformers' common families, by the config.json's model_type"
        raise UnmergeableError(
            "a model whose module order is known, for this adapter draws numbers in it", "module order unknown", hint
        )
    return places


class _Question:
    """The same list of modules is the same question; every module of a plan has it."""

    def __init__(self, module: TargetModule) -> None:
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self.module.peers is other.module.peers

    def __hash__(self) -> int:
        return id(self.module.peers)


@lru_cache(maxsize=1)
def _places(question: _Question) -> Mapping[str, int] | None:
    order = question.module.order()
    return None if order is None else {path: place for place, path in enumerate(order)}
