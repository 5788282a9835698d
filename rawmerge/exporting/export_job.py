"""What a merge file asks for, as a value, and the plain command that it stands for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Final

from rawmerge.byte_sizes import size_text

SERIAL = "serial"
LIKE: Final = "llamafactory"
#: What LLaMA-Factory takes where its file does not say.
SHARD_BYTES: Final = 5 * 10**9
KEPT_SHARDS: Final = "export_size is not given: shards stay those of the base (LLaMA-Factory cuts them at 5 GB)"
SAFETENSORS = "safetensors"
LEGACY_FORMAT: Final = (
    "export_legacy_format: pytorch_model.bin is written, as by transformers 4; version 5 ignores the key, and writes "
    "safetensors"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One merge that another tool's file describes.

    Attributes:
        tool: whose file it is: `LLaMA-Factory`, `axolotl` or `mergekit`.
        base: directory, safetensors file, or hub id `org/name[@revision]`.
        adapters: what is merged into it, in this order, each a directory, file or hub id.
        output: the directory to make.
        dtype: `float32`, `bfloat16` or `float16` for all float tensors; None for each tensor's own.
        max_shard_size: largest shard in bytes, None for the base's shards.
        format: what the shards are: `safetensors`, or `bin` for files of `torch.save`.
        like: `llamafactory` for the tensors that it would save with the installed transformers; empty for the base's.
        order: `serial`: each adapter is added to the rounded result of the one before.
        device: where updates are computed.
        tokenizer: whose tokenizer the output gets, `base` or `adapter`.
        template: LLaMA-Factory's name of the chat template that `Modelfile` follows; empty for no such file.
        default_system: the system message in it, None for the template's own.
        pads_left: whether `tokenizer_config.json` gets `padding_side: left`, for generation.
        has_value_head: whether a reward model's value head is copied from the last adapter.
        added_tokens_by: the keys that ask for new tokens, whose rows the adapter must bring.
        notes: what became of keys that change nothing here.
    """

    tool: str
    base: str
    adapters: tuple[str, ...]
    output: str
    dtype: str | None = None
    max_shard_size: int | None = None
    format: str = SAFETENSORS
    like: str = ""
    order: str = SERIAL
    device: str = "cpu"
    tokenizer: str = "base"
    template: str = ""
    default_system: str | None = None
    pads_left: bool = False
    has_value_head: bool = False
    added_tokens_by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_llamafactory(self) -> ExportJob:
        """Return the job whose weights are, byte for byte, those that LLaMA-Factory's export would save."""
        told = (KEPT_SHARDS, LEGACY_FORMAT)
        notes = [note for note in self.notes if note not in told]
        if self.format != SAFETENSORS:
            notes.append("export_legacy_format: ignored, as transformers 5 does; safetensors are written")
        size = self.max_shard_size or SHARD_BYTES
        return replace(self, like=LIKE, format=SAFETENSORS, max_shard_size=size, notes=tuple(notes))

    def command(self, *, overwrite: bool = False) -> str:
        """Return the plain merge, as a line for a shell; it makes all but what only an export writes."""
        words = ["rawmerge", "merge", *map(_path, (self.base, *self.adapters)), "--output", self.output]
        words += ["--order", self.order] if len(self.adapters) > 1 else []
        words += ["--dtype", self.dtype] if self.dtype else []
        words += ["--like", self.like] if self.like else []
        words += ["--max-shard-size", size_text(self.max_shard_size)] if self.max_shard_size else []
        words += ["--format", self.format] if self.format != SAFETENSORS else []
        words += ["--tokenizer", self.tokenizer] if self.tokenizer != "base" else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--overwrite"] if overwrite else []
        return shlex.join(words)


def _path(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name
