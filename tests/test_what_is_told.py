"""What results and refusals say so that a reader can go on: orders, weights, sizes, notes of a dry run, hints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import rawmerge
from rawmerge.byte_sizes import parse_bytes, size_text
from rawmerge.cli import cli
from rawmerge.errors import OutputError, Problem
from rawmerge.inputs.identity import RECORD_NAME
from tests.builders import lora_pair, merged, read_all, shard_name, write_adapter
from tests.strategies import SETTINGS
from tests.test_reuse import age

Paths = tuple[Path, Path]
Q = "model.layers.0.q_proj"


@pytest.fixture
def several(tiny: Paths) -> tuple[Path, Path, Path]:
    return *tiny, write_adapter(tiny[0].parent / "second", lora_pair(Q, 12, 8, seed=9))


def listed(fact: object) -> list[str]:
    assert isinstance(fact, list)
    return fact


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "serial: one adapter after the other, rounded after each"),
        (["--order", "once"], "once: all deltas are summed and rounded once"),
        (["--combine", "ties", "--density", "0.5"], "ties: the deltas are combined and rounded once"),
    ],
)
def test_a_plan_says_what_becomes_of_several_adapters(
    several: tuple[Path, Path, Path], options: list[str], told: str
) -> None:
    assert f"\norder     {told}\n" in invoke("plan", *several, *options).stdout
    assert "\norder " not in invoke("plan", *several[:2]).stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["order serial"]),
        ({"order": "once"}, ["order once"]),
        ({"combine": "ties", "density": 0.5}, ["order once", "combine ties", "density 0.5"]),
    ],
)
def test_inspect_tells_how_a_merge_was_made_of_several(
    several: tuple[Path, Path, Path], tmp_path: Path, options: dict[str, Any], told: list[str]
) -> None:
    base, *adapters = several
    rawmerge.merge_adapter(base, [adapters[0], f"{adapters[1]}:0.5"], tmp_path / "out", **options)
    facts = rawmerge.inspect_path(tmp_path / "out").facts
    first, second = listed(facts["merged adapters"])
    assert ("weight" in first, second.endswith(", weight 0.5")) == (False, True)
    assert listed(facts["merged with"])[: len(told)] == told


def test_inspect_tells_no_order_of_one(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    facts = rawmerge.inspect_path(tmp_path / "out").facts
    assert not any("order" in text for text in listed(facts["merged with"]))


@pytest.mark.parametrize("weight", ["10", '"1"', "1e99", "true", f"1{'0' * 400}"])
def test_a_stranger_s_weight_breaks_no_inspection(tiny: Paths, weight: str) -> None:
    (tiny[0] / RECORD_NAME).write_text(f'{{"adapters": [{{"weight": {weight}}}]}}')
    assert rawmerge.inspect_path(tiny[0]).facts["merged adapters"]


@SETTINGS
@given(st.integers(1, 10**15) | st.sampled_from([2 * 10**9, 2**31, 3 * 2**20, 10**6, 5 * 10**12]))
def test_a_size_is_read_back_as_it_was(count: int) -> None:
    assert parse_bytes(size_text(count)) == count


@pytest.mark.parametrize("text", ["2GB", "512MiB", "1001B"])
def test_a_card_names_a_shard_size_as_it_was_given(tiny: Paths, tmp_path: Path, text: str) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out", max_shard_size=text)
    assert f"--max-shard-size {text}\n" in (tmp_path / "out/README.md").read_text()


def test_a_dry_run_in_json_has_the_notes_of_the_run(tiny: Paths, tmp_path: Path) -> None:
    command = ["merge", *tiny, "-o", tmp_path / "out", "--dry-run", "--json"]
    fresh = json.loads(invoke(*command).stdout)
    age()
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    done = invoke(*command, "--overwrite")
    again = json.loads(done.stdout)
    assert fresh["run_notes"] == []
    assert any("is taken from the output that is replaced" in note for note in again["run_notes"]), again["run_notes"]
    assert done.stderr.splitlines() == [f"note: {note}" for note in again["run_notes"]]
    assert rawmerge.parse_plan(done.stdout) == rawmerge.plan_merge(*tiny)


def test_json_is_one_line_whatever_the_command(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    commands = [
        ("clean", tmp_path / "out"),
        ("inspect", tiny[0]),
        ("plan", *tiny),
        ("verify", tmp_path / "out"),
        ("merge", *tiny, "-o", tmp_path / "two"),
    ]
    for command in commands:
        done = invoke(*command, "--json")
        assert len(done.stdout.splitlines()) == 1, command
        json.loads(done.stdout)


# --- hints ---


def only(problems: tuple[Problem, ...], subject: str) -> Problem:
    (found,) = (problem for problem in problems if problem.subject.endswith(subject))
    return found


def test_an_output_inside_the_base_is_told_a_better_place(tiny: Paths) -> None:
    with pytest.raises(OutputError) as refused:
        rawmerge.merge_adapter(*tiny, tiny[0] / "out")
    assert str(tiny[0].parent / "base-merged") in refused.value.problems[0].hint
    rawmerge.merge_adapter(*tiny, tiny[0].parent / "base-merged")


def test_an_output_that_holds_an_input_or_is_a_file_has_a_hint(tiny: Paths, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file", tiny[1]):
        with pytest.raises(OutputError) as refused:
            rawmerge.merge_adapter(*tiny, output, overwrite=True)
        assert all(problem.hint for problem in refused.value.problems), output


def test_a_missing_merge_file_is_told_where_paths_start(tmp_path: Path) -> None:
    done = invoke("export", tmp_path / "absent.yaml")
    assert done.exit_code == 3
    assert "hint: name the file of a merge by LLaMA-Factory" in done.stderr


def test_findings_say_what_to_do(tiny: Paths, several: tuple[Path, Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    findings = rawmerge.verify_merge(output, tiny[0], several[2], dtype="float16").findings
    assert "rawmerge inspect" in only(findings, f"{RECORD_NAME}: adapters").hint
    assert "leave options out" in only(findings, f"{RECORD_NAME}: options").hint
    (output / "config.json").write_text('{"a": 1,')
    (output / RECORD_NAME).write_text("[]")
    broken = rawmerge.verify_merge(output).findings
    assert all(only(broken, name).hint for name in ("config.json", RECORD_NAME))


def test_what_the_index_contradicts_has_a_hint(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    index = output / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"]["model.norm.weight"]
    table["metadata"]["total_size"] = 7
    index.write_text(json.dumps(table))
    findings = rawmerge.verify_merge(output).findings
    assert {finding.subject for finding in findings} == {"model.norm.weight", index.name}
    assert all(finding.hint for finding in findings)


@pytest.mark.parametrize("shards", [1, 2])
def test_one_file_of_another_program_needs_no_index(tiny: Paths, tmp_path: Path, shards: int) -> None:
    base, pairs = read_all(tiny[0]), read_all(tiny[1])
    for path in (Q, Q.replace("0", "1")):
        lora_a, lora_b = (pairs[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
        base[f"{path}.weight"] = merged(base[f"{path}.weight"], lora_a, lora_b, 1.5)
    output, names = tmp_path / "theirs", sorted(base)
    output.mkdir()
    for number in range(shards):
        part = {name: base[name] for name in names[number::shards]}
        save_file(part, output / ("model.safetensors" if shards == 1 else shard_name(number + 1, shards)))
    for name in ("config.json", "tokenizer.json"):
        (output / name).write_bytes((tiny[0] / name).read_bytes())
    made = rawmerge.verify_merge(output, *tiny)
    lacks = [note for note in made.notes if note.startswith("it lacks")]
    assert any("index" in note for note in lacks) == (shards == 2)
    assert made.is_equal == (shards == 1)  # several without an index are a finding
