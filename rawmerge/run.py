"""Runs a plan: staging directory, shards, side files, record, one rename. Decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Unpack

from rawmerge.combination import update_problems
from rawmerge.computing.cast_loss import CastLoss
from rawmerge.computing.step_paths import StepPaths
from rawmerge.computing.survival import Survival
from rawmerge.consuming.consuming_run import check_consuming, consume_base, was_published
from rawmerge.consuming.unfinished import unfinished_folder
from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MergeError, OutputError, PlanError, Problem, ProblemCollector, RawmergeError, quote
from rawmerge.formats.weight_map import is_safe_file_name
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.memory.budget import choose_budget
from rawmerge.memory.lack import lack_text, ran_out
from rawmerge.memory.process_peak import start_meter
from rawmerge.merge_options import BIN
from rawmerge.merge_plan import MergePlan, UpdateTensor
from rawmerge.methods import METHODS
from rawmerge.output.finished_shards import finished_lines
from rawmerge.output.linking import check_links
from rawmerge.output.outcome import Written, count_steps
from rawmerge.output.output_directory import check_output, check_space, nearest_folder
from rawmerge.output.shard_origins import ShardOrigins, find_origins
from rawmerge.output.staging_directory import PUBLISHED_NOTE, reclaimed_bytes
from rawmerge.output.survivals import lost_notes
from rawmerge.plain_run import write_output
from rawmerge.run_options import RunChoices, RunOptions, choose_run
from rawmerge.run_request import RunRequest

if TYPE_CHECKING:
    from rawmerge.computing.devices import Device

_BLOCK_BYTES: Final = 4096  # the end of a file takes no less


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a merge did.

    Attributes:
        output: the published directory.
        counts: tensors by what became of them: `kept`, `updated`, `cast`, `replaced`, `added`.
        unchanged: updated tensors of which no element changed: the delta is smaller than the rounding.
        survivals: what rounding left of the delta of each updated tensor, by its name; `--json` tells the
            totals in its place, as `surviving`.
        casts: what was taken from each tensor without updates in a cast to a dtype that lacks some of its values, by
            the tensor's name; `--json` and the record tell the totals under this name, and the worst tensors.
        byte_count: bytes of the output.
        written_bytes: of it, those that this run wrote: all but the shards that it linked, reused, or found finished.
        seconds: wall time of the run.
        notes: what a user may want to know, the plan's notes first.
        verified: whether the output was read back and compared with a second computation before it was published.
        linked: shards that are links to the base's (`link`).
        reused: shards taken from the output that was replaced, made by an earlier merge from the same inputs.
        resumed: shards that a merge that was cut off had finished.
        consumed: base shards that were deleted (`consume_base`).
        predicted_peak_bytes: the process's peak resident memory as it was predicted for the whole merge; None where a
            device computes, and where this run did not do the whole merge.
        measured_peak_bytes: that memory as the system counted it; None where it does not, or where the process had
            been larger before the merge. Two summaries that differ in it alone are equal.
    """

    output: str
    counts: dict[str, int]
    unchanged: tuple[str, ...]
    survivals: Mapping[str, Survival]
    byte_count: int
    written_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    verified: bool = False
    linked: int = 0
    reused: int = 0
    resumed: int = 0
    consumed: int = 0
    casts: Mapping[str, CastLoss] = field(default_factory=dict)
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = field(default=None, compare=False)


def run_plan(
    plan: MergePlan,
    output: str | Path,
    *,
    progress: ProgressCallback | None = None,
    **choices: Unpack[RunChoices],
) -> MergeSummary:
    """Write what `plan` says to `output`; it appears complete, or not at all.

    Args:
        plan: from `plan_merge`.
        output: directory to make; it must not exist unless `overwrite`.
        choices: `RunOptions` tells them: `overwrite`, `threads`, `max_memory`, `device` and so on.
        progress: called in this thread as bytes are finished. An exception from it cancels the merge and leaves
            nothing behind, but with `consume_base`: then the same call goes on.

    Raises:
        OutputError: the output may not be written; nothing was.
        MemoryLimitError: the merge takes more than `max_memory`, or than its control group has; nothing was written.
        MergeError: writing failed; nothing was published and nothing is left, unless its notes say so: where the system
            failed it, as where a signal ends it, finished shards are kept, and the same call goes on from them.
        VerificationError: with `verify`, what was written is not what was computed; nothing was published.
        ValueError: a choice is none of its values. TypeError: there is no such choice.
    """
    request = RunRequest(plan, Path(output), choose_run(choices), progress)
    started, meter = time.perf_counter(), start_meter()
    try:
        origins = check_request(request)
        paths = StepPaths(plan.options.compute_dtype, request.options)
        budget, forecast = choose_budget(plan, request.options, paths, request.reserved_bytes)
        with request.signals, _device(request.options) as device:
            there = replace(request, device=device, budget=budget, paths=paths)
            written = consume_base(there) if request.options.consume_base else write_output(there, origins)
            request.signals.note = PUBLISHED_NOTE
            peaks = None if device or written.spared_bytes else forecast.peak, meter.work_peak()
            notes = (*plan.notes, *written.notes, *(device.notes if device else ()))
            return _summary(there, written, notes, peaks, time.perf_counter() - started)
    except (OSError, MemoryError, ImportError, RuntimeError) as error:
        if isinstance(error, RawmergeError) or (isinstance(error, RuntimeError) and not ran_out(error)):
            raise
        raise MergeError(_describe(error) if isinstance(error, OSError) else lack_text(error)) from error


def _summary(
    request: RunRequest, written: Written, notes: tuple[str, ...], peaks: tuple[int | None, int | None], seconds: float
) -> MergeSummary:
    plan = request.plan
    return MergeSummary(
        output=str(request.output),
        counts=count_steps(plan),
        unchanged=written.unchanged,
        survivals=written.losses.survivals,
        casts=written.losses.casts,
        byte_count=plan.byte_count,
        written_bytes=plan.byte_count - written.spared_bytes,
        seconds=seconds,
        notes=(*notes, *lost_notes(written.losses.survivals, set(written.unchanged))),
        verified=request.options.verify,
        linked=written.linked,
        reused=written.reused,
        resumed=written.resumed,
        consumed=written.consumed,
        predicted_peak_bytes=peaks[0],
        measured_peak_bytes=peaks[1],
    )


def check_run(plan: MergePlan, output: str | Path, **choices: Unpack[RunChoices]) -> list[str]:
    """Check what `run_plan` would, and write nothing.

    Returns:
        What would become of shards that need not be made, in lines for people.

    Raises:
        RefusedError: the merge would be refused; ValueError: a choice is none of its values.
    """
    request = RunRequest(plan, Path(output), choose_run(choices))
    origins = check_request(request)
    choose_budget(plan, request.options, reserved=request.reserved_bytes)
    with _device(request.options):
        pass  # it is there
    left: Iterable[str] = ()
    if origins.identities and not request.options.consume_base:
        made = {shard.name for shard in plan.shards} - origins.taken_names
        left = finished_lines(request, origins.identities, made)
    linked = [f"{name} becomes a link to {path}" for name, path in origins.links.items()]
    return [
        *origins.notes,
        *left,
        *linked,
        *(f"{name} is taken from the output that is replaced" for name in origins.reused),
    ]


@contextmanager
def _device(options: RunOptions) -> Iterator[Device | None]:
    """Give the device to compute on, None for the CPU.

    Raises:
        DeviceError: it is not there.
    """
    if options.device == "cpu":
        yield None
        return
    from rawmerge.computing.devices import open_device  # imports torch

    with open_device(options.device) as device:
        yield device


def check_request(request: RunRequest) -> ShardOrigins:
    """Refuse an output that exists, cannot be written, touches an input, or does not fit on the disk.

    Returns:
        Which shards need not be made.

    Raises:
        RefusedError: with all reasons.
    """
    _check_names(request.plan)
    _check_methods(request.plan)
    problems = ProblemCollector()
    problems.add(OutputError, _choice_problems(request))
    if not (request.options.consume_base and was_published(request)):
        with problems.absorb():
            check_output(request.output, request.policy)
    try:
        folder = nearest_folder(request.output)
    except OSError:  # a name that no file can have, which has been noticed
        problems.raise_if_any()
        raise
    with problems.absorb():
        origins = (_check_consuming if request.options.consume_base else _check_plain)(request, folder)
    problems.raise_if_any()
    return origins


def _choice_problems(request: RunRequest) -> Iterator[Problem]:
    """Yield which choices do not go together."""
    options = request.options
    if options.consume_base and not options.resume:
        expected = (
            "to be the only one of --no-resume and --consume-base, for the base is gone in part once it is cut off"
        )
        yield Problem("--no-resume", expected, "both", "leave one out")
    if options.link and request.plan.options.format == BIN:
        expected = f"to be without --format {BIN}: a file of another format is no link to the base's"
        yield Problem("--link", expected, "both", "leave one out")
    if options.verify and options.consume_base:
        expected = "to be the only one of --verify and --consume-base, for the base is gone by then"
        yield Problem("--verify", expected, "both", "leave one out")
    if options.verify and options.device != "cpu" and request.plan.options.compute_dtype == "float32":
        expected = "--device cpu, or --compute-dtype float64: bits that the processor can compute again"
        yield Problem("--verify", expected, f"--device {options.device} in float32")


def _check_plain(request: RunRequest, folder: Path) -> ShardOrigins:
    origins, problems = find_origins(request), ProblemCollector()
    with problems.absorb():
        unfinished_folder(request.output).check(request.plan, consumes=False)
    with problems.absorb():
        check_links(origins.links, folder)
    with problems.absorb():
        needed = request.plan.byte_count - origins.byte_count(request.plan)
        files = len(request.plan.shards) + len(request.plan.side_files) + len(request.plan.written_files)
        less = "--consume-base needs room for about one shard, and deletes the base's as it goes"
        check_space(request.output, needed + files * _BLOCK_BYTES - reclaimed_bytes(request.output), [less])
    problems.raise_if_any()
    return origins


def _check_consuming(request: RunRequest, folder: Path) -> ShardOrigins:
    return ShardOrigins(notes=check_consuming(request, folder))


def _check_names(plan: MergePlan) -> None:
    """Refuse a plan, which may come from a stranger's file, that would write outside the output or a file twice."""
    shards, texts = [shard.name for shard in plan.shards], [file.name for file in plan.written_files]
    sides = [file.name for file in plan.side_files]
    flat = (name for name in (*shards, *texts) if not is_safe_file_name(name))
    nested = (name for name in sides if {"", ".", ".."} & set(name.split("/")) or {"\\", "\0"} & set(name))
    files = {*shards, *texts, RECORD_NAME}
    twice = (name for name, count in Counter([*shards, *texts, *sides, RECORD_NAME]).items() if count > 1)
    expected, found = "a file of its own inside the output", "another path, or the name twice"
    problems = [Problem(name, expected, found) for name in (*flat, *nested, *twice)]
    below = [name for name in sides if "/" in name and name.split("/")[0] in files]
    hint = "move that folder out of the base"
    problems += [
        Problem(name, expected, "one in a folder that has the name of a file of the output", hint) for name in below
    ]
    if problems:
        raise PlanError(*problems)


def _check_methods(plan: MergePlan) -> None:
    """Refuse a plan, which may be of a newer version, whose updates this one cannot compute."""
    steps = (step for shard in plan.shards for step in shard.steps if isinstance(step, UpdateTensor))
    found = {problem.found: problem for step in steps for problem in update_problems(step, METHODS)}
    if found:
        raise PlanError(*found.values())


def _describe(error: OSError) -> str:
    name = f"{quote(error.filename)}: " if error.filename else ""
    state = ", ".join(getattr(error, "__notes__", ())) or "nothing was published"
    return f"{name}{error.strerror or error}; {state}"
