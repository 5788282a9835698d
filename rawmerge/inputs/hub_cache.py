"""Whether a file belongs to the hub's cache, which other programs share and nothing may be written through.

Source: huggingface_hub's layout, `models--ORG--NAME/snapshots/COMMIT/FILE`, a link to `models--ORG--NAME/blobs/ETAG`,
which in newer versions may itself be a link into a store that several caches share.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_REPO_PREFIX: Final = "models--"
_MAX_LINKS: Final = 40  # as many as Linux follows


def is_in_hub_cache(path: Path) -> bool:
    """Whether the file, or a link on the way to it, lies in a hub cache."""
    at = path.absolute()
    for _ in range(_MAX_LINKS):
        # the folder may be a link as well; the last name is looked at on its own, for what it points to
        at = Path(os.path.realpath(at.parent)) / at.name
        if any(part.startswith(_REPO_PREFIX) for part in at.parts):
            return True
        if not at.is_symlink():
            return False
        at = at.parent / at.readlink()
    return False
