"""The files of a base beside its weights: which are copied, which are left out, and why.

Second weight sets must not be copied: they hold the base without the adapter, and some loaders prefer them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_WEIGHT_SUFFIXES: Final = frozenset(
    [
        ".safetensors",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".ot",
        ".tflite",
        ".pt",
        ".pth",
        ".ckpt",
        ".nemo",
        ".mlmodel",
    ]
)
_WEIGHT_NAMES: Final = re.compile(
    r"(pytorch_model|model|consolidated|adapter_model|tf_model|flax_model|optimizer|scheduler|training_args|"
    r"diffusion_pytorch_model|openvino_model|ggml).*\.(bin|bin\.index\.json)|.*\.safetensors\.index\.json|"
    r".*(h5|msgpack)\.index\.json"
)
#: Weights in a sub-folder are a small layer's at most; what is larger is a second set.
MAX_NESTED_WEIGHT_BYTES: Final = 64 * 2**20
_SKIPPED_FOLDERS: Final = {
    "original": "a second set of weights",
    "onnx": "a second set of weights",
    "openvino": "a second set of weights",
    "__pycache__": "compiled Python",
}
_TRAINING_CHECKPOINT: Final = re.compile(r"(checkpoint|global_step)-?\d+")
_ADAPTER_FILE: Final = re.compile(r"adapter_(config\.json|model\..*)")


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is copied byte for byte.

    Attributes:
        name: its path in the output, with `/` between folders.
        path: where it is read from.
        byte_count: its size.
    """

    name: str
    path: str
    byte_count: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder of the base that the output does not have, and the reason."""

    name: str
    reason: str


def list_side_files(root: Path, own_names: Collection[str]) -> tuple[tuple[SideFile, ...], tuple[LeftOut, ...]]:
    """Return what is copied and what is left out, both sorted by name.

    Args:
        root: the base's directory.
        own_names: files at its top that the merge writes itself (shards, index, config, record).
    """
    found = sorted(_walk(root, PurePosixPath()), key=lambda item: item.name)
    kept = tuple(item for item in found if isinstance(item, SideFile) and item.name not in own_names)
    return kept, tuple(item for item in found if isinstance(item, LeftOut) and item.name not in own_names)


def left_out_reason(name: str, byte_count: int) -> str:
    """Say why a file of a base is no side file, in an empty string for one that is.

    Args:
        name: its path in the base, with `/` between folders.
        byte_count: its size.
    """
    path = PurePosixPath(name)
    reasons = (reason for folder in path.parts[:-1] if (reason := _folder_reason(folder)))
    return next(reasons, "") or _file_reason(path, byte_count)


def _walk(root: Path, folder: PurePosixPath) -> Iterator[SideFile | LeftOut]:
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                reason = _folder_reason(entry.name)
                yield from [LeftOut(f"{name}/", reason)] if reason else _walk(root, name)
            else:
                yield _judge(entry, str(name))


def _judge(entry: os.DirEntry[str], name: str) -> SideFile | LeftOut:
    if not _is_regular(entry):
        return LeftOut(name, "no regular file, or a link to a folder or to nothing")
    byte_count = entry.stat().st_size
    reason = left_out_reason(name, byte_count)
    return LeftOut(name, reason) if reason else SideFile(name, entry.path, byte_count)


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # follows links: hub caches hold links to regular files
    except OSError:  # a link that leads back to itself
        return False


def _folder_reason(name: str) -> str:
    if _TRAINING_CHECKPOINT.fullmatch(name):
        return "a checkpoint of its training"
    if name.startswith("."):  # version control, download caches, editors; and `..` in a hub's listing
        return "a hidden folder"
    return _SKIPPED_FOLDERS.get(name, "")


def _file_reason(path: PurePosixPath, byte_count: int) -> str:
    if _ADAPTER_FILE.fullmatch(path.name):
        return "an adapter's file; loaders would apply it again"
    suffix = path.suffix.lower()
    if suffix not in _WEIGHT_SUFFIXES and not _WEIGHT_NAMES.fullmatch(path.name):
        return ""
    if len(path.parts) == 1:
        return "weights that the merge does not touch, or a pickle"
    # a sub-folder may hold the weights of a pooling or projection layer, which loaders need
    is_second_set = byte_count > MAX_NESTED_WEIGHT_BYTES or suffix in {".gguf", ".ggml"}
    return "a second set of weights" if is_second_set else ""
