"""One file per adapter kind: what it is called, what its files hold, and pure tensor maths."""

from __future__ import annotations

from typing import Final

from rawmerge.methods.ia3 import Ia3Kind
from rawmerge.methods.interface import AdapterKind, Method
from rawmerge.methods.loha import LohaKind
from rawmerge.methods.lora_kind import LoraKind
from rawmerge.methods.osf import OsfKind

_KINDS: Final[tuple[AdapterKind, ...]] = (
    LoraKind(),
    Ia3Kind(),
    LohaKind(),
    OsfKind(),
)

#: Every kind that can be merged, by `peft_type`.
ADAPTER_KINDS: Final[dict[str, AdapterKind]] = {kind.peft_type: kind for kind in _KINDS}
#: What plans name to compute with.
METHODS: Final[dict[str, Method]] = {name: method for kind in _KINDS for name, method in kind.methods.items()}
