"""FourierFT: W + s * the inverse Fourier transform of trained coefficients at random places of an (out, in) spectrum.

Source: PEFT 0.21.2 `tuners/fourierft/layer.py` `FourierFTLayer.update_layer` (places) and `get_delta_weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields, finite_number, whole_number
from rawmerge.methods.delta import whole_delta
from rawmerge.methods.interface import (
    WHOLE,
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.randomness import first_positions, matrix_of_linear, seed_field

if TYPE_CHECKING:
    import torch

#: A field of tables from module pattern to number of coefficients. The file's own numbers decide; these must allow it.
FREQUENCY_PATTERN = Field(
    lambda value: isinstance(value, dict) and all(type(count) is int and count > 0 for count in value.values()),
    "a table from module pattern to a positive whole number",
    {},
)


class FourierftMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the delta is made whole. PEFT transforms in float32, of a float64 base, too."""
        import torch

        is_transposed, spectrum = bool(settings["is_transposed"]), tensors["spectrum"]
        outputs, inputs = context.shape[::-1] if is_transposed else context.shape
        dtype = torch.float32 if context.rounding_dtype is not None else context.compute_dtype
        positions = first_positions(len(spectrum), outputs * inputs, int(number(settings, "seed")))
        # complex from the start, as the transform would make it: one copy less
        dense = torch.zeros(outputs, inputs, dtype=dtype.to_complex())
        dense.view(-1)[positions] = spectrum.to(dense.dtype)
        transformed = torch.fft.ifft2(dense)
        del dense  # before the next copy is made
        delta = transformed.real * number(settings, "scaling")
        return whole_delta(delta.T if is_transposed else delta)


class FourierftKind(AdapterKind):
    """FOURIERFT, sparse spectra."""

    peft_type: ClassVar[str] = "FOURIERFT"
    title: ClassVar[str] = "FourierFT"
    formula: ClassVar[str] = "W + s·Re(ifft2(E)), E sparse"
    parts: ClassVar[Mapping[str, str]] = {"fourierft_spectrum": "spectrum"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "n_frequency": whole_number(1000, 1),
            "n_frequency_pattern": FREQUENCY_PATTERN,
            "scaling": finite_number(150.0),
            "random_loc_seed": seed_field(777),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"fourierft": FourierftMethod()}

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        shape = matrix_of_linear(module)
        count = expect_spectrum(module, allowed_counts(module.values))
        settings = spectrum_settings(module)
        # two complex copies of the delta; places of up to four sizes are kept
        working = 16 * prod(shape) + 32 * count
        yield PlannedUpdate("fourierft", ("spectrum",), settings, reach=WHOLE, working_bytes=working)


def allowed_counts(values: Mapping[str, Any]) -> set[int]:
    """Return how many coefficients a module may have by the config."""
    return {values["n_frequency"], *values["n_frequency_pattern"].values()}


def expect_spectrum(module: TargetModule, counts: set[int]) -> int:
    """Check the coefficients' number and return it.

    Raises:
        ShapeMismatchError: it is not one of `counts`, or larger than the base; MissingTensorError: there are none.
    """
    module.expect("spectrum", -1)
    (count,) = module.shapes["spectrum"]
    if count not in counts:
        expected = f"as many coefficients as the config says, {' or '.join(map(str, sorted(counts)[:8]))}"
        module.refuse("spectrum", expected, f"{count}")
    if count > prod(module.base_shape):
        module.refuse("spectrum", f"at most {prod(module.base_shape)} coefficients", f"{count}")
    return count


def spectrum_settings(module: TargetModule) -> dict[str, Setting]:
    """Return what the methods of sparse spectra need."""
    values = module.values
    return {
        "is_transposed": module.needs_transpose,
        "scaling": values["scaling"],
        "seed": values["random_loc_seed"],
    }
