"""Checks a device against the CPU, byte by byte, and measures where a merge's time goes on it.

    python -m benchmarks.device_check --device cuda --shape 1.5b

Ends with exit code 1 where float64, stored in 16 bits, is not the CPU's byte for byte.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

import rawmerge
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.recipe import DTYPE_CODES, Recipe, plain_recipe
from benchmarks.result_files import add_place_options
from benchmarks.shapes import SHAPES
from benchmarks.table import markdown_table
from rawmerge.computing.rounding import round_into
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.movable import moved

COMPUTE_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}
_BUS_BYTES: Final = 256 * 2**20
_COLUMNS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One merge on the CPU and on the device.

    Attributes:
        dtype: of the base and the output.
        compute_dtype: of the arithmetic.
        elements: how many elements the output's tensors have.
        differing: how many of them differ.
        cpu_seconds, device_seconds: wall time of the merge, torch imported and files in the page cache.
        byte_count: bytes of the output.
        notes: what of it was computed on the CPU after all.
    """

    dtype: str
    compute_dtype: str
    elements: int
    differing: int
    cpu_seconds: float
    device_seconds: float
    byte_count: int
    notes: tuple[str, ...]

    @property
    def is_broken(self) -> bool:
        """Whether bytes differ that must not; float32 from float64 may, at about one tie in a hundred million."""
        return self.differing > 0 and self.compute_dtype == "float64" and self.dtype != "float32"

    def cells(self) -> list[str]:
        """Return the row of a table."""
        rates = (f"{self.byte_count / seconds / 1e9:.2f}" for seconds in (self.cpu_seconds, self.device_seconds))
        result = f"{self.differing} of {self.elements:.3g}" + (" WRONG" if self.is_broken else "")
        return [f"{self.dtype}, {self.compute_dtype}", result, *rates, "; ".join(self.notes) or "-"]


def merge(directory: Path, output: Path, device: str, compute_dtype: str) -> rawmerge.MergeSummary:
    """Merge a checkpoint of ours on a device."""
    shutil.rmtree(output, ignore_errors=True)
    return rawmerge.merge_adapter(
        directory / "base", directory / "adapter", output, compute_dtype=compute_dtype, device=device
    )


def count_differences(left: Path, right: Path) -> tuple[int, int]:
    """Return how many elements two outputs have, and how many of them have other bytes."""
    elements = differing = 0
    for path in sorted(left.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(right / path.name, "pt") as other:
            for name in one.keys():  # noqa: SIM118  # no mapping
                first, second = (file.get_tensor(name) for file in (one, other))
                integers = {2: torch.int16, 4: torch.int32}[first.element_size()]
                differing += int((first.view(integers) != second.view(integers)).sum())
                elements += first.numel()
    return elements, differing


def compare(recipe: Recipe, workdir: Path, device: str, compute_dtype: str) -> Comparison:
    """Merge on both, the device twice, for its start costs once in a process."""
    directory = workdir / recipe.name
    make_checkpoint(directory, recipe)
    here, there = workdir / "here", workdir / "there"
    merge(directory, there, device, compute_dtype)
    summaries = [merge(directory, output, place, compute_dtype) for output, place in ((here, "cpu"), (there, device))]
    elements, differing = count_differences(here, there)
    for output in (here, there):
        shutil.rmtree(output)
    return Comparison(
        dtype=recipe.dtype,
        compute_dtype=compute_dtype,
        elements=elements,
        differing=differing,
        cpu_seconds=summaries[0].seconds,
        device_seconds=summaries[1].seconds,
        byte_count=summaries[1].byte_count,
        notes=tuple(note for note in summaries[1].notes if note.startswith("computed on the CPU")),
    )


def best_seconds(call: Callable[[], object], place: torch.device, rounds: int = 7) -> float:
    """Return the shortest time that `call` and all that it gives the device take."""
    seconds = []
    for _ in range(rounds):
        _wait(place)
        started = time.perf_counter()
        call()
        _wait(place)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        getattr(torch, place.type).synchronize()


def bus_rates(place: torch.device) -> Iterator[tuple[str, float]]:
    """Yield what is copied and the bytes per second: page-locked memory where the device has a use for it."""
    is_pinned = place.type == "cuda"
    here = torch.zeros(_BUS_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
    there = torch.empty(_BUS_BYTES, dtype=torch.uint8, device=place)
    kind = "page-locked" if is_pinned else "pageable"
    yield f"copy to the device, {kind}", _BUS_BYTES / best_seconds(lambda: there.copy_(here, non_blocking=True), place)
    yield f"copy back, {kind}", _BUS_BYTES / best_seconds(lambda: here.copy_(there, non_blocking=True), place)


def compute_rate(place: torch.device, rank: int, dtype: torch.dtype) -> float:
    """Return the bytes of bfloat16 weights per second that LoRA and the rounding take, all on the device already."""
    rows = TILE_ELEMENTS // _COLUMNS
    before = torch.randn(rows, _COLUMNS).to(torch.bfloat16).to(place)
    factors = torch.randn(rank, _COLUMNS, dtype=dtype), torch.randn(rows, rank, dtype=dtype)
    update: PreparedLora = moved(PreparedLora(*factors, 1.5, False, None), place)
    scratch, result = TileScratch(place), torch.empty_like(before)

    def call() -> None:
        tile = scratch.tensor("tile", (rows, _COLUMNS), dtype)
        update.apply(tile.copy_(before), 0, scratch)
        round_into(result, tile)

    return before.nbytes / best_seconds(call, place, rounds=50)


def rate_rows(place: torch.device, rank: int) -> Iterator[Sequence[str]]:
    """Yield what is measured and its rate in GB/s."""
    for title, rate in bus_rates(place):
        yield title, f"{rate / 1e9:.2f}"
    for name, dtype in COMPUTE_DTYPES.items():
        with suppress(TypeError):  # Metal has no float64
            yield f"LoRA of rank {rank} in {name}, no copies", f"{compute_rate(place, rank, dtype) / 1e9:.2f}"


def device_title(place: torch.device) -> str:
    """Return what the device is."""
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type


def main() -> int:
    """Read the command line, compare, measure, print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, mps; cpu tries this program out")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the base (default: tiny)")
    parser.add_argument("--dtype", choices=DTYPE_CODES, action="append", help="of the base (default: all)")
    add_place_options(parser)
    options = parser.parse_args()
    place, plain = torch.device(options.device), plain_recipe(SHAPES[options.shape])
    options.workdir.mkdir(parents=True, exist_ok=True)
    comparisons = [
        compare(replace(plain, dtype=dtype), options.workdir, options.device, compute_dtype)
        for dtype in options.dtype or DTYPE_CODES
        for compute_dtype in COMPUTE_DTYPES
    ]
    columns = ("stored, computed in", "elements that differ", "CPU, GB/s", "device, GB/s", "notes:")
    texts = [
        f"{options.shape} on {device_title(place)}, torch {torch.__version__}",
        markdown_table(columns, (comparison.cells() for comparison in comparisons)),
        markdown_table(("alone", "GB/s"), rate_rows(place, plain.rank)),
    ]
    sys.stdout.write("\n\n".join(texts) + "\n")
    return int(any(comparison.is_broken for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
