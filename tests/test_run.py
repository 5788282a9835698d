"""Running a plan: the bytes that come out, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from rawmerge.engine import engine as engine_module
from rawmerge.errors import (
    InputChangedError,
    MergeError,
    NonFiniteTensorError,
    NothingChangedError,
    OutputError,
)
from rawmerge.run_options import MECHANISMS
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    lora_pair,
    merged,
    random_tensor,
    raw,
    read_all,
    write_adapter,
    write_base,
)

Paths = tuple[Path, Path]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_only_inputs_left(parent: Path) -> None:
    assert sorted(path.name for path in parent.iterdir()) == ["adapter", "base"]


def test_updated_tensors_are_peft_arithmetic_and_the_rest_is_kept_byte_for_byte(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    before, after = read_all(base), read_all(tmp_path / "out")
    factors = read_all(adapter)
    assert summary.counts == {"kept": 2, "updated": 2, "cast": 0, "replaced": 0, "added": 0}
    for name, tensor in before.items():
        path = PREFIX + name.removesuffix(".weight")
        if "q_proj" in name:
            pair = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
            tensor = merged(tensor, *pair, ALPHA / RANK)
            assert raw(tensor) != raw(before[name])
        assert raw(after[name]) == raw(tensor)


def test_headers_index_config_and_side_files_are_the_base_s_own_bytes(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    ours, theirs = folder_bytes(tmp_path / "out"), folder_bytes(base)
    assert ours.keys() == theirs.keys() | {"README.md", "rawmerge.json"}
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert ours[name] == theirs[name]
    for name in (name for name in theirs if name.endswith(".safetensors")):
        header = 8 + int.from_bytes(theirs[name][:8], "little")
        assert ours[name][:header] == theirs[name][:header]


def test_output_files_have_the_umask_s_mode(tiny: Paths, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def large_merge(folder: Path, shard_count: int) -> Paths:
    """A linear, a transposed and an embedding weight of several tiles each, and odd sizes."""
    tensors = {
        "a.c_attn.weight": random_tensor((300, 130)),  # stored (in, out)
        "b.up.weight": random_tensor((517, 96), torch.float32),
        "c.embed.weight": random_tensor((411, 70), torch.float16),
        "d.norm.weight": random_tensor((96,)),
    }
    names = list(tensors)
    cut = [names[number::shard_count] for number in range(shard_count)]
    shards = [{name: tensors[name] for name in part} for part in cut]
    base = write_base(folder / "base", shards, {"model_type": "gpt2", "tie_word_embeddings": False})
    pairs = lora_pair("a.c_attn", 130, 300) | lora_pair("b.up", 517, 96)
    embedding = {
        f"{PREFIX}c.embed.lora_embedding_A": random_tensor((RANK, 411), torch.float32),
        f"{PREFIX}c.embed.lora_embedding_B": random_tensor((70, RANK), torch.float32),
    }
    return base, write_adapter(folder / "adapter", pairs | embedding)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_threads_tile_heights_and_shard_layout_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_dtype: str
) -> None:
    results = set()
    cases = [
        *product((1, 2, 3), (4096, 2**14, 2**20), (1, 3), [()]),
        *((2, 2**14, 3, [name]) for name in MECHANISMS),
        (1, 2**20, 2, MECHANISMS),
    ]
    for run, (threads, elements, shards, without) in enumerate(cases):
        # engines are built with the module's default tile size
        monkeypatch.setattr(engine_module.Engine.__init__, "__defaults__", (elements,))
        folder = tmp_path / f"{run}"
        base, adapter = large_merge(folder, shards)
        rawmerge.merge_adapter(
            base, adapter, folder / "out", threads=threads, compute_dtype=compute_dtype, without=without
        )
        results.add(tuple(sorted((name, raw(tensor)) for name, tensor in read_all(folder / "out").items())))
    assert len(results) == 1


def test_any_dtype_of_the_format_passes_through_as_bytes(tmp_path: Path) -> None:
    kept = {
        "bits": torch.tensor([[1, 255], [128, 7]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(5),
        "nan": torch.tensor([0x7F81, -63], dtype=torch.int16).view(torch.bfloat16),  # payloads must survive
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    base = write_base(tmp_path / "base", [{**kept, "q.weight": random_tensor((6, 5))}])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert {name: raw(after[name]) for name in kept} == {name: raw(tensor) for name, tensor in kept.items()}


def test_output_dtype_casts_floats_keeps_the_rest_and_config_follows(tmp_path: Path) -> None:
    config = {"model_type": "x", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "eps": 1e-05}
    tensors = {"q.weight": random_tensor((6, 5)), "n.weight": random_tensor((5,)), "ids": torch.arange(3)}
    base = write_base(tmp_path / "base", [tensors, {"m.weight": random_tensor((4, 4))}], config)
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5))
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "out", dtype="float32")
    after, factors = read_all(tmp_path / "out"), read_all(adapter)
    pair = factors[f"{PREFIX}q.lora_A.weight"], factors[f"{PREFIX}q.lora_B.weight"]
    assert raw(after["q.weight"]) == raw(merged(tensors["q.weight"].float(), *pair, ALPHA / RANK))
    assert raw(after["n.weight"]) == raw(tensors["n.weight"].float())
    assert raw(after["ids"]) == raw(tensors["ids"])
    assert summary.counts == {"kept": 1, "updated": 1, "cast": 2, "replaced": 0, "added": 0}
    text = (base / "config.json").read_text()
    assert (tmp_path / "out/config.json").read_text() == text.replace('"bfloat16"', '"float32"')
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def test_the_index_lists_what_was_written_and_true_sizes(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    path = base / "model.safetensors.index.json"
    wrong = json.loads(path.read_text())
    wrong["metadata"] = {"total_size": 7, "author": "someone"}
    del wrong["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(wrong))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    after = read_all(tmp_path / "out")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in after.values()), "author": "someone"}
    assert index["weight_map"].keys() == after.keys()


def test_the_record_is_the_same_for_the_same_inputs_wherever_they_lie(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", threads=1)
    moved = shutil.copytree(tmp_path, tmp_path / "elsewhere")
    rawmerge.merge_adapter(moved / "base", moved / "adapter", moved / "again", threads=3)
    first, second = tmp_path / "out/rawmerge.json", moved / "again/rawmerge.json"
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in first.read_text()


def test_an_existing_output_is_refused_and_untouched(tiny: Paths, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="nothing there yet"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == {"mine.txt": b"mine"}


def test_overwrite_replaces_a_checkpoint_whole(tiny: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    first = folder_bytes(tmp_path / "out")
    (tmp_path / "out/stale.safetensors").write_bytes(b"stale")
    rawmerge.merge_adapter(*tiny, tmp_path / "out", overwrite=True)
    assert folder_bytes(tmp_path / "out") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_overwrite_spares_a_directory_that_is_no_checkpoint(tiny: Paths, tmp_path: Path) -> None:
    (tmp_path / "home/photos").mkdir(parents=True)
    with pytest.raises(OutputError, match="other work"):
        rawmerge.merge_adapter(*tiny, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/photos").is_dir()


@pytest.mark.parametrize("output", ["base", "base/merged", "adapter", "."])
def test_an_output_that_touches_an_input_is_refused(tiny: Paths, tmp_path: Path, output: str) -> None:
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="an output apart from the"):
        rawmerge.merge_adapter(*tiny, tmp_path / output, overwrite=True)
    assert folder_bytes(tmp_path) == before


def test_too_little_space_is_refused_before_writing(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"found 1\.00 kB free, \d.* too little"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


class Stop(Exception):  # noqa: N818  # a caller's own signal
    """A caller's way to cancel."""


def test_an_exception_from_progress_cancels_and_leaves_nothing(tiny: Paths, tmp_path: Path) -> None:
    def stop(progress: rawmerge.Progress) -> None:
        assert 0 < progress.done_bytes <= progress.total_bytes
        raise Stop

    with pytest.raises(Stop):
        rawmerge.merge_adapter(*tiny, tmp_path / "deep/er/out", progress=stop)
    assert_only_inputs_left(tmp_path)


def test_progress_ends_at_the_total(tiny: Paths, tmp_path: Path) -> None:
    seen: list[rawmerge.Progress] = []
    rawmerge.merge_adapter(*tiny, tmp_path / "out", progress=seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes == sum(tensor.nbytes for tensor in read_all(tiny[0]).values())


DEEDS = {"pwrite": "writing at byte", "fsync": "", "posix_fallocate": "allocating", "preadv": "reading at byte"}


@pytest.mark.parametrize("call", DEEDS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_file_operation_publishes_nothing_and_leaves_nothing(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(MergeError, match=rf"^'.+': {re.escape(os.strerror(code))} \({DEEDS[call]}.*\); nothing was"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    monkeypatch.undo()
    assert_only_inputs_left(tmp_path)


def test_a_write_that_takes_nothing_is_an_error_and_not_tried_for_ever(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(MergeError, match=r"took no byte.* \(writing at byte \d+\)"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


@pytest.mark.parametrize("without", [[], ["preallocation"], ["preallocation", "direct-io"]], ids=str)
def test_a_limit_on_the_size_of_files_is_told_with_file_and_byte(tmp_path: Path, without: list[str]) -> None:
    path = "model.layers.0.q_proj"
    base = write_base(tmp_path / "base", [{f"{path}.weight": random_tensor((96, 64))}])
    adapter = write_adapter(tmp_path / "adapter", lora_pair(path, 96, 64), target_modules=["q_proj"])
    code = (
        "import resource, signal, sys, rawmerge\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n    rawmerge.merge_adapter(*sys.argv[1:4], without=sys.argv[4:])\n"
        "except rawmerge.MergeError as error:\n    sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    command = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out"), *without]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = r"MergeError: '.*\.safetensors': File too large \(allocating 12\d+ bytes\); nothing was published"
    assert re.match(told, done.stderr)
    assert_only_inputs_left(tmp_path)


def test_short_writes_and_reads_are_continued(tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:5]], at))
    rawmerge.merge_adapter(*tiny, tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "out")


@pytest.mark.parametrize("missing", ["posix_fadvise", "posix_fallocate"])
def test_systems_without_a_call_write_the_same_bytes(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    monkeypatch.delattr(os, missing)
    rawmerge.merge_adapter(*tiny, tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "out")


def test_where_files_can_be_cloned_only_what_changes_is_written(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    written: list[int] = []
    cloned: list[int] = []
    pwrite = os.pwrite

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409  # FICLONE
        content = os.pread(source, 2**30, 0)
        cloned.append(len(content))
        return pwrite(target, content, 0)

    def count(descriptor: int, data: bytes, at: int) -> int:
        written.append(len(data))
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, "pwrite", count)
    seen: list[rawmerge.Progress] = []
    rawmerge.merge_adapter(*tiny, tmp_path / "cloned", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    with_clones = sum(written)
    written.clear()
    rawmerge.merge_adapter(*tiny, tmp_path / "copied", without=["reflink"])
    assert len(cloned) == 2
    assert folder_bytes(tmp_path / "cloned") == folder_bytes(tmp_path / "copied") == folder_bytes(tmp_path / "out")
    base, merged_tensors = read_all(tiny[0]), read_all(tmp_path / "out")
    kept = sum(tensor.nbytes for name, tensor in base.items() if raw(tensor) == raw(merged_tensors[name]))
    assert sum(written) - with_clones == kept > 0


def test_a_clone_does_not_stand_for_tensors_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"head.weight": random_tensor((6, 8)), "net.weight": random_tensor((12, 8)), "z": random_tensor((5,))}
    base = write_base(tmp_path / "base", [weights])
    head = random_tensor((6, 8), seed=9)
    adapter = write_adapter(
        tmp_path / "adapter",
        lora_pair("net", 12, 8) | {f"{PREFIX}head.weight": head},
        modules_to_save=["head"],
        target_modules=["net"],
    )
    pwrite = os.pwrite
    monkeypatch.setattr(fcntl, "ioctl", lambda to, _, source: pwrite(to, os.pread(source, 2**30, 0), 0))
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert raw(read_all(tmp_path / "out")["head.weight"]) == raw(head)


def test_a_clone_of_a_longer_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.arange(5000), "net.weight": random_tensor((120, 80), torch.float32)}
    base = write_base(tmp_path / "base", [weights])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("net", 120, 80), target_modules=["net"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", dtype="bfloat16", without=["reflink"])
    pwrite = os.pwrite
    monkeypatch.setattr(fcntl, "ioctl", lambda to, _, source: pwrite(to, os.pread(source, 2**30, 0), 0))
    rawmerge.merge_adapter(base, adapter, tmp_path / "cloned", dtype="bfloat16")
    assert folder_bytes(tmp_path / "cloned") == folder_bytes(tmp_path / "out")


def test_a_base_that_changed_since_the_plan_is_refused(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    plan = rawmerge.plan_merge(base, adapter)
    save_file({"other": torch.ones(3)}, base / "model-00001-of-00002.safetensors")
    with pytest.raises(InputChangedError, match="plan again"):
        rawmerge.run_plan(plan, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


def test_a_side_file_that_grew_since_the_plan_is_an_error(tiny: Paths, tmp_path: Path) -> None:
    plan = rawmerge.plan_merge(*tiny)
    (tiny[0] / "tokenizer.json").write_text('{"version": "2.0", "more": true}')
    with pytest.raises(InputChangedError, match=r"tokenizer\.json"):
        rawmerge.run_plan(plan, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


def test_a_base_truncated_while_it_is_read_is_an_error_not_a_crash(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    plan = rawmerge.plan_merge(base, adapter)

    def truncate(_: rawmerge.Progress) -> None:
        for shard in base.glob("*.safetensors"):
            os.truncate(shard, 300)

    with pytest.raises(MergeError, match="the file ends after"):
        rawmerge.run_plan(plan, tmp_path / "out", threads=1, progress=truncate)
    assert_only_inputs_left(tmp_path)


def test_an_overflow_names_the_tensor_and_publishes_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5), torch.float16)}])
    pair = {name: tensor * 1000 for name, tensor in lora_pair("q", 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", pair)
    with pytest.raises(NonFiniteTensorError, match=r"'q\.weight'.*F16"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_non_finite_values_of_the_base_stay_and_nans_are_canonical(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = random_tensor((6, 5), dtype)
    weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), -float("inf")
    base = write_base(tmp_path / "base", [{"q.weight": weight}])
    rawmerge.merge_adapter(base, write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5)), tmp_path / "out")
    after = read_all(tmp_path / "out")["q.weight"]
    assert after[1, 1] == float("inf")
    assert after[2, 2] == -float("inf")
    quiet = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[dtype]
    assert raw(after[0, 0]) == quiet.to_bytes(dtype.itemsize, "little")
    assert torch.isnan(after).sum() == 1


def test_an_untrained_adapter_is_an_error(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}])
    pair = lora_pair("q", 6, 5)
    pair[f"{PREFIX}q.lora_B.weight"].zero_()
    adapter = write_adapter(tmp_path / "adapter", pair)
    with pytest.raises(NothingChangedError, match="would equal the base"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert_only_inputs_left(tmp_path)


def test_replacements_that_equal_the_base_change_nothing(tmp_path: Path) -> None:
    norm = random_tensor((8,))
    base = write_base(tmp_path / "base", [{"norm.weight": norm, "q.weight": random_tensor((6, 5))}])
    pair = lora_pair("q", 6, 5) | {f"{PREFIX}norm.weight": norm}
    pair[f"{PREFIX}q.lora_B.weight"].zero_()
    with pytest.raises(NothingChangedError, match="would equal the base"):
        rawmerge.merge_adapter(
            base, write_adapter(tmp_path / "adapter", pair, modules_to_save=["norm"]), tmp_path / "out"
        )
    assert_only_inputs_left(tmp_path)


def test_a_tensor_whose_delta_is_lost_in_rounding_is_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5)), "k.weight": torch.ones(6, 5).bfloat16()}])
    lost = {name: tensor * 1e-4 for name, tensor in lora_pair("k", 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | lost)
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out").unchanged == ("k.weight",)


def test_an_adapter_that_only_replaces_is_merged(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"norm.weight": random_tensor((8,)), "q.weight": random_tensor((6, 5))}])
    trained = random_tensor((8,), seed=5)
    adapter = write_adapter(tmp_path / "adapter", {f"{PREFIX}norm.weight": trained}, modules_to_save=["norm"])
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert summary.counts == {"kept": 1, "updated": 0, "cast": 0, "replaced": 1, "added": 0}
    assert raw(read_all(tmp_path / "out")["norm.weight"]) == raw(trained)


def test_a_single_file_base_becomes_a_directory_with_that_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}]) / "model.safetensors"
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5))
    rawmerge.merge_adapter(base, adapter / "adapter_model.safetensors", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "rawmerge.json"]


def test_numbered_shards_without_an_index_are_merged_and_get_one(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    (base / "model.safetensors.index.json").unlink()
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_all(base).keys()


def test_callers_torch_threads_are_left_as_they_were(tiny: Paths, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_memory_map_is_made_of_the_inputs(tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[str] = []

    def look(_: rawmerge.Progress) -> None:
        mapped.extend(line for line in _maps() if str(tmp_path) in line)

    rawmerge.merge_adapter(*tiny, tmp_path / "out", progress=look)
    assert mapped == []


def _maps() -> Iterator[str]:
    path = Path("/proc/self/maps")
    yield from path.read_text().splitlines() if path.exists() else []
