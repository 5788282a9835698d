"""What a program would save of a checkpoint, as a value: the tensors of each file, and their dtypes on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor.

    Attributes:
        name: as it is saved.
        dtype: as it is saved, a code of safetensors.
        shape: its dimensions.
        held_dtype: as it is loaded and merged, before it is cast to `dtype`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    held_dtype: str


@dataclass(frozen=True, slots=True)
class SavedLayout:
    """All files of a checkpoint.

    Attributes:
        class_name: the class of transformers that is loaded; version: that of transformers.
        loaded_dtype: torch name of the dtype in which the model is loaded.
        shards: file name and tensors of each.
        index_text: the index, empty for a single file.
    """

    class_name: str
    version: str
    loaded_dtype: str
    shards: tuple[tuple[str, tuple[SavedTensor, ...]], ...]
    index_text: str

    def tensors(self) -> Iterator[SavedTensor]:
        """Yield every tensor."""
        for _, tensors in self.shards:
            yield from tensors
