"""The benchmarks' harness: what it measures, that it notices wrong results, and what it writes."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.merge_plan import UpdateTensor
from rawmerge.run_options import MECHANISMS

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import bench_merge, growth, kinds, mechanisms, page_cache, report
from benchmarks.baseline_shards import merge_by_shards
from benchmarks.check_kind import EXPECTED_FILE, check_kind
from benchmarks.check_merge import Formula, WrongResultError, check_merge, is_within_one_rounding, round_once
from benchmarks.growth_plot import write_plot
from benchmarks.kind_cases import KIND_CASES
from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.measure import CommandError, Cost, measure
from benchmarks.recipe import Recipe, plain_recipe
from benchmarks.result_files import told_command, write_result
from benchmarks.results import Results
from benchmarks.rounds import Bench, run_bench
from benchmarks.rows import MERGE_ROW, REFERENCE_ROW, Places, Row, choose_rows
from benchmarks.shapes import SHAPES, CheckpointShape

SMALL = CheckpointShape(name="small", hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=128, shards=2)
RECIPE = Recipe(shape=SMALL, shard_count=2, rank=3, alpha=5)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find `benchmarks`; other tests' dirty pages and memory are left alone."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(page_cache, "settle", lambda: None)
    monkeypatch.setattr(page_cache, "touch_memory", lambda _: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with base/, adapter/ and merged/."""
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    make_checkpoint(folder, RECIPE)
    rawmerge.merge_adapter(folder / "base", folder / "adapter", folder / "merged")
    return folder


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every Markdown table, the line below the head left out; each must be rectangular."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            head, marks, *rows = (line.strip("|").split("|") for line in block.splitlines())
            assert all(re.fullmatch(r"-+:?", mark) for mark in marks)
            assert {len(marks), *map(len, rows)} == {len(head)}
            found.append([[cell.strip() for cell in row] for row in (head, *rows)])
    return found


def some_results(names: list[str], seconds: list[float]) -> Results:
    """Return results in which each row took its seconds in both rounds."""
    costs = {
        name: 2
        * [Cost(wall_seconds=wall, cpu_seconds=2 * wall, peak_rss_bytes=10**7, read_bytes=0, written_bytes=None)]
        for name, wall in zip(names, seconds, strict=True)
    }
    return Results(recipe=RECIPE, page_cache="warm", machine=describe_machine(Path()), costs=costs)


def test_a_run_checks_times_and_tells(tmp_path: Path) -> None:
    bench = Bench(RECIPE, tmp_path)
    rows = list(choose_rows(bench.places, with_float64=False, with_peft=False, with_peers=False))
    broken = Row("broken, sync", [sys.executable, "-c", "raise SystemExit('no such tool')"], "float32", is_foreign=True)
    (results,) = run_bench(bench, [*rows, broken], 1)

    assert list(results.costs) == [REFERENCE_ROW, MERGE_ROW]
    assert results.left_out == {"broken, sync": "no such tool"}
    assert results.ratio(REFERENCE_ROW) == 1
    copied = results.median(REFERENCE_ROW)
    assert copied.write_call_bytes is None or copied.write_call_bytes >= RECIPE.base_bytes
    assert results.median(MERGE_ROW).peak_rss_bytes > copied.peak_rss_bytes
    (table,) = tables(results.as_markdown())
    assert [row[0] for row in table] == ["", REFERENCE_ROW, MERGE_ROW]
    assert table[1][2] == "1.00"
    assert float(table[2][1]) > 0
    value = json.loads(json.dumps(results.as_value()))
    assert len(value["costs"][MERGE_ROW]) == 1
    assert value["base_bytes"] == 2 * SMALL.element_count
    assert str(tmp_path) not in json.dumps(value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECIPE.name]


def test_our_own_failing_row_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(RECIPE, tmp_path)
    with pytest.raises(CommandError, match="no such tool"):
        run_bench(bench, [Row("ours", [sys.executable, "-c", "raise SystemExit('no such tool')"], "float32")], 1)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_right_results_pass(tmp_path: Path, dtype: str, compute_dtype: str) -> None:
    recipe = replace(RECIPE, dtype=dtype)
    folder = tmp_path / recipe.name
    make_checkpoint(folder, recipe)
    output = tmp_path / "merged"
    rawmerge.merge_adapter(folder / "base", folder / "adapter", output, compute_dtype=compute_dtype)
    tensors = load_file(output / "model-00001-of-00002.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert check_merge(folder, output, recipe, Formula(compute_dtype)) == 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_adapters_are_checked_by_what_their_order_means(tmp_path: Path, dtype: str) -> None:
    recipe = replace(RECIPE, dtype=dtype)
    folder, weights = tmp_path / recipe.name, (1.0, 0.5, -0.25)
    make_checkpoint(folder, recipe)
    adapters = [f"{folder / 'adapter'}:{weight}" for weight in weights]
    rows = [Places(folder, tmp_path / order).several_row(order) for order in ("serial", "once")]
    for order, row in zip(("serial", "once"), rows, strict=True):
        assert (row.weights, row.is_once) == (weights, order == "once")
        named = [f"{folder / 'adapter'}", *adapters[1:]]
        assert list(row.command)[5 : 5 + len(named)] == named
        rawmerge.merge_adapter(folder / "base", adapters, tmp_path / order, order=order)
        formula = Formula(weights=weights, is_once=order == "once")
        assert check_merge(folder, tmp_path / order, recipe, formula) == 10
        for wrong in (replace(formula, weights=weights[:2]), replace(formula, weights=(1.0, 0.5, 0.25))):
            with pytest.raises(WrongResultError, match="differs"):
                check_merge(folder, tmp_path / order, recipe, wrong)
    if dtype == "bfloat16":  # in float32 a sum is rounded after each adapter anyway
        with pytest.raises(WrongResultError, match="differs"):
            check_merge(folder, tmp_path / "serial", recipe, Formula(weights=weights, is_once=True))


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.0.input_layernorm.weight"])
def test_one_wrong_bit_is_caught(checkpoint: Path, tmp_path: Path, name: str) -> None:
    output = shutil.copytree(checkpoint / "merged", tmp_path / "wrong")
    path = output / json.loads((output / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(torch.int16).view(-1)[7] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WrongResultError, match=re.escape(name)):
        check_merge(checkpoint, output, RECIPE, Formula("float32"))


def test_an_unmerged_copy_and_another_arithmetic_are_caught(checkpoint: Path) -> None:
    with pytest.raises(WrongResultError, match="equals the base"):
        check_merge(checkpoint, checkpoint / "base", RECIPE, Formula("float32"))
    with pytest.raises(WrongResultError, match="float64"):
        check_merge(checkpoint, checkpoint / "merged", RECIPE, Formula("float64"))


def test_another_tool_may_be_off_by_one_rounding_and_no_more() -> None:
    expected = torch.tensor([1.0, -0.02, 3e-5]).bfloat16()
    weight = torch.tensor([1.0, -0.02, 3e-5]).bfloat16()
    following = (expected.view(torch.int16) + 1).view(torch.bfloat16)
    after = (expected.view(torch.int16) + 3).view(torch.bfloat16)
    assert is_within_one_rounding(following, expected, weight)
    assert not is_within_one_rounding(after, expected, weight)
    assert not is_within_one_rounding(expected.float(), expected, weight)
    assert not is_within_one_rounding(torch.full_like(expected, torch.nan), expected, weight)


def test_round_once_from_float64_does_not_round_twice() -> None:
    # just above the middle of 1 and the next bfloat16, but by less than float32 can tell
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert value.float().bfloat16().item() == 1
    assert round_once(value, torch.bfloat16).item() == 1 + 2.0**-7


def test_the_loop_over_shards_is_right(checkpoint: Path, tmp_path: Path) -> None:
    merge_by_shards(checkpoint / "base", checkpoint / "adapter", tmp_path / "merged")
    assert check_merge(checkpoint, tmp_path / "merged", RECIPE, Formula("float32")) == 10


def test_checkpoints_are_made_once_and_never_over_others(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert make_checkpoint(folder, RECIPE)
    assert not make_checkpoint(folder, RECIPE)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe.pop("dtype") == "bfloat16"
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert not make_checkpoint(folder, RECIPE)
    with pytest.raises(FileExistsError):
        make_checkpoint(folder, replace(RECIPE, dtype="float16"))


def test_shapes_and_recipes_have_names_of_their_own() -> None:
    assert {"tiny", "llama_0b3", "llama_0b7", "llama_1b5", "llama_3b", "llama_7b"} <= SHAPES.keys()
    sizes = [SHAPES[name].element_count for name in ("llama_0b3", "llama_0b7", "llama_1b5", "llama_3b", "llama_7b")]
    assert sizes == sorted(sizes)
    plain = plain_recipe(SMALL)
    others = [plain, replace(plain, rank=64), replace(plain, shard_count=5), replace(plain, dtype="float32")]
    assert [recipe.name for recipe in others] == ["small", "small-r64", "small-5-shards", "small-float32"]


def test_what_a_command_moves_is_measured(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(10**6))
    cost = measure(["cp", str(source), str(target)])
    if cost.write_call_bytes is None:
        pytest.skip("this system does not tell")
    assert 10**6 <= cost.write_call_bytes < 2 * 10**6
    assert cost.read_call_bytes is not None
    assert cost.read_call_bytes >= 10**6


def test_a_told_command_names_no_place() -> None:
    given = ["--shape", "tiny", "--workdir", "/disk/x", "--results=/y", "--runs", "2"]
    assert told_command("growth", given) == "python -m benchmarks.growth --shape tiny --runs 2"


def test_results_go_between_their_markers(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    write_result(results, "a-b_1", {"x": 1}, "new table\n\n![plot](a-b_1.svg)")
    text = (
        "head\n<!-- result: a-b_1 -->\nold\n<!-- end of result -->\nmiddle\n"
        "<!-- result: none -->\nstays\n<!-- end of result -->\nfoot\n"
    )
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.update(readme, results)
    after = readme.read_text()
    assert "new table\n\n![plot](benchmarks/results/a-b_1.svg)\n" in after
    assert "old" not in after
    assert "stays" in after
    assert after.endswith("foot\n")
    assert not report.update(readme, results)
    assert json.loads((results / "a-b_1.json").read_text()) == {"x": 1}


def test_growth_varies_one_property_only(tmp_path: Path) -> None:
    sizes = list(growth.points("size", ["tiny", "llama_7b"], RECIPE))
    assert [point.recipe.shape.name for point in sizes] == ["tiny", "llama_7b"]
    assert [point.recipe.shard_count for point in sizes] == [2, 3]
    assert [point.recipe.rank for point in sizes] == [3, 3]
    ranks = [point.recipe for point in growth.points("rank", ["8", "64"], RECIPE)]
    assert ranks == [replace(RECIPE, rank=8), replace(RECIPE, rank=64)]
    assert [point.recipe for point in growth.points("shards", ["40"], RECIPE)] == [replace(RECIPE, shard_count=40)]
    (threads,) = growth.points("threads", ["4"], RECIPE)
    assert (threads.recipe, threads.options) == (RECIPE, ("--threads", "4"))

    results = some_results([REFERENCE_ROW, MERGE_ROW], [2, 3])
    curve = [(point, results) for point in growth.points("rank", ["8", "64"], RECIPE)]
    (table,) = tables(growth.as_markdown("rank", "name", curve))
    assert table[1] == ["8", "2.00", "3.00", "1.50", "6.00", "10"]
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        write_plot(path, growth.plot_curve("rank", curve))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    texts = {element.text for element in ET.parse(paths[0]).iter() if element.text}
    assert {"8", "64", "rank", "rawmerge"} <= texts


def test_each_mechanism_is_switched_off_once(tmp_path: Path) -> None:
    rows = {row.name: row.command for row in mechanisms.choose_rows(Places(tmp_path / "in", tmp_path / "out"))}
    assert list(rows)[:2] == [REFERENCE_ROW, MERGE_ROW]
    assert "--without" not in rows[MERGE_ROW]
    for name in MECHANISMS:
        (row,) = (rows[row] for row in rows if row.endswith(name))
        beside = ("--without", mechanisms.STANDS_IN[name]) if name in mechanisms.STANDS_IN else ()
        assert tuple(row[row.index("--without") :]) == (*beside, "--without", name)
    assert rows[mechanisms.WITHOUT_ALL].count("--without") == len(MECHANISMS)
    results = some_results(list(rows), [2, 4, *([5] * len(MECHANISMS)), 8])
    (table,) = tables(mechanisms.as_markdown(results))
    assert table[3][:6] == ["without " + next(iter(MECHANISMS)), "5.00", "2.50", "1.25", "10.00", "1.25"]
    assert table[-1][3] == "2.00"
    assert [row[-1] for row in table if row[0] == "without kernel and early-import"] == [
        f"{MECHANISMS['early-import']}; beside `without kernel`"
    ]


def test_an_adapter_may_target_some_modules_only(checkpoint: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, targets=("q_proj",))
    folder = tmp_path / recipe.name
    make_checkpoint(folder, recipe)
    make_checkpoint(folder, recipe)  # reused: the recipe is the same
    plan = rawmerge.plan_merge(folder / "base", folder / "adapter")
    assert [step.entry.name.split(".")[-2] for step in plan.steps() if isinstance(step, UpdateTensor)] == [
        "q_proj"
    ] * recipe.shape.layers
    assert not any("target_modules" in note for note in plan.notes)
    rawmerge.run_plan(plan, tmp_path / "merged")
    assert check_merge(folder, tmp_path / "merged", recipe, Formula("float32")) == 10
    with pytest.raises(WrongResultError, match="kept tensor differs from the base"):
        check_merge(folder, checkpoint / "merged", recipe, Formula("float32"))


def test_slow_kinds_are_marked_and_need_a_reason() -> None:
    def cost(name: str, seconds: float, reason: str = "") -> kinds.KindCost:
        return kinds.KindCost(
            name=name, wall_seconds=seconds, cpu_seconds=1, peak_rss_bytes=10**6, round_count=2, reason=reason
        )

    costs = [cost(KIND_CASES[0].name, 1), cost("fast", 9), cost("slow", 11, "known"), cost("odd", 12)]
    (table,) = tables(kinds.as_markdown(SMALL, costs, ["lost: why"]))
    assert [row[2] for row in table[1:]] == ["1.0", "9.0", "**11.0**", "**12.0**"]
    assert [row[-1] for row in table[1:]] == ["", "", "known", "**not known**"]
    assert float(table[1][1]) == pytest.approx(1e9 / SMALL.updated_element_count, rel=1e-3)
    assert len({case.name for case in KIND_CASES}) == len(KIND_CASES)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_kind_is_made_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from benchmarks.kind_adapters import make_adapter

    case = next(case for case in KIND_CASES if case.name == "DoRA r=16")
    base, adapter, output = checkpoint / "base", tmp_path / case.adapter_name, tmp_path / "out"
    make_adapter(case, base, adapter)
    expected = load_file(adapter / EXPECTED_FILE)
    assert {name.split(".")[-2] for name in expected} == {"q_proj", "k_proj", "down_proj"}
    rawmerge.merge_adapter(base, adapter, output)
    check_kind(adapter, base, output)
    with pytest.raises(WrongResultError, match="equals the base"):
        check_kind(adapter, base, base)
    with pytest.raises(WrongResultError, match="off PEFT's merge"):
        check_kind(adapter, base, checkpoint / "merged")


def test_states_are_named() -> None:
    assert bench_merge.parse_states("warm,cold") == ("warm", "cold")
    with pytest.raises(Exception, match="lukewarm"):
        bench_merge.parse_states("lukewarm")
    results = some_results([REFERENCE_ROW], [1])
    assert bench_merge.result_name(results) == f"merge-{RECIPE.name}"
    cold = replace(results, page_cache="cold (posix_fadvise)")
    assert bench_merge.result_name(cold) == f"merge-{RECIPE.name}-cold"
