"""`rawmerge`, and `python -m rawmerge`."""

from __future__ import annotations

import gc
import sys
from typing import NoReturn

from rawmerge.signals import Ended, end_by_signals


def main() -> NoReturn:
    """Run the command line, and end the process.

    What a start imports stays: the collector would look through it time and again. A merge puts it on again.
    """
    gc.disable()
    end_by_signals()
    try:
        from rawmerge.cli import main as run
    except Ended as error:
        sys.stderr.write("rawmerge: interrupted; nothing was published\n")
        sys.exit(error.exit_code)
    run()


if __name__ == "__main__":
    main()
