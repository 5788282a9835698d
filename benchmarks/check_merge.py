"""Whether a merged checkpoint is right, by a formula written down here once more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from benchmarks.recipe import Recipe
from benchmarks.shapes import CheckpointShape

#: Equal to the base in every correct merge of this adapter.
KEPT_TENSORS: Final = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
CHECKED_PROJECTIONS: Final = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")

COMPUTE_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}


class WrongResultError(Exception):
    """A tensor is not what the formula gives."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Reads tensors of a checkpoint one at a time, by name."""

    directory: Path

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`."""
        return read_tensor(self.directory / self._shard_name(name), name)

    def _shard_name(self, name: str) -> str:
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            return "model.safetensors"
        return str(json.loads(index.read_text(encoding="utf-8"))["weight_map"][name])


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return one tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `values` as `dtype`, rounded once even from float64.

    torch goes from float64 to a half precision by way of float32, which rounds twice. Rounding the first time to odd
    (towards zero, then the last bit set when inexact) keeps what the second rounding needs to know.
    """
    nearest = values.float()
    if dtype == torch.float32:
        return nearest
    bits = nearest.view(torch.int32) - (nearest.double().abs() > values.double().abs()).int()
    is_inexact = bits.view(torch.float32).double() != values.double()
    return (bits | is_inexact.int()).view(torch.float32).to(dtype)


@dataclass(frozen=True, slots=True)
class Formula:
    """What a merge is compared with.

    Attributes:
        compute_dtype: dtype of the arithmetic.
        weights: of the adapter, which is merged once with each.
        is_once: the deltas are summed, in whatever order, and rounded once; else each result is rounded.
        is_exact: every bit must be the formula's; else values may be off by one rounding.
    """

    compute_dtype: str = "float32"
    weights: tuple[float, ...] = (1.0,)
    is_once: bool = False
    is_exact: bool = True

    def expected(
        self, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
    ) -> Iterator[torch.Tensor]:
        """Yield what the merged weight may be, in its own dtype; `lora_a` and `lora_b` have the compute dtype.

        Shapes:
            weight: (out_features, in_features)
            lora_a: (rank, in_features)
            lora_b: (out_features, rank)
        """
        deltas = [(lora_b @ lora_a) * (scaling * own) for own in self.weights]
        if not self.is_once:
            for delta in deltas:
                weight = round_once(weight.to(delta.dtype) + delta, weight.dtype)
            yield weight
            return
        for ordered in permutations(deltas):
            yield round_once(sum(ordered, weight.to(lora_a.dtype)), weight.dtype)


def checked_modules(shape: CheckpointShape) -> Iterator[str]:
    """Yield a handful of linear modules from the first, the middle and the last layer."""
    for layer in sorted({0, shape.layers // 2, shape.layers - 1}):
        for projection in CHECKED_PROJECTIONS:
            yield f"model.layers.{layer}.{projection}"


def check_kept(base: Checkpoint, output: Checkpoint, names: Iterable[str]) -> None:
    """Raise unless tensors that the adapter leaves alone have the base's bytes."""
    for name in names:
        if not _same_bytes(base.tensor(name), output.tensor(name)):
            raise WrongResultError(f"{name}: kept tensor differs from the base")


def check_updated(directory: Path, output: Checkpoint, module_path: str, formula: Formula) -> None:
    """Raise unless the weight of `module_path` is the formula's and differs from the base's."""
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    name = f"{module_path}.weight"
    weight = Checkpoint(directory / "base").tensor(name)
    lora_a, lora_b = (
        read_tensor(
            directory / "adapter" / "adapter_model.safetensors",
            f"base_model.model.{module_path}.{factor}.weight",
        ).to(COMPUTE_DTYPES[formula.compute_dtype])
        for factor in ("lora_A", "lora_B")
    )
    found = output.tensor(name)
    if _same_bytes(found, weight):
        raise WrongResultError(f"{name}: equals the base")
    for expected in formula.expected(weight, lora_a, lora_b, config["lora_alpha"] / config["r"]):
        if _same_bytes(found, expected):
            return
        if not formula.is_exact and is_within_one_rounding(found, expected, weight):
            return
    raise WrongResultError(f"{name}: differs from W + (B @ A) * scaling in {formula.compute_dtype}")


def is_within_one_rounding(found: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether sums made in another order could lead from the formula to `found`.

    An element may be the next value of the dtype, or, where the delta nearly cancels the weight, off by what float32
    sums of the weight's size are.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    step = torch.finfo(expected.dtype).eps * expected.double().abs()
    slack = 2**-20 * weight.double().abs()
    return bool(((found.double() - expected.double()).abs() <= step + slack).all())


def check_merge(directory: Path, output: Path, recipe: Recipe, formula: Formula) -> int:
    """Compare a sample of the tensors in `output` with the formula.

    Args:
        directory: holds base/ and adapter/.
        output: the merged checkpoint.
        recipe: what `directory` was made from.
        formula: what it is to be.

    Returns:
        How many tensors were compared.

    Raises:
        WrongResultError: one of them is wrong.
    """
    merged = Checkpoint(output)
    modules = list(checked_modules(recipe.shape))
    changed = {path for path, _ in recipe.target_modules()} & set(modules)
    kept = [*KEPT_TENSORS, *(f"{path}.weight" for path in modules if path not in changed)]
    check_kept(Checkpoint(directory / "base"), merged, kept)
    for module_path in sorted(changed):
        check_updated(directory, merged, module_path, formula)
    return len(kept) + len(changed)


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    )
