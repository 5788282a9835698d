"""LN tuning: a norm's parameters, replaced by the trained ones.

Source: PEFT 0.21.2 `tuners/ln_tuning/layer.py` `LNTuningLayer.merge`: the trained copy of the module takes its place,
its buffers included. The tensors are matched as those of modules in `modules_to_save` are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.interface import AdapterKind, PlannedUpdate, TargetModule

#: Parameters, and buffers, of the norms that torch and transformers have.
_TENSORS: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class LnTuningKind(AdapterKind):
    """LN_TUNING, norms alone."""

    peft_type: ClassVar[str] = "LN_TUNING"
    title: ClassVar[str] = "LN tuning"
    formula: ClassVar[str] = "the trained weight and bias"
    modules: ClassVar[str] = "norms"
    parts: ClassVar[Mapping[str, str]] = {f"ln_tuning_layers.{name}": f"saved_copy:{name}" for name in _TENSORS}
    fields: ClassVar[KindFields] = KindFields()

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:  # noqa: ARG002  # every tensor replaces one whole
        """Yield nothing: no tensor of this kind changes a weight, all replace one."""
        return ()
