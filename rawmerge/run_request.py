"""One run of a plan, as it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rawmerge.computing.step_paths import StepPaths
from rawmerge.engine.jobs import Progress, ProgressCallback
from rawmerge.formats.adapter_config import CONFIG_NAME
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.memory.budget import COMPARING_BYTES, MemoryBudget
from rawmerge.merge_plan import MergePlan
from rawmerge.output.manifest import Manifest
from rawmerge.output.output_directory import OutputPolicy
from rawmerge.run_options import RunOptions
from rawmerge.signals import HeldSignals

if TYPE_CHECKING:
    from rawmerge.computing.devices import Device


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to run.

    Attributes:
        plan: what to write.
        output: the directory to make.
        options: how.
        report: told of the progress; an exception from it ends the run.
        device: where updates are computed, None for the CPU.
        budget: what it may take, None for what suits any merge.
        paths: what computes which step, None for what this machine knows.
        manifest: takes the digests of files, None where none is asked for.
        signals: what ends the program, let through only where the run can end.
    """

    plan: MergePlan
    output: Path
    options: RunOptions
    report: ProgressCallback | None = None
    device: Device | None = None
    budget: MemoryBudget | None = None
    paths: StepPaths | None = None
    manifest: Manifest | None = None
    signals: HeldSignals = field(default_factory=HeldSignals)

    @contextmanager
    def with_manifest(self, folder: Path) -> Iterator[RunRequest]:
        """Give this request with a manifest of the files in `folder`, where one is asked for."""
        if not self.options.checksum:
            yield self
            return
        manifest = Manifest(folder)
        try:
            yield replace(self, manifest=manifest)
        finally:
            manifest.close()

    @property
    def reserved_bytes(self) -> int:
        """Memory that is left for comparing, in bytes."""
        return COMPARING_BYTES if self.options.verify else 0

    def report_to_end(self, progress: Progress) -> None:
        """Let the run end here where it was told to, and tell of the progress."""
        self.signals.let_through()
        if self.report:
            self.report(progress)

    @property
    def policy(self) -> OutputPolicy:
        """What may stand at the output, and what must not be touched."""
        plan = self.plan
        shards = [Path(file.path) for file in (*plan.base_files, *plan.adapter_files)]
        sides = [Path(file.path) for file in plan.side_files]
        configs = [Path(adapter.root) / CONFIG_NAME for adapter in plan.adapters]
        files = (*shards, *sides, Path(plan.base_root), *configs)
        return OutputPolicy(self.options.overwrite, RECORD_NAME, Path(plan.base_root), files)
