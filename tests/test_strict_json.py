"""Strict JSON: what two parsers would read differently is refused; the rest is read as Python reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from tests.strategies import SETTINGS, Document, json_layouts, json_objects

json_like = st.lists(
    st.sampled_from(
        ["{", "}", "[", "]", ":", ",", '"', '"a"', "1", "-", "0", ".5", "e9", "true", "null", "NaN", r"\u", "d800", " "]
    )
).map("".join)


@SETTINGS
@given(json_objects(), json_layouts())
def test_any_layout_of_an_object_is_read(document: Document, layout: dict[str, Any]) -> None:
    assert parse_json_object(json.dumps(document, **layout).encode()) == document


@SETTINGS
@given(st.binary() | json_like.map(str.encode))
def test_bytes_of_any_kind_are_an_object_or_a_named_error(raw: bytes) -> None:
    try:
        found = parse_json_object(raw)
    except StrictJsonError:
        return
    assert found == json.loads(raw)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Expecting value"),
        ("null", "not a JSON object but NoneType"),
        ("[]", "not a JSON object but list"),
        ('"a"', "not a JSON object but str"),
        ("{'a': 1}", "property name enclosed in double quotes"),
        ('{"a": 1,}', "property name enclosed in double quotes|Illegal trailing comma"),
        ('{"a": 01}', "delimiter"),
        ('{"a": 1} {"a": 1}', "Extra data"),
        ('{"a": "\n"}', "Invalid control character"),
        ("\ufeff{}", "BOM"),
        ('{"a": 1, "a": 1}', "key 'a' occurs twice"),
        ('{"a": 1, "\\u0061": 2}', "key 'a' occurs twice"),
        ('{"a": [{"b": 1, "b": 2}]}', "key 'b' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": [Infinity]}', "Infinity is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is beyond any float"),
        ('{"a": -1e999}', "-1e999 is beyond any float"),
        ('{"a": -0}', "-0 is no whole number"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ('{"a": ["\\udc00\\ud800"]}', "half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:25],
)
def test_what_parsers_disagree_on_is_refused(text: str, fault: str) -> None:
    with pytest.raises(StrictJsonError, match=fault):
        parse_json_object(text.encode())


@pytest.mark.parametrize("raw", [b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', '{"a": "é"}'.encode("latin-1")])
def test_bytes_that_are_not_utf_8_are_refused_with_their_place(raw: bytes) -> None:
    with pytest.raises(StrictJsonError, match="not UTF-8 at byte 7"):
        parse_json_object(raw)


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\\ud800", r"\\\\udfff", "-0"])
def test_strings_that_only_look_like_faults_are_read(text: str) -> None:
    document = f'{{"a": "{text}", "b": -0.0, "c": -1}}'
    assert parse_json_object(document.encode()) == json.loads(document)


def test_infinity_is_read_where_it_is_allowed() -> None:
    found = parse_json_object(b'{"a": Infinity, "b": -Infinity, "c": 1e999}', allows_infinity=True)
    assert found == {"a": float("inf"), "b": float("-inf"), "c": float("inf")}


def test_duplicates_are_refused_where_infinity_is_allowed() -> None:
    with pytest.raises(StrictJsonError, match="'a' occurs twice"):
        parse_json_object(b'{"a": NaN, "a": NaN}', allows_infinity=True)


def test_a_message_is_bounded_whatever_the_key() -> None:
    key = "\\u0007" + "a" * 10_000
    with pytest.raises(StrictJsonError, match=r"key '\\x07a+' occurs twice") as caught:
        parse_json_object(f'{{"{key}": 1, "{key}": 1}}'.encode())
    assert len(str(caught.value)) < 200
