"""The merge record `rawmerge.json`: what the output was made from, and what became of every adapter tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from rawmerge._version import __version__
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import AdapterUse, InputFile, MergePlan
from rawmerge.versions import installed_version

RECORD_FORMAT: Final = "rawmerge-record-1"


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
        "adapters": [
            {
                "repo": plan.adapter_repo,
                "config_sha256": plan.adapter_config_sha256,
                "files": [{**_identity(file), "sha256": file_sha256(file)} for file in plan.adapter_files],
            }
        ],
        "history": [{"files": [{"sha256": digest}]} for digest in plan.history],
        "tensors": dict(counts),
        "adapter_tensors": [_account(use) for use in plan.adapter_uses],
        "notes": list(plan.notes),
    }
    return format_record(record)


def format_record(record: Mapping[str, Any]) -> str:
    """Return a record as text."""
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


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


def _device(options: MergeOptions, device: str) -> dict[str, str | bool]:
    kind = device.partition(":")[0]
    return {"device": kind} if kind != "cpu" and options.compute_dtype == "float32" else {}


def options_record(options: MergeOptions) -> dict[str, str | bool]:
    """Return the choices as the record has them."""
    return {
        "compute_dtype": options.compute_dtype,
        "dtype": options.output_dtype or "as stored",
        "vocab": options.vocab or "as stored",
        "tokenizer": options.tokenizer,
        "moe_lora_b_layout": options.moe_lora_b_layout or "as marked",
        "force": options.force,
    }


def _account(use: AdapterUse) -> dict[str, str | int]:
    """Return one row of the account; `of` is how many output tensors it concerns, numbers folded to `*`."""
    row: dict[str, str | int] = {"name": use.name, "use": use.use, "tensor": use.tensor_name}
    if use.count > 1:
        row["of"] = use.count
    if use.reason:
        row["reason"] = use.reason
    return row
