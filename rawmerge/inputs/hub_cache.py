"""Whether a path belongs to the hub's cache, which other programs share and nothing may be written through.

Source: huggingface_hub's layout, `models--ORG--NAME/snapshots/COMMIT/FILE`, a link to `models--ORG--NAME/blobs/ETAG`,
which in newer versions may itself be a link into a store that several caches share.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_REPO_PREFIXES: Final = ("models--", "datasets--", "spaces--")
_REPO_FOLDERS: Final = ("snapshots", "blobs", "refs")  # a copy that was made flat under a repo's name has none of them
_MAX_LINKS: Final = 40  # as many as Linux follows


def is_in_hub_cache(path: Path) -> bool:
    """Whether the file or folder, or a link on the way to it, lies in a repo of a hub cache; it need not exist."""
    at = path.absolute()
    for _ in range(_MAX_LINKS):
        # the folder may be a link as well; the last name is looked at on its own, for what it points to
        at = Path(os.path.realpath(at.parent)) / at.name
        if any(_is_repo(folder) for folder in (at, *at.parents)):
            return True
        if not at.is_symlink():
            return False
        at = at.parent / at.readlink()
    return False


def _is_repo(folder: Path) -> bool:
    # os.path says no where nothing can be looked at, which Path may say loudly
    return folder.name.startswith(_REPO_PREFIXES) and any(
        os.path.isdir(folder / name)  # noqa: PTH112
        for name in _REPO_FOLDERS
    )
