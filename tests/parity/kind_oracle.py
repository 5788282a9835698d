"""Adapters of every kind made by PEFT, its merge of them, and what damage to them must be refused.

No expected value comes from rawmerge.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.folder_cache import FolderCache, described

peft = pytest.importorskip("peft")

WEIGHTS = "adapter_model.safetensors"
_ADAPTERS = FolderCache()
#: Linear weights of a tiny Llama: square (q), wide (k), high (gate) and low (down).
LLAMA_TARGETS = ("q_proj", "k_proj", "gate_proj", "down_proj")
#: Conv1D weights of a tiny GPT-2: wide, square, wide, high.
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class Case:
    """A base and an adapter for it.

    Attributes:
        make_config: returns PEFT's config.
        auto: transformers' auto class; model: its config, made by a function of `tiny_models`.
        targets: ends of module names that the merge must change; every one of them.
        spread: how large the trained values are.
        edit: changes the adapter's tensors before they are saved, as training would.
        tolerance: largest difference to PEFT, relative to the largest value of the tensor; 0 for equal bits.
    """

    make_config: Callable[[], Any]
    auto: str = tiny.CAUSAL
    model: Callable[[], Any] = tiny.llama
    targets: Collection[str] = LLAMA_TARGETS
    spread: float = 0.2
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = field(default=lambda tensors: tensors)
    tolerance: float = 0.0


def write_case(case: Case, folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """Save the base and the adapter, all of whose trained values are random; return their folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = case.make_config()
    model = case.model()
    base = oracle.save_base(folder / "base", case.auto, model, dtype)
    adapter = folder / "adapter"
    key = described(case.auto, type(model), model.to_dict(), dtype, type(config), config.to_dict(), case.spread)
    _ADAPTERS.fill(adapter, key and (key, case.edit), lambda: _train(case, config, base, adapter))
    edit_config(adapter, base_model_name_or_path=str(base))
    return base, adapter


def _train(case: Case, config: Any, base: Path, adapter: Path) -> None:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(oracle.copy_pretrained(base, case.auto), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter + case.spread * noise + case.spread / 10)
        wrapped.save_pretrained(adapter)
    path = adapter / WEIGHTS
    save_file(case.edit(load_file(path)), path, metadata={"format": "pt"})


def peft_merge(case: Case, base: Path, adapter: Path, folder: Path) -> dict[str, oracle.RawTensor]:
    """Return what PEFT's default merge is on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.merge_with_peft(oracle.pretrained(base, case.auto), adapter, folder)


def check_merge(case: Case, folder: Path, dtype: torch.dtype) -> None:
    """Rawmerge's output has PEFT's bytes (or is within the case's tolerance), and every target has changed."""
    base, adapter = write_case(case, folder, dtype)
    expected = peft_merge(case, base, adapter, folder / "peft")
    rawmerge.merge_adapter(base, adapter, folder / "ours")
    ours, before = oracle.read_tensors(folder / "ours"), oracle.read_tensors(base)
    changed = oracle.changed_names(before, expected)
    for target in case.targets:
        missing = [name for name in before if target in name and name.endswith("weight") and name not in changed]
        assert not missing, f"PEFT's merge does not change {missing}: the case tests nothing there"
    if not case.tolerance:
        oracle.assert_same_checkpoint(ours, expected)
        return
    for name, tensor in expected.items():
        if name in changed:
            assert_close(as_tensor(ours[name]), as_tensor(tensor), case.tolerance, name)
        else:
            assert ours[name] == tensor, name


def as_tensor(raw: oracle.RawTensor) -> torch.Tensor:
    """Return a stored tensor's values in float64."""
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[raw.dtype]
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape).double()


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """No element differs by more than `tolerance` times the tensor's largest."""
    difference = float((ours - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"{name}: {difference:.3g}"


def check_float64(
    case: Case,
    folder: Path,
    formula: Callable[[str, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor | None],
    tolerance: float = 2**-23,
) -> None:
    """With compute_dtype float64, every changed tensor of a float32 base is `formula`'s, rounded once.

    Args:
        case: the case.
        folder: where to work.
        formula: given a base tensor's name, its values in float64, and all adapter tensors in float64, returns what a
            merge makes of it, independently of rawmerge and of PEFT; None where it is kept.
        tolerance: largest difference, relative to the largest value of the tensor.
    """
    base, adapter = write_case(case, folder, torch.float32)
    rawmerge.merge_adapter(base, adapter, folder / "ours", compute_dtype="float64")
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    before, ours = oracle.read_tensors(base), oracle.read_tensors(folder / "ours")
    changed = 0
    for name, raw in before.items():
        expected = formula(name, as_tensor(raw), tensors)
        if expected is None:
            assert ours[name] == raw, name
        else:
            changed += 1
            # one rounding to float32, and float64 sums in another order
            assert_close(as_tensor(ours[name]), expected.float().double(), tolerance, name)
    assert changed >= len(case.targets)


def check_damage(case: Case, folder: Path, unneeded: Collection[str] = ()) -> None:
    """An adapter with a tensor missing, of another shape, empty or unknown is refused, and the message says where.

    Tensors of one module that contradict each other may each be the wrong one, so a message may name any of them.

    Args:
        case: the case.
        folder: where to work.
        unneeded: parts of names of tensors that a merge can do without.
    """
    base, adapter = write_case(case, folder, torch.float32)
    path, tensors = adapter / WEIGHTS, load_file(adapter / WEIGHTS)
    families = {name.partition("layers.")[2].partition(".")[2] or name: name for name in tensors}
    needed = [name for name in families.values() if not any(part in name for part in unneeded)]
    assert needed
    for name in needed:
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        place = _module(name)
        if any(other.startswith(f"{place}.") for other in others):
            _assert_refused(base, adapter, others, place)
        for damaged in _damaged(tensors[name]):
            _assert_refused(base, adapter, {**others, name: damaged}, place)
    foreign = {**tensors, f"{next(iter(needed)).rpartition('.')[0]}.not_a_part": torch.ones(2)}
    _assert_refused(base, adapter, foreign, "not_a_part")
    save_file(tensors, path)
    assert rawmerge.plan_merge(base, adapter)


def _module(name: str) -> str:
    """Return the path of a tensor's module, as far as names of tiny models tell."""
    if ".lora_" in name:
        return name.partition(".lora_")[0]
    head, mark, _ = name.partition("_proj.")
    return head + mark.rstrip(".") if mark else name.rpartition(".")[0]


def _damaged(tensor: torch.Tensor) -> list[torch.Tensor]:
    longer = [torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis).contiguous() for axis in range(tensor.dim())]
    return [*longer, tensor[:0].clone()] if tensor.dim() else [tensor.repeat(2)]


def _assert_refused(base: Path, adapter: Path, tensors: dict[str, torch.Tensor], named: str) -> None:
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(rawmerge.RefusedError) as refusal:
        rawmerge.plan_merge(base, adapter)
    module = named.removeprefix("base_model.model.")  # of a product the message names the base's tensor
    assert module in str(refusal.value), f"{module} is not in: {refusal.value}"


def edit_config(adapter: Path, **fields: Any) -> None:
    """Set fields of adapter_config.json; None takes one out."""
    path = adapter / "adapter_config.json"
    taken_out = {name for name, value in fields.items() if value is None}
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in taken_out}))
