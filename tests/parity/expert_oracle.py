"""What a merge into experts must give, by formulas of its own in float64."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file

from tests.builders import PREFIX, raw, read_all, write_adapter
from tests.parity.expert_models import LAYERS, Disk, Experts, Family, Sizes, unstack

Shape: TypeAlias = tuple[int, ...]
#: What is added to each tensor on disk, in float64.
Deltas: TypeAlias = dict[str, torch.Tensor]

ALPHA: Final = 7
#: The order in which experts modules register their parameters, and so the order in which PEFT nests wrappers.
_REGISTERED: Final = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
_SINGLE: Final = re.compile(r"(?P<module>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.weight")
_LORA_A: Final = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+?)(?P<depth>(\.base_layer)*)\.lora_A\.weight")


class Made(NamedTuple):
    """An adapter, and what it must add."""

    adapter: Path
    deltas: Deltas


class Piece(NamedTuple):
    """Where a tensor on disk lies in transformers 5: whole, as one expert, or as half of one expert's rows."""

    parameter: str
    number: int | None = None
    half: int | None = None

    def of(self, delta: torch.Tensor) -> torch.Tensor:
        """Return this piece of what is added to the parameter."""
        if self.number is not None:
            delta = delta[self.number]
        return delta if self.half is None else delta.chunk(2)[self.half]


def stacked_delta(
    lora_a: torch.Tensor, lora_b: torch.Tensor, shape: Shape, *, transposed: bool = False, grouped: bool = False
) -> torch.Tensor:
    """Return the unscaled delta of a (E, d1, d2) parameter: expert by expert a slice of B times a slice of A.

    Args:
        lora_a: (E * rank, X), the expert is the slowest index of its rows.
        lora_b: (Y, E * rank), the expert is the fastest index of its columns, or the slowest if grouped.
        shape: of the parameter.
        transposed: whether X is d1 and Y is d2.
        grouped: see `lora_b`.
    """
    count, rank = shape[0], lora_a.shape[0] // shape[0]
    a, b = lora_a.double(), lora_b.double()
    products = []
    for number in range(count):
        columns = slice(number * rank, (number + 1) * rank) if grouped else slice(number, None, count)
        product = b[:, columns] @ a[number * rank : (number + 1) * rank]
        products.append(product.T if transposed else product)
    delta = torch.stack(products)
    assert delta.shape == shape
    return delta


def assert_merged(base: Path, merged: Path, deltas: Mapping[str, torch.Tensor]) -> None:
    """The named tensors are base plus delta, rounded to the base's dtype once or twice; all others kept their bytes."""
    before, after = read_all(base), read_all(merged)
    assert before.keys() == after.keys()
    assert deltas.keys() <= before.keys(), deltas.keys() - before.keys()
    wrong = {name: _describe(weight, after[name], deltas.get(name)) for name, weight in before.items()}
    assert not any(wrong.values()), {name: text for name, text in wrong.items() if text}


def _describe(weight: torch.Tensor, merged: torch.Tensor, delta: torch.Tensor | None) -> str:
    if (weight.dtype, weight.shape) != (merged.dtype, merged.shape):
        return f"is {merged.dtype}{list(merged.shape)}"
    if delta is None:
        return "" if raw(weight) == raw(merged) else "was touched"
    exact = weight.double() + delta
    # delta may be rounded before it is added, and the sum is rounded; products of low rank are good to 2e-6
    roundings = torch.finfo(weight.dtype).eps / 2 * 1.01 * (delta.abs() + exact.abs())
    bound = torch.where(delta == 0, 0.0, roundings + 2e-6 * delta.abs().max())
    off = (merged.double() - exact).abs() - bound
    return "" if (off <= 0).all() else f"{int((off > 0).sum())} of {off.numel()} off, by up to {off.max():.3g}"


def deltas_of_peft_file(base: Path, adapter: Path, family: Family) -> Deltas:
    """Return what an adapter saved by PEFT 0.21 for a model of transformers 5 must add to the tensors on disk."""
    pieces, shapes = _pieces(base, family)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = [match for match in map(_LORA_A.fullmatch, tensors) if match]
    assert len(tensors) == 2 * len(found)
    deltas: Deltas = {}
    for match in found:
        lora_a, lora_b = tensors[match[0]], tensors[match[0].replace(".lora_A.", ".lora_B.")]
        parameter = _parameter(match["path"], match["depth"].count("."), config, shapes)
        shape = shapes[parameter]
        if len(shape) == 3:
            rank, delta = len(lora_a) // shape[0], stacked_delta(lora_a, lora_b, shape, transposed=family.transposed)
        else:
            rank, delta = len(lora_a), lora_b.double() @ lora_a.double()
        deltas[parameter] = delta * _scaling(parameter, rank, config)
    return {name: piece.of(deltas[piece.parameter]) for name, piece in pieces.items() if piece.parameter in deltas}


def _pieces(base: Path, family: Family) -> tuple[dict[str, Piece], dict[str, Shape]]:
    """Return where each tensor on disk lies in memory, and the shapes of the parameters there."""
    pieces: dict[str, Piece] = {}
    shapes: dict[str, Shape] = {}
    for name, tensor in read_all(base).items():
        piece = _piece(family.memory_name(name), is_gated="gate_up_proj" in family.parameters)
        pieces[name] = piece
        if piece.number is None:
            shapes[piece.parameter] = tuple(tensor.shape)
            continue
        rows, columns = tensor.shape
        count = max(piece.number + 1, shapes.get(piece.parameter, (0,))[0])
        shapes[piece.parameter] = (count, rows if piece.half is None else 2 * rows, columns)
    return pieces, shapes


def _piece(name: str, *, is_gated: bool) -> Piece:
    match = _SINGLE.fullmatch(name)
    if not match:
        return Piece(name)
    half = {"gate_proj": 0, "up_proj": 1}.get(match["leaf"]) if is_gated else None
    leaf = match["leaf"] if half is None else "gate_up_proj"
    return Piece(f"{match['module']}.{leaf}", int(match["number"]), half)


def _parameter(path: str, depth: int, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str:
    """Return the parameter that a pair belongs to: of an experts module, the first registered lies the deepest."""
    if f"{path}.weight" in shapes:
        return f"{path}.weight"
    candidates = [f"{path}.{name}" for name in _REGISTERED if f"{path}.{name}" in shapes]
    return [name for name in candidates if _is_targeted(name, config)][-1 - depth]


def _is_targeted(parameter: str, config: Mapping[str, Any]) -> bool:
    return any(parameter.endswith(f".{target}") for target in config["target_parameters"] or [])


def _scaling(parameter: str, rank: int, config: Mapping[str, Any]) -> float:
    path = parameter if _is_targeted(parameter, config) else parameter.removesuffix(".weight")
    keys = [key for key in config["alpha_pattern"] if re.match(rf"(.*\.)?({key})$", path)]
    alpha: float = config["alpha_pattern"][keys[0]] if keys else config["lora_alpha"]
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def make_stacked_adapter(
    folder: Path,
    disk: Disk,
    sizes: Sizes,
    *,
    transposed: bool = False,
    grouped: bool = False,
    parameters: Sequence[str] = ("gate_up_proj", "down_proj"),
    rank: int = 3,
    **fields: Any,
) -> Made:
    """Write an adapter with `target_parameters`, as PEFT would for a model of transformers 5."""
    tensors: dict[str, torch.Tensor] = {}
    deltas: Deltas = {}
    for layer in range(LAYERS):
        added = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in disk.shapes(sizes).items()}
        for depth, name in enumerate(reversed(parameters)):
            shape = disk.shapes(sizes)[name]
            inputs, outputs = (shape[1], shape[2]) if transposed else (shape[2], shape[1])
            path = f"{PREFIX}model.layers.{layer}.{disk.memory}{'.base_layer' * depth}"
            lora_a, lora_b = _pair(outputs, inputs, rank * shape[0], seed=20 * layer + depth)
            tensors |= {f"{path}.lora_A.weight": lora_a, f"{path}.lora_B.weight": lora_b}
            added[name] = stacked_delta(lora_a, lora_b, shape, transposed=transposed, grouped=grouped) * ALPHA / rank
        stored = disk.store(layer, unstack(disk.layout, added["gate_up_proj"], added["down_proj"]))
        deltas |= {name: delta for name, delta in stored.items() if delta.any()}
    targets = [f"{disk.memory}.{name}" for name in parameters]
    config = {"r": rank, "lora_alpha": ALPHA, "target_modules": [], "target_parameters": targets, **fields}
    return Made(write_adapter(folder, tensors, **config), deltas)


def make_single_adapter(
    folder: Path, disk: Disk, sizes: Sizes, numbers: Sequence[int], leaves: Sequence[int] = (0, 1, 2)
) -> Made:
    """Write an adapter with a pair for each matrix of some experts; `leaves` counts gate, up and down."""
    rank, count = 3, sizes.experts
    tensors: dict[str, torch.Tensor] = {}
    deltas: Deltas = {}
    shapes = [(sizes.inner, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)]
    for layer in range(LAYERS):
        added = Experts(*(torch.zeros(count, *shape, dtype=torch.float64) for shape in shapes))
        for leaf in leaves:
            for number in numbers:
                path = f"{PREFIX}model.layers.{layer}.{disk.old_path}.{number}.{disk.old_leaves[leaf]}"
                lora_a, lora_b = _pair(*shapes[leaf], rank, seed=100 * layer + 10 * number + leaf)
                tensors |= {f"{path}.lora_A.weight": lora_a, f"{path}.lora_B.weight": lora_b}
                added[leaf][number] = lora_b.double() @ lora_a.double() * ALPHA / rank
        deltas |= {name: delta for name, delta in disk.store(layer, added).items() if delta.any()}
    targets = [disk.old_leaves[leaf] for leaf in leaves]
    return Made(write_adapter(folder, tensors, r=rank, lora_alpha=ALPHA, target_modules=targets), deltas)


def make_linear_adapter(
    folder: Path, base: Path, pattern: str, ranks: Mapping[str, int] | None = None, **fields: Any
) -> Made:
    """Write an adapter of transformers 4 for the modules on disk that match; all of them are linear there.

    Args:
        folder: where the adapter goes.
        base: its tensors' names are the modules' names.
        pattern: searched for in the modules' paths.
        ranks: by the last segment of the path; 3 otherwise.
        **fields: of adapter_config.json.
    """
    tensors: dict[str, torch.Tensor] = {}
    deltas: Deltas = {}
    alphas: Mapping[str, float] = fields.get("alpha_pattern", {})
    modules = {name.removesuffix(".weight"): weight for name, weight in read_all(base).items() if weight.ndim == 2}
    for seed, module in enumerate(sorted(path for path in modules if re.search(pattern, path))):
        leaf = module.rpartition(".")[2]
        rank = (ranks or {}).get(leaf, 3)
        rows, columns = modules[module].shape
        lora_a, lora_b = _pair(rows, columns, rank, seed=seed)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": lora_a, f"{PREFIX}{module}.lora_B.weight": lora_b}
        scaling = alphas.get(leaf, ALPHA) / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        deltas[f"{module}.weight"] = lora_b.double() @ lora_a.double() * scaling
    targets = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in deltas})
    config = {"r": 3, "lora_alpha": ALPHA, "target_modules": targets, "rank_pattern": dict(ranks or {}), **fields}
    return Made(write_adapter(folder, tensors, **config), deltas)


def _pair(rows: int, columns: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, columns, generator=generator) * 0.3
    return lora_a, torch.randn(rows, rank, generator=generator) * 0.2 + 0.02
