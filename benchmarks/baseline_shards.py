"""The same merge shard by shard, each loaded and saved whole, as most tools do it: `... BASE ADAPTER OUTPUT`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def merge_shard(path: Path, output: Path, factors: dict[str, torch.Tensor], scaling: float) -> None:
    """Write the shard at `path` to `output`, with every tensor that has a pair of factors updated.

    Shapes:
        factors: (rank, in_features) for `….lora_A.weight`, (out_features, rank) for `….lora_B.weight`
    """
    tensors = load_file(path)
    for name, weight in tensors.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            lora_a, lora_b = (factors[f"{prefix}.lora_{letter}.weight"].float() for letter in "AB")
            tensors[name] = (weight.float() + (lora_b @ lora_a) * scaling).to(weight.dtype)
    save_file(tensors, output / path.name, metadata={"format": "pt"})


def merge_by_shards(base: Path, adapter: Path, output: Path) -> None:
    """Merge a plain LoRA into every shard of `base`, and copy what else lies there."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(adapter / "adapter_model.safetensors")
    output.mkdir()
    for path in sorted(base.iterdir()):
        if path.suffix == ".safetensors":
            merge_shard(path, output, factors, config["lora_alpha"] / config["r"])
        else:
            shutil.copy(path, output)


if __name__ == "__main__":
    merge_by_shards(*map(Path, sys.argv[1:]))
