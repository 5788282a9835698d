"""LLaMA-Factory's merge file, flat or in the nested form of its version 1, as an export job.

Source: LLaMA-Factory `hparams/parser.py`, `hparams/model_args.py`, `train/tuner.py` (`export_model`),
`model/adapter.py`, `examples/merge_lora/`, `examples/v1/train_lora/export_lora.yaml`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Final

from rawmerge.adapter_source import split_weight
from rawmerge.dtypes import OUTPUT_DTYPES, did_you_mean
from rawmerge.errors import quote
from rawmerge.exporting.export_job import KEPT_SHARDS, LEGACY_FORMAT, SAFETENSORS, ExportJob
from rawmerge.exporting.llamafactory_keys import KNOWN, REFUSED, idle_notes, nearest
from rawmerge.exporting.typed_keys import TypedKeys
from rawmerge.run_options import DEVICE_NAMES

TOOL: Final = "LLaMA-Factory"
NESTED: Final = "peft_config"
#: What version 1 calls a key, where that is not the flat form's name.
_V1_NAMES: Final = {"model": "model_name_or_path"}
#: Keys in `peft_config` that describe the training of an adapter.
_V1_IDLE: Final = frozenset(
    {"name", "r", "alpha", "lora_alpha", "dropout", "lora_dropout", "target_modules", "modules_to_save", "use_rslora"}
    | {"use_dora", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "rank", "bias"}
)
_STAGES: Final = ("pt", "sft", "rm", "ppo", "dpo", "kto")
_TOKEN_KEYS: Final = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
_AUTO: Final = "auto"
_DEFAULT_REVISION: Final = "main"


def is_nested(document: Mapping[str, Any]) -> bool:
    """Whether a file is in the nested form of LLaMA-Factory's version 1."""
    return NESTED in document or ("model" in document and "model_name_or_path" not in document)


def llamafactory_job(document: Mapping[str, Any]) -> ExportJob:
    """Return the job that a LLaMA-Factory file describes.

    Args:
        document: the file's table, overrides applied.

    Raises:
        RefusedError: with every key that is wrong, unknown, missing, or asks for what rawmerge does not do.
    """
    table, shown = _flat(document) if is_nested(document) else (dict(document), {})
    return _Reader(TypedKeys(table, shown), is_nested=is_nested(document)).job()


def _flat(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the flat form of a nested file, and what the file calls its keys."""
    nested = document.get(NESTED)
    inner = nested if isinstance(nested, dict) else {}
    table = {_V1_NAMES.get(key, key): value for key, value in document.items() if key != NESTED or nested is not inner}
    shown = {flat: name for name, flat in _V1_NAMES.items()}
    for key, value in inner.items():
        if key not in _V1_IDLE:
            table[key] = value
            shown[key] = f"{NESTED}.{key}"
    return table, shown


class _Reader:
    """Goes through one file's keys."""

    def __init__(self, keys: TypedKeys, *, is_nested: bool) -> None:
        self.keys = keys
        self.is_nested = is_nested
        self.notes: list[str] = []

    def job(self) -> ExportJob:
        self._check_names()
        keys = self.keys
        revision = keys.text("model_revision")
        job = ExportJob(
            tool=TOOL,
            base=_at_revision(keys.required("model_name_or_path", "the base: a folder or org/name"), revision),
            adapters=tuple(_at_revision(at, revision) for at in self._adapters()),
            output=keys.required("export_dir", "the folder to make", "add `export_dir: merged/`"),
            dtype=self._dtype(),
            max_shard_size=self._shard_size(),
            format=self._format(),
            device=self._device(),
            tokenizer="adapter",
            template="" if self.is_nested else keys.text("template"),
            default_system=keys.text("default_system") if keys.value("default_system") is not None else None,
            pads_left=True,
            has_value_head=keys.choice("stage", _STAGES, "sft") == "rm",
            added_tokens_by=tuple(self._token_keys()),
        )
        self._check_rest(job)
        keys.raise_problems()
        return replace(job, notes=(*self.notes, *self._template_notes(job), *idle_notes(keys.names)))

    def _check_names(self) -> None:
        for key in self.keys.names:
            if key not in KNOWN:
                guess = nearest(key)
                hint = f"did you mean {guess}?" if guess else "leave it out"
                self.keys.refuse(key, "a key of LLaMA-Factory's merge file", hint)
            elif key in REFUSED and self.keys.value(key) not in REFUSED[key].idle:
                self.keys.refuse(key, REFUSED[key].expected, REFUSED[key].hint)

    def _adapters(self) -> Iterator[str]:
        keys = self.keys
        found, folder = keys.texts("adapter_name_or_path"), keys.text("adapter_folder")
        if not found and keys.value("adapter_name_or_path") in (None, "", []):
            hint = "LLaMA-Factory only saves the model again then: copy it, or use its own export for another dtype"
            keys.refuse("adapter_name_or_path", "the adapter to merge", hint)
        yield from (self._in_folder(adapter, folder) for adapter in found) if folder else found

    def _in_folder(self, adapter: str, folder: str) -> str:
        """Return the folder in an adapter, with the weight behind its name; what is not on this machine is refused."""
        place = _without_weight(adapter)
        inner = str(PurePath(place) / folder)
        expected = f"a folder in {quote(place)} on this machine"
        if not _is_local(place):
            hint = f"fetch it (`hf download {place} --include '{folder}/*'`), and name the local folder"
            self.keys.refuse("adapter_folder", expected, hint)
        elif not _is_local(inner):
            self.keys.refuse("adapter_folder", expected, f"there is no {quote(inner)}: mend the key, or leave it out")
        return inner + adapter.removeprefix(place)

    def _dtype(self) -> str | None:
        meant = did_you_mean(self.keys.value("infer_dtype"), OUTPUT_DTYPES).removeprefix("; ")
        chosen = self.keys.choice("infer_dtype", (_AUTO, *OUTPUT_DTYPES), _AUTO, meant)
        return None if chosen == _AUTO else chosen

    def _shard_size(self) -> int | None:
        hint = "write 1 (GB), or use `rawmerge merge --max-shard-size`, which takes 512MiB too"
        gigabytes = self.keys.whole("export_size", "a whole number of gigabytes (of 10^9 bytes), at least 1", hint)
        if gigabytes is None and self.keys.value("export_size") is None:
            self.notes.append(KEPT_SHARDS)
        return None if gigabytes is None else gigabytes * 10**9

    def _format(self) -> str:
        if not self.keys.switch("export_legacy_format"):
            return SAFETENSORS
        self.notes.append(LEGACY_FORMAT)
        return "bin"

    def _device(self) -> str:
        device = self.keys.text("export_device") or "cpu"
        if device == _AUTO:
            self.notes.append(
                "export_device auto: computed on the CPU, with PEFT's bits there; `export_device=cuda` takes a GPU"
            )
            return "cpu"
        if not re.fullmatch(DEVICE_NAMES, device):
            self.keys.refuse("export_device", "cpu or auto (here also cuda, cuda:1, mps)")
        return device

    def _token_keys(self) -> Iterator[str]:
        self.keys.switch("resize_vocab")
        yield from (key for key in _TOKEN_KEYS if self.keys.value(key) not in (None, False, ""))

    def _check_rest(self, job: ExportJob) -> None:
        keys = self.keys
        if keys.choice("finetuning_type", ("lora", "oft", "freeze", "full"), "lora") in {"freeze", "full"}:
            hint = "what such a training leaves is a whole model, which needs no merge"
            keys.refuse("finetuning_type", "lora or oft, as there is an adapter", hint)
        is_remote = any(not _is_local(at) for at in (job.base, *job.adapters))
        if keys.text("cache_dir") and is_remote:
            keys.refuse("cache_dir", "none", "leave it out, and set HF_HUB_CACHE to this folder")

    def _template_notes(self, job: ExportJob) -> Iterator[str]:
        if job.default_system is not None and not job.template:
            yield "default_system: ignored, for without a template no Modelfile is written"


def _without_weight(adapter: str) -> str:
    try:
        return split_weight(adapter)[0]
    except ValueError:  # refused, by its reason, before the merge
        return adapter


def _is_local(name: str) -> bool:
    try:
        return os.path.lexists(Path(name).expanduser())
    except RuntimeError:  # `~name` of no known user
        return False


def _at_revision(name: str, revision: str) -> str:
    """Return a hub id with the revision of the file, before its weight; a path on this machine has none."""
    place = _without_weight(name)
    is_plain = not name or revision in {"", _DEFAULT_REVISION} or "@" in name
    return name if is_plain or _is_local(place) else f"{place}@{revision}{name.removeprefix(place)}"
