"""What a command costs as a whole process: `python -m benchmarks.measure COMMAND...`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

LAUNCHER: Final = Path(__file__).with_name("launcher.py")
LOG_TAIL_CHARACTERS: Final = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run took.

    Attributes:
        wall_seconds: from start to exit.
        cpu_seconds: user and system time, children included.
        peak_rss_bytes: resident peak of the largest single process, children included; about 10 MB at least.
        read_bytes: bytes fetched from storage, so zero when the page cache had them; None where untold.
        written_bytes: bytes handed to storage; None where untold.
        read_call_bytes: bytes asked for by read, copy and send calls, cached or not, start-up included, and without
            what is read through a memory map; None where untold.
        write_call_bytes: bytes passed to write, copy and send calls; None where untold.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    read_bytes: int | None
    written_bytes: int | None
    read_call_bytes: int | None = None
    write_call_bytes: int | None = None


class CommandError(Exception):
    """A measured command failed; its figures mean nothing."""

    def __init__(self, command: Sequence[str], exit_code: int, output: str) -> None:
        super().__init__(command, exit_code, output)
        self.command = command
        self.exit_code = exit_code
        self.output = output

    def __str__(self) -> str:
        return f"exit code {self.exit_code} from {' '.join(self.command)}\n{self.output}"


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run `command` to its end and return what it cost.

    Args:
        command: program and arguments, without a shell.
        environment: variables to set besides the current ones.

    Raises:
        CommandError: the command could not be started or did not exit with 0; holds the end of its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        launch = [sys.executable, "-I", "-S", str(LAUNCHER), str(log), *command]
        launched = subprocess.run(
            launch, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
        )
        if launched.returncode:
            raise CommandError(command, launched.returncode, launched.stderr)
        figures = json.loads(launched.stdout)
        exit_code = figures.pop("exit_code")
        if exit_code:
            raise CommandError(command, exit_code, log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:])
    return Cost(**figures)


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Return the median of each figure, taken for itself."""
    return Cost(
        wall_seconds=statistics.median(cost.wall_seconds for cost in costs),
        cpu_seconds=statistics.median(cost.cpu_seconds for cost in costs),
        peak_rss_bytes=round(statistics.median(cost.peak_rss_bytes for cost in costs)),
        read_bytes=_median_if_told([cost.read_bytes for cost in costs]),
        written_bytes=_median_if_told([cost.written_bytes for cost in costs]),
        read_call_bytes=_median_if_told([cost.read_call_bytes for cost in costs]),
        write_call_bytes=_median_if_told([cost.write_call_bytes for cost in costs]),
    )


def median_ratio(costs: Sequence[Cost], references: Sequence[Cost]) -> float:
    """Return the median of wall time over the reference's wall time, pair by pair.

    Pairs come from the same round, so a machine that is slow for a while is slow for both.
    """
    pairs = zip(costs, references, strict=True)
    return statistics.median(cost.wall_seconds / reference.wall_seconds for cost, reference in pairs)


def _median_if_told(counts: Sequence[int | None]) -> int | None:
    told = [count for count in counts if count is not None]
    return round(statistics.median(told)) if told else None


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1:])), indent=2))
