"""Whether the files of an output beside its shards are those that base and adapter give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rawmerge.errors import MissingFileError, Problem, RefusedError, quote
from rawmerge.formats.card_metadata import CARD_NAME
from rawmerge.formats.shard_names import is_pickle
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.formats.tokenizer_text import with_left_padding
from rawmerge.formats.weight_map import INDEX_NAME, PICKLE_INDEX_NAME
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.comparison import same_bytes
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.inputs.tensor_source import TensorSource, read_small_file
from rawmerge.merge_options import ONCE
from rawmerge.merge_plan import MergePlan
from rawmerge.output.outcome import count_steps
from rawmerge.output.record import record_text
from rawmerge.output.shard_file import is_shard_file
from rawmerge.output.side_files import MAX_TOKENIZER_CONFIG_BYTES, TOKENIZER_CONFIG, SideFile

_MAX_TEXT_BYTES: Final = 128 * 2**20
_INSPECT: Final = "`rawmerge inspect` on the output tells which it was made from, by its record"
_FOLLOWS: Final = "it follows from base, adapter and options: one of them is another, or the record was edited"
#: What a part of the record that is another probably comes from.
_HINTS: Final = {
    "base": _INSPECT,
    "adapters": _INSPECT,
    "tensors": _FOLLOWS,
    "adapter_tensors": _FOLLOWS,
    "history": f"the base's own {RECORD_NAME} was changed, removed or added since",
    "options": "leave options out: they are taken from the record",
}
_FREE: Final = {"repo", "force", "device", "card"}


def file_problems(plan: MergePlan, found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield each file that an output of rawmerge should have and lacks, or that has other bytes.

    Args:
        plan: what the output should be.
        found: the output.
        record: its merge record.
    """
    if not found.is_directory:
        return
    yield from _header_problems(plan, found)
    for file in plan.written_files:
        if file.name != CARD_NAME:
            yield from _text_problems(found.root / file.name, file.name, file.text.encode())
    for side in plan.side_files:
        if side.name != CARD_NAME:
            yield from _side_problems(found.root / side.name, side)
    if record:
        yield from record_problems(plan, record)


def card_problems(plan: MergePlan, root: Path) -> Iterator[Problem]:
    """Yield whether the model card is another than the merge wrote: to edit it is a user's right, and no finding."""
    for file in plan.written_files:
        if file.name == CARD_NAME:
            yield from _text_problems(root / file.name, file.name, file.text.encode())
    for side in plan.side_files:
        if side.name == CARD_NAME:
            yield from _side_problems(root / side.name, side)


def _has_bytes(path: Path, side: SideFile) -> bool:
    return path.stat().st_size == side.byte_count and same_bytes(_whole(Path(side.path)), _whole(path))


def _is_padded(path: Path, side: SideFile) -> bool:
    """Whether a tokenizer config pads on the left, as `rawmerge export` leaves it, and is else the same."""
    if side.name != TOKENIZER_CONFIG or side.byte_count > MAX_TOKENIZER_CONFIG_BYTES:
        return False
    try:
        return with_left_padding(Path(side.path).read_bytes()) == read_small_file(path, MAX_TOKENIZER_CONFIG_BYTES)
    except (StrictJsonError, RefusedError):
        return False


def file_notes(plan: MergePlan, found: BaseCheckpoint) -> Iterator[str]:
    """Yield a sentence on the files of an output that others made: they write configs anew, so nothing is wrong."""
    names = [*(file.name for file in plan.written_files), *(side.name for side in plan.side_files)]
    if len(found.shards) == 1:  # which needs no index
        names = [name for name in names if name not in {INDEX_NAME, PICKLE_INDEX_NAME}]
    if found.is_directory and (missing := [name for name in names if not (found.root / name).is_file()]):
        yield f"it lacks {', '.join(sorted(missing)[:8])}, which a merge by rawmerge has"


def record_problems(plan: MergePlan, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield each part of the record that base and adapter contradict; versions and notes may differ."""
    expected = parse_json_object(record_text(plan, count_steps(plan)).encode())
    parts = {
        "base": "the base that was given",
        "adapters": "the adapter that was given",
        "tensors": "what becomes of the tensors",
        "adapter_tensors": "where the adapter's tensors go",
        "history": "the adapters that the base held before",
        "options": "the options of this verification",
    }
    if len(plan.adapters) != len(recorded := _listed(record.get("adapters"))):
        parts = {part: parts[part] for part in ("base", "history")}  # the others follow from the adapters
        yield _other_count(len(plan.adapters), len(recorded))
    elif weights := tuple(_weight_problems(plan, expected, record)):
        del parts["adapters"]
        yield from weights
    hint = ""
    if _are_in_another_order(expected, record):
        if record_options(record).get("order") == ONCE:  # their sum has none
            parts = {part: meaning for part, meaning in parts.items() if part not in {"adapters", "adapter_tensors"}}
        hint = "the same adapters in another order: name them as they were merged"
    hints = {**_HINTS, **({"adapters": hint} if hint else {})}
    for part, meaning in parts.items():
        wanted, found = (_without_repo(document.get(part)) for document in (expected, record))
        if wanted != found:
            yield Problem(f"{RECORD_NAME}: {part}", meaning, _other(wanted, found), hints[part])


def _are_in_another_order(expected: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    sides = [[_without_repo(item) for item in _listed(at.get("adapters"))] for at in (expected, record)]
    return sides[0] != sides[1] and all(sides[0].count(item) == sides[1].count(item) for item in (*sides[0], *sides[1]))


def _other_count(given: int, recorded: int) -> Problem:
    texts = [f"{count} adapter{'s'[: count != 1]}" for count in (given, recorded)]
    hint = f"the output was made from {texts[1]}; {given} {'was' if given == 1 else 'were'} given: name each of them"
    return Problem(f"{RECORD_NAME}: adapters", f"{texts[0]}, as given", texts[1], hint)


def _weight_problems(plan: MergePlan, expected: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield which adapters have another weight in the record, where that is all that is other."""
    found = [item if isinstance(item, dict) else {} for item in _listed(record.get("adapters"))]
    bare = [[{**_without_repo(item), "weight": 0} for item in items] for items in (expected["adapters"], found)]
    if bare[0] != bare[1] or _are_in_another_order(expected, record):
        return
    for adapter, item in zip(plan.adapters, found, strict=True):
        weight = item.get("weight", 1.0)
        if weight != adapter.weight and isinstance(weight, float):  # what else a stranger wrote is `another`
            name = quote(Path(adapter.root).name)
            hint = f"write its weight behind its name, as in {quote(f'{adapter.root}:{weight:g}')}"
            yield Problem(f"{RECORD_NAME}: adapters", f"{name} with the weight {adapter.weight:g}", f"{weight:g}", hint)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def record_options(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a record, which may be anyone's; nothing where it has none."""
    options = record.get("options")
    return options if isinstance(options, dict) else {}


def _other(wanted: Any, found: Any) -> str:
    """Return in which fields a part of the record is another."""
    if not (isinstance(wanted, dict) and isinstance(found, dict)):
        return "another"
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    return f"another {', '.join(map(quote, names[:8]))}"


def _without_repo(part: Any) -> Any:
    """Return a part of the record without what the same files and bits may have otherwise: hub names, `force`."""
    if isinstance(part, list):
        return [_without_repo(item) for item in part]
    return {name: value for name, value in part.items() if name not in _FREE} if isinstance(part, dict) else part


def _header_problems(plan: MergePlan, found: BaseCheckpoint) -> Iterator[Problem]:
    paths = {shard.path.name: shard.path for shard in found.shards}
    for shard in plan.shards:
        if shard.name not in paths:
            yield Problem(shard.name, "a shard of this name", "none")
        elif not is_shard_file(paths[shard.name], shard):
            part = "table of tensors and places" if is_pickle(shard.name) else "header"
            expected = f"the base's {part}, or one with the same tensors in its order"
            yield Problem(shard.name, expected, f"another {part}")


def _text_problems(path: Path, name: str, expected: bytes) -> Iterator[Problem]:
    try:
        if read_small_file(path, _MAX_TEXT_BYTES) != expected:
            yield Problem(name, "the text that follows from base and adapter", "another")
    except MissingFileError:
        yield Problem(name, "the text that follows from base and adapter", "no such file")


def _side_problems(path: Path, side: SideFile) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(side.name, "the file of base or adapter", "no such file")
    elif not _has_bytes(path, side) and not _is_padded(path, side):
        yield Problem(side.name, "the bytes of base or adapter", "other bytes")


def _whole(path: Path) -> TensorSource:
    size = path.stat().st_size
    return TensorSource(str(path), 0, size, "U8", (size,))
