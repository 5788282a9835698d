"""rawmerge folds PEFT adapters into base checkpoints, shard by shard, without PEFT and without building a model.

    >>> import rawmerge
    >>> summary = rawmerge.merge_adapter("base/", "adapter/", "merged/")  # doctest: +SKIP

Names are loaded on first use, so that importing rawmerge costs next to nothing; torch is imported by a running
merge only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rawmerge._version import __version__

if TYPE_CHECKING:
    from rawmerge.api import inspect_path, merge_adapter, plan_merge, verify_merge
    from rawmerge.engine.jobs import Progress
    from rawmerge.errors import MergeError, Problem, RawmergeError, RefusedError, VerificationError
    from rawmerge.exporting.export_job import ExportJob
    from rawmerge.exporting.export_run import run_export
    from rawmerge.exporting.job_file import read_export
    from rawmerge.inspection import Inspection
    from rawmerge.leftovers import clean_output
    from rawmerge.merge_options import MergeOptions
    from rawmerge.merge_plan import MergePlan
    from rawmerge.plan_json import format_plan, parse_plan
    from rawmerge.planning import choose_options
    from rawmerge.run import MergeSummary, run_plan
    from rawmerge.verifying.findings import Verification

__all__ = [
    "ExportJob",
    "Inspection",
    "MergeError",
    "MergeOptions",
    "MergePlan",
    "MergeSummary",
    "Problem",
    "Progress",
    "RawmergeError",
    "RefusedError",
    "Verification",
    "VerificationError",
    "__version__",
    "choose_options",
    "clean_output",
    "format_plan",
    "inspect_path",
    "merge_adapter",
    "parse_plan",
    "plan_merge",
    "read_export",
    "run_export",
    "run_plan",
    "verify_merge",
]

_HOMES = {
    "ExportJob": "exporting.export_job",
    "Inspection": "inspection",
    "MergeError": "errors",
    "MergeOptions": "merge_options",
    "MergePlan": "merge_plan",
    "MergeSummary": "run",
    "Problem": "errors",
    "Progress": "engine.jobs",
    "RawmergeError": "errors",
    "RefusedError": "errors",
    "Verification": "verifying.findings",
    "VerificationError": "errors",
    "choose_options": "planning",
    "clean_output": "leftovers",
    "format_plan": "plan_json",
    "inspect_path": "api",
    "merge_adapter": "api",
    "parse_plan": "plan_json",
    "plan_merge": "api",
    "read_export": "exporting.job_file",
    "run_export": "exporting.export_run",
    "run_plan": "run",
    "verify_merge": "api",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rawmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rawmerge.{home}"), name)


def __dir__() -> list[str]:
    return __all__
