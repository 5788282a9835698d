"""Every way rawmerge can say no, and the exit code that goes with it.

```
RawmergeError                    exit 1
  RefusedError    .problems      exit 3   nothing was written
    MissingFileError                      also a FileNotFoundError
    CheckpointError                       the base is unusable
      ShardFormatError                    one file breaks the safetensors format
    AdapterError                          the adapter is malformed
      UnsupportedAdapterError             valid PEFT, but not mergeable here
    PlanError                             adapter and base do not fit
    OutputError                           the output exists, is not writable, or the disk is too small
    HubError                              a hub id could not be fetched
    DeviceError                           the accelerator that was asked for is not there
    MemoryLimitError                      the merge takes more memory than it may
  MergeError                     exit 4   failed while writing; nothing was published
    UnfitValuesError                      the same inputs would fail again
      NonFiniteTensorError                a result overflowed where the base was finite
    NothingChangedError                   the merge would equal the base
    InputChangedError                     an input is no longer what the plan was made from
  VerificationError              exit 5   the output is not what it should be
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

MAX_QUOTED_LENGTH = 200


def quote(name: object) -> str:
    """Quote a name that may come from a stranger's file: control characters escaped, length bounded."""
    text = ascii(str(name)) if not str(name).isprintable() else repr(str(name))
    return text if len(text) <= MAX_QUOTED_LENGTH else f"{text[: MAX_QUOTED_LENGTH - 4]}...'"


def printable(line: str) -> str:
    """Escape in a line what a stranger's names may do to a terminal: controls, line ends, turns of direction."""
    return line if line.isprintable() else "".join(at if at.isprintable() else ascii(at)[1:-1] for at in line)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason for a refusal.

    Attributes:
        subject: the tensor, config field or file in question, unquoted.
        expected: what rawmerge needed to find.
        found: what it found instead.
        hint: what the user can do, or an empty string.
    """

    subject: str
    expected: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        # names are quoted where they are told; what is not must not reach a terminal either, nor look like a new line
        line = printable(f"{quote(self.subject)}: expected {self.expected}, found {self.found}")
        return f"{line}\n    hint: {printable(self.hint)}" if self.hint else line


class RawmergeError(Exception):
    """The root of all errors that rawmerge raises on purpose.

    Attributes:
        problems: what was expected and what was found instead, where it can be told in parts; else empty.
    """

    exit_code: ClassVar[int] = 1
    problems: tuple[Problem, ...] = ()


class RefusedError(RawmergeError):
    """Nothing was written; `problems` says why, all at once."""

    exit_code: ClassVar[int] = 3

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        return "\n".join([f"{len(self.problems)} problems", *(f"  - {problem}" for problem in self.problems)])


class MissingFileError(RefusedError, FileNotFoundError):
    """A file or directory that was named does not exist."""


class CheckpointError(RefusedError):
    """The base checkpoint is unusable: its files contradict each other."""


class ShardFormatError(CheckpointError):
    """One file breaks the safetensors format."""


class AdapterError(RefusedError):
    """The adapter is malformed."""


class UnsupportedAdapterError(AdapterError):
    """The adapter is valid PEFT, but this version of rawmerge does not merge it."""


class PlanError(RefusedError):
    """Adapter and base do not fit together."""


class OutputError(RefusedError):
    """The output exists already, cannot be written, or does not fit on the disk."""


class HubError(RefusedError):
    """A hub id could not be turned into local files."""


class DeviceError(RefusedError):
    """The accelerator that was asked for is missing, or does not work."""


class MemoryLimitError(RefusedError):
    """The merge takes more memory than it was given, or than its control group has."""


class MergeError(RawmergeError):
    """Writing failed; nothing was published."""

    exit_code: ClassVar[int] = 4


class UnfitValuesError(MergeError):
    """The values of base and adapter allow no merge of a tensor: the same inputs would fail again."""

    def __init__(self, tensor_name: str, expected: str, found: str, hint: str = "") -> None:
        super().__init__(tensor_name, expected, found, hint)
        self.tensor_name = tensor_name
        self.problems = (Problem(tensor_name, expected, found, hint),)

    def __str__(self) -> str:
        return str(self.problems[0])


class NonFiniteTensorError(UnfitValuesError):
    """A merged tensor holds inf or NaN where the base is finite."""

    def __init__(
        self,
        tensor_name: str,
        storage_dtype: str,
        found: str = "inf or NaN where the base is finite",
        hint: str = "the adapter may be broken, or the dtype too narrow; try --dtype float32",
    ) -> None:
        super().__init__(tensor_name, f"finite values in {storage_dtype}", found, hint)
        self.args = (tensor_name, storage_dtype, found, hint)  # what makes it again, where it is unpickled
        self.storage_dtype = storage_dtype


class NothingChangedError(MergeError):
    """Every output tensor equals the base: the adapter had no effect."""

    def __str__(self) -> str:
        return (
            "the merge would equal the base: no element of any updated tensor changed\n"
            "    hint: the adapter is untrained (all lora_B zero) or too small for the base's dtype; "
            "--dtype float32 keeps small deltas"
        )


class InputChangedError(MergeError):
    """An input file is shorter, longer or other than when the plan was made."""


class VerificationError(RawmergeError):
    """The output is not what base and adapter give; `problems` says in what, where it can be told in parts."""

    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.args[0], *(f"  - {problem}" for problem in self.problems)])


class ProblemCollector:
    """Gathers refusals, so that a user learns of all of them in one run."""

    def __init__(self) -> None:
        self.errors: list[RefusedError] = []

    def add(self, error: type[RefusedError], problems: Iterable[Problem]) -> None:
        """Record `problems`, if there are any, under the class `error`."""
        found = tuple(problems)
        if found:
            self.errors.append(error(*found))

    @contextmanager
    def absorb(self) -> Iterator[None]:
        """Record a refusal raised in the block instead of letting it pass."""
        try:
            yield
        except RefusedError as error:
            self.errors.append(error)

    def raise_if_any(self) -> None:
        """Raise everything gathered: as its own class when all agree on one, else as PlanError."""
        if not self.errors:
            return
        classes = {type(error) for error in self.errors}
        problems = [problem for error in self.errors for problem in error.problems]
        raise (classes.pop() if len(classes) == 1 else PlanError)(*problems)
