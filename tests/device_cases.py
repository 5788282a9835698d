"""Steps for tests of devices: of each kind of arithmetic one, small, and the same bytes wherever they are computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.devices import Device
from rawmerge.computing.shared_tensors import SharedTensors
from rawmerge.computing.tile_computer import TensorComputer, TileScratch
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.merge_plan import UpdateTensor, matrix_of
from rawmerge.window import Window
from tests.builders import random_tensor
from tests.step_runs import Workbench

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One update of one tensor.

    Attributes:
        shape: of the base.
        kind: what computes it.
        shapes: of the adapter's tensors, by role.
        settings: the kind's.
        moves: whether a device computes it.
        change: what makes the adapter's random numbers sensible.
    """

    shape: tuple[int, ...]
    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    window: Window | None = None
    moves: bool = True
    change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    fields: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            role: self.change(random_tensor(shape, torch.float32, seed) * 4)
            for seed, (role, shape) in enumerate(self.shapes.items())
        }

    def step(self, bench: Workbench, base: torch.dtype, output: torch.dtype | None = None) -> UpdateTensor:
        update = bench.update(self.kind, self.tensors(), self.settings, self.window)
        return bench.step(random_tensor(self.shape, base), [update], output, **self.fields)


def lora(rows: int, columns: int, rank: int = 5) -> dict[str, tuple[int, ...]]:
    return {"lora_a": (rank, columns), "lora_b": (rows, rank)}


PLAIN = {"scaling": 1.5, "is_transposed": False, "rounds_delta": False}
ROUNDED = {**PLAIN, "rounds_delta": True}
TRANSPOSED = {**PLAIN, "is_transposed": True}
EXPERTS = {"scaling": 0.7, "experts": 3, "rank": 4, "expert": -1, "is_transposed": False, "grouped_by_expert": False}
OFT = {"is_constrained": False, "eps": 1e-3, "terms": 5, "block_size": 8, "block_count": 5, "is_embedding": False}
RANDLORA = {"lambda": (6, 5), "gamma": (5, 40), "A": (6, 1, 40), "B": (90, 5, 6)}
LOHA = {"w1_a": (70, 3), "w1_b": (3, 40), "w2_a": (70, 3), "w2_b": (3, 40)}
SPECTRUM = {"is_transposed": False, "scaling": 25.0, "seed": 5}


def places(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.argsort(dim=-1).float() if tensor.dim() > 1 else tensor


CASES = {
    "lora": Case((700, 900), "lora", lora(700, 900), PLAIN),
    "lora, low": Case((30, 40), "lora", lora(30, 40), ROUNDED),
    "lora, transposed": Case((900, 700), "lora", lora(700, 900), TRANSPOSED),
    "lora, of a convolution": Case((64, 20, 3, 3), "lora", {"lora_a": (4, 20, 3, 3), "lora_b": (64, 4, 1, 1)}, PLAIN),
    "lora, of a part": Case((300, 90), "lora", lora(100, 45), PLAIN, Window(100, 100, 0, 1, 2)),
    "lora, of many tiles": Case((2100, 1400), "lora", lora(2100, 1400, 16), PLAIN),
    "dora": Case((700, 900), "dora", {**lora(700, 900), "magnitude": (700,)}, PLAIN),
    "dora_columns": Case((900, 700), "dora_columns", {**lora(700, 900), "magnitude": (700,)}, TRANSPOSED),
    "expert_lora": Case(
        (3, 700, 400),
        "expert_lora",
        {"lora_a": (12, 400), "lora_b": (700, 12)},
        EXPERTS,
        fields={"columns": 400, "cuts": (700, 1400)},
    ),
    "lora_bias": Case((70,), "lora_bias", {"bias": (70,)}, {"scaling": 0.3}),
    "lora_twice": Case((70, 40), "lora_twice", lora(70, 40), PLAIN),
    "token_rows": Case((1000, 40), "token_rows", {"rows": (3, 40)}, {"indices": (999, 3, 500)}),
    "scale_rows": Case((70, 40), "scale_rows", {"scale": (70, 1)}),
    "scale_columns": Case((70, 40), "scale_columns", {"scale": (1, 40)}),
    "scale_columns, grouped": Case((8, 5, 3), "scale_columns", {"scale": (1, 10, 1)}),
    "loha": Case((70, 40), "loha", LOHA, {"scaling": 0.5}),
    "loha, high": Case((700, 900), "loha", {role: (3, 900) if role[-1] == "b" else (700, 3) for role in LOHA}, PLAIN),
    "lokr": Case((70, 40), "lokr", {"w1": (10, 8), "w2_a": (7, 2), "w2_b": (2, 5)}, {"scaling": 0.5}),
    "kohya_lokr": Case((70, 40), "kohya_lokr", {"lokr_w1": (10, 8), "lokr_w2": (7, 5)}, {"scaling": 0.5}),
    "miss": Case((70, 40), "miss", {"block": (8, 70)}),
    "miss_bat": Case((70, 40), "miss_bat", {"block": (14, 5, 5)}),
    "hira": Case((70, 40), "hira", {"hira_a": (3, 40), "hira_b": (70, 3)}, {"is_transposed": False}),
    "hra": Case((70, 40), "hra", {"u": (40, 6)}, {"is_orthogonalised": False}),
    "oft": Case((70, 40), "oft", {"R": (5, 28)}, OFT),
    "boft": Case((70, 40), "boft", {"R": (1, 5, 8, 8), "s": (70, 1)}),
    "boft, two factors": Case((70, 40), "boft", {"R": (2, 10, 4, 4), "s": (70, 1)}),
    "adalora": Case(
        (70, 40),
        "adalora",
        {"A": (6, 40), "B": (70, 6), "E": (6, 1)},
        {"is_resized": False, "first_rank": 6, "scaling": 2.0, "is_transposed": False},
    ),
    "delora": Case((70, 40), "delora", {"a": (4, 40), "b": (70, 4), "lambda": (1,), "w_norm": (40,)}, {"rank": 4}),
    "randlora": Case((70, 40), "randlora", RANDLORA, {"scaling": 0.4, "is_transposed": False, "sparsity": 0.0}),
    "waveft": Case((700, 900), "waveft", {"spectrum": (50,)}, {**SPECTRUM, "wavelet_family": "db1"}, moves=False),
    "fourierft": Case((70, 40), "fourierft", {"spectrum": (50,)}, SPECTRUM, moves=False),
    "shira": Case((70, 40), "shira", {"indices": (2, 30), "values": (30,)}, moves=False, change=places),
}


def computed(
    step: UpdateTensor,
    device: Device | None = None,
    compute_dtype: str = "float64",
    *,
    threads: int = 1,
    tile_elements: int = TILE_ELEMENTS,
) -> bytes:
    """Return the bytes of a step's result, its tiles computed by so many threads, on `device` where it can."""
    matrix, blas = matrix_of(step), BlasThreads()
    with OpenFiles() as files:
        computer = TensorComputer(step, files, SharedTensors(Counter()), blas, compute_dtype, device)

        def compute(tile: tuple[int, int]) -> bytes:
            blas.adopt()
            return bytes(computer.compute(*tile, TileScratch()))

        try:
            with ThreadPoolExecutor(threads) as workers:
                done = b"".join(workers.map(compute, matrix.tiles(tile_elements)))
        finally:
            blas.restore()
    assert len(done) == math.prod(step.entry.shape) * {"F64": 8, "F32": 4}.get(step.entry.dtype, 2)
    return done
