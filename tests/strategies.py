"""Hypothesis strategies: safetensors files, good and damaged; JSON as strangers format it; module paths."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: Every property test runs with these. A test's tmp_path serves all of its examples: each overwrites what it reads.
SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

#: Bits of one element, from the table in the safetensors README.
BITS = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

Document = dict[str, Any]


@dataclass(frozen=True)
class ShardBytes:
    """A safetensors file in its three parts: what the length says, the header, and the data."""

    header: bytes
    data: bytes
    stated_length: int

    @property
    def content(self) -> bytes:
        return struct.pack("<Q", self.stated_length) + self.header + self.data


def texts(max_size: int = 12) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=max_size)


def module_paths() -> st.SearchStrategy[str]:
    segments = st.sampled_from(["model", "layers", "0", "1", "10", "q_proj", "xq_proj", "proj", "c.attn", "h"])
    return st.lists(segments, min_size=1, max_size=5).map(".".join)


def module_patterns() -> st.SearchStrategy[str]:
    """Draw keys of `rank_pattern` as people write them: names, paths, and regular expressions on either."""
    pieces = st.sampled_from(
        ["model", "layers", "0", "1", "q_proj", "proj", ".", r"\.", ".*", "(0|1)", r"\d+", "[01]", "^", "$", "?"]
    )
    return st.lists(pieces, min_size=1, max_size=5).map("".join)


@st.composite
def _entries(draw: st.DrawFn) -> Document:
    """Draw tensors one after the other in the data, listed in any order."""
    document: Document = {}
    position = 0
    for name in draw(st.lists(texts().filter(lambda text: text != "__metadata__"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        if BITS[dtype] % 8:  # elements of less than a byte come in groups that fill bytes
            shape = [*shape, 4]
        end = position + prod(shape) * BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return dict(draw(st.permutations(list(document.items()))))


def data_size(document: Document) -> int:
    ends = [fields["data_offsets"][1] for name, fields in document.items() if name != "__metadata__"]
    return max(ends, default=0)


def metadata_tables() -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(texts(), texts(), max_size=3)


@st.composite
def shard_documents(draw: st.DrawFn) -> Document:
    """Draw a valid header as JSON has it."""
    entries = draw(_entries())
    metadata = draw(st.none() | metadata_tables())
    return entries if metadata is None else {"__metadata__": metadata, **entries}


def json_layouts() -> st.SearchStrategy[dict[str, Any]]:
    """Draw keyword arguments of `json.dumps`: the ways in which people's tools lay JSON out."""
    return st.fixed_dictionaries(
        {
            "indent": st.sampled_from([None, 0, 2, 4, "\t"]),
            "separators": st.sampled_from([None, (",", ":"), (" , ", " : "), (",\n", ":  ")]),
            "ensure_ascii": st.booleans(),
        }
    )


@st.composite
def shards(draw: st.DrawFn) -> ShardBytes:
    """Draw a valid file: any layout of the JSON, white space around it, data of any alignment."""
    document = draw(shard_documents())
    text = json.dumps(document, **draw(json_layouts()))
    header = (draw(_spaces()) + text + draw(_spaces())).encode()
    data = bytes(number % 251 for number in range(data_size(document)))
    return ShardBytes(header, data, len(header))


def _spaces() -> st.SearchStrategy[str]:
    return st.text(" \t\n\r", max_size=3)


@st.composite
def damaged_shards(draw: st.DrawFn) -> ShardBytes:
    """Draw a file that is valid but for one to three kinds of damage; some damage does no harm."""
    document = draw(shard_documents())
    size = data_size(document)
    for damage in draw(st.lists(st.sampled_from(_DOCUMENT_DAMAGE), max_size=2)):
        damage(draw, document)
        document = copy.deepcopy(document)  # the next damage must not reach into what a strategy handed out
    # NaN, Infinity and lone surrogates are written as Python writes them
    header = json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    for damaged in draw(st.lists(st.sampled_from(_TEXT_DAMAGE), max_size=1)):
        header = damaged(draw, header)
    size = draw(st.just(size) | st.sampled_from([0, max(size - 1, 0), size + 1, size + 8]))
    length = len(header)
    stated = draw(st.just(length) | st.sampled_from([0, max(length - 1, 0), length + 1, 2**63, 2**64 - 1]))
    return ShardBytes(header, bytes(size), stated)


def _odd_numbers() -> st.SearchStrategy[Any]:
    huge = st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
    other: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, False, 0.0, -0.0, 1.5, 8e0, 1e400, float("nan"), "0", [], {}, [0]]
    )
    return st.integers(-2, 9) | huge | other


def _an_entry(draw: st.DrawFn, document: Document) -> Document:
    entries = [fields for fields in document.values() if isinstance(fields, dict) and "dtype" in fields]
    return draw(st.sampled_from(entries)) if entries else {}


def _damage_offset(draw: st.DrawFn, document: Document) -> None:
    offsets = _an_entry(draw, document).get("data_offsets")
    if isinstance(offsets, list) and offsets:
        offsets[draw(st.integers(0, len(offsets) - 1))] = draw(_odd_numbers())


def _damage_shape(draw: st.DrawFn, document: Document) -> None:
    shape = _an_entry(draw, document).get("shape")
    if isinstance(shape, list):
        shape.insert(draw(st.integers(0, len(shape))), draw(_odd_numbers()))


def _empty_of_huge_sizes(draw: st.DrawFn, document: Document) -> None:
    shape = draw(st.permutations([0, draw(st.integers(1, 2**64)), draw(st.integers(1, 2**64))]))
    document["empty"] = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, 0]}


def _replace_field(draw: st.DrawFn, document: Document) -> None:
    entry = _an_entry(draw, document)
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
    odd_types = st.sampled_from(["f32", "F128", "I4", "", "F32 ", None, 3, [0, 1, 2], [1], [4, 0], [[0]], {"a": 1}])
    entry[field] = draw(odd_types | _odd_numbers())


def _drop_field(draw: st.DrawFn, document: Document) -> None:
    entry = _an_entry(draw, document)
    entry.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)


def _replace_entry(draw: st.DrawFn, document: Document) -> None:
    name = draw(st.sampled_from([*document, "new"]))
    document[name] = draw(_odd_numbers() | st.just({"dtype": "U8", "shape": [0], "data_offsets": [1, 1]}))


def _alias_entry(draw: st.DrawFn, document: Document) -> None:
    document["alias"] = json.loads(json.dumps(_an_entry(draw, document)))


def _damage_metadata(draw: st.DrawFn, document: Document) -> None:
    odd = st.sampled_from([None, {"a": None}, {"a": 1}, {"a": {"b": "c"}}, ["a"], "a", 3, {}, {"\ud800": "a"}])
    document["__metadata__"] = draw(odd)


def _odd_name(draw: st.DrawFn, document: Document) -> None:
    names = st.sampled_from(["", "\0", "../x", "\ud800", "\udc00\ud800", "\n", "a" * 500, "__metadata__ "])
    document[draw(names)] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


_DOCUMENT_DAMAGE: list[Callable[[st.DrawFn, Document], None]] = [
    _damage_offset,
    _damage_shape,
    _empty_of_huge_sizes,
    _replace_field,
    _drop_field,
    _replace_entry,
    _alias_entry,
    _damage_metadata,
    _odd_name,
]


def _insert_bytes(draw: st.DrawFn, header: bytes) -> bytes:
    odd = [b"\xef\xbb\xbf", b"\0", b"\xff", b"\xed\xa0\x80", b"-", b"0", b"1", b".0", b"e1", b",", b"}", b"{", b'"']
    place = draw(st.integers(0, len(header)))
    return header[:place] + draw(st.sampled_from(odd)) + header[place:]


def _drop_byte(draw: st.DrawFn, header: bytes) -> bytes:
    place = draw(st.integers(0, max(len(header) - 1, 0)))
    return header[:place] + header[place + 1 :]


def _repeat_members(draw: st.DrawFn, header: bytes) -> bytes:
    """Repeat all members, so that every key occurs twice."""
    inner = header[1:-1]
    return b"{" + inner + b", " + inner + b"}" if inner else header


def _negate_a_number(draw: st.DrawFn, header: bytes) -> bytes:
    return header.replace(draw(st.sampled_from([b"[0", b" 0", b" 1"])), b"[-0", 1)


def _wrap(draw: st.DrawFn, header: bytes) -> bytes:
    depth = draw(st.sampled_from([1, 130, 5000]))
    return draw(st.sampled_from([b"[" * depth + header + b"]" * depth, b'{"a":' * depth + header + b"}" * depth]))


def _append(draw: st.DrawFn, header: bytes) -> bytes:
    return header + draw(st.sampled_from([b"\0", b"x", b"{}", b" ", b"\x0b", b"\xc2\xa0"]))


_TEXT_DAMAGE = [_insert_bytes, _drop_byte, _repeat_members, _negate_a_number, _wrap, _append]


def json_scalars() -> st.SearchStrategy[Any]:
    numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    return st.none() | st.booleans() | numbers | texts()


def json_objects() -> st.SearchStrategy[Document]:
    """Draw configs: objects in objects and lists, with few keys, so that the same key occurs at several depths."""
    keys = st.sampled_from(["dtype", "text_config", "a", 'quo"te', "back\\slash", "é", "}", "{", ""]) | texts()
    values = st.recursive(
        json_scalars(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
    )
    return st.dictionaries(keys, values, max_size=5)
