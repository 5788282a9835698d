"""What `import rawmerge` offers: exactly what it says, documented and typed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import rawmerge
from rawmerge import errors
from rawmerge.planning import PlanChoices
from rawmerge.run_options import RunChoices, RunOptions
from tests.builders import folder_bytes, tiny_merge


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


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_merge(tmp_path)


def test_options_as_a_value_give_the_bytes_of_single_choices(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    options = rawmerge.choose_options(dtype="bfloat16", max_shard_size="1MB", order="once")
    assert options == rawmerge.MergeOptions(dtype="bfloat16", max_shard_size=10**6, order="once")
    rawmerge.merge_adapter(base, [adapter, f"{adapter}:0.5"], tmp_path / "value", options=options, threads=1)
    single = tmp_path / "single"
    rawmerge.merge_adapter(
        base, [adapter, f"{adapter}:0.5"], single, dtype="bfloat16", max_shard_size="1MB", order="once"
    )
    made = folder_bytes(tmp_path / "value")
    assert "model.safetensors" in made
    assert made == folder_bytes(single)


def test_options_are_frozen_and_given_in_one_way(inputs: tuple[Path, Path]) -> None:
    base, adapter = inputs
    options = rawmerge.choose_options(combine="ties", density=1)
    assert (options.order, options.density, type(options.density)) == ("once", 1.0, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.order = "serial"  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"options or dtype, not both"):
        rawmerge.plan_merge(base, adapter, options=options, dtype="float16")
    with pytest.raises(TypeError, match=r"no choice dtyp;"):
        rawmerge.plan_merge(base, adapter, dtyp="float16")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no choice overwite;"):
        rawmerge.merge_adapter(base, adapter, base.parent / "out", overwite=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"dtype must be one of"):
        rawmerge.plan_merge(base, adapter, options=rawmerge.MergeOptions(dtype="float8"))


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        *(("seed", wrong) for wrong in (1.5, True, "3", -1)),
        *(("max_shard_size", wrong) for wrong in (-5, 1e4, "5GB")),
        *(("replaced_by", wrong) for wrong in (True, 1.0, -1)),
        *(("density", wrong) for wrong in ("0.5", True)),
        *(("force", 1), ("card", 0), ("dtype", None), ("combine", None), ("order", b"once")),
    ],
)
def test_what_a_plan_could_not_tell_is_no_option(choice: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{choice} must be"):
        rawmerge.MergeOptions(**{choice: wrong})


def test_a_whole_density_is_the_number_it_stands_for(inputs: tuple[Path, Path]) -> None:
    base, adapter = inputs
    options = rawmerge.MergeOptions(combine="ties", order="once", density=1)
    plan = rawmerge.plan_merge(base, [adapter, f"{adapter}:2"], options=options)
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
    for choice, wrong in (("seed", 1.5), ("seed", -1)):
        with pytest.raises((TypeError, ValueError), match=f"{choice} must be"):
            rawmerge.plan_merge(base, [adapter, adapter], combine="dare", density=0.5, **{choice: wrong})  # type: ignore[arg-type]


def test_the_choices_are_the_fields_of_the_options() -> None:
    fields = [field.name for field in dataclasses.fields(rawmerge.MergeOptions)]
    assert sorted(PlanChoices.__annotations__) == sorted(fields)
    run = [field.name for field in dataclasses.fields(RunOptions)]
    assert sorted(RunChoices.__annotations__) == sorted(run)
    assert not {*fields} & {*run}
    assert all(f"        {name}: " in (rawmerge.MergeOptions.__doc__ or "") for name in fields)
