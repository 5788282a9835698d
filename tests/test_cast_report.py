"""What `--dtype` takes from tensors that are only cast, beside counts over whole tensors by numpy and torch."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.computing.cast_loss import CastLoss, may_lose
from rawmerge.computing.cast_meter import CastMeter
from rawmerge.consuming.journal import JOURNAL_NAME as CONSUMING_NAME
from rawmerge.consuming.unfinished import unfinished_folder
from rawmerge.engine.engine import Engine
from rawmerge.errors import NonFiniteTensorError
from rawmerge.merge_plan import ReplaceTensor
from rawmerge.output.cast_losses import MOST_NAMED, cast_fields, cast_losses, parse_casts
from rawmerge.output.staging_directory import JOURNAL_NAME, hidden_beside
from tests import step_runs
from tests.builders import (
    folder_bytes,
    lora_pair,
    random_tensor,
    read_all,
    write_adapter,
    write_base,
)
from tests.step_runs import CODES, Workbench
from tests.test_cut_off import cut_off as cut_off_consuming
from tests.test_resume import aged, cut_off

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Paths = tuple[Path, Path]
PAIRS = [(F32, F16), (F32, BF16), (BF16, F16), (F16, BF16), (F64, F32), (F64, F16), (F64, BF16)]
EXACT = [(BF16, F32), (F16, F32), (BF16, F64), (F16, F64), (F32, F64)]


def pair_id(pair: object) -> str:
    return str(pair).removeprefix("torch.")


def wide_values(shape: tuple[int, int], source: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """Return values of all sizes that the target has and some below it; zeros, infinities and NaN among them."""
    random = torch.Generator().manual_seed(7)
    # float16 ends at 2^16 and 2^-24; a source that is as narrow holds no others
    low, high = (-30, 15) if F16 in (source, target) else (-160, 120)
    powers = torch.randint(low, high, shape, generator=random).double()
    values = torch.randn(shape, generator=random, dtype=F64).clamp(-1.9, 1.9) * 2.0**powers
    flat = values.view(-1)
    flat[:7] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -0.5])
    flat[::11] = 0.25
    return values.to(source)


def rounded_by_numpy(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Return values in another dtype, rounded once."""
    if target != BF16:
        return torch.from_numpy(values.double().numpy().astype({F16: np.float16, F32: np.float32}[target]))
    # numpy has no bfloat16: its values are those float32 of which the last 16 bits are 0
    exact = values.double().numpy()
    with np.errstate(invalid="ignore"):
        step = 2.0 ** (np.frexp(exact)[1].clip(-125) - 8)
        return torch.from_numpy(np.rint(exact / step) * step).to(BF16)


def wanted(values: torch.Tensor, target: torch.dtype) -> CastLoss:
    """Return what the cast takes, by float64 over the whole tensor."""
    before, after = values.double().numpy(), rounded_by_numpy(values, target).double().numpy()
    is_finite = np.isfinite(before)
    assert np.isfinite(after[is_finite]).all()
    is_rounded = is_finite & (before != after)
    zeroed = is_rounded & (after == 0)
    is_left = is_rounded & ~zeroed
    errors = np.abs(after[is_left] - before[is_left]) / np.abs(before[is_left])
    subnormal = is_rounded & (after != 0) & (np.abs(after) < torch.finfo(target).smallest_normal)
    counts = [int(each.sum()) for each in (is_rounded, zeroed, subnormal)]
    return CastLoss(CODES[target], values.numel(), counts[0], counts[1], counts[2], float(errors.max(initial=0)))


def assert_same(found: CastLoss, expected: CastLoss) -> None:
    assert astuple(found)[:-1] == astuple(expected)[:-1]
    assert found.largest == pytest.approx(expected.largest, rel=1e-6)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Return the engines of the runs that follow."""
    made: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(step_runs, "Engine", Kept)
    return made


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=pair_id)
def test_every_element_is_counted_whatever_tiles_and_threads(
    source: torch.dtype, target: torch.dtype, engines: list[Engine], tmp_path: Path
) -> None:
    bench, values = Workbench(tmp_path), wide_values((700, 130), source, target)
    expected = wanted(values, target)
    assert 0 < expected.rounded < expected.elements
    outputs = [
        bench.run_one(bench.step(values, dtype=target), threads=threads, tile_elements=elements)
        for threads, elements in ((1, 2**20), (1, 2**13), (8, 2**13))
    ]
    assert all(torch.equal(*(each.nan_to_num(3.0) for each in (output, outputs[0]))) for output in outputs)
    assert torch.equal(outputs[0].nan_to_num(3.0), rounded_by_numpy(values, target).nan_to_num(3.0))
    for engine in engines:
        assert_same(engine.casts["0"], expected)
    assert len({engine.casts["0"] for engine in engines}) == 1
    assert all(not engine.survivals for engine in engines)


def test_underflow_is_told_apart(engines: list[Engine], tmp_path: Path) -> None:
    # the smallest float16 is 2^-24, the smallest normal one 2^-14; each line: values, rounded, zeroed, subnormal
    values = torch.tensor([[2.0**-24, 2.0**-26, -(2.0**-30), 2.0**-16 + 2.0**-30, -1.0, 1.0 + 2.0**-20, 0.0, -0.0]])
    bench = Workbench(tmp_path)
    bench.run_one(bench.step(values, dtype=F16))
    assert_same(engines[0].casts["0"], CastLoss("F16", 8, 4, 2, 1, 2.0**-14 / (1 + 2.0**-14)))


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_the_arithmetic_s_dtype_changes_no_count(compute_dtype: str, engines: list[Engine], tmp_path: Path) -> None:
    bench, values = Workbench(tmp_path), wide_values((90, 70), F32, F16)
    bench.run_one(bench.step(values, dtype=F16), compute_dtype=compute_dtype)
    assert_same(engines[0].casts["0"], wanted(values, F16))


@pytest.mark.parametrize(("source", "target"), EXACT, ids=pair_id)
def test_of_a_cast_that_cannot_lose_nothing_is_counted(
    source: torch.dtype, target: torch.dtype, engines: list[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(CastMeter, "measure")
    bench = Workbench(tmp_path)
    bench.run_one(bench.step(random_tensor((9, 30), source), dtype=target))
    assert engines[0].casts == {}


def test_what_the_adapter_replaces_and_lays_over_is_counted_from_its_own_dtype(
    engines: list[Engine], tmp_path: Path
) -> None:
    bench, values = Workbench(tmp_path), wide_values((60, 40), F32, BF16)
    replaced = bench.step(values, dtype=BF16)
    bench.run_one(ReplaceTensor(replaced.entry, replaced.source, None))
    assert_same(engines[0].casts["0"], wanted(values, BF16))
    base, overlay = wide_values((200, 40), BF16, BF16), values[:30]
    bench.run_one(bench.step(base, overlay=bench.store(overlay)), tile_elements=2**12)
    over = wanted(overlay.contiguous(), BF16)
    assert_same(engines[1].casts["0"], replace(over, elements=base.numel()))


def test_tensors_with_updates_are_left_to_their_survival(engines: list[Engine], tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    factors = {"lora_a": random_tensor((4, 30), F32), "lora_b": random_tensor((50, 4), F32)}
    update = bench.update("lora", factors, {"scaling": 0.5, "is_transposed": False, "rounds_delta": True})
    bench.run_one(bench.step(random_tensor((50, 30), F32), [update], dtype=F16))
    assert (engines[0].casts, list(engines[0].survivals)) == ({}, ["0"])


@pytest.mark.parametrize("pair", [*PAIRS, *EXACT], ids=pair_id)
def test_which_casts_may_lose_is_what_values_show(pair: tuple[torch.dtype, torch.dtype]) -> None:
    source, target = pair
    if source.itemsize == 2:
        values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source)
    else:
        limits = torch.finfo(source)
        values = torch.tensor([1 + limits.eps, limits.max, limits.smallest_normal], dtype=source)
    values = values[torch.isfinite(values)].double()
    assert may_lose(CODES[source], CODES[target]) == (not torch.equal(values.to(target).double(), values))


# -- whole merges


#: In the order of their shards: a base is consumed once something has changed.
SHAPES = {"updated": (10, 10), "small": (12, 8), "large": (9, 16)}


@pytest.fixture
def cast(tmp_path: Path) -> Paths:
    """Return a float32 base of three shards, two of which are only cast, and an adapter on the first."""
    tensors = {name: random_tensor(shape, F32, seed=len(name)) for name, shape in SHAPES.items()}
    tensors["small"] *= 1e-6
    base = write_base(tmp_path / "base", [{f"{name}.weight": tensor} for name, tensor in tensors.items()])
    return aged((base, write_adapter(tmp_path / "adapter", lora_pair("updated", *SHAPES["updated"]))))


def wanted_casts(base: Path, target: torch.dtype = F16) -> dict[str, CastLoss]:
    return {name: wanted(tensor, target) for name, tensor in read_all(base).items() if name != "updated.weight"}


def recorded(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "rawmerge.json").read_text())
    return found


@pytest.mark.parametrize(
    "options", [{}, {"threads": 1}, {"threads": 8}, {"without": ["kernel"]}, {"verify": True}], ids=str
)
def test_summary_and_record_tell_it(cast: Paths, tmp_path: Path, options: dict[str, Any]) -> None:
    summary = rawmerge.merge_adapter(*cast, tmp_path / "out", dtype="float16", **options)
    expected = wanted_casts(cast[0])
    assert summary.casts.keys() == expected.keys()
    for name, loss in expected.items():
        assert_same(summary.casts[name], loss)
    told = recorded(tmp_path / "out")["casts"]
    for field in ("elements", "rounded", "zeroed", "subnormal"):
        assert told[field] == sum(getattr(loss, field) for loss in expected.values())
    assert (told["tensors"], told["dtypes"]) == (2, ["float16"])
    assert told["largest"] == pytest.approx(max(loss.largest for loss in expected.values()), rel=1e-3)
    small, large = told["worst"]
    assert (small["name"], large["name"]) == ("small.weight", "large.weight")
    assert (small["elements"], small["zeroed"]) == (96, expected["small.weight"].zeroed)
    assert 0 < small["zeroed"] < small["rounded"]
    assert large["largest"] == pytest.approx(expected["large.weight"].largest, rel=1e-3)


def test_the_command_says_it_in_one_line(cast: Paths, tmp_path: Path) -> None:
    command = ["merge", *map(str, cast), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*command, "--dtype", "float16"])
    losses = wanted_casts(cast[0]).values()
    rounded, zeroed, subnormal = (
        sum(getattr(at, name) for at in losses) for name in ("rounded", "zeroed", "subnormal")
    )
    largest = max(at.largest for at in losses)
    assert (
        f"{rounded} of 240 elements in 2 tensors were rounded in the cast to float16, {zeroed} became 0, "
        f"{subnormal} became subnormal; the largest relative error of the others is {largest:.4g}\n"
    ) in done.stderr
    assert largest < 1 < zeroed
    told = CliRunner().invoke(cli, [*command[:-1], str(tmp_path / "json"), "--dtype", "float16", "--json"])
    assert json.loads(told.stdout)["casts"] == recorded(tmp_path / "out")["casts"]


def test_where_nothing_is_cast_nothing_is_said(cast: Paths, tmp_path: Path) -> None:
    summary = rawmerge.merge_adapter(*cast, tmp_path / "out")
    assert summary.casts == {}
    assert "casts" not in recorded(tmp_path / "out")
    done = CliRunner().invoke(cli, ["merge", *map(str, cast), "-o", str(tmp_path / "again")])
    assert "cast to" not in done.stderr


def test_a_cast_that_might_lose_and_does_not_says_so(tmp_path: Path) -> None:
    kept = torch.arange(60, dtype=F32).view(6, 10)
    base = write_base(tmp_path / "base", [{"kept": kept, "q.weight": random_tensor((8, 6), F32)}])
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 8, 6))
    command = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert "the cast to bfloat16 changed none of 60 elements in 1 tensor\n" in CliRunner().invoke(cli, command).stderr


def test_whatever_made_a_shard_its_counts_are_kept(cast: Paths, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float16"}
    first = rawmerge.merge_adapter(*cast, tmp_path / "golden", **options)
    golden = folder_bytes(tmp_path / "golden")
    cut_off(cast, tmp_path / "out", 2, **options)
    resumed = rawmerge.merge_adapter(*cast, tmp_path / "out", **options)
    assert (resumed.resumed, resumed.casts) == (2, first.casts)
    assert folder_bytes(tmp_path / "out") == golden
    again = rawmerge.merge_adapter(*cast, tmp_path / "out", overwrite=True, **options)
    assert (again.reused, again.casts) == (3, first.casts)
    assert folder_bytes(tmp_path / "out") == golden
    cut_off_consuming(cast, tmp_path / "consumed", "model-00003-of-00003.safetensors", **options)
    assert (unfinished_folder(tmp_path / "consumed").path / CONSUMING_NAME).exists()
    consumed = rawmerge.merge_adapter(*cast, tmp_path / "consumed", consume_base=True, **options)
    assert (consumed.consumed, consumed.casts) == (3, first.casts)
    assert folder_bytes(tmp_path / "consumed") == golden


def without_casts(notes: Path) -> None:
    """Make notes those of a version that did not count casts."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    assert any(line.pop("casts", None) for line in lines)
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_shards_of_a_version_that_did_not_count_are_made_anew_where_the_base_is_there(
    cast: Paths, tmp_path: Path
) -> None:
    first = rawmerge.merge_adapter(*cast, tmp_path / "golden", dtype="float16")
    cut_off(cast, tmp_path / "out", 2, dtype="float16")
    without_casts(hidden_beside(tmp_path / "out") / JOURNAL_NAME)
    found = rawmerge.merge_adapter(*cast, tmp_path / "out", dtype="float16")
    assert found.resumed == 1
    assert found.casts == first.casts
    cut_off_consuming(cast, tmp_path / "consumed", "model-00003-of-00003.safetensors", dtype="float16")
    without_casts(unfinished_folder(tmp_path / "consumed").path / CONSUMING_NAME)
    rawmerge.merge_adapter(*cast, tmp_path / "consumed", consume_base=True, dtype="float16")
    golden = read_all(tmp_path / "golden")
    consumed = read_all(tmp_path / "consumed")
    assert consumed.keys() == golden.keys()
    assert all(torch.equal(tensor, golden[name]) for name, tensor in consumed.items())


def test_only_the_worst_are_named() -> None:
    casts = {f"{number:02}": CastLoss("F16", 100, number, number // 20, 0, 0.001) for number in range(30)}
    losses = cast_losses(casts)
    assert (losses.tensors, losses.elements, losses.rounded) == (30, 3000, sum(range(30)))
    assert list(losses.worst) == [f"{number:02}" for number in range(29, 29 - MOST_NAMED, -1)]


def test_what_is_kept_for_later_comes_back() -> None:
    kept = {"a": CastLoss("F16", 9, 5, 2, 3, 1 / 3), "b": CastLoss("BF16", 2**40, 0, 0, 0, 0.0)}
    assert parse_casts(json.loads(json.dumps(cast_fields(kept), allow_nan=False))) == kept


@pytest.mark.parametrize(
    "fields",
    [
        ["F16", 9, 5],
        ["F16", 9, 5, 2, 4, 0.5],
        ["F16", 9, 10, 0, 0, 0.5],
        ["F16", 9, 5, -1, 0, 0.5],
        ["F16", 9, 5, 0, 0, float("nan")],
        ["F16", 9, 5, 0, 0, 1.5],
        ["F16", 0, 0, 0, 0, 0.0],
        ["U8", 9, 5, 0, 0, 0.5],
        [["F16"], 9, 5, 0, 0, 0.5],
        ["F16", None, 5, 0, 0, 0.5],
    ],
    ids=str,
)
def test_what_is_none_of_it_is_refused(fields: list[Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse_casts({"a": fields})


# -- overflow


@pytest.mark.parametrize("threads", [1, 8])
def test_an_overflow_in_a_cast_is_counted_in_the_whole_tensor(threads: int, tmp_path: Path) -> None:
    bench, values = Workbench(tmp_path), random_tensor((700, 130), F32)
    values.view(-1)[::1000] = 1e5
    values[600, 7], values[0, 1] = -2.5e6, torch.inf  # what is infinite already may stay so
    count = int((values.abs() >= 65520).sum()) - 1
    with pytest.raises(NonFiniteTensorError) as caught:
        bench.run_one(bench.step(values, dtype=F16), threads=threads, tile_elements=2**13)
    text = str(caught.value)
    assert f"'0': expected finite values in F16, found inf in {count} of 91,000 elements: beyond 65504" in text
    assert "the largest 2.5e+06\n" in text
    assert "hint: --dtype float32 or bfloat16 holds it" in text
    assert "the merge ends at the first such tensor, and there may be others" in text


def test_an_overflow_names_only_dtypes_that_hold_the_value(tmp_path: Path) -> None:
    bench, values = Workbench(tmp_path), random_tensor((20, 30), F32)
    values[3, 4] = 3.4e38  # below the largest float32, above the largest bfloat16
    with pytest.raises(NonFiniteTensorError, match=r"1 of 600 elements(.|\n)*hint: --dtype float32 holds it"):
        bench.run_one(bench.step(values, dtype=BF16))
    with pytest.raises(NonFiniteTensorError, match=r"the largest 1e\+300(.|\n)*hint: no output dtype holds it"):
        bench.run_one(bench.step(values.double() * 0 + 1e300, dtype=F32))


def lora_step(bench: Workbench, lora_b: torch.Tensor, **fields: Any) -> Any:
    factors = {"lora_a": torch.ones(4, 30), "lora_b": lora_b}
    update = bench.update("lora", factors, {"scaling": 1.0, "is_transposed": False, "rounds_delta": False})
    return bench.step(random_tensor((50, 30), F16), [update], **fields)


def test_an_overflow_of_a_sum_says_at_least_how_many(tmp_path: Path) -> None:
    bench, lora_b = Workbench(tmp_path), torch.zeros(50, 4)
    lora_b[7] = 5e4
    with pytest.raises(NonFiniteTensorError) as caught:
        bench.run_one(lora_step(bench, lora_b))
    assert "found inf in at least 30 of 1,500 elements: beyond 65504, the largest 2000" in str(caught.value)
    assert "--dtype float32 or bfloat16 holds it" in str(caught.value)


def test_nan_blames_the_values(tmp_path: Path) -> None:
    bench, lora_b = Workbench(tmp_path), torch.zeros(50, 4)
    lora_b[7, 2] = torch.nan
    with pytest.raises(NonFiniteTensorError, match=r"found NaN or inf(.|\n)*at least 30 of(.|\n)*may be broken"):
        bench.run_one(lora_step(bench, lora_b))


@pytest.mark.parametrize("is_updated", [False, True])
def test_what_is_laid_over_the_base_must_fit_too(is_updated: bool, tmp_path: Path) -> None:
    bench, overlay = Workbench(tmp_path), random_tensor((20, 30), F32)
    overlay[3, 4] = 70_000
    fields = {"overlay": bench.store(overlay)}
    step = lora_step(bench, torch.ones(50, 4), **fields)
    with pytest.raises(NonFiniteTensorError, match="1 of 1,500 elements: beyond 65504, the largest 70000"):
        bench.run_one(step if is_updated else replace(step, updates=()))


def test_float64_laid_over_a_narrow_base_is_rounded_once(tmp_path: Path) -> None:
    # by way of float32 it falls on a tie, and to the even 1
    overlay = torch.full((20, 30), 1 + 2.0**-11 + 2.0**-40, dtype=F64)
    bench = Workbench(tmp_path)
    step = bench.step(torch.zeros(50, 30), dtype=F16, overlay=bench.store(overlay))
    assert (bench.run_one(step)[:20] == 1 + 2.0**-10).all()


def test_a_merge_whose_cast_overflows_names_the_tensor_and_publishes_nothing(cast: Paths, tmp_path: Path) -> None:
    base = read_all(cast[0])
    base["large.weight"][2, 3] = 1e30
    broken = write_base(tmp_path / "broken", [base])
    command = ["merge", str(broken), str(cast[1]), "-o", str(tmp_path / "out"), "--dtype", "float16", "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 4
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["subject"], problem["expected"]) == ("large.weight", "finite values in F16")
    assert problem["found"] == "inf in 1 of 144 elements: beyond 65504, the largest 1e+30"
    assert not (tmp_path / "out").exists()
