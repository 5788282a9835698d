"""The choices of a run: how a plan is carried out. On the CPU none of them changes a bit of the output."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from rawmerge.byte_sizes import byte_limit

#: What makes a run fast, each of which `without` switches off, to measure what it is worth or to get round a fault.
MECHANISMS: Final = {
    "kernel": "plain LoRA is merged by rawmerge's own compiled code where its bits are torch's; else by torch",
    "reflink": "the whole shard is cloned where the file system can, and only changed tensors are written",
    "direct-io": "whole pages are written past the page cache where the file system can",
    "write-turns": "a third of the threads computes while the others wait for the disk",
    "preallocation": "the space of a shard is allocated before it is written",
    "early-import": "torch is imported while kept tensors are copied",
}
DEVICE_NAMES: Final = r"cpu|mps|cuda(:\d{1,3})?"


class ReplayChoices(TypedDict, total=False):
    """Those fields of `RunOptions` that matter where nothing is written, as keyword arguments.

    A `max_memory` may be a text, such as `512M` or `2GiB`.
    """

    threads: int | None
    max_memory: int | str | None
    without: Collection[str]


class RunChoices(ReplayChoices, total=False):
    """The fields of `RunOptions`, as keyword arguments."""

    overwrite: bool
    device: str
    link: bool
    consume_base: bool
    reuse: bool
    resume: bool
    verify: bool
    checksum: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a plan is carried out.

    Attributes:
        overwrite: replace a checkpoint that stands at the output, once the new one is complete.
        threads: how many threads work; None for some more than there are processors, at most eight.
        max_memory: bytes that the process may take, page cache of its files included where the system counts it;
            None for no limit but that of the process's own control group.
        device: where updates are computed: `cpu`, `cuda` (or `cuda:1`), `mps`.
        link: shards that the merge leaves as they are become hard links to the base's.
        consume_base: delete each base shard once its successor is durable.
        reuse: take shards over from the output that is replaced, where the same inputs made them.
        resume: take shards over that a merge that was cut off had finished, and leave them where this one is.
        verify: read the output back, and compare it with a second computation, before it is published.
        checksum: write `SHA256SUMS`, a manifest of the output's files for `sha256sum -c`.
        without: names of `MECHANISMS` that are not to be used.
    """

    overwrite: bool = False
    threads: int | None = None
    max_memory: int | None = None
    device: str = "cpu"
    link: bool = False
    consume_base: bool = False
    reuse: bool = True
    resume: bool = True
    verify: bool = False
    checksum: bool = False
    without: Collection[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        """Refuse what is no choice.

        Raises:
            ValueError: a number is not positive, or a name is unknown.
        """
        for name in ("threads", "max_memory"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                unit = " of bytes" if name == "max_memory" else ""
                raise ValueError(f"{name} must be a positive whole number{unit}, not {value!r}")
        if isinstance(self.without, str):
            raise ValueError(f"without must be a collection of names, not the text {self.without!r}")  # noqa: TRY004
        if unknown := sorted(set(self.without) - set(MECHANISMS)):
            raise ValueError(f"without: expected some of {', '.join(MECHANISMS)}, not {', '.join(unknown)}")
        if not re.fullmatch(DEVICE_NAMES, self.device):
            raise ValueError(f"device must be cpu, cuda, cuda:1 (or another number) or mps, not {self.device!r}")

    def uses(self, mechanism: str) -> bool:
        """Whether one of `MECHANISMS` may be used."""
        return mechanism not in self.without


def choose_run(choices: ReplayChoices) -> RunOptions:
    """Return the choices of a run as a value.

    Args:
        choices: some of `RunChoices`.

    Raises:
        TypeError: there is no such choice. ValueError: a choice is none of its values.
    """
    given: dict[str, Any] = dict(choices)
    if unknown := sorted(given.keys() - RunChoices.__annotations__.keys()):
        raise TypeError(f"there is no choice {', '.join(unknown)}; those of a run are in RunOptions")
    if isinstance(given.get("max_memory"), str):
        given["max_memory"] = byte_limit("max_memory", given["max_memory"])
    return RunOptions(**given)
