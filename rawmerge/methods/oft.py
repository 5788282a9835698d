"""OFT: inputs rotated by a block diagonal orthogonal matrix, W' = (R @ W.T).T.

Source: PEFT 0.21.2 `tuners/oft/layer.py`: `OFTRotationModule.get_weight`, `_cayley_batch`, `_project_batch`,
`OFTLayer.adjust_oft_parameters`, `merge` of `Linear`, `Conv2d` and `Embedding`; `tuners/oft/config.py` `check_kwargs`:
before PEFT 0.18 the series stood for another rotation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, finite_number, switch, whole_number
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
    number,
)
from rawmerge.methods.rotation import Rotation, block_rotation, cayley, rotation_bytes, whole_rotation

if TYPE_CHECKING:
    import torch

_VERSION: Final = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})([^@]*)")
_LAST_SERIES: Final = (0, 18, 0)
_EXACT: Final = 0


class OftMethod:
    """The rotation of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the one tensor is (blocks or 1, size * (size - 1) / 2)."""
        (upper,) = upcast(tensors, context).values()
        skew = _skew(upper, int(number(settings, "block_size")))
        if settings["is_constrained"]:
            skew = _projected(skew, number(settings, "eps"))
        terms = int(number(settings, "terms"))
        blocks = cayley(skew) if terms == _EXACT else _neumann(skew, terms)
        blocks = blocks.expand(int(number(settings, "block_count")), *blocks.shape[1:])
        make = block_rotation if context.rounding_dtype is None else whole_rotation
        rotate = make(blocks, is_embedding=bool(settings["is_embedding"]))
        return PreparedChange(partial(_rotated, rotate))


def _rotated(rotate: Rotation, tile: torch.Tensor, first: int) -> torch.Tensor:  # noqa: ARG001  # all rows alike
    return rotate(tile)


def _skew(upper: torch.Tensor, size: int) -> torch.Tensor:
    """Return skew-symmetric blocks (blocks, size, size) of their upper triangles, row after row."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1)
    matrix = torch.zeros(len(upper), size, size, dtype=upper.dtype)
    matrix[:, rows, columns] = upper
    return matrix - matrix.transpose(-2, -1)


def _projected(skew: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the blocks, none with a norm above eps / sqrt(blocks)."""
    import torch

    limit = eps * 1 / torch.sqrt(torch.tensor(len(skew), dtype=skew.dtype))
    norm = torch.norm(skew, dim=(1, 2), keepdim=True)
    return torch.where(norm <= limit, skew, limit * (skew / norm))


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Return I + 2Q + 2Q^2 + ... + 2Q^(terms - 2) + Q^(terms - 1); with 3 terms the same as with 4."""
    import torch

    size = skew.shape[-1]
    rotation = torch.eye(size, dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms > 1:
        rotation.add_(skew, alpha=2.0)
    if terms > 2:
        power = torch.bmm(skew, skew)
        rotation.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            rotation.add_(power, alpha=2.0)
        rotation.add_(torch.bmm(power, skew))
    return rotation


class OftKind(AdapterKind):
    """OFT, orthogonal fine-tuning."""

    peft_type: ClassVar[str] = "OFT"
    title: ClassVar[str] = "OFT"
    formula: ClassVar[str] = "W @ block diagonal R, the Cayley transform of skew blocks"
    modules: ClassVar[str] = "Linear, Conv2d, Embedding"
    parts: ClassVar[Mapping[str, str]] = {"oft_R.weight": "R", "oft_embedding_R.weight": "R_embedding"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(0),
            "oft_block_size": replace(whole_number(32), is_required=True),  # absent before PEFT 0.14, of other adapters
            "coft": switch(False),
            "eps": finite_number(6e-5),
            "block_share": switch(False),
            "use_cayley_neumann": switch(True),
            "num_cayley_neumann_terms": whole_number(5, 1, 1000),
        },
        ignored=("module_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"oft": OftMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (-1, in), or (dim, -1) of an embedding; shared blocks tell nothing."""
        for role, shape in shapes.items():
            if len(shape) == 2 and not values.get("block_share"):
                rotated = shape[0] * _block_size(shape[1])
                return (rotated, -1) if role == "R_embedding" else (-1, rotated)
        return None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        _check_version(module)
        role, rotated = self._rotated(module)
        size = _stated_block_size(module, role, rotated)
        count, values = rotated // size, module.values
        module.expect(role, 1 if values["block_share"] else count, size * (size - 1) // 2)
        settings: dict[str, Setting] = {
            "block_count": count,
            "block_size": size,
            "terms": values["num_cayley_neumann_terms"] if values["use_cayley_neumann"] else _EXACT,
            "is_constrained": values["coft"],
            "eps": values["eps"],
            "is_embedding": module.is_embedding,
        }
        yield PlannedUpdate("oft", (role,), settings, working_bytes=rotation_bytes(rotated, count, size))

    def _rotated(self, module: TargetModule) -> tuple[str, int]:
        """Return the role of the module's tensor, and how many numbers of a row are rotated."""
        if module.is_embedding:
            module.need("R_embedding")
            return "R_embedding", module.matrix_shape[0]
        module.refuse_transposed()
        if len(module.base_shape) not in {2, 4}:
            raise UnmergeableError("a linear or two-dimensional convolution weight", f"shape {list(module.base_shape)}")
        return "R", module.matrix_shape[1]


def _check_version(module: TargetModule) -> None:
    """Refuse what an older PEFT trained by another series.

    Raises:
        UnmergeableError: it did, or nothing tells.
    """
    if not module.values["use_cayley_neumann"] or module.is_forced:
        return
    found = _VERSION.match(module.peft_version)
    if found:
        version = (int(found[1]), int(found[2]), int(found[3]))
        is_release = version != _LAST_SERIES or not found[4]
        if version >= _LAST_SERIES and is_release:
            return
    hint = (
        "PEFT 0.18 changed what use_cayley_neumann means, and merges such adapters wrongly; --force merges as it does"
    )
    raise UnmergeableError("an OFT adapter of PEFT 0.18 or later", f"peft_version {module.peft_version!r}", hint)


def _block_size(elements: int) -> int:
    """Return the size of a block of which the upper triangle has so many elements; the next lower one, where none."""
    return (1 + isqrt(1 + 8 * elements)) // 2


def _stated_block_size(module: TargetModule, role: str, rotated: int) -> int:
    """Return the size of a block that PEFT makes of `r` or `oft_block_size`, the one of them that is not 0.

    Raises:
        ShapeMismatchError: both are, or neither is.
    """
    count, size = module.values["r"], module.values["oft_block_size"]
    if (count == 0) == (size == 0):
        module.refuse(role, "a config in which one of r and oft_block_size is 0", f"r {count}, oft_block_size {size}")
    return _divisor(rotated, size) if size else rotated // _divisor(rotated, count)


def _divisor(whole: int, wanted: int) -> int:
    """Return the divisor of `whole` that is nearest to `wanted`, the lower of two."""
    if wanted >= whole:
        return whole
    higher = next(number for number in range(wanted, whole + 1) if whole % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if whole % number == 0)
    return lower if wanted - lower <= higher - wanted else higher
