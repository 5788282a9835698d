"""Headers: whatever is accepted is what the safetensors library reads; everything else is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rawmerge.errors import ShardFormatError
from rawmerge.formats.shard_header import (
    MAX_HEADER_BYTES,
    ShardHeader,
    TensorEntry,
    encode_header,
    format_shard_header,
    parse_header_length,
    parse_shard_header,
)
from tests.strategies import SETTINGS, ShardBytes, damaged_shards, metadata_tables, shards

#: Where rawmerge is stricter than the library, as the module's docstring says.
STRICTER = re.compile(
    "occurs twice|to have dtype, shape and data_offsets|list of sizes|countable shape|64 dimensions|4096 char"
)

deserialize: Any = safetensors.deserialize  # untyped

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def parse_file(content: bytes) -> ShardHeader:
    length = parse_header_length(content[:8], len(content), "file")
    return parse_shard_header(content[8 : 8 + length], len(content) - 8 - length, "file")


def our_tensors(header: ShardHeader) -> Tensors:
    return {entry.name: (entry.dtype, entry.shape) for entry in header.entries}


def library_tensors(path: Path, content: bytes) -> tuple[Tensors, Mapping[str, str] | None]:
    path.write_bytes(content)
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        return {name: (at.get_dtype(), tuple(at.get_shape())) for name, at in slices.items()}, file.metadata()


def refusal_of(content: bytes) -> str:
    try:
        parse_file(content)
    except ShardFormatError as error:
        return str(error)
    return ""


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def parse_document(document: Any, data_bytes: int = 4) -> ShardHeader:
    return parse_shard_header(json.dumps(document).encode(), data_bytes, "a.safetensors")


@SETTINGS
@given(shards())
def test_a_valid_file_is_read_as_the_library_reads_it(tmp_path: Path, shard: ShardBytes) -> None:
    header = parse_file(shard.content)
    tensors, metadata = library_tensors(tmp_path / "file", shard.content)
    assert our_tensors(header) == tensors
    assert header.metadata == metadata


@SETTINGS
@given(shards())
def test_each_tensor_has_the_bytes_that_the_library_reads(shard: ShardBytes) -> None:
    header = parse_file(shard.content)
    found = {name: bytes(tensor["data"]) for name, tensor in deserialize(shard.content)}
    assert {at.name: shard.data[at.start : at.end] for at in header.entries} == found


@SETTINGS
@given(damaged_shards())
def test_whatever_is_accepted_the_library_accepts_as_the_same_tensors(tmp_path: Path, shard: ShardBytes) -> None:
    try:
        header = parse_file(shard.content)
    except ShardFormatError:
        return
    tensors, metadata = library_tensors(tmp_path / "file", shard.content)
    assert our_tensors(header) == tensors
    assert header.metadata == metadata


@SETTINGS
@given(damaged_shards())
def test_what_the_library_opens_is_refused_for_a_stated_reason_only(tmp_path: Path, shard: ShardBytes) -> None:
    refusal = refusal_of(shard.content)
    if refusal and not STRICTER.search(refusal):
        with pytest.raises(SafetensorError, match="rror"):
            library_tensors(tmp_path / "file", shard.content)


@SETTINGS
@given(shards())
def test_entries_are_in_the_order_of_their_bytes_without_gaps(shard: ShardBytes) -> None:
    header = parse_file(shard.content)
    ends = [0, *(at.end for at in header.entries)]
    assert [at.start for at in header.entries] == ends[:-1]
    assert ends[-1] == len(shard.data)


@SETTINGS
@given(shards())
def test_the_text_and_data_start_are_those_of_the_file(shard: ShardBytes) -> None:
    header = parse_file(shard.content)
    assert header.text.encode() == shard.header
    assert shard.content[header.data_start :] == shard.data
    assert encode_header(header.text) == shard.content[: header.data_start]


@SETTINGS
@given(shards(), metadata_tables())
def test_a_formatted_header_is_read_back_by_the_library(
    tmp_path: Path, shard: ShardBytes, metadata: dict[str, str]
) -> None:
    entries = parse_file(shard.content).entries
    content = encode_header(format_shard_header(entries, metadata)) + shard.data
    assert (len(content) - len(shard.data)) % 8 == 0
    assert library_tensors(tmp_path / "file", content) == ({at.name: (at.dtype, at.shape) for at in entries}, metadata)
    assert parse_file(content).entries == entries


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_formatted_header_is_byte_for_byte_the_library_s(metadata: dict[str, str] | None) -> None:
    tensors = {"b.é": torch.zeros(2, 3), 'a"\n\x1f\x7f': torch.zeros((), dtype=torch.int8), "c": torch.zeros(0, 2)}
    content = save(tensors, metadata)
    header = parse_file(content)
    assert format_shard_header(header.entries, header.metadata) == header.text


def test_metadata_is_written_in_the_order_of_its_keys() -> None:
    assert format_shard_header([], {"b": "1", "a": "2"}).rstrip() == '{"__metadata__":{"a":"2","b":"1"}}'


def test_a_scalar_takes_one_element() -> None:
    assert parse_document({"a": entry("F32", [])}).entries == (TensorEntry("a", "F32", (), 0, 4),)


def test_empty_tensors_may_stand_between_others() -> None:
    document = {"a": entry(), "b": entry("F32", [0, 3], [4, 4]), "c": entry(offsets=[4, 8])}
    assert [at.byte_count for at in parse_document(document, 8).entries] == [4, 0, 4]


def test_the_digest_changes_with_any_byte_of_the_text() -> None:
    digests = {parse_shard_header(text, 0, "a").digest for text in (b"{}", b"{} ", b" {}")}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("prefix", "file_size", "fault"),
    [
        (b"", 0, "at least 8 bytes, found 0 bytes"),
        (b"\x02\0\0", 3, "at least 8 bytes, found 3 bytes"),
        ((3).to_bytes(8, "little"), 10, "at most 2 bytes, found a header length of 3"),
        ((2**63).to_bytes(8, "little"), 1000, "at most 992 bytes, found a header length of 9223372036854775808"),
        ((2**64 - 1).to_bytes(8, "little"), 1000, "header length of 18446744073709551615"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 10**12, "at most 100000000 bytes"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(prefix: bytes, file_size: int, fault: str) -> None:
    with pytest.raises(ShardFormatError, match=fault):
        parse_header_length(prefix, file_size, "a.safetensors")


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object but list"),
        (b"{}x", "Extra data"),
        (b"{}\0", "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a\xff": 1}', "not UTF-8 at byte 3"),
        (b'{"a\\ud800": 1}', "half of a surrogate pair"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' occurs twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "'dtype' occurs twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [-0, 0]}}', "-0 is no whole number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_header_that_is_no_strict_json_is_refused(raw: bytes, fault: str) -> None:
    with pytest.raises(ShardFormatError, match=f"'a.safetensors': expected a header of strict JSON, found .*{fault}"):
        parse_shard_header(raw, 0, "a.safetensors")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (None, "'a' to have dtype, shape and data_offsets, found NoneType"),
        ({"dtype": "U8", "shape": [4]}, r"data_offsets, found \['dtype', 'shape'\]"),
        (entry(extra=1), "found .*'extra'"),
        (entry("f32"), "'a' to have a safetensors dtype, found 'f32'"),
        (entry("F128"), "a safetensors dtype, found 'F128'"),
        (entry(dtype=None), "a safetensors dtype, found None"),
        (entry(dtype=["U8"]), "a safetensors dtype, found"),
        (entry(shape=4), "shape of 'a' to be a list of sizes, found 4"),
        (entry(shape=[-4]), r"shape of 'a' to be a list of sizes, found \[-4\]"),
        (entry(shape=[4.0]), "shape of 'a' to be a list of sizes"),
        (entry(shape=[True, 4]), "shape of 'a' to be a list of sizes"),
        (entry(shape=[2**63]), "shape of 'a' to be a list of sizes"),
        (entry(shape=[1] * 65), "at most 64 dimensions, found 65"),
        (entry(shape=[0, 2**62, 4], offsets=[0, 0]), "a countable shape"),
        (entry(shape=[2**62, 0, 2**62], offsets=[0, 0]), "a countable shape"),
        (entry(shape=[2**62] * 40), "a countable shape"),
        (entry(offsets=None), "data_offsets of 'a' to be a list of sizes, found None"),
        (entry(offsets=[0, 4.0]), "data_offsets of 'a' to be a list of sizes"),
        (entry(offsets=[False, 4]), "data_offsets of 'a' to be a list of sizes"),
        (entry(offsets=["0", "4"]), "data_offsets of 'a' to be a list of sizes"),
        (entry(offsets=[-4, 0]), "data_offsets of 'a' to be a list of sizes"),
        (entry(offsets=[0, 2**64]), "data_offsets of 'a' to be a list of sizes"),
        (entry(offsets=[0]), r"to be \[start, end\], found \[0\]"),
        (entry(offsets=[0, 4, 8]), r"to be \[start, end\]"),
        (entry(offsets=[4, 0]), r"to be \[start, end\], found \[4, 0\]"),
        (entry(offsets=[0, 5]), r"'a' to take 4 bytes for U8 \[4\], found 5 bytes"),
        (entry("F32"), r"'a' to take 16 bytes for F32 \[4\], found 4 bytes"),
        (entry("F4", [3]), "'a' to take whole bytes"),
        (entry("F6_E2M3", [5]), "'a' to take whole bytes"),
        (entry(offsets=[1, 5]), "'a' to start at byte 0, found a hole: 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_entry_is_refused_by_its_fault(fields: Any, fault: str) -> None:
    with pytest.raises(ShardFormatError, match=f"'a.safetensors': expected .*{fault}"):
        parse_document({"a": fields})


@pytest.mark.parametrize(
    ("second", "data_bytes", "fault"),
    [
        (entry(offsets=[6, 10]), 10, "'b' to start at byte 4, found a hole: 6"),
        (entry(offsets=[2, 6]), 6, "'b' to start at byte 4, found an overlap: 2"),
        (entry(), 4, "'b' to start at byte 4, found an overlap: 0"),
        (entry(shape=[0], offsets=[2, 2]), 4, "'b' to start at byte 4, found an overlap: 2"),
        (entry(offsets=[4, 8]), 9, "8 bytes of tensors after the header, found 9 bytes"),
        (entry(offsets=[4, 8]), 7, "8 bytes of tensors after the header, found 7 bytes"),
    ],
    ids=["hole", "overlap", "alias", "empty inside another", "trailing byte", "missing byte"],
)
def test_tensors_that_do_not_tile_the_data_are_refused(second: Any, data_bytes: int, fault: str) -> None:
    with pytest.raises(ShardFormatError, match=fault):
        parse_document({"a": entry(), "b": second}, data_bytes)


@pytest.mark.parametrize("metadata", [["a"], "a", 3, {"a": 1}, {"a": None}, {"a": {}}], ids=str)
def test_metadata_must_map_strings_to_strings(metadata: Any) -> None:
    with pytest.raises(ShardFormatError, match="__metadata__ to map strings to strings"):
        parse_document({"__metadata__": metadata}, 0)


@pytest.mark.parametrize("text", ["{}", '{"__metadata__": null}'])
def test_a_file_without_metadata_has_none(text: str) -> None:
    assert parse_shard_header(text.encode(), 0, "a").metadata is None


def test_a_message_is_short_and_printable_whatever_the_name() -> None:
    with pytest.raises(ShardFormatError, match=r"x1b\[31m") as caught:
        parse_document({"\x1b[31m" + "a" * 3_000: entry("F32")})
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


def test_a_message_says_what_to_do_with_a_damaged_file() -> None:
    with pytest.raises(ShardFormatError, match="hint: the file is damaged or incomplete; fetch it again"):
        parse_document({}, 3)


@pytest.mark.parametrize(("length", "is_read"), [(4096, True), (4097, False)])
def test_a_name_has_at_most_4096_characters(length: int, is_read: bool) -> None:
    refusal = refusal_of(save({"é" * length: torch.zeros(1)}))
    assert (not refusal) == is_read
    assert is_read or "names of at most 4096 characters, found one of 4097" in refusal
