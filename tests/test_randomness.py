"""Drawn numbers are those of PEFT: the literals were made by PEFT 0.21.2 and torch 2.13, not by rawmerge.

Where one of these fails, torch draws other numbers than it did, and adapters that hold none of them lose their meaning.
"""

from __future__ import annotations

import math

import pytest
import torch

from rawmerge.methods.randomness import first_positions, generator_of, kaiming_uniform
from rawmerge.methods.waveft import wavelet_filters


def test_veras_stream_is_the_known_one() -> None:
    generator = generator_of(0)
    shared_a = kaiming_uniform((2, 3), 3, 0.0, torch.float32, generator)
    shared_b = kaiming_uniform((3, 2), 2, 0.0, torch.float32, generator)
    assert shared_a.tolist() == [
        [-0.010587962344288826, 0.75864577293396, -1.1639615297317505],
        [-1.040774941444397, -0.5446904897689819, 0.3792317807674408],
    ]
    assert shared_b.tolist() == [
        [-0.03431743383407593, 1.3733248710632324],
        [-0.15370918810367584, 0.4583223760128021],
        [-0.5234484076499939, -0.34046122431755066],
    ]


def test_randloras_stream_is_the_known_one() -> None:
    generator, slope = generator_of(0), math.sqrt(5)
    basis_a = kaiming_uniform((2, 1, 3), 3, slope, torch.bfloat16, generator)
    basis_b = kaiming_uniform((3, 1, 2), 2, slope, torch.bfloat16, generator)
    assert basis_a.flatten().tolist() == [
        -0.00433349609375,
        0.310546875,
        -0.474609375,
        -0.42578125,
        -0.22265625,
        0.1552734375,
    ]
    assert basis_b.flatten().tolist() == [-0.0140380859375, 0.5625, -0.06298828125, 0.1875, -0.2138671875, -0.138671875]


def test_streams_go_on_as_known() -> None:
    long = kaiming_uniform((50, 40), 40, 0.0, torch.float32, generator_of(0))
    assert long.flatten()[-3:].tolist() == [0.01516933273524046, -0.11763574928045273, 0.2918058931827545]
    assert torch.rand(2000, generator=generator_of(0))[-3:].tolist() == [
        0.519583523273468,
        0.3481329083442688,
        0.8767197728157043,
    ]


def test_positions_are_the_known_ones() -> None:
    assert first_positions(12, 12, 777).tolist() == [11, 7, 3, 8, 0, 2, 9, 6, 4, 10, 5, 1]
    positions = first_positions(5, 10**6, 777)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [685735, 483336, 614369, 115267, 445443]
    assert first_positions(10**6, 10**6, 777)[-3:].tolist() == [569749, 621082, 896895]


# PEFT's coif4 is not orthonormal: not PyWavelets' filter, but the one that PEFT trains with
@pytest.mark.parametrize("family", sorted(wavelet_filters().keys() - {"coif4"}))
def test_filters_are_orthonormal(family: str) -> None:
    low = torch.tensor(wavelet_filters()[family], dtype=torch.float64)
    assert float(low.sum()) == pytest.approx(math.sqrt(2), abs=1e-6)
    for shift in range(0, len(low), 2):
        product = float(low[: len(low) - shift] @ low[shift:])
        assert product == pytest.approx(float(shift == 0), abs=1e-6)
