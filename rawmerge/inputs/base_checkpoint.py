"""A base checkpoint on disk: which files count, what their headers say. No tensor is read here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.errors import CheckpointError, MissingFileError, Problem, ProblemCollector
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import ModelConfig, parse_model_config
from rawmerge.formats.weight_map import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SHARD_SUFFIX,
    WeightMap,
    parse_weight_map,
)
from rawmerge.inputs.tensor_source import ShardFile, TensorSource, read_shard_file, read_small_file

SINGLE_NAME: Final = "model.safetensors"
_NUMBERED: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_NOT_BASE: Final = re.compile(r"(adapter_|consolidated)")


@dataclass(frozen=True, slots=True)
class ShardContents:
    """The tensors of one shard, in the order in which they are written again."""

    shard: ShardFile
    tensors: tuple[tuple[str, TensorSource], ...]


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """The base, as its headers and configs describe it.

    Attributes:
        root: the directory, or the file where the base is a single file.
        shards: the shards that count, in the order of their names.
        contents: each shard's tensors.
        tensors: tensor name to its bytes.
        weight_map: the index, None where the base has none.
        index_text: the index's text as it stands, an empty string where the base has none.
        config: `config.json`; empty where the base has none.
    """

    root: Path
    shards: tuple[ShardFile, ...]
    contents: tuple[ShardContents, ...]
    tensors: Mapping[str, TensorSource]
    weight_map: WeightMap | None
    index_text: str
    config: ModelConfig

    @property
    def is_directory(self) -> bool:
        """Whether the base is a directory, with an index, a config and side files of its own."""
        return self.root != self.shards[0].path


def read_base(root: Path, config: ModelConfig | None = None) -> BaseCheckpoint:
    """Return the base at `root`, a directory or one safetensors file.

    Args:
        root: where it lies.
        config: taken in place of its `config.json`, which is not read then.

    Raises:
        MissingFileError: there is no checkpoint at `root`, or a shard is missing.
        CheckpointError: files contradict each other; ShardFormatError: a file breaks the format.
    """
    root = root.parent if root.name in {INDEX_NAME, CONFIG_NAME} else root
    directory = root if root.is_dir() else root.parent
    index_path = directory / INDEX_NAME
    # lexists: a link to nothing is a broken base, not one without an index
    has_index = root.is_dir() and os.path.lexists(index_path)
    index_raw = read_small_file(index_path, MAX_INDEX_BYTES) if has_index else b""
    weight_map = parse_weight_map(index_raw, str(index_path)) if has_index else None
    shards = _read_shards(directory, weight_map.shard_names if weight_map else _unindexed_shards(root))
    if weight_map:
        _check_index(weight_map, shards)
    tensors = _gather_tensors(shards)
    config = config or _read_config(directory / CONFIG_NAME)
    contents = tuple(ShardContents(shard, tuple(shard.sources())) for shard in shards)
    return BaseCheckpoint(root, shards, contents, tensors, weight_map, index_raw.decode(), config)


def _unindexed_shards(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        _refuse_part(root)
        return (root.name,)
    names = sorted(path.name for path in root.iterdir() if path.name.endswith(SHARD_SUFFIX))
    if SINGLE_NAME in names:
        return (SINGLE_NAME,)
    candidates = tuple(name for name in names if not _NOT_BASE.match(name))
    if len(candidates) == 1 and not _NUMBERED.fullmatch(candidates[0]):
        return candidates
    return _complete_set(root, candidates)


def _refuse_part(path: Path) -> None:
    """Refuse one shard of several, or an adapter's file, in place of a base."""
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered and int(numbered["count"]) > 1:
        hint = f"name the folder: {path.parent}"
        raise CheckpointError(Problem(str(path), "a whole base", f"one of {int(numbered['count'])} shards", hint))
    if path.name.startswith("adapter_"):
        hint = "the base comes first, then the adapter"
        raise CheckpointError(Problem(str(path), "a base", "a file of an adapter", hint))


def _complete_set(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match["stem"], match["count"]), []).append(name)
    if len(sets) != 1:
        raise MissingFileError(_no_checkpoint(root, names))
    (_, count), found = sets.popitem()
    if {int(name[-len("00001-of-00001.safetensors") :][:5]) for name in found} != set(range(1, int(count) + 1)):
        problem = Problem(str(root), f"{int(count)} numbered shards", f"{len(found)}: {', '.join(found)[:300]}")
        raise MissingFileError(problem)
    return tuple(found)


def _no_checkpoint(root: Path, names: Iterable[str]) -> Problem:
    found = ", ".join(names)[:300] or _other_formats(root) or "no *.safetensors file"
    hint = "name the folder that holds the base model's safetensors files"
    if (root / "adapter_config.json").exists():
        found, hint = "an adapter", "the base comes first, then the adapter"
    elif nested := _nested_checkpoints(root):
        hint = f"did you mean a folder in it: {', '.join(nested)}"
    return Problem(str(root), f"{INDEX_NAME}, {SINGLE_NAME}, or one complete set of shards", found, hint)


def _nested_checkpoints(root: Path) -> list[str]:
    """Return folders at most two levels down that hold a base, such as a hub cache's snapshots."""
    found = (path.parent for name in (INDEX_NAME, SINGLE_NAME) for path in root.glob(f"*/{name}"))
    deeper = (path.parent for name in (INDEX_NAME, SINGLE_NAME) for path in root.glob(f"*/*/{name}"))
    return sorted({str(path.relative_to(root)) for path in (*found, *deeper)})[:5]


def _other_formats(root: Path) -> str:
    others = sorted(path.name for path in root.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    return f"no *.safetensors file but {', '.join(others)[:200]}; convert it to safetensors first" if others else ""


def _read_shards(directory: Path, names: Iterable[str]) -> tuple[ShardFile, ...]:
    problems = ProblemCollector()
    shards = []
    for name in names:
        with problems.absorb():
            shards.append(read_shard_file(directory / name))
    problems.raise_if_any()
    return tuple(shards)


def _check_index(weight_map: WeightMap, shards: Iterable[ShardFile]) -> None:
    held = {shard.path.name: {entry.name for entry in shard.header.entries} for shard in shards}
    lacking = [
        Problem(name, f"it in {shard}, where the index says it is", "a shard without it", "fetch the base again")
        for name, shard in weight_map.shard_by_tensor.items()
        if name not in held[shard]
    ]
    if lacking:
        raise CheckpointError(*lacking)


def _gather_tensors(shards: Iterable[ShardFile]) -> dict[str, TensorSource]:
    tensors: dict[str, TensorSource] = {}
    problems = []
    for shard in shards:
        for name, source in shard.sources():
            twin = tensors.setdefault(name, source)
            if twin is not source:
                problems.append(Problem(name, "it in one shard", f"it in {twin.path} and {source.path}"))
    if problems:
        raise CheckpointError(*problems)
    return tensors


def _read_config(path: Path) -> ModelConfig:
    return parse_model_config(read_small_file(path), str(path)) if os.path.lexists(path) else ModelConfig("", {})
