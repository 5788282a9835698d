"""Fused experts, trained tokens and trained biases: PEFT's own layers merge, and the engine gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rawmerge.merge_plan import Update, UpdateTensor
from rawmerge.methods.expert_lora import ExpertLoraMethod
from rawmerge.methods.interface import ModuleFacts
from rawmerge.methods.lora import LoraMethod
from rawmerge.methods.lora_bias import LoraBiasMethod
from rawmerge.methods.token_rows import TokenRowsMethod
from rawmerge.window import Window
from tests.builders import random_tensor, raw
from tests.step_runs import Workbench

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning:peft"),
]
ALPHA = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # experts, rank, d1, d2
    (3, 4, 24, 10),
    (4, 4, 24, 12),  # rank as many as experts
    (2, 3, 40, 20),  # d1 twice d2
    (5, 8, 21, 27),
    (3, 2, 5, 7),  # so low that torch takes a kernel of its own
    (2, 1, 3, 1),
    (5, 64, 33, 130),
    (2, 16, 600, 700),  # several blocks
    (3, 8, 16, 16),
    (2, 16, 300, 300),
]


class Experts(nn.Module):
    """A module of one bare parameter, as transformers' experts are."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, is_transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_tensor(shape, dtype), requires_grad=False)
        self.is_transposed = is_transposed


def wrapped_experts(shape: Sequence[int], dtype: torch.dtype, rank: int, is_transposed: bool = False) -> Any:
    """Return PEFT's wrapper of such a parameter, with a random pair."""
    model = nn.Module()
    model.experts = Experts(shape, dtype, is_transposed)
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_parameters=["experts.weight"], target_modules=[])
    layer = peft.get_peft_model(model, config).base_model.model.experts
    generator = torch.Generator().manual_seed(sum(shape))
    for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.3 + 0.02)
    return layer


def pair_of(layer: Any) -> dict[str, torch.Tensor]:
    factors = {"lora_a": layer.lora_A["default"], "lora_b": layer.lora_B["default"]}
    return {role: factor.weight.data.clone() for role, factor in factors.items()}


def settings_of(shape: Any, pair: dict[str, torch.Tensor], rank: int, is_transposed: bool = False) -> dict[str, Any]:
    facts = ModuleFacts(tuple(shape), rank, ALPHA / rank, is_transposed, rounds_delta=True)
    method = ExpertLoraMethod() if len(shape) == 3 else LoraMethod()
    return dict(method.settings({role: tuple(tensor.shape) for role, tensor in pair.items()}, facts))


def merged_parameter(layer: Any) -> torch.Tensor:
    layer.merge()
    merged = layer.get_param()
    assert isinstance(merged, torch.Tensor)
    return merged.data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "is_transposed"), [*product(SHAPES, (False, True)), ((1, 4, 6, 10), False)], ids=str)
def test_all_experts_in_one_tensor(
    tmp_path: Path, shape: tuple[int, ...], is_transposed: bool, dtype: torch.dtype
) -> None:
    experts, rank, height, width = shape
    layer = wrapped_experts((experts, height, width), dtype, rank, is_transposed)
    pair, bench = pair_of(layer), Workbench(tmp_path)
    before = layer.get_param().data.clone()
    settings = settings_of(before.shape, pair, rank, is_transposed)
    assert settings["is_transposed"] is is_transposed
    cuts = tuple(range(height, experts * height, height))
    step = bench.step(before, [bench.update("expert_lora", pair, settings)], columns=width, cuts=cuts)
    merged = merged_parameter(layer)
    assert raw(merged) != raw(before)
    for threads, tile_elements in product((1, 3), (64, 2**20)):
        assert raw(bench.run_one(step, threads=threads, tile_elements=tile_elements)) == raw(merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_for_each_half_of_each_expert(
    tmp_path: Path, shape: tuple[int, ...], is_transposed: bool, dtype: torch.dtype
) -> None:
    experts, rank, height, width = shape
    layer = wrapped_experts((experts, height, width), dtype, rank, is_transposed)
    pair, bench = pair_of(layer), Workbench(tmp_path)
    before = layer.get_param().data.clone()
    settings = settings_of(before.shape, pair, rank, is_transposed)
    lora_a, lora_b = (bench.store(pair[role]) for role in ("lora_a", "lora_b"))
    half = height // 2
    steps: list[UpdateTensor] = []
    for expert, (start, stop) in product(range(experts), ((0, half), (half, height))):
        tensors = {"lora_a": lora_a.rows(expert * rank, rank), "lora_b": lora_b}
        window = Window(0, stop - start, start)
        update = Update("expert_lora", tensors, {**settings, "expert": expert}, window)
        steps.append(bench.step(before[expert, start:stop], [update]))
    merged = merged_parameter(layer)
    written = bench.run(steps, threads=2)
    halves = [merged[expert, rows] for expert in range(experts) for rows in (slice(0, half), slice(half, height))]
    assert [raw(written[f"{number}"]) for number in range(len(steps))] == [raw(part) for part in halves]


def test_a_lora_b_grouped_by_expert_is_the_same_adapter_with_other_columns(tmp_path: Path) -> None:
    experts, rank, height, width = 3, 4, 24, 10
    layer = wrapped_experts((experts, height, width), torch.bfloat16, rank)
    pair, bench = pair_of(layer), Workbench(tmp_path)
    settings = settings_of((experts, height, width), pair, rank)
    columns = [rank_ * experts + expert for expert in range(experts) for rank_ in range(rank)]
    grouped = {"lora_a": pair["lora_a"], "lora_b": pair["lora_b"][:, columns].contiguous()}
    update = bench.update("expert_lora", grouped, {**settings, "grouped_by_expert": True})
    step = bench.step(layer.get_param().data.clone(), [update], columns=width, cuts=(24, 48))
    assert raw(bench.run_one(step)) == raw(merged_parameter(layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 10), (300, 1200)], ids=str)
def test_a_bare_matrix_takes_a_plain_pair_with_a_rounded_delta(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = wrapped_experts(shape, dtype, 4)
    pair, bench = pair_of(layer), Workbench(tmp_path)
    settings = settings_of(shape, pair, 4)
    step = bench.step(layer.get_param().data.clone(), [bench.update("lora", pair, settings)])
    assert settings["rounds_delta"] is True
    assert raw(bench.run_one(step)) == raw(merged_parameter(layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trained_tokens(tmp_path: Path, dtype: torch.dtype) -> None:
    indices = (17, 3, 99, 0, 64)
    model = nn.Sequential(nn.Embedding(100, 6, dtype=dtype), nn.Linear(6, 5, dtype=dtype))
    config = peft.LoraConfig(target_modules=["1"], trainable_token_indices={"0": list(indices)})
    layer = peft.get_peft_model(model, config).base_model.model[0].token_adapter
    rows = random_tensor((5, 6), torch.float32) + 1
    layer.trainable_tokens_delta["default"].data = rows.clone()
    bench = Workbench(tmp_path)
    settings = TokenRowsMethod().settings({"rows": (5, 6)}, ModuleFacts((100, 6), 8, 1.0, None, False, indices))
    step = bench.step(layer.base_layer.weight.data.clone(), [bench.update("token_rows", {"rows": rows}, settings)])
    layer.merge()
    for tile_elements in (1, 2**20):
        assert raw(bench.run_one(step, tile_elements=tile_elements)) == raw(layer.base_layer.weight.data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_trained_biases(tmp_path: Path, kind: type[nn.Module], dtype: torch.dtype) -> None:
    sizes = (8, 700) if kind is nn.Linear else (8, 700, 3)
    model = nn.Sequential(kind(*sizes)).to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=ALPHA, lora_bias=True, target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    bias = random_tensor((700,), torch.float32) * 7
    layer.lora_B["default"].bias.data.copy_(bias)
    bench = Workbench(tmp_path)
    stored = layer.lora_B["default"].bias.data.clone()
    settings = LoraBiasMethod().settings({"lora_b_bias": (700,)}, ModuleFacts((700,), 3, ALPHA / 3, None))
    update = bench.update("lora_bias", {"lora_b_bias": stored}, settings)
    step = bench.step(layer.base_layer.bias.data.clone(), [update])
    layer.merge()
    assert raw(bench.run_one(step)) == raw(layer.base_layer.bias.data)
