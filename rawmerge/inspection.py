"""What a path holds, told from headers and configs: a base or an adapter, and whether it can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rawmerge.adapter import WEIGHTS_NAME, read_adapter
from rawmerge.base_checkpoint import read_base
from rawmerge.dtypes import DTYPES
from rawmerge.errors import Problem, RefusedError
from rawmerge.formats.adapter_config import CONFIG_NAME
from rawmerge.formats.adapter_names import PAIR_ROLES, parse_adapter_names
from rawmerge.matching.matcher import foreign_problem
from rawmerge.tensor_source import TensorSource


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
    folder = root if root.is_dir() else root.parent
    if (folder / CONFIG_NAME).exists() and (root.is_dir() or root.name == WEIGHTS_NAME):
        return _inspect_adapter(root)
    return _inspect_base(root)


def _inspect_adapter(root: Path) -> Inspection:
    try:
        adapter = read_adapter(root)
    except RefusedError as error:
        return Inspection("adapter", str(root), {}, error.problems)
    names = parse_adapter_names(adapter.tensors)
    pairs = {name.module_path for name in names if name.role in PAIR_ROLES}
    scalings = sorted(adapter.config.scaling_of(path) for path in pairs)
    facts: dict[str, str | int | float | list[str]] = {
        "type": "LORA with rsLoRA scaling" if adapter.config.use_rslora else "LORA",
        "ranks": _counted(adapter.config.rank_of(path) for path in pairs),
        "scaling": " to ".join(f"{scaling:g}" for scaling in sorted({*scalings[:1], *scalings[-1:]})),
        "modules": len(pairs),
        "module names": sorted({path.rpartition(".")[2] for path in pairs}),
        "bare parameters": list(adapter.config.target_parameters),
        "stored tensors": [name.target for name in names if name.role in {"stored", "stored_base", "saved_copy"}],
        "trained rows of": [name.target for name in names if name.role == "token_rows"],
        "trained on": adapter.config.base_model_name,
        **_tensor_facts(adapter.tensors),
    }
    foreign = tuple(foreign_problem(name.text) for name in names if name.role == "foreign")
    return Inspection("adapter", str(root), facts, foreign)


def _inspect_base(root: Path) -> Inspection:
    base = read_base(root)
    packed = sorted({at.dtype for at in base.tensors.values() if not DTYPES[at.dtype].is_mergeable})
    facts: dict[str, str | int | float | list[str]] = {
        "model type": base.config.model_type or "unknown",
        "shards": len(base.shards),
        "index": "yes" if base.weight_map else "none",
        **_tensor_facts(base.tensors),
        "kept only (not plain floats)": packed,
    }
    return Inspection("base", str(root), facts, ())


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
