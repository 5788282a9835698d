"""The exception tree: exit codes, texts, and refusals gathered into one."""

from __future__ import annotations

import pickle

import pytest

from rawmerge import errors
from rawmerge.errors import (
    AdapterError,
    CheckpointError,
    HubError,
    InputChangedError,
    MergeError,
    MissingFileError,
    NonFiniteTensorError,
    NothingChangedError,
    OutputError,
    PlanError,
    Problem,
    ProblemCollector,
    RawmergeError,
    RefusedError,
    ShardFormatError,
    UnsupportedAdapterError,
    VerificationError,
    printable,
    quote,
)

FIRST = Problem("r", "a number", "nothing")
SECOND = Problem("bias", "'none'", "'all'", "train without biases")
REFUSALS = [
    RefusedError,
    MissingFileError,
    CheckpointError,
    ShardFormatError,
    AdapterError,
    UnsupportedAdapterError,
    PlanError,
    OutputError,
    HubError,
]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("code", "classes"),
    [
        (1, [RawmergeError]),
        (3, REFUSALS),
        (4, [MergeError, NonFiniteTensorError, NothingChangedError, InputChangedError]),
        (5, [VerificationError]),
    ],
)
def test_the_exit_code_says_what_happened(code: int, classes: list[type[RawmergeError]]) -> None:
    assert {error.exit_code for error in classes} == {code}


def test_every_class_is_in_the_module_s_table() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    missing = [error.__name__ for error in classes if error.__name__ not in str(errors.__doc__)]
    assert not missing
    assert all(issubclass(error, RawmergeError) for error in classes)


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (MissingFileError, FileNotFoundError),
        (ShardFormatError, CheckpointError),
        (UnsupportedAdapterError, AdapterError),
        (NonFiniteTensorError, MergeError),
        (NothingChangedError, MergeError),
        (InputChangedError, MergeError),
    ],
)
def test_a_special_case_is_caught_as_the_general_one(error: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(error, parent)


def test_one_problem_is_one_sentence() -> None:
    assert str(PlanError(FIRST)) == "'r': expected a number, found nothing"


def test_a_hint_stands_on_its_own_line() -> None:
    assert str(PlanError(SECOND)) == "'bias': expected 'none', found 'all'\n    hint: train without biases"


def test_no_part_of_a_problem_can_reach_the_terminal_or_look_like_a_line_of_ours() -> None:
    hostile = "été\x1b[31m\r\nFORGED\x9b\u202e"
    lines = str(PlanError(Problem(*[hostile] * 4))).split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert lines[1] == r"    hint: été\x1b[31m\r\nFORGED\x9b\u202e"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("été 漢字 it's \\n", "été 漢字 it's \\n"),
        ("é\x7f\0", r"é\x7f\x00"),
        ("\u2028\u200d\ufeff", r"\u2028\u200d\ufeff"),
    ],
)
def test_only_what_is_not_printable_is_escaped(line: str, shown: str) -> None:
    assert printable(line) == shown


def test_several_problems_are_counted_and_listed() -> None:
    lines = str(AdapterError(FIRST, SECOND)).splitlines()
    assert lines[:2] == ["2 problems", "  - 'r': expected a number, found nothing"]


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_refusal_survives_pickling_whole(error: type[RefusedError], count: int) -> None:
    # MissingFileError is an OSError too, which has ideas of its own about two to five arguments
    problems = [Problem(f"tensor {number}", "one", "none") for number in range(count)]
    found = pickle.loads(pickle.dumps(error(*problems)))
    assert type(found) is error
    assert found.problems == tuple(problems)
    assert str(found) == str(error(*problems))


def test_a_non_finite_tensor_is_named_with_its_dtype() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteTensorError("model.\x07norm", "F16")))
    assert str(error).startswith(r"'model.\x07norm': expected finite values in F16, found inf or NaN")
    assert (error.tensor_name, error.storage_dtype) == ("model.\x07norm", "F16")


def test_a_merge_without_effect_says_why_and_what_to_do() -> None:
    assert "all lora_B zero" in str(NothingChangedError())
    assert "--dtype float32" in str(NothingChangedError())


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("model.norm", "'model.norm'"),
        ("it's", '"it\'s"'),
        ("été", "'été'"),
        ("a\nb", r"'a\nb'"),
        ("\x1b[31mred", r"'\x1b[31mred'"),
        ("a\u202eb", r"'a\u202eb'"),
        ("\ud800", r"'\ud800'"),
        (3, "'3'"),
    ],
)
def test_quoted_names_cannot_reach_the_terminal(name: object, quoted: str) -> None:
    assert quote(name) == quoted


@pytest.mark.parametrize("name", ["a" * 100_000, "\x00" * 100_000, "'" * 100_000])
def test_quoted_names_are_bounded_and_show_that_they_are_cut(name: str) -> None:
    assert len(quote(name)) == errors.MAX_QUOTED_LENGTH
    assert quote(name).endswith("...'")


def test_a_name_that_just_fits_is_not_cut() -> None:
    name = "a" * (errors.MAX_QUOTED_LENGTH - 2)
    assert quote(name) == f"'{name}'"


def test_problems_of_one_class_are_raised_as_it_in_order() -> None:
    collector = ProblemCollector()
    collector.add(AdapterError, [FIRST])
    collector.add(AdapterError, iter([SECOND]))
    with pytest.raises(AdapterError, match="2 problems") as caught:
        collector.raise_if_any()
    assert caught.value.problems == (FIRST, SECOND)


def test_problems_of_several_classes_are_raised_as_a_plan_error() -> None:
    collector = ProblemCollector()
    collector.add(AdapterError, [FIRST])
    collector.add(CheckpointError, [SECOND])
    with pytest.raises(PlanError, match="2 problems") as caught:
        collector.raise_if_any()
    assert caught.value.problems == (FIRST, SECOND)


def test_no_problems_are_no_error() -> None:
    collector = ProblemCollector()
    collector.add(PlanError, [])
    collector.raise_if_any()


def test_an_absorbed_refusal_is_raised_at_the_end() -> None:
    collector = ProblemCollector()
    with collector.absorb():
        fail(MissingFileError(FIRST))
    with pytest.raises(MissingFileError, match="'r': expected a number"):
        collector.raise_if_any()


@pytest.mark.parametrize("error", [MergeError("full"), ValueError("bug"), KeyboardInterrupt("stop")], ids=repr)
def test_only_refusals_are_absorbed(error: BaseException) -> None:
    with pytest.raises(type(error), match=str(error)), ProblemCollector().absorb():
        fail(error)
