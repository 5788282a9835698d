"""The kinds of adapters whose cost is compared: how PEFT makes them, and why some of them cost more than plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

#: All seven linear kinds of a Llama layer.
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SVD: Final = "a singular value decomposition of each base weight, as PEFT does at loading"
QR: Final = "a QR decomposition of each base weight, as PEFT does at loading"
ROTATION: Final = "W times an in x in matrix, as PEFT forms it: in / r times the work of LoRA's product"
TRANSFORM: Final = "a Fourier or wavelet transform of each weight's size"
TWO_PASSES: Final = "norms first: the base is read and the product made twice"


@dataclass(frozen=True, slots=True)
class KindCase:
    """One kind with its settings.

    Attributes:
        name: what the table and the options call it.
        config: the name of PEFT's config class.
        fields: what it is called with, besides the target modules.
        variant: the field of LoraConfig that holds a variant's own config, and the name of that class.
        spread: standard deviation of what is added to the initial values, so that the adapter does something.
        options: of `rawmerge merge`, as keyword arguments of `merge_adapter`.
        reason: why it costs more than plain LoRA; empty where it does about the same.
    """

    name: str
    config: str
    fields: Mapping[str, object] = field(default_factory=dict)
    variant: tuple[str, str] | None = None
    spread: float = 0.02
    options: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""

    @property
    def adapter_name(self) -> str:
        """The adapter's folder; cases that differ in options only share it."""
        return self.name.partition(",")[0].replace(" ", "-").replace("=", "")


def lora(
    name: str, rank: int = 16, reason: str = "", options: Mapping[str, object] | None = None, **fields: object
) -> KindCase:
    """Return a LoRA or one of its variants."""
    return KindCase(name, "LoraConfig", {"r": rank, "lora_alpha": 24, **fields}, options=options or {}, reason=reason)


#: The first is what the others are compared with.
KIND_CASES: Final[Sequence[KindCase]] = (
    lora("LoRA r=16"),
    lora("LoRA r=16, without kernel", options={"without": ("kernel",)}),
    lora(
        "LoRA r=16, float64",
        options={"compute_dtype": "float64"},
        reason="float64 sums: twice the bytes and half the lanes",
    ),
    lora("LoRA r=64", 64),
    lora("LoRA r=256", 256, "16 times the multiplications of r=16"),
    lora("DoRA r=16", use_dora=True, reason=TWO_PASSES),
    lora("DoRA r=256", 256, f"16 times the multiplications of r=16; {TWO_PASSES}", use_dora=True),
    lora("PiSSA r=16", init_lora_weights="pissa", reason=SVD),
    lora("OLoRA r=16", init_lora_weights="olora", reason=QR),
    KindCase("KaSA r=16", "LoraConfig", {"r": 16, "lora_alpha": 24}, ("kasa_config", "KasaConfig"), reason=SVD),
    KindCase("AdaLoRA r=16", "AdaLoraConfig", {"init_r": 16, "lora_alpha": 24, "total_step": 100}, spread=0.1),
    KindCase("BOFT b=8", "BOFTConfig", {"boft_block_size": 8}, reason=ROTATION),
    KindCase("C3A b=64", "C3AConfig", {"block_size": 64}, reason=TRANSFORM),
    KindCase("DEFT r=16", "DeftConfig", {"r": 16}),
    KindCase("DeLoRA r=16", "DeloraConfig", {"r": 16}, reason="norms of the base's columns: the base is read twice"),
    KindCase("FourierFT n=1000", "FourierFTConfig", {"n_frequency": 1000}, spread=20.0, reason=TRANSFORM),
    KindCase("GLoRA r=16", "GloraConfig", {"r": 16}),
    KindCase("GraLoRA r=16", "GraloraConfig", {"r": 16, "gralora_k": 2}),
    KindCase("HiRA r=16", "HiraConfig", {"r": 16}, spread=0.3),
    KindCase("HRA r=8", "HRAConfig", {"r": 8}, reason=ROTATION),
    KindCase("IA3", "IA3Config", {"feedforward_modules": ["down_proj"]}, spread=0.1),
    KindCase("LoHa r=16", "LoHaConfig", {"r": 16, "alpha": 24}, spread=0.1),
    KindCase("LoKr r=16", "LoKrConfig", {"r": 16, "alpha": 24}, spread=0.1),
    KindCase("MiSS r=16", "MissConfig", {"r": 16}),
    KindCase("OFT b=32", "OFTConfig", {"oft_block_size": 32}, reason=ROTATION),
    KindCase("OSF", "OSFConfig", reason=SVD),
    KindCase("PEANuT r=16", "PeanutConfig", {"r": 16}),
    KindCase("PSOFT r=16", "PsoftConfig", {"r": 16, "psoft_alpha": 16}, reason=SVD),
    KindCase("PVeRA r=16", "PveraConfig", {"r": 16}, spread=0.1),
    KindCase("RandLoRA r=16", "RandLoraConfig", {"r": 16}, reason="a product of full rank: in / 16 bases of rank 16"),
    KindCase("RoAD", "RoadConfig", {"group_size": 64}),
    KindCase("SHiRA r=16", "ShiraConfig", {"r": 16}),
    KindCase("Super-Tuning", "SupertuningConfig", {"sparsity": 0.99}),
    KindCase("TinyLoRA r=2", "TinyLoraConfig", {"r": 2, "u": 16}, spread=0.2),
    KindCase("Uni-LoRA r=4", "UniLoraConfig", {"r": 4, "save_indices": True}, spread=1.0),
    KindCase("VB-LoRA r=4", "VBLoRAConfig", {"r": 4, "vector_length": 64, "num_vectors": 90}, spread=0.1),
    KindCase("VeRA r=256", "VeraConfig", {"r": 256}, spread=0.1, reason="rank 256, whose factors are drawn anew"),
    KindCase("WaveFT n=1000", "WaveFTConfig", {"n_frequency": 1000}, spread=20.0, reason=TRANSFORM),
)
