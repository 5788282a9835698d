"""What a stranger's names may do to a terminal: nothing, whichever command shows them, and wherever they come from."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from rawmerge.cli import cli
from rawmerge.formats import adapter_fields
from tests.builders import PREFIX, layered_merge, lora_pair, random_tensor, write_adapter, write_base

#: Colours, bell, backspace, a line that looks like one of ours, C1's "control sequence", turns of direction, a line
#: separator, delete.
HOSTILE = "x\x1b[31m\x07\b\r\nFORGED\x9b2J\u202e\u2066\u2028\x7fy"
#: What else may not come through: NUL, which no path holds, and half a character, which no JSON file of ours may hold.
HOSTILE_TEXTS = [HOSTILE, f"{HOSTILE}\0"]
SHAPES: list[Callable[[str], Any]] = [
    lambda text: text,
    lambda text: [text],
    lambda text: {text: text},
    lambda text: {text: [text]},
    lambda text: [[text], {text: 3}],
    lambda text: {text: {text: None}},
]
Paths = tuple[Path, Path]


def run(*arguments: object) -> Result:
    """Run the command line, and look at what it prints; click must not cut out what looks like a colour."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    for line in [*result.stdout.split("\n"), *result.stderr.split("\n")]:
        assert line.isprintable(), arguments
        assert not line.startswith("FORGED"), arguments
    return result


def run_all(base: Path, adapter: Path, output: Path | None = None) -> list[int]:
    """Run what looks at a base, an adapter and an output, as text and as JSON; return the exit codes."""
    commands: list[list[object]] = [
        ["plan", base, adapter],
        ["plan", base, adapter, "--force", "--dtype", "float32"],
        ["inspect", base],
        ["inspect", adapter],
        ["verify", output or base],
        ["verify", output or base, "--base", base, "--adapter", adapter],
    ]
    return [run(*command, *form).exit_code for command in commands for form in ([], ["--json"])]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def variants(path: Path, fields: list[str]) -> Iterator[None]:
    """Write a JSON file once for each field and shape of a hostile value; put it back at the end."""
    before = path.read_text()
    for name in [*fields, HOSTILE]:
        for shape in SHAPES:
            write_json(path, {**json.loads(before), name: shape(HOSTILE)})
            yield
    path.write_text(before)


def adapter_field_names() -> list[str]:
    known = (adapter_fields.SUPPORTED_FIELDS, adapter_fields.IGNORED_FIELDS, adapter_fields.REFUSED_FIELDS)
    variants = adapter_fields.LORA_VARIANT_FIELDS
    return sorted({*(name for names in known for name in names), *variants.followed, *variants.ignored})


def test_no_field_of_an_adapter_s_config_reaches_the_terminal(tiny: Paths) -> None:
    base, adapter = tiny
    commands: list[list[object]] = [["plan", base, adapter], ["inspect", adapter]]
    at = variants(adapter / "adapter_config.json", adapter_field_names())
    assert {run(*command).exit_code for _ in at for command in commands} == {0, 3}


def test_no_field_of_a_base_s_config_reaches_the_terminal(tiny: Paths) -> None:
    names = ["model_type", "dtype", "torch_dtype", "architectures", "vocab_size", "text_config", "num_hidden_layers"]
    names += ["tie_word_embeddings", "quantization_config", "layer_types"]
    commands: list[list[object]] = [["plan", *tiny], ["inspect", tiny[0]], ["verify", tiny[0]]]
    codes = {run(*command).exit_code for _ in variants(tiny[0] / "config.json", names) for command in commands}
    assert 0 in codes


def test_no_field_of_an_output_s_record_reaches_the_terminal(tiny: Paths, tmp_path: Path) -> None:
    assert run("merge", *tiny, "-o", tmp_path / "out").exit_code == 0
    record = tmp_path / "out/rawmerge.json"
    commands: list[list[object]] = [["verify", tmp_path / "out"], ["plan", tmp_path / "out", tiny[1]]]
    commands += [["verify", tmp_path / "out", "--base", tiny[0], "--adapter", tiny[1]]]
    at = variants(record, list(json.loads(record.read_text())))
    assert {0, 3, 5} <= {run(*command).exit_code for _ in at for command in commands}


BROKEN_JSON = [
    HOSTILE.encode(),
    b"{" + HOSTILE.encode(),
    b'{"' + HOSTILE.encode() + b'": 1}',
    json.dumps({HOSTILE: 1})[:-1].encode(),
    (json.dumps({HOSTILE: 1})[:-1] + "," + json.dumps({HOSTILE: 2})[1:]).encode(),
    b'{"\\ud800": 1}',
    b"\xff\x1b",
]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "rawmerge.json", "SHA256SUMS"])
def test_no_broken_file_of_an_output_reaches_the_terminal(tiny: Paths, tmp_path: Path, name: str) -> None:
    assert run("merge", *tiny, "-o", tmp_path / "out", "--checksum").exit_code == 0
    for raw in BROKEN_JSON:
        (tmp_path / "out" / name).write_bytes(raw)
        assert {3, 5} & set(run_all(tmp_path / "out", tiny[1]))


def test_no_broken_config_of_an_adapter_reaches_the_terminal(tiny: Paths) -> None:
    for raw in BROKEN_JSON:
        (tiny[1] / "adapter_config.json").write_bytes(raw)
        assert 3 in run_all(*tiny)


def test_no_name_in_a_list_of_checksums_reaches_the_terminal(tiny: Paths, tmp_path: Path) -> None:
    assert run("merge", *tiny, "-o", tmp_path / "out").exit_code == 0
    told = b"x\\n" + HOSTILE.replace("\n", "").replace("\r", "").encode()
    for name in (b"\\%s  %s", b"%s  %s", b"%s  ../%s"):
        parts = (b"0" * 64, told)
        (tmp_path / "out/SHA256SUMS").write_bytes(name % parts + b"\n")
        assert run("verify", tmp_path / "out").exit_code == 5


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_no_text_in_a_tensor_file_reaches_the_terminal(tiny: Paths, tmp_path: Path, text: str) -> None:
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    half, late = ({**entry, "shape": [8], "data_offsets": offsets} for offsets in ([0, 32], [16, 48]))
    headers: list[dict[str, Any]] = [
        {text: {**entry, "dtype": text}},
        {text: {**entry, "shape": [text]}},
        {text: {**entry, text: 1}},
        {text: text},
        {text: half, f"{text}2": late},
        {text: entry, "__metadata__": {text: text}},
        {text: entry, "__metadata__": {text: 1}},
        {text: entry, "__metadata__": text},
        {f"lora_unet_{text}.lora_down.weight": entry, "__metadata__": {"ss_network_module": text}},
        {f"{PREFIX}{text}.lora_A.weight": {**entry, "shape": [4, 4]}, "__metadata__": {"lora_adapter_metadata": text}},
    ]
    single = tmp_path / "one.safetensors"
    codes = []
    for header in headers:
        write_header(single, json.dumps(header).encode())
        codes += [*run_all(tiny[0], single), *run_all(single, tiny[1])]
    for raw in BROKEN_JSON:
        write_header(single, raw)
        codes += [*run_all(tiny[0], single), *run_all(single, tiny[1])]
    assert {0, 3} <= set(codes)


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_no_name_of_an_adapter_s_tensor_reaches_the_terminal(tiny: Paths, tmp_path: Path, text: str) -> None:
    names = [text, f"{PREFIX}{text}", f"{PREFIX}{text}.lora_A.weight", f"{PREFIX}{text}.modules_to_save.weight"]
    names += [f"{PREFIX}e.lora_embedding_A.{text}", f"{PREFIX}q.{text}.weight", f"lora_unet_{text}.lora_down.weight"]
    for form in ("safetensors", "pickle"):
        for number, name in enumerate(names):
            folder = tmp_path / f"{form}{number}"
            tensors = {**lora_pair("model.layers.0.q_proj", 12, 8), name: torch.ones(4, 8)}
            write_adapter(folder, tensors)
            if form == "pickle":
                (folder / "adapter_model.safetensors").unlink()
                torch.save(tensors, folder / "adapter_model.bin")
            assert 3 in run_all(tiny[0], folder)


@pytest.fixture
def hostile(tmp_path: Path) -> Paths:
    """Return a base and an adapter of which every name that may be so is hostile: files, tensors, folders, texts."""
    path, text = f"model.{HOSTILE}.0.q_proj", HOSTILE
    first = {f"{path}.weight": random_tensor((12, 8)), f"n{text}": random_tensor((8,))}
    config = {"model_type": text, "dtype": "bfloat16", "architectures": [text]}
    base = write_base(tmp_path / "base", [first, {f"z{text}": random_tensor((4,))}], config, {text: text})
    (base / f"sub{text}").mkdir()
    for name in (text, f"{text}.py", f"{text}.gguf", f"sub{text}/f{text}", f".{text}"):
        (base / name).write_text(text)
    save_file({text: torch.ones(3)}, base / f"{text}.safetensors", metadata={text: text})
    (base / f"link{text}").symlink_to(f"nowhere{text}")
    os.mkfifo(base / f"pipe{text}")
    return base, write_adapter(tmp_path / "adapter", lora_pair(path, 12, 8), base_model_name_or_path=text)


WAYS = [[], ["--link"], ["--checksum", "--verify"], ["--dtype", "float32"], ["--consume-base"], ["--json"]]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_a_whole_merge_of_hostile_names_shows_none(hostile: Paths, tmp_path: Path, way: list[str]) -> None:
    base, adapter = hostile
    shutil.copytree(base, tmp_path / "copy", symlinks=True, copy_function=shutil.copy2, ignore=_pipes)
    merge = ["merge", base, adapter, "-o", tmp_path / "out", "--force", *way]
    assert run(*merge, "--dry-run").exit_code == 0
    done = run(*merge)
    assert done.exit_code == 0
    assert "left out" in done.stderr
    assert "trained on 'x\\x1b" in done.stderr + done.stdout.encode().decode("unicode_escape").replace("\x1b", "\\x1b")
    assert run(*merge).exit_code == 3
    assert set(run_all(tmp_path / "copy", adapter, tmp_path / "out")) == {0}


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def test_findings_in_hostile_names_show_none(hostile: Paths) -> None:
    """The base is no merge of itself: each of its tensors that should differ is named."""
    assert 5 in run_all(*hostile, output=hostile[0])


FOLDER_COMMANDS = [
    ["merge", "BASE", "ADAPTER", "-o", "BASE/out"],
    ["merge", "BASE", "ADAPTER", "-o", "ADAPTER"],
    ["merge", "BASE", "ADAPTER", "-o", "there", "--overwrite"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--json"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--dry-run"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--link", "--dry-run"],
    ["merge", "BASE", "ADAPTER", "-o", "out", "--consume-base", "--dry-run"],
    ["demo", "new", "--json"],
    ["demo", "there"],
    ["inspect", "."],
    ["inspect", "nothing"],
    ["plan", "nothing", "nothing"],
    ["verify", "nothing"],
    ["verify", "there"],
    ["verify", "BASE", "--base", "BASE", "--adapter", "ADAPTER"],
]


@pytest.mark.parametrize("command", FOLDER_COMMANDS, ids=" ".join)
def test_a_folder_of_a_hostile_name_is_not_shown_raw(tmp_path: Path, command: list[str]) -> None:
    folder = tmp_path / HOSTILE
    base, adapter = layered_merge(folder)
    (folder / "there").mkdir()
    (folder / "there/work.txt").touch()
    paths = {"BASE": base, "ADAPTER": adapter, "BASE/out": base / "out"}
    made = {name: folder / name for name in ("out", "there", "nothing", "new", ".")}
    run(*(str({**paths, **made}.get(part, part)) for part in command))


def test_every_command_s_own_wrong_usage_is_told_in_printable_text() -> None:
    for command in ("merge", "plan", "inspect", "verify", "demo", HOSTILE):
        for extra in ([f"--{HOSTILE}"], [f"-{HOSTILE}"], [f"--dtype={HOSTILE}"], [f"--max-memory={HOSTILE}"]):
            assert run(command, *extra).exit_code == 2


BAR = """
import sys, time
from rawmerge.progress_bar import progress_bar
from rawmerge.engine.jobs import Progress
with progress_bar(8) as show:
    for done in (1, 8):
        time.sleep(0.12)  # tqdm draws ten times a second
        show(Progress(done, 8, sys.argv[1], sys.argv[1]))
"""
DRAWN = re.compile(r"(\r|\n|\x1b\[A|[ -~]|[█▏▎▍▌▋▊▉])*")  # lines of plain text, and what tqdm itself draws with


def on_terminal(*arguments: object) -> str:
    """Run Python on a terminal of 24 lines and 300 columns; return what came there."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 300, 0, 0))
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        drawn = b"".join(iter(lambda: _read(controller), b""))
    os.close(controller)
    assert process.returncode == 0
    return drawn.decode()


def _read(controller: int) -> bytes:
    try:
        return os.read(controller, 65536)
    except OSError:  # how Linux tells that the last writer closed the terminal
        return b""


def test_a_tensor_s_name_in_the_bar_does_not_reach_the_terminal() -> None:
    drawn = on_terminal("-c", BAR, HOSTILE)
    assert r"x\x1b[31m\x07\x08\r\nFORGED\x9b2J" in drawn
    assert DRAWN.fullmatch(drawn)


def test_the_output_is_told_raw_to_programs_and_escaped_on_a_terminal(tiny: Paths, tmp_path: Path) -> None:
    output = os.path.join(tmp_path, f"{HOSTILE}\udcff")  # noqa: PTH118  # and a byte that is no UTF-8
    merge = ["-m", "rawmerge", "merge", *tiny, "--overwrite", "-o"]
    drawn = on_terminal(*merge, output)
    assert "FORGED" in drawn
    assert "\nFORGED" not in drawn
    assert DRAWN.fullmatch(drawn)
    piped = subprocess.run(
        [sys.executable, *map(str, merge), output],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (piped.returncode, piped.stdout) == (0, os.fsencode(output) + b"\n")
