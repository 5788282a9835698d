"""What a path holds, told from headers and configs: a base or an adapter, and whether it can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import Problem, RefusedError
from rawmerge.formats.adapter_names import parse_adapter_names
from rawmerge.inputs.adapter import Adapter, is_adapter, read_adapter
from rawmerge.inputs.base_checkpoint import read_base
from rawmerge.inputs.identity import RECORD_NAME, read_record
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.matcher import foreign_problem, grammar_of
from rawmerge.merge_options import COMBINING, SERIAL, MergeOptions
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.interface import AdapterKind, KindRow
from rawmerge.output.record import options_record

#: Files of an input that are named.
_MAX_FILES: Final = 4
#: Roles of tensors that are not the kind's own.
_NOT_OWN: Final = frozenset({"stored", "stored_base", "saved_copy", "original_copy", "token_rows", "foreign"})


@dataclass(frozen=True, slots=True)
class Inspection:
    """A base or an adapter in a few facts.

    Attributes:
        kind: `base` or `adapter`.
        path: what was inspected.
        facts: name to value, in the order to show them.
        problems: why it cannot be merged; empty when it can, as far as it alone tells.
    """

    kind: str
    path: str
    facts: Mapping[str, str | int | float | list[str]]
    problems: tuple[Problem, ...]


def inspect_root(root: Path) -> Inspection:
    """Return what `root`, a directory or file, holds.

    Raises:
        RefusedError: neither a base nor an adapter can be read there.
    """
    return _inspect_adapter(root) if is_adapter(root) else _inspect_base(root)


def _row(kind: AdapterKind, variants: Collection[str]) -> KindRow:
    """Return the row of the table of kinds that fits best: that of a variant, where an adapter is one."""
    rows = list(kind.rows())
    return next((row for row in rows if row.title in variants and not row.modules.startswith("as ")), rows[0])


def _inspect_adapter(root: Path) -> Inspection:
    try:
        adapter = read_adapter(root)
    except RefusedError as error:
        return Inspection("adapter", str(root), {}, error.problems)
    kind = ADAPTER_KINDS[adapter.config.kind]
    row = _row(kind, tuple(kind.variants(_settings(adapter))))
    names = parse_adapter_names(adapter.tensors, grammar_of(kind))
    own = {name.module_path for name in names if name.role not in _NOT_OWN and name.module_path}
    facts: dict[str, str | int | float | list[str]] = {
        "type": " with ".join(filter(None, [adapter.config.kind, ", ".join(kind.variants(_settings(adapter)))])),
        "merges as": f"{row.title}: {row.formula}",
        "on": row.modules,
        "bits": row.bits,
        **_rank_facts(adapter, own),
        "modules": len(own),
        "module names": sorted({path.rpartition(".")[2] for path in own}),
        "shared tensors": [name.text for name in names if not name.module_path and name.role not in _NOT_OWN],
        "bare parameters": list(adapter.config.target_parameters),
        "stored tensors": [name.target for name in names if name.role in {"stored", "stored_base", "saved_copy"}],
        "trained rows of": [name.target for name in names if name.role == "token_rows"],
        "trained on": adapter.config.base_model_name,
        **_tensor_facts(adapter.tensors),
    }
    foreign = tuple(foreign_problem(name.text, kind) for name in names if name.role == "foreign")
    return Inspection("adapter", str(root), facts, foreign)


def _settings(adapter: Adapter) -> Mapping[str, Any]:
    return {**adapter.config.values, "use_rslora": adapter.config.use_rslora}


def _rank_facts(adapter: Adapter, paths: Iterable[str]) -> dict[str, str]:
    """Return ranks and scalings of the modules, where the kind has them."""
    ranks = {path: adapter.config.rank_of(path) for path in paths}
    scalings = {adapter.config.scaling_of(path) for path in paths} - {0.0}
    facts = {"ranks": _counted(ranks.values())} if any(ranks.values()) else {}
    if scalings:
        facts["scaling"] = " to ".join(f"{scaling:g}" for scaling in sorted({min(scalings), max(scalings)}))
    return facts


def _inspect_base(root: Path) -> Inspection:
    base = read_base(root)
    packed = sorted({at.dtype for at in base.tensors.values() if not DTYPES[at.dtype].is_mergeable})
    facts: dict[str, str | int | float | list[str]] = {
        "model type": base.config.model_type or "unknown",
        "shards": len(base.shards),
        "index": "yes" if base.weight_map else "none",
        **_tensor_facts(base.tensors),
        "kept only (not plain floats)": packed,
        **_merge_facts(root),
    }
    return Inspection("base", str(root), facts, ())


def _merge_facts(root: Path) -> dict[str, str | int | float | list[str]]:
    """Return what the record of a merge by rawmerge tells; nothing where there is none. It proves nothing.

    A stranger may have written it, so parts of a wrong type are left out.
    """
    record = read_record(root)
    if record.note:
        return {"merge by rawmerge": f"its {RECORD_NAME} cannot be read"}
    if not record.fields:
        return {}
    adapters = [adapter for adapter in _items(record.fields.get("adapters")) if isinstance(adapter, dict)]
    return {
        "merge by rawmerge": str(_table(record.fields.get("versions")).get("rawmerge", "of an unknown version"))[:80],
        "merged base": _input_text(record.fields.get("base"), "shards"),
        "merged adapters": [_input_text(adapter, "files") for adapter in adapters],
        "adapters before": len(_items(record.fields.get("history"))),
        "merged with": [f"{name} {value}" for name, value in _options(record.fields, len(adapters)).items()],
    }


def _options(record: Mapping[str, Any], adapter_count: int) -> Mapping[str, Any]:
    """Return the options of a record that are not the usual ones, and of several adapters the order, which is first."""
    usual = options_record(MergeOptions())
    options = {name: value for name, value in _table(record.get("options")).items() if value != usual.get(name)}
    several: dict[str, Any] = {"order": SERIAL} if adapter_count > 1 else {}
    several |= {name: options[name] for name in ("order", *COMBINING) if name in options}
    return {**several, **options}


def _input_text(part: object, files: str) -> str:
    """Return an input in the words of the record: its place on the hub, and its files with their bytes."""
    table = _table(part)
    found = [item for item in map(_table, _items(table.get(files))) if isinstance(item.get("bytes"), int)]
    names = ", ".join(_file_text(item) for item in found[:_MAX_FILES])
    more = f" and {len(found) - _MAX_FILES} more" if len(found) > _MAX_FILES else ""
    weight = table.get("weight")
    times = f", weight {weight:g}" if isinstance(weight, float) else ""
    return f"{table.get('repo') or 'local files'}: {names or 'no file'}{more}{times}"


def _file_text(item: Mapping[str, Any]) -> str:
    digest = f", SHA-256 {item['sha256']}"[:90] if "sha256" in item else ""
    return f"{item.get('name', 'unnamed')} ({item['bytes']} bytes{digest})"


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _tensor_facts(tensors: Mapping[str, TensorSource]) -> dict[str, str | int | float | list[str]]:
    return {
        "tensors": len(tensors),
        "parameters": sum(prod(at.shape) for at in tensors.values()),
        "bytes": sum(at.byte_count for at in tensors.values()),
        "dtypes": _counted(at.dtype for at in tensors.values()),
    }


def _counted(values: Iterable[str | int]) -> str:
    counts = Counter(values)
    return ", ".join(f"{value} ({count})" for value, count in sorted(counts.items(), key=str))
