"""Pairs on experts: fused and single ones, on every layout that disks have, against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import ALPHA, PREFIX, RANK, lora_pair, random_tensor, read_all, write_adapter, write_base

EXPERTS, INNER, OUTER = 3, 6, 8
SCALING = ALPHA / RANK
MODULE = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"
QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
LLAMA4 = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
GPT_OSS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
Tensors = dict[str, torch.Tensor]


def single_experts() -> Tensors:
    """Return a tensor for each expert's projection, (out, in)."""
    shapes = {"gate_proj": (INNER, OUTER), "up_proj": (INNER, OUTER), "down_proj": (OUTER, INNER)}
    return {
        f"{MODULE}.{expert}.{leaf}.weight": random_tensor(shape, torch.float32, expert * 10 + place)
        for expert in range(EXPERTS)
        for place, (leaf, shape) in enumerate(shapes.items())
    }


def fused_experts(*, is_transposed: bool = False) -> Tensors:
    gate_up, down = (2 * INNER, OUTER), (OUTER, INNER)
    shapes = {GATE_UP: gate_up[::-1] if is_transposed else gate_up, DOWN: down[::-1] if is_transposed else down}
    return {name: random_tensor((EXPERTS, *shape), torch.float32) for name, shape in shapes.items()}


def stacked_pair(rows: int, columns: int, depth: int = 0, experts: int = EXPERTS) -> Tensors:
    """Return a pair on all experts: lora_a (experts * rank, columns), lora_b (rows, rank * experts)."""
    path = f"{PREFIX}{MODULE}{'.base_layer' * depth}"
    return {
        f"{path}.lora_A.weight": random_tensor((experts * RANK, columns), torch.float32, depth + 1),
        f"{path}.lora_B.weight": random_tensor((rows, RANK * experts), torch.float32, depth + 2),
    }


def stacked_delta(pair: Mapping[str, torch.Tensor], *, is_grouped: bool = False) -> torch.Tensor:
    """Return (experts, rows, columns) in float64: PEFT orders lora_b's columns by rank, then by expert."""
    lora_a, lora_b = (tensor.double() for _, tensor in sorted(pair.items()))
    experts = len(lora_a) // RANK
    split = lora_b.view(len(lora_b), *((experts, RANK) if is_grouped else (RANK, experts)))
    factors = split.permute(1, 0, 2) if is_grouped else split.permute(2, 0, 1)
    return SCALING * factors @ lora_a.view(experts, RANK, -1)


def single_delta(pair: Mapping[str, torch.Tensor]) -> torch.Tensor:
    lora_a, lora_b = (tensor.double() for _, tensor in sorted(pair.items()))
    return SCALING * lora_b @ lora_a


def write(folder: Path, base: Tensors, config: Any, tensors: Tensors, **fields: Any) -> tuple[Path, Path]:
    return write_base(folder / "base", [base], config), write_adapter(folder / "adapter", tensors, **fields)


def merge(
    folder: Path, base: Tensors, config: Any, tensors: Tensors, options: dict[str, Any] | None = None, **fields: Any
) -> Tensors:
    """Return what the merge adds to each base tensor."""
    rawmerge.merge_adapter(*write(folder, base, config, tensors, **fields), folder / "out", **(options or {}))
    merged = read_all(folder / "out")
    return {name: merged[name].double() - before.double() for name, before in base.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # values below 1 in float32: a few units in the last place
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def refuse(folder: Path, says: str, paths: tuple[Path, Path]) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*paths, folder / "out")
    assert not (folder / "out").exists()


def both_pairs() -> tuple[Tensors, Tensors]:
    return stacked_pair(2 * INNER, OUTER, depth=1), stacked_pair(OUTER, INNER)


BOTH: dict[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "peft_version": "0.21.2",
}


def test_fused_pairs_are_split_over_the_experts_own_tensors(tmp_path: Path) -> None:
    gate_up, down = both_pairs()
    added = merge(tmp_path, single_experts(), QWEN, gate_up | down, **BOTH)
    for expert in range(EXPERTS):
        gate, up = stacked_delta(gate_up)[expert].chunk(2)
        close(added[f"{MODULE}.{expert}.gate_proj.weight"], gate)
        close(added[f"{MODULE}.{expert}.up_proj.weight"], up)
        close(added[f"{MODULE}.{expert}.down_proj.weight"], stacked_delta(down)[expert])


def test_the_account_folds_the_experts_numbers(tmp_path: Path) -> None:
    gate_up, down = both_pairs()
    plan = rawmerge.plan_merge(*write(tmp_path, single_experts(), QWEN, gate_up | down, **BOTH))
    assert {(use.tensor_name, use.count) for use in plan.adapter_uses} == {
        (f"{MODULE}.*.down_proj.weight", EXPERTS),
        (f"{MODULE}.*.gate_proj.weight, {MODULE}.*.up_proj.weight", 2 * EXPERTS),
    }


@pytest.mark.parametrize("is_transposed", [False, True])
def test_fused_pairs_on_a_fused_disk_lie_as_it_does(tmp_path: Path, is_transposed: bool) -> None:
    gate_up, down = both_pairs()
    base = fused_experts(is_transposed=is_transposed)
    added = merge(tmp_path, base, LLAMA4 if is_transposed else QWEN, gate_up | down, **BOTH)
    for name, pair in ((GATE_UP, gate_up), (DOWN, down)):
        delta = stacked_delta(pair)
        close(added[name], delta.transpose(1, 2) if is_transposed else delta)


def test_an_option_says_that_lora_b_is_grouped_by_expert(tmp_path: Path) -> None:
    pair = stacked_pair(OUTER, INNER)
    fields: dict[str, Any] = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
    options = {"moe_lora_b_layout": "grouped_by_expert"}
    added = merge(tmp_path, fused_experts(), QWEN, pair, options, **fields)
    close(added[DOWN], stacked_delta(pair, is_grouped=True))
    assert not added[GATE_UP].any()


def test_pairs_without_target_parameters_go_where_they_fit(tmp_path: Path) -> None:
    gate_up, down = both_pairs()
    added = merge(tmp_path, fused_experts(), QWEN, gate_up | down)
    close(added[GATE_UP], stacked_delta(gate_up))
    close(added[DOWN], stacked_delta(down))


def test_of_two_parameters_that_fit_the_first_registered_is_the_innermost(tmp_path: Path) -> None:
    base = {
        f"{MODULE}.down_proj": random_tensor((EXPERTS, OUTER, INNER), torch.float32),
        f"{MODULE}.up_proj": random_tensor((EXPERTS, INNER, OUTER), torch.float32),
    }
    inner, outer = stacked_pair(INNER, OUTER, depth=1), stacked_pair(OUTER, INNER)
    fields: dict[str, Any] = {"target_parameters": ["experts.down_proj", "experts.up_proj"], "peft_version": "0.21.2"}
    added = merge(tmp_path, base, {"model_type": "own"}, inner | outer, **fields)
    close(added[f"{MODULE}.up_proj"], stacked_delta(inner))
    close(added[f"{MODULE}.down_proj"], stacked_delta(outer))


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("disk", ["plain", "transposed", "interleaved"])
def test_a_single_expert_is_a_part_of_the_fused_tensor(tmp_path: Path, disk: str, leaf: str) -> None:
    rows, columns = (OUTER, INNER) if leaf == "down_proj" else (INNER, OUTER)
    pair = lora_pair(f"{MODULE}.1.{leaf}", rows, columns)
    config = {"plain": QWEN, "transposed": LLAMA4, "interleaved": GPT_OSS}[disk]
    added = merge(tmp_path, fused_experts(is_transposed=disk != "plain"), config, pair)
    name, delta = (DOWN if leaf == "down_proj" else GATE_UP), single_delta(pair)
    stored = added[name][1] if disk == "plain" else added[name][1].T
    half = 0 if leaf == "gate_proj" else 1
    if leaf == "down_proj":
        part, rest = stored, stored[:0]
    elif disk == "interleaved":
        part, rest = stored[half::2], stored[1 - half :: 2]
    else:
        part, rest = stored.chunk(2)[half], stored.chunk(2)[1 - half]
    close(part, delta)
    assert not rest.any()
    assert not any(other.any() for other in (added[name][0], added[name][2]))


@pytest.mark.parametrize(("config", "is_transposed"), [(QWEN, False), (LLAMA4, True)])
def test_a_square_expert_lies_as_its_family_stores_it(tmp_path: Path, config: Any, is_transposed: bool) -> None:
    pair = lora_pair(f"{MODULE}.1.down_proj", 8, 8)
    added = merge(tmp_path, {DOWN: random_tensor((2, 8, 8), torch.float32)}, config, pair)
    delta = single_delta(pair)
    close(added[DOWN][1], delta.T if is_transposed else delta)


@pytest.mark.parametrize(
    ("version", "is_transposed"),
    [("0.18.1", True), ("0.19.0", True), ("0.19.1", False), ("0.21.2", False), ("0.22.0.dev0", False)],
)
def test_peft_version_tells_how_square_experts_lie(tmp_path: Path, version: str, is_transposed: bool) -> None:
    pair = stacked_pair(8, 8)
    fields: dict[str, Any] = {"target_parameters": ["experts.down_proj"], "peft_version": version}
    base = {DOWN: random_tensor((EXPERTS, 8, 8), torch.float32)}
    delta = stacked_delta(pair)
    close(merge(tmp_path, base, QWEN, pair, **fields)[DOWN], delta.transpose(1, 2) if is_transposed else delta)


@pytest.mark.parametrize("version", ["", "0.19.0.dev0", "0.18.2.dev0"])
def test_square_experts_of_an_unknown_version_are_refused(tmp_path: Path, version: str) -> None:
    fields: dict[str, Any] = {"target_parameters": ["experts.down_proj"], "peft_version": version}
    base = {DOWN: random_tensor((EXPERTS, 8, 8), torch.float32)}
    says = r"orientation of the experts' square matrices(.|\n)*state the one that trained it"
    refuse(tmp_path, says, write(tmp_path, base, QWEN, stacked_pair(8, 8), **fields))


@pytest.mark.parametrize("is_fused", [False, True])
def test_the_one_expert_of_a_layer_takes_a_plain_pair(tmp_path: Path, is_fused: bool) -> None:
    name = DOWN if is_fused else f"{MODULE}.0.down_proj.weight"
    base = {name: random_tensor((1, OUTER, INNER) if is_fused else (OUTER, INNER), torch.float32)}
    pair = stacked_pair(OUTER, INNER, experts=1)
    added = merge(tmp_path, base, QWEN, pair, target_parameters=["experts.down_proj"], peft_version="0.21.2")
    close(added[name].view(OUTER, INNER), single_delta(pair))


def test_a_pair_may_name_a_linear_module_s_parameter(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    pair = lora_pair(name.removesuffix(".weight"), 12, 8)
    base = {name: random_tensor((12, 8), torch.float32)}
    added = merge(tmp_path, base, QWEN, pair, target_parameters=["q_proj.weight"], peft_version="0.21.2")
    close(added[name], single_delta(pair))


REFUSED: dict[str, tuple[Tensors, str]] = {
    "another size": (stacked_pair(OUTER, INNER + 1), r"lora_A\.weight'.*that these pairs fit, found pairs of"),
    "more pairs than parameters": (
        stacked_pair(OUTER, INNER, depth=1) | stacked_pair(OUTER, INNER),
        r"expected 2 of the parameters \{'down_proj'",
    ),
    "a factor of three dimensions": (
        {name: tensor[None] for name, tensor in stacked_pair(OUTER, INNER).items()},
        r"that these pairs fit, found pairs of",
    ),
    "a bias": (
        stacked_pair(OUTER, INNER) | {f"{PREFIX}{MODULE}.lora_B.bias": torch.ones(OUTER)},
        r"lora_B\.bias': expected no bias on a bare parameter",
    ),
    "other experts": (
        stacked_pair(OUTER, INNER, experts=4),
        r"lora_A\.weight': expected rows for each of the base's 3 experts, found 16 rows",
    ),
    "ranks of A and B": (
        stacked_pair(OUTER, INNER) | {f"{PREFIX}{MODULE}.lora_B.weight": torch.ones(OUTER, RANK)},
        r"lora_B\.weight': expected 12 columns like lora_a's rows, found 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pairs_that_do_not_fit_the_experts_are_refused(tmp_path: Path, name: str) -> None:
    tensors, says = REFUSED[name]
    fields: dict[str, Any] = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2", "lora_bias": True}
    refuse(tmp_path, says, write(tmp_path, fused_experts(), QWEN, tensors, **fields))


def test_an_expert_that_the_fused_tensor_lacks_is_refused(tmp_path: Path) -> None:
    pair = lora_pair(f"{MODULE}.{EXPERTS}.down_proj", OUTER, INNER)
    says = rf"a base tensor '{MODULE}\.{EXPERTS}\.down_proj\.weight' for this pair, found none"
    refuse(tmp_path, says, write(tmp_path, fused_experts(), QWEN, pair))


@pytest.mark.parametrize("is_unlike", [False, True])
def test_a_fused_pair_on_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path, is_unlike: bool) -> None:
    base = single_experts()
    name = f"{MODULE}.1.up_proj.weight"
    base = base | {name: torch.ones(INNER, OUTER + 1)} if is_unlike else {key: base[key] for key in base if key != name}
    pair = stacked_pair(2 * INNER, OUTER)
    fields: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.21.2"}
    refuse(tmp_path, r"experts\.lora_A\.weight': expected", write(tmp_path, base, QWEN, pair, **fields))
