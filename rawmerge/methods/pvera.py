"""PVeRA: VeRA whose A makes a mean and a variance for each of the rank; a merge takes the mean.

Source: PEFT 0.21.2 `tuners/pvera/layer.py` `Linear.get_delta_weight`, `tuners/pvera/model.py`
`PveraModel._init_pvera_A_pvera_B`, whose `kaiming_uniform_` draws what VeRA's `_kaiming_init` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.vera import VeraKind


class PveraKind(VeraKind):
    """PVERA, probabilistic VeRA."""

    peft_type: ClassVar[str] = "PVERA"
    title: ClassVar[str] = "PVeRA"
    formula: ClassVar[str] = "W + (b*B)@(d*A), of d and A the half that makes the mean"
    parts: ClassVar[Mapping[str, str]] = {f"p{name}": role for name, role in VeraKind.parts.items()}
    shared: ClassVar[Mapping[str, str]] = {f"p{name}": role for name, role in VeraKind.shared.items()}
    fields: ClassVar[KindFields] = KindFields(
        followed=VeraKind.fields.followed,
        # noise is for forward passes; PEFT merges the mean whatever they say
        ignored=("pvera_dropout", "d_initial", "init_weights", "sample_at_inference", "generator_seed"),
        rank="r",
    )
    rows_per_rank: ClassVar[int] = 2
