"""Whether a merge of any kind of adapter is what PEFT makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from benchmarks.check_merge import Checkpoint, WrongResultError

#: Beside the adapter's own files: a few of the weights that PEFT's merge gives.
EXPECTED_FILE: Final = "expected.safetensors"


def check_kind(adapter: Path, base: Path, output: Path) -> None:
    """Compare those weights that PEFT's merge left beside the adapter.

    Raises:
        WrongResultError: one of them is the base's, or is off by more than a rounding of the tensor's largest value.
    """
    merged, before = Checkpoint(output), Checkpoint(base)
    with safe_open(adapter / EXPECTED_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            expected, found = file.get_tensor(name), merged.tensor(name)
            if torch.equal(found, before.tensor(name)):
                raise WrongResultError(f"{name}: equals the base")
            if found.dtype != expected.dtype or found.shape != expected.shape:
                raise WrongResultError(f"{name}: {found.dtype} {tuple(found.shape)}, not as PEFT's")
            off = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
            if not off <= torch.finfo(expected.dtype).eps:
                raise WrongResultError(f"{name}: off PEFT's merge by {off:.2g} of its largest value")
