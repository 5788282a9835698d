"""A merge file of whichever tool, read as an export job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rawmerge.exporting import axolotl, mergekit
from rawmerge.exporting.export_job import ExportJob
from rawmerge.exporting.interpolation import interpolated
from rawmerge.exporting.llamafactory import llamafactory_job
from rawmerge.exporting.yaml_file import read_yaml, with_overrides

_FILE_ENDINGS: Final = (".yaml", ".yml", ".json")


def read_export(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ExportJob:
    """Return what another tool's merge file asks for; nothing else is read, and no hub is asked.

    Args:
        path: a YAML file of LLaMA-Factory (flat, or nested as its version 1 has it), axolotl or mergekit; or mergekit's
            `base+adapter`, which goes with `export_dir=OUTPUT`.
        overrides: `key=value` texts, which win over the file's.

    Raises:
        MissingFileError: the file cannot be read.
        RefusedError: with every key that is wrong, unknown, missing, or asks for what rawmerge does not do.

    Example:
        >>> job = read_export("merge.yaml", ["export_dir=merged"])  # doctest: +SKIP
    """
    text = os.fspath(path)
    if "+" in text and not text.endswith(_FILE_ENDINGS) and not os.path.lexists(text):
        document: Mapping[str, Any] = {"models": [{"model": text}]}
    else:
        document = read_yaml(Path(text).expanduser())
    given = list(overrides)
    table = interpolated(with_overrides(document, given))
    if axolotl.MARK in table:
        return axolotl.axolotl_job(table, {text.partition("=")[0].strip() for text in given})
    if mergekit.MARKS & table.keys():
        return mergekit.mergekit_job(table)
    return llamafactory_job(table)
