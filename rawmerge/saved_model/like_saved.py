"""A finished plan made like what LLaMA-Factory would save: its tensors, dtypes, order and shards, and its roundings.

LLaMA-Factory loads the base in the config's dtype, merges into that, and casts the whole model at last. A tensor that
the base has in another dtype is thus rounded before the merge, and one that the output has in another dtype is rounded
after it too: that is a step's `held_dtype`.

Source: LLaMA-Factory `train/tuner.py` (`export_model`); safetensors 0.8 `serialize` (the order in a file).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.combined_plan import placed_steps
from rawmerge.computing.cast_loss import may_lose
from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import TIE_KEY, ModelConfig, parse_model_config
from rawmerge.formats.shard_header import format_shard_header
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, Step, UpdateTensor, WrittenFile
from rawmerge.saved_model.peft_differences import LEAVE_OUT, not_loaded_by_peft
from rawmerge.saved_model.saved_layout import SavedLayout, SavedTensor

_METADATA: Final = {"format": "pt"}
_ORDER: Final = {code: place for place, code in enumerate(DTYPES)}
_MOST_NAMES: Final = 20


def like_saved(plan: MergePlan, layout: SavedLayout, base: BaseCheckpoint) -> MergePlan:
    """Return the plan with the tensors of a layout, each as it would be saved.

    Args:
        plan: any plan of one or several adapters, with each tensor in its own dtype or all in the output's.
        layout: what would be saved of the base.
        base: what both were made for.

    Raises:
        PlanError: the merge could not be had with this layout; with every reason.
    """
    steps, config = {step.entry.name: step for step in plan.steps()}, base.config
    saved = {tensor.name: tensor for tensor in layout.tensors()}
    problems = [
        *_dtype_problems(layout, config),
        *_tie_problems(plan, config),
        *(problem for name, step in steps.items() if name not in saved for problem in _lost(step, layout)),
        *(problem for tensor in saved.values() for problem in _unfit(tensor, steps.get(tensor.name), layout)),
    ]
    if problems:
        raise PlanError(*problems)
    shards = tuple(_shard(name, tensors, steps) for name, tensors in layout.shards)
    written = tuple(file for file in plan.written_files if file.name != INDEX_NAME)
    index = [WrittenFile(INDEX_NAME, layout.index_text)] if layout.index_text else []
    notes = (*plan.notes, *_peft_notes(plan, base), *_notes(steps, layout, config, plan.options.max_shard_size))
    return replace(plan, shards=shards, written_files=(*written, *index), notes=notes)


def _dtype_problems(layout: SavedLayout, config: ModelConfig) -> Iterator[Problem]:
    """Yield that transformers would load the model in another dtype than the one that the config states."""
    if config.stated_dtype not in {"", layout.loaded_dtype}:
        hint = "state the dtype of the weights in config.json, as dtype"
        yield Problem(CONFIG_NAME, f"a model that is loaded in {config.stated_dtype}", layout.loaded_dtype, hint)


def _tie_problems(plan: MergePlan, config: ModelConfig) -> Iterator[Problem]:
    texts = (file.text for file in plan.written_files if file.name == CONFIG_NAME)
    for written in (parse_model_config(text.encode(), CONFIG_NAME) for text in texts):
        if config.ties_embeddings and not written.ties_embeddings:
            found = "an adapter after which the two sides differ"
            hint = f"PEFT changes both sides by a delta on one, and unties what it replaces; {LEAVE_OUT}"
            yield Problem(TIE_KEY, "embeddings that stay tied", found, hint)


def _lost(step: Step, layout: SavedLayout) -> Iterator[Problem]:
    """Yield that an adapter's part would be lost with a tensor that is not saved."""
    if _is_changed(step):
        found = f"one that {layout.class_name} of transformers {layout.version} does not save"
        yield Problem(step.entry.name, "a tensor for what the adapter changes", found, LEAVE_OUT)


def _unfit(tensor: SavedTensor, step: Step | None, layout: SavedLayout) -> Iterator[Problem]:
    """Yield that a tensor would be saved and is not to be had."""
    maker = f"{layout.class_name} of transformers {layout.version}"
    if step is None:
        found = f"none of this name, which {maker} saves: it would be drawn by chance, or has another name"
        yield Problem(tensor.name, "a tensor of base or adapter", found, LEAVE_OUT)
        return
    if step.entry.shape != tensor.shape:
        yield Problem(tensor.name, f"{list(tensor.shape)}, which {maker} saves", f"{list(step.entry.shape)}", LEAVE_OUT)
    floats = [DTYPES[code].is_mergeable for code in (step.source.dtype, tensor.held_dtype, tensor.dtype)]
    alike = len({step.source.dtype, tensor.held_dtype, tensor.dtype}) == 1
    if not alike and (not all(floats) or step.source.dtype == "F64"):
        # torch rounds float64 to half precision by way of float32
        found = f"{step.source.dtype}, loaded as {tensor.held_dtype} and saved as {tensor.dtype}"
        yield Problem(tensor.name, "a float dtype of at most 32 bits", found, LEAVE_OUT)
    if isinstance(step, UpdateTensor) and step.overlay:
        yield Problem(
            tensor.name, "a whole vocabulary", "one laid over the base's, which PEFT does not load", LEAVE_OUT
        )


def _is_changed(step: Step) -> bool:
    return isinstance(step, ReplaceTensor) or (isinstance(step, UpdateTensor) and bool(step.updates or step.overlay))


def _shard(name: str, tensors: Iterable[SavedTensor], steps: Mapping[str, Step]) -> ShardPlan:
    """Return a file with its tensors in the order in which the safetensors library writes them."""
    ordered = sorted(tensors, key=lambda tensor: (-_ORDER[tensor.dtype], tensor.name))
    placed = tuple(placed_steps(iter([_held(steps[tensor.name], tensor) for tensor in ordered])))
    return ShardPlan(name, format_shard_header([step.entry for step in placed], _METADATA), placed)


def _held(step: Step, tensor: SavedTensor) -> Step:
    """Return a step that goes by way of the dtype in which the model holds the tensor."""
    entry, held = replace(step.entry, dtype=tensor.dtype), tensor.held_dtype
    if isinstance(step, UpdateTensor) and step.updates:
        return replace(step, entry=entry, base_dtype=held, held_dtype="" if held == tensor.dtype else held)
    stored = step.source.dtype
    is_rounded = held != tensor.dtype and may_lose(stored, held)
    if isinstance(step, ReplaceTensor):
        return replace(step, entry=entry, held_dtype=held if is_rounded else "")
    if stored == tensor.dtype and not is_rounded:
        return KeepTensor(entry, step.source)
    return UpdateTensor(entry, step.source, stored, (), held_dtype=held if is_rounded else "")


def _peft_notes(plan: MergePlan, base: BaseCheckpoint) -> Iterator[str]:
    """Yield what is merged here, and not by PEFT."""
    model_type = base.config.model_type
    if names := not_loaded_by_peft(plan, base):
        reason = f"PEFT 0.21 with transformers 5 does not load what adapters have for them in {quote(model_type)}"
        yield f"merged, where LLaMA-Factory leaves the base's values, for {reason}: {_listed(names)}"


def _notes(steps: Mapping[str, Step], layout: SavedLayout, config: ModelConfig, max_bytes: int) -> Iterator[str]:
    """Yield what is otherwise than in a plain merge, in a line each."""
    maker, saved = f"{layout.class_name} of transformers {layout.version}", {at.name: at for at in layout.tensors()}
    if dropped := [name for name in steps if name not in saved]:
        yield f"dropped, for {maker} does not save them: {_listed(dropped)}"
    if early := [name for name, tensor in saved.items() if steps[name].source.dtype != tensor.held_dtype]:
        yield f"cast before the merge, as {maker} loads them: {_listed(early)}"
    if late := [name for name, tensor in saved.items() if tensor.held_dtype != tensor.dtype]:
        floats = sum(DTYPES[tensor.dtype].is_mergeable for tensor in saved.values())
        which = f"all {floats} float tensors" if len(late) == floats else _listed(late)
        yield f"cast to {saved[late[0]].dtype} after the merge, as LLaMA-Factory casts the model: {which}"
    if config.fields.get("auto_map"):
        yield f"the base brings code of its own, which is never run: tensors are those of {maker}"
    count = len(layout.shards)
    files = "one file" if count == 1 else f"{count} shards of at most {format_bytes(max_bytes)}"
    yield f"the tensors lie in {files}, in the order of {maker}"


def _listed(names: Iterable[str]) -> str:
    """Return how many names there are, and each of them once, with `*` for numbers."""
    given = list(names)
    folded = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in given))
    more = f" and {len(folded) - _MOST_NAMES} more" if len(folded) > _MOST_NAMES else ""
    tensors = "1 tensor" if len(given) == 1 else f"{len(given)} tensors"
    shown = given if len(given) == 1 else folded[:_MOST_NAMES]
    return f"{tensors}, {', '.join(map(quote, shown))}{more}"
