"""`layer_replication`: a base whose layers stand more than once, each copy a tensor of its own.

PEFT shares one tensor among the copies of a layer, so its merge piles all their deltas onto it; on disk each copy is
written with its own.

Source: PEFT 0.21.2 `tuners/tuners_utils.py` `replicate_layers` (order of the copies, which stack is meant).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from rawmerge.errors import PlanError, Problem
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, ShardContents
from rawmerge.inputs.tensor_source import TensorSource

#: Names that stacks of layers have where PEFT replicates them.
_STACK: Final = re.compile(r"((?:[^.]+\.)*?(?:layers|layer|h))\.(0|[1-9][0-9]{0,8})\.(.+)")
#: A model of more layers than that, for each of the base's, is a mistake or worse: each takes time and memory to plan.
MOST_COPIES: Final = 100


def layer_order(replication: Sequence[tuple[int, int]]) -> list[int]:
    """Return the old layer that each new layer copies.

    Example:
        >>> layer_order([(0, 2), (1, 3)])
        [0, 1, 1, 2]
    """
    return [layer for start, end in replication for layer in range(start, end)]


def replicate_layers(base: BaseCheckpoint, order: Sequence[int]) -> BaseCheckpoint:
    """Return the base with layer `order[n]` of old as its layer n.

    Raises:
        PlanError: it is not clear which tensors are the layers, or a layer does not exist.
    """
    stack = _find_stack(base, order)
    contents = tuple(ShardContents(item.shard, tuple(_copies(item.tensors, stack, order))) for item in base.contents)
    tensors = {name: source for item in contents for name, source in item.tensors}
    return replace(base, contents=contents, tensors=tensors)


def _find_stack(base: BaseCheckpoint, order: Sequence[int]) -> str:
    layers: dict[str, set[int]] = defaultdict(set)
    for name in base.tensors:
        if match := _STACK.fullmatch(name):
            layers[match[1]].add(int(match[2]))
    complete = {stack: len(found) for stack, found in layers.items() if found == set(range(len(found)))}
    if len(complete) != 1 or len(layers) != 1:
        found = ", ".join(sorted(layers)) or "none"
        hint = "layer_replication is merged for models of one stack of layers"
        raise PlanError(Problem("layer_replication", "one complete stack of layers in the base", found, hint))
    (stack, count), *_ = complete.items()
    if len(order) > MOST_COPIES * count:
        expected = f"at most {MOST_COPIES * count} layers, {MOST_COPIES} times the base's {count}"
        raise PlanError(Problem("layer_replication", expected, f"{len(order)}", "is this the adapter's own base?"))
    if max(order) >= count:
        found = f"{count} layers under {stack!r}"
        raise PlanError(Problem("layer_replication", f"a base of at least {max(order) + 1} layers", found))
    return stack


def _copies(
    tensors: Sequence[tuple[str, TensorSource]], stack: str, order: Sequence[int]
) -> Iterator[tuple[str, TensorSource]]:
    copies: dict[int, list[int]] = defaultdict(list)
    for new, old in enumerate(order):
        copies[old].append(new)
    for name, source in tensors:
        match = _STACK.fullmatch(name)
        if match and match[1] == stack:
            yield from ((f"{stack}.{new}.{match[3]}", source) for new in copies[int(match[2])])
        else:
            yield name, source
