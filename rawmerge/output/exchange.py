"""Two directories take each other's name at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

#: Linux, include/uapi/linux/fcntl.h and fs.h.
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def exchange(one: Path, other: Path) -> bool:
    """Let two directories take each other's name at once, where the system can; return whether it did.

    Source: renameat2(2), RENAME_EXCHANGE; Linux 3.15, glibc 2.28.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0
