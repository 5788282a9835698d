"""The group of commands: every error of ours becomes its text and exit code, whichever command it came from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rawmerge.errors import RawmergeError, printable
from rawmerge.output.staging_directory import PUBLISHED_NOTE
from rawmerge.signals import Ended

INTERRUPTED = 130
#: What an interruption leaves behind, and what it leaves of commands that publish nothing.
_LEFT = "nothing was published"
_LEFT_BY = {"verify": "it was not verified", "plan": "nothing was planned", "inspect": "nothing was inspected"}


class Commands(click.Group):
    """Turns every error of ours into its text and exit code."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the command line."""
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt as error:  # click would make it an error of ours
            sys.exit(_tell_interruption(error))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RawmergeError as error:
            _tell_error(error, as_json=bool(ctx.meta.get("rawmerge.json")))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            ctx.exit(_tell_interruption(error, _LEFT_BY.get(ctx.invoked_subcommand or "", _LEFT)))


class KeyedCommand(click.Command):
    """A command that takes KEY=VALUE, which users write as options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = "set keys without dashes, such as infer_dtype=float16, export_dir=merged"
            raise click.UsageError(f"{error.message.removesuffix('.')}: {hint}.", ctx) from None


def _tell_interruption(error: KeyboardInterrupt, left: str = _LEFT) -> int:
    state = ", ".join(getattr(error, "__notes__", ())) or left
    say(f"rawmerge: interrupted; {state}", err=True)
    return error.exit_code if isinstance(error, Ended) else INTERRUPTED


@contextmanager
def told_if_published(output: Path) -> Iterator[None]:
    """Let an interruption know that the output is there, whenever it came: another directory has its name then."""
    before = _identity(output)
    try:
        yield
    except KeyboardInterrupt as error:
        if not hasattr(error, "__notes__") and _identity(output) not in (before, None):
            error.add_note(PUBLISHED_NOTE)
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _tell_error(error: RawmergeError, *, as_json: bool) -> None:
    from rawmerge.report import error_json, error_text

    say(error_json(error) if as_json else f"rawmerge: {error_text(error)}", err=not as_json)


def say_path(path: str) -> None:
    """Print a path: to a program byte for byte, on a terminal escaped."""
    say(printable(path) if sys.stdout and sys.stdout.isatty() else os.fsencode(path))


def say(text: str | bytes, *, err: bool = False) -> None:
    """Print a line; a stream that is closed or full does not undo what was done."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, file=stream, color=True)  # nothing is coloured: click must not cut parts out of paths
    except OSError:
        # what the stream still holds would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
