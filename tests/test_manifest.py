"""`SHA256SUMS` is what coreutils' sha256sum writes and reads, and a verification compares files with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.output import manifest
from rawmerge.output.manifest import MANIFEST_NAME, MAX_TOLD, Manifest, manifest_problems, parse_manifest
from tests.builders import lora_pair, random_tensor, write_adapter, write_base

Paths = tuple[Path, Path]
needs_sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no coreutils")
ODD_NAMES = ["plain.txt", "with space", "back\\slash", "new\nline", "return\r", "ümlaut", "sub/of folder.txt"]


def sha256sum(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["sha256sum", *arguments], cwd=folder, capture_output=True, check=False)


def write(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) * 3)


def manifest_of_shards(folder: Path) -> bytes:
    return lines_of(folder, [at.name for at in folder.glob("*.safetensors")])


def lines_of(folder: Path, names: list[str]) -> bytes:
    return b"".join(f"{hashlib.sha256((folder / at).read_bytes()).hexdigest()}  {at}\n".encode() for at in names)


def manifest_of(folder: Path) -> bytes:
    manifest = Manifest(folder)
    try:
        return manifest.raw()
    finally:
        manifest.close()


@needs_sha256sum
def test_every_file_is_listed_as_sha256sum_would(tmp_path: Path) -> None:
    write(tmp_path, ODD_NAMES)
    raw = manifest_of(tmp_path)
    theirs = sha256sum(tmp_path, *ODD_NAMES).stdout
    assert sorted(raw.splitlines(keepends=True)) == sorted(theirs.splitlines(keepends=True))
    assert parse_manifest(theirs).keys() == set(ODD_NAMES)
    assert list(manifest_problems(tmp_path, parse_manifest(theirs))) == []
    (tmp_path / MANIFEST_NAME).write_bytes(raw)
    assert sha256sum(tmp_path, "-c", "--strict", MANIFEST_NAME).returncode == 0
    assert manifest_of(tmp_path) == raw  # it does not list itself


@needs_sha256sum
@pytest.mark.parametrize("choices", [{}, {"consume_base": True}, {"threads": 1, "verify": True}])
def test_an_output_has_a_manifest_that_sha256sum_accepts(tmp_path: Path, choices: dict[str, Any]) -> None:
    path = "model.layers.0.self_attn.q_proj"
    shards = [{f"{path}.weight": random_tensor((24, 16))}, {"norm.weight": random_tensor((16,), seed=3)}]
    base = write_base(tmp_path / "base", shards)
    (base / "vocabularies").mkdir()
    (base / "vocabularies/words.txt").write_text("a b c")
    (base / MANIFEST_NAME).write_text("of the base, and wrong of the output")
    adapter = write_adapter(tmp_path / "adapter", lora_pair(path, 24, 16), target_modules=["q_proj"])
    plan = rawmerge.plan_merge(base, adapter)
    assert (MANIFEST_NAME, "checksums of the base's files") in {(item.name, item.reason) for item in plan.left_out}
    output = tmp_path / "out"
    rawmerge.run_plan(plan, output, checksum=True, **choices)
    done = sha256sum(output, "-c", "--strict", MANIFEST_NAME)
    assert (done.returncode, done.stderr) == (0, b"")
    files = {at.relative_to(output).as_posix() for at in output.rglob("*") if at.is_file()}
    assert parse_manifest((output / MANIFEST_NAME).read_bytes()).keys() == files - {MANIFEST_NAME}
    made = rawmerge.verify_merge(output)
    assert made.is_equal
    assert f"compared by {MANIFEST_NAME}" in made.notes[0]


def test_without_the_option_there_is_none(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_verification_finds_what_was_changed_or_removed(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output, checksum=True)
    assert rawmerge.verify_merge(output, *tiny).is_equal
    shard = next(output.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    (output / "tokenizer.json").unlink()
    findings = {finding.subject: finding for finding in rawmerge.verify_merge(output).findings}
    assert findings.keys() == {shard.name, "tokenizer.json"}
    assert hashlib.sha256(raw).hexdigest() in findings[shard.name].found
    assert {shard.name, "tokenizer.json"} <= {at.subject for at in rawmerge.verify_merge(output, *tiny).findings}


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"0" * 63 + b"  a",
        b"0" * 64 + b"  ../a",
        b"0" * 64 + b"  /etc/passwd",
        b"0" * 64 + b"  ./../a",
        b"0" * 64 + b"  .//./etc/..",
        b"0" * 64 + b"  ./",
        b"0" * 64 + b"  ",
        b"0" * 64 + b"  a\0b",
    ],
)
def test_what_is_no_manifest_or_leads_out_of_the_folder_is_a_finding(tiny: Paths, tmp_path: Path, line: bytes) -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_manifest(b"0" * 64 + b"  b\n" + line + b"\n")
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    (output / MANIFEST_NAME).write_bytes(b"0" * 64 + b"  b\n" + line + b"\n")
    (finding,) = rawmerge.verify_merge(output).findings
    assert (finding.subject, finding.found) == (MANIFEST_NAME, "line 2")


@needs_sha256sum
@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        (b"%s  ./f\n", True),
        (b"%s *./sub//f\n", True),
        (b"%s  f\r\n", True),
        (b"# of the hub\n%s  sub/./f\r\n", True),
        (b"%s  ./f/\n", False),
        (b"%s  g\n", False),
    ],
)
def test_names_and_line_ends_that_sha256sum_takes_are_taken(tmp_path: Path, line: bytes, is_right: bool) -> None:
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "f", tmp_path / "sub/f"):
        path.write_bytes(b"content")
    raw = line % hashlib.sha256(b"content").hexdigest().encode()
    (tmp_path / MANIFEST_NAME).write_bytes(raw)
    assert (sha256sum(tmp_path, "-c", MANIFEST_NAME).returncode == 0) == is_right
    assert (outcome_of(tmp_path, raw) == []) == is_right


def outcome_of(folder: Path, raw: bytes) -> list[str]:
    """Return what is found wrong with a folder, by a manifest."""
    try:
        return [str(problem) for problem in manifest_problems(folder, parse_manifest(raw))]
    except ValueError as error:
        return [str(error)]


def test_a_name_twice_is_no_manifest() -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_manifest(b"0" * 64 + b"  a\n" + b"1" * 64 + b"  a\n")


def test_a_pipe_in_a_manifest_is_not_waited_for(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    os.mkfifo(output / "pipe")
    (output / MANIFEST_NAME).write_bytes(manifest_of_shards(output) + b"0" * 64 + b"  pipe\n")
    (finding,) = rawmerge.verify_merge(output).findings
    assert "regular file" in finding.expected
    (output / MANIFEST_NAME).unlink()
    os.mkfifo(output / MANIFEST_NAME)
    assert any("regular file" in finding.expected for finding in rawmerge.verify_merge(output).findings)


@pytest.mark.parametrize("raw", [b"", b"\n" * 1000])
def test_a_manifest_that_lists_no_shard_is_a_finding(tiny: Paths, tmp_path: Path, raw: bytes) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    (output / MANIFEST_NAME).write_bytes(raw)
    shards = {path.name for path in output.glob("*.safetensors")}
    assert {finding.subject for finding in rawmerge.verify_merge(output).findings} == shards


def test_one_file_that_is_none_does_not_hide_another(tmp_path: Path) -> None:
    write(tmp_path, ["a", "folder/b"])
    digests = {"folder": "0" * 64, "a": "0" * 64}
    assert [problem.subject for problem in manifest_problems(tmp_path, digests)] == [str(tmp_path / "folder"), "a"]


def test_of_many_thousand_lines_the_first_are_told_and_the_others_counted(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    bogus = b"".join(b"0" * 64 + b"  bogus%dx\n" % number for number in range(30_000))
    changed = b"".join(b"1" * 64 + b"  %s\n" % at.name.encode() for at in output.iterdir())
    (output / MANIFEST_NAME).write_bytes(bogus + changed)
    tracemalloc.start()
    try:
        findings = rawmerge.verify_merge(output).findings
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    count = len(changed.splitlines())
    assert len(findings) == 1 + MAX_TOLD + count
    assert findings[0].subject == MANIFEST_NAME
    assert findings[0].found == f"30000, of which the first {MAX_TOLD} are told"
    assert peak < 8 * len(bogus)
    told = CliRunner().invoke(cli, ["verify", str(output)])
    assert "30000" in told.stdout
    assert len(told.stdout.splitlines()) < 60
    assert len(json.loads(CliRunner().invoke(cli, ["verify", str(output), "--json"]).stdout)["findings"]) == len(
        findings
    )


def test_a_file_is_read_once_whatever_the_number_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a"])
    (tmp_path / "around").symlink_to(tmp_path)
    names = ["around/" * depth + "a" for depth in range(30)]
    read: list[Path] = []

    def count(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(manifest, "file_digest", count)
    digest = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert list(manifest_problems(tmp_path, dict.fromkeys(names, digest))) == []
    assert read == [tmp_path / "a"]


@pytest.mark.parametrize(
    "name", ["other.safetensors", "consolidated.safetensors", "pytorch_model.bin", "merged-q4.gguf"]
)
def test_weights_that_a_manifest_does_not_list_are_a_finding_and_others_a_note(
    tiny: Paths, tmp_path: Path, name: str
) -> None:
    base, output = tiny[0], tmp_path / "out"
    (base / name).write_bytes(b"weights")
    assert rawmerge.verify_merge(base).findings == ()
    assert any(name in note for note in rawmerge.verify_merge(base).notes)
    (base / MANIFEST_NAME).write_bytes(lines_of(base, [at.name for at in base.glob("model*.safetensors")]))
    (finding,) = rawmerge.verify_merge(base).findings
    assert (finding.subject, finding.found) == (name, "a file of weights that nothing lists")

    (base / name).unlink()
    rawmerge.merge_adapter(*tiny, output)
    (output / name).write_bytes(b"weights")
    for arguments in ((), tiny):
        assert {finding.subject for finding in rawmerge.verify_merge(output, *arguments).findings} == {name}
    (output / MANIFEST_NAME).write_bytes(manifest_of(output))  # whoever writes this means it
    made = rawmerge.verify_merge(output, *tiny)
    assert made.findings == ()
    assert any(name in note for note in made.notes)


def test_what_a_trainer_leaves_is_no_weights(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "notes.md"):
        (output / name).write_bytes(b"")
    made = rawmerge.verify_merge(output)
    assert (made.findings, len(made.notes)) == ((), 1)
