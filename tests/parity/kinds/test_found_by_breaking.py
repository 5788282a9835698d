"""Cases in which a merge once went wrong without a word: adapters of another base, ties, damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

#: Kinds of which no tensor shows both sides of a weight, and plain LoRA.
CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "LORA": lambda targets: peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets),
    "VERA": lambda targets: peft.VeraConfig(r=3, target_modules=targets),
}


def tied_llama() -> Any:
    return tiny.llama(tie_word_embeddings=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_that_only_a_transposed_weight_would_fit_are_refused(tmp_path: Path, kind: str) -> None:
    """A base with grouped queries in place of the one with as many keys as queries, down in place of gate."""

    def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        marks = {"gate_proj": "down_proj", "down_proj": "gate_proj"}
        return {
            next((name.replace(old, new) for old, new in marks.items() if old in name), name): tensor
            for name, tensor in tensors.items()
        }

    case = kinds.Case(lambda: CONFIGS[kind](["gate_proj", "down_proj"]), edit=swapped)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match="only its transpose fits"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("model", [tied_llama, tiny.gpt2], ids=["llama", "gpt2"])
def test_token_rows_beside_stored_copies_of_both_sides_of_a_tie(tmp_path: Path, model: Callable[[], Any]) -> None:
    """PEFT stores both sides after a resize; the trained rows are both sides' and the tie stays."""
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, model(), torch.float32)
    load = oracle.pretrained(base, tiny.CAUSAL)
    wrapped = peft.get_peft_model(load(), peft.TrainableTokensConfig(token_indices=[3, 7, 9]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    trained = wrapped.eval()
    rawmerge.merge_adapter(base, tmp_path / "adapter", tmp_path / "ours")
    ours = oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL)
    tokens = torch.tensor([[3, 5, 7, 9, 11]])
    with torch.no_grad():
        expected, found, before = (one(tokens).logits for one in (trained, ours, load()))
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changed_a_tied_embedding_is_refused(tmp_path: Path, init: str) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=init)
    case = kinds.Case(lambda: config, model=tied_llama)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match="changed the embedding that is tied"):
        rawmerge.plan_merge(base, adapter)


def test_shared_tensors_must_be_floats(tmp_path: Path) -> None:
    def cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(torch.complex64) if "vera_A" in name else tensor for name, tensor in tensors.items()}

    case = kinds.Case(lambda: CONFIGS["VERA"](["q_proj"]), edit=cast)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match="vera_A': expected a plain float dtype"):
        rawmerge.plan_merge(base, adapter)


def test_a_lost_bias_of_a_pair_is_refused(tmp_path: Path) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "0.fc1.lora_B.bias" not in name}

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1", "fc2"], lora_bias=True)
    case = kinds.Case(lambda: config, model=tiny.opt, edit=without)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=r"0\.fc1\.lora_A\.weight': expected its bias lora_B\.bias"):
        rawmerge.plan_merge(base, adapter)


def test_a_base_that_cannot_be_decomposed_fails_by_name(tmp_path: Path) -> None:
    case = kinds.Case(lambda: peft.OSFConfig(target_modules=["q_proj"], effective_rank=20))
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in (name for name in tensors if "0.self_attn.q_proj" in name):
            tensors[name][0, 0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(rawmerge.MergeError, match=r"0\.self_attn\.q_proj\.weight': expected a decomposition"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
