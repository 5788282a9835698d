"""What must not be merged silently: one region changed twice, plain arithmetic on packed dtypes, a bias gone astray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import PREFIX, lora_pair, random_tensor, raw, read_all, write_adapter, write_base

E, N, H, R = 2, 6, 8, 4
EXPERTS = "model.layers.0.mlp.experts"
QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
LLAMA = {"model_type": "llama"}
Tensors = dict[str, torch.Tensor]


def experts(dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {"gate_proj": (N, H), "up_proj": (N, H), "down_proj": (H, N)}
    return {
        f"{EXPERTS}.{expert}.{leaf}.weight": torch.ones(shape).to(dtype)
        for expert in range(E)
        for leaf, shape in shapes.items()
    }


def stacked(path: str = EXPERTS, rows: int = 2 * N, columns: int = H) -> Tensors:
    return {
        f"{PREFIX}{path}.lora_A.weight": random_tensor((E * R, columns), torch.float32),
        f"{PREFIX}{path}.lora_B.weight": random_tensor((rows, R * E), torch.float32),
    }


def with_prefix(tensors: Tensors) -> Tensors:
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


GATE_UP: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj"], "peft_version": "0.21.2"}
NORM = {"model.norm.weight": torch.ones(8), "model.q.weight": torch.ones(12, 8)}
EMBEDDED = {"model.embed_tokens.weight": torch.zeros(20, 8, dtype=torch.int8)}
ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
TOWERS = {
    "language_model.layers.0.q.weight": torch.ones(12, 8),
    "vision.layers.0.q.weight": torch.ones(12, 6),
    "vision.layers.0.q.bias": torch.ones(12),
}
UP_DOWN = {f"{EXPERTS}.up_proj": torch.ones(E, N, H), f"{EXPERTS}.down_proj": torch.ones(E, H, N)}

REFUSED: dict[str, tuple[Tensors, Any, Tensors, dict[str, Any], str]] = {
    "experts of eight bits": (
        experts(torch.float8_e4m3fn),
        QWEN,
        stacked(),
        GATE_UP,
        "plain float dtype .*found F8_E4M3",
    ),
    "rows of integers": (
        EMBEDDED,
        LLAMA,
        with_prefix({ROWS: torch.ones(1, 8)}),
        {"trainable_token_indices": [1]},
        "dtype .*found I8",
    ),
    "a bias of integers": (
        {"m.q.weight": torch.ones(12, 8), "m.q.bias": torch.zeros(12, dtype=torch.int8)},
        LLAMA,
        lora_pair("m.q", 12, 8) | with_prefix({"m.q.lora_B.bias": torch.ones(12)}),
        {"lora_bias": True},
        "dtype .*found I8",
    ),
    "experts under two names": (
        experts(),
        QWEN,
        stacked() | stacked(EXPERTS.removeprefix("model.")),
        GATE_UP,
        "one module under two names",
    ),
    "fused and single experts": (
        experts(),
        QWEN,
        stacked() | lora_pair(f"{EXPERTS}.0.gate_proj", N, H),
        GATE_UP,
        r"one pair for .*0\.gate_proj\.weight', found another",
    ),
    "two tensors for one": (
        NORM,
        LLAMA,
        with_prefix({"model.norm.weight": torch.zeros(8), "norm.weight": torch.ones(8)}),
        {"modules_to_save": ["norm"]},
        r"one tensor to replace 'model\.norm\.weight', found another one, of other values",
    ),
    "a copy that is none": (
        NORM,
        LLAMA,
        with_prefix({"model.norm.weight": torch.zeros(8), "model.norm.modules_to_save.default.weight": torch.ones(8)}),
        {"modules_to_save": ["norm"]},
        r"expected the values of .*norm\.weight', which replaces the same tensor",
    ),
    "a bias of another tower": (
        TOWERS,
        {"model_type": "own"},
        lora_pair("layers.0.q", 12, 8) | with_prefix({"layers.0.q.lora_B.bias": torch.ones(12)}),
        {"lora_bias": True},
        r"'layers\.0\.q\.bias' that this bias is added to, found none",
    ),
    "one pair for two parameters": (
        UP_DOWN,
        {"model_type": "own"},
        stacked(rows=N),
        {"target_parameters": ["experts.up_proj", "experts.down_proj"], "peft_version": "0.21.2"},
        "a pair for each of the 2 parameters that target_parameters names: up_proj, down_proj, found 1",
    ),
    "experts of which one is missing": (
        {name: tensor for name, tensor in experts().items() if "1.up_proj" not in name},
        QWEN,
        stacked(),
        GATE_UP,
        r"found 3 of 4 tensors of its 2 experts(.|\n)*incomplete",
    ),
    "whole experts that the disk holds in parts": (
        experts(),
        QWEN,
        with_prefix({f"{EXPERTS}.down_proj": torch.ones(E, H, N)}),
        {"modules_to_save": ["experts"]},
        r"one whole base tensor for .* that it replaces, found it in parts: .*0\.down_proj\.weight'",
    ),
    "a saved tensor of the wrong shape": (
        NORM,
        LLAMA,
        with_prefix({"model.norm.weight": torch.ones(16)}),
        {"modules_to_save": ["norm"]},
        r"expected the base's shape \[8\], found \[16\]",
    ),
    "two buffers to add in one place": (
        NORM,
        LLAMA,
        with_prefix({"model.norm.mean": torch.ones(8), "norm.mean": torch.zeros(8)}),
        {"modules_to_save": ["norm"]},
        "expected one tensor to add as 'model.norm.mean', found another one",
    ),
    "a saved tensor of a layer that the base lacks": (
        NORM,
        LLAMA,
        with_prefix({"model.layers.5.norm.weight": torch.ones(8)}),
        {"modules_to_save": ["norm"]},
        r"'model\.layers\.5\.norm\.weight' that it replaces, found none",
    ),
    "a saved head under another path": (
        NORM | {"lm_head.weight": torch.ones(20, 8)},
        LLAMA,
        with_prefix({"other.lm_head.weight": torch.ones(20, 8)}),
        {"modules_to_save": ["lm_head"]},
        r"'other\.lm_head\.weight' that it replaces, found none",
    ),
    "a fused pair and one expert's on the same rows": (
        {f"{EXPERTS}.gate_up_proj": torch.ones(E, 2 * N, H)},
        QWEN,
        stacked() | lora_pair(f"{EXPERTS}.1.up_proj", N, H),
        GATE_UP,
        "expected one pair for .*gate_up_proj', found another",
    ),
    "a pair of two that target_parameters names": (
        {f"{EXPERTS}.gate_up_proj": torch.ones(E, 2 * N, H), f"{EXPERTS}.down_proj": torch.ones(E, H, N)},
        QWEN,
        stacked(rows=H, columns=N),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "peft_version": "0.21.2"},
        "a pair for each of the 2 parameters that target_parameters names",
    ),
    "wrappers that nest with a gap": (
        {f"{EXPERTS}.gate_up_proj": torch.ones(E, 2 * N, H), f"{EXPERTS}.down_proj": torch.ones(E, H, N)},
        QWEN,
        stacked(rows=H, columns=N) | stacked(f"{EXPERTS}.base_layer.base_layer"),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "peft_version": "0.21.2"},
        r"wrappers nest without gaps, found \[0, 2\]",
    ),
    "packed experts": (
        {f"{EXPERTS}.gate_up_proj_blocks": torch.ones(E, 2 * N, 1, 4, dtype=torch.uint8)},
        {"model_type": "gpt_oss"},
        stacked(),
        GATE_UP,
        r"found packed weights, '.*gate_up_proj_blocks'(.|\n)*unquantised",
    ),
    "an embedding that grows beside a head that does not": (
        {"model.embed_tokens.weight": torch.ones(20, 8), "lm_head.weight": torch.ones(20, 8)},
        LLAMA,
        with_prefix({"model.embed_tokens.weight": torch.ones(24, 8), "lm_head.weight": torch.ones(20, 8)}),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        r"'lm_head\.weight': expected one for each of the 24 tokens",
    ),
    "a head whose weight and bias differ in rows": (
        {"classifier.weight": torch.ones(3, 8), "classifier.bias": torch.ones(3)},
        {"model_type": "bert"},
        with_prefix({"classifier.weight": torch.ones(5, 8)}),
        {"modules_to_save": ["classifier"]},
        "expected 5 rows and as many biases in 'classifier', found 3 biases",
    ),
    "token rows of integers": (
        {"model.embed_tokens.weight": torch.ones(20, 8), "lm_head.weight": torch.ones(20, 8)},
        LLAMA,
        with_prefix({ROWS: torch.ones(1, 8, dtype=torch.int64)}),
        {"trainable_token_indices": [3]},
        "plain float dtype .*found I64",
    ),
    "a stored embedding that may be tied to an unknown head": (
        {"backbone.embeddings.weight": torch.ones(20, 8)},
        {"model_type": "own", "architectures": ["OwnForCausalLM"], "tie_word_embeddings": True},
        with_prefix({"backbone.embeddings.weight": torch.zeros(20, 8)}),
        {"modules_to_save": ["embeddings"]},
        "tied embeddings in OwnForCausalLM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_astray_is_refused(tmp_path: Path, name: str) -> None:
    base, config, tensors, fields, says = REFUSED[name]
    paths = write_base(tmp_path / "base", [base], config), write_adapter(tmp_path / "adapter", tensors, **fields)
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_bias_that_equals_another_by_chance_is_added(tmp_path: Path) -> None:
    base = {"model.q.weight": torch.ones(8, 8), "model.q.bias": torch.ones(8)}
    stored = {"model.q.bias": torch.zeros(8), "score.weight": torch.ones(8, 8), "score.bias": torch.zeros(8)}
    paths = (
        write_base(tmp_path / "base", [base], LLAMA),
        write_adapter(tmp_path / "adapter", with_prefix(stored), modules_to_save=["score"], bias="all"),
    )
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    assert raw(read_all(tmp_path / "out")["score.bias"]) == raw(torch.zeros(8))


def test_the_same_tensor_under_two_names_replaces_once(tmp_path: Path) -> None:
    stored = {"model.norm.weight": torch.zeros(8), "norm.weight": torch.zeros(8)}
    base = write_base(tmp_path / "base", [NORM], LLAMA)
    adapter = write_adapter(tmp_path / "adapter", with_prefix(stored), modules_to_save=["norm"])
    assert {use.use for use in rawmerge.plan_merge(base, adapter).adapter_uses} == {"replaces", "ignored"}


def test_an_attention_s_out_proj_is_no_head(tmp_path: Path) -> None:
    stored = {"pooler.self_attn.out_proj.weight": torch.ones(16, 16)}
    base = write_base(tmp_path / "base", [NORM], LLAMA)
    adapter = write_adapter(tmp_path / "adapter", with_prefix(stored), modules_to_save=["pooler"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LLAMA


@pytest.mark.parametrize("name", ["a.experts.{}.w1.weight", "model.layers.{}.q.weight"])
def test_a_number_of_thousands_of_digits_is_a_name_like_any_other(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", [NORM | {name.format("9" * 4000): torch.ones(8, 8)}], LLAMA)
    adapter = write_adapter(tmp_path / "adapter", lora_pair("model.q", 12, 8))
    assert rawmerge.plan_merge(base, adapter).adapter_uses
