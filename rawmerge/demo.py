"""A small base and adapter, made offline; merged; and checked by maths that share no code with the merge.

The base is a sharded bfloat16 checkpoint with the names and shapes of a small Llama. The check reads the files with
the safetensors library and computes whole tensors in float64 with numpy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np

from rawmerge.api import merge_adapter
from rawmerge.errors import OutputError, Problem, VerificationError

_HIDDEN: Final = 256
_KEY_VALUE: Final = 128
_INTERMEDIATE: Final = 704
_VOCABULARY: Final = 1000
_LAYERS: Final = 4
_RANK: Final = 8
_ALPHA: Final = 20
_SHARDS: Final = 3
_LINEARS: Final = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_KEY_VALUE, _HIDDEN),
    "self_attn.v_proj": (_KEY_VALUE, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
}


def run_demo(directory: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Make, merge and verify; return paths and counts.

    Args:
        directory: where to put `base`, `adapter` and `merged`; must not exist.
        tell: called with each line for people.

    Raises:
        OutputError: `directory` exists or cannot be made.
        VerificationError: the merged checkpoint is not what the independent computation says.
    """
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        hint = "remove it, or name another"
        found = "one that is there already" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise OutputError(Problem(str(directory), "a directory to make", found, hint)) from error
    base, adapter, merged = directory / "base", directory / "adapter", directory / "merged"
    randomness = np.random.default_rng(7)
    _write_base(base, randomness)
    tell(f"made     {base}: {_SHARDS} bfloat16 shards")
    _write_adapter(adapter, randomness)
    tell(f"made     {adapter}: LoRA of rank {_RANK}, alpha {_ALPHA}, on {len(_LINEARS) * _LAYERS} linear layers")
    summary = merge_adapter(base, adapter, merged)
    tell(f"merged   {merged}: {summary.counts['updated']} tensors updated, {summary.counts['kept']} kept")
    verified = _verify(base, adapter, merged)
    tell(f"verified {verified['updated']} updated tensors: {verified['elements']} elements, each the float64 result")
    tell(
        f"         rounded to bfloat16 (largest distance {verified['largest_ulps']:.4f} ulp; rounding alone gives 0.5)"
    )
    tell(f"verified {verified['kept']} kept tensors and the side files: byte for byte")
    return {"output": str(merged), "base": str(base), "adapter": str(adapter), **verified}


def free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of `wanted-2`, `wanted-3` … that does not exist."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return wanted if not wanted.exists() else next(path for path in numbered if not path.exists())


def _base_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _LINEARS.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (_HIDDEN,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (_HIDDEN,)
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}


def _write_base(folder: Path, randomness: np.random.Generator) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes = list(_base_shapes().items())
    weight_map: dict[str, str] = {}
    total = 0
    for index in range(_SHARDS):
        name = f"model-{index + 1:05d}-of-{_SHARDS:05d}.safetensors"
        tensors = {
            key: torch.from_numpy(randomness.normal(0, 0.05, shape).astype("float32")).bfloat16()
            for key, shape in shapes[index * len(shapes) // _SHARDS : (index + 1) * len(shapes) // _SHARDS]
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", _model_config())
    _write_json(folder / "generation_config.json", {"eos_token_id": 2, "max_new_tokens": 64})


def _write_adapter(folder: Path, randomness: np.random.Generator) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(_LAYERS):
        for name, (rows, columns) in _LINEARS.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = randomness.normal(0, 0.05, (_RANK, columns)).astype("float32")
            tensors[f"{path}.lora_B.weight"] = randomness.normal(0, 0.05, (rows, _RANK)).astype("float32")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rpartition(".")[2] for name in _LINEARS)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": targets, "bias": "none"}
    _write_json(folder / "adapter_config.json", {**config, "task_type": "CAUSAL_LM", "base_model_name_or_path": "base"})


def _model_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": _VOCABULARY,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _verify(base: Path, adapter: Path, merged: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file as load_factors

    factors = load_factors(adapter / "adapter_model.safetensors")
    before, after = _load_all(base), _load_all(merged)
    if before.keys() != after.keys():
        raise VerificationError(f"tensors differ: {sorted(before.keys() ^ after.keys())[:5]}")
    updated, elements, largest = 0, 0, 0.0
    for name, bits in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in factors:
            lora_a, lora_b = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
            largest = max(largest, _check_rounded(name, _widen(bits), lora_a, lora_b, after[name]))
            updated, elements = updated + 1, elements + bits.size
        elif not np.array_equal(bits, after[name]):
            raise VerificationError(f"{name!r} should be kept byte for byte, but differs")
    for side in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (base / side).read_bytes() != (merged / side).read_bytes():
            raise VerificationError(f"{side!r} should be kept byte for byte, but differs")
    return {"updated": updated, "kept": len(before) - updated, "elements": elements, "largest_ulps": largest}


def _load_all(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return every tensor of a bfloat16 checkpoint as its 16-bit patterns."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.view(torch.uint16).numpy() for name, tensor in load_file(path).items()}
    return tensors


def _widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return bfloat16 patterns as float64 values: a bfloat16 is the upper half of a float32."""
    return (bits.astype("uint32") << 16).view("float32").astype("float64")


def _delta(lora_a: np.ndarray[Any, Any], lora_b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    product: np.ndarray[Any, Any] = lora_b.astype("float64") @ lora_a.astype("float64")
    return product * (_ALPHA / _RANK)


def _check_rounded(
    name: str, before: np.ndarray[Any, Any], lora_a: np.ndarray[Any, Any], lora_b: np.ndarray[Any, Any], bits: Any
) -> float:
    """Return the largest distance of `bits` from the exact result, in units of the last place.

    Rounding to bfloat16 explains 0.5 ulp; float32 arithmetic explains (rank + 3) * 2^-24 of the magnitudes that were
    added, which matters where weight and delta nearly cancel (Higham, "Accuracy and Stability", section 3.1).
    """
    exact = before + _delta(lora_a, lora_b)
    magnitude = np.abs(before) + _delta(np.abs(lora_a), np.abs(lora_b))
    error = np.abs(_widen(bits) - exact) - (_RANK + 3) * 2.0**-24 * magnitude
    _, exponent = np.frexp(exact)
    distance = float((error / np.ldexp(1.0, np.maximum(exponent, -125) - 8)).max())
    if not distance <= 0.5:
        raise VerificationError(f"{name!r} is {distance:.3f} ulp from the float64 result, more than rounding explains")
    return distance
