"""The progress bar of the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rawmerge.engine.jobs import Progress
from rawmerge.errors import printable


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[Progress], None] | None]:
    """Yield a callback that draws a bar on a terminal; None where stderr is none."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # some terminals, such as those that record a session, say that they have no columns or lines: tqdm draws nothing
    columns, lines = os.get_terminal_size(sys.stderr.fileno())
    size: dict[str, Any] = (
        {"dynamic_ncols": True} if columns and lines else {"ncols": columns or 80, "nrows": lines or 24}
    )
    with tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False, **size) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total_bytes
            bar.set_description_str(printable(progress.tensor_name[-48:]), refresh=False)
            bar.update(progress.done_bytes - bar.n)

        yield show
