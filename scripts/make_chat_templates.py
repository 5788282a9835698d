#!/usr/bin/env python3
"""Write rawmerge/chat_templates.json and the goldens of tests/test_export_modelfile.py from LLaMA-Factory's own code.

`python scripts/make_chat_templates.py FOLDER...` takes unpacked wheels of `llamafactory`, the newest first: older ones
give what newer ones dropped. `pip download --no-deps llamafactory==0.9.5` fetches one; nothing of it is installed, and
what its templates do not need is replaced by empty modules. Goldens come from its `get_ollama_modelfile`, with a
tokenizer of transformers' whose tokens are `<s>`, `</s>` and the stop words of all templates.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "rawmerge" / "chat_templates.json"
GOLDENS = ROOT / "tests" / "modelfiles.json"
#: Where nothing is said of a template's part: the defaults of `ChatTemplate`.
DEFAULTS = {
    "user": "{{ .Content }}",
    "assistant": "{{ .Content }}{eos}",
    "system": "{{ .System }}",
    "prefix": "",
    "default_system": "",
    "stops": [],
    "replaces_eos": False,
}
MARKS = SimpleNamespace(bos_token="{bos}", eos_token="{eos}", bos_token_id=1, eos_token_id=2)
#: The vocabulary starts with so many tokens, so that stop words have numbers above those of a small set's table.
FILLERS = 100


def stub(name: str, **names: Any) -> None:
    """Put a module of these names where imports look first."""
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(names)


def load_templates(folder: Path) -> ModuleType:
    """Return `llamafactory.data.template` of a wheel, without data sets, images and logging."""
    for name in [name for name in sys.modules if name.startswith("llamafactory")]:
        del sys.modules[name]
    stub("datasets", DatasetDict=None, concatenate_datasets=None, interleave_datasets=None)
    stub("fsspec")
    for name in ("llamafactory", "llamafactory.data", "llamafactory.extras"):
        stub(name, __path__=[str(folder / name.replace(".", "/"))])
    quiet = SimpleNamespace(info_rank0=lambda _: None, warning_rank0=lambda _: None)
    stub("llamafactory.extras.logging", get_logger=lambda _: quiet)
    sys.modules["llamafactory.extras"].logging = sys.modules["llamafactory.extras.logging"]  # type: ignore[attr-defined]
    stub("llamafactory.data.mm_plugin", get_mm_plugin=lambda *_, **__: None)
    return importlib.import_module("llamafactory.data.template")


def parts(template: Any) -> dict[str, Any]:
    """Return what differs from `DEFAULTS`; ValueError where the template names tokens by number."""
    found = {
        "user": template._convert_slots_to_ollama(template.format_user.apply(), MARKS, ".Content"),
        "assistant": template._convert_slots_to_ollama(template.format_assistant.apply(), MARKS, ".Content"),
        "system": template._convert_slots_to_ollama(template.format_system.apply(), MARKS, ".System"),
        "prefix": template._convert_slots_to_ollama(template.format_prefix.apply(), MARKS),
        "default_system": template.default_system,
        "stops": list(template.stop_words),
        "replaces_eos": template.replace_eos,
    }
    return {key: value for key, value in found.items() if value != DEFAULTS[key]}


def tables(module: ModuleType) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each template that can be written for ollama."""
    for name, template in module.TEMPLATES.items():
        try:
            yield name, parts(template)
        except ValueError as error:
            sys.stderr.write(f"{name}: {error}\n")


def vocabulary(made: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return the numbers of the tokens that goldens are made with."""
    stops = sorted({word for parts in made.values() for word in parts.get("stops", ())})
    words = ["<unk>", "<s>", "</s>", *(f"<{number}>" for number in range(3, FILLERS)), "<|endoftext|>", *stops]
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def golden(module: ModuleType, name: str, numbers: Mapping[str, int], **tokens: str) -> str:
    """Return the Modelfile that LLaMA-Factory writes beside a model whose tokenizer it has set up for a template."""
    words = Tokenizer(WordLevel(dict(numbers), unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **tokens)
    choices = {"train_on_prompt": False, "tool_format": None, "default_system": None}
    data_args = SimpleNamespace(template=name, enable_thinking=True, preserve_thinking=False, **choices)
    template = module.get_template_and_fix_tokenizer(tokenizer, data_args)
    return str(template.get_ollama_modelfile(tokenizer))


def version_of(folder: Path) -> str:
    """Return the version that a wheel's own folder names."""
    (found,) = folder.glob("llamafactory-*.dist-info")
    return found.name.removeprefix("llamafactory-").removesuffix(".dist-info")


def main() -> None:
    """Write both files."""
    made: dict[str, dict[str, Any]] = {}
    origins: dict[str, Path] = {}
    for folder in map(Path, sys.argv[1:]):
        for name, table in tables(load_templates(folder)):
            if made.setdefault(name, table) is table:
                origins[name] = folder
    numbers = vocabulary(made)
    goldens: dict[str, Any] = {"ids": {word: number for word, number in numbers.items() if not word[1:-1].isdecimal()}}
    for folder in map(Path, sys.argv[1:]):
        module = load_templates(folder)
        goldens[version_of(folder)] = {
            name: [golden(module, name, numbers, bos_token="<s>", eos_token="</s>"), golden(module, name, numbers)]
            for name in sorted(made)
            if origins[name] == folder
        }
    for path, content in ((TABLE, dict(sorted(made.items()))), (GOLDENS, goldens)):
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
