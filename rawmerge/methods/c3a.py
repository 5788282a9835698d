"""C3A: W plus blocks of circulant matrices, each made of a kernel of b numbers, over the count of inputs.

Source: PEFT 0.21.2 `tuners/c3a/utils.py` `get_circulant_fast` (by Fourier transforms, in float32 whatever the base),
`tuners/c3a/layer.py` `C3ALayer.get_delta_weight` and `C3ALinear.merge` (rounded to the base's dtype before the
division, after it, and after the sum). The transforms' bits depend on the thread count, so the delta is made whole,
with the caller's count. Where PEFT has no say, the matrix is made of the kernel's numbers themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields, whole_number
from rawmerge.methods.delta import PreparedDelta, whole_delta
from rawmerge.methods.interface import (
    WHOLE,
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
)

if TYPE_CHECKING:
    import torch


class C3aMethod:
    """The delta of one module."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; `kernel` is (out / b, in / b, b)."""
        import torch

        inputs, rounding = context.shape[1], context.rounding_dtype
        if rounding is None:
            return _row_local(tensors["kernel"].to(context.compute_dtype), inputs)
        delta = torch.empty(context.shape, dtype=rounding)
        size = tensors["kernel"].shape[2]
        for place, rows in enumerate(_transformed(tensors["kernel"])):
            delta[place * size : (place + 1) * size] = rows.to(rounding) / inputs
        return whole_delta(delta)


def _row_local(kernel: torch.Tensor, inputs: int) -> PreparedDelta:
    """Return the update made of the numbers themselves: row a, column e of a circulant is k[(e - a) mod b]."""
    import torch

    size = kernel.shape[2]

    def rows(start: int, stop: int) -> torch.Tensor:
        places = torch.arange(start, stop)
        offsets = (torch.arange(size) - places[:, None]) % size
        blocks = kernel[places // size].gather(2, offsets[:, None].expand(-1, kernel.shape[1], -1))
        return blocks.flatten(1) / inputs

    return PreparedDelta(rows)


def _transformed(kernel: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the rows of each block of outputs, (b, in), as PEFT computes them.

    Each column is the transform of a unit vector's transform times the kernel's. Its bits depend on how the data lie:
    frequencies first, but where there is one block of inputs.
    """
    import torch

    _, blocks, size = kernel.shape
    units = torch.fft.ifft(torch.eye(size))
    by_frequency = units.T.contiguous().unsqueeze(2)
    for own in torch.fft.fft(kernel.to(torch.float32)):
        if blocks == 1:
            products = torch.einsum("...nb,mnb->...mb", units.unsqueeze(1), own.unsqueeze(0)).flatten(1)
        else:
            products = torch.bmm(by_frequency, own.T.contiguous().unsqueeze(1)).permute(2, 1, 0).reshape(-1, size)
        yield torch.fft.fft(products).real.T


class C3aKind(AdapterKind):
    """C3A, circular convolution."""

    peft_type: ClassVar[str] = "C3A"
    title: ClassVar[str] = "C3A"
    formula: ClassVar[str] = "W + circulant blocks / in"
    modules: ClassVar[str] = "Linear"
    bits: ClassVar[str] = "equal, to PEFT's with as many threads"
    parts: ClassVar[Mapping[str, str]] = {"c3a_kernel": "kernel"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "block_size": whole_number(256, 1),
            "block_size_pattern": Field(
                lambda value: (
                    isinstance(value, dict) and all(type(size) is int and size > 0 for size in value.values())
                ),
                "a table from pattern to a positive whole number",
                {},
            ),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"c3a": C3aMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in)."""
        shape = shapes.get("kernel", ())
        return (shape[0] * shape[2], shape[1] * shape[2]) if len(shape) == 3 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; the kernel's own size must be one that the config states for some module."""
        module.refuse_transposed()
        rows, columns = module.matrix_shape
        module.expect("kernel", -1, -1, -1)
        size = module.shapes["kernel"][2]
        stated = {module.values["block_size"], *module.values["block_size_pattern"].values()}
        if size not in stated or rows % size or columns % size:
            expected = (
                f"a block_size of the config ({', '.join(map(str, sorted(stated)))}) that divides {rows} and {columns}"
            )
            module.refuse("kernel", expected, f"blocks of {size}")
        module.expect("kernel", rows // size, columns // size, size)
        # the delta; the kernel and its transform; unit vectors, twice; one block's products, and their transforms
        working = 4 * rows * columns + 12 * (rows * columns // size) + 16 * size * size + 20 * size * columns
        yield PlannedUpdate("c3a", ("kernel",), reach=WHOLE, working_bytes=working)
