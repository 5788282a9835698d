"""One run of a plan, as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rawmerge.computing.step_paths import StepPaths
from rawmerge.engine.jobs import ProgressCallback
from rawmerge.formats.adapter_config import CONFIG_NAME
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.memory.budget import MemoryBudget
from rawmerge.merge_plan import MergePlan
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
        signals: what ends the program, let through only where the run can end.
    """

    plan: MergePlan
    output: Path
    options: RunOptions
    report: ProgressCallback | None = None
    device: Device | None = None
    budget: MemoryBudget | None = None
    paths: StepPaths | None = None
    signals: HeldSignals = field(default_factory=HeldSignals)

    @property
    def policy(self) -> OutputPolicy:
        """What may stand at the output, and what must not be touched."""
        plan = self.plan
        shards = [Path(file.path) for file in (*plan.base_files, *plan.adapter_files)]
        sides = [Path(file.path) for file in plan.side_files]
        files = (*shards, *sides, Path(plan.base_root), Path(plan.adapter_root) / CONFIG_NAME)
        return OutputPolicy(self.options.overwrite, RECORD_NAME, Path(plan.base_root), files)
