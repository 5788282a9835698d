"""The merge record `rawmerge.json`: what the output was made from, and what became of every adapter tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rawmerge._version import __version__
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_options import COMBINING, SAFETENSORS, SERIAL, MergeOptions
from rawmerge.merge_plan import AdapterInput, AdapterUse, InputFile, MergePlan
from rawmerge.versions import installed_version

RECORD_FORMAT: Final = "rawmerge-record-1"
_USUAL: Final = MergeOptions()


def record_text(plan: MergePlan, counts: Mapping[str, int], device: str = "cpu") -> str:
    """Return the merge record: the same text for the same inputs and options, whatever their folders.

    Args:
        plan: what is written.
        counts: output tensors by what became of them.
        device: where updates were computed; told only where that may change bits.
    """
    record: dict[str, Any] = {
        "format": RECORD_FORMAT,
        "versions": {"rawmerge": __version__, "torch": installed_version("torch")},
        "options": _device(plan.options, device) | options_record(plan.options),
        "base": {
            "repo": plan.base_repo,
            "config_sha256": plan.base_config_sha256,
            "shards": [_identity(file) for file in plan.base_files],
        },
        "adapters": list(map(_adapter, plan.adapters)),
        "history": [{"files": [{"sha256": digest}]} for digest in plan.history],
        "tensors": dict(counts),
        "adapter_tensors": list(_accounts(plan)),
        "notes": list(plan.notes),
    }
    return format_record(record)


def format_record(record: Mapping[str, Any]) -> str:
    """Return a record as text."""
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def _adapter(adapter: AdapterInput) -> dict[str, Any]:
    weight = {} if adapter.weight == 1 else {"weight": adapter.weight}
    return {
        "repo": adapter.repo,
        "config_sha256": adapter.config_sha256,
        "files": [{**_identity(file), "sha256": file_sha256(file)} for file in adapter.files],
        **weight,
    }


def _accounts(plan: MergePlan) -> Iterator[dict[str, str | int]]:
    """Yield the rows of the account; where there are several adapters, each says whose it is, from 1."""
    for place, adapter in enumerate(plan.adapters, 1):
        whose: dict[str, str | int] = {"adapter": place} if len(plan.adapters) > 1 else {}
        yield from (_account(use) | whose for use in adapter.uses)


def _identity(file: InputFile) -> dict[str, str | int]:
    return {"name": file.name, "bytes": file.byte_count, "header_sha256": file.header_sha256}


def file_sha256(file: InputFile) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        InputChangedError: it is shorter than planned; OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with OpenFiles() as files:
        for chunk in files.chunks(TensorSource(file.path, 0, file.byte_count, "U8", (file.byte_count,))):
            digest.update(chunk)
    return digest.hexdigest()


def _device(options: MergeOptions, device: str) -> dict[str, str | int | float]:
    kind = device.partition(":")[0]
    return {"device": kind} if kind != "cpu" and options.compute_dtype == "float32" else {}


def options_record(options: MergeOptions) -> dict[str, str | int | float]:
    """Return the choices as the record has them."""
    several: dict[str, str | int | float] = {"order": options.order} if options.order != SERIAL else {}
    several |= {"replaced_by": options.replaced_by} if options.replaced_by else {}
    several |= {"max_shard_size": options.max_shard_size} if options.max_shard_size else {}
    several |= {"format": options.format} if options.format != SAFETENSORS else {}
    several |= {"like": options.like} if options.like else {}
    several |= {name: getattr(options, name) for name in COMBINING if getattr(options, name) != getattr(_USUAL, name)}
    return several | {
        "compute_dtype": options.compute_dtype,
        "dtype": options.dtype or "as stored",
        "vocab": options.vocab or "as stored",
        "tokenizer": options.tokenizer,
        "moe_lora_b_layout": options.moe_lora_b_layout or "as marked",
        "force": options.force,
        "card": options.card,
    }


def _account(use: AdapterUse) -> dict[str, str | int]:
    """Return one row of the account; `of` is how many output tensors it concerns, numbers folded to `*`."""
    row: dict[str, str | int] = {"name": use.name, "use": use.use, "tensor": use.tensor_name}
    if use.count > 1:
        row["of"] = use.count
    if use.reason:
        row["reason"] = use.reason
    return row
