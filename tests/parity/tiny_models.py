"""Tiny configs of transformers' model families, and plain modules that have no config at all."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.parity.peft_oracle import Loader

transformers = pytest.importorskip("transformers")

CAUSAL = "AutoModelForCausalLM"
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**fields: Any) -> Any:
    """Square q_proj and o_proj; k_proj and v_proj narrower, as grouped queries make them."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaConfig(**{**sizes, **heads, **_TOKENS, "tie_word_embeddings": False, **fields})


def tall_llama() -> Any:
    """One layer whose MLP weights are so large that they are computed in several tiles."""
    return llama(hidden_size=320, intermediate_size=1024, num_hidden_layers=1)


def gpt2(**fields: Any) -> Any:
    """Conv1D weights; c_proj and q_attn are square."""
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return transformers.GPT2Config(**{**sizes, **_TOKENS, **fields})


def bert(**fields: Any) -> Any:
    """Square attention weights, in nn.Linear's layout."""
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertConfig(**{**sizes, "intermediate_size": 80, "max_position_embeddings": 32, **fields})


def bert_to_gpt2() -> Any:
    """Layouts of both kinds in one model, with all squares the same size."""
    encoder, decoder = bert(num_hidden_layers=1), gpt2(n_layer=1, add_cross_attention=True, is_decoder=True)
    decoder.tie_word_embeddings = False
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.tie_word_embeddings = False
    return config


def resnet() -> Any:
    """Convolutions of 7x7, 3x3 and 1x1, norms with integer buffers."""
    return transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=3
    )


def tall_gpt2() -> Any:
    """The same in Conv1D's layout."""
    return gpt2(n_embd=320, n_layer=1)


def clip() -> Any:
    """Nested configs, each with a dtype of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def opt() -> Any:
    """Tied by default, with learned positions that lie at an offset."""
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.OPTConfig(
        **sizes, **_TOKENS, ffn_dim=80, word_embed_proj_dim=48, max_position_embeddings=32, dropout=0.0
    )


def bloom() -> Any:
    """Tied by default, with an input embedding called word_embeddings."""
    return transformers.BloomConfig(vocab_size=96, hidden_size=48, n_layer=1, n_head=4, **_TOKENS)


def t5() -> Any:
    """One embedding for encoder, decoder and output."""
    return transformers.T5Config(
        vocab_size=96, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4, decoder_start_token_id=0
    )


def plain(**modules: nn.Module) -> nn.Module:
    """Return a module without config; its children keep the names given."""
    return nn.Sequential(OrderedDict(modules))


def conv1d(inputs: int, outputs: int) -> nn.Module:
    """Return transformers' Conv1D, a linear layer with its weight stored (in, out)."""
    module = transformers.pytorch_utils.Conv1D(outputs, inputs)
    assert isinstance(module, nn.Module)
    return module


def save_plain(build: Loader, path: Path, dtype: torch.dtype) -> Path:
    """Save the module's weights as one file without config or index."""
    torch.manual_seed(4)
    save_file(build().to(dtype).state_dict(), path, metadata={"format": "pt"})
    return path


def load_plain(build: Loader, path: Path) -> Loader:
    """Return a function that makes the module and loads its weights, in the file's float dtype."""

    def load() -> nn.Module:
        module, tensors = build(), load_file(path)
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        module.to(dtype).load_state_dict(tensors)
        return module

    return load
