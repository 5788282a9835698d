"""What `import rawmerge` offers: exactly what it says, documented and typed."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import rawmerge
from rawmerge import errors


def test_all_is_sorted_and_complete() -> None:
    assert rawmerge.__all__ == sorted(rawmerge.__all__)
    assert dir(rawmerge) == rawmerge.__all__
    for name in rawmerge.__all__:
        assert getattr(rawmerge, name) is not None


@pytest.mark.parametrize("name", [name for name in rawmerge.__all__ if name != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(rawmerge, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        rawmerge.fuse  # noqa: B018


def test_no_public_name_is_hidden_by_a_module() -> None:
    modules = {path.stem for path in Path(rawmerge.__file__).parent.glob("*.py")}
    assert not modules & set(rawmerge.__all__)


def test_names_keep_their_meaning_after_all_modules_are_imported() -> None:
    before = {name: getattr(rawmerge, name) for name in rawmerge.__all__}
    for path in Path(rawmerge.__file__).parent.glob("[a-z]*.py"):
        importlib.import_module(f"rawmerge.{path.stem}")
    assert {name: getattr(rawmerge, name) for name in rawmerge.__all__} == before


def test_the_type_marker_is_shipped() -> None:
    assert (Path(rawmerge.__file__).parent / "py.typed").exists()


def test_the_tree_in_the_docstring_names_every_error_with_its_exit_code() -> None:
    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.RawmergeError):
            assert name in tree
    assert errors.RefusedError.exit_code == 3
    assert errors.MergeError.exit_code == 4
    assert errors.VerificationError.exit_code == 5
