"""Runs one command and prints what it cost as JSON: `python -I -S launcher.py LOG COMMAND...`.

A script of its own because Linux counts a process's memory before `exec` into its peak: started from the
harness, every command would seem at least as large as the harness. This one weighs about 10 MB, which is
therefore the smallest peak that can be measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

#: `ru_maxrss` is in KiB on Linux and in bytes on macOS.
MAXRSS_UNIT_BYTES = 1024 if sys.platform == "linux" else 1


#: Our name of a counter to Linux's (proc_pid_io(5)).
COUNTERS = {
    "read_bytes": "read_bytes",
    "written_bytes": "write_bytes",
    "read_call_bytes": "rchar",
    "write_call_bytes": "wchar",
}


def moved_bytes(pid: int) -> dict[str, int | None]:
    """Return the bytes that a zombie and its reaped children moved, None where untold."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return dict.fromkeys(COUNTERS)
    counts = dict(line.split(": ") for line in lines)
    return {name: int(counts[counter]) for name, counter in COUNTERS.items()}


def launch(log: str, command: list[str]) -> dict[str, int | float | None]:
    """Run `command` to its end, its output going to the file `log`, and return its cost."""
    redirect = [
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=redirect)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    wall_seconds = time.perf_counter() - started
    moved = moved_bytes(pid)
    _, status, usage = os.wait4(pid, 0)
    return {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_seconds": wall_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * MAXRSS_UNIT_BYTES,
        **moved,
    }


if __name__ == "__main__":
    print(json.dumps(launch(sys.argv[1], sys.argv[2:])))
