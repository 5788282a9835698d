"""The JSON files of a synthetic checkpoint and adapter, as transformers and PEFT write them."""

from __future__ import annotations

from typing import Final

from benchmarks.recipe import Recipe
from benchmarks.shapes import CheckpointShape

#: Standard deviation of the base's weights, as an untrained Llama has it.
WEIGHT_STD: Final = 0.02


def llama_config(shape: CheckpointShape, dtype: str) -> dict[str, object]:
    """Return a config.json from which transformers builds the model, its weights in `dtype`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def tokenizer() -> dict[str, object]:
    """Return a tokenizer.json of three words: a side file to carry along, not one to use."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2}, "unk_token": "<unk>"},
    }


def adapter_config(recipe: Recipe) -> dict[str, object]:
    """Return the adapter_config.json of a plain LoRA."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": f"synthetic/{recipe.shape.name}",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "rank_pattern": {},
        "target_modules": sorted({path.rpartition(".")[2] for path, _ in recipe.target_modules()}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
