"""One merge timed without start-up: `python -m benchmarks.merge_timer BASE ADAPTER OUTPUT FIGURES [OPTIONS]`.

OPTIONS is JSON, keyword arguments of `rawmerge.merge_adapter`. Python and torch are started and called once before the
clock is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import rawmerge


def wake_libraries() -> None:
    """Make torch and numpy load what they load at their first calls."""
    matrix = torch.rand(64, 64)
    torch.linalg.svd(matrix @ matrix)
    torch.fft.fft2(matrix)
    np.fft.fft(np.ones(8))


def time_merge(base: str, adapter: str, output: str, options: dict[str, object]) -> dict[str, float]:
    """Merge, and return wall and processor seconds; its files are on the disk."""
    wake_libraries()
    started, cpu_started = time.perf_counter(), time.process_time()
    rawmerge.merge_adapter(base, adapter, output, **options)  # type: ignore[arg-type]
    return {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}


def main(base: str, adapter: str, output: str, figures: str, options: str = "{}") -> None:
    """Time one merge, and write what it took to the file `figures`."""
    times = time_merge(base, adapter, output, json.loads(options))
    Path(figures).write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
