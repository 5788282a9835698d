"""The index of a sharded checkpoint, `model.safetensors.index.json`: which tensor lies in which shard.

Source: transformers 5.23 `modeling_utils.save_pretrained` (layout) and huggingface_hub 2.4 `load_torch_model`
(which shard names may be trusted).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Final

from rawmerge.errors import CheckpointError, Problem
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

INDEX_NAME: Final = "model.safetensors.index.json"
PICKLE_INDEX_NAME: Final = "pytorch_model.bin.index.json"
MAX_INDEX_BYTES: Final = 128 * 2**20
SHARD_SUFFIX: Final = ".safetensors"
PICKLE_SUFFIX: Final = ".bin"
_WINDOWS_DEVICES: Final = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"
}


@dataclass(frozen=True, slots=True)
class WeightMap:
    """A checked index.

    Attributes:
        shard_by_tensor: tensor name to shard file name, as the file lists them.
        metadata: the index's own table: `total_size` in bytes and whatever else the author wrote.
    """

    shard_by_tensor: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def shard_names(self) -> tuple[str, ...]:
        """All shard file names, sorted."""
        return tuple(sorted(set(self.shard_by_tensor.values())))


def is_safe_file_name(name: str) -> bool:
    """Whether `name` is one plain file name on every system: no folder, drive, device, stream or `..`."""
    plain = name == unicodedata.normalize("NFC", name) and name.isprintable() and name.strip(" .") == name
    single = not set(name) & set('/\\:*?"<>|') and len(PureWindowsPath(name).parts) == 1
    return plain and single and bool(name) and name.split(".")[0].rstrip().casefold() not in _WINDOWS_DEVICES


def parse_weight_map(raw: bytes, path: str, suffix: str = SHARD_SUFFIX) -> WeightMap:
    """Return the checked index, of shards whose names end so.

    Raises:
        CheckpointError: not strict JSON, no `weight_map`, or a shard name that is no plain file name.
    """
    try:
        document = parse_json_object(raw)
    except StrictJsonError as error:
        raise _broken(path, "an index of strict JSON", str(error)) from error
    mapping, metadata = document.get("weight_map"), document.get("metadata") or {}
    if not isinstance(mapping, dict) or not mapping or not isinstance(metadata, dict):
        raise _broken(path, "a table 'weight_map' and a table 'metadata'", str(sorted(document))[:120])
    _check_shard_names(mapping.values(), path, suffix)
    return WeightMap(mapping, metadata)


def format_weight_map(weight_map: WeightMap) -> str:
    """Return the index's text as transformers writes it: sorted, two spaces, a newline at the end."""
    document = {"metadata": dict(weight_map.metadata), "weight_map": dict(weight_map.shard_by_tensor)}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _check_shard_names(names: Collection[object], path: str, suffix: str) -> None:
    unplain = [name for name in names if not isinstance(name, str)]
    texts = sorted({name for name in names if isinstance(name, str)})
    unplain += [name for name in texts if not is_safe_file_name(name) or not name.endswith(suffix)]
    if unplain:
        raise _broken(path, f"shard names to be plain *{suffix} file names", ascii(unplain[0])[:120])
    unique: dict[str, str] = {}
    for name in texts:
        twin = unique.setdefault(name.casefold(), name)
        if twin != name:
            raise _broken(path, "shard names that differ in more than case", f"{twin!r} and {name!r}")


def _broken(path: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(Problem(subject=path, expected=expected, found=found))
