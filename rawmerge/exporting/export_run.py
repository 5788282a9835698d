"""Runs an export job: the plan of its merge, what LLaMA-Factory writes beside the weights, and the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final, Unpack

from rawmerge.adapter_source import split_weight
from rawmerge.api import plan_merge
from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import PlanError, Problem, quote
from rawmerge.exporting.chat_templates import chat_templates
from rawmerge.exporting.differences import llamafactory_differences
from rawmerge.exporting.export_job import ExportJob
from rawmerge.exporting.llamafactory import TOOL
from rawmerge.exporting.llamafactory_keys import nearest
from rawmerge.exporting.modelfile import MODELFILE, modelfile_text
from rawmerge.exporting.tokenizer_tokens import read_special_tokens
from rawmerge.exporting.value_head import VALUE_HEADS, find_value_head
from rawmerge.formats.strict_json import StrictJsonError
from rawmerge.formats.tokenizer_text import with_left_padding
from rawmerge.inputs.hub import resolve_adapter
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.matching.embedding_names import is_embedding
from rawmerge.merge_plan import MergePlan, ReplaceTensor, UpdateTensor, WrittenFile
from rawmerge.output.side_files import (
    MAX_TOKENIZER_CONFIG_BYTES,
    TOKENIZER_CONFIG,
    SideFile,
    differing_tokenizer_files,
    list_tokenizer_files,
)
from rawmerge.planning import read_errors_refused
from rawmerge.run import MergeSummary, run_plan
from rawmerge.run_options import RunChoices

_NO_MODELFILE: Final = f"no {MODELFILE} is written"


def run_export(
    job: ExportJob, *, progress: ProgressCallback | None = None, **choices: Unpack[RunChoices]
) -> MergeSummary:
    """Do what another tool's merge file asks for: the output appears complete, or not at all.

    Args:
        job: from `read_export`.
        progress: see `merge_adapter`.
        choices: see `merge_adapter`; `device` is the job's unless it is given.

    Raises:
        RefusedError: nothing was written; reasons in `.problems`.
        MergeError: writing failed; nothing was published.
    """
    devised: RunChoices = {"device": job.device}
    return run_plan(plan_export(job), job.output, progress=progress, **(devised | choices))


def plan_export(job: ExportJob) -> MergePlan:
    """Return the plan of a job, its notes and extra files included; nothing is written.

    Args:
        job: from `read_export`.

    Raises:
        RefusedError: with every reason against the merge in `.problems`.
    """
    job = settled_job(job)
    plan = _merge_plan(job)
    if job.added_tokens_by and not _brings_embeddings(plan):
        raise PlanError(
            Problem(
                ", ".join(job.added_tokens_by),
                "an adapter that brings the embeddings of the new tokens (modules_to_save)",
                "none in it",
                "LLaMA-Factory would draw random rows. If the base's padded vocabulary has room for the tokens, leave "
                "the keys out: the adapter's tokenizer files hold them",
            )
        )
    return _Extras(job, plan).plan()


def _check_weights(job: ExportJob) -> None:
    """Refuse a weight behind an adapter's name that is no finite number."""
    problems = []
    for adapter in job.adapters:
        try:
            split_weight(adapter)
        except ValueError as error:
            problems.append(Problem(adapter, "an adapter, or one with a finite weight behind a colon", str(error)))
    if problems:
        raise PlanError(*problems)


def settled_job(job: ExportJob) -> ExportJob:
    """Return a job as it is merged: with the base's tokenizer where its adapters bring several that differ.

    Args:
        job: from `read_export`; one that is settled stays as it is.

    Raises:
        RefusedError: an adapter is not there, or its weight is no number to merge with.
    """
    _check_weights(job)
    if job.tokenizer == "base" or len(job.adapters) == 1:
        return job
    with read_errors_refused(job.adapters[0]):
        if not _bring_other_tokenizers(job.adapters):
            return job
    note = "the adapters bring tokenizers that differ: the output gets the base's"
    return replace(job, tokenizer="base", notes=(*job.notes, note))


def _bring_other_tokenizers(adapters: tuple[str, ...]) -> bool:
    roots = [resolve_adapter(split_weight(adapter)[0]).path for adapter in adapters]
    found = [files for root in roots if (files := list_tokenizer_files(root if root.is_dir() else root.parent))]
    return any(differing_tokenizer_files(*pair) or differing_tokenizer_files(*pair[::-1]) for pair in pairwise(found))


def _merge_plan(job: ExportJob) -> MergePlan:
    return plan_merge(
        job.base,
        job.adapters,
        order=job.order,
        dtype=job.dtype,
        tokenizer=job.tokenizer,
        max_shard_size=job.max_shard_size,
        format=job.format,
        like=job.like or None,
    )


def _brings_embeddings(plan: MergePlan) -> bool:
    paths = {file.path for file in plan.adapter_files}
    whole = (step for step in plan.steps() if isinstance(step, ReplaceTensor | UpdateTensor))
    return any(step.source.path in paths and is_embedding(step.entry.name) for step in whole)


class _Extras:
    """Adds to a plan what an export writes beside a plain merge's files."""

    def __init__(self, job: ExportJob, plan: MergePlan) -> None:
        self.job = job
        self.made = plan
        self.sides = {file.name: file for file in plan.side_files}
        self.written = list(plan.written_files)

    def plan(self) -> MergePlan:
        notes = [*self.job.notes, *self._extra_notes()]
        if self.job.tool == TOOL:
            notes += llamafactory_differences(self.made)
        sides = tuple(sorted(self.sides.values(), key=lambda file: file.name))
        notes = [*self.made.notes, *notes]
        return replace(self.made, side_files=sides, written_files=tuple(self.written), notes=tuple(notes))

    def _extra_notes(self) -> Iterator[str]:
        """Add the files, and yield what is to be said of each."""
        if self.job.template:
            yield self._add_modelfile(self.job.template)
        if self.job.has_value_head:
            yield self._add_value_head(Path(self.made.adapters[-1].root))
        if self.job.pads_left and (config := self.sides.get(TOKENIZER_CONFIG)):
            yield from self._pad_left(config)

    def _add_modelfile(self, name: str) -> str:
        template = chat_templates().get(name)
        if template is None:
            guess = nearest(name, chat_templates())
            return f"template {quote(name)}: {_NO_MODELFILE}, for rawmerge does not know it" + (
                f" ({guess}, perhaps?)" if guess else ""
            )
        try:
            tokens = read_special_tokens(self.made.side_files)
        except StrictJsonError as error:
            return f"template {name}: {_NO_MODELFILE}, for a tokenizer file cannot be read ({error})"
        if tokens is None:
            return f"template {name}: {_NO_MODELFILE}, for there is no {TOKENIZER_CONFIG}"
        self.sides.pop(MODELFILE, None)
        self.written.append(WrittenFile(MODELFILE, modelfile_text(template, tokens, self.job.default_system)))
        return f"{MODELFILE} is written, for ollama, with the chat format {name}"

    def _add_value_head(self, root: Path) -> str:
        head = find_value_head(root)
        if head is None:
            return f"stage rm: the last adapter has no {' or '.join(VALUE_HEADS)}, so none is copied"
        self.sides[head.name] = head
        return f"stage rm: {head.name} is copied from the last adapter"

    def _pad_left(self, config: SideFile) -> Iterator[str]:
        raw = read_small_file(Path(config.path), MAX_TOKENIZER_CONFIG_BYTES)
        try:
            padded = with_left_padding(raw)
        except StrictJsonError as error:
            yield f"{TOKENIZER_CONFIG} is copied as it is, for it cannot be read ({error}); set padding_side to left"
            return
        if padded != raw:
            del self.sides[config.name]
            self.written.append(WrittenFile(config.name, padded.decode()))
            yield f"{TOKENIZER_CONFIG}: padding_side is left, as LLaMA-Factory sets it for generation"
