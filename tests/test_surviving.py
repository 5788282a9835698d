"""What rounding leaves of deltas: in the record, the summary, its text and its JSON; whatever made the shards."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.computing.survival import Survival
from rawmerge.output.survivals import parse_survivals, survival_fields, survival_records, surviving
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    folder_bytes,
    lora_pair,
    random_tensor,
    read_all,
    write_adapter,
    write_base,
)
from tests.test_cut_off import cut_off as cut_off_consuming
from tests.test_resume import aged, cut_off

Paths = tuple[Path, Path]
SHAPES = {"large": (12, 8), "small": (9, 16), "square": (10, 10)}
SIZES = {"large": 1.0, "small": 0.0005, "square": 0.02}


@pytest.fixture
def graded(tmp_path: Path) -> Paths:
    """Return a base of three bfloat16 shards, and an adapter whose deltas are large, small and in between."""
    base = write_base(tmp_path / "base", [{f"{name}.weight": random_tensor(shape)} for name, shape in SHAPES.items()])
    pairs: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        pair = lora_pair(name, *shape)
        pair[f"{PREFIX}{name}.lora_B.weight"] *= SIZES[name]
        pairs |= pair
    return aged((base, write_adapter(tmp_path / "adapter", pairs)))


def expected(paths: Paths, output: Path) -> dict[str, dict[str, float]]:
    """Return the same by torch in float64, from the files of base, adapter and output."""
    base, adapter, merged = (read_all(folder) for folder in (*paths, output))
    found = {}
    for name in SHAPES:
        before = base[f"{name}.weight"]
        factors = (adapter[f"{PREFIX}{name}.lora_{letter}.weight"].float() for letter in "BA")
        left, right = factors
        asked = (before.float() + left @ right * (ALPHA / RANK)).double() - before.double()
        made = merged[f"{name}.weight"].double() - before.to(merged[f"{name}.weight"].dtype).double()
        found[f"{name}.weight"] = {
            "changed": float((made != 0).sum() / (asked != 0).sum()),
            "norm": float(made.norm() / asked.norm()),
            "lost": min(1.0, float((made - asked).norm() / asked.norm())),
        }
    return found


def recorded(output: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((output / "rawmerge.json").read_text())["surviving"]
    return found


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"dtype": "float16"}, {"without": ["kernel"]}], ids=str)
def test_the_record_tells_it_of_every_updated_tensor(graded: Paths, tmp_path: Path, options: dict[str, Any]) -> None:
    summary = rawmerge.merge_adapter(*graded, tmp_path / "out", **options)
    found, wanted = recorded(tmp_path / "out"), expected(graded, tmp_path / "out")
    assert found.keys() == wanted.keys() == summary.survivals.keys()
    for name, ratios in wanted.items():
        assert found[name] == pytest.approx(ratios, rel=1e-3, abs=1e-6)


def test_a_large_delta_survives_and_a_small_one_does_not(graded: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*graded, tmp_path / "out")
    found = recorded(tmp_path / "out")
    assert found["large.weight"]["lost"] < 0.02
    assert found["small.weight"]["lost"] > 0.5
    assert found["small.weight"]["changed"] < 0.7 < found["large.weight"]["changed"]
    rawmerge.merge_adapter(*graded, tmp_path / "wide", dtype="float32")
    assert all(ratios["lost"] < 1e-3 for ratios in recorded(tmp_path / "wide").values())


def test_the_command_warns_and_names_the_remedy(graded: Paths, tmp_path: Path) -> None:
    command = ["merge", *map(str, graded), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, command)
    assert "of the elements that the deltas move, " in done.stderr
    lost = recorded(tmp_path / "out")["small.weight"]["lost"]
    where = f"in 1 of 3 updated tensors (small.weight {lost:.0%})"
    warning = f"warning: half of the delta or more was lost in rounding {where}; --dtype float32 keeps it"
    assert f"note: {warning}\n" in done.stderr
    wide = CliRunner().invoke(cli, [*command[:-1], str(tmp_path / "wide"), "--dtype", "float32"])
    assert "warning" not in wide.stderr
    told = CliRunner().invoke(cli, [*command[:-1], str(tmp_path / "json"), "--json"])
    left = json.loads(told.stdout)["surviving"]
    assert any(note.startswith("warning: half of the delta") for note in json.loads(told.stdout)["notes"])
    assert (left["tensors"], list(left["much_lost"])) == (3, ["small.weight"])
    assert 0 < left["lost"] < 0.1


def test_whatever_made_a_shard_its_record_is_the_same(graded: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*graded, tmp_path / "golden")
    golden = folder_bytes(tmp_path / "golden")
    assert len(recorded(tmp_path / "golden")) == 3
    cut_off(graded, tmp_path / "out", 2)
    assert rawmerge.merge_adapter(*graded, tmp_path / "out").resumed == 2
    assert folder_bytes(tmp_path / "out") == golden
    again = rawmerge.merge_adapter(*graded, tmp_path / "out", overwrite=True)
    assert (again.reused, len(again.survivals)) == (3, 3)
    assert folder_bytes(tmp_path / "out") == golden
    cut_off_consuming(graded, tmp_path / "consumed")
    rawmerge.merge_adapter(*graded, tmp_path / "consumed", consume_base=True)
    assert folder_bytes(tmp_path / "consumed") == golden


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_memory_change_no_byte_of_it(graded: Paths, tmp_path: Path, threads: int) -> None:
    rawmerge.merge_adapter(*graded, tmp_path / "golden")
    rawmerge.merge_adapter(*graded, tmp_path / "out", threads=threads)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")


def test_in_all_tensors_count_by_their_size() -> None:
    left = surviving(
        {"a": Survival(10, 5, 3.0, 2.0, 1.0, 4), "b": Survival(6, 6, 4.0, 4.0, 2.0, 1), "c": Survival(0, 0, 0, 0, 0, 1)}
    )
    assert left.tensors == 3
    assert left.changed == (4 * 5 + 6) / (4 * 10 + 6)
    assert left.norm == pytest.approx(((4 * 4 + 16) / (4 * 9 + 16)) ** 0.5)
    assert left.lost == pytest.approx(((4 * 1 + 4) / (4 * 9 + 16)) ** 0.5)
    assert left.much_lost == {"b": 0.5}


def test_of_no_delta_nothing_is_told() -> None:
    left = surviving({"a": Survival(0, 0, 0.0, 0.0, 0.0, 1)})
    assert (left.changed, left.norm, left.lost, left.much_lost) == (None, None, None, {})
    assert survival_records({"a": Survival(0, 0, 0.0, 0.0, 0.0, 1)}) == {
        "a": {"changed": None, "norm": None, "lost": None}
    }


def test_sampled_tensors_say_so() -> None:
    assert survival_records({"a": Survival(3, 2, 3.0, 2.0, 1.0, 7)}) == {
        "a": {"changed": 0.6667, "norm": 0.6667, "lost": 0.3333, "every_row": 7}
    }


def test_what_is_kept_for_later_comes_back() -> None:
    kept = {"a": Survival(3, 2, 0.1, 1e-300, 1 / 3, 7), "b": Survival(1, 1, nan, inf, 2.0, 1)}
    back = parse_survivals(json.loads(json.dumps(survival_fields(kept), allow_nan=False)))
    assert back["a"] == kept["a"]
    assert repr(back["b"]) == repr(Survival(1, 1, nan, nan, 2.0, 1))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        parse_survivals({"a": [1, 2]})
