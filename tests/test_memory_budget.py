"""What a merge does with the memory that it may take: it fits, or it is refused; and no bit depends on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.byte_sizes import format_bytes, parse_bytes
from rawmerge.cli import cli
from rawmerge.computing.factor_parts import PART_BYTES
from rawmerge.computing.large_factors import HELD_ELEMENTS
from rawmerge.computing.plain_pairs import find_pairs
from rawmerge.computing.step_paths import StepPaths
from rawmerge.engine.tiles import BLOCK_ELEMENTS, TILE_ELEMENTS
from rawmerge.errors import MemoryLimitError, MergeError
from rawmerge.memory import budget as memory_budget
from rawmerge.memory import process_peak
from rawmerge.memory.budget import MemoryBudget, choose_budget
from rawmerge.memory.forecast import MemoryForecaster
from rawmerge.memory.limit import MemoryLimit
from rawmerge.memory.process_peak import PeakMeter, start_meter
from rawmerge.memory.tile_memory import PairBuffers
from rawmerge.native import kernel
from rawmerge.report import plan_text
from rawmerge.run_options import RunOptions
from rawmerge.summary_report import summary_json, summary_text
from tests.builders import PREFIX, folder_bytes, lora_pair, random_tensor, raw, read_all, write_adapter, write_base

MEBIBYTE = 2**20
NO_KERNEL = RunOptions(threads=4, without=["kernel"])

needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base with a weight of several tiles and one without an update, and a LoRA."""
    rows, columns = 3000, 1000
    base = write_base(tmp_path / "base", [{"net.weight": random_tensor((rows, columns)), "kept": random_tensor((9,))}])
    return base, write_adapter(tmp_path / "adapter", lora_pair("net", rows, columns))


def test_without_a_limit_all_threads_and_tiles_are_used(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "group_limit", lambda: None)
    budget, forecast = choose_budget(rawmerge.plan_merge(*wide), NO_KERNEL)
    assert (budget.threads, budget.tile_elements, budget.window_bytes, budget.limit) == (4, TILE_ELEMENTS, 0, None)
    assert forecast.peak <= forecast.python + forecast.torch + 64 * MEBIBYTE


def test_tiles_become_smaller_before_threads_become_fewer(wide: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*wide)
    most = choose_budget(plan, NO_KERNEL)[1].peak
    seen = []
    for limit in range(most, most - 40 * MEBIBYTE, -MEBIBYTE // 4):
        try:
            budget, forecast = choose_budget(plan, replace(NO_KERNEL, max_memory=limit))
        except MemoryLimitError:
            break
        assert forecast.peak <= limit
        assert budget.limit == limit
        assert budget.window_bytes > 0
        seen.append((budget.threads, budget.tile_elements))
    assert list(dict.fromkeys(seen)) == sorted(set(seen), reverse=True)
    assert seen[0] == (4, TILE_ELEMENTS)
    assert seen[-1] == (1, BLOCK_ELEMENTS)


def test_a_limit_that_cannot_be_kept_is_refused_before_anything_is_written(wide: tuple[Path, Path]) -> None:
    output = wide[0].parent / "out"
    arguments = ["merge", *map(str, wide), "--output", str(output), "--max-memory", "20M"]
    for more in ([], ["--dry-run"], ["--json"]):
        result = CliRunner().invoke(cli, [*arguments, *more])
        assert result.exit_code == 3
        assert "net.weight" in result.output
        assert "20.97 MB of memory (--max-memory)" in result.output
        assert not output.exists()
    assert {path.name for path in output.parent.iterdir()} == {"base", "adapter"}


def needed_bytes(error: MemoryLimitError) -> int:
    """Return what a refusal says is needed; its parts must add up to it, as they are told."""
    found = error.problems[0].found
    needed, *parts = (round(float(number) * 10) for number in re.findall(r"([\d.]+) MB", found))
    assert needed == sum(parts), found
    return needed * 10**5


def test_a_refused_limit_names_one_that_is_kept(wide: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*wide)
    with pytest.raises(MemoryLimitError) as refused:
        choose_budget(plan, replace(NO_KERNEL, max_memory=20 * MEBIBYTE))
    hint = refused.value.problems[0].hint
    told = re.search(r"give it --max-memory (\S+) or more; that is for one thread already", hint)
    assert told, hint
    assert parse_bytes(told[1]) == needed_bytes(refused.value)
    assert choose_budget(plan, replace(NO_KERNEL, max_memory=parse_bytes(told[1])))[0].threads == 1


def test_more_threads_than_tiles_take_no_more(wide: tuple[Path, Path]) -> None:
    """12 tiles of the lowest kind and a kept tensor: a thread that never gets a job has no buffers."""
    plan = rawmerge.plan_merge(*wide)
    many, more = (MemoryForecaster(plan).forecast(threads).peak for threads in (13, 256))
    assert MemoryForecaster(plan).forecast(2).peak < many == more


def test_a_plan_is_told_with_the_memory_that_the_merge_would_take(wide: tuple[Path, Path]) -> None:
    arguments = ["plan", *map(str, wide), "--without", "kernel"]
    told = [CliRunner().invoke(cli, [*arguments, "--threads", count]).output for count in ("1", "4")]
    texts = [next(line for line in text.splitlines() if line.startswith("memory ")) for text in told]
    assert texts[0] != texts[1]
    expected = choose_budget(rawmerge.plan_merge(*wide), NO_KERNEL)[1].peak
    assert format_bytes(expected) in texts[1]
    for more in ([], ["--json"]):
        refused = CliRunner().invoke(cli, [*arguments, "--max-memory", "20M", *more])
        assert (refused.exit_code, "20.97 MB of memory (--max-memory)" in refused.output) == (3, True)


@pytest.mark.parametrize("value", ["many", "30", 30.5, True, 0])
def test_a_limit_that_is_no_number_of_bytes_is_a_wrong_argument(wide: tuple[Path, Path], value: Any) -> None:
    message = (
        "max_memory: expected a size" if isinstance(value, str) else "max_memory must be a positive whole number of"
    )
    with pytest.raises(ValueError, match=message):
        rawmerge.merge_adapter(*wide, wide[0].parent / "out", max_memory=value)


def test_a_kind_that_needs_the_whole_tensor_says_what_it_takes(tmp_path: Path) -> None:
    rows, columns = 4000, 3000
    base = write_base(tmp_path / "base", [{"net.weight": random_tensor((rows, columns))}])
    adapter = write_adapter(tmp_path / "adapter", {f"{PREFIX}net.fourierft_spectrum": torch.randn(50)})
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "FOURIERFT", "n_frequency": 50}))
    plan = rawmerge.plan_merge(base, adapter)
    (_, _, working), *_ = choose_budget(plan, RunOptions(threads=1))[1].whole
    assert working > rows * columns * 4
    with pytest.raises(MemoryLimitError, match=r"'net\.weight'.* for this tensor") as refused:
        choose_budget(plan, RunOptions(max_memory=300 * MEBIBYTE))
    needed = needed_bytes(refused.value)
    assert needed > working
    assert choose_budget(plan, RunOptions(max_memory=needed))[1].peak <= needed


@pytest.mark.parametrize(("is_hard", "is_refused"), [(True, True), (False, False)])
def test_the_control_groups_limit_counts_where_no_other_is_given(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, is_hard: bool, is_refused: bool
) -> None:
    plan = rawmerge.plan_merge(*wide)
    monkeypatch.setattr(memory_budget, "group_limit", lambda: MemoryLimit(5 * MEBIBYTE, "memory.x", is_hard))
    if is_refused:
        with pytest.raises(MemoryLimitError, match=r"(?s)memory\.x.*raise that limit to \S+ MB or more"):
            choose_budget(plan, RunOptions())
        assert "cannot be merged here" in plan_text(plan)
    else:
        assert choose_budget(plan, NO_KERNEL)[0].threads == 1
    assert choose_budget(plan, replace(NO_KERNEL, max_memory=2**30))[0].limit == 2**30


def test_a_group_with_room_for_all_files_keeps_their_pages(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rawmerge.plan_merge(*wide)
    monkeypatch.setattr(memory_budget, "group_limit", lambda: MemoryLimit(2**40, "memory.x"))
    assert choose_budget(plan, NO_KERNEL)[0].window_bytes == 0
    monkeypatch.setattr(memory_budget, "group_limit", lambda: MemoryLimit(2**28 + 2**26, "memory.x"))
    large = replace(plan, base_files=(replace(plan.base_files[0], byte_count=2**33),))
    assert choose_budget(large, NO_KERNEL)[0].window_bytes > 0


@pytest.mark.parametrize("without", [[], ["kernel"]])
def test_no_budget_changes_a_bit(wide: tuple[Path, Path], without: list[str]) -> None:
    outputs, plan = [], rawmerge.plan_merge(*wide)
    with pytest.raises(MemoryLimitError) as refused:
        choose_budget(plan, replace(NO_KERNEL, max_memory=1))
    lowest = needed_bytes(refused.value)
    least = choose_budget(plan, replace(NO_KERNEL, max_memory=lowest))[0]
    assert (least.threads, least.tile_elements) == (1, BLOCK_ELEMENTS)
    for number, limit in enumerate((None, 2**30, lowest + MEBIBYTE)):
        output = wide[0].parent / f"out{number}"
        rawmerge.merge_adapter(*wide, output, max_memory=limit, without=without, threads=2)
        outputs.append(folder_bytes(output))
    assert outputs[0] == outputs[1] == outputs[2]


@needs_kernel
def test_the_kernel_alone_is_predicted_where_its_trials_are_known(wide: tuple[Path, Path]) -> None:
    """The trials are remembered for the machine; where they are not, the larger figure is told."""
    plan = rawmerge.plan_merge(*wide)
    output = wide[0].parent / "out"
    before = choose_budget(plan, RunOptions())[1]
    summary = rawmerge.run_plan(plan, output)
    after = choose_budget(plan, RunOptions())[1]
    assert (before.torch > 0, before.need.is_trial or before.torch == 0) == (before.torch > 0, True)
    assert after.torch == 0
    assert after.peak < 64 * 10**6
    assert "without torch" in plan_text(plan)
    assert summary.predicted_peak_bytes == before.peak
    assert choose_budget(plan, NO_KERNEL)[1].torch > 0


@needs_kernel
def test_torch_is_not_imported_where_it_has_no_room(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that overflows is torch's to judge; where that would break the limit, the merge ends instead."""
    from rawmerge.computing.computers import Computers
    from rawmerge.computing.step_paths import StepPaths
    from rawmerge.inputs.tensor_source import OpenFiles

    budget = MemoryBudget(threads=1, limit=50 * 10**6, has_room_for_torch=False)
    with OpenFiles() as files, pytest.raises(MergeError, match=r"in 50\.00 MB"):
        Computers("float32", StepPaths("float32", RunOptions()), files, budget).load([])
    plan = rawmerge.plan_merge(*wide)
    rawmerge.run_plan(plan, wide[0].parent / "out")  # the trials
    assert not choose_budget(plan, RunOptions(max_memory=100 * 10**6))[0].has_room_for_torch
    assert choose_budget(plan, RunOptions(max_memory=2**30))[0].has_room_for_torch


def test_the_summary_tells_both_peaks_and_the_record_none(wide: tuple[Path, Path]) -> None:
    output = wide[0].parent / "out"
    summary = rawmerge.merge_adapter(*wide, output)
    told = json.loads(summary_json(summary))
    assert told["predicted_peak_bytes"] == summary.predicted_peak_bytes
    assert "measured_peak_bytes" in told
    exact = replace(summary, predicted_peak_bytes=300_000_000, measured_peak_bytes=290_000_000)
    assert "memory 290.00 MB at the peak, 300.00 MB predicted" in summary_text(exact)
    assert "predicted\n" not in summary_text(replace(exact, predicted_peak_bytes=None))
    assert not any(b"peak" in data for name, data in folder_bytes(output).items() if name.endswith(".json"))


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (PeakMeter(100, 100), 200, 200),  # it grew
        (PeakMeter(100, 99), 100, 100),  # no more than a little memory was let go before
        (PeakMeter(10**9, 10**8), 10**9, None),  # larger before
        (PeakMeter(10**9, 10**8), 2 * 10**9, 2 * 10**9),
        (PeakMeter(0, 0), 0, None),  # the system does not tell
    ],
)
def test_a_peak_from_before_is_not_the_merges(
    monkeypatch: pytest.MonkeyPatch, before: PeakMeter, now: int, told: int | None
) -> None:
    monkeypatch.setattr(process_peak, "start_meter", lambda: PeakMeter(now, now))
    assert before.work_peak() == told


def test_the_meter_sees_what_is_taken() -> None:
    meter = start_meter()
    taken = bytearray(b"\1") * (64 * MEBIBYTE + max(0, meter.peak - meter.resident))
    peak = meter.work_peak()
    assert peak is not None
    assert len(taken) <= peak < meter.peak + 2 * len(taken)


RESTRICTED = """
import json, resource, sys
kind, limit, *arguments = sys.argv[1:]
import rawmerge.cli
resource.setrlimit(getattr(resource, kind), (int(limit), int(limit)))
sys.argv = ["rawmerge", *arguments]
rawmerge.cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep these limits")
@pytest.mark.parametrize(
    ("kind", "limit", "status", "text"),
    [
        ("RLIMIT_AS", 350 * MEBIBYTE, 3, "RLIMIT_AS (ulimit -v)"),  # less than torch's libraries
        ("RLIMIT_DATA", 25 * MEBIBYTE, 3, "RLIMIT_DATA (ulimit -d)"),
    ],
)
def test_limits_of_the_process_are_told_not_run_into(
    wide: tuple[Path, Path], kind: str, limit: int, status: int, text: str
) -> None:
    output = wide[0].parent / "out"
    arguments = ["merge", *map(str, wide), "-o", str(output), "--threads", "1", "--without", "kernel"]
    command = [sys.executable, "-c", RESTRICTED, kind, str(limit), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, text in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def transposed_case(folder: Path, is_embedding: bool, rank: int) -> tuple[Path, Path]:
    """Write a vocabulary and a pair on it, as large as what is not held or read in parts."""
    rows, columns = 2100, 500
    base = write_base(folder / "base", [{"model.embed_tokens.weight": random_tensor((rows, columns))}])
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(rows, rank, generator=generator) / 16
    right = torch.randn(rank, columns, generator=generator) / 16
    stem = f"{PREFIX}model.embed_tokens"
    pair: dict[str, Any] = {f"{stem}.lora_A.weight": right, f"{stem}.lora_B.weight": left}
    if is_embedding:
        pair = {
            f"{stem}.lora_embedding_A": left.T.contiguous(),
            f"{stem}.lora_embedding_B": right.T.contiguous(),
        }
    tensors = {name: tensor.bfloat16() for name, tensor in pair.items()}
    return base, write_adapter(folder / "adapter", tensors, r=rank, lora_alpha=rank)


@pytest.mark.parametrize("is_embedding", [False, True])
@pytest.mark.parametrize("without", [[], ["kernel"]])
def test_parts_of_large_factors_have_the_bits_of_the_whole(
    tmp_path: Path, without: list[str], is_embedding: bool
) -> None:
    """The left factor is read row by row of each tile, the right one in parts; the product is torch's, made whole."""
    rank = 1100
    assert 2100 * rank > HELD_ELEMENTS
    assert 500 * rank * 2 > PART_BYTES
    base, adapter = transposed_case(tmp_path, is_embedding, rank)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", without=without)
    paths = StepPaths("float32", RunOptions(without=without))
    assert [paths.needs_torch(step) for step in rawmerge.plan_merge(base, adapter).steps()] == [
        kernel() is None or bool(without)
    ]
    (weight,), pair = read_all(base).values(), read_all(adapter)
    (_, first), (_, second) = sorted(pair.items())
    delta = second.float() @ first.float()
    delta = delta.T.bfloat16() if is_embedding else delta
    assert raw(read_all(tmp_path / "out")["model.embed_tokens.weight"]) == raw((weight.float() + delta).bfloat16())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), ImportError("libx.so: failed")]
)
def test_a_system_without_memory_is_no_bug_of_ours(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("rawmerge.run.write_output", fail)
    with pytest.raises(MergeError, match="nothing was published") as told:
        rawmerge.merge_adapter(*wide, wide[0].parent / "out")
    assert told.value.__cause__ is error


def test_a_bug_stays_a_bug(wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("rawmerge.run.write_output", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        rawmerge.merge_adapter(*wide, wide[0].parent / "out")


def test_a_thread_keeps_the_largest_buffer_for_each_purpose(tmp_path: Path) -> None:
    """The tensor with the largest tile need not be that with the largest factors."""
    shapes = {"wide": (64, 4096), "deep": (2048, 72)}
    base = write_base(tmp_path / "base", [{f"{name}.weight": random_tensor(shape) for name, shape in shapes.items()}])
    pairs = lora_pair("wide", *shapes["wide"], rank=2) | lora_pair("deep", *shapes["deep"], rank=64)
    adapter = write_adapter(tmp_path / "adapter", pairs, r=2, rank_pattern={"deep": 64})
    found = [find_pairs(step, "float32") for step in rawmerge.plan_merge(base, adapter).steps()]
    assert [len(own) for own in found] == [1, 1]
    single = [PairBuffers([own], 2**20).most(1) for own in found]
    both = PairBuffers(found, 2**20)
    tile, left = 64 * 4096 * 2, 2048 * 64 * 4  # a left factor is read in one buffer, and packed in another
    assert both.most(1) >= tile + 2 * left > max(single)
    assert both.most(2) >= sum(single)
