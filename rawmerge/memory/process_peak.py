"""The largest resident memory that this process has had, as the system counts it."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: A process that was so little larger than it is now has not been large before, within what can be told.
_SLACK: Final = 8 * 2**20


@dataclass(frozen=True, slots=True)
class PeakMeter:
    """What a process had taken when a piece of work began, in bytes.

    Attributes:
        peak: its largest resident memory until then; resident: what it was then. 0 where the system does not tell.
    """

    peak: int
    resident: int

    def work_peak(self) -> int | None:
        """Return the process's peak where it is the work's; None where it was larger before, or nothing tells it."""
        now = start_meter()
        was_large = self.peak > self.resident + _SLACK
        return None if now.peak == 0 or (was_large and now.peak <= self.peak) else now.peak


def start_meter() -> PeakMeter:
    """Return what the process has taken until now.

    Linux tells it in `/proc/self/status` (VmHWM, VmRSS), of this program alone; getrusage(2), which other systems
    have, counts the peak of the program that started this one as well.
    """
    facts: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "VmRSS"):
                facts[name] = int(value.split()[0]) * 1024
    if "VmHWM" in facts:
        return PeakMeter(facts["VmHWM"], facts.get("VmRSS", 0))
    peak = _usage_peak()
    return PeakMeter(peak, peak)


def _usage_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
