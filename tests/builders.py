"""Small bases and adapters made with the safetensors library, and results computed without rawmerge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK, ALPHA = 4, 6  # never equal: a scaling of 1 hides a missing one
PREFIX = "base_model.model."


def write_base(
    folder: Path,
    shards: Sequence[Mapping[str, torch.Tensor]],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a base of one or more shards, with an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "dtype": "bfloat16"}, indent=2))
    return folder


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """Write an adapter: PEFT's file names, and the fields that matter to a merge."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["x"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora_pair(path: str, rows: int, columns: int, rank: int = RANK, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return an asymmetric pair for the linear module at `path`."""
    generator = torch.Generator().manual_seed(seed + rows * 31 + columns)
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(rank, columns, generator=generator) * 0.3,
        f"{PREFIX}{path}.lora_B.weight": torch.randn(rows, rank, generator=generator) * 0.2 + 0.01,
    }


def random_tensor(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Return weights of a realistic scale."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def merged(base: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return what PEFT 0.21.2 computes on CPU: product, scaling, sum in float32, one rounding."""
    return (base.float() + (lora_b.float() @ lora_a.float()) * scaling).to(base.dtype)


def tiny_merge(folder: Path) -> tuple[Path, Path]:
    """Write a base of two shards with four tensors, and an adapter on two of them."""
    base = write_base(
        folder / "base",
        [
            {
                "model.embed_tokens.weight": random_tensor((20, 8)),
                "model.layers.0.q_proj.weight": random_tensor((12, 8)),
            },
            {"model.layers.1.q_proj.weight": random_tensor((12, 8), seed=1), "model.norm.weight": random_tensor((8,))},
        ],
    )
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    pairs = lora_pair("model.layers.0.q_proj", 12, 8) | lora_pair("model.layers.1.q_proj", 12, 8, seed=1)
    return base, write_adapter(folder / "adapter", pairs)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return relative path to content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_name(number: int, count: int) -> str:
    """Return the usual name of one shard of several."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def layered_merge(folder: Path, layers: int = 3, changed: Sequence[int] = (0, 1)) -> tuple[Path, Path]:
    """Write a base of one shard per layer, each with a linear weight and a norm, and an adapter on some layers."""
    shards = [
        {
            f"model.layers.{layer}.q_proj.weight": random_tensor((12, 8), seed=layer),
            f"model.layers.{layer}.norm.weight": random_tensor((8,), seed=layer),
        }
        for layer in range(layers)
    ]
    base = write_base(folder / "base", shards)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    pairs: dict[str, torch.Tensor] = {}
    for layer in changed:
        pairs |= lora_pair(f"model.layers.{layer}.q_proj", 12, 8, seed=layer)
    return base, write_adapter(folder / "adapter", pairs)
