"""Several adapters in one pass: one after the other as separate merges would do it, or their sum rounded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.adapter_order import own_order
from rawmerge.adapter_source import split_weight
from rawmerge.cli import cli
from rawmerge.computing.plain_pairs import find_pairs
from rawmerge.errors import PlanError
from rawmerge.merge_plan import InputFile
from rawmerge.output.record import file_sha256
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

SHAPES = {"wide": (96, 160), "tall": (160, 72), "square": (128, 128), "small": (12, 8)}
SCALING = ALPHA / RANK


@pytest.fixture(params=["BF16", "F32"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[request.param]
    shards = [{f"{name}.weight": random_tensor(shape, dtype)} for name, shape in SHAPES.items()]
    shards[0]["norm.weight"] = random_tensor((7,), dtype)
    return write_base(tmp_path / "base", shards)


def adapter(folder: Path, seed: int, names: Sequence[str] = tuple(SHAPES), **fields: Any) -> Path:
    pairs: dict[str, torch.Tensor] = {}
    for name in names:
        pairs |= lora_pair(name, *SHAPES[name], seed=seed)
    return write_adapter(folder, pairs, **fields)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Return three adapters, of which the second leaves a tensor alone."""
    return [
        adapter(tmp_path / "a", 1),
        adapter(tmp_path / "b", 2, ["wide", "square", "small"]),
        adapter(tmp_path / "c", 3),
    ]


def delta(folder: Path, name: str, weight: float = 1.0) -> torch.Tensor:
    """Return an adapter's delta as PEFT computes it: the product in float32, then the scaling."""
    tensors = read_all(folder)
    keys = [f"{PREFIX}{name}.lora_{letter}.weight" for letter in "BA"]
    if keys[0] not in tensors:
        return torch.zeros(SHAPES[name])
    return (tensors[keys[0]].float() @ tensors[keys[1]].float()) * (SCALING * weight)


@pytest.mark.parametrize("without", [(), ("kernel",)])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_serial_is_each_merged_into_the_output_of_the_one_before(
    base: Path, adapters: list[Path], tmp_path: Path, compute_dtype: str, without: Sequence[str]
) -> None:
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "without": without, "card": False}
    step = base
    for number, path in enumerate(adapters):
        rawmerge.merge_adapter(step, path, tmp_path / f"step-{number}", **options)
        step = tmp_path / f"step-{number}"
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", **options)
    for name in (path.name for path in step.glob("*.safetensors")):
        assert (tmp_path / "out" / name).read_bytes() == (step / name).read_bytes(), name
    before, after = read_all(base), read_all(tmp_path / "out")
    for name in SHAPES:
        value = before[f"{name}.weight"]
        for path in adapters if compute_dtype == "float32" else ():
            value = (value.float() + delta(path, name)).to(value.dtype)
        if compute_dtype == "float32":
            assert raw(after[f"{name}.weight"]) == raw(value), name


def test_once_is_the_sum_rounded_once_whatever_the_order(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(base, adapters, tmp_path / "once", order="once", compute_dtype="float64")
    rawmerge.merge_adapter(base, adapters[::-1], tmp_path / "other", order="once", compute_dtype="float64")
    rawmerge.merge_adapter(base, adapters, tmp_path / "single", order="once")
    rawmerge.merge_adapter(base, [adapters[1], adapters[2], adapters[0]], tmp_path / "shuffled", order="once")
    before, after, single = read_all(base), read_all(tmp_path / "once"), read_all(tmp_path / "single")
    for name in SHAPES:
        exact = before[f"{name}.weight"].double()
        for path in adapters:
            tensors = read_all(path)
            pair = [tensors.get(f"{PREFIX}{name}.lora_{letter}.weight") for letter in "BA"]
            if pair[0] is not None and pair[1] is not None:
                exact += pair[0].double() @ pair[1].double() * SCALING
        found = after[f"{name}.weight"]
        error = (found.double() - exact).abs()
        spacing = torch.nextafter(found.float().abs(), torch.tensor(torch.inf)) - found.float().abs()
        spacing = spacing.double() * (2**16 if found.dtype == torch.bfloat16 else 1)
        assert bool((error <= spacing * 0.5000001).all()), name
        assert torch.allclose(single[f"{name}.weight"].double(), exact, rtol=2**-7, atol=1e-6)
    for one, other in (("once", "other"), ("single", "shuffled")):
        for name in (path.name for path in (tmp_path / one).glob("*.safetensors")):
            assert (tmp_path / one / name).read_bytes() == (tmp_path / other / name).read_bytes()


def test_serial_and_once_differ_in_bfloat16(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(base, adapters, tmp_path / "serial")
    rawmerge.merge_adapter(base, adapters, tmp_path / "once", order="once")
    serial, once = read_all(tmp_path / "serial"), read_all(tmp_path / "once")
    if serial["wide.weight"].dtype == torch.bfloat16:
        assert raw(serial["wide.weight"]) != raw(once["wide.weight"])
    assert raw(serial["norm.weight"]) == raw(once["norm.weight"]) == raw(read_all(base)["norm.weight"])


@pytest.mark.parametrize("weights", [(0.7, -0.3), (-1.0, 2.5), (0.5, 0.25)])
def test_weights_multiply_the_scaling(
    base: Path, adapters: list[Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    named = [f"{path}:{weight}" for path, weight in zip(adapters, weights, strict=False)]
    rawmerge.merge_adapter(base, named, tmp_path / "out")
    before, after = read_all(base), read_all(tmp_path / "out")
    for name in SHAPES:
        value = before[f"{name}.weight"]
        for path, weight in zip(adapters, weights, strict=False):
            if name != "tall" or path != adapters[1]:
                value = (value.float() + delta(path, name, weight)).to(value.dtype)
        assert raw(after[f"{name}.weight"]) == raw(value), name


def test_a_weight_of_1_is_the_plain_merge_and_one_of_0_none_at_all(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    rawmerge.merge_adapter(base, adapters[0], tmp_path / "plain", card=False)
    rawmerge.merge_adapter(base, f"{adapters[0]}:1.0", tmp_path / "one", card=False)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "plain")
    rawmerge.merge_adapter(base, [f"{adapters[1]}:0", adapters[0]], tmp_path / "zero", card=False)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "zero" / path.name).read_bytes() == path.read_bytes()
    record = json.loads((tmp_path / "zero/rawmerge.json").read_text())
    assert [item.get("weight", 1) for item in record["adapters"]] == [0, 1]
    assert {row["reason"] for row in record["adapter_tensors"] if row["adapter"] == 1} == {"its weight is 0"}
    with pytest.raises(PlanError, match="would equal the base"):
        rawmerge.plan_merge(base, [f"{adapters[0]}:0"])


def test_subtracting_what_was_added_gives_the_base_back_in_exact_sums(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"w.weight": torch.arange(80.0).reshape(8, 10)}])
    pair = {f"{PREFIX}w.lora_A.weight": torch.ones(4, 10), f"{PREFIX}w.lora_B.weight": torch.ones(8, 4)}
    path = write_adapter(tmp_path / "a", pair | lora_pair("v", 3, 5) if False else pair)
    rawmerge.merge_adapter(base, path, tmp_path / "up", card=False)
    rawmerge.merge_adapter(tmp_path / "up", f"{path}:-1", tmp_path / "down", force=True, card=False)
    assert raw(read_all(tmp_path / "down")["w.weight"]) == raw(read_all(base)["w.weight"])


def test_an_order_of_its_own_needs_no_more_of_the_files_than_tells_them_apart(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(file: InputFile) -> str:
        read.append(file.byte_count)
        return file_sha256(file)

    monkeypatch.setattr("rawmerge.adapter_order.file_sha256", counted)
    other = write_adapter(tmp_path / "other", lora_pair("wide", *SHAPES["wide"], rank=3), r=3)
    same = [adapter(tmp_path / name, 1, ["wide"]) for name in ("a", "b")]
    monkeypatch.setattr("rawmerge.adapter_order._LOOK", 64)
    cases: list[tuple[list[Path | str], int]] = [([same[0], other], 0), ([same[0], f"{same[1]}:0.5"], 0)]
    cases.append(([*same, other], 4))
    for named, wanted in cases:
        read.clear()
        keys = own_order([rawmerge.plan_merge(base, path) for path in named])
        assert len(read) == wanted
        assert (len(set(map(repr, keys))) == len(keys)) == (wanted == 0)


@pytest.mark.parametrize(
    "options", [{"threads": 1}, {"threads": 5}, {"without": ["kernel"]}, {"without": ["direct-io"]}]
)
@pytest.mark.parametrize("order", ["serial", "once"])
def test_no_choice_of_how_changes_a_byte(
    base: Path, adapters: list[Path], tmp_path: Path, order: str, options: dict[str, Any]
) -> None:
    rawmerge.merge_adapter(base, adapters, tmp_path / "golden", order=order)
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", order=order, **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_the_kernel_takes_all_adapters_of_a_tensor_in_both_orders(
    base: Path, adapters: list[Path], compute_dtype: str
) -> None:
    for order in ("serial", "once"):
        plan = rawmerge.plan_merge(base, adapters, order=order, compute_dtype=compute_dtype)
        found = {step.entry.name: find_pairs(step, compute_dtype) for step in plan.steps()}
        assert {len(found[f"{name}.weight"]) for name in ("wide", "square")} == {3}
        assert {pair.is_summed for pairs in found.values() for pair in pairs} == {order == "once"}
        recipes = {pair.recipe for pairs in found.values() for pair in pairs if len(pairs) == 3}
        # PEFT, whose way a rounded delta is, knows no sum that is rounded once
        assert {recipe.rounds_delta for recipe in recipes} <= {order == "serial" and compute_dtype == "float32", False}


@pytest.mark.parametrize("order", ["serial", "once"])
def test_such_an_output_is_verified_and_consumed_and_planned_as_any_other(
    base: Path, adapters: list[Path], tmp_path: Path, order: str
) -> None:
    named = [str(adapters[0]), f"{adapters[1]}:0.5", str(adapters[2])]
    rawmerge.merge_adapter(base, named, tmp_path / "out", order=order, verify=True, checksum=True)
    assert rawmerge.verify_merge(tmp_path / "out", base, named).is_equal
    assert not rawmerge.verify_merge(tmp_path / "out", base, adapters).is_equal
    assert not rawmerge.verify_merge(tmp_path / "out", base, named[:2]).is_equal
    turned = rawmerge.verify_merge(tmp_path / "out", base, named[::-1])
    assert turned.is_equal == (order == "once")
    assert order == "once" or any("another order" in finding.hint for finding in turned.findings)
    plan = rawmerge.plan_merge(base, named, order=order)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
    golden = folder_bytes(tmp_path / "out")
    rawmerge.run_plan(plan, tmp_path / "again", checksum=True)
    assert folder_bytes(tmp_path / "again") == golden
    rawmerge.merge_adapter(base, named, tmp_path / "consumed", order=order, consume_base=True, checksum=True)
    assert folder_bytes(tmp_path / "consumed") == golden


def test_two_that_replace_one_tensor_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"w.weight": random_tensor((20, 8)), "head.weight": random_tensor((6, 8))}])
    heads = [random_tensor((6, 8), seed=seed) for seed in (5, 6)]
    paths = [
        write_adapter(
            tmp_path / name,
            lora_pair("w", 20, 8, seed=seed) | {f"{PREFIX}head.weight": heads[seed]},
            modules_to_save=["head"],
        )
        for seed, name in enumerate("ab")
    ]
    with pytest.raises(PlanError, match=r"head\.weight.*adapters 1 and 2") as caught:
        rawmerge.merge_adapter(base, paths, tmp_path / "out")
    assert "--replaced-by" in str(caught.value)
    for place in (1, 2):
        rawmerge.merge_adapter(base, paths, tmp_path / f"out-{place}", replaced_by=place)
        assert raw(read_all(tmp_path / f"out-{place}")["head.weight"]) == raw(heads[place - 1])
        record = json.loads((tmp_path / f"out-{place}/rawmerge.json").read_text())
        (lost,) = [row for row in record["adapter_tensors"] if row["use"] == "ignored"]
        assert (lost["adapter"], lost["reason"]) == (3 - place, f"adapter {place} replaces it, as --replaced-by says")
    with pytest.raises(PlanError, match="1 to 2"):
        rawmerge.plan_merge(base, paths, replaced_by=3)


def test_a_delta_on_what_another_replaces_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"w.weight": random_tensor((20, 8)), "head.weight": random_tensor((6, 8))}])
    one = write_adapter(
        tmp_path / "a",
        lora_pair("w", 20, 8) | {f"{PREFIX}head.weight": random_tensor((6, 8))},
        modules_to_save=["head"],
    )
    two = write_adapter(tmp_path / "b", lora_pair("head", 6, 8))
    with pytest.raises(PlanError, match="values that one stores whole, and a delta of another"):
        rawmerge.plan_merge(base, [one, two])


@pytest.mark.parametrize(
    ("peft_type", "part", "shape"), [("IA3", "ia3_l", (12, 1)), ("LORA", "lora_magnitude_vector.weight", (12,))]
)
def test_what_has_no_multiple_and_no_sum_is_refused(
    tmp_path: Path, peft_type: str, part: str, shape: tuple[int, ...]
) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((12, 8))}])
    lora = write_adapter(tmp_path / "lora", lora_pair("q", 12, 8))
    tensors = {f"{PREFIX}q.{part}": torch.rand(shape) + 0.5}
    if peft_type == "LORA":
        other = write_adapter(tmp_path / "other", tensors | lora_pair("q", 12, 8), target_modules=["q"], use_dora=True)
    else:
        other = write_adapter(tmp_path / "other", tensors)
        config = {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": []}
        (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"multiplied by 0\.5"):
        rawmerge.plan_merge(base, f"{other}:0.5")
    with pytest.raises(PlanError, match="no sum with another's"):
        rawmerge.plan_merge(base, [lora, other], order="once")
    rawmerge.merge_adapter(base, lora, tmp_path / "step", card=False)
    rawmerge.merge_adapter(tmp_path / "step", other, tmp_path / "golden", card=False)
    rawmerge.merge_adapter(base, [lora, other], tmp_path / "out", card=False)
    assert raw(read_all(tmp_path / "out")["q.weight"]) == raw(read_all(tmp_path / "golden")["q.weight"])


def test_all_problems_of_all_adapters_come_at_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((12, 8))}])
    paths = [write_adapter(tmp_path / name, lora_pair(name, 12, 8)) for name in ("x", "y")]
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(base, paths)
    assert {"x", "y"} <= {problem.subject.split(".")[-3] for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter", ("adapter", 1.0)),
        ("adapter:0.7", ("adapter", 0.7)),
        ("adapter:-1e-3", ("adapter", -0.001)),
        ("org/name@main:2", ("org/name@main", 2.0)),
        (r"C:\adapters\a", (r"C:\adapters\a", 1.0)),
        (r"C:\adapters\a:0.5", (r"C:\adapters\a", 0.5)),
        ("a:b", ("a:b", 1.0)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_a_weight_is_what_follows_the_last_colon_if_it_is_a_number(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected


def test_a_path_that_is_there_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a:0.5").mkdir()
    assert split_weight(str(tmp_path / "a:0.5")) == (str(tmp_path / "a:0.5"), 1.0)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_a_mistake_of_usage(tmp_path: Path, weight: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        split_weight(f"a:{weight}")
    done = CliRunner().invoke(cli, ["merge", "base", f"a:{weight}", "-o", str(tmp_path / "out")])
    assert (done.exit_code, "finite" in done.stderr) == (2, True)


def test_the_command_takes_several(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    named = [str(adapters[0]), f"{adapters[1]}:0.5"]
    out = str(tmp_path / "out")
    done = CliRunner().invoke(cli, ["merge", str(base), *named, "-o", out, "--order", "once"])
    assert done.exit_code == 0, done.stderr
    options = [f"--adapter={name}" for name in named]
    verified = CliRunner().invoke(cli, ["verify", out, "--base", str(base), *options])
    assert (verified.exit_code, "bit for bit" in verified.stdout) == (0, True)
    planned = CliRunner().invoke(cli, ["plan", str(base), *named])
    assert planned.stdout.count("adapter   ") == 2
    assert "weight 0.5" in planned.stdout


def tied_base(folder: Path) -> Path:
    tensors = {
        "model.embed_tokens.weight": random_tensor((24, 8)),
        "model.layers.0.q_proj.weight": random_tensor((12, 8)),
    }
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "vocab_size": 24,
    }
    return write_base(folder, [tensors], config)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["head last", "head first"])
def test_a_change_of_one_side_of_a_tie_that_another_undoes_is_as_in_turn(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    base = tied_base(tmp_path / "base")
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full((2, 8), 3.0)}
    tokens = write_adapter(
        tmp_path / "tokens",
        rows | lora_pair("model.layers.0.q_proj", 12, 8),
        trainable_token_indices={"embed_tokens": [5, 7]},
    )
    head = write_adapter(tmp_path / "head", lora_pair("lm_head", 24, 8), target_modules=["lm_head"])
    first, second = ((tokens, head)[place] for place in order)
    rawmerge.merge_adapter(base, first, tmp_path / "step", card=False)
    rawmerge.merge_adapter(tmp_path / "step", second, tmp_path / "golden", card=False, force=True)
    rawmerge.merge_adapter(base, [first, second], tmp_path / "out", card=False)
    golden, found = read_all(tmp_path / "golden"), read_all(tmp_path / "out")
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(at) for name, at in golden.items()}
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_rows_that_take_the_place_of_an_earlier_delta_are_refused(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": random_tensor((24, 8)),
        "model.layers.0.q_proj.weight": random_tensor((12, 8)),
    }
    base = write_base(tmp_path / "base", [tensors])

    def rows(name: str, *indices: int) -> Path:
        delta = torch.full((len(indices), 8), float(len(name)))
        tensors = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": delta}
        pair = lora_pair("model.layers.0.q_proj", 12, 8, seed=len(name))
        return write_adapter(tmp_path / name, tensors | pair, trainable_token_indices={"embed_tokens": list(indices)})

    one, two, three = rows("a", 5, 7), rows("bb", 7, 9), rows("ccc", 1)
    with pytest.raises(PlanError, match="token rows that take the place"):
        rawmerge.plan_merge(base, [one, two])
    rawmerge.merge_adapter(base, [one, three], tmp_path / "out")
    found = read_all(tmp_path / "out")["model.embed_tokens.weight"]
    assert [float(found[row, 0]) for row in (5, 7, 1)] == [1, 1, 3]


def test_places_count_the_adapters_that_are_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"w.weight": random_tensor((20, 8)), "head.weight": random_tensor((6, 8))}])
    heads = [random_tensor((6, 8), seed=seed) for seed in (5, 6, 7)]
    paths = [
        write_adapter(
            tmp_path / name,
            lora_pair("w", 20, 8, seed=seed) | {f"{PREFIX}head.weight": heads[seed]},
            modules_to_save=["head"],
        )
        for seed, name in enumerate("abc")
    ]
    named = [f"{paths[0]}:0", str(paths[1]), str(paths[2])]
    with pytest.raises(PlanError, match="adapters 2 and 3"):
        rawmerge.plan_merge(base, named)
    rawmerge.merge_adapter(base, named, tmp_path / "out", replaced_by=3)
    assert raw(read_all(tmp_path / "out")["head.weight"]) == raw(heads[2])
    with pytest.raises(PlanError, match="weight 0"):
        rawmerge.plan_merge(base, named, replaced_by=1)


def test_a_config_that_the_first_changes_is_written_once(tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base")
    head = write_adapter(tmp_path / "head", lora_pair("lm_head", 24, 8), target_modules=["lm_head"])
    plain = write_adapter(tmp_path / "plain", lora_pair("model.layers.0.q_proj", 12, 8))
    for number, order in enumerate(([head, plain], [plain, head])):
        rawmerge.merge_adapter(base, order, tmp_path / f"{number}", card=False)
        assert json.loads((tmp_path / f"{number}/config.json").read_text())["tie_word_embeddings"] is False
    one, other = (folder_bytes(tmp_path / name) for name in "01")
    one.pop("rawmerge.json"), other.pop("rawmerge.json")
    assert one == other


def test_a_sum_depends_on_what_adapters_hold_not_on_where_they_lie(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    rawmerge.merge_adapter(base, adapters, tmp_path / "one", order="once", dtype="float32", card=False)
    moved = [path.rename(tmp_path / name) for path, name in zip(adapters, "zyx", strict=True)]
    rawmerge.merge_adapter(base, moved, tmp_path / "two", order="once", dtype="float32", card=False)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_a_sum_is_rounded_once_where_peft_rounds_twice(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"model.embed_tokens.weight": random_tensor((96, 64))}])
    paths = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pair = {
            f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(RANK, 96, generator=generator) * 0.2,
            f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(64, RANK, generator=generator) * 0.2,
        }
        paths.append(write_adapter(tmp_path / f"{seed}", pair, target_modules=["embed_tokens"]))
    rawmerge.merge_adapter(base, paths, tmp_path / "out", order="once")
    exact = read_all(base)["model.embed_tokens.weight"].double()
    for path in paths:
        a, b = (read_all(path)[f"{PREFIX}model.embed_tokens.lora_embedding_{letter}"].double() for letter in "AB")
        exact += (b @ a).T * SCALING
    found = read_all(tmp_path / "out")["model.embed_tokens.weight"]
    assert int((found != exact.to(torch.bfloat16)).sum()) < 20


def test_the_same_adapter_twice_is_told(base: Path, adapters: list[Path]) -> None:
    plan = rawmerge.plan_merge(base, [adapters[0], adapters[1], f"{adapters[0]}:0.5"])
    assert f"adapters 1 and 3 are the same: {str(adapters[0])!r}" in plan.notes


@pytest.mark.parametrize("text", ["a:1_0", "a:\uff11"])
def test_what_is_no_plain_number_is_no_weight(text: str) -> None:
    assert split_weight(text) == (text, 1.0)


def test_a_weight_that_is_too_small_for_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match="that a float can hold"):
        split_weight("a:1e-400")
    assert split_weight("a:0.0e5") == ("a", 0.0)


def test_copies_of_the_base_s_embeddings_are_the_base_s(tmp_path: Path) -> None:
    """PEFT stores `base_layer.weight` beside a LoRA on embeddings."""
    weight = random_tensor((96, 64))
    base = write_base(tmp_path / "base", [{"model.embed_tokens.weight": weight}])
    paths = []
    for seed, stored in enumerate((weight, weight, None)):
        generator = torch.Generator().manual_seed(seed)
        prefix = "base_model.model.model.embed_tokens."
        tensors = {
            f"{prefix}lora_embedding_A": torch.randn(RANK, 96, generator=generator) * 0.2,
            f"{prefix}lora_embedding_B": torch.randn(64, RANK, generator=generator) * 0.2,
        }
        if stored is not None:
            tensors[f"{prefix}base_layer.weight"] = stored.clone()
        paths.append(write_adapter(tmp_path / f"{seed}", tensors, target_modules=["embed_tokens"]))
    rawmerge.merge_adapter(base, paths, tmp_path / "out")
    value = weight
    for path in paths:
        a, b = (read_all(path)[f"{prefix}lora_embedding_{letter}"] for letter in "AB")
        value = (value.float() + ((b @ a).T * SCALING).bfloat16().float()).bfloat16()
    assert raw(read_all(tmp_path / "out")["model.embed_tokens.weight"]) == raw(value)
    other = read_all(paths[1]) | {f"{prefix}base_layer.weight": weight + 1}
    write_adapter(paths[1], other, target_modules=["embed_tokens"])
    with pytest.raises(PlanError) as caught:
        rawmerge.plan_merge(base, paths, force=True)
    assert "no base in common" in str(caught.value)


def test_a_combination_leaves_alone_what_has_no_sum_and_one_adapter_changes(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": random_tensor((24, 8)),
        "model.layers.0.q_proj.weight": random_tensor((12, 8)),
    }
    base = write_base(tmp_path / "base", [tensors])
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.full((1, 8), 3.0)}
    pairs = [lora_pair("model.layers.0.q_proj", 12, 8, seed=seed) for seed in (1, 2)]
    one = write_adapter(tmp_path / "one", rows | pairs[0], trainable_token_indices={"embed_tokens": [5]})
    two = write_adapter(tmp_path / "two", pairs[1])
    rawmerge.merge_adapter(base, [one, two], tmp_path / "out", combine="ties", density=0.5)
    found = read_all(tmp_path / "out")["model.embed_tokens.weight"]
    assert found[5].tolist() == [3.0] * 8
    assert raw(found[:5]) == raw(read_all(base)["model.embed_tokens.weight"][:5])
    with pytest.raises(PlanError, match=r"leave --combine out|leave the weight out"):
        rawmerge.plan_merge(base, [f"{one}:0.5", two], combine="ties", density=0.5)
