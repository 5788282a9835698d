"""What results and refusals say so that a reader can go on: orders, weights, sizes, notes of a dry run, hints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import rawmerge
from rawmerge.byte_sizes import parse_bytes, size_text
from rawmerge.cli import cli
from rawmerge.errors import OutputError, Problem
from rawmerge.inputs.identity import RECORD_NAME
from tests.builders import lora_pair, merged, random_tensor, read_all, shard_name, write_adapter, write_base
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
    assert listed(facts["merged with"]) == []


def test_inspect_tells_what_is_not_usual(several: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"combine": "ties", "density": 0.5, "dtype": "float16", "force": True}
    rawmerge.merge_adapter(several[0], several[1:], tmp_path / "out", **options)
    facts = rawmerge.inspect_path(tmp_path / "out").facts
    told = ["order once", "combine ties", "density 0.5", "dtype float16", "force True"]
    assert listed(facts["merged with"]) == told
    assert all(text in invoke("inspect", tmp_path / "out").stdout for text in told)


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


# --- what was meant ---


@pytest.mark.parametrize("weight", ["x", "0.5x", "1,5", ""])
def test_what_stands_behind_a_colon_is_a_number(tiny: Paths, tmp_path: Path, weight: str) -> None:
    base, adapter = tiny
    named = f"{adapter}:{weight}"
    told = f"'{weight}' is no number: a weight looks like '{adapter}:0.5'"
    with pytest.raises(ValueError, match=re.escape(told)):
        rawmerge.plan_merge(base, named)
    for command in (["plan", base, named], ["verify", tmp_path, "--base", base, "--adapter", named]):
        done = invoke(*command)
        assert (done.exit_code, told in done.stderr) == (2, True)
    adapter.rename(adapter.with_name(f"adapter:{weight}"))
    assert rawmerge.plan_merge(base, named) == rawmerge.plan_merge(base, [Path(named)])


def test_a_home_of_nobody_is_a_path(tiny: Paths) -> None:
    with pytest.raises(rawmerge.RefusedError, match="an existing directory"):
        rawmerge.plan_merge(tiny[0], "~nobody-of-this-name:0.5")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("FLOAT16", "float16")],
)
def test_other_names_of_dtypes_are_understood(tiny: Paths, tmp_path: Path, name: str, meant: str) -> None:
    done = invoke("merge", *tiny, "-o", tmp_path / "out", "--dtype", name)
    assert (done.exit_code, done.stderr.endswith(f"; did you mean {meant}?\n")) == (2, True)
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?$"):
        rawmerge.plan_merge(*tiny, dtype=name)
    with pytest.raises(ValueError, match=rf"; did you mean {meant}\?$"):
        rawmerge.plan_merge(*tiny, dtype=f"torch.{meant}")


def test_no_dtype_is_meant_that_cannot_be_chosen(tiny: Paths, tmp_path: Path) -> None:
    assert "did you mean float64?" in invoke("plan", *tiny, "--compute-dtype", "fp64").stderr
    assert "did you mean float32?" in invoke("verify", tmp_path, "--compute-dtype", "fp32").stderr
    for name in ("fp16", "int8"):
        done = invoke("plan", *tiny, "--compute-dtype", name)
        assert (done.exit_code, "did you mean" in done.stderr) == (2, False)


def test_a_base_without_a_tokenizer_gives_none(tiny: Paths) -> None:
    (tiny[1] / "tokenizer.json").write_text('{"version": "2.0"}')
    assert any("the output gets the base's tokenizer; the adapter" in note for note in rawmerge.plan_merge(*tiny).notes)
    (tiny[0] / "tokenizer.json").unlink()
    (note,) = (note for note in rawmerge.plan_merge(*tiny).notes if "tokenizer" in note)
    assert note == (
        "the base has no tokenizer, so the output gets none; the adapter brings one (tokenizer.json): "
        "--tokenizer adapter takes the adapter's"
    )


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("merge.yaml", "export_dir: merged\n", "rawmerge export"),
        ("short.yml", "a: 1\n", "rawmerge export"),
        ("notes.txt", "some words of text\n", "name a folder"),
    ],
)
def test_a_file_of_another_kind_is_not_told_to_be_damaged(tmp_path: Path, name: str, content: str, hint: str) -> None:
    (tmp_path / name).write_text(content)
    done = invoke("inspect", tmp_path / name)
    assert (done.exit_code, "no safetensors file" in done.stderr, "damaged" in done.stderr) == (3, True, False)
    assert hint in done.stderr
    (tmp_path / "cut.safetensors").write_text("some words of text\n")
    assert "damaged or incomplete" in invoke("inspect", tmp_path / "cut.safetensors").stderr


def test_what_is_no_output_has_a_hint(tiny: Paths, tmp_path: Path) -> None:
    absent, adapter = invoke("verify", tmp_path / "nothere"), invoke("verify", tiny[1])
    assert (absent.exit_code, "hint: check the path" in absent.stderr) == (3, True)
    assert (adapter.exit_code, "behind --adapter" in adapter.stderr) == (3, True)


# --- merge files ---


def merge_file(paths: Paths, folder: Path, *lines: str) -> Path:
    file = folder / "merge.yaml"
    keys = (f"model_name_or_path: {paths[0]}", f"adapter_name_or_path: {paths[1]}", f"export_dir: {folder / 'out'}")
    file.write_text("\n".join([*keys, *lines]))
    return file


@pytest.mark.parametrize("size", ["1GB", "0.001"])
def test_an_export_size_is_in_gigabytes(tiny: Paths, tmp_path: Path, size: str) -> None:
    done = invoke("export", merge_file(tiny, tmp_path), f"export_size={size}")
    assert (done.exit_code, "hint: write 1 (GB), or use `rawmerge merge --max-shard-size`" in done.stderr) == (3, True)


def test_a_merge_file_is_a_file(tmp_path: Path) -> None:
    assert "expected a file, found a folder" in invoke("export", tmp_path).stderr
    assert "expected a file, found No such file" in invoke("export", tmp_path / "absent.yaml").stderr
    (tmp_path / "large.yaml").write_bytes(bytes(2**20))
    assert "a regular file of at most 262144 bytes" in invoke("export", tmp_path / "large.yaml").stderr


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["learning_rate: 1"], "learning_rate: ignored, for it concerns training"),
        (["learning_rate: 1", "bf16: true"], "bf16, learning_rate: ignored, for they concern training"),
    ],
)
def test_keys_are_one_or_several(tiny: Paths, tmp_path: Path, lines: list[str], told: str) -> None:
    assert told in rawmerge.read_export(merge_file(tiny, tmp_path, *lines)).notes


@pytest.mark.parametrize("option", [["--dtype", "float16"], ["--export_dir", "o1"], ["-o", "o1"]])
def test_keys_of_a_merge_file_have_no_dashes(tiny: Paths, tmp_path: Path, option: list[str]) -> None:
    done = invoke("export", merge_file(tiny, tmp_path), *option)
    assert (done.exit_code, "set keys without dashes, such as infer_dtype=float16" in done.stderr) == (2, True)


def test_a_merge_file_s_dtype_is_understood(tiny: Paths, tmp_path: Path) -> None:
    assert "hint: did you mean bfloat16?" in invoke("export", merge_file(tiny, tmp_path), "infer_dtype=bf16").stderr


# --- programs ---


def test_a_size_of_memory_may_be_a_text(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out", max_memory="2GiB")
    assert rawmerge.verify_merge(tmp_path / "out", *tiny, max_memory="2GiB").is_equal
    with pytest.raises(rawmerge.RefusedError, match=r"1\.00 MB"):
        rawmerge.merge_adapter(*tiny, tmp_path / "small", max_memory="1MB")
    with pytest.raises(ValueError, match="max_memory: expected a size with its unit"):
        rawmerge.merge_adapter(*tiny, tmp_path / "small", max_memory="512")


def test_a_choice_that_there_is_not_is_named(tiny: Paths, tmp_path: Path) -> None:
    plan, file = rawmerge.plan_merge(*tiny), merge_file(tiny, tmp_path)
    wrong: dict[str, Any] = {"threds": 2}
    calls: list[Callable[[], object]] = [
        lambda: rawmerge.merge_adapter(*tiny, tmp_path / "out", **wrong),
        lambda: rawmerge.run_plan(plan, tmp_path / "out", **wrong),
        lambda: rawmerge.run_export(rawmerge.read_export(file), **wrong),
        lambda: rawmerge.verify_merge(tmp_path, *tiny, **wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="there is no choice threds; "):
            call()
    assert not (tmp_path / "out").exists()


def test_options_that_are_none_are_refused(tiny: Paths) -> None:
    given: Any = {"order": "once"}
    with pytest.raises(TypeError, match="choose_options"):
        rawmerge.plan_merge(*tiny, options=given)


@pytest.mark.parametrize(
    ("second", "told"), [(("b", 0.5), "'b:0.5'"), (0.5, "'path:0.5'"), (None, "'path:0.5'")], ids=str
)
def test_an_adapter_that_is_no_path_is_told_how_a_weight_is_written(tiny: Paths, second: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"write a weight as {told}"):
        rawmerge.plan_merge(tiny[0], [tiny[1], second])


def test_adapters_that_are_no_list_are_refused(tiny: Paths) -> None:
    wrong: list[Any] = [{str(tiny[1]): 0.5}, (path for path in [tiny[1]]), {tiny[1]}]
    for adapters, kind in zip(wrong, ("dict", "generator", "set"), strict=True):
        with pytest.raises(TypeError, match=rf"not {kind}: write a weight as 'path:0\.5'"):
            rawmerge.plan_merge(tiny[0], adapters)


def test_a_density_is_asked_for_before_adapters_are_known() -> None:
    with pytest.raises(rawmerge.RefusedError, match="--density") as refused:
        rawmerge.choose_options(combine="ties")
    assert len(refused.value.problems) == 1
    assert rawmerge.choose_options(combine="average").combine == "average"
    assert rawmerge.MergeOptions(combine="ties").density == 0  # made by hand; a plan refuses it


# --- verification ---


def test_values_that_were_not_looked_at_are_told_first(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    rawmerge.merge_adapter(*tiny, tmp_path / "sums", checksum=True)
    lines = invoke("verify", tmp_path / "out").stdout.splitlines()
    assert len(lines) == 1
    assert "base and adapter were not given: values were not looked at; nothing in its headers" in lines[0]
    assert "values were compared by SHA256SUMS only; " in invoke("verify", tmp_path / "sums").stdout.splitlines()[0]


@pytest.mark.parametrize("options", [{}, {"order": "once"}, {"combine": "ties", "density": 0.5}], ids=str)
def test_another_number_of_adapters_is_one_finding_of_the_record(
    several: tuple[Path, Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, first, second = several
    rawmerge.merge_adapter(base, [first, second], tmp_path / "two", **options)
    found = rawmerge.verify_merge(tmp_path / "two", base, first).findings
    (of_record,) = (finding for finding in found if finding.subject.startswith(RECORD_NAME))
    assert (of_record.expected, of_record.found) == ("1 adapter, as given", "2 adapters")
    assert of_record.hint.startswith("the output was made from 2 adapters; 1 was given")
    rawmerge.merge_adapter(base, first, tmp_path / "one")
    found = rawmerge.verify_merge(tmp_path / "one", base, [first, second]).findings
    assert "from 1 adapter; 2 were given" in only(found, f"{RECORD_NAME}: adapters").hint


def test_another_weight_is_named(several: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, first, second = several
    rawmerge.merge_adapter(base, [first, f"{second}:0.5"], tmp_path / "out")
    found = rawmerge.verify_merge(tmp_path / "out", base, [first, second]).findings
    weight = only(found, f"{RECORD_NAME}: adapters")
    assert (weight.expected, weight.found) == ("'second' with the weight 1", "0.5")
    assert f"'{second}:0.5'" in weight.hint
    found = rawmerge.verify_merge(tmp_path / "out", base, [f"{first}:2", f"{second}:0.5"]).findings
    assert only(found, f"{RECORD_NAME}: adapters").expected == "'adapter' with the weight 2"
    assert rawmerge.verify_merge(tmp_path / "out", base, [first, f"{second}:0.5"]).is_equal


def test_a_stranger_s_weight_breaks_no_verification(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    weights: tuple[object, ...] = ("1", [], {}, True, None, 10**400)
    for weight in weights:
        record["adapters"][0]["weight"] = weight
        (tmp_path / "out" / RECORD_NAME).write_text(json.dumps(record))
        assert not rawmerge.verify_merge(tmp_path / "out", *tiny).is_equal


def test_options_as_a_value_are_verified(tiny: Paths, tmp_path: Path) -> None:
    options = rawmerge.choose_options(dtype="float16", card=False)
    rawmerge.merge_adapter(*tiny, tmp_path / "out", options=options)
    assert rawmerge.verify_merge(tmp_path / "out", *tiny, options=options).is_equal
    found = rawmerge.verify_merge(tmp_path / "out", *tiny, options=rawmerge.choose_options()).findings
    assert any(finding.expected.startswith("BF16") for finding in found)
    with pytest.raises(ValueError, match="options or dtype, not both"):
        rawmerge.verify_merge(tmp_path / "out", *tiny, options=options, dtype="float16")
    wrong: Any = {"dtype": "float16"}
    with pytest.raises(TypeError, match="choose_options"):
        rawmerge.verify_merge(tmp_path / "out", *tiny, options=wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_sum_that_was_rounded_twice_is_told_from_other_arithmetic(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base", [{f"{Q}.weight": random_tensor((64, 32))}])
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q, 64, 32))
    before, pairs = read_all(base)[f"{Q}.weight"], read_all(adapter)
    lora_a, lora_b = (pairs[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
    output = tmp_path / "theirs"
    output.mkdir()
    save_file({f"{Q}.weight": merged(before, lora_a, lora_b, 1.5).to(dtype)}, output / "model.safetensors")
    named = str(dtype).removeprefix("torch.")
    (finding,) = rawmerge.verify_merge(output, base, adapter, dtype=named).findings
    assert "the sum was rounded to the base's dtype first, as LLaMA-Factory does" in finding.hint
    half = merged(before, lora_a, lora_b, 0.75).to(dtype)
    save_file({f"{Q}.weight": half}, output / "model.safetensors")
    assert "rounded" not in rawmerge.verify_merge(output, base, adapter, dtype=named).findings[0].hint
