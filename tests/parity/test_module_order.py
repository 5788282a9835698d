"""The recorded order of layers against the classes of the installed transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rawmerge.formats.model_config import parse_model_config
from rawmerge.matching.module_order import registration_order
from tests.parity import tiny_models as tiny

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LAYERS = (torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
CASES = {
    "llama": (transformers.AutoModelForCausalLM, tiny.llama(num_hidden_layers=12)),
    "bare llama": (transformers.AutoModel, tiny.llama()),
    "gpt2": (transformers.AutoModelForCausalLM, tiny.gpt2(n_layer=11)),
    "bert": (transformers.AutoModelForSequenceClassification, tiny.bert()),
    "t5": (transformers.AutoModelForSeq2SeqLM, tiny.t5()),
    "opt": (transformers.AutoModelForCausalLM, tiny.opt()),
    "bloom": (transformers.AutoModelForCausalLM, tiny.bloom()),
    "clip": (transformers.AutoModel, tiny.clip()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_order_is_transformers_s(name: str) -> None:
    auto, config = CASES[name]
    with torch.device("meta"):
        model: Any = auto.from_config(config)
    expected = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    shuffled = random.Random(1).sample(expected, len(expected))
    assert registration_order(parse_model_config(config.to_json_string().encode(), "config"), shuffled) == expected
