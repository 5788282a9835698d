"""Whether the inputs are still what a plan was made from, by size and header."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rawmerge.errors import InputChangedError, RefusedError, quote
from rawmerge.inputs.adapter import read_weights
from rawmerge.inputs.base_checkpoint import read_base_file
from rawmerge.merge_plan import InputFile


def check_inputs(base_files: Iterable[InputFile], adapter_files: Iterable[InputFile]) -> None:
    """Refuse inputs that are no longer what the plan was made from.

    Raises:
        InputChangedError: one has another size or header, or cannot be read.
    """
    readers = [*((file, read_base_file) for file in base_files), *((file, read_weights) for file in adapter_files)]
    for file, read in readers:
        try:
            found = read(Path(file.path))
        except RefusedError as error:
            raise InputChangedError(str(error)) from error
        if (found.size, found.digest) != (file.byte_count, file.header_sha256):
            raise InputChangedError(
                f"{quote(file.path)}: expected the file that the plan was made from, found another; plan again"
            )
