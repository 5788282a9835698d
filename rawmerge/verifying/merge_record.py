"""The merge record of an output that is verified: what it says, and how the output is to be replayed by it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rawmerge.dtypes import AUTO_DTYPE
from rawmerge.errors import Problem
from rawmerge.inputs.identity import RECORD_NAME, read_record
from rawmerge.merge_options import CHOICES, COMBINING, LIKE_SHARD_BYTES, MergeOptions, settled_order

#: Fields of `MergeOptions` by the record's names for them, and what the record calls an empty one.
_RECORDED: Final = {
    "compute_dtype": ("compute_dtype", "float32"),
    "dtype": ("dtype", "as stored"),
    "vocab": ("vocab", "as stored"),
    "tokenizer": ("tokenizer", "base"),
    "moe_lora_b_layout": ("moe_lora_b_layout", "as marked"),
    "max_shard_size": ("max_shard_size", "as stored"),
    "format": ("format", "safetensors"),
    "like": ("like", ""),
    "order": ("order", "serial"),
    "replaced_by": ("replaced_by", 0),
    "combine": ("combine", ""),
    "density": ("density", 0),
    "majority_sign": ("majority_sign", "total"),
    "seed": ("seed", 0),
}


class MergeRecord:
    """The merge record of an output.

    Attributes:
        exists: whether there is one, so that the output is rawmerge's.
        fields: what it says; empty where it cannot be read.
        problems: why it cannot be read, and choices that there are not.
    """

    def __init__(self, output: Path) -> None:
        """Read the record of an output, which is a directory or a file in one."""
        folder = output if output.is_dir() else output.parent
        found = read_record(folder)
        self.exists = os.path.lexists(folder / RECORD_NAME)
        self.fields: Mapping[str, Any] = found.fields
        self.problems: list[Problem] = []
        self._options: dict[str, Any] = {}
        if self.exists and not found.fields:
            why = found.note.removeprefix("the base's ") or "one that says nothing"
            hint = "restore it; without the file the output is verified as that of any program"
            self.problems.append(Problem(RECORD_NAME, "a merge record", why, hint))
        stated = found.fields.get("options")
        for name, (field, empty) in _RECORDED.items():
            self._take(field, name, stated.get(name, empty) if isinstance(stated, dict) else empty, empty)

    def options(self, given: MergeOptions | Mapping[str, str | int | float | None], adapter_count: int) -> MergeOptions:
        """Return the choices by which the output is replayed.

        Args:
            given: all of them; or name by name, for those that are not named the record's, else the usual ones.
            adapter_count: how many adapters were given: what the record says of several means nothing of one.

        A wrong base must not keep the replay from being made: it is what a verification is to find.

        Raises:
            PlanError: they do not go together.
        """
        if isinstance(given, MergeOptions):
            return replace(given, force=True, card=self._has_card())
        stated = settled_order({name: value for name, value in given.items() if value is not None})
        recorded = self._options
        is_other = not {"combine", "order"}.isdisjoint(stated)  # another way to make one of several
        if is_other or (adapter_count == 1 and adapter_count != self.adapter_count):
            recorded = {name: value for name, value in recorded.items() if name not in {"order", *COMBINING}}
        if stated.get("like"):
            recorded = {"dtype": AUTO_DTYPE, "max_shard_size": LIKE_SHARD_BYTES, **recorded}
        return MergeOptions(**{**recorded, **stated}, force=True, card=self._has_card())

    @property
    def adapter_count(self) -> int:
        """How many adapters the record tells of."""
        adapters = self.fields.get("adapters")
        return len(adapters) if isinstance(adapters, list) else 0

    def notes(self) -> Iterator[str]:
        """Yield why a replay may differ from an output that is right."""
        options = self.fields.get("options")
        device = options.get("device") if isinstance(options, dict) else None
        if isinstance(device, str) and device != "cpu":
            yield f"by its {RECORD_NAME} it was computed on {ascii(device)[:40]}, where last bits may be others"

    def _has_card(self) -> bool:
        options = self.fields.get("options")
        return isinstance(options, dict) and options.get("card") is True

    def _take(self, field: str, name: str, value: object, empty: object) -> None:
        if value == empty:
            return
        choices = CHOICES.get(field)
        if isinstance(value, str) and value in choices if choices else _is_positive(value, field):
            self._options[field] = value
        else:
            unit = " of bytes" if field == "max_shard_size" else ""
            expected = f"one of {choices}" if choices else f"a positive number{unit}"
            self.problems.append(Problem(f"{RECORD_NAME}: {name}", expected, ascii(value)[:80]))


def _is_positive(value: object, field: str) -> bool:
    """Whether a recorded number may be the field's; JSON's true, an int in Python, is none."""
    is_number = type(value) is int or (type(value) is float and field == "density")
    return is_number and value > 0  # type: ignore[operator]  # mypy does not follow type()
