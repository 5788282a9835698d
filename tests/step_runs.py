"""Steps made by hand, run by the engine: tensors in plain files, and what comes out read by the safetensors library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rawmerge.engine.engine import Engine
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.formats.shard_header import TensorEntry, format_shard_header
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import ReplaceTensor, ShardPlan, Step, Update, UpdateTensor
from rawmerge.run_options import RunOptions
from tests.builders import raw

CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
SIZES = {code: dtype.itemsize for dtype, code in CODES.items()}


class Workbench:
    """A folder of stored tensors, and runs of the engine on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def _path(self) -> Path:
        self._count += 1
        return self.folder / f"{self._count}"

    def store(self, tensor: torch.Tensor) -> TensorSource:
        """Write a tensor into a file of its own, behind a few other bytes."""
        path, data = self._path(), raw(tensor)
        path.write_bytes(b"\xff" * 24 + data)
        return TensorSource(str(path), 24, len(data), CODES[tensor.dtype], tuple(tensor.shape))

    def update(self, kind: str, tensors: Mapping[str, torch.Tensor], settings: Any, window: Any = None) -> Update:
        return Update(kind, {role: self.store(tensor) for role, tensor in tensors.items()}, settings, window)

    def step(
        self, base: torch.Tensor, updates: Iterable[Update] = (), dtype: torch.dtype | None = None, **fields: Any
    ) -> UpdateTensor:
        source = self.store(base)
        entry = TensorEntry("w", CODES[dtype or base.dtype], source.shape, 0, 0)
        return UpdateTensor(entry, source, source.dtype, tuple(updates), **fields)

    def run_one(self, step: UpdateTensor | ReplaceTensor, **options: Any) -> torch.Tensor:
        """Return what the engine makes of one step."""
        return self.run([step], **options)["0"]

    def run(
        self,
        steps: Iterable[Step],
        compute_dtype: str = "float32",
        threads: int = 1,
        tile_elements: int = TILE_ELEMENTS,
    ) -> dict[str, torch.Tensor]:
        """Return what the engine makes of the steps, named by their places."""
        placed, start = list[Step](), 0
        for number, step in enumerate(steps):
            end = start + SIZES[step.entry.dtype] * prod(step.entry.shape)
            placed.append(replace(step, entry=replace(step.entry, name=f"{number}", start=start, end=end)))
            start = end
        plan = ShardPlan("out", format_shard_header([step.entry for step in placed], None), tuple(placed))
        path = self._path()
        engine = Engine(compute_dtype, start, RunOptions(threads=threads), tile_elements)
        with OutputFile(path, plan.byte_count) as file:
            engine.run([(plan, file)], None)
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
