"""Base and adapter that do not belong together: what is refused, what is said, and what is fine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rawmerge.errors import PlanError
from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.inputs import identity
from rawmerge.inputs.adapter import read_adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, read_base
from rawmerge.inputs.identity import (
    RECORD_NAME,
    IdentityFinding,
    already_merged,
    base_names,
    check_base_name,
    check_identity,
    merged_adapters,
    read_record,
)
from tests.builders import lora_pair, write_adapter, write_base

COMMIT, OTHER = "a" * 40, "0123456789" * 4
CHAT = "THUDM/chatglm3-6b"


def base_at(folder: Path, **config: Any) -> BaseCheckpoint:
    return read_base(write_base(folder, [{"w": torch.zeros(2, 2)}], {"model_type": "llama", **config}))


def trained_on(name: str, revision: str = "") -> AdapterConfig:
    return AdapterConfig(4, 8.0, base_model_name=name, revision=revision)


def found(base: BaseCheckpoint, name: str, repo: str = "", revision: str = "") -> str:
    """Return `fine`, `note` or `problem`."""
    finding = check_base_name(base, repo, trained_on(name, revision))
    if finding is None:
        return "fine"
    assert bool(finding.problem) != bool(finding.note)
    return "problem" if finding.problem else "note"


def cached(root: Path, repo_id: str, commit: str = COMMIT) -> Path:
    return root / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit


def test_a_base_is_known_by_all_its_names_the_surest_first(tmp_path: Path) -> None:
    base = base_at(cached(tmp_path, "org/cached"), _name_or_path="../stated")
    assert base_names(base, f"org/typed@{COMMIT}") == ("org/typed", "org/cached", "../stated")
    assert base_names(base_at(tmp_path / "folder"), "") == ("folder",)


@pytest.mark.parametrize("value", [None, "", 3, ["a"]], ids=str)
def test_a_config_that_names_nothing_adds_no_name(value: Any, tmp_path: Path) -> None:
    assert base_names(base_at(tmp_path / "folder", _name_or_path=value), "") == ("folder",)


def test_a_hub_id_without_an_owner_is_read_from_the_cache(tmp_path: Path) -> None:
    assert base_names(base_at(cached(tmp_path, "bert-base-uncased")), "") == ("bert-base-uncased",)


def test_a_base_that_is_one_file_is_known_by_its_folder(tmp_path: Path) -> None:
    base_at(tmp_path / "folder")
    assert base_names(read_base(tmp_path / "folder" / "model.safetensors"), "") == ("folder",)


def test_a_relative_folder_has_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_at(tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    assert base_names(read_base(Path()), "") == ("folder",)


@pytest.mark.parametrize(
    "name", ["", "org/Llama-7B", "other/llama-7b", "/data/llama-7b/", r"C:\models\LLAMA-7b", "llama-7b", "./llama-7b"]
)
def test_the_same_last_part_is_the_same_base(name: str, tmp_path: Path) -> None:
    assert found(base_at(tmp_path / "llama-7b"), name) == "fine"
    assert found(base_at(tmp_path / "x"), name, repo=f"org/Llama-7B@{COMMIT}") == "fine"
    assert found(base_at(cached(tmp_path, "org/llama-7b")), name) == "fine"
    assert found(base_at(tmp_path / "y", _name_or_path="org/llama-7b"), name) == "fine"


def test_the_path_of_the_base_is_the_base_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    monkeypatch.chdir(tmp_path)
    for name in ("link", "../" + tmp_path.name + "/link", str(tmp_path / "link")):
        assert found(base, name, repo=f"org/other@{COMMIT}") == "fine"


def known_bases(root: Path) -> list[tuple[BaseCheckpoint, str]]:
    """Return the base chatglm3-6b-base as it is known in three ways, each with its repo."""
    name = f"{CHAT}-base"
    stated = base_at(root / "weights", _name_or_path=name)
    return [(base_at(root / "x"), f"{name}@{COMMIT}"), (base_at(cached(root, name)), ""), (stated, "")]


def test_another_name_on_the_hub_is_refused_where_the_base_s_is_known(tmp_path: Path) -> None:
    for base, repo in known_bases(tmp_path):
        finding = check_base_name(base, repo, trained_on(CHAT))
        assert finding
        assert finding.problem
        assert str(finding.problem).startswith(
            "'base_model_name_or_path': expected the base that the adapter was trained on, 'THUDM/chatglm3-6b', "
            "found 'THUDM/chatglm3-6b-base'"
        )
        assert "--force" in finding.problem.hint


@pytest.mark.parametrize(
    "name",
    [
        "/data/chatglm3",
        "./chatglm3",
        "chatglm3",
        "outputs/run-3",
        "models/chatglm3",
        "me/checkpoint-500",
        "a/b/c",
        "~/a",
    ],
)
def test_another_path_is_worth_a_note(name: str, tmp_path: Path) -> None:
    for base, repo in known_bases(tmp_path):
        assert found(base, name, repo) == "note"


def test_a_path_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert found(base_at(tmp_path / "x"), "org/name", f"{CHAT}@{COMMIT}") == "note"
    assert found(base_at(tmp_path / "x"), "org/gone", f"{CHAT}@{COMMIT}") == "problem"


@pytest.mark.parametrize("stated", ["/home/me/llama", "llama", "outputs/llama", 3])
def test_where_only_folders_are_known_another_name_is_worth_a_note(stated: Any, tmp_path: Path) -> None:
    finding = check_base_name(base_at(tmp_path / "weights", _name_or_path=stated), "", trained_on(CHAT))
    assert finding
    assert finding.problem is None
    assert finding.note.startswith("the adapter says it was trained on 'THUDM/chatglm3-6b'; the base here is ")


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/llama-3-8b-bnb-4bit",
        "unsloth/Meta-Llama-3-8B-unsloth-bnb-4bit",
        "org/Llama-3-8B-GPTQ-Int4",
        "org/llama-3-8b-AWQ",
        "org/llama-3-8b",
    ],
)
def test_a_quantised_or_mirrored_copy_stands_for_the_base(name: str, tmp_path: Path) -> None:
    base, repo = base_at(tmp_path / "x"), f"meta-llama/Meta-Llama-3-8B@{COMMIT}"
    assert found(base, name, repo) == "note"
    assert found(base, name.replace("8", "70"), repo) == "problem"


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "x" * 5000, "a\0b", "loop"])
def test_a_name_that_no_path_may_have_is_only_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert found(base_at(tmp_path / "x"), name) == "note"


def test_a_hub_id_longer_than_any_path_is_still_another_base(tmp_path: Path) -> None:
    assert found(base_at(tmp_path / "x"), "org/" + "x" * 5000, f"{CHAT}@{COMMIT}") == "problem"


def test_a_hostile_name_is_quoted(tmp_path: Path) -> None:
    finding = check_base_name(base_at(tmp_path / "x"), "", trained_on("\x1b[2J" + "a" * 5000))
    assert finding
    assert "\x1b" not in finding.note
    assert len(finding.note) < 500


# Revisions


@pytest.mark.parametrize(
    ("revision", "result"),
    [("", "fine"), ("main", "fine"), (COMMIT, "fine"), (OTHER, "problem"), ("v2", "note"), (OTHER[:10], "note")],
)
def test_the_commit_is_compared_where_both_are_known(revision: str, result: str, tmp_path: Path) -> None:
    assert found(base_at(tmp_path / "x"), CHAT, f"{CHAT}@{COMMIT}", revision) == result
    assert found(base_at(cached(tmp_path, CHAT)), CHAT.upper(), "", revision) == result


@pytest.mark.parametrize("revision", [OTHER, "v2"])
def test_a_commit_that_cannot_be_compared_is_worth_a_note(revision: str, tmp_path: Path) -> None:
    assert found(base_at(tmp_path / "chatglm3-6b"), CHAT, "", revision) == "note"
    assert found(base_at(tmp_path / "x"), CHAT, f"mirror/chatglm3-6b@{COMMIT}", revision) == "note"


# Records


def record_of(*digests: str, **fields: Any) -> dict[str, Any]:
    return {"adapters": [{"files": [{"sha256": digest} for digest in digests]}], **fields}


def test_the_adapters_of_a_record_and_of_earlier_ones_are_found() -> None:
    record = record_of("a", "b", history=[{"files": [{"sha256": "c"}]}, {"files": [{"sha256": "d"}, {"name": "e"}]}])
    assert merged_adapters(record) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    "value", [None, 3, "abc", {}, [3], [{}], [{"files": 3}], [{"files": [3, {"sha256": 3}]}]], ids=str
)
def test_a_record_of_another_shape_names_no_adapter(value: Any) -> None:
    assert merged_adapters({"adapters": value, "history": value}) == frozenset()


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b" " * 1001])
def test_a_broken_record_is_worth_a_note(raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_RECORD_BYTES", 1000)
    (tmp_path / RECORD_NAME).write_bytes(raw)
    record = read_record(tmp_path)
    assert record.fields == {}
    assert record.note.startswith("the base's rawmerge.json cannot be read, so what was merged into it is not known: ")


def test_a_record_that_is_a_folder_is_worth_a_note(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).mkdir()
    assert read_record(tmp_path).note


def test_a_base_without_record_has_nothing_to_say(tmp_path: Path) -> None:
    record = read_record(tmp_path)
    assert (record.fields, record.note) == ({}, "")


def write_merged(root: Path, **history: Any) -> tuple[BaseCheckpoint, Path]:
    """Write an adapter, and a base whose record says that it holds it."""
    adapter = write_adapter(root / "adapter", lora_pair("w", 2, 2))
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    base = base_at(root / "base")
    (root / "base" / RECORD_NAME).write_text(json.dumps(record_of(digest, **history)))
    return base, adapter


def test_an_adapter_that_the_base_holds_is_refused(tmp_path: Path) -> None:
    base, folder = write_merged(tmp_path)
    weights = read_adapter(folder).weights
    problem = already_merged(base.root, weights)
    assert problem
    assert "expected a base without this adapter" in str(problem)
    assert "--force" in problem.hint
    assert already_merged(base.root / "model.safetensors", weights)


def test_another_adapter_is_not(tmp_path: Path) -> None:
    base, _ = write_merged(tmp_path)
    other = write_adapter(tmp_path / "other", lora_pair("w", 2, 2, seed=1))
    assert already_merged(base.root, read_adapter(other).weights) is None


def test_without_a_record_the_adapter_is_not_read(tmp_path: Path) -> None:
    weights = read_adapter(write_adapter(tmp_path / "adapter", lora_pair("w", 2, 2))).weights
    weights.path.unlink()
    assert already_merged(base_at(tmp_path / "base").root, weights) is None


def test_all_that_speaks_against_a_merge_is_said_at_once(tmp_path: Path) -> None:
    base, folder = write_merged(tmp_path)
    adapter = read_adapter(write_adapter(folder, lora_pair("w", 2, 2), base_model_name_or_path=CHAT))
    with pytest.raises(PlanError) as refusal:
        check_identity(base, adapter, f"org/other@{COMMIT}", is_forced=False)
    assert [problem.subject for problem in refusal.value.problems] == [
        "base_model_name_or_path",
        str(folder / "adapter_model.safetensors"),
    ]


def test_by_force_what_speaks_against_a_merge_is_said_in_notes(tmp_path: Path) -> None:
    base, folder = write_merged(tmp_path)
    adapter = read_adapter(write_adapter(folder, lora_pair("w", 2, 2), base_model_name_or_path=CHAT))
    names, merged = check_identity(base, adapter, f"org/other@{COMMIT}", is_forced=True)
    assert names.endswith("found 'org/other'; merged by force")
    assert "expected a base without this adapter" in merged


def test_a_fitting_pair_has_nothing_said_of_it(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", lora_pair("w", 2, 2), base_model_name_or_path="a/base"))
    assert check_identity(base_at(tmp_path / "base"), adapter, "", is_forced=False) == ()
    assert IdentityFinding() == IdentityFinding(None, "")
