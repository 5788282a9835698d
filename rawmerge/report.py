"""Plans, summaries, inspections and refusals as text for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from typing import Any, Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.combination import combination_of
from rawmerge.errors import MemoryLimitError, Problem, RawmergeError, RefusedError, VerificationError, printable, quote
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.inspection import Inspection
from rawmerge.leftovers import Leftover
from rawmerge.memory.budget import choose_budget
from rawmerge.merge_options import ONCE, MergeOptions
from rawmerge.merge_plan import (
    AdapterInput,
    AdapterUse,
    KeepTensor,
    MergePlan,
    ReplaceTensor,
    Step,
    Update,
    UpdateTensor,
)
from rawmerge.methods.interface import COLUMNS, ROWS, WHOLE
from rawmerge.output.outcome import count_steps
from rawmerge.plan_json import format_plan
from rawmerge.run_options import RunOptions
from rawmerge.verifying.findings import NOT_REPLAYED, Verification

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_PROBLEMS: Final = 20
_MAX_NAMES: Final = 8
_SERIAL: Final = "one adapter after the other, rounded after each"


def plan_text(plan: MergePlan, options: RunOptions | None = None) -> str:
    """Return what a plan would do, in lines for people; its memory with these options, or with none."""
    counts = count_steps(plan)
    done = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    lines = [
        f"base      {plan.base_root}",
        *(line for adapter in plan.adapters for line in _adapter_lines(adapter)),
        *(f"order     {_order_text(plan.options)}" for _ in plan.adapters[1:2]),
        f"compute   {plan.options.compute_dtype}, output dtype {plan.options.dtype or 'as stored'}",
        f"tensors   {done}",
        *(f"  {line}" for line in _changed_lines(plan.steps())),
        f"memory    {_memory_text(plan, options or RunOptions())}",
        f"output    {format_bytes(plan.byte_count)} in {len(plan.shards)} shard{'s'[: len(plan.shards) != 1]}",
        f"written   {some_names([*(file.name for file in plan.written_files), RECORD_NAME])}",
        f"copied    {some_names(file.name for file in plan.side_files)}",
        *left_out_lines(plan),
        *(f"note      {note}" for note in plan.notes),
    ]
    return "\n".join(map(printable, lines))


def _order_text(options: MergeOptions) -> str:
    """Return what becomes of several adapters."""
    if options.combine:
        return f"{options.combine}: the deltas are combined and rounded once"
    return "once: all deltas are summed and rounded once" if options.order == ONCE else f"{options.order}: {_SERIAL}"


def _adapter_lines(adapter: AdapterInput) -> Iterator[str]:
    weight = "" if adapter.weight == 1 else f", weight {adapter.weight:g}"
    yield f"adapter   {adapter.root} ({_account_summary(adapter.uses)}{weight})"
    yield from (f"  {line}" for line in account_lines(adapter.uses))


def plan_json(plan: MergePlan, options: RunOptions | None = None, run_notes: Sequence[str] | None = None) -> str:
    """Return a plan as one JSON object that `parse_plan` reads, and the memory that it takes with these options.

    Of a dry run it has `run_notes` too: what would become of shards that need not be made.
    """
    return format_plan(plan, memory=_memory_fields(plan, options or RunOptions()), run_notes=run_notes)


def account_lines(uses: Iterable[AdapterUse]) -> list[str]:
    """Return the account of the adapter's tensors as a table, one row for names that differ in numbers only."""
    families: dict[tuple[str, str, str, str], int] = {}
    for use in uses:
        row = (use.use, _folded(use.name), _folded(use.tensor_name), use.reason)
        families[row] = families.get(row, 0) + 1
    return [
        f"{use:<9} {name}{f' (x {count})' if count > 1 else ''} -> {tensor}{f': {reason}' if reason else ''}"
        for (use, name, tensor, reason), count in families.items()
    ]


def inspection_text(inspection: Inspection) -> str:
    """Return what a path holds, in lines for people."""
    lines = [f"{inspection.kind}  {inspection.path}"]
    for name, value in inspection.facts.items():
        shown = some_names(value) if isinstance(value, list) else value
        lines.append(f"  {name:<24} {format_bytes(int(value)) if name == 'bytes' else shown}")  # type: ignore[arg-type]
    verdict = "cannot be merged" if inspection.problems else "can be merged, as far as it alone tells"
    lines = [*map(printable, lines), f"  {'verdict':<24} {verdict}"]
    return "\n".join([*lines, *(f"    {problem}" for problem in inspection.problems)])


def leftovers_text(removed: Sequence[Leftover]) -> str:
    """Return what was removed of merges that were cut off, in lines for people."""
    lines = [f"removed {item.path} ({format_bytes(item.byte_count)})" for item in removed]
    return "\n".join(map(printable, lines or ["nothing was left"]))


def leftovers_json(removed: Sequence[Leftover]) -> str:
    """Return the same as a JSON object: `removed`, each with `path` and `byte_count`."""
    return json.dumps({"removed": [dataclasses.asdict(item) for item in removed]})


def error_text(error: RawmergeError) -> str:
    """Return an error for people: problems that differ in layer numbers only are told once, long lists are cut."""
    notes = [f"    {printable(note)}" for note in getattr(error, "__notes__", ())]
    if isinstance(error, VerificationError):
        return "\n".join([printable(str(error.args[0])), *_problem_lines(error.problems), *notes])
    if not isinstance(error, RefusedError) or len(error.problems) <= 1:
        return "\n".join([*map(printable, str(error).split("\n")), *notes])
    return "\n".join([f"{len(error.problems)} problems", *_problem_lines(error.problems), *notes])


def _problem_lines(problems: Iterable[Problem]) -> Iterator[str]:
    """Yield the lines of a list, in which problems that differ in layer numbers only are told once."""
    families: dict[Problem, list[Problem]] = {}
    for problem in problems:
        families.setdefault(_without_layers(problem), []).append(problem)
    for family in list(families.values())[:_MAX_PROBLEMS]:
        more = f"\n    and {len(family) - 1} more that differ in layer numbers only" if len(family) > 1 else ""
        yield f"  - {family[0]}{more}"
    if len(families) > _MAX_PROBLEMS:
        yield f"  and {len(families) - _MAX_PROBLEMS} more kinds (--json lists all)"


def left_out_lines(plan: MergePlan) -> list[str]:
    """Return one line for each file of the base that the output does not have."""
    return [printable(f"left out  {item.name}: {item.reason}") for item in plan.left_out]


def verification_text(made: Verification) -> str:
    """Return what a verification found, in lines for people."""
    elements, notes = f"{made.tensor_count} tensors, {made.element_count} elements", list(made.notes)
    if made.findings:
        lines = [f"{quote(made.output)}: {len(made.findings)} finding{'s'[: len(made.findings) != 1]} in {elements}"]
        lines += _problem_lines(made.findings)
    elif not made.replayed:
        said = [note for note in notes if note.startswith(NOT_REPLAYED)]  # who reads one line has to know it
        notes = [note for note in notes if note not in said]
        rest = "nothing in its headers, index, config and record contradicts the rest"
        lines = [f"{elements}: {'; '.join([*said, rest])}"]
    elif made.differences:
        worst = max(item.max_ulps for item in made.differences)
        count = sum(item.differing for item in made.differences)
        within = f"{count} elements of {len(made.differences)} tensors differ, by at most {worst:.3g} ulp"
        lines = [f"{elements}: what base and adapter give, within the tolerance: {within}"]
    else:
        lines = [f"{elements}: what base and adapter give, bit for bit"]
    return "\n".join([*lines, *(printable(f"note: {note}") for note in notes)])


def verification_json(made: Verification) -> str:
    """Return a verification as one JSON object."""
    document = {**dataclasses.asdict(made), "is_equal": made.is_equal}
    return json.dumps(_finite(document))


def _finite(value: Any) -> Any:
    """Return a JSON value in which what is not finite is text: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def inspection_json(inspection: Inspection) -> str:
    """Return an inspection as one JSON object."""
    return json.dumps(dataclasses.asdict(inspection))


def error_json(error: RawmergeError) -> str:
    """Return an error as one JSON object, of the same keys for all: class, exit code, text, notes, problems' fields."""
    document: dict[str, Any] = {
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "message": str(error),
        "notes": list(getattr(error, "__notes__", ())),
        "problems": [dataclasses.asdict(problem) for problem in error.problems],
    }
    return json.dumps(document)


def _without_layers(problem: Problem) -> Problem:
    """Return the problem with layer numbers blanked, and without its hint: a name for the family it belongs to."""
    blanked = (_NUMBER.sub("*", text) for text in (problem.subject, problem.expected, problem.found))
    return Problem(*blanked)


def _account_summary(uses: Iterable[AdapterUse]) -> str:
    counts = Counter(use.use for use in uses)
    return f"{counts.total()} tensors: " + ", ".join(f"{count} {use}" for use, count in counts.items())


def _folded(name: str) -> str:
    return _NUMBER.sub("*", name)


def _changed_lines(steps: Iterable[Step]) -> Iterator[str]:
    """Yield one line per family of changed tensors, layer numbers folded together."""
    families: dict[tuple[str, str], int] = {}
    for step in steps:
        if not isinstance(step, KeepTensor) and (what := _describe_step(step)):
            key = (_NUMBER.sub("*", step.entry.name), what)
            families[key] = families.get(key, 0) + 1
    for (name, what), count in families.items():
        yield f"{name}: {what}{f' (x {count})' if count > 1 else ''}"


def _describe_step(step: UpdateTensor | ReplaceTensor) -> str:
    if isinstance(step, ReplaceTensor):
        return "replaced by the adapter's" if step.base else "added from the adapter"
    overlay = [f"first {step.overlay.shape[0]} rows replaced by the adapter's"] if step.overlay else []
    return ", ".join(dict.fromkeys([*overlay, *map(_describe_update, step.updates)]))


def _describe_update(update: Update) -> str:
    match update.kind:
        case "rounding":
            return "then rounded"
        case "combination":
            return _describe_combination(update)
        case "combined_lora":
            how, count = update.settings["combine"], len(update.tensors) // 2
            return f"{how} of {count} pairs of factors, {', '.join(_rank_and_scaling(update))}"
        case "token_rows":
            return f"{update.tensors['rows'].shape[0]} token rows replaced"
        case "lora_bias":
            return f"bias added, scaling {update.settings['scaling']:g}"
    details = [*_rank_and_scaling(update), _reach_text(update)]
    return " ".join([update.kind, ", ".join(filter(None, details))]).strip()


def _describe_combination(update: Update) -> str:
    made = combination_of(update)
    parts = dict.fromkeys(_describe_update(dataclasses.replace(part, reach=ROWS)) for part in made.updates)
    density = f", density {made.density:g}" if made.density else ""
    thrice = ", each computed three times" if made.prunes_by_magnitude else ""
    whole = f", {_reach_text(update)}" if update.reach == WHOLE else ""
    return f"{made.how}{density}, of {len(made.tasks)} deltas{thrice}{whole}: {'; '.join(parts)}"


def _rank_and_scaling(update: Update) -> Iterator[str]:
    if update.rank:
        yield f"rank {update.rank}"
    scaling = update.settings.get("scaling")
    if isinstance(scaling, int | float):
        yield f"scaling {scaling:g}"
    if update.settings.get("is_transposed"):
        yield "transposed"


def _memory_text(plan: MergePlan, options: RunOptions) -> str:
    """Return the predicted peak, and what takes a whole tensor."""
    try:
        _, forecast = choose_budget(plan, options)
    except MemoryLimitError as error:
        return f"cannot be merged here: {error.problems[0]}".partition("\n")[0]
    whole = [name for name, reach, _ in forecast.whole if reach == WHOLE]
    needs = f"; {len(whole)} tensors whole in memory, {some_names(whole[:1])} needs most" if whole else ""
    torch = f", of it {format_bytes(forecast.torch)} torch, {forecast.need}" if forecast.torch else ", without torch"
    return f"about {format_bytes(forecast.peak)} at the peak{torch}{needs}"


def _memory_fields(plan: MergePlan, options: RunOptions) -> dict[str, Any]:
    """Return the predicted peak in bytes and the threads that it is for, or why the limit cannot be kept."""
    try:
        budget, forecast = choose_budget(plan, options)
    except MemoryLimitError as error:
        return {"problems": [dataclasses.asdict(problem) for problem in error.problems]}
    whole = [name for name, reach, _ in forecast.whole if reach == WHOLE]
    return {"peak_bytes": forecast.peak, "torch_bytes": forecast.torch, "threads": budget.threads, "whole": whole}


def some_names(names: Iterable[str]) -> str:
    """Return names as a list for people, long ones cut with a count."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return (", ".join(listed[:_MAX_NAMES]) or "none") + more


def _reach_text(update: Update) -> str:
    """Return what an update needs beyond its own rows, in words; empty for nothing."""
    return {COLUMNS: "the base read twice", WHOLE: "the whole tensor in memory"}.get(update.reach, "")
