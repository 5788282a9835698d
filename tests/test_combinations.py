"""Deltas of several adapters combined as PEFT's functions combine task tensors, and that nothing else decides a bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from peft.utils import merge_utils

import rawmerge
from rawmerge.cli import cli
from rawmerge.combination import Combination, Task, combination_of, combined
from rawmerge.computing.magnitudes import kth_magnitude
from rawmerge.computing.random_masks import RandomMask, mask_key
from rawmerge.engine.tiles import tile_rows
from rawmerge.errors import PlanError, RefusedError
from rawmerge.merge_plan import MergePlan, UpdateTensor
from rawmerge.window import Window
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    folder_bytes,
    lora_pair,
    random_tensor,
    raw,
    read_all,
    write_adapter,
    write_base,
)
from tests.step_runs import Workbench

#: `large` has several tiles, `narrow` several blocks; a product of the last two has other bits on other threads.
SHAPES = {"large": (1100, 1024), "wide": (96, 160), "narrow": (9000, 33), "small": (12, 8)}
WEIGHTS = (0.7, -0.3, 1.0)
SCALING = ALPHA / RANK
#: The places of the adapters that change each.
CHANGED = {"large": (0, 1, 2), "wide": (0, 2), "narrow": (0, 1, 2), "small": (1,)}
PRUNING: dict[str, dict[str, Any]] = {
    "magnitude": {"density": 0.3},
    "ties": {"density": 0.3},
    "dare": {"density": 0.3, "seed": 5},
    "dare-ties": {"density": 0.3, "majority_sign": "frequency", "seed": 5},
    "average": {},
}


@pytest.fixture(scope="module", params=["BF16", pytest.param("F32", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[request.param]
    tensors = {f"{name}.weight": random_tensor(shape, dtype) for name, shape in SHAPES.items()}
    return write_base(tmp_path_factory.mktemp("base"), [{**tensors, "norm.weight": random_tensor((7,), dtype)}])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [_adapter(folder / str(place), place) for place in range(3)]


def _adapter(folder: Path, place: int) -> Path:
    pairs: dict[str, torch.Tensor] = {}
    for name, places in CHANGED.items():
        pairs |= lora_pair(name, *SHAPES[name], seed=place + 1) if place in places else {}
    return write_adapter(folder, pairs)


@pytest.fixture
def named(adapters: list[Path]) -> list[str]:
    return [f"{path}:{weight}" for path, weight in zip(adapters, WEIGHTS, strict=True)]


def deltas(adapters: Sequence[Path], name: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return what each adapter that changes a tensor adds to it, whole, as PEFT's `get_delta_weight` does."""
    found = []
    for place in CHANGED[name]:
        tensors = read_all(adapters[place])
        lora_b, lora_a = (tensors[f"{PREFIX}{name}.lora_{letter}.weight"].to(dtype) for letter in "BA")
        found.append((lora_b @ lora_a) * SCALING)
    return found


def masks(name: str, seed: int, density: float) -> list[torch.Tensor]:
    """Return what the documented rule keeps of each delta, drawn from the first number to the last."""
    rows, columns = SHAPES[name]
    kept = []
    for place in CHANGED[name]:
        digest = hashlib.sha256(f"{seed} {place} {name}.weight".encode()).digest()
        drawn = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw((rows * columns + 1) // 2)
        numbers = np.stack([drawn & np.uint64(2**32 - 1), drawn >> np.uint64(32)], axis=1).reshape(-1)
        kept.append(torch.from_numpy(numbers[: rows * columns] < density * 2**32).view(rows, columns))
    return kept


def mixed_by_peft(
    how: str, tasks: list[torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any]
) -> torch.Tensor:
    """Return PEFT's combination of whole deltas, by chance as our masks have it."""
    weights = torch.tensor([WEIGHTS[place] for place in CHANGED[name]], dtype=tasks[0].dtype)
    density, majority = options.get("density", 1.0), options.get("majority_sign", "total")
    if "dare" in how:
        drawn = iter(masks(name, options["seed"], density))
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda given: next(drawn).to(given.dtype))
    combined: dict[str, Callable[[], torch.Tensor]] = {
        "magnitude": lambda: merge_utils.magnitude_prune(tasks, weights, density),
        "ties": lambda: merge_utils.ties(tasks, weights, density, majority),
        "dare": lambda: merge_utils.dare_linear(tasks, weights, density),
        "dare-ties": lambda: merge_utils.dare_ties(tasks, weights, density, majority),
        "average": lambda: merge_utils.task_arithmetic(tasks, weights) / 3,
    }
    result = combined[how]()
    monkeypatch.undo()
    return result


@pytest.mark.parametrize(
    ("how", "options"),
    [*PRUNING.items(), ("ties", {"density": 0.55, "majority_sign": "frequency"}), ("dare-ties", PRUNING["dare"])],
)
def test_it_is_peft_s_combination_of_whole_deltas_added_and_rounded_once(
    base: Path,
    adapters: list[Path],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    options: dict[str, Any],
) -> None:
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine=how, **options)
    before, after = read_all(base), read_all(tmp_path / "out")
    for name in SHAPES:
        value, tasks = before[f"{name}.weight"], deltas(adapters, name)
        mixed = mixed_by_peft(how, tasks, name, monkeypatch, options)
        assert raw(after[f"{name}.weight"]) == raw((value.float() + mixed).to(value.dtype)), name
    assert raw(after["norm.weight"]) == raw(before["norm.weight"])


@pytest.mark.parametrize("how", ["magnitude", "ties", "dare-ties"])
def test_float64_combines_deltas_of_float64(
    base: Path, adapters: list[Path], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine=how, compute_dtype="float64", **PRUNING[how])
    before, after = read_all(base), read_all(tmp_path / "out")
    for name in SHAPES:
        value, tasks = before[f"{name}.weight"], deltas(adapters, name, torch.float64)
        mixed = mixed_by_peft(how, tasks, name, monkeypatch, PRUNING[how])
        found, exact = after[f"{name}.weight"], value.double() + mixed
        spacing = torch.nextafter(found.float().abs(), torch.tensor(torch.inf)) - found.float().abs()
        spacing = spacing.double() * (2**16 if found.dtype == torch.bfloat16 else 1)
        assert bool(((found.double() - exact).abs() <= spacing * 0.5000001).all()), name


def peft_merge(base: Path, adapters: Sequence[Path], how: str, options: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what PEFT's `add_weighted_adapter` and a merge make of a base's linear layers."""
    tensors = read_all(base)
    model = torch.nn.Module()
    for name in SHAPES:
        weight = tensors[f"{name}.weight"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight
        model.add_module(name, layer)
    made = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for place, path in enumerate(adapters[1:], 1):
        made.load_adapter(path, adapter_name=str(place))
    names = [str(place) for place in range(len(adapters))]
    made.base_model.add_weighted_adapter(names, list(WEIGHTS), "mix", combination_type=how, **options)
    made.set_adapter("mix")
    merged = made.base_model.merge_and_unload()
    return {name: merged.get_submodule(name).weight.data for name in SHAPES}


def with_targets(folder: Path, adapters: Sequence[Path], **fields: Any) -> list[Path]:
    """Return copies of adapters whose configs name their modules."""
    copies = []
    for place, path in enumerate(adapters):
        targets = [name for name in SHAPES if place in CHANGED[name]]
        copies.append(write_adapter(folder / str(place), read_all(path), target_modules=targets, **fields))
    return copies


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
    ],
)
def test_factors_are_combined_as_peft_does(
    base: Path, adapters: list[Path], tmp_path: Path, how: str, options: dict[str, Any]
) -> None:
    paths = with_targets(tmp_path / "adapters", adapters)
    named = [f"{path}:{weight}" for path, weight in zip(paths, WEIGHTS, strict=True)]
    combine = f"peft-{how.removesuffix('_prune')}"
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine=combine, **options)
    theirs = {{"majority_sign": "majority_sign_method"}.get(name, name): value for name, value in options.items()}
    expected, after = peft_merge(base, paths, how, theirs), read_all(tmp_path / "out")
    for name in SHAPES:
        assert raw(after[f"{name}.weight"]) == raw(expected[name]), name
    assert rawmerge.verify_merge(tmp_path / "out", base, named).is_equal
    plan = rawmerge.plan_merge(base, named, combine=combine, **options)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan


def test_peft_scales_what_it_combines_of_rslora_by_the_root_of_the_rank(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """The new adapter has a scaling of 1 by its alpha, but inherits `use_rslora`: its delta is too large by √rank."""
    paths = with_targets(tmp_path / "adapters", adapters, use_rslora=True)
    named = [f"{path}:{weight}" for path, weight in zip(paths, WEIGHTS, strict=True)]
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine="peft-cat", dtype="float32")
    before, after, theirs = read_all(base), read_all(tmp_path / "out"), peft_merge(base, paths, "cat", {})
    value = before["large.weight"].float()
    # deltas have alpha / √rank for their scaling
    expected = sum(weight * delta * RANK**0.5 for weight, delta in zip(WEIGHTS, deltas(paths, "large"), strict=True))
    assert torch.allclose(after["large.weight"] - value, expected, rtol=1e-3, atol=1e-5)
    ratio = float((theirs["large"].float() - value).norm() / (after["large.weight"] - value).norm())
    assert ratio == pytest.approx((3 * RANK) ** 0.5, rel=1e-3)


def test_what_has_no_factors_to_combine_is_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", lora_pair("wide", *SHAPES["wide"], rank=2, seed=9), r=2)
    with pytest.raises(PlanError, match="pairs of the ranks 2 and 4"):
        rawmerge.plan_merge(base, [adapters[0], other], combine="peft-linear")
    assert rawmerge.plan_merge(base, [adapters[0], other], combine="peft-cat")
    with pytest.raises(PlanError, match="of which it keeps none"):
        rawmerge.plan_merge(base, adapters, combine="peft-magnitude", density=0.02)
    bias = {f"{PREFIX}wide.lora_B.bias": torch.rand(SHAPES["wide"][0])}
    tensors = {"wide.weight": random_tensor(SHAPES["wide"]), "wide.bias": random_tensor(SHAPES["wide"][:1])}
    small = write_base(tmp_path / "small", [tensors])
    paths = [
        write_adapter(tmp_path / str(seed), lora_pair("wide", *SHAPES["wide"], seed=seed) | bias, lora_bias=True)
        for seed in range(2)
    ]
    with pytest.raises(PlanError, match="lora_bias, which has not the factors"):
        rawmerge.plan_merge(small, paths, combine="peft-linear")
    assert rawmerge.plan_merge(small, paths, combine="average")


def test_a_density_of_1_prunes_nothing(base: Path, adapters: list[Path], named: list[str], tmp_path: Path) -> None:
    for how in ("magnitude", "dare"):
        rawmerge.merge_adapter(base, named, tmp_path / how, combine=how, density=1)
        before, after = read_all(base), read_all(tmp_path / how)
        for name in SHAPES:
            value, weights = before[f"{name}.weight"], [WEIGHTS[place] for place in CHANGED[name]]
            mixed = merge_utils.task_arithmetic(deltas(adapters, name), torch.tensor(weights))
            assert raw(after[f"{name}.weight"]) == raw((value.float() + mixed).to(value.dtype)), name


def test_ties_of_equal_magnitude_are_all_kept(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"w.weight": torch.zeros(8, 10), "v.weight": torch.zeros(3, 2)}])
    lora_b = torch.tensor([[4.0], [1], [1], [1], [-1], [1], [0.5], [0]])
    paths = [
        write_adapter(
            tmp_path / name,
            {f"{PREFIX}w.lora_A.weight": torch.ones(1, 10), f"{PREFIX}w.lora_B.weight": lora_b * factor},
            r=1,
            lora_alpha=1,
        )
        for name, factor in (("a", 1.0), ("b", 2.0))
    ]
    rawmerge.merge_adapter(base, paths, tmp_path / "out", combine="magnitude", density=0.3)
    # 24 of 80 are kept; the 24th is one of 50 that are equally large
    expected = 3 * lora_b * (lora_b.abs() >= 1)
    assert torch.equal(read_all(tmp_path / "out")["w.weight"], expected.expand(8, 10))
    # of 80 none is kept: PEFT's `int(density * numel)`, which loses the deltas
    with pytest.raises(PlanError, match=r"w\.weight.*0\.01 of 80 elements"):
        rawmerge.plan_merge(base, paths, combine="magnitude", density=0.01)
    rawmerge.plan_merge(base, paths, combine="magnitude", density=0.0125)


@pytest.mark.parametrize(
    "options",
    [{"threads": 1}, {"threads": 5}, {"without": ["kernel"]}, {"max_memory": 345 * 10**6}],
    ids=["one thread", "five threads", "no kernel", "other tiles"],
)
@pytest.mark.parametrize("how", ["ties", "dare-ties"])
def test_no_choice_of_how_changes_a_byte(
    base: Path, named: list[str], tmp_path: Path, how: str, options: dict[str, Any]
) -> None:
    rawmerge.merge_adapter(base, named, tmp_path / "golden", combine=how, **PRUNING[how])
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine=how, **PRUNING[how], **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")


def test_another_seed_keeps_others(base: Path, named: list[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        rawmerge.merge_adapter(base, named, tmp_path / str(seed), combine="dare", density=0.5, seed=seed)
    one, other = read_all(tmp_path / "0"), read_all(tmp_path / "1")
    assert all(raw(one[f"{name}.weight"]) != raw(other[f"{name}.weight"]) for name in SHAPES)


@pytest.mark.parametrize("how", PRUNING)
def test_such_an_output_is_verified_and_planned_as_any_other(
    base: Path, adapters: list[Path], named: list[str], tmp_path: Path, how: str
) -> None:
    options = PRUNING[how]
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine=how, **options, verify=True)
    assert rawmerge.verify_merge(tmp_path / "out", base, named).is_equal
    assert not rawmerge.verify_merge(tmp_path / "out", base, adapters).is_equal
    plan = rawmerge.plan_merge(base, named, combine=how, **options)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
    rawmerge.run_plan(rawmerge.parse_plan(rawmerge.format_plan(plan)), tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "out")
    record = json.loads((tmp_path / "out/rawmerge.json").read_text())["options"]
    assert {name: record[name] for name in record.keys() & options.keys()} == options
    assert (record["combine"], record["order"]) == (how, "once")


def test_a_record_that_was_changed_is_found_out(base: Path, named: list[str], tmp_path: Path) -> None:
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine="dare", density=0.5, seed=3, card=False)
    path = tmp_path / "out/rawmerge.json"
    record = json.loads(path.read_text())
    for options, found in (
        ({"seed": 4}, "other bits|values that"),
        ({"density": True}, "density"),
        ({"seed": -1}, "seed"),
    ):
        path.write_text(json.dumps({**record, "options": {**record["options"], **options}}))
        try:
            told = str(rawmerge.verify_merge(tmp_path / "out", base, named).findings)
        except RefusedError as error:
            told = str(error)
        assert any(word in told for word in found.split("|")), told


def test_consuming_the_base_gives_the_same(base: Path, named: list[str], tmp_path: Path) -> None:
    copy = write_base(tmp_path / "copy", [read_all(base)])
    rawmerge.merge_adapter(base, named, tmp_path / "out", combine="ties", density=0.5, card=False)
    rawmerge.merge_adapter(copy, named, tmp_path / "two", combine="ties", density=0.5, card=False, consume_base=True)
    assert raw(read_all(tmp_path / "out")["large.weight"]) == raw(read_all(tmp_path / "two")["large.weight"])


def test_sum_is_the_order_once(base: Path, named: list[str]) -> None:
    assert rawmerge.plan_merge(base, named, combine="sum") == rawmerge.plan_merge(base, named, order="once")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"combine": "ties"}, "above 0 to 1"),
        ({"combine": "ties", "density": 0}, "above 0 to 1"),
        ({"combine": "ties", "density": 1.5}, "above 0 to 1"),
        ({"combine": "dare", "density": float("nan")}, "above 0 to 1"),
        ({"combine": "dare", "density": 0.5, "order": "serial"}, "rounds once"),
        ({"combine": "sum", "order": "serial"}, "rounds once"),
        ({"combine": "average", "density": 0.5}, "leave --density out"),
        ({"combine": "dare", "density": 0.5, "majority_sign": "frequency"}, "leave --majority-sign out"),
        ({"combine": "ties", "density": 0.5, "seed": 1}, "leave --seed out"),
        ({"combine": "dare", "density": 0.5, "seed": 2**63}, "below 2^63"),
        ({"density": 0.5}, "no --combine"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(
    base: Path, named: list[str], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(base, named, **options)
    assert told in str(caught.value)


def test_one_adapter_is_not_combined(base: Path, adapters: list[Path]) -> None:
    several: list[Path | Sequence[Path | str]] = [adapters[0], adapters[:1], [adapters[0], f"{adapters[1]}:0"]]
    for given in several:
        with pytest.raises(PlanError, match="two adapters or more"):
            rawmerge.plan_merge(base, given, combine="ties", density=0.5)


def test_a_choice_that_there_is_not_is_a_mistake_of_usage(base: Path, named: list[str]) -> None:
    for options in ({"combine": "slerp"}, {"combine": "ties", "density": 0.5, "majority_sign": "most"}):
        with pytest.raises(ValueError, match="must be one of"):
            rawmerge.plan_merge(base, named, **options)


def test_kinds_without_a_sum_and_stored_values_with_a_weight_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((12, 8)), "head.weight": random_tensor((6, 8))}])
    one = write_adapter(tmp_path / "one", lora_pair("q", 12, 8))
    scaled = write_adapter(tmp_path / "scaled", {f"{PREFIX}q.ia3_l": torch.rand(12, 1) + 0.5})
    config = {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": []}
    (scaled / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="scale_rows, which has no sum with another's"):
        rawmerge.plan_merge(base, [one, scaled], combine="average")
    head = {f"{PREFIX}head.weight": random_tensor((6, 8))}
    saved = write_adapter(tmp_path / "saved", lora_pair("q", 12, 8, seed=1) | head, modules_to_save=["head"])
    with pytest.raises(PlanError, match=r"multiplied by 0\.5.*stores whole"):
        rawmerge.plan_merge(base, [one, f"{saved}:0.5"], combine="average")
    rawmerge.merge_adapter(base, [one, saved], tmp_path / "out", combine="average")
    assert raw(read_all(tmp_path / "out")["head.weight"]) == raw(next(iter(head.values())))


def test_a_saved_plan_with_a_combination_that_there_is_not_is_refused(
    base: Path, named: list[str], tmp_path: Path
) -> None:
    plan = rawmerge.plan_merge(base, named, combine="ties", density=0.5)
    for settings, told in (
        ({"combine": "slerp"}, "slerp"),
        ({"0/0/kind": "nope"}, "nope"),
        ({"0/0/kind": "combination"}, "combination"),
        ({"0/weight": "much"}, "must be a number"),
        ({"0/0/window": 3}, "window"),
    ):
        with pytest.raises(RefusedError, match=told):
            rawmerge.run_plan(_with_settings(plan, settings), tmp_path / "out")


def _with_settings(plan: MergePlan, settings: Mapping[str, Any]) -> MergePlan:
    """Return a plan in which settings of all combinations are others."""
    steps = tuple(
        replace(step, updates=tuple(replace(at, settings={**at.settings, **settings}) for at in step.updates))
        if isinstance(step, UpdateTensor)
        else step
        for step in plan.shards[0].steps
    )
    return replace(plan, shards=(replace(plan.shards[0], steps=steps),))


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["ties", "dare-ties", "average"])
def test_deltas_of_parts_are_combined_as_that_of_the_whole(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    """Modules fused on disk: elements are ranked among all of the tensor, and no tile or thread changes a bit."""
    bench, base = Workbench(tmp_path), random_tensor((411, 1000), dtype)
    windows = {"q": Window(0, 300), "k": Window(300, 40, column=10, column_count=50), "v": Window(360, 40)}
    tasks, wholes = [], []
    for place, names in enumerate(("qv", "kq")):
        whole, updates = torch.zeros(base.shape), []
        for name in names:
            window = windows[name]
            columns = window.columns(1000)
            pair = lora_pair(name, window.row_count, len(range(1000)[columns]), seed=place)
            lora_a, lora_b = pair.values()
            settings = {"scaling": 1.5, "is_transposed": False, "rounds_delta": True}
            updates.append(bench.update("lora", {"lora_a": lora_a, "lora_b": lora_b}, settings, window))
            whole[window.row : window.row + window.row_count, columns] = (lora_b @ lora_a) * 1.5
        tasks.append(Task(place, (0.7, -0.3)[place], tuple(updates)))
        wholes.append(whole)
    density = 0.0 if how == "average" else 0.5
    made = Combination(how, density, "total", 3, "w", 2, tuple(tasks))
    step = combined(bench.step(base, []), made)
    weights = torch.tensor([0.7, -0.3])
    if how == "dare-ties":
        kept = [RandomMask(mask_key(3, "w", place), 0.5).kept(0, base.numel()).view(base.shape) for place in (0, 1)]
        mixed = merge_utils.ties([whole * mask / 0.5 for whole, mask in zip(wholes, kept, strict=True)], weights, 1.0)
    elif how == "ties":
        mixed = merge_utils.ties(wholes, weights, 0.5)
    else:
        mixed = merge_utils.task_arithmetic(wholes, weights) / 2
    expected = (base.float() + mixed).to(dtype)
    for threads, tile_elements in product((1, 3), (64, 2**14, 2**20)):
        assert raw(bench.run_one(step, threads=threads, tile_elements=tile_elements)) == raw(expected)


def test_kinds_are_mixed_and_any_shape_is_combined(tmp_path: Path) -> None:
    """A convolution and an embedding, changed by LoRA and LoHa; the deltas by the definitions."""
    shapes = {"conv": (16, 8, 3, 3), "embed": (50, 24)}
    base = write_base(
        tmp_path / "base", [{f"{name}.weight": random_tensor(at, torch.float32) for name, at in shapes.items()}]
    )
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(*shape, generator=generator) for shape in ((4, 8, 3, 3), (16, 4, 1, 1), (4, 50), (24, 4))]
    names = ["conv.lora_A.weight", "conv.lora_B.weight", "embed.lora_embedding_A", "embed.lora_embedding_B"]
    one = write_adapter(tmp_path / "one", {f"{PREFIX}{name}": at for name, at in zip(names, factors, strict=True)})
    hada = [torch.randn(*shape, generator=generator) for shape in ((16, 3), (3, 72), (16, 3), (3, 72))]
    parts = ["w1_a", "w1_b", "w2_a", "w2_b"]
    other = write_adapter(
        tmp_path / "other", {f"{PREFIX}conv.hada_{part}": at for part, at in zip(parts, hada, strict=True)}
    )
    config = {"peft_type": "LOHA", "r": 3, "alpha": 5, "target_modules": ["conv"]}
    (other / "adapter_config.json").write_text(json.dumps(config))
    rawmerge.merge_adapter(base, [one, other], tmp_path / "out", combine="ties", density=0.5)
    conv = [
        (factors[1].flatten(1) @ factors[0].flatten(1)).view(16, 8, 3, 3) * SCALING,
        ((hada[0] @ hada[1]) * (hada[2] @ hada[3])).view(16, 8, 3, 3) * (5 / 3),
    ]
    embed = [(factors[3] @ factors[2]).T * SCALING]
    before, after = read_all(base), read_all(tmp_path / "out")
    for name, tasks in (("conv", conv), ("embed", embed)):
        mixed = merge_utils.ties(tasks, torch.ones(len(tasks)), 0.5)
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + mixed, rtol=1e-5, atol=1e-5), name


def in_parts(values: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, len(values), 777):
        yield values[start : start + 777]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_magnitude_is_that_of_a_sorted_list(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 1e-38, 1e30):
        values = torch.randn(5000, generator=generator, dtype=dtype) * scale
        values[:700] = 0
        values[700:900] = values[900]
        ordered = values.abs().sort(descending=True).values
        for k in (1, 2, 137, 2500, 4300, 4301, 5000):
            assert kth_magnitude(partial(in_parts, values), k, dtype) == ordered[k - 1], (scale, k)


def test_a_mask_does_not_depend_on_who_asks_for_which_rows() -> None:
    mask, rows, columns = RandomMask(mask_key(7, "w", 1), 0.3), 500, 77
    whole = mask.kept(0, rows * columns)
    for elements in (columns, 5000, 2**14):
        tiles = list(tile_rows(rows, columns, elements))
        parts = {first: mask.kept(first * columns, count * columns) for first, count in reversed(tiles)}
        assert torch.equal(torch.cat([parts[first] for first, _ in tiles]), whole)
    assert torch.equal(mask.kept(12345, 100), whole[12345:12445])


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_mask_keeps_its_share_independently(density: float) -> None:
    count = 400_000
    one, other = (RandomMask(mask_key(7, "w", place), density).kept(0, count) for place in (0, 1))
    deviation = (density * (1 - density) / count) ** 0.5
    assert abs(float(one.double().mean()) - density) < 5 * deviation
    both, share = float((one & other).double().mean()), density * density
    assert abs(both - share) < 5 * (share * (1 - share) / count) ** 0.5
    neighbours = float((one[1:] & one[:-1]).double().mean())
    assert abs(neighbours - share) < 8 * (share * (1 - share) / count) ** 0.5


def test_the_stream_of_a_seed_stays_what_it_is() -> None:
    """An output must be verified years later; numpy keeps the raw streams of its generators."""
    kept = RandomMask(mask_key(0, "model.layers.0.mlp.up_proj.weight", 0), 0.5).kept(0, 32)
    assert "".join(str(int(value)) for value in kept) == "00110000101111101100001000011011"


def test_the_command_takes_it(base: Path, named: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = ["--combine", "dare-ties", "--density", "0.5", "--majority-sign", "frequency", "--seed", "9"]
    done = CliRunner().invoke(cli, ["merge", str(base), *named, "-o", out, *options])
    assert done.exit_code == 0, done.stderr
    verified = CliRunner().invoke(cli, ["verify", out, "--base", str(base), *(f"--adapter={name}" for name in named)])
    assert (verified.exit_code, "bit for bit" in verified.stdout) == (0, True)
    planned = CliRunner().invoke(cli, ["plan", str(base), *named, "--combine", "ties", "--density", "0.5"])
    assert "ties, density 0.5, of 3 deltas, each computed three times: lora rank 4, scaling 1.5" in planned.stdout
    refused = CliRunner().invoke(cli, ["plan", str(base), *named, "--combine", "ties", "--density", "0"])
    assert refused.exit_code == 2
    refused = CliRunner().invoke(cli, ["plan", str(base), *named, *options, "--order", "serial"])
    assert (refused.exit_code, "rounds once" in refused.stderr) == (3, True)
    assert "combined by `dare-ties`" in (tmp_path / "out/README.md").read_text()


def test_an_unfinished_merge_of_another_combination_is_told(base: Path, named: list[str]) -> None:
    plans = [rawmerge.plan_merge(base, named, combine="ties", density=density) for density in (0.5, 0.25)]
    from rawmerge.consuming.plan_difference import plan_differences

    (problem,) = plan_differences(*plans)
    assert (problem.subject, problem.expected[:3], problem.found) == ("--density", "0.5", "0.25")


def test_a_plan_tells_each_part(base: Path, named: list[str]) -> None:
    plan = rawmerge.plan_merge(base, named, combine="average")
    (step,) = [step for step in plan.steps() if step.entry.name == "wide.weight"]
    assert isinstance(step, UpdateTensor)
    made = combination_of(step.updates[0])
    assert (made.count, [(task.place, task.weight) for task in made.tasks]) == (3, [(0, 0.7), (2, 1.0)])
