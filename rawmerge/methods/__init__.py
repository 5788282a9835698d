"""One file per adapter kind: what it is called, what its files hold, and pure tensor maths."""

from __future__ import annotations

from typing import Final

from rawmerge.methods.adalora import AdaloraKind
from rawmerge.methods.beft import BeftKind
from rawmerge.methods.boft import BoftKind
from rawmerge.methods.c3a import C3aKind
from rawmerge.methods.deft import DeftKind
from rawmerge.methods.delora import DeloraKind
from rawmerge.methods.fourierft import FourierftKind
from rawmerge.methods.glora import GloraKind
from rawmerge.methods.gralora import GraloraKind
from rawmerge.methods.hira import HiraKind
from rawmerge.methods.hra import HraKind
from rawmerge.methods.ia3 import Ia3Kind
from rawmerge.methods.interface import AdapterKind, Method
from rawmerge.methods.kohya import KohyaKind
from rawmerge.methods.ln_tuning import LnTuningKind
from rawmerge.methods.loha import LohaKind
from rawmerge.methods.lokr import LokrKind
from rawmerge.methods.lora_kind import LoraKind
from rawmerge.methods.miss import BoneKind, MissKind
from rawmerge.methods.mlx import MlxKind
from rawmerge.methods.oft import OftKind
from rawmerge.methods.osf import OsfKind
from rawmerge.methods.peanut import PeanutKind
from rawmerge.methods.psoft import PsoftKind
from rawmerge.methods.pvera import PveraKind
from rawmerge.methods.randlora import RandloraKind
from rawmerge.methods.road import RoadKind
from rawmerge.methods.shira import ShiraKind
from rawmerge.methods.supertuning import SupertuningKind
from rawmerge.methods.tinylora import TinyloraKind
from rawmerge.methods.trainable_tokens import TrainableTokensKind
from rawmerge.methods.unilora import UniloraKind
from rawmerge.methods.vblora import VbloraKind
from rawmerge.methods.vera import VeraKind
from rawmerge.methods.waveft import WaveftKind

_KINDS: Final[tuple[AdapterKind, ...]] = (
    LoraKind(),
    AdaloraKind(),
    BeftKind(),
    BoftKind(),
    BoneKind(),
    C3aKind(),
    DeftKind(),
    DeloraKind(),
    FourierftKind(),
    GloraKind(),
    GraloraKind(),
    HiraKind(),
    HraKind(),
    Ia3Kind(),
    KohyaKind(),
    LnTuningKind(),
    LohaKind(),
    LokrKind(),
    MissKind(),
    MlxKind(),
    OftKind(),
    OsfKind(),
    PeanutKind(),
    PsoftKind(),
    PveraKind(),
    RandloraKind(),
    RoadKind(),
    ShiraKind(),
    SupertuningKind(),
    TinyloraKind(),
    TrainableTokensKind(),
    UniloraKind(),
    VbloraKind(),
    VeraKind(),
    WaveftKind(),
)

#: Every kind that can be merged, by `peft_type`.
ADAPTER_KINDS: Final[dict[str, AdapterKind]] = {kind.peft_type: kind for kind in _KINDS}
#: What plans name to compute with.
METHODS: Final[dict[str, Method]] = {name: method for kind in _KINDS for name, method in kind.methods.items()}
