"""The command line: options in, exit codes out. All work is the library's.

Text for people goes to stderr, results go to stdout, so that a result can be piped.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

import rawmerge
from rawmerge.byte_sizes import parse_bytes
from rawmerge.dtypes import COMPUTE_DTYPES, OUTPUT_DTYPES
from rawmerge.errors import RawmergeError
from rawmerge.merge_options import LAYOUTS, OVERLAY, TOKENIZERS
from rawmerge.output_directory import PUBLISHED_NOTE
from rawmerge.run_options import DEVICE_NAMES, MECHANISMS, RunChoices, RunOptions
from rawmerge.signals import Ended, end_by_signals

REFUSED = 3
INTERRUPTED = 130


class _Commands(click.Group):
    """Turns every error of ours into its text and exit code, whichever command it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RawmergeError as error:
            _tell_error(error, as_json=bool(ctx.meta.get("rawmerge.json")))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            told = [*getattr(error, "__notes__", ()), *ctx.meta.get("rawmerge.published", ())]
            state = ", ".join(told) or "nothing was published"
            _say(f"rawmerge: interrupted; {state}", err=True)
            ctx.exit(error.exit_code if isinstance(error, Ended) else INTERRUPTED)


def _tell_error(error: RawmergeError, *, as_json: bool) -> None:
    from rawmerge.report import error_json, error_text

    _say(error_json(error) if as_json else f"rawmerge: {error_text(error)}", err=not as_json)


def _say(text: str, *, err: bool = False) -> None:
    """Print a line; a stream that is closed or full does not undo what was done."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, file=stream)
    except OSError:
        # what the stream still holds would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_BASE = click.argument("base")
_ADAPTER = click.argument("adapter")


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta["rawmerge.json"] = value
    return value


_JSON = click.option("--json", "as_json", is_flag=True, callback=_remember_json, help="Print JSON for programs.")
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(list(OUTPUT_DTYPES)),
    help="Store all float tensors in this dtype.  [default: each tensor's own]",
)
_COMPUTE = click.option(
    "--compute-dtype",
    type=click.Choice(COMPUTE_DTYPES),
    default="float32",
    show_default=True,
    help="float32 is bit-equal to PEFT; float64 rounds once, from sums in float64.",
)


_VOCAB = click.option(
    "--vocab",
    type=click.Choice([OVERLAY]),
    help="Write a smaller vocabulary over the first rows of the base's.  [default: refuse it]",
)
_TOKENIZER = click.option(
    "--tokenizer",
    type=click.Choice(TOKENIZERS),
    default="base",
    show_default=True,
    help="Whose tokenizer and chat template the output gets.",
)
_LAYOUT = click.option(
    "--moe-lora-b-layout",
    type=click.Choice(LAYOUTS),
    help="Order of lora_B's columns on fused experts.  [default: the adapter's marker, else rank_major, as PEFT]",
)
_FORCE = click.option(
    "--force", is_flag=True, help="Merge although the base seems to be another one, or holds the adapter already."
)


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that decide the output's bytes."""
    for option in reversed((_DTYPE, _COMPUTE, _VOCAB, _TOKENIZER, _LAYOUT, _FORCE)):
        command = option(command)
    return command


_DEVICE_HELP = (
    "Where updates are computed: cpu, cuda, cuda:1 or mps. On others than cpu, float64 gives the same bytes as there, "
    "float32 nearly so."
)


def _checked_device(_: click.Context, __: click.Parameter, value: str) -> str:
    if not re.fullmatch(DEVICE_NAMES, value):
        raise click.BadParameter(f"{value!r} is none of cpu, cuda, cuda:1 (or another number), mps.")
    return value


_MEMORY_HELP = (
    "Most memory to take, such as 2GiB or 512M; refused where that cannot be.  [default: what the control group has]"
)


def _parsed_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    try:
        return parse_bytes(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rawmerge.__version__, prog_name="rawmerge")
def cli() -> None:
    """Fold PEFT adapters into base checkpoints, shard by shard.

    BASE and ADAPTER are directories, safetensors files, or hub ids (org/name[@revision]).

    Exit codes: 0 done, 2 usage, 3 refused and nothing written, 4 failed while writing and nothing published,
    5 verification found differences, 1 a bug of ours.
    """


@cli.command()
@_BASE
@_ADAPTER
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@_plan_options
@click.option("--threads", type=click.IntRange(1, 256), help="Working threads; changes no bit.  [default: up to 8]")
@click.option("--max-memory", callback=_parsed_size, metavar="SIZE", help=_MEMORY_HELP)
@click.option("--device", callback=_checked_device, default="cpu", show_default=True, help=_DEVICE_HELP)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at the output.")
@click.option("--link", is_flag=True, help="Shards that stay as they are become hard links to the base's.")
@click.option(
    "--consume-base",
    is_flag=True,
    help="Delete each shard of BASE once its successor is written; the same command goes on after a crash.",
)
@click.option("--no-reuse", is_flag=True, help="With --overwrite: make shards anew that would come out as they are.")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(list(MECHANISMS)),
    help="Do not use this means of speed; changes no bit.  May be given more than once.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@_JSON
def merge(
    base: str,
    adapter: str,
    output: Path,
    threads: int | None,
    max_memory: int | None,
    device: str,
    overwrite: bool,
    link: bool,
    consume_base: bool,
    no_reuse: bool,
    without: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge ADAPTER into BASE and write the result to a new directory.

    Prints the directory, or with --json a summary.
    """
    from rawmerge.api import plan_for_output
    from rawmerge.report import left_out_lines, plan_text, summary_json, summary_text
    from rawmerge.run import check_run

    choices: RunChoices = {"overwrite": overwrite, "threads": threads, "max_memory": max_memory, "without": without}
    choices |= {"device": device, "link": link, "consume_base": consume_base, "reuse": not no_reuse}
    plan = plan_for_output(base, adapter, output, **options)
    if dry_run:
        for note in check_run(plan, output, **choices):
            _say(f"note: {note}", err=True)
        _say(rawmerge.format_plan(plan) if as_json else plan_text(plan, RunOptions(**choices)))
        return
    for line in (*(f"note: {note}" for note in plan.notes), *left_out_lines(plan)):
        _say(line, err=True)
    with _progress_bar(plan.tensor_bytes) as progress:
        summary = rawmerge.run_plan(plan, output, progress=progress, **choices)
    click.get_current_context().meta["rawmerge.published"] = [PUBLISHED_NOTE]
    for note in summary.notes[len(plan.notes) :]:
        _say(f"note: {note}", err=True)
    _say(summary_text(summary), err=True)
    _say(summary_json(summary) if as_json else summary.output)


@cli.command()
@_BASE
@_ADAPTER
@_plan_options
@_JSON
def plan(base: str, adapter: str, as_json: bool, **options: Any) -> None:
    """Tell what a merge would do, from headers and configs alone."""
    from rawmerge.report import plan_text

    made = rawmerge.plan_merge(base, adapter, **options)
    _say(rawmerge.format_plan(made) if as_json else plan_text(made))


@cli.command()
@click.argument("path")
@_JSON
def inspect(path: str, as_json: bool) -> None:
    """Tell what a base or an adapter is, and whether it can be merged; exit code 3 if it cannot."""
    from rawmerge.report import inspection_json, inspection_text

    found = rawmerge.inspect_path(path)
    _say(inspection_json(found) if as_json else inspection_text(found))
    click.get_current_context().exit(REFUSED if found.problems else 0)


@cli.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@_JSON
def demo(directory: Path | None, as_json: bool) -> None:
    """Make a small base and adapter offline, merge them, and verify the result.

    Writes DIRECTORY/base, DIRECTORY/adapter and DIRECTORY/merged. DIRECTORY must not exist; without one, the first
    free of rawmerge-demo, rawmerge-demo-2 and so on is taken.
    """
    import json

    from rawmerge.demo import free_directory, run_demo

    def tell(line: str) -> None:
        _say(line, err=True)

    result = run_demo(directory or free_directory(Path("rawmerge-demo")), tell)
    _say(json.dumps(result) if as_json else result["output"])


@contextmanager
def _progress_bar(total_bytes: int) -> Iterator[Callable[[rawmerge.Progress], None] | None]:
    """Yield a callback that draws a bar on a terminal; None where stderr is none."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    # some terminals, such as those that record a session, say that they are 0 columns wide; tqdm then draws nothing
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
    width: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 80}
    with tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False, **width) as bar:

        def show(progress: rawmerge.Progress) -> None:
            bar.set_description_str(progress.tensor_name[-48:], refresh=False)
            bar.update(progress.done_bytes - bar.n)

        yield show


def main() -> NoReturn:
    """Run the command line, and end the process.

    Everything is closed and durable by then; taking torch apart would only cost a tenth of a small merge's time.
    """
    end_by_signals()
    try:
        cli(prog_name="rawmerge")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # closed, full, or none at all
                stream.flush()
        os._exit(code)
    raise AssertionError("click always raises SystemExit")
