"""A `MergePlan` as JSON text and back, so that a plan can be saved, compared, or run by another process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, ShardFormatError, quote
from rawmerge.formats.shard_header import MAX_RANK, parse_shard_header
from rawmerge.formats.strict_json import parse_json_object
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, Step, UpdateTensor

FORMAT: Final = "rawmerge-plan-3"
_AGAIN: Final = "make the plan again"
_STEP_KEY: Final = "step"
_STEPS: Final = {"keep": KeepTensor, "update": UpdateTensor, "replace": ReplaceTensor}
_STEP_NAMES: Final = {step: name for name, step in _STEPS.items()}


def format_plan(
    plan: MergePlan, *, memory: Mapping[str, Any] | None = None, run_notes: Sequence[str] | None = None
) -> str:
    """Return the plan as one JSON object, with a `format` field first.

    Args:
        plan: the plan.
        memory: what it is predicted to take on this machine, told in a `memory` field; no part of the plan.
        run_notes: what a run would take over from earlier ones, told in a `run_notes` field; no part of the plan.
    """
    told = {name: value for name, value in (("memory", memory), ("run_notes", run_notes)) if value is not None}
    return json.dumps({"format": FORMAT, **told, **_encode(plan)})


def parse_plan(text: str) -> MergePlan:
    """Return the plan that `format_plan` wrote.

    Raises:
        PlanError: not a plan of this version, or one that contradicts itself.
    """
    try:
        document = parse_json_object(text.encode())
        stated = document.pop("format", None)
        for told in ("memory", "run_notes"):
            document.pop(told, None)
        decoded: MergePlan = _decode(MergePlan, document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # half of a surrogate pair is a ValueError
        raise PlanError(Problem("plan", f"a plan in the format {FORMAT}", str(error)[:200])) from error
    if stated != FORMAT:
        raise PlanError(Problem("plan", f"the format {FORMAT}", ascii(stated)[:80], _AGAIN))
    for shard in decoded.shards:
        _check_shard(shard)
    return decoded


def _check_shard(shard: ShardPlan) -> None:
    """Refuse a shard, which may come from a stranger's file, whose header and steps say different things.

    Raises:
        PlanError: as `parse_plan`.
    """
    try:
        header = parse_shard_header(shard.header_text.encode(), _tensor_end(shard), shard.name)
    except ShardFormatError as error:
        raise PlanError(*error.problems) from error
    entries = sorted((step.entry for step in shard.steps), key=lambda entry: entry.name)
    if entries != sorted(header.entries, key=lambda entry: entry.name):
        raise PlanError(Problem(shard.name, "a step for each tensor of its header", "other steps", _AGAIN))
    of_steps = (problem for step in shard.steps for problem in _step_problems(step))
    if problems := [*of_steps, *shard.format_problems()]:
        raise PlanError(*problems)


def _tensor_end(shard: ShardPlan) -> int:
    return shard.steps[-1].entry.end if shard.steps else 0


def _step_problems(step: Step) -> Iterator[Problem]:
    for source in _sources(step):
        if not _is_whole(source):
            found = f"{source.byte_count} bytes at {source.offset} for {quote(source.dtype)} {source.shape}"
            yield Problem(step.entry.name, "tensors as large as their shapes", found[:200], _AGAIN)
    if isinstance(step, UpdateTensor) and step.base_dtype not in DTYPES:
        yield Problem(step.entry.name, "a dtype of safetensors", quote(step.base_dtype), _AGAIN)
    held = "" if isinstance(step, KeepTensor) else step.held_dtype
    if held and not (held in DTYPES and DTYPES[held].is_mergeable):
        yield Problem(step.entry.name, "a float dtype to be held in", quote(held), _AGAIN)
    own = (step.entry.dtype, step.entry.shape)
    if isinstance(step, KeepTensor) and (step.source.dtype, step.source.shape) != own:
        yield Problem(step.entry.name, "bytes to keep of its own dtype and shape", "others", _AGAIN)


def _sources(step: Step) -> Iterator[TensorSource]:
    """Yield all tensors that a step reads."""
    yield step.source
    if isinstance(step, ReplaceTensor) and step.base:
        yield step.base
    if isinstance(step, UpdateTensor):
        yield from (source for update in step.updates for source in update.tensors.values())
        if step.overlay:
            yield step.overlay


def _is_whole(source: TensorSource) -> bool:
    if source.dtype not in DTYPES or source.offset < 0 or len(source.shape) > MAX_RANK:
        return False
    if not all(0 <= size < 2**63 for size in source.shape):
        return False
    return source.byte_count == DTYPES[source.dtype].byte_count(prod(source.shape))


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        step = _STEP_NAMES.get(type(value))
        return {_STEP_KEY: step, **fields} if step else fields
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return value


def _decode(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in _checked(list, value))
    if origin in (Union, UnionType):
        return _decode(_alternative(arguments, value), value)
    if origin is not None:  # a mapping from str
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _type_hints(kind)
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    return _checked(kind, value)


def _alternative(kinds: tuple[Any, ...], value: Any) -> Any:
    """Return which of a union's kinds a JSON value is of."""
    if isinstance(value, dict):
        is_step = kinds[0] in _STEP_NAMES
        return _STEPS[value.pop(_STEP_KEY)] if is_step else next(filter(dataclasses.is_dataclass, kinds), kinds[0])
    if isinstance(value, list):
        return next((kind for kind in kinds if get_origin(kind) is tuple), kinds[0])
    return next((kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind)), kinds[0])


def _checked(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


@lru_cache
def _type_hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)
