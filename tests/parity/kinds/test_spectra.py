"""FourierFT and WaveFT against PEFT, and against their definitions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.methods.waveft import wavelet_filters
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

CONFIGS = {"fourierft": "FourierFTConfig", "waveft": "WaveFTConfig"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNT, SEED, SCALING = 90, 12, 7.5


def linear(kind: str, **fields: Any) -> kinds.Case:
    options: dict[str, Any] = {"n_frequency": COUNT, "random_loc_seed": SEED, "scaling": SCALING}
    options |= {"target_modules": list(kinds.LLAMA_TARGETS)}
    return kinds.Case(lambda: getattr(peft, CONFIGS[kind])(**{**options, **fields}))


def conv1d(kind: str, **fields: Any) -> kinds.Case:
    case = linear(kind, target_modules=list(kinds.GPT2_TARGETS), **fields)
    return replace(case, model=tiny.gpt2, targets=kinds.GPT2_TARGETS)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", [linear, conv1d])
@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_is_bit_equal(tmp_path: Path, kind: str, layout: Callable[..., kinds.Case], dtype: torch.dtype) -> None:
    kinds.check_merge(layout(kind), tmp_path, dtype)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, kind: str, model: Callable[[], Any]) -> None:
    layout = linear if model is tiny.tall_llama else conv1d
    kinds.check_merge(replace(layout(kind, n_frequency=40_000), model=model), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("kind", CONFIGS)
def test_patterns_are_followed(tmp_path: Path, kind: str) -> None:
    kinds.check_merge(linear(kind, n_frequency_pattern={"q_proj": 50}), tmp_path, torch.bfloat16)


@pytest.mark.parametrize(
    "fields",
    [{"use_idwt": False}, {"proportional_parameters": True}],
    ids=["as-it-is", "proportional"],
)
@pytest.mark.parametrize("layout", [linear, conv1d])
def test_options_of_waveft_are_followed(
    tmp_path: Path, layout: Callable[..., kinds.Case], fields: dict[str, Any]
) -> None:
    kinds.check_merge(layout("waveft", **fields), tmp_path, torch.float32)


@pytest.mark.parametrize("family", ["db2", "db5", "db10", "sym2", "sym7", "coif1", "coif4"])
@pytest.mark.parametrize("layout", [linear, conv1d])
def test_other_wavelets_are_bit_equal(tmp_path: Path, layout: Callable[..., kinds.Case], family: str) -> None:
    # an odd size is padded to an even one
    model = (lambda: tiny.llama(intermediate_size=75)) if layout is linear else tiny.gpt2
    kinds.check_merge(replace(layout("waveft", wavelet_family=family), model=model), tmp_path, torch.float32)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
def test_other_wavelets_of_several_tiles_are_within_the_tolerance(tmp_path: Path, model: Callable[[], Any]) -> None:
    layout = linear if model is tiny.tall_llama else conv1d
    case = layout("waveft", wavelet_family="db4", n_frequency=40_000)
    kinds.check_merge(replace(case, model=model, tolerance=1e-6), tmp_path, torch.float32)


def test_filters_are_those_of_peft_and_all_that_it_can_merge() -> None:
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import _WAVELET_COEFFS, Wavelet

    known = {name: Wavelet(name).rec_lo for name in _WAVELET_COEFFS}
    usable = {name: low for name, low in known.items() if WAVELET_REDUCTIONS[name] == (len(low) - 2, len(low) - 2)}
    assert wavelet_filters() == usable
    assert known.keys() - usable.keys() == {"coif5"}


@pytest.mark.parametrize("family", ["db11", "coif5", "haar"])
def test_other_wavelets_are_refused_by_name(tmp_path: Path, family: str) -> None:
    base, adapter = kinds.write_case(linear("waveft"), tmp_path, torch.float32)
    kinds.edit_config(adapter, wavelet_family=family)
    with pytest.raises(rawmerge.RefusedError, match=family):
        rawmerge.plan_merge(base, adapter)


def test_float64_of_fourierft_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        spectrum = own.get(f"base_model.model.{name.removesuffix('weight')}fourierft_spectrum")
        if spectrum is None:
            return None
        rows, columns = places(weight)
        outputs, inputs = (torch.arange(size, dtype=torch.float64) for size in weight.shape)
        delta = torch.zeros_like(weight)
        for value, row, column in zip(spectrum, rows, columns, strict=True):
            turns = outputs[:, None] * row / weight.shape[0] + inputs * column / weight.shape[1]
            delta += value * torch.cos(2 * math.pi * turns)
        return weight + delta / weight.numel() * SCALING

    kinds.check_float64(linear("fourierft"), tmp_path, formula)


def test_float64_of_waveft_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        spectrum = own.get(f"base_model.model.{name.removesuffix('weight')}waveft_spectrum")
        if spectrum is None:
            return None
        delta = torch.zeros_like(weight)
        half_rows, half_columns = weight.shape[0] // 2, weight.shape[1] // 2
        for value, row, column in zip(spectrum, *places(weight), strict=True):
            # Haar's wavelet: half the value on 2 x 2 elements. PEFT's quarters on the right change sign down the rows,
            # those at the bottom along the columns
            row_band, top = divmod(row, half_rows)
            column_band, left = divmod(column, half_columns)
            signs = torch.tensor(
                [[1.0, (-1.0) ** row_band], [(-1.0) ** column_band, (-1.0) ** (row_band + column_band)]]
            )
            delta[2 * top : 2 * top + 2, 2 * left : 2 * left + 2] += value / 2 * signs
        return weight + delta * SCALING

    kinds.check_float64(linear("waveft"), tmp_path, formula)


def places(weight: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the rows and columns of the coefficients."""
    flat = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(SEED))[:COUNT].tolist()
    return [place // weight.shape[1] for place in flat], [place % weight.shape[1] for place in flat]


@pytest.mark.parametrize("kind", CONFIGS)
def test_damage_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    kinds.check_damage(linear(kind), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_more_coefficients_than_elements_are_refused(tmp_path: Path, kind: str) -> None:
    base, adapter = kinds.write_case(linear(kind), tmp_path, torch.float32)
    kinds.edit_config(adapter, n_frequency=2**31)
    with pytest.raises(rawmerge.RefusedError, match="spectrum"):
        rawmerge.plan_merge(base, adapter)
