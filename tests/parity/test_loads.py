"""transformers loads the merged checkpoint whole, and it computes what PEFT's merged model computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

#: Name: auto class, config, fields of the adapter.
CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "llama": (tiny.CAUSAL, tiny.llama, {"target_modules": [*ATTENTION, "down_proj"]}),
    "llama-embeddings": (tiny.CAUSAL, tiny.llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama-saved": (tiny.CAUSAL, tiny.llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama-tied": (tiny.CAUSAL, lambda: tiny.llama(tie_word_embeddings=True), {"target_modules": ATTENTION}),
    "gpt2": (tiny.CAUSAL, tiny.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "opt": (tiny.CAUSAL, tiny.opt, {"target_modules": [*ATTENTION[:3], "out_proj", "fc1"]}),
    "bert": ("AutoModel", tiny.bert, {"target_modules": ["query", "dense", "word_embeddings"]}),
    "resnet": (
        "AutoModelForImageClassification",
        tiny.resnet,
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    ),
}


def outputs(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Return all tensors that the model computes for one fixed input."""
    # the copy's weights are aligned alike, wherever they came from; kernels may differ with alignment
    model = copy.deepcopy(model).eval()
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(10)
    images = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
    tokens = {"input_ids": torch.arange(3, 3 + 2 * 9).reshape(2, 9)}
    config: Any = model.config
    with torch.no_grad():
        found = model(**(images if config.model_type == "resnet" else tokens), output_hidden_states=True)
    kept = (found[0], *found.hidden_states)
    assert all(torch.isfinite(tensor).all() for tensor in kept)
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_merged_checkpoint_loads_whole_and_computes_what_pefts_merge_computes(
    tmp_path: Path, case: str, dtype: str
) -> None:
    auto, config, lora = CASES[case]
    base = oracle.save_base(tmp_path / "base", auto, config(), DTYPES[dtype])
    load = oracle.pretrained(base, auto)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    auto_class = getattr(transformers, auto)
    model, info = auto_class.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    expected = outputs(oracle.merged_model(load, adapter))
    assert all(map(torch.equal, outputs(model), expected))
    assert not torch.equal(outputs(load())[0], expected[0])


def test_untied_checkpoint_loads_whole(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.gpt2(), torch.float32)
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["wte"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    auto_class = getattr(transformers, tiny.CAUSAL)
    model, info = auto_class.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
