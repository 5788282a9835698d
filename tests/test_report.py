"""Plans, summaries, inspections and refusals, as people and machines read them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rawmerge
from rawmerge.byte_sizes import format_bytes
from rawmerge.errors import (
    AdapterError,
    MergeError,
    MissingFileError,
    NonFiniteTensorError,
    NothingChangedError,
    PlanError,
    Problem,
    RawmergeError,
    VerificationError,
)
from rawmerge.inspection import Inspection
from rawmerge.merge_plan import MergePlan
from rawmerge.output.side_files import LeftOut, SideFile
from rawmerge.report import (
    error_json,
    error_text,
    inspection_json,
    inspection_text,
    plan_json,
    plan_text,
    verification_text,
)
from rawmerge.run import MergeSummary
from rawmerge.summary_report import summary_json, summary_text
from rawmerge.verifying.findings import Verification
from tests.builders import lora_pair, random_tensor, write_adapter, write_base
from tests.strategies import SETTINGS

SUMMARY = MergeSummary(
    "out", {"kept": 3, "updated": 2, "cast": 0, "replaced": 0, "added": 0}, (), {}, 4_000_000, 4_000_000, 2.0
)
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
HOSTILE = "a\x1b[31m\nb"


@pytest.fixture
def plan(tiny: tuple[Path, Path]) -> MergePlan:
    return rawmerge.plan_merge(*tiny)


def lines_of(text: str, first_word: str) -> list[str]:
    """Return the lines that begin with `first_word`, without it."""
    return [line.removeprefix(first_word).strip() for line in text.splitlines() if line.startswith(first_word)]


def problems(count: int) -> list[Problem]:
    return [Problem(f"t{number}", "one", "none", "look") for number in range(count)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_994, "999.99 kB"),
        (999_996, "1.00 MB"),
        (3_500_000_000, "3.50 GB"),
        (2 * 10**15, "2000.00 TB"),
    ],
)
def test_sizes_are_written_in_decimal_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@SETTINGS
@given(st.integers(0, 10**15))
def test_a_size_is_right_to_a_hundredth_of_its_unit_and_below_a_thousand(count: int) -> None:
    number, unit = format_bytes(count).split()
    assert abs(float(number) * UNITS[unit] - count) <= 0.00501 * UNITS[unit]
    assert float(number) < 1000 or unit == "TB"


def test_a_plan_names_its_inputs_and_what_becomes_of_the_tensors(plan: MergePlan) -> None:
    text = plan_text(plan)
    assert lines_of(text, "base") == [plan.base_root]
    assert lines_of(text, "adapter") == [f"{plan.adapters[0].root} (4 tensors: 4 updates)"]
    assert lines_of(text, "compute") == ["float32, output dtype as stored"]
    assert lines_of(text, "tensors") == ["2 kept, 2 updated"]
    assert lines_of(text, "output") == [f"{format_bytes(plan.byte_count)} in 2 shards"]


def test_layers_of_one_kind_are_one_line_of_a_plan(plan: MergePlan) -> None:
    assert "  model.layers.*.q_proj.weight: lora rank 4, scaling 1.5 (x 2)" in plan_text(plan).splitlines()


def test_a_plan_lists_the_files_it_writes_copies_and_leaves_out(tiny: tuple[Path, Path]) -> None:
    (tiny[0] / "pytorch_model.bin").touch()
    text = plan_text(rawmerge.plan_merge(*tiny, dtype="float32"))
    assert lines_of(text, "written") == ["config.json, model.safetensors.index.json, README.md, rawmerge.json"]
    assert lines_of(text, "copied") == ["tokenizer.json"]
    assert lines_of(text, "left out") == ["pytorch_model.bin: weights that the merge does not touch, or a pickle"]


def test_a_plan_says_where_nothing_is_written_beside_the_shards(plan: MergePlan) -> None:
    text = plan_text(replace(plan, written_files=(), side_files=()))
    assert lines_of(text, "written") == ["rawmerge.json"]
    assert lines_of(text, "copied") == ["none"]


def test_long_lists_of_files_are_cut_and_counted(plan: MergePlan) -> None:
    files = tuple(SideFile(f"{number}.txt", "", 1) for number in range(10))
    assert lines_of(plan_text(replace(plan, side_files=files)), "copied")[0].endswith("7.txt and 2 more")
    assert lines_of(plan_text(replace(plan, side_files=files[:8])), "copied")[0].endswith("7.txt")


def test_a_plan_of_one_shard_says_so_in_the_singular(plan: MergePlan) -> None:
    assert plan_text(replace(plan, shards=plan.shards[:1])).count(" in 1 shard\n") == 1


def test_transposed_and_replaced_tensors_are_marked(tmp_path: Path) -> None:
    weights = {"c_fc.weight": random_tensor((8, 12)), "score.weight": random_tensor((2, 8))}
    base = write_base(tmp_path / "base", [weights], {"model_type": "gpt2"})
    extra = {"base_model.model.score.weight": random_tensor((2, 8), seed=9)}
    adapter = write_adapter(tmp_path / "adapter", lora_pair("c_fc", 12, 8) | extra, modules_to_save=["score"])
    text = plan_text(rawmerge.plan_merge(base, adapter))
    assert "  c_fc.weight: lora rank 4, scaling 1.5, transposed" in text.splitlines()
    assert "  score.weight: replaced by the adapter's" in text.splitlines()


def test_names_in_a_plan_cannot_reach_the_terminal(plan: MergePlan) -> None:
    hostile = replace(plan, left_out=(LeftOut(HOSTILE, "why"),), notes=(HOSTILE,), base_root=HOSTILE)
    text = plan_text(hostile)
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == len(plan_text(plan).splitlines()) + 2 - len(plan.notes) - len(plan.left_out)


def test_a_summary_counts_what_was_done_and_how_fast() -> None:
    assert summary_text(SUMMARY) == "3 kept, 2 updated; 4.00 MB in 2.0 s (2.00 MB/s)"


def test_a_merge_too_short_to_time_has_a_rate_all_the_same() -> None:
    assert "0.0 s (" in summary_text(replace(SUMMARY, seconds=0.0))


def test_tensors_without_effect_are_named_in_the_summary() -> None:
    text = summary_text(replace(SUMMARY, unchanged=("a.weight", HOSTILE)))
    assert "2 updated tensors equal the base" in text
    assert "(a.weight, a\\x1b[31m\\nb); --dtype float32 keeps it" in text


def test_a_summary_is_one_json_object() -> None:
    found = json.loads(summary_json(replace(SUMMARY, unchanged=("a",))))
    assert found == {
        "output": "out",
        "counts": SUMMARY.counts,
        "unchanged": ["a"],
        "byte_count": 4_000_000,
        "written_bytes": 4_000_000,
        "seconds": 2.0,
        "notes": [],
        "verified": False,
        "linked": 0,
        "reused": 0,
        "resumed": 0,
        "consumed": 0,
        "predicted_peak_bytes": None,
        "measured_peak_bytes": None,
        "surviving": {"tensors": 0, "changed": None, "norm": None, "lost": None, "much_lost": {}},
        "casts": {
            "tensors": 0,
            "dtypes": [],
            "elements": 0,
            "rounded": 0,
            "zeroed": 0,
            "subnormal": 0,
            "largest": 0.0,
            "worst": [],
        },
    }


def test_a_summary_tells_of_shards_that_were_not_made() -> None:
    text = summary_text(replace(SUMMARY, linked=1, reused=3, consumed=2))
    assert ", 1 shard linked, 3 shards reused, 2 shards deleted from the base;" in text


def test_bytes_that_were_there_already_make_no_merge_fast() -> None:
    text = summary_text(replace(SUMMARY, reused=1, written_bytes=3000))
    assert text.endswith("; 3.00 kB of 4.00 MB written, the rest was there, in 2.0 s (1.50 kB/s)")


def test_an_inspection_shows_its_facts_and_a_verdict() -> None:
    facts: dict[str, Any] = {"bytes": 2_000_000, "tensors": 3, "module names": ["k", "q"], "replaced tensors": []}
    lines = [line.split(maxsplit=1) for line in inspection_text(Inspection("adapter", "a/b", facts, ())).splitlines()]
    assert lines[0] == ["adapter", "a/b"]
    assert ["bytes", "2.00 MB"] in lines
    assert ["module", "names" + " " * 13 + "k, q"] in lines
    assert lines[-1] == ["verdict", "can be merged, as far as it alone tells"]


def test_an_inspection_lists_why_something_cannot_be_merged() -> None:
    lines = inspection_text(Inspection("adapter", "a", {}, (Problem("r", "one", "none"), *problems(1)))).splitlines()
    assert lines[1].split(maxsplit=1) == ["verdict", "cannot be merged"]
    assert lines[2:] == ["    'r': expected one, found none", "    't0': expected one, found none", "    hint: look"]


def test_facts_cannot_reach_the_terminal() -> None:
    lines = inspection_text(Inspection("adapter", HOSTILE, {"trained on": HOSTILE, "x": [HOSTILE]}, ())).splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_an_inspection_is_one_json_object() -> None:
    found = json.loads(
        inspection_json(Inspection("base", "a", {"x": ["q", "k"], "y": 1}, (Problem("r", "one", "none"),)))
    )
    assert found == {
        "kind": "base",
        "path": "a",
        "facts": {"x": ["q", "k"], "y": 1},
        "problems": [asdict(Problem("r", "one", "none"))],
    }


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_up_to_twenty_unlike_problems_are_shown_whole(count: int) -> None:
    error = PlanError(*problems(count))
    assert error_text(error) == str(error)


@pytest.mark.parametrize("error", [PlanError, MissingFileError])
def test_more_problems_are_cut_and_counted(error: type[PlanError]) -> None:
    text = error_text(error(*problems(25)))
    assert text.startswith("25 problems\n  - 't0': expected one, found none\n    hint: look\n  - 't1'")
    assert len(re.findall(r"'t\d+'", text)) == 20
    assert re.fullmatch(r"  .*and 5 more .*\(--json lists all\)", text.splitlines()[-1])


def test_problems_of_other_layers_are_counted_not_repeated() -> None:
    layers = [Problem(f"h.{layer}.q", f"h.{layer}.q.weight", "none", f"see {layer}") for layer in range(30)]
    lines = error_text(PlanError(*layers, Problem("head", "one", "none"))).splitlines()
    assert lines[:3] == ["31 problems", "  - 'h.0.q': expected h.0.q.weight, found none", "    hint: see 0"]
    assert lines[3].startswith("    and 29 more")
    assert lines[4:] == ["  - 'head': expected one, found none"]


def test_problems_that_differ_in_more_than_layers_are_all_shown() -> None:
    unlike = [Problem("h.0.q", "one", "none"), Problem("h.1.q", "one", "two"), Problem("h.1.k", "one", "none")]
    assert error_text(PlanError(*unlike)) == str(PlanError(*unlike))


def test_other_errors_are_shown_as_they_are() -> None:
    assert error_text(MergeError("disk full")) == "disk full"


@pytest.mark.parametrize(
    "error", [MergeError(HOSTILE), VerificationError(HOSTILE, problems(1)), RawmergeError(HOSTILE)]
)
def test_no_error_and_no_note_to_it_reaches_the_terminal(error: RawmergeError) -> None:
    error.add_note(HOSTILE)
    lines = error_text(error).split("\n")
    assert all(line.isprintable() for line in lines)
    assert lines[-1] == r"    a\x1b[31m\nb"


def test_notes_of_a_verification_cannot_reach_the_terminal() -> None:
    problem = Problem(HOSTILE, HOSTILE, HOSTILE)
    made = Verification(HOSTILE, replayed=True, tensor_count=1, element_count=1, findings=(problem,), notes=(HOSTILE,))
    text = verification_text(made)
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.endswith("\nnote: a\\x1b[31m\\nb")


def test_json_is_plain_ascii(plan: MergePlan) -> None:
    made = plan_json(replace(plan, base_root="é\x9b\u202e", notes=("\x7f",)))
    assert made.isascii()
    assert made.isprintable()
    assert json.loads(made)["base_root"] == "é\x9b\u202e"


def test_a_refusal_in_json_has_all_problems_field_by_field() -> None:
    found = json.loads(error_json(AdapterError(*problems(25))))
    assert (found["error"], found["exit_code"], len(found["problems"])) == ("AdapterError", 3, 25)
    assert found["problems"][3] == {"subject": "t3", "expected": "one", "found": "none", "hint": "look"}


def test_another_error_in_json_has_its_class_code_and_text() -> None:
    assert json.loads(error_json(MergeError("disk full"))) == {
        "error": "MergeError",
        "exit_code": 4,
        "message": "disk full",
        "notes": [],
        "problems": [],
    }


@pytest.mark.parametrize(
    "error", [PlanError(*problems(2)), MergeError("full"), NothingChangedError(), NonFiniteTensorError("q", "F16")]
)
def test_all_errors_in_json_have_the_same_keys(error: RawmergeError) -> None:
    error.add_note("3 shards are left")
    found = json.loads(error_json(error))
    assert list(found) == ["error", "exit_code", "message", "notes", "problems"]
    assert found["notes"] == ["3 shards are left"]
    assert found["problems"] == [asdict(problem) for problem in error.problems]


def test_a_tensor_that_is_not_finite_is_told_in_json_field_by_field() -> None:
    (problem,) = json.loads(error_json(NonFiniteTensorError("q.weight", "F16")))["problems"]
    assert (problem["subject"], problem["expected"]) == ("q.weight", "finite values in F16")
