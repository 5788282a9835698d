"""How a merge shares out the memory that it may take: threads, tiles, what is kept of adapters, pages in flight.

None of it changes a bit of the output: on the torch path tiles stay at heights whose bits are those of the whole
product (`rawmerge.engine.tiles`), on the kernel's path any height has the same bits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.computing.certificates import FILE_NAME
from rawmerge.computing.step_paths import StepPaths
from rawmerge.engine.tiles import BLOCK_ELEMENTS, TILE_ELEMENTS
from rawmerge.errors import MemoryLimitError, Problem
from rawmerge.memory.forecast import MemoryForecast, MemoryForecaster
from rawmerge.memory.limit import MemoryLimit, address_space_limit, data_limit, group_limit
from rawmerge.merge_plan import MergePlan
from rawmerge.run_options import RunOptions
from rawmerge.user_cache import cache_folder

MAX_THREADS: Final = 8
#: What a merge takes, unless told, beside Python and torch.
ALLOWANCE: Final = 64 * 2**20
#: What is kept at most of adapter tensors that several steps read; a layer of experts of rank 16 takes a quarter.
SHARED_BYTES: Final = 256 * 2**20
#: What comparing an output takes beside computing it again: numpy, where anything differs, and what was found.
COMPARING_BYTES: Final = 40 * 10**6
#: Bytes that may wait for the disk, at most and at least, where memory is limited.
_WINDOW_BYTES: Final = 64 * 2**20
_LOWEST_WINDOW: Final = 2 * 2**20


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a merge may take.

    Attributes:
        threads: how many work.
        tile_elements: elements of a tile.
        shared_bytes: what is kept at most of adapter tensors that several steps read.
        window_bytes: after so many bytes written a thread waits for the disk, and pages behind the work are given up;
            0 leaves them to the system.
        limit: what is not to be exceeded, in bytes; None for nothing that is known.
        has_room_for_torch: whether torch may be imported for a tile whose values overflow.
    """

    threads: int
    tile_elements: int = TILE_ELEMENTS
    shared_bytes: int = ALLOWANCE // 2
    window_bytes: int = 0
    limit: int | None = None
    has_room_for_torch: bool = True


def default_threads(*, needs_torch: bool = False) -> int:
    """Return how many threads a merge uses unless told: more than it has processors, for most wait for the disk.

    Args:
        needs_torch: whether torch computes, which takes longer than the disk does, and has larger buffers.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, usable + (1 if needs_torch else 4))


def choose_budget(
    plan: MergePlan, options: RunOptions, paths: StepPaths | None = None, reserved: int = 0
) -> tuple[MemoryBudget, MemoryForecast]:
    """Return what a merge may take, and what it is predicted to take with that.

    The limit is `max_memory`, else that of the process's control group, and RLIMIT_DATA; without one, some 64 MiB
    beside Python and torch.

    Args:
        plan: what is computed.
        options: how.
        paths: what computes which step, None for what this machine knows.
        reserved: bytes of a limit that are left for something else.

    Raises:
        MemoryLimitError: the limit cannot be kept; with the tensor that needs most.
    """
    forecaster = MemoryForecaster(plan, paths or StepPaths(plan.options.compute_dtype, options))
    threads = options.threads or default_threads(needs_torch=forecaster.needs_torch)
    limit = _limit(options)
    _check_address_space(forecaster)
    first = forecaster.forecast(threads, shared_bytes=0)
    allowed = limit.byte_count - reserved if limit else first.python + first.torch + ALLOWANCE
    tried = [(count, size, forecaster.forecast(count, size, 0)) for count, size in _choices(threads, bool(limit))]
    fitting = (choice for choice in tried if choice[2].peak <= allowed)
    count, size, least = next(fitting, tried[-1])
    if limit and limit.is_hard and least.peak > allowed:
        raise MemoryLimitError(_refusal(least, limit, reserved))
    shared = min(SHARED_BYTES, max(0, allowed - least.peak))
    budget = MemoryBudget(
        threads=count,
        tile_elements=size,
        shared_bytes=shared,
        window_bytes=_window(limit, least.peak) if limit and _is_tight(plan, options, limit) else 0,
        limit=limit.byte_count if limit else None,
        has_room_for_torch=not (limit and limit.is_hard and least.torch == 0)
        or forecaster.with_torch() <= limit.byte_count,
    )
    return budget, forecaster.forecast(count, size, shared)


def _limit(options: RunOptions) -> MemoryLimit | None:
    own = MemoryLimit(options.max_memory, "--max-memory") if options.max_memory else group_limit()
    return min(filter(None, (own, data_limit())), key=lambda limit: limit.byte_count, default=None)


def _choices(threads: int, may_lower_threads: bool) -> Iterator[tuple[int, int]]:
    """Yield (threads, elements of a tile), the fastest first."""
    size = TILE_ELEMENTS
    while size > BLOCK_ELEMENTS:
        yield threads, size
        size //= 2
    for count in range(threads, 0 if may_lower_threads else threads - 1, -1):
        yield count, size


def _is_tight(plan: MergePlan, options: RunOptions, limit: MemoryLimit) -> bool:
    """Whether the pages of the files that are read and written would fill the memory."""
    read = sum(file.byte_count for file in (*plan.base_files, *plan.adapter_files))
    return options.max_memory is not None or limit.byte_count < read + plan.byte_count


def _window(limit: MemoryLimit, peak: int) -> int:
    # two windows are dirty at most, and as much again is left for what the system has to keep
    return min(_WINDOW_BYTES, max(_LOWEST_WINDOW, (limit.byte_count - peak) // 4))


def _refusal(least: MemoryForecast, limit: MemoryLimit, reserved: int) -> Problem:
    """Return what one thread with the lowest tiles needs; parts are rounded up, so that a limit of the sum is kept."""
    name, held = least.largest
    parts = {
        "Python and the plan": least.python,
        f"torch ({least.need})": least.torch,
        "buffers": least.buffers,
        "this tensor": held,
        "libraries and trials": least.updates - held,
        "comparing": reserved,
    }
    tenths = {what: -(-count // 10**5) for what, count in parts.items() if count}
    needed = f"{sum(tenths.values()) / 10:.1f} MB"
    found = f"{needed} needed: " + ", ".join(f"{count / 10:.1f} MB for {what}" for what, count in tenths.items())
    expected = f"to merge in {format_bytes(limit.byte_count)} of memory ({limit.origin})"
    return Problem(name, expected, found, _hint(least, limit, needed))


def _hint(least: MemoryForecast, limit: MemoryLimit, needed: str) -> str:
    if least.need.is_trial:
        return (
            f"only the first merge of such shapes needs torch, to learn how it sums: {_allowing(limit, needed)}; or "
            "make it on a machine of the same processors, Python, torch and rawmerge, and copy its "
            f"{FILE_NAME} to {_remembered_at()}"
        )
    way = f"{_allowing(limit, needed)}; that is for one thread already"
    return f"{way}; without --dtype, plain LoRA takes no torch once its shapes are known" if least.need.is_cast else way


def _allowing(limit: MemoryLimit, needed: str) -> str:
    """Return how a limit is raised; never one that the system would go on to enforce."""
    if limit.origin != "--max-memory":
        return f"raise that limit to {needed} or more (--max-memory does not: the system would end the merge there)"
    allowed = group_limit()
    if allowed and allowed.is_hard and allowed.byte_count < float(needed.split()[0]) * 10**6:
        return f"raise {allowed.origin} to {needed} or more first, then give it --max-memory {needed.replace(' ', '')}"
    return f"give it --max-memory {needed.replace(' ', '')} or more"


def _remembered_at() -> str:
    try:
        return str(cache_folder())
    except OSError:
        return "$XDG_CACHE_HOME/rawmerge"


def _check_address_space(forecaster: MemoryForecaster) -> None:
    """Refuse an address space that is too small for torch's libraries alone, whose import would fail in odd ways."""
    space = address_space_limit()
    if space is None or not forecaster.needs_torch:
        return
    least = forecaster.forecast(1, BLOCK_ELEMENTS, 0).peak + _library_bytes()
    if space < least:
        expected = f"at least {format_bytes(least)} of address space, which importing torch takes up"
        hint = "ulimit -v unlimited; --max-memory bounds the memory itself"
        raise MemoryLimitError(Problem("RLIMIT_AS (ulimit -v)", expected, format_bytes(space), hint))


def _library_bytes() -> int:
    """Return the size of torch's libraries, which are mapped whole; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    return sum(path.stat().st_size for folder in folders or () for path in Path(folder, "lib").glob("*.so*"))
