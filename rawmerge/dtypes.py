"""The safetensors dtypes as one table; imports no torch.

Source: safetensors 0.8 `Dtype` (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

#: Other names that people have for dtypes.
_OTHER_NAMES: Final = {
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "double": "float64",
    "fp64": "float64",
    "f64": "float64",
}


def did_you_mean(name: object, choices: Collection[str]) -> str:
    """Return a question to put behind a refusal, where `name` is another name of one of the choices; else nothing.

    Example:
        >>> did_you_mean("torch.BF16", ["bfloat16"]), did_you_mean("int8", ["bfloat16"])
        ('; did you mean bfloat16?', '')
    """
    plain = str(name).lower().removeprefix("torch.")
    meant = _OTHER_NAMES.get(plain, plain)
    return f"; did you mean {meant}?" if meant in choices else ""


@dataclass(frozen=True, slots=True)
class StorageDtype:
    """How one tensor's elements lie on disk.

    Attributes:
        code: the name in a safetensors header, case-sensitive.
        bits: size of one element in bits.
        torch_name: attribute of the torch module for dtypes that rawmerge reads into tensors, else an empty string.
        is_mergeable: whether a delta may be added to a tensor stored this way (plain float, not packed or scaled).
    """

    code: str
    bits: int
    torch_name: str = ""
    is_mergeable: bool = False

    def byte_count(self, element_count: int) -> int:
        """Return the bytes that `element_count` elements take, or -1 when they do not fill whole bytes."""
        bits = self.bits * element_count
        return -1 if bits % 8 else bits // 8


DTYPES: Final = {
    dtype.code: dtype
    for dtype in (
        StorageDtype("BOOL", 8),
        StorageDtype("F4", 4),
        StorageDtype("F6_E2M3", 6),
        StorageDtype("F6_E3M2", 6),
        StorageDtype("U8", 8, "uint8"),
        StorageDtype("I8", 8, "int8"),
        StorageDtype("F8_E5M2", 8),
        StorageDtype("F8_E4M3", 8),
        StorageDtype("F8_E8M0", 8),
        StorageDtype("F8_E4M3FNUZ", 8),
        StorageDtype("F8_E5M2FNUZ", 8),
        StorageDtype("I16", 16, "int16"),
        StorageDtype("U16", 16),
        StorageDtype("F16", 16, "float16", is_mergeable=True),
        StorageDtype("BF16", 16, "bfloat16", is_mergeable=True),
        StorageDtype("I32", 32, "int32"),
        StorageDtype("U32", 32),
        StorageDtype("F32", 32, "float32", is_mergeable=True),
        StorageDtype("C64", 64),
        StorageDtype("F64", 64, "float64", is_mergeable=True),
        StorageDtype("I64", 64, "int64"),
        StorageDtype("U64", 64),
    )
}

#: What `--dtype` accepts, and the storage dtype it means.
OUTPUT_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

#: What `--dtype` accepts for the one that the base's config states.
AUTO_DTYPE: Final = "auto"

#: What `--compute-dtype` accepts.
COMPUTE_DTYPES: Final = ("float32", "float64")
