"""Merge files as text: what scalars mean, what is refused, and that garbage is told, not thrown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rawmerge
from rawmerge.errors import MissingFileError, Problem, RefusedError
from rawmerge.exporting.interpolation import interpolated
from rawmerge.exporting.llamafactory import llamafactory_job
from rawmerge.exporting.llamafactory_keys import KNOWN
from rawmerge.exporting.yaml_file import MAX_YAML_BYTES, YamlError, parse_yaml, read_yaml, with_overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # YAML 1.1 says text, OmegaConf a number
        ("5.0e-6", 5e-6),
        ("-2E+3", -2000.0),
        ("'1e-4'", "1e-4"),
        ("2", 2),
        ("0x10", 16),
        ("1_000", 1000),
        (".5", 0.5),
        ("true", True),
        ("off", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-11-27", "2026-11-27"),
        ("a,b", "a,b"),
        ("[a, 'b c']", ["a", "b c"]),
        ("- a\n- 2", ["a", 2]),
        ("{a: {b: no}}", {"a": {"b": False}}),
        ("path/to: x", {"path/to": "x"}),
        ("{1: 2}", {"1": 2}),
        ("&x [1, *y]", None),
    ],
)
def test_scalars_mean_what_omegaconf_makes_of_them(text: str, value: Any) -> None:
    if text.startswith("&x"):
        with pytest.raises(YamlError, match="undefined alias"):
            parse_yaml(text)
    else:
        parsed = parse_yaml(text)
        assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\na: 2", "the key 'a' twice in line 2, column 1"),
        ("a: {b: 1, 'b': 2}", "the key 'b' twice"),
        ("a: [1", "line 1"),
        ("a: b: c", "mapping values are not allowed here in line 1, column 5"),
        ("a: !!python/object/apply:os.system [ls]", "a value with the tag"),
        ("a: !!python/name:os.system ''", "a value with the tag"),
        ("a: !mine 3", "a value with the tag '!mine'"),
        ("a: !!set {b}", "a value with the tag"),
        ("a: !!binary aGk=", "a value with the tag"),
        ("a: !!int x", "'x' in place of a int"),
        ("a: !!bool x", "in place of a bool"),
        ("a: !!int ''", "in place of a int"),
        ("a: " + "9" * 5000, "in place of a int"),
        ("? [a]\n: b", "a key that is no text"),
        ("&a [*a]", "nested too deeply"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n" + "b: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]",
            "more than 20000 values",
        ),
        ("[" * 3000, "nested too deeply"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: \x00", "special characters are not allowed"),
        ("\t- a", "line 1"),
    ],
)
def test_what_is_no_merge_file_is_told_by_its_place(text: str, found: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"", "nothing at the top"),
        (b"- a", "a list at the top"),
        (b"just words", "text at the top"),
        (b"a: \xff", "no UTF-8 from byte 3"),
        (b"a: [", "line 1"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, raw: bytes, found: str) -> None:
    path = tmp_path / "merge.yaml"
    path.write_bytes(raw)
    with pytest.raises(RefusedError) as caught:
        read_yaml(path)
    (problem,) = caught.value.problems
    assert problem.subject == str(path)
    assert found in problem.found


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(RefusedError):
        read_yaml(tmp_path / "huge.yaml")


def test_a_byte_order_mark_is_read_through(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_bytes("\ufeffa: b".encode())
    assert read_yaml(tmp_path / "merge.yaml") == {"a": "b"}


# --- overrides ---


def test_overrides_win_and_leave_the_file_s_table_alone() -> None:
    document = {"export_dir": "a", "peft_config": {"export_size": 5, "name": "lora"}}
    texts = ["export_dir=b=c", "peft_config.export_size=2", "new.key=[1, x]", "template=", "infer_dtype=null"]
    assert with_overrides(document, texts) == {
        "export_dir": "b=c",
        "peft_config": {"export_size": 2, "name": "lora"},
        "new": {"key": [1, "x"]},
        "template": None,
        "infer_dtype": None,
    }
    assert document == {"export_dir": "a", "peft_config": {"export_size": 5, "name": "lora"}}


def test_all_wrong_overrides_are_told_at_once() -> None:
    with pytest.raises(RefusedError) as caught:
        with_overrides({}, ["--export_dir", "=x", "a..b=1", "good=1", "bad=[1", "two=a: b: c"])
    assert [problem.subject for problem in caught.value.problems] == ["--export_dir", "=x", "a..b=1", "bad", "two"]


# --- interpolation ---


def test_variables_and_keys_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "/data/runs")
    monkeypatch.delenv("NOT_SET", raising=False)
    document = {
        "run": "${oc.env:RUNS}/7",
        "adapters": ["${run}/lora", "plain"],
        "nested": {"size": 3, "out": "${nested.size}-${oc.env:NOT_SET, merged}"},
    }
    assert interpolated(document) == {
        "run": "/data/runs/7",
        "adapters": ["/data/runs/7/lora", "plain"],
        "nested": {"size": 3, "out": "3-merged"},
    }


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:RAWMERGE_NOT_SET}",
        "${missing}",
        "${oc.decode:x}",
        "${now:%Y}",
        "${",
        "${a",
        "${}",
        "${table}",
        "${me}",
    ],
)
def test_what_stands_for_nothing_is_refused_by_key(value: str) -> None:
    with pytest.raises(RefusedError) as caught:
        interpolated({"me": value, "table": {"a": 1}})
    assert caught.value.problems[0].subject == "me"


def test_texts_that_grow_without_end_are_refused() -> None:
    document = {"a": "x" * 40_000, "b": "${a}${a}", "c": "${b}${b}"}
    with pytest.raises(RefusedError) as caught:
        interpolated(document)
    assert {problem.subject for problem in caught.value.problems} == {"b", "c"}


# --- garbage ---


def refusal(attempt: Callable[[], object]) -> tuple[Problem, ...]:
    """Return the problems that an attempt is refused for, none where it succeeds; anything else it raises is a bug."""
    try:
        attempt()
    except RefusedError as error:
        return error.problems
    return ()


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "merge.yaml"
    path.write_bytes(raw)
    assert refusal(lambda: rawmerge.read_export(path)), "sixty bytes of garbage name no base, adapter and output"


@given(st.text(alphabet="ab:-[]{}&*!?|>%@`'\"#,\n \t~$=.0123", max_size=80))
def test_yaml_s_own_signs_are_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except YamlError as error:
        told = str(error)
    else:
        told = "a value"
    assert told


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)) | st.text(max_size=8), _VALUES, max_size=8))
def test_tables_of_any_values_become_a_job_or_are_refused(table: dict[str, Any]) -> None:
    problems = refusal(lambda: llamafactory_job(table))
    unset = {"model_name_or_path", "adapter_name_or_path", "export_dir"} - {
        key for key, value in table.items() if value is not None
    }
    assert unset <= {problem.subject for problem in problems} or {"peft_config", "model"} & table.keys()


@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_overrides_are_taken_or_refused(texts: list[str]) -> None:
    problems = refusal(lambda: with_overrides({"a": 1}, texts))
    assert len(problems) >= sum("=" not in text for text in texts)
