"""What a synthetic checkpoint is made from, and the options that choose it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks.shapes import SHAPES, CheckpointShape

#: Raised when the same recipe would give other bytes, so that a directory made by older code is not reused.
LAYOUT_VERSION: Final = 1

#: A base's dtype to its code in safetensors files.
DTYPE_CODES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of a synthetic checkpoint; equal recipes give equal files.

    Attributes:
        shape: of the base.
        shard_count: number of the base's files.
        rank: of the adapter.
        alpha: of the adapter; the scaling is alpha / rank.
        seed: of the random values.
        dtype: of the base's weights; the adapter is float32.
        targets: last names of the modules that the adapter changes; empty for all linear ones.
        layout_version: of the code that writes the files.
    """

    shape: CheckpointShape
    shard_count: int
    rank: int = 16
    alpha: int = 24
    seed: int = 0
    dtype: str = "bfloat16"
    targets: tuple[str, ...] = ()
    layout_version: int = LAYOUT_VERSION

    @property
    def base_bytes(self) -> int:
        """Bytes of all base tensors."""
        return self.shape.element_count * ITEM_BYTES[self.dtype]

    def target_modules(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield every module that the adapter changes, as (module path, (out_features, in_features))."""
        for path, shape in self.shape.target_modules():
            if not self.targets or path.rpartition(".")[2] in self.targets:
                yield path, shape

    @property
    def name(self) -> str:
        """The shape's name, followed by whatever is not usual with it."""
        usual = plain_recipe(self.shape)
        parts = [
            self.shape.name,
            "" if self.rank == usual.rank else f"r{self.rank}",
            "" if self.alpha == usual.alpha else f"alpha{self.alpha}",
            "" if self.seed == usual.seed else f"seed{self.seed}",
            "" if self.shard_count == usual.shard_count else f"{self.shard_count}-shards",
            "" if self.dtype == usual.dtype else self.dtype,
            *self.targets,
        ]
        return "-".join(part for part in parts if part)


def plain_recipe(shape: CheckpointShape) -> Recipe:
    """Return the recipe for `shape` with nothing chosen."""
    return Recipe(shape=shape, shard_count=shape.shards)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a recipe beside the shape."""
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    parser.add_argument("--alpha", type=int, default=24, help="of the adapter (default: 24)")
    parser.add_argument("--shards", type=int, help="number of safetensors files (default: the shape's own)")
    parser.add_argument("--dtype", choices=DTYPE_CODES, default="bfloat16", help="of the base (default: bfloat16)")
    parser.add_argument("--seed", type=int, default=0, help="of the random values (default: 0)")
    names = [path.rpartition(".")[2] for path in SHAPES["tiny"].projections()]
    help_text = "last name of a module that the adapter changes; may be given more than once (default: all)"
    parser.add_argument("--target", action="append", choices=names, default=[], dest="targets", help=help_text)


def parse_recipe(options: argparse.Namespace) -> Recipe:
    """Return what the options of `add_recipe_options`, and `shape`, ask for."""
    shape = SHAPES[options.shape]
    return Recipe(
        shape=shape,
        shard_count=options.shards or shape.shards,
        rank=options.rank,
        alpha=options.alpha,
        seed=options.seed,
        dtype=options.dtype,
        targets=tuple(sorted(options.targets)),
    )
