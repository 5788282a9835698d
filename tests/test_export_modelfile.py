"""Modelfiles: golden texts that follow from LLaMA-Factory's templates, and where their tokens come from.

That of llama3 is LLaMA-Factory's own test's (`tests/data/test_template.py`), but for the comment in the first line; the
others are put together by hand from `data/template.py` by the rules of `get_ollama_modelfile`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rawmerge.exporting.chat_templates import BOS, CHAT_TEMPLATES, CONTENT, EOS, SYSTEM
from rawmerge.exporting.modelfile import modelfile_text
from rawmerge.exporting.tokenizer_tokens import SpecialTokens, read_special_tokens
from rawmerge.formats.strict_json import StrictJsonError
from rawmerge.output.side_files import SideFile

LLAMA3_TOKENS = SpecialTokens(
    "<|begin_of_text|>", "<|end_of_text|>", {"<|begin_of_text|>": 128000, "<|eom_id|>": 128008, "<|eot_id|>": 128009}
)
HEAD = "# ollama modelfile, as llamafactory writes it\n\nFROM .\n\n"

LLAMA3 = (
    'TEMPLATE """<|begin_of_text|>'
    "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}'
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "<|eom_id|>"\n'
    'PARAMETER stop "<|eot_id|>"\n'
    "PARAMETER num_ctx 4096\n"
)
QWEN = (
    'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n\n'
    'SYSTEM """You are Qwen, created by Alibaba Cloud. You are a helpful assistant."""\n\n'
    'PARAMETER stop "<|im_end|>"\n'
    "PARAMETER num_ctx 4096\n"
)
CHATML = (
    'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "<|im_end|>"\n'
    'PARAMETER stop "<|im_start|>"\n'
    "PARAMETER num_ctx 4096\n"
)
MISTRAL = (
    'TEMPLATE """<s>{{ if .System }}{{ .System }}\n\n{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }}[/INST]'
    '{{ else if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "</s>"\n'
    "PARAMETER num_ctx 4096\n"
)
GEMMA = (
    'TEMPLATE """<bos>{{ if .System }}{{ .System }}\n\n{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}'
    "<start_of_turn>user\n{{ .Content }}<end_of_turn>\n<start_of_turn>model\n"
    '{{ else if eq .Role "assistant" }}{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "<end_of_turn>"\n'
    "PARAMETER num_ctx 4096\n"
)
PHI = (
    'TEMPLATE """{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n<|assistant|>\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "<|end|>"\n'
    "PARAMETER num_ctx 4096\n"
)
GLM4 = (
    'TEMPLATE """[gMASK]<sop>{{ if .System }}<|system|>\n{{ .System }}{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<|user|>\n{{ .Content }}<|assistant|>'
    '{{ else if eq .Role "assistant" }}\n{{ .Content }}{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "<|endoftext|>"\n'
    'PARAMETER stop "<|user|>"\n'
    'PARAMETER stop "<|observation|>"\n'
    "PARAMETER num_ctx 4096\n"
)
ZEPHYR = (
    'TEMPLATE """{{ if .System }}<|system|>\n{{ .System }}</s>{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<|user|>\n{{ .Content }}</s><|assistant|>\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ end }}{{ end }}"""\n\n'
    'SYSTEM """You are Zephyr, a helpful assistant."""\n\n'
    'PARAMETER stop "</s>"\n'
    "PARAMETER num_ctx 4096\n"
)
DEEPSEEK3 = (
    'TEMPLATE """<s>{{ if .System }}{{ .System }}{{ end }}'
    '{{ range .Messages }}{{ if eq .Role "user" }}<｜User｜>{{ .Content }}<｜Assistant｜>'  # noqa: RUF001
    '{{ else if eq .Role "assistant" }}{{ .Content }}</s>{{ end }}{{ end }}"""\n\n'
    'PARAMETER stop "</s>"\n'
    "PARAMETER num_ctx 4096\n"
)
SENTENCE = SpecialTokens("<s>", "</s>", {})


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("llama3", LLAMA3_TOKENS, LLAMA3),
        ("qwen", SpecialTokens("", "<|endoftext|>", {}), QWEN),
        ("chatml", SpecialTokens("<s>", "</s>", {}), CHATML),
        ("mistral", SENTENCE, MISTRAL),
        ("gemma", SpecialTokens("<bos>", "<eos>", {}), GEMMA),
        ("phi", SENTENCE, PHI),
        ("glm4", SpecialTokens("", "<|endoftext|>", {}), GLM4),
        ("zephyr", SENTENCE, ZEPHYR),
        ("deepseek3", SENTENCE, DEEPSEEK3),
    ],
)
def test_the_text_is_llamafactory_s(name: str, tokens: SpecialTokens, expected: str) -> None:
    assert modelfile_text(CHAT_TEMPLATES[name], tokens) == HEAD + expected


def test_stop_words_come_in_the_order_of_a_set_of_numbers() -> None:
    # 151645 % 8 = 5, 151644 % 8 = 4: the order in which a small set of them is walked through
    tokens = SpecialTokens("", "", {"<|im_start|>": 151644, "<|im_end|>": 151645})
    stops = [line for line in modelfile_text(CHAT_TEMPLATES["chatml"], tokens).splitlines() if "stop" in line]
    assert stops == ['PARAMETER stop "<|im_start|>"', 'PARAMETER stop "<|im_end|>"']


def test_a_tokenizer_without_an_end_token_gets_the_usual_one() -> None:
    assert 'PARAMETER stop "<|endoftext|>"' in modelfile_text(CHAT_TEMPLATES["mistral"], SpecialTokens("", "", {}))


@pytest.mark.parametrize(("given", "line"), [("Be brief.", 'SYSTEM """Be brief."""'), ("", None)])
def test_the_system_message_is_the_one_that_is_given(given: str, line: str | None) -> None:
    text = modelfile_text(CHAT_TEMPLATES["qwen"], SENTENCE, given)
    assert [found for found in text.splitlines() if found.startswith("SYSTEM")] == ([line] if line else [])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_says_each_message_once(name: str) -> None:
    template = CHAT_TEMPLATES[name]
    assert template.user.count(CONTENT) == template.assistant.count(CONTENT) == template.system.count(SYSTEM) == 1
    assert bool(template.stops) or not template.replaces_eos
    made = modelfile_text(template, SENTENCE)
    assert BOS not in made
    assert EOS not in made
    assert made.count('"""') == (4 if template.default_system else 2)


# --- tokens ---


def side_files(folder: Path, **texts: Any) -> list[SideFile]:
    made = []
    for name, content in texts.items():
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        made.append(SideFile(path.name, str(path), path.stat().st_size))
    return made


def test_tokens_are_texts_or_tables_and_their_numbers_are_found(tmp_path: Path) -> None:
    config = {
        "bos_token": None,
        "eos_token": {"content": "<e>", "lstrip": False},
        "added_tokens_decoder": {"7": {"content": "<e>"}, "x": {"content": "<x>"}, "8": {}, "9": "<n>"},
    }
    found = read_special_tokens(side_files(tmp_path, tokenizer_config=config))
    assert found == SpecialTokens("", "<e>", {"<e>": 7, "<n>": 9})


def test_older_tokenizers_tell_in_other_files(tmp_path: Path) -> None:
    added = [{"id": 3, "content": "</s>"}, {"id": "4", "content": "<x>"}, {"id": True, "content": "<y>"}, 5]
    files = side_files(
        tmp_path,
        tokenizer_config={},
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        tokenizer={"added_tokens": added},
    )
    assert read_special_tokens(files) == SpecialTokens("<s>", "</s>", {"</s>": 3})


def test_without_a_config_there_are_no_tokens(tmp_path: Path) -> None:
    assert read_special_tokens(side_files(tmp_path, tokenizer={})) is None


@pytest.mark.parametrize("odd", [{"added_tokens_decoder": [1]}, {"bos_token": 3}, {"eos_token": {"content": 3}}])
def test_odd_configs_tell_no_tokens(tmp_path: Path, odd: dict[str, Any]) -> None:
    assert read_special_tokens(side_files(tmp_path, tokenizer_config=odd)) == SpecialTokens("", "", {})


def test_a_broken_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StrictJsonError):
        read_special_tokens(side_files(tmp_path, tokenizer_config="{"))
