"""The plan of one adapter on a base: a step for each tensor, the header of each shard, and all other files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from rawmerge.combined_plan import placed_steps
from rawmerge.dtypes import DTYPES, OUTPUT_DTYPES
from rawmerge.errors import PlanError, Problem
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.shard_header import TensorEntry, format_shard_header
from rawmerge.formats.shard_names import is_pickle, output_name
from rawmerge.formats.weight_map import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_SUFFIX, WeightMap, format_weight_map
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import SINGLE_NAME, BaseCheckpoint, ShardContents
from rawmerge.inputs.identity import RECORD_NAME, merged_adapters, read_record
from rawmerge.inputs.tensor_source import TensorFile, TensorSource
from rawmerge.matching.ledger import Addition
from rawmerge.matching.matcher import Matches
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import (
    AdapterInput,
    InputFile,
    KeepTensor,
    MergePlan,
    ReplaceTensor,
    ShardPlan,
    Step,
    UpdateTensor,
    WrittenFile,
)
from rawmerge.output.output_config import OutputConfig
from rawmerge.output.side_files import (
    LeftOut,
    SideFile,
    differing_tokenizer_files,
    list_side_files,
    list_tokenizer_files,
    loses_template,
    override_side_files,
)


class Planner:
    """Plans the merge of one adapter."""

    def __init__(
        self, base: BaseCheckpoint, adapter: Adapter, matches: Matches, options: MergeOptions, config: OutputConfig
    ) -> None:
        """Plan nothing yet; `matches` says what becomes of the adapter's tensors, `config` has been edited."""
        self.base = base
        self.adapter = adapter
        self.matches = matches
        self.options = options
        self.config = config

    def plan(self, notes: Iterable[str]) -> MergePlan:
        """Return the plan, with these notes before its own."""
        shards = tuple(self._plan_shard(contents) for contents in self.base.contents)
        check_unique(shards)
        written = tuple(self.written_files(shards))
        side_files, left_out = self._side_files(shards, written)
        return MergePlan(
            options=self.options,
            base_root=str(self.base.root),
            base_repo="",
            base_files=tuple(map(input_file, self.base.shards)),
            base_config_sha256=sha256_of(self.base.config.text),
            adapters=(self._adapter_input(),),
            shards=shards,
            written_files=written,
            side_files=side_files,
            left_out=left_out,
            notes=(*notes, *self._notes()),
            history=tuple(sorted(merged_adapters(read_record(self.base.root).fields))),
        )

    def _adapter_input(self) -> AdapterInput:
        files = (input_file(self.adapter.weights),)
        return AdapterInput(str(self.adapter.root), "", sha256_of(self.adapter.config_text), files, self.matches.uses)

    def _plan_shard(self, contents: ShardContents) -> ShardPlan:
        steps = [self._plan_step(name, source) for name, source in contents.tensors]
        steps.extend(self._added_steps(contents))
        placed = tuple(placed_steps(iter(steps)))
        entries = tuple(step.entry for step in placed)
        header, name = contents.shard.header, output_name(contents.shard.path.name)
        if entries == header.entries:
            return ShardPlan(name, header.text, placed)
        return ShardPlan(name, format_shard_header(entries, header.metadata), placed)

    def _plan_step(self, name: str, source: TensorSource) -> Step:
        replacement, overlay = self.matches.replacements.get(name), self.matches.overlays.get(name)
        before = replacement or source
        entry = TensorEntry(name, self._output_dtype(source.dtype), before.shape, 0, 0)
        if overlay or name in self.matches.updates:
            return self._update_step(entry, before, source.dtype)
        if replacement:
            return ReplaceTensor(entry, replacement, source)
        return _keep_or_cast(entry, source)

    def _update_step(self, entry: TensorEntry, source: TensorSource, base_dtype: str) -> UpdateTensor:
        name = entry.name
        return UpdateTensor(
            entry,
            source,
            base_dtype,
            self.matches.updates.get(name, ()),
            columns=self.matches.columns.get(name, 0),
            cuts=self.matches.cuts.get(name, ()),
            overlay=self.matches.overlays.get(name),
        )

    def _added_steps(self, contents: ShardContents) -> Iterator[Step]:
        """Yield the steps of tensors that the base lacks and this shard takes."""
        is_last = contents is self.base.contents[-1]
        own = {name for name, _ in contents.tensors}
        for name, addition in self.matches.additions.items():
            if addition.beside in own or (not addition.beside and is_last):
                yield self._added_step(name, addition)

    def _added_step(self, name: str, addition: Addition) -> Step:
        source = addition.source
        stored = self.base.tensors[addition.like].dtype if addition.like else self._usual_dtype(source.dtype)
        entry = TensorEntry(name, self._output_dtype(stored), source.shape, 0, 0)
        if name in self.matches.updates or name in self.matches.overlays:
            return self._update_step(entry, source, stored)
        if source.path == str(self.adapter.weights.path):
            return ReplaceTensor(entry, source, None)
        return _keep_or_cast(entry, source)

    def _usual_dtype(self, stored: str) -> str:
        """Return the dtype that most of the base's float tensors have; tensors of other kinds keep theirs."""
        floats = [source.dtype for source in self.base.tensors.values() if DTYPES[source.dtype].is_mergeable]
        usual = Counter(floats).most_common(1)
        return usual[0][0] if usual and DTYPES[stored].is_mergeable else stored

    def _output_dtype(self, stored: str) -> str:
        asked = OUTPUT_DTYPES.get(self.options.dtype, stored)
        return asked if DTYPES[stored].is_mergeable else stored

    def written_files(self, shards: tuple[ShardPlan, ...]) -> Iterator[WrittenFile]:
        """Yield index and config of an output with these shards."""
        if not self.base.is_directory:
            return
        if self.config.text != self.base.config.text:
            yield WrittenFile(CONFIG_NAME, self.config.text)
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
        own |= {shard.path.name for shard in self.base.shards} | {PICKLE_INDEX_NAME}
        kept, left_out = list_side_files(self.base.root, own)
        if self.options.tokenizer != "adapter":
            return kept, left_out
        chosen, gone = override_side_files(kept, list_tokenizer_files(self.adapter.root))
        return chosen, (*left_out, *gone)

    def _tokenizer_notes(self) -> Iterator[str]:
        """Yield what the choice of the tokenizer means."""
        ours, theirs = list_side_files(self.base.root, ())[0], list_tokenizer_files(self.adapter.root)
        if self.options.tokenizer == "adapter":
            if not theirs:
                yield "the adapter brings no tokenizer: the output gets the base's files"
            elif loses_template(ours, override_side_files(ours, theirs)[0]):
                yield "the base's chat template is lost: the adapter's tokenizer takes its place and has none"
        elif differing := differing_tokenizer_files(ours, theirs):
            listed = ", ".join(differing)
            if list_tokenizer_files(self.base.root):
                had = "the output gets the base's tokenizer; the adapter brings another"
            else:
                had = "the base has no tokenizer, so the output gets none; the adapter brings one"
            yield f"{had} ({listed}): --tokenizer adapter takes the adapter's"

    def _notes(self) -> Iterator[str]:
        yield from self.matches.notes
        if self.base.is_directory:
            yield from self._tokenizer_notes()
        unlisted = {source for _, source in _unlisted(self.base)}
        if unlisted:
            yield f"{len(unlisted)} tensors are in the shards but not in the base's index; they are kept and listed"
        is_indexed = self.base.weight_map and SINGLE_NAME not in self.base.weight_map.shard_names
        if is_indexed and (self.base.root / SINGLE_NAME).exists():
            yield f"{SINGLE_NAME} stands beside the index, which does not list it: it is left out"
        if any(shard.path.suffix == PICKLE_SUFFIX for shard in self.base.shards):
            yield "the base is pickles: their tables of tensors were read, and nothing in them was run"
        if not self.base.is_directory:
            yield "the base is a single file: no config or other side files are written"


def check_unique(shards: Iterable[ShardPlan]) -> None:
    """Refuse an output with two tensors of one name, which no loader could read."""
    counts = Counter(step.entry.name for shard in shards for step in shard.steps)
    twice = [Problem(name, "each output tensor once", "it twice") for name, count in counts.items() if count > 1]
    if twice:
        raise PlanError(*twice)


def check_shard_names(plan: MergePlan) -> None:
    """Refuse two shards of one name, which the output's format may give to files of the base with different ones."""
    counts = Counter(shard.name for shard in plan.shards)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        hint = "--max-shard-size cuts the output into shards with names of their own"
        if is_pickle(twice[0]) and not any(is_pickle(file.name) for file in plan.base_files):
            hint += "; --format safetensors keeps those of the base"
        raise PlanError(*(Problem(name, "each shard a name of its own", _sharers(plan, name), hint) for name in twice))


def _sharers(plan: MergePlan, name: str) -> str:
    """Return which files of the base become shards of this name."""
    files = {file.path: file.name for file in plan.base_files}
    sources = {step.source.path for shard in plan.shards if shard.name == name for step in shard.steps}
    return f"it for {' and '.join(sorted(files[path] for path in sources & files.keys()))}"


def _unlisted(base: BaseCheckpoint) -> Iterator[tuple[str, TensorSource]]:
    """Yield the tensors that the shards hold and the index does not list."""
    if base.weight_map:
        listed = base.weight_map.shard_by_tensor
        yield from ((name, at) for each in base.contents for name, at in each.tensors if name not in listed)


def _keep_or_cast(entry: TensorEntry, source: TensorSource) -> Step:
    is_kept = entry.dtype == source.dtype
    return KeepTensor(entry, source) if is_kept else UpdateTensor(entry, source, source.dtype, ())


def input_file(shard: TensorFile) -> InputFile:
    """Return by what a file is recognised at run time."""
    return InputFile(str(shard.path), shard.path.name, shard.size, shard.digest)


def sha256_of(text: str) -> str:
    """Return the SHA-256 of a text, an empty one for an empty one."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""
