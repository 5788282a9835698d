"""Models loaded once per checkpoint: what tests change are copies."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

#: How many models are kept; the ones used longest ago go first.
KEPT_MODELS: Final = 8


class ModelCache:
    """Loaded models by the bytes of their checkpoints. A copy takes a fifth of the time of loading, or less."""

    def __init__(self) -> None:
        self._models: OrderedDict[tuple[bytes, str], tuple[Path, torch.nn.Module]] = OrderedDict()

    def load(self, folder: Path, auto: str, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Return a copy of what `load` returns, or did for the same bytes; torch's random state stays.

        Args:
            folder: the checkpoint.
            auto: the class that loads it.
            load: loads the checkpoint.
        """
        key = (_content_digest(folder), auto)
        if key not in self._models:
            with torch.random.fork_rng(devices=[]):
                # a copy: what is loaded maps files, which a test may overwrite
                self._models[key] = folder, copy.deepcopy(load())
            if len(self._models) > KEPT_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        source, model = self._models[key]
        return _moved(copy.deepcopy(model), source, folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _content_digest(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for path in _files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.digest()


def _moved(model: torch.nn.Module, source: Path, folder: Path) -> torch.nn.Module:
    """Say of the model that it was loaded from `folder`, as PEFT notes it in the adapter's config."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            if getattr(owner, "name_or_path", None) == str(source):
                setattr(owner, "name_or_path", str(folder))  # noqa: B010  # no module's type has it
    return model
