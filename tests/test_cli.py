"""The command line through its front door: exit codes, streams, and text."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import rawmerge
from rawmerge.cli import cli
from rawmerge.demo import free_directory
from rawmerge.memory.budget import choose_budget
from rawmerge.run_options import RunOptions
from tests.builders import lora_pair, random_tensor, read_all, write_adapter, write_base

Paths = tuple[Path, Path]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_merge_writes_and_prints_the_directory_on_stdout(tiny: Paths, tmp_path: Path) -> None:
    result = invoke("merge", *tiny, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert "2 kept, 2 updated" in result.stderr
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_the_command_line_and_the_library_write_the_same_bytes(tiny: Paths, tmp_path: Path) -> None:
    options = ("--dtype", "float16", "--compute-dtype", "float64", "--threads", "1")
    assert invoke("merge", *tiny, "-o", tmp_path / "one", *options).exit_code == 0
    rawmerge.merge_adapter(*tiny, tmp_path / "two", dtype="float16", compute_dtype="float64")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_json_summary_goes_to_stdout(tiny: Paths, tmp_path: Path) -> None:
    result = invoke("merge", *tiny, "--output", tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    assert summary["counts"] == {"kept": 2, "updated": 2, "cast": 0, "replaced": 0, "added": 0}
    assert summary["output"] == str(tmp_path / "out")


def test_plan_and_dry_run_tell_the_same_and_write_nothing(tiny: Paths, tmp_path: Path) -> None:
    planned = invoke("plan", *tiny)
    dry = invoke("merge", *tiny, "--output", tmp_path / "out", "--dry-run")
    assert planned.exit_code == dry.exit_code == 0
    assert planned.stdout == dry.stdout
    assert "model.layers.*.q_proj.weight: lora rank 4, scaling 1.5 (x 2)" in planned.stdout
    assert re.search(r"^written   .*rawmerge\.json$", planned.stdout, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_plan_json_is_a_plan(tiny: Paths) -> None:
    told = invoke("plan", *tiny, "--json", "--threads", 2).stdout
    assert rawmerge.parse_plan(told) == rawmerge.plan_merge(*tiny)
    memory = json.loads(told)["memory"]
    assert memory["threads"] == 2
    _, forecast = choose_budget(rawmerge.plan_merge(*tiny), RunOptions(threads=2))
    assert memory["peak_bytes"] == forecast.peak


def test_dry_run_refuses_what_the_merge_would(tiny: Paths) -> None:
    result = invoke("merge", *tiny, "--output", tiny[0], "--dry-run")
    assert result.exit_code == 3
    assert result.stdout == ""


def test_a_refusal_exits_3_names_everything_and_writes_nothing(tiny: Paths, tmp_path: Path) -> None:
    config = tiny[1] / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"use_qalora": true, "use_magic": 1, ', 1))
    result = invoke("merge", *tiny, "--output", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "2 problems" in result.stderr
    assert "'use_qalora'" in result.stderr
    assert "'use_magic'" in result.stderr
    assert "hint:" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_refusal_as_json_has_every_problem_s_fields(tiny: Paths, tmp_path: Path) -> None:
    result = invoke("merge", tiny[0], tmp_path / "nowhere", "--output", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["exit_code"], document["error"]) == (3, 3, "MissingFileError")
    assert document["problems"][0]["subject"] == str(tmp_path / "nowhere")


def test_problems_that_differ_in_layers_only_are_told_once_and_whole_in_json(tiny: Paths) -> None:
    pairs: dict[str, torch.Tensor] = {}
    for layer in range(30):
        pairs |= lora_pair(f"model.layers.{layer + 50}.q_proj", 12, 8)
    write_adapter(tiny[1], pairs)
    people = invoke("plan", *tiny)
    assert "30 problems" in people.stderr
    assert people.stderr.count("expected a base tensor") == 1
    assert "and 29 more that differ in layer numbers only" in people.stderr
    assert len(json.loads(invoke("plan", *tiny, "--json").stdout)["problems"]) == 30


def test_a_long_list_of_problems_is_cut_for_people(tiny: Paths) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs: dict[str, torch.Tensor] = {}
    for letter in letters:
        pairs |= lora_pair(f"module_{letter}", 12, 8)
    write_adapter(tiny[1], pairs)
    people = invoke("plan", *tiny)
    assert people.stderr.count("expected a base tensor") == 20
    assert "and 6 more kinds (--json lists all)" in people.stderr


def test_a_failure_while_writing_exits_4(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}])
    pair = {name: tensor * 0 for name, tensor in lora_pair("q", 6, 5).items()}
    result = invoke("merge", base, write_adapter(tmp_path / "adapter", pair), "--output", tmp_path / "out")
    assert result.exit_code == 4
    assert "would equal the base" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("merge", "a", "b"), ("merge", "a"), ("fuse",), ("merge", "a", "b", "-o", "c", "--dtype", "int4")]
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_inspect_tells_a_base_from_an_adapter(tiny: Paths) -> None:
    base, adapter = invoke("inspect", tiny[0]), invoke("inspect", tiny[1])
    assert base.stdout.startswith("base")
    assert re.search(r"tensors +4\n", base.stdout)
    assert adapter.stdout.startswith("adapter")
    assert re.search(r"scaling +1\.5\n", adapter.stdout)
    assert "can be merged" in adapter.stdout


def test_inspect_says_why_an_adapter_cannot_be_merged(tiny: Paths) -> None:
    config = tiny[1] / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"use_qalora": true, ', 1))
    result = invoke("inspect", tiny[1], "--json")
    document = json.loads(result.stdout)
    assert document["kind"] == "adapter"
    assert document["problems"][0]["subject"] == "use_qalora"
    assert result.exit_code == 3


def test_inspect_of_nothing_exits_3(tmp_path: Path) -> None:
    assert invoke("inspect", tmp_path).exit_code == 3


def test_every_command_and_option_has_help() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), (name, parameter.name)


def test_version() -> None:
    assert rawmerge.__version__ in invoke("--version").stdout


SLOW_MERGE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts pytest aside lets it be ignored
from rawmerge.__main__ import main
from rawmerge.engine.shard_writer import OutputFile
def slowed(write):
    def slow(*arguments):
        print("writing", flush=True)
        time.sleep(0.3)
        return write(*arguments)
    return slow
for name in ("copy_from", "write_at", "write_placed"):
    setattr(OutputFile, name, slowed(getattr(OutputFile, name)))
main()
"""


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process where it does not end by itself, for leaving its block waits for it."""
    try:
        yield
    finally:
        process.kill()


def run_on_terminal(columns: int, lines: int, *arguments: object) -> str:
    """Run the command line with stderr on a terminal; return what it drew there."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    command = [sys.executable, "-c", SLOW_MERGE, *map(str, arguments)]
    with subprocess.Popen(command, stderr=terminal, stdout=subprocess.DEVNULL) as process:
        os.close(terminal)
        drawn = b""
        try:
            while chunk := os.read(controller, 65536):
                drawn += chunk
        except OSError:  # how Linux tells that the last writer closed the terminal
            pass
    os.close(controller)
    assert process.returncode == 0
    return drawn.decode()


@pytest.mark.parametrize(
    ("columns", "lines"), [(120, 24), pytest.param(0, 24, marks=pytest.mark.slow), (0, 0)]
)  # 0: of recorders
def test_a_bar_is_drawn_on_a_terminal_only(tiny: Paths, tmp_path: Path, columns: int, lines: int) -> None:
    drawn = run_on_terminal(columns, lines, "merge", *tiny, "--output", tmp_path / "out")
    assert "%|" in drawn
    assert "q_proj" in drawn
    assert re.search(r"B/s", drawn)
    quiet = invoke("merge", *tiny, "--output", tmp_path / "again")
    assert "%|" not in quiet.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_merge_without_debris(tiny: Paths, tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-c", SLOW_MERGE, "merge", *map(str, tiny), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the staging directory exists now
        process.send_signal(number)
        with ended(process):
            process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_demo_makes_merges_and_verifies(tmp_path: Path) -> None:
    result = invoke("demo", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'demo/merged'}\n"
    assert "verified 28 updated tensors" in result.stderr
    assert read_all(tmp_path / "demo/merged").keys() == read_all(tmp_path / "demo/base").keys()


def test_demo_refuses_an_existing_directory(tmp_path: Path) -> None:
    result = invoke("demo", tmp_path)
    assert result.exit_code == 3
    assert "found one that is there already\n    hint: remove it, or name another" in result.stderr


def test_no_reuse_without_an_output_to_replace_is_a_usage_error(tiny: Paths, tmp_path: Path) -> None:
    result = invoke("merge", *tiny, "-o", tmp_path / "out", "--no-reuse")
    assert result.exit_code == 2
    assert "--no-reuse goes with --overwrite" in result.stderr
    assert not (tmp_path / "out").exists()


def test_demo_without_a_directory_takes_a_new_one_each_time(tmp_path: Path) -> None:
    wanted = tmp_path / "rawmerge-demo"
    assert free_directory(wanted) == wanted
    for taken in ("rawmerge-demo", "rawmerge-demo-2"):
        (tmp_path / taken).mkdir()
    assert free_directory(wanted) == tmp_path / "rawmerge-demo-3"
