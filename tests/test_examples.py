"""The documents' examples work as they are written, one after the other in one folder, as a reader pastes them.

Bases and adapters lie there under the names that the examples use. What they write is read by the safetensors library,
and verified.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import rawmerge
from rawmerge.cli import cli
from tests.builders import PREFIX, lora_pair, merged, raw, read_all, tiny_merge, write_adapter
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "benchmarks/README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(rawmerge [^`]+)`")
#: How each block begins that is no example for this folder, and why.
NO_EXAMPLES = {
    "scripts/demo ": "sets up an environment, and runs these tests",
    "BASE ─────► base_checkpoint": "a picture",
    "python scripts/fuzz.py ": "needs atheris, and takes half an hour",
}
#: What the file `llamafactory.yaml` of the examples holds; that of `merge.yaml` is in README.
LLAMAFACTORY = "model_name_or_path: base/\nadapter_name_or_path: adapter/\ntemplate: llama3\nexport_dir: exported/\n"
Q = ("model.layers.0.q_proj", "model.layers.1.q_proj")
FILES = {"BASE": "base/", "ADAPTER": "adapter/", "OUTPUT": "merged/"}


def blocks() -> list[tuple[str, str]]:
    """Return language and text of each block of the documents, in order."""
    return [block for name in DOCUMENTS for block in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))]


def is_example(language: str, text: str) -> bool:
    return not text.startswith(tuple(NO_EXAMPLES)) and language != "yaml"


def examples() -> list[tuple[str, str]]:
    return [block for block in blocks() if is_example(*block)]


def spans() -> list[str]:
    """Return each `rawmerge …` that stands within a sentence or a table."""
    found = (SPAN.findall((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS)
    return sorted({text for texts in found for text in texts})


def is_whole(text: str) -> bool:
    """Whether a span can be run: it has arguments, and none of them stands for something unsaid."""
    return len(text.split()) > 2 and not re.search(r"…|\[|NAME", text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with what the examples are given."""
    base, adapter = tiny_merge(tmp_path)
    for path in (base, adapter):
        (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    for seed, name in enumerate("abc", 5):
        write_adapter(tmp_path / name, lora_pair(Q[0], 12, 8, seed=seed) | lora_pair(Q[1], 12, 8, seed=seed + 9))
    (given,) = (text for language, text in blocks() if language == "yaml")
    (tmp_path / "merge.yaml").write_text(given)
    shutil.copytree(base, tmp_path / "meta-llama/Meta-Llama-3-8B-Instruct")
    shutil.copytree(adapter, tmp_path / "saves/llama3-8b/lora/sft")
    (tmp_path / "llamafactory.yaml").write_text(LLAMAFACTORY)
    kohya = {"lora_te_model_layers_0_q_proj.lora_down.weight": torch.ones(4, 8) / 64}
    kohya |= {"lora_te_model_layers_0_q_proj.lora_up.weight": torch.ones(12, 4) / 64}
    save_file(kohya, tmp_path / "lora.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """Serve the repositories that examples name; yields the environment of a process that asks it."""
    with FakeHub() as served:
        served.commit("org/base", folder / "base")
        served.commit("org/lora", folder / "adapter")
        own = {"HF_ENDPOINT": served.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        kept = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        yield kept | own | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}


def run_line(line: str, folder: Path) -> None:
    """Do what a shell would with a line of an example; it must end well."""
    _, *arguments = shlex.split(line, comments=True)
    if not any(argument.startswith("org/") for argument in arguments):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)
        return
    with hub(folder) as environment:
        command = [sys.executable, "-m", "rawmerge", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, (line, result.stderr)


def job_of(line: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Return the output that a line makes, its base and its adapters; None where it makes no merge of those."""
    _, name, *arguments = shlex.split(line, comments=True)
    values: dict[str, Any] = cli.commands[name].make_context(name, arguments).params if name != "inspect" else {}
    if name == "export":
        job = rawmerge.read_export(values["file"], values["overrides"])
        return job.output, job.base, job.adapters
    return (str(values["output"]), values["base"], values["adapters"]) if name == "merge" else None


def check_output(output: str, base: str, adapters: tuple[str, ...]) -> None:
    """The output is whole, and what its base and adapters give."""
    assert read_all(Path(output)).keys() == read_all(Path("base")).keys()
    assert rawmerge.verify_merge(output).findings == ()
    if Path(base).exists():  # else it came from the hub
        assert rawmerge.verify_merge(output, base, adapters).findings == ()


def formula(adapter: str) -> dict[str, torch.Tensor]:
    """Return what base and adapter give by the formula, without rawmerge."""
    base, pairs = read_all(Path("base")), read_all(Path(adapter))
    for path in Q:
        lora_a, lora_b = (pairs[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")
        base[f"{path}.weight"] = merged(base[f"{path}.weight"], lora_a, lora_b, 1.5)
    return base


def test_every_block_is_run_or_no_example() -> None:
    assert all(any(text.startswith(start) for _, text in blocks()) for start in NO_EXAMPLES)
    assert {language for language, _ in examples()} == {"", "python"}
    assert all(
        line.startswith("rawmerge ") for language, text in examples() if not language for line in text.splitlines()
    )


def test_the_examples_run_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, text in examples():
        if language == "python":
            exec(compile(text, "example", "exec"), {"__name__": "example"})
            continue
        for line in text.splitlines():
            run_line(line, folder)
            if job := job_of(line):
                check_output(*job)
    expected = {name: raw(tensor) for name, tensor in formula("adapter").items()}
    for output in ("merged", "out", "out-export", "merged-lora"):
        assert {name: raw(tensor) for name, tensor in read_all(Path(output)).items()} == expected
    told = capsys.readouterr().out.splitlines()
    assert told.count("()") == 2  # nothing found, nothing left
    assert any(line.endswith("True") for line in told)


def test_the_library_s_outputs_are_what_their_inputs_give(folder: Path) -> None:
    for language, text in examples():
        if language == "python":
            exec(compile(text, "example", "exec"), {"__name__": "example"})
    check_output("out-f16", "base", ("adapter",))
    check_output("out-sum", "base", ("a/", "b/:0.5"))
    check_output("out-ties", "base", ("a/", "b/", "c/:-1"))
    check_output("out-export", "base", ("adapter",))
    assert Path("out-export/Modelfile").exists()


@pytest.mark.parametrize("text", [text for text in spans() if is_whole(text)])
def test_commands_within_sentences_run(text: str, folder: Path) -> None:
    line = " ".join(FILES.get(word, word) for word in text.split())
    job = job_of(line)
    if job is None:
        rawmerge.merge_adapter("base/", "adapter/", "merged/")
    run_line(line, folder)
    if job:
        check_output(*job)


@pytest.mark.parametrize("text", [text for text in spans() if not is_whole(text)])
def test_commands_that_are_hinted_at_exist(text: str) -> None:
    _, name, *words = text.split()
    options = {
        name
        for parameter in cli.commands[name].params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    assert {word for word in words if word.startswith("-")} <= options
