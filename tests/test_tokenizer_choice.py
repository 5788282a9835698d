"""Whose tokenizer the output gets: the base's, unless the adapter's is asked for; the plan says when they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli

Paths = tuple[Path, Path]


@pytest.fixture
def paths(tiny: Paths) -> Paths:
    base, adapter = tiny
    (base / "tokenizer_config.json").write_text('{"chat_template": "base"}')
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    (base / "vocab.json").write_text("{}")
    (adapter / "tokenizer.json").write_text('{"version": "2.0"}')
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "adapter"}')
    (adapter / "tokenization_own.py").write_text("raise SystemExit")
    return base, adapter


def test_the_base_s_is_copied_and_the_difference_told(paths: Paths, tmp_path: Path) -> None:
    base, adapter = paths
    (note,) = rawmerge.plan_merge(base, adapter).notes
    assert "tokenizer.json, tokenizer_config.json" in note
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_equal_files_are_not_told(paths: Paths) -> None:
    base, adapter = paths
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((base / name).read_bytes())
    assert rawmerge.plan_merge(base, adapter).notes == ()


def test_the_adapter_s_takes_its_place_on_request(paths: Paths, tmp_path: Path) -> None:
    base, adapter = paths
    arguments = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--tokenizer", "adapter"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    assert "left out  vocab.json: the adapter's tokenizer takes its place" in result.stderr
    output = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (adapter / name).read_bytes()
    assert (output / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (output / "vocab.json").exists()
    assert not (output / "tokenization_own.py").exists()
    assert not (output / "adapter_config.json").exists()
    assert json.loads((output / "rawmerge.json").read_text())["options"]["tokenizer"] == "adapter"


def test_a_lost_chat_template_is_told(paths: Paths) -> None:
    base, adapter = paths
    (adapter / "tokenizer_config.json").write_text("{}")
    (note,) = rawmerge.plan_merge(base, adapter, tokenizer="adapter").notes
    assert "chat template is lost" in note


def test_an_adapter_without_a_tokenizer_leaves_the_base_s(tiny: Paths, tmp_path: Path) -> None:
    plan = rawmerge.plan_merge(*tiny, tokenizer="adapter")
    assert plan.notes == ("the adapter brings no tokenizer: the output gets the base's files",)
    rawmerge.run_plan(plan, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tiny[0] / "tokenizer.json").read_bytes()
