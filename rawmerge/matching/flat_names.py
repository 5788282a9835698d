"""Paths of modules that a file has flattened, `_` for each dot, to the base's modules of which they are that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from rawmerge.errors import AdapterError, PlanError, Problem, quote
from rawmerge.families import base_prefixes
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.ledger import Ledger

#: What kohya and LyCORIS put before a path, by the model of a pipeline that it belongs to.
PREFIXES: Final = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_unet_",
    "lora_transformer_",
    "lora_",
    "lycoris_",
)
_MAX_CANDIDATES: Final = 6


def unflatten(ledger: Ledger, names: Iterable[AdapterTensorName], disk: DiskNames) -> list[AdapterTensorName]:
    """Return the names with the base's paths in the place of flat ones; problems go to the ledger.

    A path with dots stays. A flat one must be that of one module of the base, with or without the prefix of its class.
    The adapter's values by path, alphas, follow.
    """
    names = list(names)
    index = _index(disk)
    paths = dict.fromkeys(name.module_path for name in names if name.role != "foreign")
    found = {path: _module(path, index) for path in paths}
    ledger.problems.add(PlanError, _unmatched(names, found))
    ledger.problems.add(AdapterError, _doubled(names, found))
    alphas = ledger.adapter.config.values.get("alphas", {})
    renamed = {at[0]: alphas[path] for path, at in found.items() if len(at) == 1 and path in alphas}
    config = replace(ledger.adapter.config, values={**ledger.adapter.config.values, "alphas": renamed})
    ledger.adapter = replace(ledger.adapter, config=config)
    kept = (name for name in names if name.role == "foreign" or len(found[name.module_path]) == 1)
    return [name if name.role == "foreign" else replace(name, module_path=found[name.module_path][0]) for name in kept]


def _index(disk: DiskNames) -> Mapping[str, dict[str, str]]:
    """Return flat path to the modules that it may be, each as its canonical path to the one to use."""
    index: dict[str, dict[str, str]] = defaultdict(dict)
    prefixes = sorted(base_prefixes(disk.model_types) or {"model", "transformer"})
    for name in (*disk.tensors, *disk.places):
        path = name.removesuffix(".weight")
        if path == name:
            continue
        canonical = disk.family.canonical(name)
        for spelled in _spellings(path, prefixes):
            index[spelled.replace(".", "_")].setdefault(canonical, path)
    return index


def _spellings(path: str, prefixes: Iterable[str]) -> Iterator[str]:
    yield path
    for prefix in prefixes:
        yield path.removeprefix(f"{prefix}.") if path.startswith(f"{prefix}.") else f"{prefix}.{path}"


def _module(path: str, index: Mapping[str, dict[str, str]]) -> list[str]:
    """Return the modules of the base that a path of the file may mean."""
    if "." in path:
        return [path]
    rests = [path, *(path.removeprefix(prefix) for prefix in PREFIXES if path.startswith(prefix))]
    modules: dict[str, str] = {}
    for rest in rests:
        for canonical, module in index.get(rest, {}).items():
            modules.setdefault(canonical, module)
    return list(modules.values())


def _unmatched(names: Iterable[AdapterTensorName], found: Mapping[str, list[str]]) -> Iterator[Problem]:
    """Yield a problem for each path that leads nowhere or to several modules; of many alike, for the first."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.module_path, name.text)
    strays: dict[str, list[str]] = defaultdict(list)
    for path, modules in found.items():
        if not modules:
            strays[_prefix(path)].append(path)
        elif len(modules) > 1:
            listed = ", ".join(map(quote, modules[:_MAX_CANDIDATES]))
            yield Problem(first[path], "one module of the base that has this flat name", f"{len(modules)}: {listed}")
    for prefix, paths in strays.items():
        hint = f"{prefix}* names a part of another model; split the file" if prefix and len(strays) < len(found) else ""
        more = f" of it, nor of {len(paths) - 1} others like it" if len(paths) > 1 else ""
        yield Problem(first[paths[0]], "a module of the base with this flat name", f"none{more}", hint)


def _doubled(names: Iterable[AdapterTensorName], found: Mapping[str, list[str]]) -> Iterator[Problem]:
    """Yield the tensors that mean what another does, as those of a pipeline's two text encoders do."""
    seen: dict[tuple[str, str], str] = {}
    for name in names:
        modules = found.get(name.module_path, [])
        if name.role == "foreign" or len(modules) != 1:
            continue
        other = seen.setdefault((modules[0], name.role), name.text)
        if other != name.text:
            hint = "a file for several models must be split, one for each"
            yield Problem(name.text, f"one tensor of its kind for {quote(modules[0])}", f"{quote(other)} as well", hint)


def _prefix(path: str) -> str:
    return max((prefix for prefix in PREFIXES if path.startswith(prefix)), key=len, default="")
