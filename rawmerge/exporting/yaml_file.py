"""YAML as merge files use it: text, numbers, switches, lists and tables; nothing that makes objects or runs code.

What plain scalars mean is what OmegaConf makes of them, which LLaMA-Factory reads with: PyYAML's safe loader, with
`1e-4` a number, dates as text, and no key twice. Only the tree of nodes is PyYAML's; values are made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rawmerge.errors import MissingFileError, Problem, RefusedError, quote
from rawmerge.inputs.tensor_source import read_small_file

MAX_YAML_BYTES: Final = 256 * 2**10
#: Values in a file, those that an alias repeats counted each time: a short file may stand for billions.
MAX_VALUES: Final = 20_000
_WHAT: Final = (
    "name the file of a merge by LLaMA-Factory, axolotl or mergekit; relative paths start from the working directory"
)
_TAG: Final = "tag:yaml.org,2002:"
_EXPONENT: Final = re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+", re.ASCII)
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class YamlError(ValueError):
    """The text is not YAML as merge files use it; the message says why."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the table that a YAML file holds.

    Raises:
        MissingFileError: the file cannot be read; RefusedError: it is too large, or no table of YAML.
    """
    try:
        raw = read_small_file(path, MAX_YAML_BYTES)
    except MissingFileError as error:
        raise MissingFileError(*(_missing(path, problem) for problem in error.problems)) from error
    try:
        document = parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _refused(path, f"bytes that are no UTF-8 from byte {error.start} on") from error
    except YamlError as error:
        raise _refused(path, str(error)) from error
    if not isinstance(document, dict):
        raise _refused(path, f"{kind_of(document)} at the top")
    return document


def parse_yaml(text: str) -> Any:
    """Return what a text of YAML stands for: a table, list, text, number, switch or None.

    Raises:
        YamlError: it is not YAML, has a key twice, or more than these values in it.
    """
    import yaml  # comes with huggingface_hub; only merge files need it

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Values().value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        told = ", ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"{told}{_at(mark) if mark else ''}") from error
    except yaml.YAMLError as error:
        raise YamlError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YamlError("tables or lists nested too deeply") from error


def with_overrides(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a table with values set by `key=value`, as LLaMA-Factory takes them: `a.b=c` goes into a nested table.

    Args:
        document: the file's table, left as it is.
        overrides: texts of the command line; the value is YAML, so that `key=` and `key=null` unset it.

    Raises:
        RefusedError: with all that are no `key=value`.
    """
    result, problems = dict(document), []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = name.split(".")
        if not equals or not all(path):
            problems.append(Problem(override, "key=value, such as export_dir=merged", "none", "see the file's keys"))
            continue
        try:
            result = _with_value(result, path, parse_yaml(text))
        except YamlError as error:
            problems.append(Problem(name, "a value of YAML", str(error), "quote it: key='\"text: with marks\"'"))
    if problems:
        raise RefusedError(*problems)
    return result


def kind_of(value: Any) -> str:
    """Say what kind of value this is, for people."""
    kinds = ((bool, "a switch"), (int | float, "a number"), (str, "text"), (dict, "a table"), (list, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "nothing")


def _with_value(table: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = table.get(first)
    return {**table, first: _with_value(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _missing(path: Path, problem: Problem) -> Problem:
    """Return why a file cannot be read, without the bound that only a large one meets."""
    if path.is_dir():
        return Problem(problem.subject, "a file", "a folder", _WHAT)
    return replace(problem, expected=problem.expected if path.is_file() else "a file", hint=_WHAT)


def _refused(path: Path, found: str) -> RefusedError:
    hint = "a merge file has lines such as `model_name_or_path: base/`"
    return RefusedError(Problem(str(path), "a table of YAML with each key once", found, hint))


def _at(mark: Any) -> str:
    return f" in line {mark.line + 1}, column {mark.column + 1}"


class _Values:
    """Makes the values of one tree of nodes, which aliases may make endless."""

    def __init__(self) -> None:
        self._count = 0

    def value(self, node: Any) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES} values, or an alias of what it stands in")
        kind = node.tag.removeprefix(_TAG)
        if node.id == "mapping" and kind == "map":
            return self._table(node)
        if node.id == "sequence" and kind == "seq":
            return [self.value(item) for item in node.value]
        if node.id == "scalar":
            return _scalar(node, kind)
        raise YamlError(f"a value with the tag {quote(node.tag)}{_at(node.start_mark)}")

    def _table(self, node: Any) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value if key.id == "scalar" else None
            if name is None:
                raise YamlError(f"a key that is no text{_at(key.start_mark)}")
            if name in table:
                raise YamlError(f"the key {quote(name)} twice{_at(key.start_mark)}")
            table[name] = self.value(value)
        return table


def _scalar(node: Any, kind: str) -> Any:
    from yaml.constructor import ConstructorError, SafeConstructor

    text = node.value
    if kind == "null":
        return None
    if kind in {"str", "timestamp", "value", "merge"}:
        if _SURROGATES.search(text):
            raise YamlError(f"half of a surrogate pair{_at(node.start_mark)}")
        return float(text.replace("_", "")) if node.style is None and _EXPONENT.fullmatch(text) else text
    makers = {name: getattr(SafeConstructor, f"construct_yaml_{name}") for name in ("bool", "int", "float")}
    if kind not in makers:
        raise YamlError(f"a value with the tag {quote(node.tag)}{_at(node.start_mark)}")
    try:
        return makers[kind](SafeConstructor(), node)
    except (ValueError, IndexError, KeyError, OverflowError, ConstructorError) as error:
        raise YamlError(f"{quote(text)} in place of a {kind}{_at(node.start_mark)}") from error
