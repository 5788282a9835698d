"""An adapter on disk: its config and header. Tensors are read when their module comes up, not here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.errors import MissingFileError, Problem, ProblemCollector, RefusedError
from rawmerge.formats.adapter_config import CONFIG_NAME, AdapterConfig, parse_adapter_config
from rawmerge.formats.foreign_adapters import ALPHA_SUFFIX, is_kohya, is_mlx, kohya_config, mlx_config, parse_alpha
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.formats.weight_map import SHARD_SUFFIX
from rawmerge.inputs.tensor_source import (
    OpenFiles,
    ShardFile,
    TensorFile,
    TensorSource,
    read_pickle_file,
    read_shard_file,
    read_small_file,
)
from rawmerge.methods import KIND_FIELDS
from rawmerge.methods.refused import REFUSED_KINDS

WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"
MLX_NAME: Final = "adapters.safetensors"
PICKLE_SUFFIX: Final = ".bin"
_PICKLE_NOTE: Final = "is a pickle: its table of tensors was read, and nothing in it was run"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as its config and header describe it.

    Attributes:
        root: the directory.
        config: the checked `adapter_config.json`, or what other trainers have in its place.
        config_text: that file as it stands, empty where there is none.
        weights: the file of its tensors.
        tensors: tensor name to its bytes, in file order.
        notes: what a user may want to know of the files.
    """

    root: Path
    config: AdapterConfig
    config_text: str
    weights: TensorFile
    tensors: Mapping[str, TensorSource]
    notes: tuple[str, ...] = ()


def is_adapter(path: Path) -> bool:
    """Return whether a directory or file is an adapter's, by its names; it may be unfit for a merge."""
    root = path if path.is_dir() else path.parent
    has_config = (root / CONFIG_NAME).is_file()
    known = path.name in {CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME} or path.name.endswith(MLX_NAME)
    if has_config and (path.is_dir() or known):
        return True
    try:
        return _bare_weights(path, has_config) is not None
    except RefusedError:
        return False


def read_adapter(path: Path) -> Adapter:
    """Return the adapter at `path`, a directory or its tensor file: PEFT's, MLX's, or a single file in kohya's format.

    A pickle is read where there is no safetensors file beside it, or where it is named.

    Raises:
        MissingFileError: a file of the adapter is missing.
        AdapterError: the config is malformed, or (UnsupportedAdapterError) asks for what rawmerge does not merge; or a
            pickle holds more than tensors.
        ShardFormatError: the tensor file breaks the format.
    """
    path = path.parent if path.name == CONFIG_NAME else path
    root = path if path.is_dir() else path.parent
    if bare := _bare_weights(path, (root / CONFIG_NAME).is_file()):
        return _adapter(root, kohya_config(_read_alphas(bare)), "", bare)
    problems = ProblemCollector()
    is_of_mlx = False
    with problems.absorb():
        raw = _read_config(root)
        fields = _table(raw)
        is_of_mlx = is_mlx(fields)
        config = mlx_config(fields, str(root / CONFIG_NAME)) if is_of_mlx else _parse_config(raw, root)
    with problems.absorb():
        weights = read_weights(_weights_path(path, is_of_mlx))
    problems.raise_if_any()
    return _adapter(root, config, raw.decode(), weights)


def read_weights(path: Path) -> TensorFile:
    """Return the checked header of an adapter's tensor file; no tensor is read.

    Raises:
        MissingFileError, ShardFormatError, AdapterError: as `read_adapter`.
    """
    if path.name.endswith(PICKLE_SUFFIX):
        return read_pickle_file(path)
    if path.exists():
        return read_shard_file(path)
    raise MissingFileError(
        Problem(str(path.parent), f"an {path.name} in it", "none", "name the folder of a PEFT adapter")
    )


def _adapter(root: Path, config: AdapterConfig, text: str, weights: TensorFile) -> Adapter:
    notes = (f"{weights.path.name} {_PICKLE_NOTE}",) if weights.path.name.endswith(PICKLE_SUFFIX) else ()
    return Adapter(root, config, text, weights, dict(weights.sources()), notes)


def _parse_config(raw: bytes, root: Path) -> AdapterConfig:
    return parse_adapter_config(raw, str(root / CONFIG_NAME), KIND_FIELDS, REFUSED_KINDS)


def _table(raw: bytes) -> Mapping[str, object]:
    """Return a config's fields; of one that is malformed, none: whoever parses it says why."""
    try:
        return parse_json_object(raw)
    except StrictJsonError:
        return {}


def _weights_path(path: Path, is_of_mlx: bool) -> Path:
    """Return the tensor file that stands beside a config, or is named."""
    if not path.is_dir():
        return path
    names = (MLX_NAME,) if is_of_mlx else (WEIGHTS_NAME, PICKLE_NAME)
    return next((path / name for name in names if (path / name).exists()), path / names[0])


def _bare_weights(path: Path, has_config: bool) -> ShardFile | None:
    """Return the file of an adapter that is one file without a config; None where there is no such adapter.

    Raises:
        MissingFileError: a directory holds several; MissingFileError, ShardFormatError: a named file cannot be read.
    """
    if path.is_dir():
        candidates = [] if has_config else sorted(path.glob(f"*{SHARD_SUFFIX}"))
        found = [shard for one in candidates if (shard := _kohya_file(one))]
    elif path.name.endswith(SHARD_SUFFIX):
        if not has_config:
            read_shard_file(path)  # says what is wrong with it
        found = [shard] if (shard := _kohya_file(path)) else []
    else:
        found = []
    if len(found) > 1:
        listed = ", ".join(shard.path.name for shard in found[:10])
        raise MissingFileError(Problem(str(path), "one adapter", f"{len(found)}: {listed}", "name the file"))
    return found[0] if found else None


def _kohya_file(path: Path) -> ShardFile | None:
    """Return the header of a file whose names are kohya's; None for every other file, a broken one included."""
    try:
        shard = read_shard_file(path)
    except RefusedError:
        return None
    return shard if is_kohya(entry.name for entry in shard.header.entries) else None


def _read_alphas(weights: ShardFile) -> dict[str, float]:
    """Return the scalar of each module: the only tensors that are read for a plan, a few bytes each."""
    with OpenFiles() as files:
        return {
            name.removesuffix(ALPHA_SUFFIX): parse_alpha(name, _read(files, source), source.dtype, source.shape)
            for name, source in _alphas(weights)
        }


def _alphas(weights: ShardFile) -> Iterable[tuple[str, TensorSource]]:
    return ((name, source) for name, source in weights.sources() if name.endswith(ALPHA_SUFFIX))


def _read(files: OpenFiles, source: TensorSource) -> bytes:
    buffer = bytearray(min(source.byte_count, 8))  # a larger one is refused for its shape
    files.read_into(source.path, source.offset, memoryview(buffer))
    return bytes(buffer)


def _read_config(root: Path) -> bytes:
    path = root / CONFIG_NAME
    if path.is_file():
        return read_small_file(path)
    nested = sorted(child.parent.name for child in root.glob(f"*/{CONFIG_NAME}"))[:10]
    hint = f"did you mean a folder in it: {', '.join(nested)}" if nested else "name the folder of a PEFT adapter"
    raise MissingFileError(Problem(str(root), f"an {CONFIG_NAME} in it", "none", hint))
