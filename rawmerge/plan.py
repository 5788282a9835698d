"""The decision: base and adapter to a `MergePlan`, from headers and configs alone, or every reason against it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from rawmerge.adapter import Adapter, read_adapter
from rawmerge.base_checkpoint import SINGLE_NAME, BaseCheckpoint, read_base
from rawmerge.dtypes import COMPUTE_DTYPES, DTYPES, OUTPUT_DTYPES
from rawmerge.errors import ProblemCollector, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import with_dtype, with_untied_embeddings
from rawmerge.formats.shard_header import TensorEntry, format_shard_header
from rawmerge.formats.weight_map import INDEX_NAME, WeightMap, format_weight_map
from rawmerge.matching import Matches, match_adapter
from rawmerge.merge_plan import (
    InputFile,
    KeepTensor,
    MergeOptions,
    MergePlan,
    ReplaceTensor,
    ShardPlan,
    Step,
    UpdateTensor,
    WrittenFile,
)
from rawmerge.side_files import LeftOut, SideFile, list_side_files
from rawmerge.tensor_source import ShardFile, TensorSource
from rawmerge.tied_embeddings import OUTPUT_EMBEDDING, find_untied

RECORD_NAME: Final = "rawmerge.json"


def make_plan(base_root: Path, adapter_root: Path, options: MergeOptions) -> MergePlan:
    """Return the plan of merging the adapter into the base; no tensor is read, nothing is written.

    Args:
        base_root: directory or safetensors file of the base.
        adapter_root: directory or safetensors file of the adapter.
        options: compute dtype and output dtype.

    Raises:
        RefusedError: all reasons against the merge at once; the class is the reasons' own where they share one.
        ValueError: an option is none of its choices.
    """
    _check_options(options)
    problems = ProblemCollector()
    with problems.absorb():
        base = read_base(base_root.absolute())  # a plan may be run from another folder
    with problems.absorb():
        adapter = read_adapter(adapter_root.absolute())
    problems.raise_if_any()
    matches = match_adapter(base, adapter)
    return _Planner(base, adapter, matches, options).plan()


def _check_options(options: MergeOptions) -> None:
    if options.compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be one of {COMPUTE_DTYPES}, not {options.compute_dtype!r}")
    if options.output_dtype and options.output_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype must be one of {tuple(OUTPUT_DTYPES)}, not {options.output_dtype!r}")


class _Planner:
    def __init__(self, base: BaseCheckpoint, adapter: Adapter, matches: Matches, options: MergeOptions) -> None:
        self.base = base
        self.adapter = adapter
        self.matches = matches
        self.options = options
        changed = matches.updates.keys() | matches.replacements.keys()
        self.untied = find_untied(base.config, base.tensors, changed, matches.embeddings)

    def plan(self) -> MergePlan:
        shards = tuple(self._plan_shard(shard) for shard in self.base.shards)
        written = tuple(self._written_files(shards))
        side_files, left_out = self._side_files(shards, written)
        return MergePlan(
            options=self.options,
            base_root=str(self.base.root),
            adapter_root=str(self.adapter.root),
            base_repo="",
            adapter_repo="",
            base_files=tuple(map(_input_file, self.base.shards)),
            adapter_files=(_input_file(self.adapter.weights),),
            base_config_sha256=_sha256(self.base.config.text),
            adapter_config_sha256=_sha256(self.adapter.config_text),
            shards=shards,
            written_files=written,
            side_files=side_files,
            left_out=left_out,
            adapter_uses=self.matches.uses,
            notes=tuple(self._notes()),
        )

    def _plan_shard(self, shard: ShardFile) -> ShardPlan:
        steps = [self._plan_step(name, source) for name, source in shard.sources()]
        steps.extend(self._untied_steps(shard))
        placed = tuple(_place(steps))
        entries = tuple(step.entry for step in placed)
        if entries == shard.header.entries:
            return ShardPlan(shard.path.name, shard.header.text, placed)
        return ShardPlan(shard.path.name, format_shard_header(entries, shard.header.metadata), placed)

    def _plan_step(self, name: str, source: TensorSource) -> Step:
        entry = TensorEntry(name, self._output_dtype(source.dtype), source.shape, 0, 0)
        replacement = self.matches.replacements.get(name)
        updates = self.matches.updates.get(name, ())
        if updates:
            return UpdateTensor(entry, replacement or source, source.dtype, updates)
        if replacement:
            return ReplaceTensor(entry, replacement, source)
        return _keep_or_cast(entry, source)

    def _untied_steps(self, shard: ShardFile) -> Iterator[Step]:
        """Yield the output embedding that was tied to a changed input embedding, as the base has it."""
        source = self.base.tensors[self.untied] if self.untied else None
        if source and source.path == str(shard.path) and OUTPUT_EMBEDDING not in self.base.tensors:
            entry = TensorEntry(OUTPUT_EMBEDDING, self._output_dtype(source.dtype), source.shape, 0, 0)
            yield _keep_or_cast(entry, source)

    def _output_dtype(self, stored: str) -> str:
        asked = OUTPUT_DTYPES.get(self.options.output_dtype, stored)
        return asked if DTYPES[stored].is_mergeable else stored

    def _written_files(self, shards: tuple[ShardPlan, ...]) -> Iterator[WrittenFile]:
        if not self.base.is_directory:
            return
        config = self.base.config
        text = with_dtype(config, self.options.output_dtype) if self.options.output_dtype else config.text
        text = with_untied_embeddings(config, text) if self.untied else text
        if text != config.text:
            yield WrittenFile(CONFIG_NAME, text)
        if self.base.weight_map or len(shards) > 1:
            yield WrittenFile(INDEX_NAME, self._index_text(shards))

    def _index_text(self, shards: tuple[ShardPlan, ...]) -> str:
        entries = [(step.entry, shard.name) for shard in shards for step in shard.steps]
        metadata = dict(self.base.weight_map.metadata) if self.base.weight_map else {}
        metadata["total_size"] = sum(entry.byte_count for entry, _ in entries)
        index = WeightMap({entry.name: shard_name for entry, shard_name in entries}, metadata)
        return self.base.index_text if index == self.base.weight_map else format_weight_map(index)

    def _side_files(
        self, shards: Iterable[ShardPlan], written: Iterable[WrittenFile]
    ) -> tuple[tuple[SideFile, ...], tuple[LeftOut, ...]]:
        if not self.base.is_directory:
            return (), ()
        own = {shard.name for shard in shards} | {file.name for file in written} | {INDEX_NAME, RECORD_NAME}
        return list_side_files(self.base.root, own)

    def _notes(self) -> Iterator[str]:
        trained_on, here = self.adapter.config.base_model_name, self.base.root.name
        if trained_on and PurePosixPath(trained_on).name != here:
            yield f"the adapter says it was trained on {quote(trained_on)}; the base here is {quote(here)}"
        if self.untied:
            yield (
                f"{self.untied!r} changes and the output embedding was tied to it: {OUTPUT_EMBEDDING!r} is written as "
                "the base has it, and tie_word_embeddings is false"
            )
        unlisted = self.base.tensors.keys() - (
            self.base.weight_map.shard_by_tensor.keys() if self.base.weight_map else self.base.tensors.keys()
        )
        if unlisted:
            yield f"{len(unlisted)} tensors are in the shards but not in the base's index; they are kept and listed"
        is_indexed = self.base.weight_map and SINGLE_NAME not in self.base.weight_map.shard_names
        if is_indexed and (self.base.root / SINGLE_NAME).exists():
            yield f"{SINGLE_NAME} stands beside the index, which does not list it: it is left out"
        if not self.base.is_directory:
            yield "the base is a single file: no config or other side files are written"


def _keep_or_cast(entry: TensorEntry, source: TensorSource) -> Step:
    is_kept = entry.dtype == source.dtype
    return KeepTensor(entry, source) if is_kept else UpdateTensor(entry, source, source.dtype, ())


def _place(steps: Iterable[Step]) -> Iterator[Step]:
    """Yield the steps with their entries' offsets filled in, one after the other."""
    position = 0
    for step in steps:
        entry = step.entry
        count = 1
        for size in entry.shape:
            count *= size
        end = position + DTYPES[entry.dtype].byte_count(count)
        yield replace(step, entry=replace(entry, start=position, end=end))
        position = end


def _input_file(shard: ShardFile) -> InputFile:
    return InputFile(str(shard.path), shard.path.name, shard.size, shard.header.digest)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
