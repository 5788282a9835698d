"""What an adapter kind must offer: the extension point of rawmerge.

Torch is named in annotations only, so that a plan can be made without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
#: What a method may note for `prepare`, besides the tensors; a plan keeps it as JSON.
Setting: TypeAlias = bool | int | float | str | tuple[int, ...]


def number(settings: Mapping[str, Setting], name: str) -> float:
    """Return a setting that is a number.

    Raises:
        TypeError: it is none.
    """
    value = settings[name]
    if not isinstance(value, int | float):
        raise TypeError(f"setting {name} must be a number, not {value!r}")
    return value


class ShapeMismatchError(ValueError):
    """A tensor's shape contradicts the base or its partner; fields as in `rawmerge.errors.Problem`."""

    def __init__(self, role: str, expected: str, found: str, hint: str = "") -> None:
        super().__init__(role, expected, found)
        self.role = role
        self.expected = expected
        self.found = found
        self.hint = hint


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What a method may know about a module when it is planned.

    Attributes:
        base_shape: shape of the base tensor; where updates change a part of it only, of that part.
        rank: the rank that the config states for the module.
        scaling: alpha / rank or what the config makes of it, dimensionless.
        square_is_transposed: for a square weight, whether it is stored (in, out); None where that is undecidable.
        rounds_delta: whether PEFT rounds the delta to the base's dtype before it adds it, whatever the kind's habit.
        token_indices: which rows of the base the adapter's rows replace.
    """

    base_shape: Shape
    rank: int
    scaling: float
    square_is_transposed: bool | None
    rounds_delta: bool = False
    token_indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a prepared update may know about the tensor that it will be applied to.

    Attributes:
        shape: shape of the base tensor.
        compute_dtype: dtype of the delta's arithmetic.
        rounding_dtype: dtype to which kinds that PEFT rounds twice round their delta first; None for none.
    """

    shape: Shape
    compute_dtype: torch.dtype
    rounding_dtype: torch.dtype | None


class Scratch(Protocol):
    """Memory that the calling thread reuses from tile to tile; a fresh allocation costs more than the product."""

    def tensor(self, slot: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor (rows, columns), the same memory for each call with this slot."""


class PreparedUpdate(Protocol):
    """One update with its tensors in memory, ready for tiles in any order, from any thread."""

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Change `tile` in place.

        Args:
            tile: (rows, columns) of the tensor's matrix view, or those of its columns that the update changes, in
                compute dtype; never rows of two products.
            first_row: which row of the update's own matrix the tile begins with.
            scratch: the calling thread's memory.
        """


class Method(Protocol):
    """One adapter kind."""

    def settings(self, shapes: Mapping[str, Shape], facts: ModuleFacts) -> Mapping[str, Setting]:
        """Check shapes (role to shape) and return what `prepare` needs to know besides the tensors.

        Raises:
            ShapeMismatchError: a shape contradicts the base, the partner or the config.
        """

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update, its tensors (role to tensor, dtype as stored) converted once."""
