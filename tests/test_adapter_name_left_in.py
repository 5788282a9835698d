"""Tensors of every kind with the adapter's own name left in, as in memory: they mean what PEFT's files mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.errors import AdapterError
from rawmerge.formats.adapter_names import parse_adapter_name, parse_adapter_names
from rawmerge.matching.matcher import grammar_of
from rawmerge.methods import ADAPTER_KINDS
from tests.builders import random_tensor, raw, read_all, write_base

PATH = "model.layers.0.self_attn.q_proj"
PARTS = [
    pytest.param(kind, part, role, shared, id=f"{name}-{part}")
    for name, kind in ADAPTER_KINDS.items()
    for shared, parts in ((False, kind.parts), (True, kind.shared))
    for part, role in parts.items()
]
#: How the name gets in: nowhere, behind the part's first segment, twice; and what it is then.
SPELLINGS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "taken out": (lambda part: part, ""),
    "left in": (lambda part: [part[0], "default", *part[1:]], "default"),
    "of one's own": (lambda part: [part[0], "my_adapter-2", *part[1:]], "my_adapter-2"),
    "twice": (lambda part: [part[0], "default", "default", *part[1:]], "default"),
}


def spelled(part: str, spelling: str) -> str:
    edit, _ = SPELLINGS[spelling]
    return ".".join(edit(part.replace("*", "3").split(".")))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("kind", "part", "role", "shared"), PARTS)
def test_the_name_is_read_past(kind: object, part: str, role: str, shared: bool, spelling: str) -> None:
    text = f"base_model.{'' if shared else f'model.{PATH}.'}{spelled(part, spelling)}"
    name = parse_adapter_name(text, grammar=grammar_of(kind))  # type: ignore[arg-type]
    wanted, _, parameter = role.replace("*", "3").partition(":")
    assert (name.role, name.adapter_name) == (wanted, SPELLINGS[spelling][1])
    assert (name.module_path, name.parameter) == ("" if shared else PATH, parameter or "weight")


@pytest.mark.parametrize(("kind", "part", "role", "shared"), PARTS)
def test_a_number_two_names_and_a_longer_path_are_not_read_past(
    kind: object, part: str, role: str, shared: bool
) -> None:
    first, *rest = part.replace("*", "3").split(".")
    start = "base_model." if shared else f"base_model.model.{PATH}."
    wanted = role.replace("*", "3").partition(":")[0]
    for middle in (["7"], ["one", "two"], ["x", "x", "x"]):
        name = parse_adapter_name(f"{start}{'.'.join([first, *middle, *rest])}", grammar=grammar_of(kind))  # type: ignore[arg-type]
        assert name.role != wanted or name.module_path != ("" if shared else PATH)


def test_prefixes_of_trainers_are_taken_off_every_kind() -> None:
    for kind in ADAPTER_KINDS.values():
        for part in kind.parts:
            own = spelled(part, "left in")
            texts = [f"{PATH}.{own}", f"module.base_model.model.{PATH}.{own}", f"_orig_mod.{PATH}.{own}"]
            names = parse_adapter_names(texts, grammar_of(kind))
            assert {name.module_path for name in names} == {PATH}, part


def loha(folder: Path) -> tuple[Path, Path]:
    """Write a base and a LoHa adapter for it."""
    base = write_base(folder / "base", [{f"{PATH}.weight": random_tensor((12, 8))}])
    shapes = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 3), "hada_w2_b": (3, 8)}
    adapter = folder / "adapter"
    adapter.mkdir()
    tensors = {f"base_model.model.{PATH}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 3, "alpha": 5}))
    return base, adapter


def test_a_merge_has_the_same_bytes_with_the_name_left_in(tmp_path: Path) -> None:
    base, adapter = loha(tmp_path)
    rawmerge.merge_adapter(base, adapter, tmp_path / "one")
    path = adapter / "adapter_model.safetensors"
    save_file({f"{name}.default": tensor for name, tensor in load_file(path).items()}, path)
    rawmerge.merge_adapter(base, adapter, tmp_path / "other")
    (one,), (other,) = read_all(tmp_path / "one").values(), read_all(tmp_path / "other").values()
    assert raw(one) == raw(other)


def test_the_tensors_of_two_adapters_are_refused(tmp_path: Path) -> None:
    base, adapter = loha(tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({f"{name}.{own}": tensor.clone() for name, tensor in tensors.items() for own in ("one", "two")}, path)
    with pytest.raises(AdapterError, match=r"the tensors of one adapter, found those of 2: 'one', 'two'"):
        rawmerge.plan_merge(base, adapter)
    save_file({**tensors, **{f"{name}.one": tensor.clone() for name, tensor in tensors.items()}}, path)
    with pytest.raises(AdapterError, match="which means the same"):
        rawmerge.plan_merge(base, adapter)
