"""The same merge through other projects' tools: `python -m benchmarks.baseline_peers PEER BASE ADAPTER OUTPUT`.

Each is called as its own documentation has it, on local directories, on the processor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

#: Added to the output's name: what a tool needs beside it, deleted with it.
SCRATCH_SUFFIX: Final = "-scratch"


def scratch_of(output: Path) -> Path:
    """Return the directory that a tool may use beside its output."""
    return output.with_name(output.name + SCRATCH_SUFFIX)


def run_module(module: str, *arguments: str) -> None:
    """Become `python -m module arguments`."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def merge_with_mergekit(base: Path, adapter: Path, output: Path) -> None:
    """Run `mergekit-yaml` on `model+lora`, which PEFT merges into a cache, passed through to the output."""
    scratch = scratch_of(output)
    scratch.mkdir()
    config = scratch / "merge.yml"
    reference = json.dumps(f"{base}+{adapter}")
    dtype = json.loads((base / "config.json").read_text(encoding="utf-8"))["dtype"]
    config.write_text(f"models:\n  - model: {reference}\nmerge_method: passthrough\ndtype: {dtype}\n", encoding="utf-8")
    run_module("mergekit.scripts.run_yaml", str(config), str(output), "--lora-merge-cache", str(scratch / "merged"))


def merge_with_tinker(base: Path, adapter: Path, output: Path) -> None:
    """Run tinker-cookbook's merge, shard by shard."""
    weights = import_module("tinker_cookbook.weights")
    weights.build_hf_model(
        base_model=str(base), adapter_path=str(adapter), output_path=str(output), merge_strategy="shard"
    )


def merge_with_llamafactory(base: Path, adapter: Path, output: Path) -> None:
    """Run `llamafactory-cli export` with the keys of its own example."""
    scratch = scratch_of(output)
    scratch.mkdir()
    config = scratch / "merge.yaml"
    keys = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "template": "empty",
        "export_dir": str(output),
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": False,
    }
    # JSON scalars are YAML.
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")
    run_module("llamafactory.cli", "export", str(config))


PEERS: Final[dict[str, Callable[[Path, Path, Path], None]]] = {
    "mergekit": merge_with_mergekit,
    "tinker_cookbook": merge_with_tinker,
    "llamafactory": merge_with_llamafactory,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](*map(Path, sys.argv[2:]))
