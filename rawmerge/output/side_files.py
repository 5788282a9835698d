"""The files of a base beside its weights: which are copied, which are left out, and why.

Second weight sets must not be copied: they hold the base without the adapter, and some loaders prefer them.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from rawmerge.errors import AdapterError, MissingFileError, Problem
from rawmerge.formats.card_metadata import CARD_NAME
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

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
#: What would be wrong of the output's files.
CHECKSUM_FILES: Final = frozenset({"SHA256SUMS", "SHA512SUMS", "MD5SUMS", "SHA256SUMS.txt", "checksums.sha256"})
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
MAX_TOKENIZER_CONFIG_BYTES: Final = 64 * 2**20
#: Files that hold a vocabulary. Source: transformers 5.23, `VOCAB_FILES_NAMES` of its tokenizers.
_VOCABULARY: Final = re.compile(
    r"tokenizer\.(json|model)(\.v\d+)?|tekken\.json|vocab\.(json|txt|bpe)|merges\.txt|bpe\.codes|dict\.txt|emoji\.json|"
    r"(spiece|spm|sentencepiece|sentencepiece\.bpe)\.model|(source|target)\.spm|.*\.tiktoken"
)
_TOKENS: Final = frozenset({TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"})
_TEMPLATE: Final = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja")
TEMPLATE_FOLDER: Final = "additional_chat_templates"


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


def apart_from(files: Iterable[SideFile], names: Collection[str]) -> tuple[tuple[SideFile, ...], tuple[LeftOut, ...]]:
    """Return the files that an output with these files at its top can have, and what it cannot: such names, or below.

    Args:
        files: side files.
        names: of files at the output's top.
    """
    kept, gone = [], {}
    for file in files:
        top, *below = file.name.split("/")
        if top in names:
            shown = f"{top}/" if below else top
            gone[shown] = LeftOut(shown, "the output has a file of its own by this name")
        else:
            kept.append(file)
    return tuple(kept), tuple(gone.values())


def list_tokenizer_files(root: Path) -> tuple[SideFile, ...]:
    """Return the files of a tokenizer and its chat templates that lie in a directory, sorted by name.

    Code (`*.py`) is none of them, nor are the files of image and audio processors: an adapter that was trained on a
    vision-language base holds copies of the base's at most.

    Args:
        root: an adapter's directory, or a base's.
    """
    found = []
    for folder in (PurePosixPath(), PurePosixPath(TEMPLATE_FOLDER)):
        if (root / folder).is_dir():
            with os.scandir(root / folder) as entries:
                items = (_judge(entry, str(folder / entry.name)) for entry in entries)
                found += [item for item in items if isinstance(item, SideFile) and is_of_tokenizer(item.name)]
    return tuple(sorted(found, key=lambda file: file.name))


def differing_tokenizer_files(base_files: Iterable[SideFile], adapter_files: Iterable[SideFile]) -> tuple[str, ...]:
    """Return the names of the adapter's tokenizer files that the base lacks or has with other bytes, sorted.

    Raises:
        MissingFileError: a file cannot be read.
    """
    base = {file.name: file for file in base_files}
    return tuple(sorted(file.name for file in adapter_files if not _is_same(base.get(file.name), file)))


def override_side_files(
    base_files: Iterable[SideFile], adapter_files: Iterable[SideFile]
) -> tuple[tuple[SideFile, ...], tuple[LeftOut, ...]]:
    """Return the output's side files where the adapter's tokenizer wins, and the base's files that give way.

    A file of the adapter takes the place of the base's of its name. Two tokenizers are never mixed: where the adapter
    brings a vocabulary, all of the base's tokenizer goes, for loaders would prefer its `tokenizer.json` to a
    `tokenizer.model` of the adapter, or add its tokens. Where the adapter brings a chat template, in a file or in its
    `tokenizer_config.json`, the base's template files go, for loaders prefer `chat_template.jinja` to the config.

    Args:
        base_files: all side files of the base.
        adapter_files: from `list_tokenizer_files` of the adapter.

    Raises:
        AdapterError: the adapter's `tokenizer_config.json` is no strict JSON, so that its template is not known.
        MissingFileError: that file cannot be read.

    Source: transformers 5.23 `tokenization_utils_base.py` (`from_pretrained`, `_from_pretrained`).
    """
    wins = {file.name: file for file in adapter_files}
    has_vocabulary = any(_VOCABULARY.fullmatch(name) for name in wins)
    has_template = any(_TEMPLATE.fullmatch(name) or _holds_template(file) for name, file in wins.items())
    kept, gone = [], []
    for file in base_files:
        if file.name in wins:
            continue
        if has_template and _TEMPLATE.fullmatch(file.name):
            gone.append(LeftOut(file.name, "the adapter's chat template takes its place"))
        elif has_vocabulary and (file.name in _TOKENS or _VOCABULARY.fullmatch(file.name)):
            gone.append(LeftOut(file.name, "the adapter's tokenizer takes its place"))
        else:
            kept.append(file)
    return tuple(sorted([*kept, *wins.values()], key=lambda file: file.name)), tuple(gone)


def loses_template(base_files: Iterable[SideFile], kept: Iterable[SideFile]) -> bool:
    """Whether the base has a chat template, and the output of the adapter's tokenizer has none.

    Args:
        base_files: all side files of the base.
        kept: from `override_side_files`.

    Raises:
        AdapterError, MissingFileError: as `override_side_files`.
    """
    has_one = [
        any(_TEMPLATE.fullmatch(file.name) or _holds_template(file) for file in files) for files in (base_files, kept)
    ]
    return has_one[0] and not has_one[1]


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


def is_of_tokenizer(name: str) -> bool:
    """Whether a path in a directory, with `/` between folders, is a tokenizer's file or a chat template."""
    return name in _TOKENS or bool(_VOCABULARY.fullmatch(name) or _TEMPLATE.fullmatch(name))


def is_beside_adapter(name: str) -> bool:
    """Whether a path in an adapter's repo is read for a plan beside its config and weights."""
    return name == CARD_NAME or is_of_tokenizer(name)


def _is_same(base: SideFile | None, other: SideFile) -> bool:
    if base is None or base.byte_count != other.byte_count:
        return False
    try:
        return filecmp.cmp(base.path, other.path, shallow=False)
    except OSError as error:
        raise MissingFileError(_unreadable(other, error)) from error


def _holds_template(file: SideFile) -> bool:
    """Whether this is a tokenizer config with a chat template in it."""
    if file.name != TOKENIZER_CONFIG:
        return False
    expected = f"a tokenizer config of strict JSON, at most {MAX_TOKENIZER_CONFIG_BYTES} bytes"
    if file.byte_count > MAX_TOKENIZER_CONFIG_BYTES:
        raise AdapterError(Problem(file.path, expected, f"{file.byte_count} bytes"))
    try:
        return bool(parse_json_object(Path(file.path).read_bytes(), allows_infinity=True).get("chat_template"))
    except StrictJsonError as error:
        raise AdapterError(Problem(file.path, expected, str(error))) from error
    except OSError as error:
        raise MissingFileError(_unreadable(file, error)) from error


def _unreadable(file: SideFile, error: OSError) -> Problem:
    return Problem(str(error.filename or file.path), "a readable file", error.strerror or str(error))


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
    if path.name in CHECKSUM_FILES:
        return "checksums of the base's files"
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
