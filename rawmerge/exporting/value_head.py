"""The value head of a reward model, a file beside the adapter that LLaMA-Factory copies into its export.

Source: LLaMA-Factory `train/tuner.py` (`export_model`), `extras/constants.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rawmerge.output.side_files import SideFile

#: In the order in which one is chosen; the second is a pickle, copied as bytes and never opened.
VALUE_HEADS: Final = ("value_head.safetensors", "value_head.bin")


def find_value_head(root: Path) -> SideFile | None:
    """Return the value head that lies beside an adapter, None where there is none.

    Args:
        root: the adapter's directory, or a file in it.
    """
    folder = root if root.is_dir() else root.parent
    found = (folder / name for name in VALUE_HEADS if (folder / name).is_file())
    path = next(found, None)
    return SideFile(path.name, str(path), path.stat().st_size) if path else None
