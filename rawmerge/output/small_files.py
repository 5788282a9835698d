"""All of an output but its shards: side files, index and config, and the record."""

from __future__ import annotations

import json
from pathlib import Path

from rawmerge.computing.losses import Losses
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import InputChangedError, quote
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.merge_plan import MergePlan
from rawmerge.output.loss_fields import loss_records
from rawmerge.output.outcome import count_steps
from rawmerge.output.record import format_record, record_text
from rawmerge.output.staging_directory import StagingDirectory


def write_small_files(plan: MergePlan, staging: StagingDirectory, device: str = "cpu") -> None:
    """Write them durably; the adapter is read once, for its checksum. `complete_record` goes on with the record.

    Raises:
        InputChangedError: a side file is not as planned; OSError: a file operation failed.
    """
    _copy_side_files(plan, staging.path)
    for file in plan.written_files:
        staging.write_text(file.name, file.text)
    staging.write_text(RECORD_NAME, record_text(plan, count_steps(plan), device))


def complete_record(staging: StagingDirectory, losses: Losses) -> None:
    """Add to the record, durably, what was lost in rounding, which is known when the shards are made.

    Raises:
        OSError: it cannot be written.
    """
    record = json.loads((staging.path / RECORD_NAME).read_text())
    staging.replace_text(RECORD_NAME, format_record(record | loss_records(losses)))


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    with OpenFiles() as files:
        for side in plan.side_files:
            target = folder / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with OutputFile(target, side.byte_count) as file:
                file.copy_from(files, side.path, 0, 0, side.byte_count)
                file.finish()
            if Path(side.path).stat().st_size != side.byte_count:
                raise InputChangedError(f"{quote(side.path)}: expected {side.byte_count} bytes as planned; it changed")
