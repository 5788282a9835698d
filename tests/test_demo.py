"""The demo's verification can fail: it finds what is wrong with a merged checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rawmerge.demo import _verify, run_demo
from rawmerge.errors import VerificationError

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(folder, lambda _: None)
    return folder


def shard_with(folder: Path, name: str) -> Path:
    return next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))


def edit(tensors: dict[str, torch.Tensor], name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[name] = change(tensors[name]).bfloat16().contiguous()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (Q, lambda tensor: tensor * 1.01),
        (Q, lambda tensor: torch.cat([tensor[:1] + 0.01, tensor[1:]])),
        ("model.norm.weight", lambda tensor: tensor * 1.01),
    ],
)
def test_a_wrong_tensor_is_found(
    demo: Path, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for path in (demo / "merged").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = shard_with(tmp_path, name)
    tensors = load_file(path)
    edit(tensors, name, change)
    save_file(tensors, path)
    with pytest.raises(VerificationError, match=name):
        _verify(demo / "base", demo / "adapter", tmp_path)


def test_the_base_is_no_merge(demo: Path) -> None:
    with pytest.raises(VerificationError, match="ulp"):
        _verify(demo / "base", demo / "adapter", demo / "base")
