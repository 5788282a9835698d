"""Where inputs become files: checkpoints around them, and the limits that whatever reads them is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fuzzing import checkpoints, seeds
from fuzzing.limits import Limits
from rawmerge.errors import RawmergeError
from rawmerge.report import error_json, error_text

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"


class WrongError(AssertionError):
    """What must hold does not."""


class Workplace:
    """A folder with checkpoints around the files that inputs become, and the limits that these are held to.

    Attributes:
        root: the folder; base: a tiny Llama in it; tied: one that ties its embeddings; adapter: a LoRA's folder.
        limits: what no input may exceed.
    """

    def __init__(self, root: Path) -> None:
        """Write the checkpoints; `root` must be empty."""
        self.root = root
        self.base = checkpoints.write_base(root / "base")
        self.tied = checkpoints.write_base(root / "tied", tie=True)
        self.adapter = root / "adapter"
        self.limits = Limits(root)
        checkpoints.write_links(self.tied)
        self.set_adapter(seeds.lora_config(), checkpoints.lora_shapes())

    def set_adapter(self, config: bytes | None, tensors: checkpoints.Shapes, name: str = WEIGHTS) -> None:
        """Write an adapter in place of the one before."""
        shutil.rmtree(self.adapter, ignore_errors=True)
        self.adapter.mkdir()
        if config is not None:
            (self.adapter / CONFIG).write_bytes(config)
        checkpoints.write_shard(self.adapter / name, tensors)

    def run(self, size: int, function: Callable[[], Any]) -> Any:
        """Return what a function returns within the limits, None where it refuses in a documented way.

        Raises:
            WrongError: the refusal cannot be shown. Everything that is no refusal.
        """
        try:
            with self.limits.hold(size):
                return function()
        except RawmergeError as error:
            check_text(error_text(error), size)
            json.loads(error_json(error))
            return None


def check_text(text: str, size: int) -> None:
    """Check what a user is shown of an input of `size` bytes.

    Raises:
        WrongError: it could do something to a terminal, or is far longer than the input.
    """
    text.encode()
    if not all(line.isprintable() for line in text.split("\n")):
        raise WrongError(f"not printable: {text[:500]!a}")
    if len(text) > 200_000 + 20 * size:
        raise WrongError(f"a text of {len(text)} characters")
