"""Edits of JSON text: the edited values change, and not one other byte."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.formats.config_text import insert_value, insert_values, replace_values
from tests.strategies import SETTINGS, Document, json_layouts, json_objects, json_scalars, texts

Path = tuple[str, ...]
MARK = "\u2063 a value that no other text holds \u2063"


def paths_of(document: Document, path: Path = ()) -> list[Path]:
    found = []
    for key, value in document.items():
        found += [(*path, key), *(paths_of(value, (*path, key)) if isinstance(value, dict) else [])]
    return found


def with_value(document: Document, path: Path, value: Any) -> Document:
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def apply_edits(document: Document, edits: dict[Path, Any], path: Path = ()) -> Document:
    """Return what the edits mean, by rebuilding the document: an outer edit hides those inside it."""
    return {
        key: edits.get((*path, key), apply_edits(value, edits, (*path, key)) if isinstance(value, dict) else value)
        for key, value in document.items()
    }


@SETTINGS
@given(st.data(), json_objects().filter(bool), json_layouts(), json_scalars(), json_scalars())
def test_a_value_is_replaced_and_the_text_around_it_stays(
    data: st.DataObject, document: Document, layout: dict[str, Any], old: Any, new: Any
) -> None:
    path = data.draw(st.sampled_from(paths_of(document)))
    around = json.dumps(with_value(document, path, MARK), **layout).split(json.dumps(MARK, **layout))
    text = json.dumps(old, **layout).join(around)
    assert replace_values(text, {path: new}) == json.dumps(new).join(around)


@SETTINGS
@given(st.data(), json_objects(), json_layouts(), json_objects())
def test_any_set_of_edits_gives_the_edited_document(
    data: st.DataObject, document: Document, layout: dict[str, Any], new: Document
) -> None:
    paths = [*paths_of(document), ("missing",), ("text_config", "missing")]
    edits = data.draw(st.dictionaries(st.sampled_from(paths), json_scalars() | st.just(new), max_size=4))
    edited = replace_values(json.dumps(document, **layout), edits)
    assert json.loads(edited) == apply_edits(document, edits)


@SETTINGS
@given(json_objects(), json_layouts())
def test_a_text_without_the_path_is_returned_as_it_is(document: Document, layout: dict[str, Any]) -> None:
    text = json.dumps(document, **layout)
    assert replace_values(text, {(): 1, ("no such key",): 1, ("a", "no such key"): 1}) == text


@SETTINGS
@given(json_objects(), json_layouts(), texts(), json_scalars(), st.text(" \t\n\r"))
def test_an_inserted_member_comes_last_and_the_text_before_it_stays(
    document: Document, layout: dict[str, Any], key: str, value: Any, space: str
) -> None:
    document.pop(key, None)
    text = space + json.dumps(document, **layout) + space
    edited = insert_value(text, key, value)
    assert list(json.loads(edited).items()) == [*document.items(), (key, value)]
    assert edited.startswith(text.rstrip().removesuffix("}").rstrip())
    assert edited.endswith("\n}" + space)


@pytest.mark.parametrize("text", ["{}", "{ }", "{\n}", "{\n\n  }"])
def test_a_member_is_inserted_into_an_empty_object(text: str) -> None:
    assert json.loads(insert_value(text, "a", False)) == {"a": False}


def test_an_inserted_member_looks_like_transformers_wrote_it() -> None:
    assert insert_value('{\n  "a": 1\n}\n', "b", False) == '{\n  "a": 1,\n  "b": false\n}\n'


def test_spellings_and_escapes_elsewhere_are_kept() -> None:
    text = '{"eps": 1.0E-05, "lim": Infinity, "name": "\\u00e9\\/", "dtype" :\t"float16" , "a": [1,2]}'
    assert replace_values(text, {("dtype",): "bfloat16"}) == text.replace("float16", "bfloat16")


def test_no_edits_leave_even_a_missing_config_as_it_is() -> None:
    assert replace_values("", {}) == ""


def test_an_escaped_key_is_the_key_that_it_spells() -> None:
    assert replace_values(r'{"\u0064type": "float16"}', {("dtype",): "x"}) == r'{"\u0064type": "x"}'


def test_objects_in_lists_are_not_entered() -> None:
    text = '{"layers": [{"dtype": "float16"}], "dtype": 1}'
    assert replace_values(text, {("dtype",): 2, ("layers", "dtype"): 2}) == text.replace("1}", "2}")


def test_braces_in_strings_are_text() -> None:
    text = '{"a": "{\\"b\\": 1}", "c": {"}": "{"}}'
    assert replace_values(text, {("a", "b"): 2, ("c", "}"): 3}) == '{"a": "{\\"b\\": 1}", "c": {"}": 3}}'


def test_a_key_that_occurs_twice_is_replaced_twice() -> None:
    assert replace_values('{"a": 1, "a": 2}', {("a",): 3}) == '{"a": 3, "a": 3}'


def test_an_edit_inside_a_replaced_value_is_lost_with_it() -> None:
    text = '{"tie": {"tie": true}, "b": 1}'
    assert replace_values(text, {("tie",): False, ("tie", "tie"): False}) == '{"tie": false, "b": 1}'


@SETTINGS
@given(json_objects(), json_objects(), json_layouts(), texts(), json_scalars() | json_objects())
def test_a_member_is_inserted_into_a_nested_object(
    outer: Document, inner: Document, layout: dict[str, Any], key: str, value: Any
) -> None:
    inner.pop(key, None)
    document = {**outer, "text_config": inner, "last": {"text_config": {}}}
    edited = insert_value(json.dumps(document, **layout), key, value, ("text_config",))
    assert json.loads(edited) == {**document, "text_config": {**inner, key: value}}
    assert list(json.loads(edited)["text_config"])[-1] == key


def test_a_nested_member_looks_like_transformers_wrote_it() -> None:
    text = '{\n  "a": {\n    "b": 1\n  },\n  "c": 2\n}\n'
    edited = insert_value(text, "d", {"e": 3}, ("a",))
    assert edited == json.dumps({"a": {"b": 1, "d": {"e": 3}}, "c": 2}, indent=2) + "\n"


@pytest.mark.parametrize("path", [("b",), ("a", "b"), ("c",)])
def test_a_member_cannot_be_inserted_where_there_is_no_object(path: Path) -> None:
    with pytest.raises(KeyError):
        insert_value('{"a": {}, "c": [{}]}', "key", 1, path)


@SETTINGS
@given(json_objects(), json_objects(), json_layouts(), texts(), json_scalars())
def test_members_are_inserted_into_several_objects_at_once(
    outer: Document, inner: Document, layout: dict[str, Any], key: str, value: Any
) -> None:
    document = {**outer, "a": {"a": inner, "b": {}}, "c": inner}
    for place in (document, inner):
        place.pop(key, None)
    paths = [path for path in ((), ("c",), ("a", "a"), ("a", "b")) if not {key} & set(path)]
    edited = json.loads(insert_values(json.dumps(document, **layout), key, dict.fromkeys(paths, value)))
    expected = json.loads(json.dumps(document))
    for path in paths:
        place = expected
        for part in path:
            place = place[part]
        place[key] = value
    assert edited == expected
