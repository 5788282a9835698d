"""Where results lie: `NAME.json` for programs, `NAME.md` for README, `NAME.svg` where there is a plot."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.machine import Machine

RESULTS: Final = Path(__file__).with_name("results")

#: Options that name places on one machine and change no result.
PLACES: Final = ("--workdir", "--results")


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to work and where results go."""
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path(tempfile.gettempdir(), "rawmerge-bench"),
        help="a directory on the disk to measure; holds twice the base (default: in the temporary directory)",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for tables, figures and plots (default: ours)"
    )


def told_command(module: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that repeats this run on any machine: without the places."""
    given = iter(sys.argv[1:] if arguments is None else arguments)
    kept = []
    for argument in given:
        if argument in PLACES:
            next(given, None)
        elif argument.partition("=")[0] not in PLACES:
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{module}", *kept])


def write_result(directory: Path, name: str, value: Mapping[str, object], text: str) -> None:
    """Write one result's figures and its Markdown.

    Args:
        directory: made unless it is there.
        name: of the files, without a suffix.
        value: what JSON can hold.
        text: Markdown; a link to the plot is `NAME.svg`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def signature(command: str, machine: Machine) -> str:
    """Return the lines that end every result: what made it, and on what."""
    return f"Made by `{command}` on {machine}."
