"""Files that strangers made to do harm: each is refused for its own reason, quickly, in little memory, no output."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.errors import AdapterError, CheckpointError, RefusedError, ShardFormatError
from rawmerge.formats.adapter_config import parse_adapter_config
from rawmerge.formats.model_config import parse_model_config
from rawmerge.formats.patterns import MAX_CHARACTERS, MAX_PATTERNS, as_regex, first_match, fits_whole, may_explode
from rawmerge.formats.shard_header import parse_header_length, parse_shard_header
from rawmerge.formats.target_names import is_targeted
from rawmerge.formats.weight_map import parse_weight_map
from rawmerge.report import error_json, error_text
from tests.builders import PREFIX, tiny_merge
from tests.strategies import SETTINGS

Edit = Callable[[Path, Path], Any]
CONTROLS = "\x1b]0;\n\r\x07\u202e\x9b\u2028"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and an adapter that can be merged."""
    folder = tmp_path_factory.mktemp("made")
    tiny_merge(folder)
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def header(**tensors: Any) -> Edit:
    """Put a header, and 64 bytes of data, into the adapter's file."""

    def edit(_: Path, adapter: Path) -> None:
        text = json.dumps(tensors).encode()
        (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))

    return edit


def raw_header(text: bytes, length: int | None = None) -> Edit:
    """Put a header into the base's first shard, of a stated length."""

    def edit(base: Path, _: Path) -> None:
        stated = len(text) if length is None else length
        (base / "model-00001-of-00002.safetensors").write_bytes(struct.pack("<Q", stated) + text)

    return edit


def tensor(dtype: Any = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def index(name: Any) -> Edit:
    """Make the index say that the first tensor lies in a shard of this name."""

    def edit(base: Path, _: Path) -> None:
        at = base / "model.safetensors.index.json"
        weight_map = json.loads(at.read_text())["weight_map"]
        edit_json(at, weight_map={**weight_map, "model.embed_tokens.weight": name})

    return edit


def placed(name: str, place: Callable[[Path], Any]) -> Edit:
    """Put something else than a file where a shard should be."""

    def edit(base: Path, adapter: Path) -> None:
        index(name)(base, adapter)
        place(base / name)

    return edit


def config(**fields: Any) -> Edit:
    return lambda _, adapter: edit_json(adapter / "adapter_config.json", **fields)


def factor(name: str, shape: tuple[int, ...]) -> Edit:
    """Give the adapter a factor of this shape, or one more."""

    def edit(_: Path, adapter: Path) -> None:
        at = adapter / "adapter_model.safetensors"
        save_file(load_file(at) | {f"{PREFIX}{name}": torch.ones(shape)}, at)

    return edit


def pickled(content: bytes, storage: bytes = bytes(16), method: int = zipfile.ZIP_STORED) -> Edit:
    """Put an archive of torch.save in place of the adapter's file."""

    def edit(_: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        with zipfile.ZipFile(adapter / "adapter_model.bin", "w", method) as archive:
            archive.writestr("a/data.pkl", content)
            archive.writestr("a/data/0", storage)

    return edit


class Payload:
    """What makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-payload",)


STRIDES = (
    b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000"
    b"X\x03\0\0\0cpuK\x04tQK\0J\0\0\0\x40\x85K\0\x85\x89ccollections\nOrderedDict\n)RtRs."
)
Q0 = "model.layers.0.q_proj"
ATTACKS: dict[str, tuple[Edit, type[RefusedError], str]] = {
    "a length beyond the file": (raw_header(b"{}", 2**63), ShardFormatError, "header length of"),
    "a length beyond the limit": (raw_header(b"{}", 100_000_001), ShardFormatError, "header of at most"),
    "an overlap": (header(a=tensor(), b=tensor()), ShardFormatError, "an overlap"),
    "a hole": (header(a=tensor(shape=[0], offsets=[8, 8])), ShardFormatError, "a hole"),
    "a product that overflows": (header(a=tensor(shape=[2**32, 2**32])), ShardFormatError, "countable shape"),
    "sizes that hide behind a zero": (header(a=tensor(shape=[0, 2**62, 4])), ShardFormatError, "countable shape"),
    "a size beyond 64 bits": (header(a=tensor(shape=[2**64])), ShardFormatError, "list of sizes"),
    "a negative size": (header(a=tensor(shape=[-4, -4])), ShardFormatError, "list of sizes"),
    "an offset that runs backwards": (header(a=tensor(offsets=[64, 0])), ShardFormatError, "[start, end]"),
    "a rank that none has": (header(a=tensor(shape=[1] * 100_000)), ShardFormatError, "64 dimensions"),
    "a dtype that there is not": (header(a=tensor("F31")), ShardFormatError, "safetensors dtype"),
    "half of an element": (header(a=tensor("F4", [129], [0, 64])), ShardFormatError, "whole bytes"),
    "data off by a byte": (header(a=tensor(offsets=[1, 65])), ShardFormatError, "a hole"),
    "a name twice": (raw_header(b'{"a": {}, "a": {}}'), ShardFormatError, "twice"),
    "a name of a megabyte": (header(**{"a." * 500_000: tensor()}), ShardFormatError, "4096 characters"),
    "a name of control characters": (header(**{CONTROLS: tensor("F31")}), ShardFormatError, "safetensors dtype"),
    "a nest without end": (raw_header(b'{"a":' * 100_000), ShardFormatError, "strict JSON"),
    "a number of a megabyte": (raw_header(b'{"a":' + b"9" * 1_000_000 + b"}"), ShardFormatError, "strict JSON"),
    "a shard in another folder": (index("../adapter/adapter_model.safetensors"), CheckpointError, "plain"),
    "a shard from the root": (index("/etc/passwd.safetensors"), CheckpointError, "plain"),
    "a device's name": (index("NUL.safetensors"), CheckpointError, "plain"),
    "a shard name of control characters": (index(f"{CONTROLS}.safetensors"), CheckpointError, "plain"),
    "a shard that is a table": (index({"a": 1}), CheckpointError, "plain"),
    "a shard without its tensor": (index("model-00002-of-00002.safetensors"), CheckpointError, "where the index says"),
    "a shard that is not there": (index("none.safetensors"), RefusedError, "No such file"),
    "a link to a device": (placed("zero.safetensors", lambda at: at.symlink_to("/dev/zero")), RefusedError, "regular"),
    "a pipe": (placed("pipe.safetensors", os.mkfifo), RefusedError, "regular file"),
    "a folder": (placed("folder.safetensors", os.mkdir), RefusedError, "regular file"),
    "a link to itself": (placed("loop.safetensors", lambda at: at.symlink_to(at)), RefusedError, "symbolic links"),
    "a rank beyond all": (config(r=10**30), AdapterError, "'r'"),
    "a rank that is text": (config(r="4"), AdapterError, "'r'"),
    "an alpha that is not finite": (config(lora_alpha=float("nan")), AdapterError, "NaN"),
    "an alpha beyond all": (config(lora_alpha=10**400), AdapterError, "lora_alpha"),
    "a kind that is a table": (config(peft_type={"a": 1}), RefusedError, "peft_type"),
    "a field of control characters": (config(**{CONTROLS: CONTROLS}), RefusedError, "config field"),
    "a pattern of control characters": (config(rank_pattern={f"({CONTROLS}": 1}), AdapterError, "regular expression"),
    "a pattern for ever": (config(rank_pattern={"(a+)+b": 1}), AdapterError, "can take for ever"),
    "a million brackets": (config(rank_pattern={"[" * 1_000_000: 1}), AdapterError, "a pattern of at most"),
    "a hundred thousand patterns": (config(rank_pattern={f"a{n}": 1 for n in range(10**5)}), AdapterError, "patterns"),
    "modules without number": (config(modules_to_save=["a"] * 10**5), AdapterError, "at most 10000"),
    "layers without number": (config(layer_replication=[[0, 2]] * 10**5), AdapterError, "layers"),
    "a factor that explodes": (factor(f"{Q0}.lora_A.weight", (4, 80_000)), RefusedError, "a delta of [12, 80000]"),
    "a factor of another rank": (factor(f"{Q0}.lora_A.weight", (4096, 8)), RefusedError, "rank 4"),
    "a factor of control characters": (factor(f"{CONTROLS}.lora_A.weight", (4, 8)), RefusedError, r"\x1b"),
    "repeated elements": (pickled(STRIDES), AdapterError, "one after another"),
    "a bomb": (pickled(STRIDES, bytes(10_000_000), zipfile.ZIP_DEFLATED), AdapterError, "stored as they are"),
    "a payload": (pickled(pickle.dumps({"a": Payload()}, 2)), AdapterError, "nothing was run"),
    "a payload of control characters": (pickled(b"\x80\x02c\x1b]0;\n\x07\n."), AdapterError, "nothing was run"),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_an_attack_is_refused_for_its_own_reason_before_any_output(made: Path, tmp_path: Path, what: str) -> None:
    edit, error, word = ATTACKS[what]
    base, adapter = (Path(shutil.copytree(made / name, tmp_path / name)) for name in ("base", "adapter"))
    edit(base, adapter)
    started, before = process_time(), sorted(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert process_time() - started < 5
    assert word in str(caught.value)
    assert caught.value.exit_code == 3
    assert sorted(tmp_path.iterdir()) == before
    assert not Path("made-by-a-payload").exists()
    shown = error_text(caught.value)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert len(shown) < 10_000
    assert json.loads(error_json(caught.value))["problems"]


def test_what_is_not_attacked_is_merged(made: Path, tmp_path: Path) -> None:
    assert rawmerge.merge_adapter(made / "base", made / "adapter", tmp_path / "out").counts["updated"] == 2


COSTLY = {
    "nested repeats": "(a+)+b",
    "nested repeats in a comment's shadow": "(?#[)(a+)+b]",
    "nested repeats in a verbose comment's shadow": "(?x:#[\n(a+)+b#]\n)",
    "nested repeats behind a set with an escaped bracket": r"[\][](a+)+b]",
    "many repeats": ".*" * 12 + "b",
    "counted repeats": "a{0,90}" * 12 + "b",
    "many options": "a?" * 40 + "a" * 40,
    "many lazy options": "a??" * 40 + "a" * 40,
    "alternatives that are the same": "(a|a)" * 40 + "b",
    "alternatives that begin alike": "(a|aa)" * 40 + "b",
    "alternatives of any character": r"(.|\w)" * 40 + "b",
    "alternatives in alternatives": "((a|.)|(.|a))" * 20 + "b",
    "options of groups": "(a|b)?" * 40 + "c",
    "brackets": "[" * MAX_CHARACTERS,
    "parentheses": "(" * MAX_CHARACTERS,
    "length": "a" * 1_000_000,
}


@pytest.mark.parametrize("what", COSTLY)
def test_a_costly_pattern_is_refused_quickly(what: str) -> None:
    path, started = "a." * 30 + "a" * 60, process_time()
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    with pytest.raises(AdapterError, match="rank_pattern"):
        parse_adapter_config(json.dumps({**fields, "rank_pattern": {COSTLY[what]: 3}}).encode(), "c").rank_of(path)
    targeted = parse_adapter_config(json.dumps({**fields, "target_modules": COSTLY[what]}).encode(), "c")
    with suppress(AdapterError):
        assert not is_targeted(targeted, path)  # no pattern at all, as PEFT would have said
    assert process_time() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.(0|1|10|11|2)\..*\.(gate_proj|up_proj|down_proj)",
        r".*(self_attn|mlp)\..*(q_proj|down_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:q_proj|k_proj).*?)",
        r"layers\.\d+\.[^.]+\.q_proj",
        "|".join(f"model.layers.{number}.self_attn.q_proj" for number in range(60)),
        r"(encoder|decoder)?\.?layers?\.[0-9]{1,3}\.q_proj",
    ],
)
def test_patterns_as_people_write_them_are_followed(pattern: str) -> None:
    path = "model.language_model.layers.10.self_attn.q_proj"
    assert not may_explode(pattern)
    assert fits_whole(pattern, path, "target_modules") == bool(re.fullmatch(pattern, path))
    assert first_match({pattern: 3}, path, "rank_pattern") == (3 if re.match(as_regex(pattern), path) else None)


PIECES = ["a", "b", ".", r"\.", r"\w", "[ab]", r"[\]a]", "[^]a]", "(", ")", "|", "?", "*", "+", "??", "{1,3}", "(?:"]


@SETTINGS
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text("ab.", max_size=60))
def test_a_pattern_is_matched_as_peft_does_or_refused_and_takes_no_time(key: str, path: str) -> None:
    if may_explode(key):
        return
    started = process_time()
    try:
        found = first_match({key: 3}, path, "rank_pattern")
    except re.error:
        return  # refused when the config is read
    except AdapterError:
        return
    assert found == (3 if re.match(rf"(.*\.)?({key})$", path) else None)
    assert process_time() - started < 2


def test_a_pattern_for_each_module_of_a_large_model_takes_seconds() -> None:
    table, started = {f"layers.{number}.q_proj": 3 for number in range(MAX_PATTERNS // 4)}, process_time()
    raw = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": table}).encode()
    found = parse_adapter_config(raw, "c")
    assert found.rank_of(f"model.layers.{MAX_PATTERNS // 4 - 1}.q_proj") == 3
    assert process_time() - started < 30


def parse_whole_header(raw: bytes) -> Any:
    return parse_shard_header(raw, 0, "f")


PARSERS: dict[str, Callable[[bytes], Any]] = {
    "header": parse_whole_header,
    "index": lambda raw: parse_weight_map(raw, "i"),
    "config": lambda raw: parse_model_config(raw, "c").ties_embeddings,
    "adapter": lambda raw: parse_adapter_config(raw, "a"),
}
ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HUGE = {
    "lists": b'{"a":[' + b",".join([b"[]"] * 40_000) + b"]}",
    "tables": b'{"a":[' + b",".join([b"{}"] * 40_000) + b"]}",
    "numbers": b'{"a":[' + b",".join([b"9" * 4000] * 200) + b"]}",
    "sizes": b'{"a":{"dtype":"U8","shape":[' + b",".join([b"0"] * 40_000) + b'],"data_offsets":[0,0]}}',
    "tensors": b"{" + b",".join(b'"%d":%s' % (number, ENTRY) for number in range(10_000)) + b"}",
    "a long text": b'{"peft_type":"' + b"a" * 400_000 + b'"}',
    "escapes": b'{"peft_type":"' + rb"\u0007" * 60_000 + b'"}',
    "keys": b"{" + b",".join(b'"%d":0' % number for number in range(20_000)) + b"}",
    "a nest": b'{"text_config":' * 190 + b"{}" + b"}" * 190,
    "a wide nest": b'{"text_config":' * 150 + b"[" + b",".join([b"{}"] * 40_000) + b"]" + b"}" * 150,
}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("what", HUGE)
def test_memory_and_time_are_bounded_by_the_file(parser: str, what: str) -> None:
    raw, message, started = HUGE[what], "", process_time()
    tracemalloc.start()
    try:
        PARSERS[parser](raw)
    except RefusedError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(message) < 2000
    assert peak < 2**20 + 100 * len(raw)
    assert process_time() - started < 5


@pytest.mark.parametrize("length", [3, 2**20, 10**8, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_lies_takes_no_memory(length: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ShardFormatError, match="header"):
            parse_header_length(struct.pack("<Q", length), 10, "f.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()
