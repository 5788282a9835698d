"""What is fuzzed: each target takes bytes that a stranger could have written, and says what must hold then."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors

from fuzzing import checkpoints, named_only, seeds
from fuzzing.mutators import Mutator, json_mutator, pickle_mutator
from fuzzing.workplace import CONFIG, WEIGHTS, Workplace, WrongError, check_text
from rawmerge.api import inspect_path, plan_merge, verify_merge
from rawmerge.consuming.journal import JOURNAL_NAME, read_journal
from rawmerge.errors import ShardFormatError
from rawmerge.formats.patterns import MAX_CHARACTERS, first_match, may_explode
from rawmerge.formats.shard_header import parse_header_length, parse_shard_header
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.base_checkpoint import read_base
from rawmerge.inputs.tensor_source import read_pickle_file
from rawmerge.merge_plan import MergePlan
from rawmerge.output.manifest import MANIFEST_NAME, parse_manifest
from rawmerge.plan_json import format_plan, parse_plan
from rawmerge.report import error_text, inspection_text, plan_text, verification_text
from rawmerge.run import run_plan

#: Where rawmerge refuses what the safetensors library reads, as `rawmerge/formats/shard_header.py` says.
STRICTER: Final = re.compile(
    r"occurs twice|to have dtype, shape and|list of sizes|countable shape|64 dimensions|4096 characters"
)
#: The pickle protocol that torch's safe reader knows.
TORCH_PROTOCOL: Final = 2


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        check: reads the input; raises whatever is not a documented refusal, or `WrongError`.
        seeds: returns first inputs.
        mutator: how inputs are changed; None for libFuzzer's own way.
    """

    check: Callable[[Workplace, bytes], None]
    seeds: Callable[[Path], list[bytes]]
    mutator: Callable[[list[bytes]], Mutator] | None = None


def _plan(at: Workplace, base: Path, size: int, **options: Any) -> MergePlan | None:
    """Plan a merge; what comes out must be shown, and come back from JSON as it is."""
    plan: MergePlan | None = at.run(size, lambda: plan_merge(base, at.adapter, **options))
    if plan is not None:
        text = at.run(100 * size, lambda: plan_text(plan))
        check_text(text, size)
        if parse_plan(format_plan(plan).encode().decode()) != plan:
            raise WrongError("another plan came back from JSON")
    return plan


def check_header(at: Workplace, data: bytes) -> None:
    """Compare with the safetensors library: a whole file, or a header for which one is made."""
    content = _with_data(data) if data[:1] in {b"{", b" "} else data
    ours: dict[str, Any] | str
    try:
        ours = _our_tensors(at, content)
    except ShardFormatError as error:
        check_text(error_text(error), len(data))
        ours = str(error)
    try:
        read: Any = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError) as error:  # UnicodeDecodeError too
        if isinstance(ours, dict):
            raise WrongError(f"the library refuses what we read: {error}") from error
        return
    if isinstance(ours, str):
        if not STRICTER.search(ours):
            raise WrongError(f"the library reads what we refuse: {ours}")
        return
    theirs = {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in read}
    if ours != theirs:
        raise WrongError(f"other tensors than the library's: {ours!r:.400} and {theirs!r:.400}")


def _our_tensors(at: Workplace, content: bytes) -> dict[str, Any]:
    with at.limits.hold(len(content)):
        length = parse_header_length(content[:8], len(content), "file")
        header = parse_shard_header(content[8 : 8 + length], len(content) - 8 - length, "file")
    data = content[header.data_start :]
    return {entry.name: (entry.dtype, entry.shape, data[entry.start : entry.end]) for entry in header.entries}


def _with_data(text: bytes) -> bytes:
    """Return a file with this header and as many bytes of data as its largest offset below 4096."""
    offsets = [int(number) for number in re.findall(rb"(?<![0-9])([0-9]{1,4})\s*\]", text)]
    size = max((offset for offset in offsets if offset < 4096), default=0)
    return struct.pack("<Q", len(text)) + text + bytes(number % 251 for number in range(size))


def check_index(at: Workplace, data: bytes) -> None:
    """Read a base whose index is the input; no shard may be a path."""
    (at.tied / INDEX_NAME).write_bytes(data)
    found = at.run(len(data), lambda: read_base(at.tied))
    if found and any(shard.path.parent != at.tied for shard in found.shards):
        raise WrongError("a shard that is elsewhere")
    at.run(len(data), lambda: inspection_text(inspect_path(at.tied)))


def check_config(at: Workplace, data: bytes) -> None:
    """Plan a merge into a base with this config, in which the config is edited in every way there is."""
    for base in (at.base, at.tied):
        (base / "config.json").write_bytes(data)
    if not (at.adapter / "tied").exists():
        at.set_adapter(seeds.lora_config(["embed_tokens"]), seeds.embedding_shapes())
        (at.adapter / "tied").touch()
    for base in (at.base, at.tied):
        plan = _plan(at, base, len(data), dtype="float16", force=True)
        for file in plan.written_files if plan else ():
            if file.name.endswith(".json"):
                json.loads(file.text)


def check_adapter_config(at: Workplace, data: bytes) -> None:
    """Plan a merge of a LoRA with this config."""
    (at.adapter / CONFIG).write_bytes(data)
    _plan(at, at.base, len(data))


def check_adapter(at: Workplace, data: bytes) -> None:
    """Plan a merge of an adapter that the input describes: its config, and its tensors as name to [dtype, shape]."""
    try:
        document = json.loads(data)
        config, tensors = document.get("config"), document["tensors"]
        raw = None if config is None else json.dumps(config).encode()
        is_mlx = isinstance(config, dict) and "peft_type" not in config
        at.set_adapter(raw, tensors, "adapters.safetensors" if is_mlx else WEIGHTS)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return  # the input describes no adapter
    _plan(at, at.base, len(data))


def check_pattern(at: Workplace, data: bytes) -> None:
    """Match a path, the last line, with a pattern, the others: as re does, or it is refused; quickly in any case."""
    pattern, _, path = data.decode(errors="ignore").rpartition("\n")
    path = path[:200]
    found = at.run(len(data), lambda: _matched(pattern, path))
    if found is not None and found != bool(re.match(rf"(.*\.)?({pattern})$", path)):
        raise WrongError(f"another match than PEFT's: {found}")


def _matched(pattern: str, path: str) -> bool | None:
    if len(pattern) > MAX_CHARACTERS or may_explode(pattern):
        return None
    try:
        return first_match({pattern: 1}, path, "rank_pattern") is not None
    except (re.error, RecursionError, OverflowError):
        return None  # refused when the config is read


def check_pickle(at: Workplace, data: bytes) -> None:
    """Read an archive of torch.save, or one that is made around a pickle; every tensor must lie within the file."""
    content = checkpoints.archive(data, {"0": bytes(range(16)), "1": b"\1"}) if data[:1] == b"\x80" else data
    path = at.root / "adapter_model.bin"
    path.write_bytes(content)
    found = at.run(len(content), lambda: read_pickle_file(path))
    for _, source in found.sources() if found else ():
        if source.offset < 0 or source.byte_count < 0 or source.offset + source.byte_count > len(content):
            raise WrongError(f"a tensor outside of the file: {source}")
    if found and content is not data:
        ours = {name: content[at.offset : at.offset + at.byte_count] for name, at in found.sources()}
        _compare_with_torch(path, ours, is_newer=data[1] > TORCH_PROTOCOL)


def _compare_with_torch(path: Path, ours: dict[str, bytes], *, is_newer: bool) -> None:
    """Compare the tensors of a small archive that was made around a pickle with what torch loads of it."""
    import torch

    # torch's own safe reader knows protocol 2 only; what is compared has passed rawmerge's, so names alone are a risk
    options: dict[str, Any] = (
        {"weights_only": False, "pickle_module": named_only} if is_newer else {"weights_only": True}
    )
    try:
        loaded = torch.load(path, map_location="cpu", **options)
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return  # such as gradients of whole numbers: nothing is lost by reading it all the same
    theirs = {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        for name, tensor in loaded.items()
    }
    if ours != theirs:
        raise WrongError(f"other tensors than torch's: {ours!r:.400} and {theirs!r:.400}")


def check_plan(at: Workplace, data: bytes) -> None:
    """Read a saved plan; one that is read must come back the same, and be run or refused."""
    data = data.replace(b"/@", str(at.root).encode())
    plan = at.run(len(data), lambda: parse_plan(data.decode(errors="surrogatepass")) if _is_text(data) else None)
    if plan is None:
        return
    if parse_plan(format_plan(plan)) != plan:
        raise WrongError("another plan came back from JSON")
    output = at.root / "output"
    at.run(len(data), lambda: check_text(plan_text(plan), len(data)))
    at.run(len(data), lambda: run_plan(plan, output, threads=1))
    shutil.rmtree(output, ignore_errors=True)
    if left := {path.name for path in at.root.iterdir()} - {"base", "tied", "cache", "secret.safetensors", "adapter"}:
        raise WrongError(f"left behind: {left}")


def _is_text(data: bytes) -> bool:
    try:
        data.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def check_journal(at: Workplace, data: bytes) -> None:
    """Read a journal: it is one, or is refused."""
    (at.root / JOURNAL_NAME).write_bytes(data)
    at.run(len(data), lambda: read_journal(at.root))


def check_record(at: Workplace, data: bytes) -> None:
    """Verify a checkpoint with this merge record, and plan a merge into it."""
    (at.base / "rawmerge.json").write_bytes(data)
    made = at.run(len(data), lambda: verify_merge(at.base))
    if made is not None:
        check_text(verification_text(made), len(data))
    _plan(at, at.base, len(data))


def check_manifest(at: Workplace, data: bytes) -> None:
    """Verify a checkpoint with this manifest: nothing elsewhere is read."""
    (at.base / MANIFEST_NAME).write_bytes(data)
    try:
        parse_manifest(data)
    except ValueError as error:
        check_text(str(error), len(data))
    made = at.run(len(data), lambda: verify_merge(at.base))
    if made is not None:
        check_text(verification_text(made), len(data))


def _words(found: list[bytes]) -> Mutator:
    text = "".join(data.decode(errors="ignore") for data in found)
    return json_mutator(re.findall(r'"([^"\\]{1,80})"', text))


def _opcodes(_: list[bytes]) -> Mutator:
    return pickle_mutator


TARGETS: Final = {
    "header": Target(check_header, seeds.headers, _words),
    "index": Target(check_index, seeds.indexes, _words),
    "config": Target(check_config, seeds.configs, _words),
    "adapter-config": Target(check_adapter_config, seeds.adapter_configs, _words),
    "adapter": Target(check_adapter, seeds.adapters, _words),
    "pattern": Target(check_pattern, seeds.patterns),
    "pickle": Target(check_pickle, seeds.pickles, _opcodes),
    "plan": Target(check_plan, seeds.plans, _words),
    "journal": Target(check_journal, seeds.journals, _words),
    "record": Target(check_record, seeds.records, _words),
    "manifest": Target(check_manifest, seeds.manifests),
}
