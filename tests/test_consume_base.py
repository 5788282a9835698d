"""`--consume-base`: what goes, what is refused, and what space it takes. `test_cut_off.py` has the crashes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.byte_sizes import format_bytes
from rawmerge.cli import cli
from rawmerge.consuming.consumption import plan_consumption
from rawmerge.errors import MergeError, MissingFileError, NothingChangedError, OutputError
from rawmerge.merge_plan import KeepTensor, MergePlan, ShardPlan
from tests.builders import (
    PREFIX,
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)

NAMES = [shard_name(number, 3) for number in (1, 2, 3)]
Paths = tuple[Path, Path]


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, of which an adapter changes the first two."""
    return layered_merge(tmp_path)


def left(base: Path) -> list[str]:
    return sorted(path.name for path in base.glob("*.safetensors"))


def test_the_output_is_that_of_a_plain_merge_and_the_base_keeps_its_small_files(layered: Paths, tmp_path: Path) -> None:
    base, adapter = layered
    small = {name: raw for name, raw in folder_bytes(base).items() if not name.endswith(".safetensors")}
    plain = rawmerge.merge_adapter(base, adapter, tmp_path / "plain")
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "deep/out", consume_base=True)
    assert folder_bytes(tmp_path / "deep/out") == folder_bytes(tmp_path / "plain")
    assert folder_bytes(base) == small
    assert (plain.consumed, summary.consumed, summary.counts) == (0, 3, plain.counts)
    assert summary.notes == (f"'{base}' is no checkpoint any more: 3 shards are deleted",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "deep", "plain"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_each_shard_goes_once_its_successor_is_there_and_no_sooner(layered: Paths, tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {}
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def look(at: rawmerge.Progress) -> None:
        seen.setdefault(at.shard_name, left(layered[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", note)
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, progress=look)
    assert seen == {NAMES[0]: NAMES, NAMES[1]: NAMES[1:], NAMES[2]: NAMES[2:]}
    folder = "out.rawmerge-unfinished"
    assert synced[: synced.index(NAMES[0])].count(folder) == 2  # with the journal's name in it, and the output's
    for name in NAMES:  # the shard, then its name, then the journal
        at = synced.index(name)
        assert synced[at + 1 : at + 3] == ["output", "journal.jsonl"]


def test_progress_counts_up_to_the_whole(layered: Paths, tmp_path: Path) -> None:
    seen: list[rawmerge.Progress] = []
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, progress=seen.append)
    done = [at.done_bytes for at in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes


@pytest.mark.parametrize("consumes", [True, False])
def test_the_command_of_a_finished_merge_is_told_so(layered: Paths, tmp_path: Path, consumes: bool) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, compute_dtype="float64")
    before = folder_bytes(tmp_path)
    command = ["merge", *layered, "-o", tmp_path / "out", "--compute-dtype", "float64", "--overwrite"]
    again = invoke(*command, *(["--consume-base"] if consumes else []))
    assert again.exit_code == 3
    # without the option the base may be another, of which a download is incomplete
    assert ("this very merge, finished" in again.stderr) == consumes
    assert (f"of the base in '{layered[0]}', of which 3 shards are gone" in again.stderr) == consumes
    assert ("nothing is left to do" in again.stderr) == consumes
    assert ("the checkpoint is incomplete" in again.stderr) != consumes
    assert folder_bytes(tmp_path) == before


def lose_output_shard(_: Paths, output: Path) -> None:
    (output / NAMES[0]).unlink()


def lose_record(_: Paths, output: Path) -> None:
    (output / "rawmerge.json").unlink()


def spoil_record(_: Paths, output: Path) -> None:
    record = json.loads((output / "rawmerge.json").read_text())
    (output / "rawmerge.json").write_text(json.dumps(record | {"adapters": 1, "base": None}))


def train_on(paths: Paths, _: Path) -> None:
    write_adapter(paths[1], {name: tensor + 1 for name, tensor in read_all(paths[1]).items()})


def edit_adapter_config(paths: Paths, _: Path) -> None:
    config = json.loads((paths[1] / "adapter_config.json").read_text())
    (paths[1] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))


def edit_base_config(paths: Paths, _: Path) -> None:
    (paths[0] / "config.json").write_text('{"model_type": "other"}')


def lose_base_config(paths: Paths, _: Path) -> None:
    (paths[0] / "config.json").unlink()


def other_index(paths: Paths, _: Path) -> None:
    index = json.loads((paths[0] / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model-00001-of-00009.safetensors")
    (paths[0] / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lose_output_shard,
        lose_record,
        spoil_record,
        train_on,
        edit_adapter_config,
        edit_base_config,
        lose_base_config,
        other_index,
    ],
    ids=lambda it: it.__name__,
)
def test_a_merge_is_not_called_finished_without_proof(
    layered: Paths, tmp_path: Path, change: Callable[[Paths, Path], None]
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    change(layered, tmp_path / "out")
    with pytest.raises(MissingFileError):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, overwrite=True)


def test_another_merge_is_not_called_finished(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    with pytest.raises(MissingFileError):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, overwrite=True, dtype="float32")
    with pytest.raises(MissingFileError):
        rawmerge.merge_adapter(*layered, tmp_path / "out2", consume_base=True)


def test_a_base_of_one_file_is_consumed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}]) / "model.safetensors"
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5))
    rawmerge.merge_adapter(base, adapter, tmp_path / "plain")
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "plain")
    assert not base.exists()
    for named in (base, base.parent):
        with pytest.raises(OutputError, match=r"this very merge, finished.*, of which 1 shard is gone"):
            rawmerge.merge_adapter(named, adapter, tmp_path / "out", consume_base=True)


def test_an_earlier_output_is_replaced(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    (tmp_path / "out/stale.safetensors").write_bytes(b"stale")
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, overwrite=True)
    assert folder_bytes(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_replaced_tensors_are_compared_before_the_base_s_go(tmp_path: Path) -> None:
    norm = random_tensor((5,))
    base = write_base(tmp_path / "base", [{"a.weight": random_tensor((6, 5))}, {"norm.weight": norm}])
    trained = write_adapter(tmp_path / "adapter", {f"{PREFIX}norm.weight": norm + 1}, modules_to_save=["norm"])
    same = write_adapter(tmp_path / "same", {f"{PREFIX}norm.weight": norm}, modules_to_save=["norm"])
    before = folder_bytes(base)
    with pytest.raises(NothingChangedError):
        rawmerge.merge_adapter(base, same, tmp_path / "out", consume_base=True)
    assert folder_bytes(base) == before
    rawmerge.merge_adapter(base, trained, tmp_path / "plain")
    assert rawmerge.merge_adapter(base, trained, tmp_path / "out", consume_base=True).consumed == 2
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "plain")


def test_a_merge_that_changes_nothing_deletes_nothing_and_leaves_nothing(layered: Paths, tmp_path: Path) -> None:
    base, adapter = layered
    write_adapter(adapter, {name: tensor * 0 for name, tensor in read_all(adapter).items()})
    before = folder_bytes(tmp_path)
    with pytest.raises(NothingChangedError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "new/out", consume_base=True)
    assert folder_bytes(tmp_path) == before
    assert not (tmp_path / "new").exists()


def reading_across(plan: MergePlan) -> MergePlan:
    """Return the plan with the last shard's norm taken from the first base shard."""
    (first, *_), last = plan.shards, plan.shards[-1]
    (source,) = (step.source for step in first.steps if "norm" in step.entry.name)
    steps = tuple(replace(step, source=source) if "norm" in step.entry.name else step for step in last.steps)
    return replace(plan, shards=(*plan.shards[:-1], replace(last, steps=steps)))


def test_a_base_shard_that_several_read_goes_after_the_last(layered: Paths, tmp_path: Path) -> None:
    base, _ = layered
    plan = reading_across(rawmerge.plan_merge(*layered))
    frees = plan_consumption(plan).frees
    assert frees == {
        NAMES[0]: (),
        NAMES[1]: (str(base / NAMES[1]),),
        NAMES[2]: (str(base / NAMES[0]), str(base / NAMES[2])),
    }
    rawmerge.run_plan(plan, tmp_path / "plain")
    seen: dict[str, list[str]] = {}
    rawmerge.run_plan(
        plan, tmp_path / "out", consume_base=True, progress=lambda at: seen.setdefault(at.shard_name, left(base))
    )
    assert seen == {NAMES[0]: NAMES, NAMES[1]: NAMES, NAMES[2]: [NAMES[0], NAMES[2]]}
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "plain")
    assert left(base) == []


# --- space ---


def sized(plan: MergePlan, sizes: dict[str, int], *, changing: set[str]) -> MergePlan:
    """Return a plan of which only sizes count: base shard and output shard of each name have `sizes` bytes."""

    def shard(at: ShardPlan) -> ShardPlan:
        first = at.steps[0]
        end = sizes[at.name] - at.data_start
        entry = replace(first.entry, start=0, end=end)
        return replace(
            at, steps=(replace(first, entry=entry) if at.name in changing else KeepTensor(entry, first.source),)
        )

    files = tuple(replace(file, byte_count=sizes[f"base {file.name}"]) for file in plan.base_files)
    return replace(plan, shards=tuple(map(shard, plan.shards)), base_files=files, side_files=(), written_files=())


def peak_of(order: list[str], frees: dict[str, int], takes: dict[str, int]) -> int:
    """Add up what an order takes, in the plainest way."""
    now = peak = 0
    for name in order:
        now += takes[name]
        peak = max(peak, now)
        now -= frees[name]
    return peak


@pytest.fixture
def model(tmp_path: Path) -> MergePlan:
    """Return a plan of three shards whose first tensors all change."""
    shards = [{f"{letter}.weight": random_tensor((6, 5))} for letter in "abc"]
    pairs = lora_pair("a", 6, 5) | lora_pair("b", 6, 5) | lora_pair("c", 6, 5)
    return rawmerge.plan_merge(write_base(tmp_path / "base", shards), write_adapter(tmp_path / "adapter", pairs))


def test_shards_of_their_old_size_take_the_room_of_the_largest(model: MergePlan) -> None:
    sizes = dict(zip(NAMES, (5000, 9000, 7000), strict=True))
    plan = sized(model, sizes | {f"base {name}": size for name, size in sizes.items()}, changing=set(NAMES))
    consumption = plan_consumption(plan)
    assert consumption.peak == 9000
    assert [shard.name for shard in consumption.order] == NAMES


@pytest.mark.parametrize(
    ("takes", "frees", "best"),
    [
        ((5000, 9000, 7000), (2500, 4500, 3500), [1, 2, 0]),  # a cast to a wider dtype: what frees most goes first
        ((9000, 3000, 6000), (9500, 4500, 6500), [1, 2, 0]),  # narrower: what takes least goes first
        ((9000, 8000, 4000), (1000, 8500, 4000), [2, 1, 0]),  # what grows comes last
    ],
)
def test_the_order_of_shards_takes_least_room(
    model: MergePlan, takes: tuple[int, ...], frees: tuple[int, ...], best: list[int]
) -> None:
    taken, freed = dict(zip(NAMES, takes, strict=True)), dict(zip(NAMES, frees, strict=True))
    plan = sized(model, taken | {f"base {name}": size for name, size in freed.items()}, changing=set(NAMES))
    consumption = plan_consumption(plan)
    names = [shard.name for shard in consumption.order]
    assert consumption.peak == peak_of(names, freed, taken) == peak_of([NAMES[at] for at in best], freed, taken)
    assert consumption.peak <= peak_of(NAMES, freed, taken)


def test_no_order_of_four_needs_less(tmp_path: Path) -> None:
    """Compare with all orders, for sizes drawn at random."""
    from itertools import permutations
    from random import Random

    letters = "abcd"
    names = [shard_name(number, 4) for number in range(1, 5)]
    pairs: dict[str, torch.Tensor] = {}
    for letter in letters:
        pairs |= lora_pair(letter, 6, 5)
    base = write_base(tmp_path / "base", [{f"{letter}.weight": random_tensor((6, 5))} for letter in letters])
    model = rawmerge.plan_merge(base, write_adapter(tmp_path / "adapter", pairs))
    random = Random(7)
    for _ in range(200):
        taken = {name: random.randrange(1000, 9000) for name in names}
        freed = {name: random.randrange(1000, 9000) for name in names}
        plan = sized(model, taken | {f"base {name}": size for name, size in freed.items()}, changing=set(names))
        least = min(peak_of(list(order), freed, taken) for order in permutations(names))
        assert plan_consumption(plan).peak == least


def test_nothing_is_counted_as_freed_before_something_changes(model: MergePlan) -> None:
    sizes = dict.fromkeys((*NAMES, *(f"base {name}" for name in NAMES)), 5000)
    consumption = plan_consumption(sized(model, sizes, changing={NAMES[2]}))
    assert consumption.order[0].name == NAMES[2]
    assert consumption.peak == 5000


def test_the_space_check_counts_what_is_freed(layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    consumption = plan_consumption(rawmerge.plan_merge(*layered))
    usage = shutil.disk_usage(tmp_path)
    margin = 2**20
    free = consumption.peak + margin
    assert free < rawmerge.plan_merge(*layered).byte_count + margin
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(OutputError, match=f"expected {format_bytes(free)} free, found .* 1 B too little"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(OutputError, match="too little"):
        rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True).consumed == 3


# --- refusals ---


def link_to_elsewhere(base: Path) -> None:
    (base / NAMES[1]).rename(base.parent / "elsewhere")
    (base / NAMES[1]).symlink_to(base.parent / "elsewhere")


def second_name(base: Path) -> None:
    (base.parent / "twin").hardlink_to(base / NAMES[1])


REFUSALS: list[tuple[Callable[[Path], None], str]] = [
    (link_to_elsewhere, rf"{NAMES[1]}.*found a link, and what it points to may serve others"),
    (second_name, rf"{NAMES[1]}.*found one of 2 names of the same file: deleting it frees nothing"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSALS)
def test_shards_that_are_not_the_base_s_alone_are_refused(
    layered: Paths, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(layered[0])
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match=message):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path) == before


def test_the_hub_s_cache_is_refused(layered: Paths, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    shutil.copytree(layered[0], snapshot)  # without links, as the cache is made where there are none
    with pytest.raises(OutputError, match="found one in the hub's cache"):
        rawmerge.merge_adapter(snapshot, layered[1], tmp_path / "out", consume_base=True)
    plan = replace(rawmerge.plan_merge(*layered), base_repo="org/name@abc")
    with pytest.raises(OutputError, match="found one in the hub's cache"):
        rawmerge.run_plan(plan, tmp_path / "out", consume_base=True)
    assert left(snapshot) == left(layered[0]) == NAMES


def test_a_plan_cannot_name_files_outside_its_base_to_delete(layered: Paths, tmp_path: Path) -> None:
    plan = rawmerge.plan_merge(*layered)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match=rf"{NAMES[0]}.*a file of the base in .*mine to delete, found one elsewhere"):
        rawmerge.run_plan(replace(plan, base_root=str(tmp_path / "mine")), tmp_path / "out", consume_base=True)
    assert left(layered[0]) == NAMES


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_an_output_on_another_file_system_is_refused(layered: Paths, tmp_path: Path) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    output = Path("/dev/shm") / f"rawmerge-{os.getpid()}"
    with pytest.raises(OutputError, match="a file on another one: deleting it frees nothing there"):
        rawmerge.merge_adapter(*layered, output, consume_base=True)
    assert list(Path("/dev/shm").glob(f"{output.name}*")) == []


def test_the_base_itself_and_folders_in_it_are_refused(layered: Paths) -> None:
    for output in (layered[0], layered[0] / "out"):
        with pytest.raises(OutputError, match="an output apart from the base"):
            rawmerge.merge_adapter(*layered, output, consume_base=True, overwrite=True)
    assert left(layered[0]) == NAMES


def test_all_reasons_are_told_at_once(layered: Paths, tmp_path: Path) -> None:
    link_to_elsewhere(layered[0])
    (tmp_path / "twin").hardlink_to(layered[0] / NAMES[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, link=True)
    found = [problem.found.split(",")[0].split(":")[0] for problem in caught.value.problems]
    assert found == ["a directory", "both", "one of 2 names of the same file", "a link"]


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_base_that_cannot_be_written_is_refused(layered: Paths, tmp_path: Path) -> None:
    layered[0].chmod(0o500)
    try:
        with pytest.raises(OutputError, match="a folder whose files may be deleted"):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    finally:
        layered[0].chmod(0o700)


def test_a_name_with_no_room_for_the_working_folder_s_is_refused(layered: Paths, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 250)
    with pytest.raises(OutputError, match="a name of at most 255 bytes"):
        rawmerge.merge_adapter(*layered, output, consume_base=True)


def test_a_shard_that_is_changed_while_it_is_merged_is_not_deleted(layered: Paths, tmp_path: Path) -> None:
    def touch(at: rawmerge.Progress) -> None:
        if at.shard_name == NAMES[1]:
            os.utime(layered[0] / NAMES[1], ns=(1, 1))

    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, progress=touch)
    assert summary.consumed == 2
    assert f"'{layered[0] / NAMES[1]}' was not deleted: it is no longer the file that was merged" in summary.notes
    assert left(layered[0]) == [NAMES[1]]


def test_a_failure_before_the_first_deletion_leaves_nothing_behind(layered: Paths, tmp_path: Path) -> None:
    before = folder_bytes(tmp_path)

    def stop(_: rawmerge.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, progress=stop)
    assert not getattr(caught.value, "__notes__", [])
    assert folder_bytes(tmp_path) == before
    plan = rawmerge.plan_merge(*layered)
    (layered[0] / "tokenizer.json").write_text("much longer than it was before")
    with pytest.raises(MergeError, match=r"tokenizer\.json"):
        rawmerge.run_plan(plan, tmp_path / "out", consume_base=True)
    assert left(layered[0]) == NAMES


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_line_deletes_when_told_and_a_dry_run_says_what(layered: Paths, tmp_path: Path) -> None:
    command = ("merge", *layered, "-o", tmp_path / "out", "--consume-base")
    dry = invoke(*command, "--dry-run")
    assert dry.exit_code == 0
    for name in NAMES:
        assert f"note: {layered[0] / name} is deleted once {name} is written\n" in dry.stderr
    peak = plan_consumption(rawmerge.plan_merge(*layered)).peak
    assert f"note: at most {format_bytes(peak)} more than now are taken at any time\n" in dry.stderr
    assert left(layered[0]) == NAMES
    done = invoke(*command)
    assert done.exit_code == 0
    assert ", 3 shards deleted from the base;" in done.stderr
    assert "is no checkpoint any more" in done.stderr


def test_a_path_that_no_journal_can_hold_is_refused(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"r\xff")).mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    paths = layered_merge(tmp_path / os.fsdecode(b"r\xff"))
    before = folder_bytes(paths[0])
    with pytest.raises(OutputError, match="a path in UTF-8"):
        rawmerge.merge_adapter(*paths, tmp_path / "out", consume_base=True)
    assert folder_bytes(paths[0]) == before
    assert not (tmp_path / "out").exists()
