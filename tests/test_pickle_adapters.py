"""`adapter_model.bin`: read as torch reads it, never run, and refused where it is more than tensors."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rawmerge
from rawmerge.errors import AdapterError, InputChangedError, MissingFileError
from rawmerge.formats.tensor_pickle import parse_tensor_pickle
from rawmerge.inputs.adapter import read_adapter
from tests.builders import lora_pair, raw, read_all, write_adapter

BIN, TWIN = "adapter_model.bin", "adapter_model.safetensors"


def write_bin(folder: Path, state: Any, **options: Any) -> Path:
    """Write an adapter whose tensor file is what torch.save makes of `state`."""
    adapter = write_adapter(folder, {})
    (adapter / TWIN).unlink()
    torch.save(state, adapter / BIN, **options)
    return adapter


def rezipped(
    path: Path, edit: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED
) -> None:
    """Write the archive anew with edited members."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in edit(members).items():
            archive.writestr(name, content)


@pytest.fixture
def pickled(tiny: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, its adapter, and the adapter's pickled twin."""
    base, adapter = tiny
    return base, adapter, write_bin(tmp_path / "pickled", load_file(adapter / TWIN))


def test_the_merge_has_the_bytes_of_the_safetensors_twin(pickled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, twin = pickled
    rawmerge.merge_adapter(base, adapter, tmp_path / "one")
    summary = rawmerge.merge_adapter(base, twin, tmp_path / "other")
    one, other = read_all(tmp_path / "one"), read_all(tmp_path / "other")
    assert {name: raw(tensor) for name, tensor in other.items()} == {name: raw(tensor) for name, tensor in one.items()}
    assert any(f"{BIN} is a pickle" in note for note in summary.notes)
    assert not any("is a pickle" in note for note in rawmerge.plan_merge(base, adapter).notes)


def test_planning_imports_no_torch(pickled: tuple[Path, Path, Path]) -> None:
    base, _, twin = map(str, pickled)
    code = f"import rawmerge, sys; rawmerge.plan_merge({base!r}, {twin!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_safetensors_file_beside_it_is_taken(pickled: tuple[Path, Path, Path]) -> None:
    _, adapter, _ = pickled
    (adapter / BIN).write_bytes(b"not even a pickle")
    assert read_adapter(adapter).weights.path.name == TWIN
    with pytest.raises(AdapterError, match="zip archive"):  # unless it is named
        read_adapter(adapter / BIN)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_every_tensor_lies_where_torch_finds_it(tmp_path: Path, dtype: torch.dtype) -> None:
    storage = torch.arange(60).to(dtype)
    state = {
        "plain": storage.clone().reshape(3, 4, 5),
        "part": storage[12:24].view(3, 4),
        "rest": storage[24:],
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one column": torch.ones(4, 1, dtype=dtype).T,
        "parameter": torch.nn.Parameter(torch.ones(2).to(dtype), requires_grad=False),
    }
    adapter = read_adapter(write_bin(tmp_path / "a", OrderedDict(state)))
    expected = torch.load(adapter.weights.path, weights_only=True)
    assert list(adapter.tensors) == list(expected)
    content = adapter.weights.path.read_bytes()
    for name, source in adapter.tensors.items():
        assert source.shape == tuple(expected[name].shape)
        assert content[source.offset : source.offset + source.byte_count] == raw(expected[name]), name


NEWER_DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}


def loaded_bytes(path: Path, protocol: int) -> dict[str, bytes]:
    """Return what torch loads of a file that this test wrote; torch's safe reader knows protocol 2 only."""
    loaded = torch.load(path, weights_only=protocol == 2)
    return {name: raw(tensor.detach().contiguous().view(-1).view(torch.uint8)) for name, tensor in loaded.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", NEWER_DTYPES, ids=str)
def test_every_protocol_and_newer_dtypes_are_read_as_torch_reads_them(
    tmp_path: Path, dtype: torch.dtype, protocol: int
) -> None:
    storage = torch.arange(48 * 8, dtype=torch.uint8).view(dtype)
    state = {
        "whole": storage.clone(),
        "part": storage[8:20].view(3, 4),
        "plain": torch.arange(7.0),
        "é" * 200: storage[:2],
    }
    adapter = read_adapter(write_bin(tmp_path / "a", OrderedDict(state), pickle_protocol=protocol))
    content = adapter.weights.path.read_bytes()
    ours = {name: content[at.offset : at.offset + at.byte_count] for name, at in adapter.tensors.items()}
    assert ours == loaded_bytes(adapter.weights.path, protocol)
    assert {name: (at.dtype, at.shape) for name, at in adapter.tensors.items()} == {
        name: (NEWER_DTYPES.get(tensor.dtype, "F32"), tuple(tensor.shape)) for name, tensor in state.items()
    }


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_state_dict_of_thousands_of_tensors_in_a_newer_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    state = torch.nn.ModuleDict({f"m{number}": torch.nn.BatchNorm1d(2) for number in range(600)}).state_dict()
    state["parameter"] = torch.nn.Parameter(torch.arange(3.0))
    adapter = read_adapter(write_bin(tmp_path / "a", state, pickle_protocol=protocol))
    content = adapter.weights.path.read_bytes()
    assert {name: content[at.offset : at.offset + at.byte_count] for name, at in adapter.tensors.items()} == {
        name: raw(tensor.detach()) for name, tensor in state.items()
    }


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.bits8, torch.complex32, torch.complex128], ids=str)
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_bin(tmp_path / "a", {"odd": torch.zeros(16, dtype=torch.uint8).view(dtype)})
    with pytest.raises(AdapterError) as refusal:
        read_adapter(adapter)
    (problem,) = refusal.value.problems
    assert problem.subject.endswith(f"{BIN}: odd")
    assert str(dtype) in problem.found
    assert "turn that tensor into another dtype" in problem.hint


def test_a_real_state_dict_with_metadata_and_a_tie_is_read(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(3, 4)
            self.two = torch.nn.Linear(3, 4)
            self.two.weight = self.one.weight

    adapter = read_adapter(write_bin(tmp_path / "a", Tied().state_dict()))
    assert adapter.tensors["one.weight"] == adapter.tensors["two.weight"]
    assert set(adapter.tensors) == {"one.weight", "one.bias", "two.weight", "two.bias"}


class Payload:
    """What a hostile pickle asks for: a call of `function` when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, getattr, torch.load, bytes, range, io.open_code])
@pytest.mark.parametrize("place", ["value", "whole", "argument"])
def test_nothing_of_a_pickle_is_called(tmp_path: Path, function: Any, place: str) -> None:
    trace = tmp_path / "trace"
    argument = {os.system: f"touch {trace}", eval: f"open({str(trace)!r}, 'w')"}.get(function, str(trace))
    payload = Payload(function, argument)
    states = {"value": {"a": torch.ones(2), "b": payload}, "whole": payload, "argument": {"a": OrderedDict(b=payload)}}
    with pytest.raises(AdapterError, match=r"tensors alone.*nothing was run"):
        read_adapter(write_bin(tmp_path / "a", states[place]))
    assert not trace.exists()


def table(body: bytes) -> bytes:
    """Return a pickle of protocol 2 that makes a dictionary with what `body` puts in."""
    return b"\x80\x02}" + body + b"."


def key(name: str = "a") -> bytes:
    return b"X" + struct.pack("<I", len(name)) + name.encode()


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def tensor(
    first: bytes = b"K\0", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85", storage: bytes = STORAGE
) -> bytes:
    rest = b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + first + shape + strides + rest + b"R"


def entry(**parts: bytes) -> bytes:
    """Return a pickle of a table with one tensor, `a`."""
    return table(key() + tensor(**parts) + b"s")


def typed_entry(dtype: bytes) -> bytes:
    """Return a pickle of a table with one tensor over the first four plain bytes, whose dtype stands beside it."""
    storage = STORAGE.replace(b"ctorch\nFloatStorage", b"ctorch.storage\nUntypedStorage")
    rest = b"K\0K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)R" + dtype + b"tR"
    return table(key() + b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + rest + b"s")


ONES = b"(" + b"K\x01" * 65 + b"t"
ELSEWHERE = STORAGE.replace(b"X\x01\0\0\x000", b"X\x0b\0\0\x00../data.pkl")
PART = key("b") + tensor(first=b"K\x01", shape=b"K\x02\x85") + b"s"
HOSTILE = {
    # what is in the pickle, and a word of the refusal; each on an archive with one storage, of 4 floats
    "no table": (b"\x80\x02K\x01.", "a table of tensors"),
    "a nested table": (table(key("state_dict") + b"}" + key() + tensor() + b"ss"), "state_dict"),
    "a number": (table(key() + b"K\x01s"), "a tensor"),
    "a bare storage": (table(key() + STORAGE + b"s"), "a tensor"),
    "a name that is a number": (table(b"K\x01" + tensor() + b"s"), "names that are text"),
    "a name that is a tuple": (table(b"K\x01\x85" + tensor() + b"s"), "names that are text"),
    "one name twice": (table((key() + tensor() + b"s") * 2), "each name once"),
    "repeated elements": (entry(shape=b"J\0\0\0\x40\x85", strides=b"K\0\x85"), "one after another"),
    "transposed": (entry(shape=b"K\x02K\x02\x86", strides=b"K\x01K\x02\x86"), "one after another"),
    "longer than its storage": (entry(shape=b"K\x05\x85"), "within its storage"),
    "past its storage": (entry(first=b"K\x01"), "within its storage"),
    "before its storage": (entry(first=b"J\xff\xff\xff\xff"), "damaged"),
    "a negative size": (entry(shape=b"J\xff\xff\xff\xff\x85"), "damaged"),
    "a size that is true": (entry(shape=b"\x88\x85"), "damaged"),
    "strides of another length": (entry(strides=b")"), "damaged"),
    "more dimensions than any": (entry(shape=ONES, strides=ONES), "damaged"),
    "a device that is a number": (entry(storage=STORAGE.replace(b"X\x03\0\0\0cpu", b"K\x01")), "damaged"),
    "a missing storage": (entry(storage=STORAGE.replace(b"\x000X", b"\x007X")), "found none"),
    "a storage of another size": (entry(storage=STORAGE.replace(b"K\x04", b"K\x08")), "16 bytes"),
    "a storage elsewhere": (entry(storage=ELSEWHERE), "found none"),
    "an unknown storage": (entry(storage=STORAGE.replace(b"Float", b"Cool")), "torch.CoolStorage"),
    "parts that overlap": (table(key() + tensor(shape=b"K\x03\x85") + b"s" + PART), "a part of another's"),
    "another opcode": (b"\x80\x02I1\n.", "INT"),
    "the extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "INST"),
    "more arguments than torch takes": (entry(strides=b"K\x01\x85NNN"), "what is stored"),
    "fewer arguments than torch takes": (entry().replace(b"\x89ccollections\nOrderedDict\n)R", b""), "damaged"),
    "a name too long": (table(key("a" * 4097) + tensor() + b"s"), "4096 characters"),
    "a new object": (table(key() + b"ccollections\nOrderedDict\n)\x81s"), "NEWOBJ"),
    "a call of a table": (table(key() + b"})Rs"), "damaged"),
    "a table with arguments": (table(key() + b"ccollections\nOrderedDict\n}\x85Rs"), "damaged"),
    "state of a name": (table(key() + b"ccollections\nOrderedDict\n}bs"), "damaged"),
    "an empty stack": (b"\x80\x02.", "damaged"),
    "two results": (b"\x80\x02}}.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "a memo of nothing": (b"\x80\x02h\x01.", "damaged"),
    "a mark at the end": (b"\x80\x02}(.", "damaged"),
    "values from below a mark": (b"\x80\x02}}(\x85.", "damaged"),
    "a memo of a mark": (b"\x80\x02}(q\0u.", "damaged"),
    "items for a table below a mark": (b"\x80\x02}(" + key() + tensor() + b"(u.", "damaged"),
    "no mark": (b"\x80\x02}u.", "damaged"),
    "a long text that is not there": (b"\x80\x02X\xff\xff\xff\x7f", "damaged"),
    "a deep nest": (b"\x80\x02" + b"}" + b"\x85" * 200_000 + b".", "a table of tensors"),
    "a high stack": (b"\x80\x02" + b"}" * 100_000 + b".", "very many"),
    "a stack of marks": (b"\x80\x02" + b"(" * 100_000 + b".", "very many"),
    "too long": (b"\x80\x02" + b"}0" * 4_500_000 + b".", "at most"),
    "nothing": (b"", "damaged"),
    "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "damaged"),
    "a name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "a name in three parts": (b"\x80\x04\x8c\x0bcollections\x8c\x0dOrderedDict x\x93.", "OrderedDict.x"),
    "a frame past the end": (b"\x80\x04\x95\xff\0\0\0\0\0\0\0}.", "damaged"),
    "a memo of an empty stack": (b"\x80\x04\x94.", "damaged"),
    "a set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "a new object with keywords": (b"\x80\x04}}}\x92.", "NEWOBJ_EX"),
    "a buffer from outside": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "a dtype in place of a call": (table(key() + b"ctorch\nuint16\n)Rs"), "damaged"),
    "a dtype in place of a storage": (entry(storage=STORAGE.replace(b"FloatStorage", b"uint16")), "damaged"),
    "a storage in place of a dtype": (typed_entry(b"ctorch\nFloatStorage\n"), "damaged"),
    "a dtype that is text": (typed_entry(key("uint16")), "damaged"),
    "longer than its bytes": (typed_entry(b"ctorch\nuint64\n"), "within its storage of 4 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path: Path, what: str) -> None:
    content, word = HOSTILE[what]
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)})
    rezipped(adapter / BIN, lambda members: {n: content if n.endswith("data.pkl") else c for n, c in members.items()})
    with pytest.raises(AdapterError) as refusal:
        read_adapter(adapter)
    assert word in str(refusal.value)


def test_the_pickles_above_are_hostile_for_what_they_say(tmp_path: Path) -> None:
    content = table(key() + tensor() + b"sr\xff\xff\xff\x7f")  # and a memo far away takes no memory
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)})
    rezipped(adapter / BIN, lambda members: {n: content if n.endswith("data.pkl") else c for n, c in members.items()})
    assert torch.load(adapter / BIN, weights_only=True)["a"].tolist() == [1, 1, 1, 1]
    assert read_adapter(adapter).tensors["a"].shape == (4,)


def test_a_tensor_that_torch_would_negate_is_refused(tmp_path: Path) -> None:
    values = torch.arange(1.0, 5.0)
    state = {"a": torch._neg_view(values)}
    adapter = write_bin(tmp_path / "a", state)
    assert torch.load(adapter / BIN, weights_only=True)["a"].tolist() == [-1, -2, -3, -4]  # stored without the sign
    with pytest.raises(AdapterError, match="tensors that are what is stored"):
        read_adapter(adapter)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.zeros(1_000_000)})
    rezipped(adapter / BIN, lambda members: members, zipfile.ZIP_DEFLATED)
    with pytest.raises(AdapterError, match="stored as they are"):
        read_adapter(adapter)


def refusal_of(adapter: Path) -> str:
    try:
        read_adapter(adapter)
    except AdapterError as error:
        return str(error)
    return ""


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(300), "b": torch.ones(4, 4)})
    content = (adapter / BIN).read_bytes()
    directory = content.index(b"PK\x01\x02")
    entry = directory + 46
    damaged = {
        "cut": content[:-30],
        "cut in the middle": content[: len(content) // 2],
        "no zip": b"\x80\x02" + content[2:],
        "directory": content[:directory] + b"XX" + content[directory + 2 :],
        "local header": content.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1),
        "place": content[: entry - 4] + struct.pack("<I", 2**31) + content[entry:],
        "size": content[: entry - 26] + struct.pack("<II", 2**30, 2**30) + content[entry - 18 :],
        "empty": b"",
        "before the start": content[:directory] + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**31, 0, 0),
    }
    for what, bytes_ in damaged.items():
        (adapter / BIN).write_bytes(bytes_)
        assert refusal_of(adapter), what


def test_other_archives_are_refused(tmp_path: Path) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)})
    original = (adapter / BIN).read_bytes()
    for edit, word in (
        (lambda members: {n: c for n, c in members.items() if not n.endswith("data.pkl")}, "another archive"),
        (lambda members: {**members, "more/data.pkl": b""}, "another archive"),
        (lambda members: {**members, "adapter_model/constants.pkl": b""}, "another archive"),
        (lambda members: {**members, "adapter_model/byteorder": b"big"}, "another order"),
        (lambda members: {**members, "adapter_model/byteorder": bytes(10_000_000)}, "another order"),
    ):
        (adapter / BIN).write_bytes(original)
        rezipped(adapter / BIN, edit)
        with pytest.raises(AdapterError, match=word):
            read_adapter(adapter)


@pytest.mark.parametrize("place", [2**31, 2**62, 2**63, 2**64 - 1])
def test_a_member_outside_of_the_file_is_refused(tmp_path: Path, place: int) -> None:
    """Only zip64 has room for such places: they stand in an extra field, and what else says where is all ones."""
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)})
    rezipped(adapter / BIN, lambda members: members)  # with one end, torch's has two
    content = (adapter / BIN).read_bytes()
    first = content.index(b"PK\x01\x02")
    name = first + 46 + int.from_bytes(content[first + 28 : first + 30], "little")
    extra = struct.pack("<HHQ", 1, 8, place)
    entry = content[first : first + 30] + struct.pack("<H", len(extra)) + content[first + 32 : first + 42]
    entry += b"\xff" * 4 + content[first + 46 : name] + extra
    old = name + int.from_bytes(content[first + 30 : first + 32], "little")
    (adapter / BIN).write_bytes(grown(content[:first] + entry + content[old:], len(entry) - (old - first)))
    with pytest.raises(AdapterError, match="leads out of the file"):
        read_adapter(adapter)


@pytest.mark.parametrize("field", [12, 16], ids=["size", "place"])
@pytest.mark.parametrize("value", [2**31, 2**32 - 2])
def test_a_list_of_members_outside_of_the_file_is_refused(tmp_path: Path, field: int, value: int) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)})
    rezipped(adapter / BIN, lambda members: members)
    content = bytearray((adapter / BIN).read_bytes())
    struct.pack_into("<I", content, len(content) - 22 + field, value)
    (adapter / BIN).write_bytes(content)
    with pytest.raises(AdapterError, match="damaged one"):
        read_adapter(adapter)


def grown(content: bytes, more: int) -> bytes:
    """Return an archive whose list of members is longer than its end says, with an end that is right."""
    end = content.rindex(b"PK\x05\x06")
    (size,) = struct.unpack_from("<I", content, end + 12)
    return content[: end + 12] + struct.pack("<I", size + more) + content[end + 16 :]


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4), "b": torch.ones(4)})
    content = bytearray((adapter / BIN).read_bytes())
    names = [b"adapter_model/data/0", b"adapter_model/data/1"]
    places = [content.rindex(name) - 46 + 42 for name in names]  # in the directory: where the local header is
    content[places[1] : places[1] + 4] = content[places[0] : places[0] + 4]
    (adapter / BIN).write_bytes(content)
    with pytest.raises(AdapterError, match="overlap"):
        read_adapter(adapter)


def test_the_format_of_old_torch_is_refused_with_a_way_out(tmp_path: Path) -> None:
    adapter = write_bin(tmp_path / "a", {"a": torch.ones(4)}, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match="safe_serialization=True"):
        read_adapter(adapter)


def test_a_plain_pickle_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {})
    (adapter / TWIN).unlink()
    with pytest.raises(MissingFileError, match=TWIN):
        read_adapter(adapter)
    (adapter / BIN).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(AdapterError, match="zip archive"):
        read_adapter(adapter)
    (adapter / BIN).unlink()
    os.mkfifo(adapter / BIN)
    with pytest.raises(MissingFileError, match="regular file"):
        read_adapter(adapter)


def test_a_pickle_that_changes_after_the_plan_is_refused(pickled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, twin = pickled
    plan = rawmerge.plan_merge(base, twin)
    torch.save(lora_pair("model.layers.0.q_proj", 12, 8), twin / BIN)
    with pytest.raises(InputChangedError, match="plan again"):
        rawmerge.run_plan(plan, tmp_path / "out")


def test_a_plan_of_a_pickle_survives_json(pickled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, twin = pickled
    plan = rawmerge.plan_merge(base, twin)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan


def read_time(count: int) -> float:
    """Return the seconds that a batch of so many tensors takes, all of which lie on the stack together."""
    batch = b"".join(key(f"{number}") + tensor() for number in range(count))
    started = time.process_time()
    assert len(parse_tensor_pickle(table(b"(" + batch + b"u"), "a")) == count
    return time.process_time() - started


def test_a_batch_of_many_tensors_is_not_gone_through_for_each() -> None:
    assert read_time(9_000) < 40 * read_time(900) + 1
