"""BOFT: inputs rotated by a product of block diagonal matrices, butterflies, and outputs scaled: (M @ W.T).T * s.

Source: PEFT 0.21.2 `tuners/boft/layer.py`: `Linear.get_delta_weight` and `merge`, the same of `Conv2d`;
`BOFTLayer.cayley_batch`, `block_butterfly_perm`, `perm2mat`. Without its extension for CUDA, PEFT makes one factor
whatever the config says, so that an adapter's own tensor tells how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import KindFields, whole_number
from rawmerge.methods.delta import PreparedChange, upcast
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
)
from rawmerge.methods.rotation import Rotation, block_rotation, cayley, rotation_bytes, whole_rotation

if TYPE_CHECKING:
    import torch


class BoftMethod:
    """The rotations and scales of one module."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update, of R (factors, blocks, size, size) and a scale for each row."""
        own = upcast(tensors, context)
        scale, factors = own["s"].reshape(-1, 1), own["R"]
        blocks = cayley(0.5 * (factors - factors.transpose(2, 3)).flatten(0, 1)).view(factors.shape)
        if len(factors) == 1:
            rotations: tuple[Rotation, ...] = (
                (block_rotation if context.rounding_dtype is None else whole_rotation)(blocks[0]),
            )
        else:
            rotations = tuple(_butterflies(blocks))
        return PreparedChange(partial(_rotated, rotations, scale))


def _rotated(rotations: tuple[Rotation, ...], scale: torch.Tensor, tile: torch.Tensor, first: int) -> torch.Tensor:
    for rotate in rotations:
        tile = rotate(tile)
    return tile * scale[first : first + len(tile)]


def _butterflies(blocks: torch.Tensor) -> Iterator[Rotation]:
    """Yield the rotation of each factor, which acts on columns in an order of its own, in the order of their use."""
    import torch

    _, count, size, _ = blocks.shape
    for factor, own in enumerate(blocks):
        order = torch.tensor(butterfly_order(count * size, size, factor))
        yield _permuted(block_rotation(own), order)


def _permuted(rotate: Rotation, order: torch.Tensor) -> Rotation:
    import torch

    return partial(_reordered, rotate, order, torch.argsort(order))


def _reordered(rotate: Rotation, order: torch.Tensor, back: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rotate(rows[:, back])[:, order]


def butterfly_order(columns: int, block_size: int, factor: int) -> list[int]:
    """Return which column the permutation of a factor (0 for the first) puts in each place.

    In each group of 2**factor blocks, halves of blocks are put in another order: the even ones, then the odd ones.
    """
    half, group = block_size // 2, block_size * 2**factor
    halves = [*range(0, group // half, 2), *range(1, group // half, 2)]
    within = [half * number + place for number in halves for place in range(half)]
    return [first + place for first in range(0, columns, group) for place in within]


class BoftKind(AdapterKind):
    """BOFT, butterfly orthogonal fine-tuning."""

    peft_type: ClassVar[str] = "BOFT"
    title: ClassVar[str] = "BOFT"
    formula: ClassVar[str] = "(W @ Mᵀ) * s, M a product of block diagonal rotations"
    modules: ClassVar[str] = "Linear, Conv2d"
    bits: ClassVar[str] = "equal; 1e-6 with more than one butterfly factor, which PEFT multiplies on a GPU only"
    parts: ClassVar[Mapping[str, str]] = {"boft_R": "R", "boft_s": "s"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "boft_block_size": whole_number(4),
            "boft_block_num": whole_number(0),
            "boft_n_butterfly_factor": whole_number(1, 1, 64),
        },
        ignored=("boft_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"boft": BoftMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in); of convolutions (out, in * kernel)."""
        blocks, scale = shapes.get("R", ()), shapes.get("s", ())
        if len(blocks) != 4 or len(scale) != 2:
            return None
        return (scale[0] * scale[1], blocks[1] * blocks[2])

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        if len(module.base_shape) not in {2, 4}:
            raise UnmergeableError("a linear or two-dimensional convolution weight", f"shape {list(module.base_shape)}")
        rows, columns = module.matrix_shape
        count, size = self._stated_blocks(module, columns)
        module.expect("R", -1, count, size, size)
        module.expect("s", *((rows, 1) if len(module.base_shape) == 2 else (1, rows)))
        factors = module.shapes["R"][0]
        self._check_factors(module, factors, count, size)
        working = rotation_bytes(columns, count, size)
        if factors > 1:
            working = 6 * 4 * factors * count * size * size + 16 * columns * factors
        yield PlannedUpdate("boft", ("R", "s"), working_bytes=working)

    def _stated_blocks(self, module: TargetModule, columns: int) -> tuple[int, int]:
        """Return the count and size of blocks, of which the config states one and has 0 for the other."""
        count, size = module.values["boft_block_num"], module.values["boft_block_size"]
        if (count == 0) == (size == 0) or columns % (count or size):
            expected = f"a config in which one of boft_block_num and boft_block_size is 0, and one divides {columns}"
            module.refuse("R", expected, f"{count} and {size}")
        return (count, columns // count) if count else (columns // size, size)

    def _check_factors(self, module: TargetModule, factors: int, count: int, size: int) -> None:
        stated = module.values["boft_n_butterfly_factor"]
        if factors not in {1, stated}:
            module.refuse("R", f"1 or {stated} butterfly factors, as the config says", f"{factors}")
        if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
            expected = f"blocks of even size, as many as a multiple of {2 ** (factors - 1)}"
            module.refuse("R", expected, f"{count} of size {size}")
