#!/usr/bin/env python3
"""Write rawmerge/families.json from the conversion tables of the installed transformers.

`python scripts/make_families.py` rewrites the file; with `--check` it exits 1 if the file differs.
rawmerge/families.py says what the parts of the file mean.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from transformers import conversion_mapping as tables
from transformers import core_model_loading as loading
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

TARGET = Path(__file__).parent.parent / "rawmerge" / "families.json"
_MODELS = Path(transformers.__file__).parent / "models"
_TRANSPOSED = re.compile(r"^@use_experts_implementation\(.*is_transposed=True", re.MULTILINE)

Rule = list[Any]


def whole_table() -> dict[str, list[loading.WeightTransform]]:
    """Return transformers' table by model type or class name, aliases included."""
    table: dict[str, list[loading.WeightTransform]] = tables._build_checkpoint_conversion_mapping()
    return table


def compiled(transform: loading.WeightTransform, place: int) -> str:
    """Return one source pattern as transformers compiles it, boundary included, without the named group around it."""
    pattern: str = transform.source_patterns[place].replace("*.", r".*\.")
    pattern += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
    if f"(?P<g{place}>{pattern})" not in transform.compiled_sources.pattern:
        raise SystemExit(f"transformers compiles {transform} otherwise: {transform.compiled_sources.pattern}")
    return pattern


def compiled_sources(transform: loading.WeightTransform) -> list[str]:
    """Return every source pattern as transformers compiles it."""
    return [compiled(transform, place) for place in range(len(transform.source_patterns))]


def glob(pattern: str) -> str:
    """Return an expert pattern as plain text in which `*` stands for the expert's number."""
    plain = pattern.replace(r"\.", ".")
    if not re.fullmatch(r"[\w.]*\.\*\.[\w.]*", plain):
        raise SystemExit(f"no plain expert pattern: {pattern}")
    return plain


def rename_rule(transform: loading.WeightRenaming) -> Rule:
    """Return the row of a rename; the guarded and the counting ones are not followed."""
    if type(transform) is loading.PrefixChange:
        prefix = transform.prefix_to_add or transform.prefix_to_remove
        return ["add" if transform.prefix_to_add else "remove", prefix, transform.model_prefix]
    if type(transform) is loading.LayerPairCollapse:  # its source pattern is wider than what it renames
        return ["unsupported", type(transform).__name__, [transform.pattern.pattern], transform.target_patterns]
    if type(transform) is not loading.WeightRenaming:
        return ["unsupported", type(transform).__name__, compiled_sources(transform), transform.target_patterns]
    branches = sorted(compiled_sources(transform), key=len, reverse=True)
    replacement = transform.target_patterns[0]
    if len(transform.target_patterns) > 1 or (len(branches) > 1 and "\\" in replacement):
        raise SystemExit(f"no plain rename: {transform}")
    return ["rename", "|".join(branches), replacement]


def converter_rule(transform: loading.WeightConverter) -> Rule:
    """Return the kind of layout change, by the operations' types and fields."""
    steps = [(type(step).__name__, vars(step)) for step in transform.operations]
    sources, targets = transform.source_patterns, transform.target_patterns
    match steps:
        case [("MergeModulelist", {"dim": 0})] if len(sources) == len(targets) == 1:
            return ["fuse", [glob(source) for source in sources], targets[0]]
        case [("MergeModulelist", {"dim": 0}), ("Concatenate", {"dim": 1, "num_shards_attribute": None})]:
            return ["fuse", [glob(source) for source in sources], targets[0]]
        case [("Chunk", {"dim": 0, "num_shards_attribute": None})]:
            return ["chunk", compiled_sources(transform), targets]
        case [("Concatenate", {"dim": 0, "num_shards_attribute": None})]:
            return ["concat", compiled_sources(transform), targets[0]]
        case [("Transpose", {"check_dims": True})] if sources == targets:
            return ["same", sources[0]]
    return ["unsupported", " + ".join(name for name, _ in steps), compiled_sources(transform), targets]


def rules(transforms: Iterable[loading.WeightTransform]) -> list[Rule]:
    """Return renames first and layouts after them, which is the order in which transformers applies them."""
    renames = [rename_rule(each) for each in transforms if isinstance(each, loading.WeightRenaming)]
    layouts = [converter_rule(each) for each in transforms if isinstance(each, loading.WeightConverter)]
    return renames + layouts


def families() -> list[dict[str, Any]]:
    """Return the distinct rule lists, each with the keys that share it."""
    shared: dict[str, dict[str, Any]] = {}
    for key, transforms in sorted(whole_table().items()):
        found = rules(transforms)
        shared.setdefault(json.dumps(found), {"keys": [], "rules": found})["keys"].append(key)
    return list(shared.values())


def auto_classes() -> dict[str, list[str]]:
    """Return model type -> classes that have rules of their own, from transformers' auto tables."""
    keys = whole_table().keys()
    found: dict[str, set[str]] = {}
    for name, table in vars(modeling_auto).items():
        if not name.endswith("_MAPPING_NAMES"):
            continue
        for model_type, classes in table.items():
            named = {classes} if isinstance(classes, str) else set(classes)
            found.setdefault(model_type, set()).update(named & keys)
    return {model_type: sorted(classes) for model_type, classes in sorted(found.items()) if classes}


def sources() -> Iterator[tuple[str, str]]:
    """Yield each model type with the modelling code of its package, as text."""
    text: dict[Path, str] = {}
    for model_type in sorted(CONFIG_MAPPING_NAMES):
        folder = _MODELS.joinpath(*model_type_to_module_name(model_type).split("."))
        if folder not in text:
            text[folder] = "".join(path.read_text() for path in sorted(folder.glob("modeling_*.py")))
        yield model_type, text[folder]


@lru_cache
def own_prefixes(text: str) -> list[tuple[str, str]]:
    """Return each base prefix of a modelling file with the config class it is for, or "" where many inherit it."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            body = "\n".join(ast.unparse(each) for each in node.body if isinstance(each, ast.Assign | ast.AnnAssign))
            prefix = re.search(r"^base_model_prefix(?:: str)? = '(\w+)'", body, re.MULTILINE)
            config = re.search(r"^(?:config: |config_class = )(\w+)", body, re.MULTILINE)
            if prefix:
                found.append((prefix[1], config[1] if config and not node.name.endswith("PreTrainedModel") else ""))
    return found


def base_prefixes() -> dict[str, list[str]]:
    """Return model type -> attributes under which its classes hold their bare model."""
    found: dict[str, list[str]] = {}
    for model_type, text in sources():
        mine = ("", CONFIG_MAPPING_NAMES[model_type])
        if prefixes := {prefix for prefix, config in own_prefixes(text) if config in mine}:
            found[model_type] = sorted(prefixes)
    return found


def transposed_experts() -> list[str]:
    """Return the model types whose experts are stored (expert, in, out)."""
    return [model_type for model_type, text in sources() if _TRANSPOSED.search(text)]


def by_key(table: dict[str, list[str]]) -> str:
    """Return one key per line."""
    return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())


def by_rule(table: list[dict[str, Any]]) -> str:
    """Return one rule per line."""
    blocks = []
    for family in table:
        lines = ",\n".join(f"    {json.dumps(rule)}" for rule in family["rules"])
        blocks.append(f'  {{"keys": {json.dumps(family["keys"])}, "rules": [\n{lines}\n  ]}}')
    return ",\n".join(blocks)


def document() -> str:
    """Return the whole file: one rule, one model type per line, so that a diff shows what moved."""
    return (
        f'{{\n "transformers": {json.dumps(transformers.__version__)},\n'
        f' "families": [\n{by_rule(families())}\n ],\n'
        f' "auto_classes": {{\n{by_key(auto_classes())}\n }},\n'
        f' "base_prefixes": {{\n{by_key(base_prefixes())}\n }},\n'
        f' "transposed_experts": {json.dumps(transposed_experts())}\n}}\n'
    )


def main() -> int:
    """Write the file, or compare it with what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the checked-in file differs")
    if not parser.parse_args().check:
        TARGET.write_text(document())
    elif TARGET.read_text() != document():
        sys.stderr.write(f"{TARGET.name} differs from transformers {transformers.__version__}: run {__file__}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
