"""Adapter tensors that several steps of a merge read, such as the lora_b of all experts: read once, kept a while."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import ShardPlan, UpdateTensor

#: What is kept at most unless told, in bytes of the adapter's file.
KEPT_BYTES: Final = 32 * 2**20

T = TypeVar("T")


def count_uses(shards: Iterable[ShardPlan]) -> Counter[TensorSource]:
    """Return how many times each adapter tensor will be read to compute these shards."""
    steps = (step for shard in shards for step in shard.steps if isinstance(step, UpdateTensor))
    return Counter(source for step in steps for update in step.updates for source in update.tensors.values())


class SharedTensors(Generic[T]):
    """What was read of sources that are used more than once, until their last use.

    What has no room beside them is read again.

    Safe for any number of threads; what it hands out is shared and must not be changed.
    """

    def __init__(self, uses: Counter[TensorSource], kept_bytes: int = KEPT_BYTES) -> None:
        self._uses_left = {source: count for source, count in uses.items() if count > 1}
        self._reading = {source: threading.Lock() for source in self._uses_left}
        self._kept: dict[TensorSource, T] = {}
        self._limit = kept_bytes
        self._byte_count = 0
        self._lock = threading.Lock()

    def read(self, source: TensorSource, read: Callable[[TensorSource], T]) -> T:
        """Return what `read` makes of `source`, now or at an earlier use."""
        if source not in self._reading:
            return read(source)
        with self._reading[source]:
            with self._lock:
                known = self._kept.get(source)
            value = read(source) if known is None else known
            with self._lock:
                self._use(source, value)
            return value

    def _use(self, source: TensorSource, value: T) -> None:
        self._uses_left[source] -= 1
        if self._uses_left[source] == 0:
            self._drop(source)
        # steps go through all of a layer's in turn: one that pushed out another would soon be pushed out by that one
        elif source not in self._kept and self._byte_count + source.byte_count <= self._limit:
            self._kept[source] = value
            self._byte_count += source.byte_count

    def _drop(self, source: TensorSource) -> None:
        if self._kept.pop(source, None) is not None:
            self._byte_count -= source.byte_count
