"""One file per adapter kind: what it is called, what its files hold, and pure tensor maths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Final, TypeVar

from rawmerge.formats.foreign_adapters import KOHYA, MLX
from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.interface import AdapterKind, Method

#: PEFT's kinds, by `peft_type`, to their classes.
_OF_PEFT: Final = {
    "LORA": "lora_kind.LoraKind",
    "ADALORA": "adalora.AdaloraKind",
    "BEFT": "beft.BeftKind",
    "BOFT": "boft.BoftKind",
    "BONE": "miss.BoneKind",
    "C3A": "c3a.C3aKind",
    "DEFT": "deft.DeftKind",
    "DELORA": "delora.DeloraKind",
    "FOURIERFT": "fourierft.FourierftKind",
    "GLORA": "glora.GloraKind",
    "GRALORA": "gralora.GraloraKind",
    "HIRA": "hira.HiraKind",
    "HRA": "hra.HraKind",
    "IA3": "ia3.Ia3Kind",
    "LN_TUNING": "ln_tuning.LnTuningKind",
    "LOHA": "loha.LohaKind",
    "LOKR": "lokr.LokrKind",
    "MISS": "miss.MissKind",
    "OFT": "oft.OftKind",
    "OSF": "osf.OsfKind",
    "PEANUT": "peanut.PeanutKind",
    "PSOFT": "psoft.PsoftKind",
    "PVERA": "pvera.PveraKind",
    "RANDLORA": "randlora.RandloraKind",
    "ROAD": "road.RoadKind",
    "SHIRA": "shira.ShiraKind",
    "SUPERTUNING": "supertuning.SupertuningKind",
    "TINYLORA": "tinylora.TinyloraKind",
    "TRAINABLE_TOKENS": "trainable_tokens.TrainableTokensKind",
    "UNILORA": "unilora.UniloraKind",
    "VBLORA": "vblora.VbloraKind",
    "VERA": "vera.VeraKind",
    "WAVEFT": "waveft.WaveftKind",
}
#: Those whose files are not PEFT's, so that no `adapter_config.json` names them.
_FOREIGN: Final = {KOHYA: "kohya.KohyaKind", MLX: "mlx.MlxKind"}
_HOMES: Final = {**_OF_PEFT, **_FOREIGN}


_T = TypeVar("_T")


class _OnDemand(Mapping[str, _T]):
    """Imports a kind when it is asked for: a merge needs one of them, and all take a tenth of a small merge's start."""

    def __init__(self, homes: Mapping[str, str], value: Callable[[AdapterKind], _T]) -> None:
        self._homes = homes
        self._value = value

    def __getitem__(self, peft_type: str) -> _T:
        return self._value(_load(self._homes[peft_type]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class _Methods(Mapping[str, Method]):
    """The methods of all kinds, of which no more are imported than it takes to find one; LoRA's come first."""

    def __getitem__(self, name: str) -> Method:
        for kind in ADAPTER_KINDS.values():
            if name in kind.methods:
                return kind.methods[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter({name: None for kind in ADAPTER_KINDS.values() for name in kind.methods})

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _load(home: str) -> AdapterKind:
    module, name = home.split(".")
    kind: AdapterKind = getattr(import_module(f"{__name__}.{module}"), name)()
    return kind


#: Every kind that can be merged, by `peft_type`.
ADAPTER_KINDS: Final[Mapping[str, AdapterKind]] = _OnDemand(_HOMES, lambda kind: kind)
#: What an `adapter_config.json` may hold, by `peft_type`.
KIND_FIELDS: Final[Mapping[str, KindFields]] = _OnDemand(_OF_PEFT, lambda kind: kind.fields)
#: What plans name to compute with.
METHODS: Final[Mapping[str, Method]] = _Methods()
