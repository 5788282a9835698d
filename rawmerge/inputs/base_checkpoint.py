"""A base checkpoint on disk: which files count, what their headers say. No tensor is read here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from rawmerge.dtypes import DTYPES
from rawmerge.errors import AdapterError, CheckpointError, MissingFileError, Problem, ProblemCollector
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import ModelConfig, parse_model_config
from rawmerge.formats.shard_header import ShardHeader, TensorEntry, format_shard_header
from rawmerge.formats.shard_names import NUMBERED_SHARD, PICKLE_NAME, PICKLED_SHARD, is_pickle, output_name
from rawmerge.formats.shard_names import SINGLE_NAME as SINGLE_NAME  # others take it from here
from rawmerge.formats.weight_map import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PICKLE_INDEX_NAME,
    PICKLE_SUFFIX,
    SHARD_SUFFIX,
    WeightMap,
    format_weight_map,
    parse_weight_map,
)
from rawmerge.inputs.tensor_source import (
    PickleFile,
    ShardFile,
    TensorSource,
    read_pickle_file,
    read_shard_file,
    read_small_file,
)

#: What transformers writes into every safetensors file.
_METADATA: Final = {"format": "pt"}
_NOT_BASE: Final = re.compile(r"(adapter_|consolidated)")


@dataclass(frozen=True, slots=True)
class PickledShard:
    """One file of `torch.save`, as the safetensors file that it becomes.

    Attributes:
        file: what its pickle lists, of which nothing was run.
    """

    file: PickleFile

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.file.size

    @property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and places of all tensors."""
        return self.file.digest

    @property
    def header(self) -> ShardHeader:
        """The header of the file that it becomes, with the metadata that transformers writes."""
        entries, start = [], 0
        for name, source in self.sources():
            entries.append(TensorEntry(name, source.dtype, source.shape, start, start + source.byte_count))
            start += source.byte_count
        return ShardHeader(format_shard_header(entries, _METADATA), tuple(entries), _METADATA)

    def sources(self) -> Iterable[tuple[str, TensorSource]]:
        """Yield (tensor name, where it lies), large elements first, so that each keeps to a multiple of its size."""
        return sorted(self.file.sources(), key=lambda named: -DTYPES[named[1].dtype].bits)


BaseShard: TypeAlias = ShardFile | PickledShard


@dataclass(frozen=True, slots=True)
class ShardContents:
    """The tensors of one shard, in the order in which they are written again."""

    shard: BaseShard
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
    shards: tuple[BaseShard, ...]
    contents: tuple[ShardContents, ...]
    tensors: Mapping[str, TensorSource]
    weight_map: WeightMap | None
    index_text: str
    config: ModelConfig

    @property
    def is_directory(self) -> bool:
        """Whether the base is a directory, with an index, a config and side files of its own."""
        return self.root != self.shards[0].path

    @property
    def index_name(self) -> str:
        """What its index is called, or would be."""
        return PICKLE_INDEX_NAME if is_pickle(self.shards[0].path.name) else INDEX_NAME


def read_base(root: Path, config: ModelConfig | None = None) -> BaseCheckpoint:
    """Return the base at `root`, a directory or one file: safetensors, or what `torch.save` wrote.

    Pickles are read where a directory has no safetensors, or where one is named.

    Args:
        root: where it lies.
        config: taken in place of its `config.json`, which is not read then.

    Raises:
        MissingFileError: there is no checkpoint at `root`, or a shard is missing.
        CheckpointError: files contradict each other; ShardFormatError: a file breaks the format.
    """
    root = root.parent if root.name in {INDEX_NAME, PICKLE_INDEX_NAME, CONFIG_NAME} else root
    directory = root if root.is_dir() else root.parent
    text, weight_map = _read_index(root)
    shards = _read_shards(directory, weight_map.shard_names if weight_map else _unindexed_shards(root))
    if weight_map:
        _check_index(weight_map, shards)
        text, weight_map = _as_written(text, weight_map)
    tensors = _gather_tensors(shards)
    config = config or _read_config(directory / CONFIG_NAME)
    contents = tuple(ShardContents(shard, tuple(shard.sources())) for shard in shards)
    return BaseCheckpoint(root, shards, contents, tensors, weight_map, text, config)


def read_base_file(path: Path) -> BaseShard:
    """Return what one file of a base holds; no tensor is read.

    Raises:
        MissingFileError: it cannot be opened. CheckpointError, ShardFormatError: it holds, or asks for, anything but
            tensors, or breaks its format.
    """
    if path.suffix != PICKLE_SUFFIX:
        return read_shard_file(path)
    try:
        return PickledShard(read_pickle_file(path))
    except AdapterError as error:
        of_base = (replace(each, hint=each.hint.replace("with PEFT", "with transformers")) for each in error.problems)
        raise CheckpointError(*of_base) from error


def _read_index(root: Path) -> tuple[str, WeightMap | None]:
    """Return the index of a directory, as text and checked; an empty text and None without one."""
    # lexists: a link to nothing is a broken base, not one without an index
    indexes = [root / name for name in (INDEX_NAME, PICKLE_INDEX_NAME) if os.path.lexists(root / name)]
    if not root.is_dir() or not indexes or (indexes[0].name == PICKLE_INDEX_NAME and _safetensors_names(root)):
        return "", None
    raw = read_small_file(indexes[0], MAX_INDEX_BYTES)
    suffix = SHARD_SUFFIX if indexes[0].name == INDEX_NAME else PICKLE_SUFFIX
    weight_map = parse_weight_map(raw, str(indexes[0]), suffix)
    return raw.decode(), weight_map


def _as_written(text: str, weight_map: WeightMap) -> tuple[str, WeightMap]:
    """Return an index with the names of what its files become."""
    named = {tensor: output_name(shard) for tensor, shard in weight_map.shard_by_tensor.items()}
    if named == weight_map.shard_by_tensor:
        return text, weight_map
    renamed = WeightMap(named, weight_map.metadata)
    return format_weight_map(renamed), renamed


def _safetensors_names(root: Path) -> list[str]:
    """Return the safetensors files of a directory that may be a base's."""
    names = sorted(path.name for path in root.iterdir() if path.name.endswith(SHARD_SUFFIX))
    return [name for name in names if not _NOT_BASE.match(name)]


def _unindexed_shards(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        _refuse_part(root)
        return (root.name,)
    candidates = tuple(_safetensors_names(root) or _pickle_names(root))
    for single in (SINGLE_NAME, PICKLE_NAME):
        if single in candidates:
            return (single,)
    if len(candidates) == 1 and not NUMBERED_SHARD.fullmatch(candidates[0]):
        return candidates
    return _complete_set(root, candidates)


def _pickle_names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if PICKLED_SHARD.fullmatch(path.name))


def _refuse_part(path: Path) -> None:
    """Refuse one shard of several, or an adapter's file, in place of a base."""
    numbered = NUMBERED_SHARD.fullmatch(path.name)
    if numbered and int(numbered["count"]) > 1:
        hint = f"name the folder: {path.parent}"
        raise CheckpointError(Problem(str(path), "a whole base", f"one of {int(numbered['count'])} shards", hint))
    if path.name.startswith("adapter_"):
        hint = "the base comes first, then the adapter"
        raise CheckpointError(Problem(str(path), "a base", "a file of an adapter", hint))


def _complete_set(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    sets: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := NUMBERED_SHARD.fullmatch(name):
            sets.setdefault((match["stem"], match["count"]), []).append(name)
    if len(sets) != 1:
        raise MissingFileError(_no_checkpoint(root, names))
    (_, count), found = sets.popitem()
    numbers = {int(match["number"]) for name in found if (match := NUMBERED_SHARD.fullmatch(name))}
    if numbers != set(range(1, int(count) + 1)):
        problem = Problem(str(root), f"{int(count)} numbered shards", f"{len(found)}: {', '.join(found)[:300]}")
        raise MissingFileError(problem)
    return tuple(found)


def _no_checkpoint(root: Path, names: Iterable[str]) -> Problem:
    found = ", ".join(names)[:300] or _other_formats(root) or "no *.safetensors file"
    hint = "name the folder that holds the base model's files"
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
    others = sorted(path.name for path in root.iterdir() if path.suffix in {PICKLE_SUFFIX, ".pt", ".pth", ".gguf"})
    return f"no *.safetensors file but {', '.join(others)[:200]}; convert it to safetensors first" if others else ""


def _read_shards(directory: Path, names: Iterable[str]) -> tuple[BaseShard, ...]:
    problems = ProblemCollector()
    shards = []
    for name in names:
        with problems.absorb():
            shards.append(read_base_file(directory / name))
    problems.raise_if_any()
    return tuple(shards)


def _check_index(weight_map: WeightMap, shards: Iterable[BaseShard]) -> None:
    held = {shard.path.name: {name for name, _ in shard.sources()} for shard in shards}
    lacking = [
        Problem(name, f"it in {shard}, where the index says it is", "a shard without it", "fetch the base again")
        for name, shard in weight_map.shard_by_tensor.items()
        if name not in held[shard]
    ]
    if lacking:
        raise CheckpointError(*lacking)


def _gather_tensors(shards: Iterable[BaseShard]) -> dict[str, TensorSource]:
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
