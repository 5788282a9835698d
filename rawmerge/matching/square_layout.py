"""How weights lie on disk, (out, in) or (in, out), where their shapes do not tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.formats.model_config import ModelConfig
from rawmerge.matching.places import Place
from rawmerge.methods.interface import Shape

#: A placed module: its path, its place, the shape of its delta (out, in) with -1 for unknown, and whether it is an
#: embedding.
Placed = tuple[str, Place, Shape | None, bool]


def lies_as(delta: Shape | None, shape: Shape) -> set[bool]:
    """Return how a weight of this shape may be stored for this delta: False for (out, in), True for (in, out)."""
    if delta is None:
        return {False, True}
    if len(delta) > 2 or len(shape) != 2:
        kernel_as_inputs = (shape[0], prod(shape[1:])) if shape else ()
        return {False} if _equal(delta, shape) or _equal(delta, kernel_as_inputs) else set()
    return {is_transposed for is_transposed, one in ((False, delta), (True, delta[::-1])) if _equal(one, shape)}


def _equal(delta: Shape, shape: Shape) -> bool:
    return len(delta) == len(shape) and all(want in (-1, size) for want, size in zip(delta, shape, strict=True))


class SquareLayout:
    """Which square weights are stored (in, out): by family, else by what modules of the same name show.

    PEFT's `fan_in_fan_out` flag is that of the module it visited last, so it says nothing of the others.
    """

    def __init__(self, model: ModelConfig, adapter: AdapterConfig, placed: Iterable[Placed]) -> None:
        self._config = model
        self._flag = adapter.fan_in_fan_out
        self._seen: dict[str, set[bool]] = {}
        for leaf, is_transposed in _seen_layouts(placed):
            self._seen.setdefault(leaf, set()).add(is_transposed)

    def is_transposed(self, module_path: str, place: Place) -> bool | None:
        """Return whether the module's square weight is stored (in, out); None where nothing tells."""
        if place.is_transposed is not None:
            return place.is_transposed
        leaf = _leaf(module_path)
        if self._config.is_conv1d(leaf):
            return True
        if len(evidence := self._seen.get(leaf, set())) == 1:
            return next(iter(evidence))
        unexplained = any(True in found for name, found in self._seen.items() if not self._config.is_conv1d(name))
        is_linear = self._config.is_of_transformers or not self._flag
        return False if is_linear and not unexplained else None

    def orientation(self, module_path: str, place: Place, shape: Shape, delta: Shape | None) -> bool | None:
        """Return whether a weight of `shape` is stored (in, out): by its delta, else as `is_transposed` says."""
        ways = lies_as(delta, shape)
        if len(shape) != 2:
            return False
        return ways.pop() if len(ways) == 1 else self.is_transposed(module_path, place)


def _leaf(module_path: str) -> str:
    return module_path.rpartition(".")[2]


def _seen_layouts(placed: Iterable[Placed]) -> Iterator[tuple[str, bool]]:
    """Yield, for each weight whose shape shows it, its module's name and whether it is stored (in, out)."""
    for path, place, delta, is_embedding in placed:
        if is_embedding or place.is_transposed is not None or delta is None or len(delta) != 2:
            continue
        ways = lies_as(delta, place.shape) if len(place.shape) == 2 else set()
        if len(ways) == 1:
            yield _leaf(path), ways.pop()
