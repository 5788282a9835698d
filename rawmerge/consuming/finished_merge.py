"""A merge that consumed its base and is done: its base cannot be planned again, but its output tells that it is there.

The record names no folders, so this is told of a base by its index, its config and the shards that it lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rawmerge.adapter_source import AdapterSource
from rawmerge.consuming.plan_difference import as_resolved
from rawmerge.errors import Problem, RefusedError, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.shard_names import PICKLE_NAME, SINGLE_NAME, output_name
from rawmerge.formats.weight_map import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PICKLE_INDEX_NAME,
    PICKLE_SUFFIX,
    SHARD_SUFFIX,
    parse_weight_map,
)
from rawmerge.inputs.adapter import Adapter, read_adapter
from rawmerge.inputs.identity import RECORD_NAME, merged_adapters, read_record
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_options import BIN, MergeOptions
from rawmerge.output.record import RECORD_FORMAT, options_record


def finished_merge(output: Path, base: Path, sources: Sequence[AdapterSource], options: MergeOptions) -> Problem | None:
    """Return why a merge need not be done again; None where the output's record does not prove that it is this one's.

    Args:
        output: the directory to make.
        base: where the base was.
        sources: the adapters.
        options: the choices of the command.
    """
    record = read_record(output).fields if output.is_dir() else {}
    if record.get("format") != RECORD_FORMAT:
        return None
    with suppress(
        RefusedError, OSError, LookupError, TypeError, ValueError, AttributeError
    ):  # a record may be anyone's
        if _has_options(record, options) and _has_adapters(record, sources):
            missing = _consumed_shards(record, base) if _is_whole(record, output, options) else 0
            return _problem(output, base, missing) if missing else None
    return None


def _problem(output: Path, base: Path, missing: int) -> Problem:
    gone = "1 shard is" if missing == 1 else f"{missing} shards are"
    found = (
        f"this very merge, finished: by its {RECORD_NAME} it is made of this adapter, with these options, and of the "
        f"base in {quote(base)}, of which {gone} gone, as --consume-base leaves it"
    )
    return Problem(
        str(output),
        "a merge that is still to be done",
        found,
        "nothing is left to do: this is its output; if that base is another one, fetch it whole",
    )


def _has_options(record: Mapping[str, Any], options: MergeOptions) -> bool:
    recorded = {name: value for name, value in record["options"].items() if name != "device"}
    return recorded == options_record(as_resolved(options, recorded["dtype"]))


def _has_adapters(record: Mapping[str, Any], sources: Sequence[AdapterSource]) -> bool:
    pairs = zip(record["adapters"], sources, strict=True)
    return all(
        merged.get("weight", 1) == source.weight and _is_adapter(merged, read_adapter(source.path))
        for merged, source in pairs
    )


def _is_adapter(merged: Mapping[str, Any], adapter: Adapter) -> bool:
    with adapter.weights.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_config = merged["config_sha256"] == _sha256(adapter.config_text.encode())
    return is_config and merged_adapters({"adapters": [merged]}) == {digest}


def _consumed_shards(record: Mapping[str, Any], base: Path) -> int:
    """Return how many of the record's base shards are gone from a base that is otherwise the record's; else 0."""
    folder = base if base.is_dir() else base.parent
    names = {str(shard["name"]) for shard in record["base"]["shards"]}
    config = folder / CONFIG_NAME
    is_same = config.is_file() and record["base"]["config_sha256"] == _sha256(read_small_file(config))
    if not is_same or _indexed(folder) not in (set(), names):
        return 0
    return sum(not (folder / name).exists() for name in names)


def _is_whole(record: Mapping[str, Any], output: Path, options: MergeOptions) -> bool:
    """Whether the output has all its shards: the base's names, or those that it was given anew."""
    names = {output_name(str(shard["name"])) for shard in record["base"]["shards"]}
    if options.max_shard_size or options.format == BIN:
        names = _indexed(output) or {PICKLE_NAME if options.format == BIN else SINGLE_NAME}
    return all((output / name).is_file() for name in names)


def _indexed(folder: Path) -> set[str]:
    """Return the shards that a folder's index names; none without an index."""
    for name, suffix in ((INDEX_NAME, SHARD_SUFFIX), (PICKLE_INDEX_NAME, PICKLE_SUFFIX)):
        if (path := folder / name).is_file():
            return set(parse_weight_map(read_small_file(path, MAX_INDEX_BYTES), str(path), suffix).shard_names)
    return set()


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest() if raw else ""
