"""An adapter on disk: its config and header. Tensors are read when their module comes up, not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.errors import MissingFileError, Problem, ProblemCollector
from rawmerge.formats.adapter_config import CONFIG_NAME, AdapterConfig, parse_adapter_config
from rawmerge.tensor_source import ShardFile, TensorSource, read_shard_file, read_small_file

WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as its config and header describe it.

    Attributes:
        root: the directory.
        config: the checked `adapter_config.json`.
        config_text: that file as it stands.
        weights: the file of its tensors.
        tensors: tensor name to its bytes, in file order.
    """

    root: Path
    config: AdapterConfig
    config_text: str
    weights: ShardFile
    tensors: Mapping[str, TensorSource]


def read_adapter(path: Path) -> Adapter:
    """Return the adapter at `path`, a directory or its safetensors file.

    Raises:
        MissingFileError: a file of the adapter is missing.
        AdapterError: the config is malformed, or (UnsupportedAdapterError) asks for what rawmerge does not merge.
        ShardFormatError: the tensor file breaks the format.
    """
    path = path.parent if path.name == CONFIG_NAME else path
    root, weights_path = (path, path / WEIGHTS_NAME) if path.is_dir() else (path.parent, path)
    problems = ProblemCollector()
    with problems.absorb():
        raw = _read_config(root)
        config = parse_adapter_config(raw, str(root / CONFIG_NAME))
    with problems.absorb():
        weights = _read_weights(weights_path)
    problems.raise_if_any()
    return Adapter(root, config, raw.decode(), weights, dict(weights.sources()))


def _read_config(root: Path) -> bytes:
    path = root / CONFIG_NAME
    if path.is_file():
        return read_small_file(path)
    nested = sorted(child.parent.name for child in root.glob(f"*/{CONFIG_NAME}"))[:10]
    hint = f"did you mean a folder in it: {', '.join(nested)}" if nested else "name the folder of a PEFT adapter"
    raise MissingFileError(Problem(str(root), f"an {CONFIG_NAME} in it", "none", hint))


def _read_weights(path: Path) -> ShardFile:
    if path.exists():
        return read_shard_file(path)
    has_pickle = (path.parent / PICKLE_NAME).exists()
    found = f"only {PICKLE_NAME}, a pickle, which is not read" if has_pickle else "none"
    hint = "save it again with safe_serialization=True" if has_pickle else "name the folder of a PEFT adapter"
    raise MissingFileError(Problem(str(path.parent), f"an {path.name} in it", found, hint))
