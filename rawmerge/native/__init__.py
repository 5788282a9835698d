"""The compiled kernel: tiles of plain LoRA merged in one pass, without torch.

It is optional: where it was not compiled, or the processor lacks AVX2, everything is computed by torch. A product's
elements are chains of fused multiply-adds in blocks of the summed dimension. That is how torch's own library sums
them on the processors it was measured on; `rawmerge.computing.calibration` finds the block, or that there is none.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Final

try:
    from rawmerge.native import _kernel as _compiled
except ImportError:  # not compiled: no compiler at installation, or another system
    _compiled = None  # type: ignore[assignment]

#: Storage dtypes that it reads and writes, and its numbers for them.
DTYPE_CODES: Final = {"BF16": 0, "F16": 1, "F32": 2}
#: Columns of a packed right factor that lie together; the last panel is padded.
PANEL: Final = 64


def kernel() -> ModuleType | None:
    """Return the compiled module where it works on this processor."""
    return _compiled if _compiled is not None and _compiled.LEVEL else None


def library_path() -> Path | None:
    """Return the file of the compiled module, where there is one."""
    return Path(_compiled.__file__) if _compiled is not None and _compiled.__file__ else None
