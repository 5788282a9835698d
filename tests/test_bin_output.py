"""`--format bin`: files as `torch.save` writes them, with the tensors that a merge to safetensors has."""

from __future__ import annotations

import errno
import io
import json
import os
import pickletools
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import rawmerge
from rawmerge.cli import cli
from rawmerge.engine.archived_shard import ArchivedShard
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import MergeError, OutputError, PlanError
from rawmerge.formats import table_pickle as table_module
from rawmerge.formats.archive_layout import archive_layout
from rawmerge.formats.shard_header import TensorEntry
from rawmerge.formats.table_pickle import table_pickle
from rawmerge.output import finished_shards, shard_journal
from tests.builders import (
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    raw,
    read_all,
    write_adapter,
    write_base,
)
from tests.kill_rounds import run_rounds
from tests.test_faults import Fault, places
from tests.test_memory import MEBIBYTE, allowed, both_paths, imported, peak_of, write_layers

__all__ = ["imported"]  # a fixture

Paths = tuple[Path, Path]
INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
LONG_AGO = 1_600_000_000
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
SHAPES = [(), (0,), (3, 0, 2), (7,), (3, 5), (1, 2, 3), (2, 1, 2, 3), (300, 2)]


def of_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor whose bytes are all different ones where they may be."""
    count, width = prod(shape), torch.empty(0, dtype=dtype).element_size()
    content = torch.arange(count * width) % (2 if dtype == torch.bool else 251)
    return content.to(torch.uint8).view(dtype).reshape(shape)


def all_dtypes() -> dict[str, torch.Tensor]:
    return {f"{code}.{i}": of_dtype(dtype, shape) for dtype, code in CODES.items() for i, shape in enumerate(SHAPES)}


def bin_names(count: int) -> list[str]:
    return [f"pytorch_model-{number:05d}-of-{count:05d}.bin" for number in range(1, count + 1)]


def loaded(folder: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder as torch reads them, with every checksum compared."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        table = torch.load(path, weights_only=True, mmap=mmap)
        assert type(table) is dict
        assert not table.keys() & tensors.keys()
        tensors |= table
    return tensors


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def names(folder: Path, suffix: str = "") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(suffix))


def small(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Paths:
    """Write a base of one file, with a tensor that an adapter changes beside the others."""
    base = write_base(folder / "base", [{"q_proj.weight": random_tensor((12, 8)), **tensors}])
    return base, write_adapter(folder / "adapter", lora_pair("q_proj", 12, 8))


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, and an adapter that changes all of them, both written long ago."""
    paths = layered_merge(tmp_path, changed=(0, 1, 2))
    for path in (file for folder in paths for file in folder.iterdir()):
        os.utime(path, (LONG_AGO, LONG_AGO))
    time.sleep(0.06)
    return paths


@pytest.fixture
def twin(layered: Paths, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the same merge to safetensors."""
    rawmerge.merge_adapter(*layered, tmp_path / "twin")
    tensors = read_all(tmp_path / "twin")
    shutil.rmtree(tmp_path / "twin")
    return tensors


@pytest.fixture
def golden(layered: Paths, tmp_path: Path) -> dict[str, bytes]:
    """Return the bytes of an uninterrupted merge."""
    rawmerge.merge_adapter(*layered, tmp_path / "golden", format="bin")
    found = folder_bytes(tmp_path / "golden")
    shutil.rmtree(tmp_path / "golden")
    return found


# --- the format ---


def opcodes(pickled: bytes) -> list[tuple[str, Any]]:
    """Return what a pickle does, but for what it remembers."""
    of_memo = {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
    found = [(code.name, value) for code, value, _ in pickletools.genops(pickled) if code.name not in of_memo]
    # what is said again is written again, or taken from memory
    return [step for step in found if step[0] not in {"GLOBAL", "BINUNICODE"}]


def entries_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorEntry]:
    entries, start = [], 0
    for name, tensor in tensors.items():
        entries.append(TensorEntry(name, CODES[tensor.dtype], tuple(tensor.shape), start, start + tensor.nbytes))
        start += tensor.nbytes
    return entries


def saved_pickle(tensors: Mapping[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(dict(tensors), file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


@pytest.mark.parametrize("count", [0, 1, 2500])
def test_the_pickle_does_what_torch_save_s_does(count: int) -> None:
    tensors = all_dtypes() if count == 1 else {f"ünï.{i}": torch.zeros(i % 3) for i in range(count)}
    ours = table_pickle(entries_of(tensors))
    assert opcodes(ours) == opcodes(saved_pickle(tensors))
    assert {value for code, value, _ in pickletools.genops(ours) if code.name == "GLOBAL"} == {
        value for code, value, _ in pickletools.genops(saved_pickle(tensors)) if code.name == "GLOBAL"
    }


def test_sizes_of_all_lengths_are_numbers_of_the_pickle() -> None:
    sizes = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**62]
    entries = [TensorEntry(f"{size}", "U8", (size,), 0, size) for size in sizes]
    tensors = {f"{size}": torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes}
    found = [
        value
        for code, value, _ in pickletools.genops(table_pickle(entries))
        if code.name.startswith(("BININT", "LONG1"))
    ]
    expected = [number for size in sizes for number in (size, 0, size, tensors[f"{size}"].stride()[0])]
    assert found == expected


def write_archive(path: Path, entries: list[TensorEntry], contents: Mapping[int, bytes]) -> None:
    """Write a file of zeros but for some tensors' last bytes, with holes where it is zero."""
    layout = archive_layout(entries)
    checksums = []
    with path.open("wb") as file:
        file.truncate(layout.byte_count)
        for number, (size, begin) in enumerate(zip(layout.sizes, layout.tensor_starts, strict=True)):
            end = contents.get(number, b"")
            zeros, checksum = size - len(end), 0
            for start in range(0, zeros, 2**24):
                checksum = zlib.crc32(bytes(min(2**24, zeros - start)), checksum)
            checksums.append(zlib.crc32(end, checksum))
            file.seek(begin + zeros)
            file.write(end)
        for offset, part in layout.frames(checksums):
            file.seek(offset)
            file.write(part)
    assert path.stat().st_size == layout.byte_count


@pytest.mark.slow
def test_members_and_places_beyond_4_gib(tmp_path: Path) -> None:
    large = 2**32 + 6
    entries = [
        TensorEntry("large", "U8", (large,), 0, large),
        TensorEntry("behind", "BF16", (3,), large, large + 6),
        TensorEntry("edge", "U8", (2**32 - 1,), large + 6, large + 5 + 2**32),
    ]
    write_archive(tmp_path / SINGLE, entries, {0: b"end", 1: b"abcdef", 2: b"last"})
    with zipfile.ZipFile(tmp_path / SINGLE) as archive:
        assert archive.testzip() is None
    found = torch.load(tmp_path / SINGLE, weights_only=True, mmap=True)
    assert [raw(found[name][-size:]) for name, size in (("large", 3), ("behind", 3), ("edge", 4))] == [
        b"end",
        b"abcdef",
        b"last",
    ]


@pytest.mark.slow
def test_more_members_than_a_list_of_16_bits_counts(tmp_path: Path) -> None:
    entries = [TensorEntry(f"{i}", "U8", (1,), i, i + 1) for i in range(70_000)]
    write_archive(tmp_path / SINGLE, entries, {69_999: b"x"})
    with zipfile.ZipFile(tmp_path / SINGLE) as archive:
        assert len(archive.infolist()) == 70_003
    assert raw(torch.load(tmp_path / SINGLE, weights_only=True)["69999"]) == b"x"


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_of_every_dtype_and_shape_are_what_the_safetensors_library_reads(tmp_path: Path, mmap: bool) -> None:
    base, adapter = small(tmp_path, all_dtypes())
    rawmerge.merge_adapter(base, adapter, tmp_path / "one")
    rawmerge.merge_adapter(base, adapter, tmp_path / "two", format="bin", verify=True)
    found = loaded(tmp_path / "two", mmap=mmap)
    assert_same(found, read_all(tmp_path / "one"))
    with safe_open(base / "model.safetensors", "pt") as file:
        in_order = [name for name in file.offset_keys() if found[name].numel()]  # of empty ones it has none
    assert [name for name in found if found[name].numel()] == in_order
    with zipfile.ZipFile(tmp_path / "two" / SINGLE) as archive:
        assert len(archive.infolist()) == len(found) + 3
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tq", tmp_path / "two" / SINGLE], check=True, capture_output=True)


def test_every_tensor_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    rawmerge.merge_adapter(*small(tmp_path, all_dtypes()), tmp_path / "out", format="bin")
    content = (tmp_path / "out" / SINGLE).read_bytes()
    with zipfile.ZipFile(tmp_path / "out" / SINGLE) as archive:
        for info in archive.infolist():
            lengths = struct.unpack_from("<HH", content, info.header_offset + 26)
            start = info.header_offset + 30 + sum(lengths)
            assert start % 64 == 0
            assert content[start : start + info.file_size] == archive.read(info)


def test_what_is_written_twice_and_in_pieces_has_the_checksum_of_what_is_there(layered: Paths, tmp_path: Path) -> None:
    (shard, *_) = rawmerge.plan_merge(*layered, format="bin").shards
    path, content = tmp_path / SINGLE, os.urandom(shard.steps[-1].entry.end)
    file = ArchivedShard(OutputFile(path, shard.byte_count), path, shard)
    file.write_header(shard.header_text)
    file.write_at(shard.data_start, memoryview(bytes(len(content))))
    for start in range(0, len(content), 7):
        file.write_at(shard.data_start + start, memoryview(content[start : start + 7]))
    file.write_at(shard.data_start, memoryview(content[:5]))
    file.finish()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert b"".join(map(raw, torch.load(path, weights_only=True).values())) == content


# --- files and their names ---


def test_shards_index_and_record(layered: Paths, tmp_path: Path, twin: dict[str, torch.Tensor]) -> None:
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin", checksum=True, verify=True)
    assert names(tmp_path / "out", ".bin") == bin_names(3)
    assert not names(tmp_path / "out", ".safetensors")
    assert_same(loaded(tmp_path / "out"), twin)
    before = json.loads((layered[0] / "model.safetensors.index.json").read_text())
    after = {name: bin_names(3)[int(shard[6:11]) - 1] for name, shard in before["weight_map"].items()}
    index = {"metadata": before["metadata"], "weight_map": after}
    assert (tmp_path / "out" / INDEX).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert json.loads((tmp_path / "out/rawmerge.json").read_text())["options"]["format"] == "bin"
    assert "--format bin" in (tmp_path / "out/README.md").read_text()
    told = {"rawmerge.json", "SHA256SUMS"}
    assert summary.byte_count == sum(
        path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name not in told
    )
    assert rawmerge.verify_merge(tmp_path / "out", *layered).findings == ()
    alone = rawmerge.verify_merge(tmp_path / "out")
    assert (alone.findings, len(alone.notes)) == ((), 1)
    facts = rawmerge.inspect_path(tmp_path / "out").facts
    assert "format bin" in str(facts["merged with"])
    assert (facts["shards"], facts["index"], facts["tensors"]) == (3, "yes", 6)


def test_records_and_plans_of_safetensors_say_nothing_of_it(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", format="safetensors")
    assert "format" not in json.loads((tmp_path / "out/rawmerge.json").read_text())["options"]
    assert "--format" not in (tmp_path / "out/README.md").read_text()


def test_the_command_line_takes_it(layered: Paths, tmp_path: Path) -> None:
    command = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--format", "bin", "--max-shard-size", "300B"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    assert names(tmp_path / "out", ".bin") == bin_names(3)
    done = CliRunner().invoke(cli, ["plan", *map(str, layered), "--format", "bin"], catch_exceptions=False)
    assert INDEX in done.output
    assert CliRunner().invoke(cli, [*command, "--format", "gguf"]).exit_code == 2


@pytest.mark.parametrize("is_pickled", [False, True])
def test_one_file_for_all_has_no_index(
    layered: Paths, tmp_path: Path, twin: dict[str, torch.Tensor], is_pickled: bool
) -> None:
    base = pickled_twin(layered[0]) if is_pickled else layered[0]
    rawmerge.merge_adapter(base, layered[1], tmp_path / "out", format="bin", max_shard_size="1GB", verify=True)
    assert [name for name in names(tmp_path / "out") if "model" in name] == [SINGLE]
    assert_same(loaded(tmp_path / "out"), twin)


def pickled_twin(base: Path) -> Path:
    """Write a base again as `torch.save` writes it."""
    folder = base.parent / "pickled"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    for path, name in zip(sorted(base.glob("*.safetensors")), bin_names(3), strict=True):
        with safe_open(path, "pt") as file:
            torch.save({key: file.get_tensor(key) for key in file.keys()}, folder / name)  # noqa: SIM118  # no mapping
    index = (base / "model.safetensors.index.json").read_text()
    (folder / INDEX).write_text(index.replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
    return folder


def test_pickles_keep_their_names(layered: Paths, tmp_path: Path, twin: dict[str, torch.Tensor]) -> None:
    base = pickled_twin(layered[0])
    rawmerge.merge_adapter(base, layered[1], tmp_path / "out", format="bin")
    assert names(tmp_path / "out", ".bin") == names(base, ".bin")
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == json.loads((base / INDEX).read_text())
    assert_same(loaded(tmp_path / "out"), twin)
    assert rawmerge.verify_merge(tmp_path / "out", base, layered[1]).findings == ()
    again = write_adapter(tmp_path / "again", lora_pair("model.layers.0.q_proj", 12, 8, seed=5))
    rawmerge.merge_adapter(tmp_path / "out", again, tmp_path / "both", format="bin")
    assert rawmerge.verify_merge(tmp_path / "both", tmp_path / "out", again).findings == ()


@pytest.mark.parametrize(
    ("stored", "named"), [("weights.safetensors", SINGLE), ("model-00001-of-00001.safetensors", SINGLE)]
)
def test_a_file_of_another_name_gets_the_one_that_loaders_look_for(tmp_path: Path, stored: str, named: str) -> None:
    base, adapter = small(tmp_path, {})
    (base / "model.safetensors").rename(base / stored)
    for number, source in enumerate((base, base / stored)):
        rawmerge.merge_adapter(source, adapter, tmp_path / f"out{number}", format="bin")
        assert names(tmp_path / f"out{number}", ".bin") == [named]
        assert rawmerge.verify_merge(tmp_path / f"out{number}", source, adapter).findings == ()


def test_shards_that_an_index_names_otherwise_keep_their_names(layered: Paths, tmp_path: Path) -> None:
    base = layered[0]
    for path in base.glob("*.safetensors"):
        path.rename(base / path.name.replace("model-", "part-"))
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "part-"))
    rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    assert names(tmp_path / "out", ".bin") == [f"part-0000{number}-of-00003.bin" for number in (1, 2, 3)]
    assert rawmerge.verify_merge(tmp_path / "out", *layered).findings == ()


def test_a_second_set_of_the_base_has_no_say(layered: Paths, tmp_path: Path) -> None:
    for name in (*bin_names(3), SINGLE):
        torch.save({"stale": torch.zeros(2)}, layered[0] / name)
    (layered[0] / INDEX).write_text("{}")
    plan = rawmerge.plan_merge(*layered, format="bin")
    assert [file.name for file in plan.left_out] == [SINGLE]
    rawmerge.run_plan(plan, tmp_path / "out")
    assert names(tmp_path / "out", ".bin") == bin_names(3)
    assert "stale" not in loaded(tmp_path / "out")


def test_what_the_adapter_replaces_and_adds_is_there(tmp_path: Path) -> None:
    base, _ = small(tmp_path, {"model.norm.weight": random_tensor((8,))})
    brought = random_tensor((8,), seed=3)
    adapter = write_adapter(
        tmp_path / "adapter", {"base_model.model.model.norm.weight": brought}, modules_to_save=["norm"]
    )
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", format="bin")
    assert raw(loaded(tmp_path / "out")["model.norm.weight"]) == raw(brought)
    same = write_adapter(
        tmp_path / "same",
        {"base_model.model.model.norm.weight": random_tensor((8,))},
        modules_to_save=["norm"],
    )
    with pytest.raises(MergeError, match="chang"):
        rawmerge.merge_adapter(base, same, tmp_path / "none", format="bin")


def test_threads_and_paths_change_no_byte(tmp_path: Path) -> None:
    shape = (700, 1100)
    tensors = {f"{i}.q_proj.weight": random_tensor(shape, seed=i) for i in range(3)} | {"odd": torch.zeros(3).bool()}
    base = write_base(tmp_path / "base", [tensors])
    pairs = lora_pair("0.q_proj", *shape) | lora_pair("2.q_proj", *shape)
    adapter = write_adapter(tmp_path / "adapter", pairs)
    found = []
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 8}, {"threads": 8}, {"max_memory": 2**29, "threads": 2}]
    ways += [{"without": [name]} for name in ("kernel", "preallocation", "direct-io")]
    for number, way in enumerate(ways):
        rawmerge.merge_adapter(base, adapter, tmp_path / f"{number}", format="bin", **way)
        found.append((tmp_path / f"{number}" / SINGLE).read_bytes())
    assert len(set(found)) == 1
    rawmerge.merge_adapter(base, adapter, tmp_path / "twin")
    assert_same(loaded(tmp_path / "0"), read_all(tmp_path / "twin"))


# --- what is refused ---


def write_raw(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    header, data = {}, b""
    for name, (code, shape, content) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_does_not_save_are_refused_before_anything_is_written(tmp_path: Path, code: str) -> None:
    base, adapter = small(tmp_path, {})
    weight = ("BF16", [12, 8], raw(random_tensor((12, 8))))
    write_raw(
        base / "model.safetensors", {"q_proj.weight": weight, "packed": (code, [8], bytes(4 if code == "F4" else 6))}
    )
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "kept").counts["kept"] == 1
    with pytest.raises(PlanError) as caught:
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", format="bin")
    (problem,) = caught.value.problems
    assert (problem.subject, code in problem.found) == ("packed", True)
    assert "--format safetensors" in problem.hint
    assert not (tmp_path / "out").exists()
    stranger = rawmerge.format_plan(rawmerge.plan_merge(base, adapter)).replace(
        'model.safetensors", "header', f'{SINGLE}", "header'
    )
    assert SINGLE in stranger
    with pytest.raises(PlanError) as again:
        rawmerge.parse_plan(stranger)
    assert again.value.problems == caught.value.problems


def test_a_table_that_could_not_be_read_again_is_refused(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawmerge.formats.table_pickle.MAX_PICKLE_BYTES", 100)
    with pytest.raises(PlanError) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    assert [problem.subject for problem in caught.value.problems] == bin_names(3)
    assert "--max-shard-size" in caught.value.problems[0].hint
    assert rawmerge.plan_merge(*layered).shards


def renamed_shards(base: Path, renamed: Mapping[str, str]) -> None:
    """Give shards of an indexed base other names."""
    index = base / "model.safetensors.index.json"
    text = index.read_text()
    for before, after in renamed.items():
        (base / before).rename(base / after)
        text = text.replace(before, after)
    index.write_text(text)


def test_shards_that_would_have_one_name_are_named_with_a_way_out(layered: Paths, tmp_path: Path) -> None:
    shard = "model-0000{}-of-00003.safetensors".format
    renamed_shards(layered[0], {shard(1): "model.safetensors", shard(2): "pytorch_model.safetensors"})
    with pytest.raises(PlanError) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    (problem,) = caught.value.problems
    assert problem.subject == SINGLE
    assert problem.found == "it for model.safetensors and pytorch_model.safetensors"
    assert "--max-shard-size" in problem.hint
    assert "--format safetensors" in problem.hint
    for number, way in enumerate(({"max_shard_size": "300B", "format": "bin"}, {"format": "safetensors"})):
        rawmerge.merge_adapter(*layered, tmp_path / f"out{number}", **way)  # type: ignore[arg-type]  # names vary
        assert rawmerge.verify_merge(tmp_path / f"out{number}", *layered).findings == ()


def test_a_folder_of_the_base_with_an_output_file_s_name_is_left_out(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {})
    for folder in (SINGLE, INDEX):
        (base / folder).mkdir()
        for name in ("one.txt", "two.txt"):
            (base / folder / name).write_text("x")
    (base / "weights").mkdir()
    (base / "weights/kept.txt").write_text("x")
    plan = rawmerge.plan_merge(base, adapter, format="bin")
    assert {file.name for file in plan.left_out} == {f"{SINGLE}/", f"{INDEX}/"}
    rawmerge.run_plan(plan, tmp_path / "out")
    assert rawmerge.verify_merge(tmp_path / "out", base, adapter).findings == ()
    assert (tmp_path / "out/weights/kept.txt").exists()
    assert (tmp_path / "out" / SINGLE).is_file()
    rawmerge.merge_adapter(base, adapter, tmp_path / "same")
    assert (tmp_path / "same" / SINGLE / "two.txt").exists()


@pytest.mark.parametrize("top", [SINGLE, "rawmerge.json", "README.md"])
def test_a_plan_of_a_folder_with_an_output_file_s_name_is_refused(tmp_path: Path, top: str) -> None:
    base, adapter = small(tmp_path, {})
    (base / "notes").mkdir()
    (base / "notes/one.txt").write_text("x")
    plan = rawmerge.plan_merge(base, adapter, format="bin")
    sides = tuple(replace(side, name=side.name.replace("notes/", f"{top}/")) for side in plan.side_files)
    with pytest.raises(PlanError) as caught:
        rawmerge.run_plan(replace(plan, side_files=sides), tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.subject, bool(problem.hint)) == (f"{top}/one.txt", True)
    assert names(tmp_path) == ["adapter", "base"]


def test_a_file_of_the_base_with_a_shard_s_name_is_left_out(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, {})
    (base / "model.safetensors").rename(base / "part.safetensors")
    places = {"metadata": {}, "weight_map": {"q_proj.weight": "part.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(places))
    (base / "part.bin").write_text("x")
    plan = rawmerge.plan_merge(base, adapter, format="bin")
    assert [file.name for file in plan.left_out] == ["part.bin"]
    rawmerge.run_plan(plan, tmp_path / "out", verify=True)
    assert zipfile.is_zipfile(tmp_path / "out/part.bin")


def test_links_and_other_words_are_refused(layered: Paths, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin", link=True)
    assert [problem.subject for problem in caught.value.problems] == ["--link"]
    with pytest.raises(ValueError, match="format must be one of"):
        rawmerge.plan_merge(*layered, format="pickle")


def test_a_plan_comes_back_from_json_and_runs(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    plan = rawmerge.plan_merge(*layered, format="bin")
    again = rawmerge.parse_plan(rawmerge.format_plan(plan))
    assert again == plan
    rawmerge.run_plan(again, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == golden


# --- verifying ---


def test_a_byte_that_is_another_is_found(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    path = tmp_path / "out" / bin_names(3)[1]
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/0")
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))
    content[start] ^= 1
    path.write_bytes(content)
    found = rawmerge.verify_merge(tmp_path / "out", *layered)
    assert [difference.differing for difference in found.differences] == [1]
    assert found.differences[0].name.startswith("model.layers.1.")


def test_missing_index_shard_and_strays_are_found(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    (tmp_path / "out" / INDEX).rename(tmp_path / "index")
    assert [finding.subject for finding in rawmerge.verify_merge(tmp_path / "out").findings] == [INDEX]
    (tmp_path / "index").rename(tmp_path / "out" / INDEX)
    shutil.copy(tmp_path / "out" / bin_names(3)[0], tmp_path / "out" / SINGLE)
    assert [finding.subject for finding in rawmerge.verify_merge(tmp_path / "out").findings] == [SINGLE]
    (tmp_path / "out" / SINGLE).unlink()
    tensors = torch.load(tmp_path / "out" / bin_names(3)[0], weights_only=True)
    torch.save(tensors, tmp_path / "out" / bin_names(3)[0])  # of the same values, and not as it was written
    found = rawmerge.verify_merge(tmp_path / "out", *layered)
    assert [finding.subject for finding in found.findings] == [bin_names(3)[0]]
    assert found.differences == ()


# --- earlier merges ---


def test_shards_that_were_made_before_are_taken_over(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    again = rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin", overwrite=True)
    assert (again.reused, folder_bytes(tmp_path / "out")) == (3, golden)
    other = rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True)
    assert (other.reused, names(tmp_path / "out", ".bin")) == (0, [])
    back = rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True, format="bin")
    assert (back.reused, folder_bytes(tmp_path / "out")) == (0, golden)


def cut_off(paths: Paths, output: Path, finished: int, **options: Any) -> None:
    """Merge until so many shards are finished; the next one cannot be made durable."""
    left, finish = finished, OutputFile.finish

    def finish_some(file: OutputFile, **named: Any) -> None:
        nonlocal left
        if file.path.suffix == ".bin":
            if not left:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left -= 1
        finish(file, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "finish", finish_some)
        with pytest.raises(MergeError):
            rawmerge.merge_adapter(*paths, output, threads=1, format="bin", **options)


def flipped(path: Path, place: Callable[[bytes], int]) -> None:
    """Change a byte of a file, and leave its times alone."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[place(bytes(content))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("boot", ["the same", "another"])
@pytest.mark.parametrize(
    "place",
    [
        None,
        lambda raw: raw.index(b"data/1") - 10,
        lambda raw: raw.rindex(b"data/1") - 30,
        lambda raw: raw.index(b"ZZZ"),
    ],
    ids=["whole", "header", "checksum", "padding"],
)
def test_the_same_command_goes_on_from_finished_shards(
    layered: Paths,
    tmp_path: Path,
    golden: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    boot: str,
    place: Callable[[bytes], int] | None,
) -> None:
    cut_off(layered, tmp_path / "out", 2)
    (hidden,) = (path for path in tmp_path.iterdir() if path.name.startswith(".rawmerge-"))
    assert names(hidden / "output", ".bin") == bin_names(3)[:2]
    if place:
        flipped(hidden / "output" / bin_names(3)[0], place)
    if boot == "another":
        monkeypatch.setattr(finished_shards, "boot_id", lambda: boot)
        monkeypatch.setattr(shard_journal, "boot_id", lambda: boot)
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin").resumed == (1 if place else 2)
    assert folder_bytes(tmp_path / "out") == golden


def test_another_format_starts_over_and_says_so(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 2)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert summary.resumed == 0
    assert any("--format" in note for note in summary.notes)
    assert names(tmp_path / "out", ".bin") == []


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_operation_that_fails_leaves_the_output_absent_or_whole(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = failed = 0
    for name in ("open", "preadv", "pwrite", "fsync", "posix_fallocate", "close"):
        for number in places(all_of_them=all_of_them):
            with monkeypatch.context() as patch:
                fault = Fault(patch, name, number)
                try:
                    rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin", threads=1)
                except (MergeError, rawmerge.RefusedError):
                    failed += 1
            count += 1
            if not (tmp_path / "out").exists():
                rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin", threads=1)
            assert folder_bytes(tmp_path / "out") == golden, (name, number)
            shutil.rmtree(tmp_path / "out")
            if not fault.has_come:
                break
    assert failed > count / 2


def test_a_file_that_cannot_be_read_back_is_named(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def fails(descriptor: int, *arguments: Any) -> int:
        if Path(f"/proc/self/fd/{descriptor}").resolve().suffix == ".bin":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(MergeError, match=r"pytorch_model-0000\d-of-00003.bin.*reading back at byte"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")


@pytest.mark.parametrize("mode", ["bin", pytest.param("consume-bin", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("step", "kills"), [(19, 1), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation_the_next_run_ends_with_the_same_bytes(
    tmp_path: Path, mode: str, step: int, kills: int
) -> None:
    layered_merge(tmp_path, changed=(0, 1, 2))
    found = run_rounds(tmp_path, mode, step, kills)
    assert found["killed"] > 50 / step
    assert found["resumed"] > 12 / step


def test_a_base_gives_way_to_it(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    command = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--format", "bin", "--consume-base"]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    assert names(layered[0], ".safetensors") == []
    assert folder_bytes(tmp_path / "out") == golden
    again = CliRunner().invoke(cli, command)
    assert again.exit_code == 3
    assert "this very merge, finished" in again.output


# --- many tensors ---


class CountedText(str):
    """A text that counts how often it is encoded."""

    __slots__ = ("encoded",)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        self.encoded: int = getattr(self, "encoded", 0) + 1
        return super().encode(encoding, errors)


def test_what_follows_from_a_table_is_found_once(layered: Paths, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made: list[int] = []
        patch.setattr(table_module, "_item", counted(table_module._item, made))
        rawmerge.merge_adapter(*layered, tmp_path / "out", format="bin")
    assert len(made) == len(loaded(tmp_path / "out"))


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def count(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return count


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_header_is_not_encoded_for_each_tensor(tmp_path: Path, form: str) -> None:
    base, adapter = small(tmp_path, {f"{number}": random_tensor((3,), seed=number) for number in range(200)})
    plan = rawmerge.plan_merge(base, adapter, format=form)
    text = CountedText(plan.shards[0].header_text)
    rawmerge.run_plan(replace(plan, shards=(replace(plan.shards[0], header_text=text),)), tmp_path / "out")
    assert 0 < text.encoded < 20
    assert rawmerge.verify_merge(tmp_path / "out", base, adapter).findings == ()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak from /proc")
@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("count", [5_000, 30_000])
def test_the_forecast_holds_for_tables_of_many_tensors(tmp_path: Path, form: str, is_pickled: bool, count: int) -> None:
    tensors = {f"model.layers.{i}.mlp.experts.{i % 7}.gate_proj.weight": torch.ones(2) for i in range(count)}
    base = write_base(tmp_path / "base", [{"q_proj.weight": random_tensor((1024, 2048)), **tensors}])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q_proj", 1024, 2048))
    if is_pickled:
        torch.save({"q_proj.weight": random_tensor((1024, 2048)), **tensors}, base / SINGLE)
        (base / "model.safetensors").unlink()
    run = "rawmerge.merge_adapter(*sys.argv[1:4], format=sys.argv[4], threads=2)"
    told = "print(made.predicted_peak_bytes, *(1024 * int(line.split()[1]) for line in lines if 'VmHWM' in line))"
    command = [sys.executable, "-c", f"import sys, rawmerge; made = {run}; lines = open('/proc/self/status'); {told}"]
    for _ in range(2):  # the first may have to ask torch how it sums
        found = subprocess.run(
            [*command, base, adapter, tmp_path / "out", form], capture_output=True, text=True, check=True
        )
        shutil.rmtree(tmp_path / "out")
        predicted, measured = map(int, found.stdout.split())
        assert measured <= predicted


# --- memory ---


@both_paths
@pytest.mark.slow
def test_the_peak_is_that_of_a_merge_to_safetensors(tmp_path: Path, imported: int, path: tuple[str, ...]) -> None:
    write_layers(tmp_path, layers=1, shard_count=1, shape=(2**15, 2**13))
    assert peak_of(tmp_path, path, "--format", "bin") < allowed(imported, path)
    assert (tmp_path / "out" / SINGLE).stat().st_size > 500 * MEBIBYTE


# --- LLaMA-Factory's switch ---


def test_export_legacy_format_is_followed(layered: Paths, tmp_path: Path, twin: dict[str, torch.Tensor]) -> None:
    table = {
        "model_name_or_path": str(layered[0]),
        "adapter_name_or_path": str(layered[1]),
        "export_dir": str(tmp_path / "out"),
        "export_legacy_format": True,
    }
    (tmp_path / "merge.json").write_text(json.dumps(table))
    job = rawmerge.read_export(tmp_path / "merge.json")
    assert job.format == "bin"
    assert "--format bin" in job.command()
    assert any("export_legacy_format" in note for note in job.notes)
    rawmerge.run_export(job, verify=True)
    assert names(tmp_path / "out", ".bin") == bin_names(3)
    assert_same(loaded(tmp_path / "out"), twin)
    plain = rawmerge.read_export(tmp_path / "merge.json", ["export_legacy_format=false"])
    assert plain.format == "safetensors"
    assert "--format" not in plain.command()
