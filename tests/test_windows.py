"""Parts of tensors: what an update of some rows and columns changes, where tensors are cut, what is laid over them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rawmerge
from rawmerge.computing.shared_tensors import SharedTensors, count_uses
from rawmerge.computing.tile_computer import TileScratch, WindowedUpdate
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.errors import PlanError
from rawmerge.formats.shard_header import TensorEntry, format_shard_header
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import ReplaceTensor, ShardPlan, Update, UpdateTensor, matrix_of
from rawmerge.methods import ADAPTER_KINDS, KIND_FIELDS, METHODS
from rawmerge.methods.interface import Scratch, Setting, TileContext
from rawmerge.plan_json import format_plan, parse_plan
from rawmerge.window import Window
from tests.builders import merged, random_tensor, raw
from tests.step_runs import Workbench
from tests.strategies import SETTINGS

PLAIN = {"scaling": 1.5, "is_transposed": False, "rounds_delta": False}


class NumberedRows:
    """An update that adds, to each row, one more than its place in the delta."""

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        tile += torch.arange(first_row + 1, first_row + 1 + tile.shape[0])[:, None]


windows = st.builds(
    Window,
    row=st.integers(0, 9),
    row_count=st.integers(1, 9),
    delta_row=st.integers(0, 5),
    column=st.integers(0, 4),
    column_step=st.integers(1, 3),
    column_count=st.integers(-1, 3),
)


@SETTINGS
@given(windows, st.sets(st.integers(0, 18)))
def test_a_window_is_numpy_s_slice_however_the_rows_are_cut(window: Window, cuts: set[int]) -> None:
    expected = np.zeros((18, 7), dtype=np.float32)
    stop = 7 if window.column_count < 0 else window.column + window.column_step * window.column_count
    part = expected[window.row : window.row + window.row_count, window.column : stop : window.column_step]
    part += window.delta_row + 1 + np.arange(len(part))[:, None]
    found = torch.zeros(18, 7)
    edges = sorted(cuts | {0, 18})
    for start, end in pairwise(edges):
        WindowedUpdate(NumberedRows(), window).apply(found[start:end], start, TileScratch())
    assert np.array_equal(found.numpy(), expected)


def bare_step(shape: tuple[int, ...], **fields: Any) -> UpdateTensor:
    source = TensorSource("x", 0, 0, "F32", shape)
    return UpdateTensor(TensorEntry("w", "F32", shape, 0, 0), source, "F32", **{"updates": (), **fields})


def bare_replacement(shape: tuple[int, ...]) -> ReplaceTensor:
    source = TensorSource("x", 0, 0, "F16", shape)
    return ReplaceTensor(TensorEntry("w", "F32", shape, 0, 0), source, source)


def update_of(window: Window | None) -> Update:
    return Update("lora", {}, PLAIN, window)


@SETTINGS
@given(
    st.lists(windows | st.none(), max_size=4),
    st.lists(st.integers(0, 20)),
    st.sampled_from([1, 16, 1000]),
)
def test_no_tile_crosses_a_cut_or_the_edge_of_a_window(
    found: list[Window | None], cuts: list[int], tile_elements: int
) -> None:
    step = bare_step((20, 7), updates=tuple(map(update_of, found)), cuts=tuple(cuts))
    matrix = matrix_of(step)
    position = 0
    for first, count in matrix.tiles(tile_elements):
        assert first == position
        position += count
        stretch = matrix.stretch_at(first)
        assert stretch.first_row <= first
        assert first + count <= stretch.first_row + stretch.row_count
        inside = range(first + 1, first + count)
        if found:  # nothing else has products
            assert not set(cuts) & set(inside)
        for place, window in enumerate(window or Window(0, 20) for window in found):
            touched = set(range(window.row, window.row + window.row_count)) & set(range(first, first + count))
            assert touched in (set(), set(range(first, first + count)))
            assert (place in stretch.updates) == bool(touched)
    assert position == 20


@pytest.mark.parametrize(
    ("step", "view"),
    [
        (bare_step((128, 2880, 5760)), (128 * 2880, 5760)),
        (bare_step((128, 2880, 5760), updates=(update_of(None),)), (128, 2880 * 5760)),
        (bare_step((128, 2880, 5760), updates=(update_of(None),), columns=5760), (128 * 2880, 5760)),
        (bare_step((0, 3, 20), updates=(update_of(None),), columns=20), (0, 20)),
        (bare_replacement((6, 4, 20)), (24, 20)),
    ],
)
def test_the_view_in_which_a_tensor_is_cut(step: UpdateTensor | ReplaceTensor, view: tuple[int, int]) -> None:
    matrix = matrix_of(step)
    assert (matrix.rows, matrix.columns) == view


def test_a_product_is_low_by_its_own_rows_and_columns() -> None:
    interleaved = tuple(update_of(Window(0, 4000, column=side, column_step=2)) for side in (0, 1))
    matrix = matrix_of(bare_step((4000, 100), updates=interleaved))
    assert [(at.product_columns, at.is_low) for at in matrix.stretches] == [(50, True)]
    stacked = (update_of(Window(0, 2000)), update_of(Window(2000, 20)))
    matrix = matrix_of(bare_step((4000, 1000), updates=stacked))
    assert [(at.first_row, at.row_count, at.is_low) for at in matrix.stretches] == [
        (0, 2000, False),
        (2000, 20, True),
        (2020, 1980, False),  # of any height: nothing is multiplied there
    ]
    assert matrix_of(bare_step((7, 100))).stretches[0].is_low is False


def test_casts_of_experts_are_cut_finely() -> None:
    counts = [count for _, count in matrix_of(bare_step((128, 2880, 5760))).tiles()]
    assert max(counts) * 5760 <= TILE_ELEMENTS + 64 * 5760


def pair(rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "lora_a": random_tensor((4, columns), torch.float32, seed) * 9,
        "lora_b": random_tensor((rows, 4), torch.float32, seed) * 9 + 0.1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_modules_fused_on_disk_are_updated_each_in_its_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Workbench(tmp_path)
    base, rows = random_tensor((411, 130), dtype), {"q": (0, 300), "k": (300, 40), "v": (360, 40)}
    pairs = {name: pair(count, 130, seed) for seed, (name, (_, count)) in enumerate(rows.items())}
    updates = [bench.update("lora", pairs[name], PLAIN, Window(*rows[name])) for name in rows]
    expected = base.clone()
    for name, (first, count) in rows.items():
        part = slice(first, first + count)
        expected[part] = merged(base[part], pairs[name]["lora_a"], pairs[name]["lora_b"], 1.5)
    step = bench.step(base, updates)
    for threads, tile_elements in product((1, 3), (64, 2**14, 2**20)):
        assert raw(bench.run_one(step, threads=threads, tile_elements=tile_elements)) == raw(expected)


@pytest.mark.parametrize("shape", [(90, 33), (1000, 700)])
def test_a_module_split_on_disk_gets_the_rows_of_its_delta(tmp_path: Path, shape: tuple[int, int]) -> None:
    bench = Workbench(tmp_path)
    base, factors = random_tensor(shape), pair(*shape, 0)
    expected = merged(base, factors["lora_a"], factors["lora_b"], 1.5)
    sources = {role: bench.store(tensor) for role, tensor in factors.items()}
    edges = [0, shape[0] // 2, shape[0] - 17, shape[0]]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]
    steps = [
        bench.step(base[part], [Update("lora", sources, PLAIN, Window(0, part.stop - part.start, part.start))])
        for part in parts
    ]
    found = bench.run(steps, threads=2)
    assert [raw(found[f"{place}"]) for place in range(3)] == [raw(expected[part]) for part in parts]


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("output", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("overlay_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("overlay_rows", [1, 64, 200, 300])
def test_an_overlay_stands_in_place_of_the_first_rows(
    tmp_path: Path, overlay_rows: int, overlay_dtype: torch.dtype, output: torch.dtype, compute_dtype: str
) -> None:
    bench, base = Workbench(tmp_path), random_tensor((300, 16))
    overlay = random_tensor((overlay_rows, 16), overlay_dtype, seed=1)
    factors = pair(overlay_rows, 16, 2)
    update = bench.update("lora", factors, PLAIN, Window(0, overlay_rows))
    # what PEFT has no part in is not rounded on the way
    rows = overlay if output == torch.float32 or compute_dtype == "float64" else overlay.bfloat16()
    expected = base.to(output)
    expected[:overlay_rows] = rows.to(output)
    without = bench.step(base, dtype=output, overlay=bench.store(overlay))
    assert raw(bench.run_one(without, compute_dtype=compute_dtype, tile_elements=64)) == raw(expected)
    if compute_dtype == "float32":
        delta = (factors["lora_b"] @ factors["lora_a"]) * 1.5
        expected[:overlay_rows] = (rows.float() + delta).to(output)
        assert raw(bench.run_one(replace(without, updates=(update,)), tile_elements=64)) == raw(expected)


def test_a_cast_of_experts_has_torch_s_bits(tmp_path: Path) -> None:
    bench, base = Workbench(tmp_path), random_tensor((5, 70, 33), torch.float32)
    found = bench.run_one(bench.step(base, dtype=torch.bfloat16), tile_elements=64, threads=2)
    assert raw(found) == raw(base.bfloat16())


WINDOWS = [None, Window(3, 4), Window(1, 2, 3, 4, 5, 6)]


def plan_with(step: UpdateTensor, tiny: tuple[Path, Path]) -> rawmerge.MergePlan:
    size = prod(step.entry.shape) * 4
    whole = replace(step, entry=replace(step.entry, end=size), source=replace(step.source, byte_count=size))
    header = format_shard_header((whole.entry,), {})
    return replace(rawmerge.plan_merge(*tiny), shards=(ShardPlan("a", header, (whole,)),))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("overlay", [None, TensorSource("y", 8, 40, "BF16", (4, 5))])
def test_a_plan_survives_json(window: Window | None, overlay: TensorSource | None, tiny: tuple[Path, Path]) -> None:
    settings: dict[str, Setting] = {"indices": (3, 1), "none": (), "scaling": 2.0, "rank": 3, "flag": True, "name": "x"}
    update = Update("token_rows", {"rows": TensorSource("z", 0, 8, "F32", (2, 1))}, settings, window)
    step = bare_step((6, 5), updates=(update,), columns=5, cuts=(2, 4), overlay=overlay)
    plan = plan_with(step, tiny)
    found = parse_plan(format_plan(plan))
    assert found == plan
    (parsed,) = found.steps()
    assert isinstance(parsed, UpdateTensor)
    assert [type(value) for value in parsed.updates[0].settings.values()] == [tuple, tuple, float, int, bool, str]


@pytest.mark.parametrize(
    ("field", "value"),
    [("cuts", ["x"]), ("cuts", 3), ("columns", None), ("overlay", 3), ("overlay", {"path": 3}), ("updates", {})],
)
def test_a_plan_of_other_types_is_refused(field: str, value: object, tiny: tuple[Path, Path]) -> None:
    document = json.loads(format_plan(plan_with(bare_step((6, 5)), tiny)))
    document["shards"][0]["steps"][0][field] = value
    with pytest.raises(PlanError):
        parse_plan(json.dumps(document))


@pytest.mark.parametrize("value", [None, {}, {"indices": 3}, ["x"], [[1]]])
def test_a_setting_of_another_type_is_refused(value: object, tiny: tuple[Path, Path]) -> None:
    document = json.loads(format_plan(plan_with(bare_step((6, 5), updates=(update_of(None),)), tiny)))
    document["shards"][0]["steps"][0]["updates"][0]["settings"]["scaling"] = value
    with pytest.raises(PlanError):
        parse_plan(json.dumps(document))


def source_of(number: int, byte_count: int = 10) -> TensorSource:
    return TensorSource("x", number, byte_count, "F32", (1,))


class Reads:
    """A shared store, and what was read for it."""

    def __init__(self, uses: dict[TensorSource, int], kept_bytes: int) -> None:
        self.shared: SharedTensors[object] = SharedTensors(Counter(uses), kept_bytes)
        self.read: list[int] = []

    def use(self, source: TensorSource) -> object:
        return self.shared.read(source, self._read)

    def _read(self, source: TensorSource) -> object:
        self.read.append(source.offset)
        return object()


def test_a_source_is_read_once_and_let_go_with_its_last_use() -> None:
    reads = Reads({source_of(0): 3, source_of(1): 1}, kept_bytes=100)
    assert len({id(reads.use(source_of(0))) for _ in range(3)}) == 1
    reads.use(source_of(1))
    assert reads.read == [0, 1]
    assert not reads.shared._kept
    assert reads.shared._byte_count == 0


def test_what_came_first_stays() -> None:
    reads = Reads({source_of(number): 9 for number in range(3)}, kept_bytes=20)
    for number in (0, 1, 0, 2, 0, 1):
        reads.use(source_of(number))
    assert reads.read == [0, 1, 2]
    assert reads.shared._byte_count == 20


def test_what_has_no_room_is_read_again() -> None:
    reads = Reads({source_of(0, 60): 3, source_of(1, 50): 3}, kept_bytes=100)
    for number, byte_count in ((0, 60), (1, 50), (0, 60), (1, 50)):
        reads.use(source_of(number, byte_count))
    assert reads.read == [0, 1, 1]


def test_threads_that_want_a_source_at_once_read_it_once() -> None:
    reads, barrier = Reads({source_of(0): 8}, kept_bytes=100), threading.Barrier(8)

    def use() -> None:
        barrier.wait()
        reads.use(source_of(0))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads.read == [0]


def test_an_engine_reads_a_factor_of_many_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)
    factors = {role: bench.store(tensor) for role, tensor in pair(9, 7, 0).items()}
    steps = [bench.step(random_tensor((9, 7)), [Update("lora", factors, PLAIN)]) for _ in range(20)]
    plain = bench.step(random_tensor((9, 7)), [bench.update("lora", pair(9, 7, 1), PLAIN)])
    read: Counter[str] = Counter()
    original: Callable[..., None] = OpenFiles.read_into

    def counted(files: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        read[path] += 1
        original(files, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", counted)
    bench.run([*steps, plain], threads=3)
    assert [read[source.path] for source in (*factors.values(), *plain.updates[0].tensors.values())] == [1] * 4
    uses = count_uses([ShardPlan("a", "", (*steps, plain))])
    assert set(uses.values()) == {20, 1}


def test_the_kinds_of_the_registry_are_the_names_that_plans_hold() -> None:
    assert {"lora", "lora_bias", "expert_lora", "token_rows"} <= set(METHODS)
    # a name that two kinds gave would be one of the two's arithmetic for both
    assert len(METHODS) == len({id(method) for method in METHODS.values()})
    assert [kind.peft_type for kind in ADAPTER_KINDS.values()] == list(ADAPTER_KINDS)
    assert set(KIND_FIELDS) == {name for name, kind in ADAPTER_KINDS.items() if not kind.is_foreign}
    assert len(ADAPTER_KINDS) == len(set(ADAPTER_KINDS)) >= len(KIND_FIELDS) == len(set(KIND_FIELDS))
    assert all(KIND_FIELDS[name] is ADAPTER_KINDS[name].fields for name in KIND_FIELDS)
    names = [name for kind in ADAPTER_KINDS.values() for name in kind.methods]
    assert all(METHODS[name] is kind.methods[name] for kind in ADAPTER_KINDS.values() for name in kind.methods), names


def test_a_setting_that_is_no_number_is_a_type_error() -> None:
    context = TileContext((2, 2), torch.float32, None)
    with pytest.raises(TypeError, match="scaling must be a number"):
        METHODS["lora"].prepare({**PLAIN, "scaling": (1,)}, pair(2, 2, 0), context)
    with pytest.raises(TypeError, match="indices must be a tuple"):
        METHODS["token_rows"].prepare({"indices": 1}, {"rows": torch.ones(1, 2)}, context)
