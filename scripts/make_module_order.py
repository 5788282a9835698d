#!/usr/bin/env python3
"""Write rawmerge/module_order.json: the order in which transformers' models register their layers.

`python scripts/make_module_order.py` rewrites the file; with `--check` it exits 1 if the file differs.
rawmerge/matching/module_order.py says what the parts of the file mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

TARGET = Path(__file__).parent.parent / "rawmerge" / "module_order.json"
#: What is common; any type that AutoModel makes from a default config can stand here.
MODEL_TYPES = """
    bart bert bloom clip cohere cohere2 deberta deberta-v2 distilbert electra falcon gemma gemma2 gemma3 gemma3_text
    glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite llama mbart mistral mixtral mpt mt5 olmo olmo2 opt phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe roberta siglip smollm3 stablelm starcoder2 t5 vit whisper xlm-roberta
    """.split()  # noqa: SIM905  # a list would take a line for each
#: Heads that follow the bare model; whatever else a class registers is not known.
HEADS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForSpeechSeq2Seq,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForImageClassification,
)
LAYERS = (torch.nn.Linear, torch.nn.Embedding, Conv1D)

Tree = dict[str, Any]


def layer_names(auto: Any, model_type: str) -> tuple[list[str], str]:
    """Return the layers of a type's model in the order of `named_modules`, and where it holds its bare model."""
    with torch.device("meta"):
        model = auto.from_config(transformers.AutoConfig.for_model(model_type))
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    prefix = model.base_model_prefix
    return names, f"{prefix}." if hasattr(model, prefix) and getattr(model, prefix) is not model else ""


def insert(tree: Tree, name: str) -> None:
    """Put a layer behind all that the tree holds; one entry stands for all numbers."""
    for segment in name.split("."):
        tree = tree.setdefault("*" if segment.isdigit() else segment, {})


def place(tree: Tree, name: str) -> list[tuple[int, int]]:
    """Return what a layer is sorted by: in each level, which child it is of, and its number."""
    found = []
    for segment in name.split("."):
        folded = "*" if segment.isdigit() else segment
        found.append((list(tree).index(folded), int(segment) if segment.isdigit() else 0))
        tree = tree[folded]
    return found


def tree_of(names: Iterable[str]) -> Tree:
    """Return the tree, which must give back the order that it was made from."""
    names, tree = list(names), {}
    for name in names:
        insert(tree, name)
    if sorted(names, key=lambda name: place(tree, name)) != names:
        raise SystemExit(f"no tree has this order: {names}")
    return tree


def head_names(model_type: str, base: list[str]) -> Iterator[str]:
    """Yield the layers behind the bare model in each class with a head that holds the same bare model first."""
    for auto in HEADS:
        if transformers.AutoConfig.for_model(model_type).__class__ in auto._model_mapping:
            names, prefix = layer_names(auto, model_type)
            own = [f"{prefix}{name}" for name in base]
            if names[: len(own)] == own:
                yield from names[len(own) :]


def document() -> str:
    """Return the whole file: one distinct order per line."""
    shared: dict[str, list[str]] = {}
    for model_type in MODEL_TYPES:
        base, _ = layer_names(transformers.AutoModel, model_type)
        heads: Tree = {}
        for name in head_names(model_type, base):
            insert(heads, name)
        entry = json.dumps({"base": tree_of(base), "heads": heads}, separators=(",", ":"))
        shared.setdefault(entry, []).append(model_type)
    lines = ",\n".join(f'  {{"types": {json.dumps(types)}, {entry[1:]}' for entry, types in shared.items())
    return f'{{\n "transformers": {json.dumps(transformers.__version__)},\n "orders": [\n{lines}\n ]\n}}\n'


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
