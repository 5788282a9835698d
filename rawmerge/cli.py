"""The command line: options in, exit codes out. All work is the library's.

Text for people goes to stderr, results go to stdout, so that a result can be piped.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import rawmerge
from rawmerge.command_group import Commands, KeyedCommand, say, say_path, told_if_published
from rawmerge.command_options import (
    ADAPTERS,
    BASE,
    DEVICE,
    DRY_RUN,
    JSON,
    MAX_MEMORY,
    OVERWRITE,
    THREADS,
    TOLERANCE,
    VERIFY,
    WITHOUT,
    plan_options,
    replay_options,
    weighted,
)
from rawmerge.errors import VerificationError, printable
from rawmerge.progress_bar import progress_bar
from rawmerge.run_options import RunChoices, RunOptions, choose_run

if TYPE_CHECKING:
    from rawmerge.merge_plan import MergePlan

REFUSED = 3


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rawmerge.__version__, prog_name="rawmerge")
def cli() -> None:
    """Fold PEFT adapters into base checkpoints, shard by shard.

    BASE and ADAPTER are directories, safetensors files, or hub ids (org/name[@revision]); ADAPTER may be repeated.

    Exit codes: 0 done, 2 usage, 3 refused and nothing written, 4 failed while writing and nothing published,
    5 verification found differences, 1 a bug of ours; 130 and 143 interrupted by Ctrl-C or SIGTERM.
    """


@cli.command()
@BASE
@ADAPTERS
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@plan_options
@THREADS
@MAX_MEMORY
@DEVICE
@OVERWRITE
@click.option("--link", is_flag=True, help="Shards that stay as they are become hard links to the base's.")
@click.option(
    "--consume-base",
    is_flag=True,
    help="Delete each shard of BASE once its successor is written; the same command goes on after a crash.",
)
@click.option("--no-reuse", is_flag=True, help="With --overwrite: make shards anew that would come out as they are.")
@click.option("--no-resume", is_flag=True, help="Start anew what was cut off, and keep nothing for a next time.")
@click.option("--checksum", is_flag=True, help="Write SHA256SUMS, for `sha256sum -c`.")
@VERIFY
@WITHOUT
@DRY_RUN
@JSON
def merge(
    base: str,
    adapters: tuple[str, ...],
    output: Path,
    threads: int | None,
    max_memory: int | None,
    device: str,
    overwrite: bool,
    link: bool,
    consume_base: bool,
    no_reuse: bool,
    no_resume: bool,
    checksum: bool,
    verify: bool,
    without: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge adapters into BASE and write the result to a new directory.

    ADAPTER:0.7 multiplies an adapter's deltas. Prints the directory, or with --json a summary.
    """
    from rawmerge.planning import choose_options, plan_for_output

    if no_reuse and not overwrite:
        raise click.UsageError("--no-reuse goes with --overwrite: without an output there is nothing to reuse.")
    choices: RunChoices = {"overwrite": overwrite, "threads": threads, "max_memory": max_memory, "without": without}
    choices |= {"device": device, "link": link, "consume_base": consume_base, "reuse": not no_reuse}
    choices |= {"resume": not no_resume, "verify": verify, "checksum": checksum}
    plan = plan_for_output(base, adapters, output, choose_options(**options), consumes=consume_base)
    _carry_out(plan, output, choices, dry_run=dry_run, as_json=as_json)


def _carry_out(plan: MergePlan, output: Path, choices: RunChoices, *, dry_run: bool, as_json: bool) -> None:
    """Run a plan, or check that it can be run, and tell what came of it."""
    from rawmerge.report import left_out_lines, plan_json, plan_text
    from rawmerge.run import check_run
    from rawmerge.summary_report import summary_json, summary_text

    if dry_run:
        notes = check_run(plan, output, **choices)
        for note in notes:
            say(printable(f"note: {note}"), err=True)
        run_options = choose_run(choices)
        say(plan_json(plan, run_options, notes) if as_json else plan_text(plan, run_options))
        return
    for line in (*(printable(f"note: {note}") for note in plan.notes), *left_out_lines(plan)):
        say(line, err=True)
    gc.freeze()  # what the start made stays
    gc.enable()
    with told_if_published(output):
        with progress_bar(plan.tensor_bytes) as progress:
            summary = rawmerge.run_plan(plan, output, progress=progress, **choices)
        for note in summary.notes[len(plan.notes) :]:
            say(printable(f"note: {note}"), err=True)
        say(summary_text(summary), err=True)
        say(summary_json(summary)) if as_json else say_path(summary.output)


@cli.command(cls=KeyedCommand)
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--as-llamafactory",
    is_flag=True,
    help="Weights that are equal to those of LLaMA-Factory's export, byte for byte; needs transformers.",
)
@THREADS
@MAX_MEMORY
@OVERWRITE
@VERIFY
@DRY_RUN
@JSON
def export(
    file: str, overrides: tuple[str, ...], as_llamafactory: bool, dry_run: bool, as_json: bool, **choices: Any
) -> None:
    """Do what another tool's merge file asks for: LLaMA-Factory's YAML, axolotl's, mergekit's.

    KEY=VALUE sets a key of FILE, as in `llamafactory-cli export FILE export_dir=merged`. FILE may be mergekit's
    BASE+ADAPTER, with export_dir=OUTPUT. Tells the plain merge that it stands for.
    """
    from rawmerge.exporting.export_run import plan_export, settled_job

    read = rawmerge.read_export(file, overrides)
    job = settled_job(read.as_llamafactory() if as_llamafactory else read)
    say(printable(job.command(overwrite=choices["overwrite"])), err=True)
    run_choices: RunChoices = {"device": job.device, **choices}  # type: ignore[typeddict-item]  # click's names
    _carry_out(plan_export(job), Path(job.output), run_choices, dry_run=dry_run, as_json=as_json)


@cli.command()
@BASE
@ADAPTERS
@plan_options
@THREADS
@MAX_MEMORY
@WITHOUT
@JSON
def plan(
    base: str,
    adapters: tuple[str, ...],
    threads: int | None,
    max_memory: int | None,
    without: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Tell what a merge would do, from headers and configs alone.

    --threads, --max-memory and --without change nothing but the memory that is told; a SIZE that cannot be kept is
    refused, as a merge would. `merge --dry-run` checks the output too.
    """
    from rawmerge.memory.budget import choose_budget
    from rawmerge.report import plan_json, plan_text

    made = rawmerge.plan_merge(base, adapters, **options)
    choices = RunOptions(threads=threads, max_memory=max_memory, without=without)
    if max_memory is not None:
        choose_budget(made, choices)
    say(plan_json(made, choices) if as_json else plan_text(made, choices))


@cli.command()
@click.argument("path")
@JSON
def inspect(path: str, as_json: bool) -> None:
    """Tell what a base or an adapter is, and whether it can be merged; exit code 3 if it cannot."""
    from rawmerge.report import inspection_json, inspection_text

    found = rawmerge.inspect_path(path)
    say(inspection_json(found) if as_json else inspection_text(found))
    click.get_current_context().exit(REFUSED if found.problems else 0)


@cli.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", help="The base that it was made from; with --adapter.")
@click.option(
    "--adapter", "adapters", multiple=True, callback=weighted, help="An adapter that it was made from; with --base."
)
@replay_options
@TOLERANCE
@THREADS
@MAX_MEMORY
@WITHOUT
@JSON
def verify(output: Path, base: str | None, adapters: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Tell whether OUTPUT is what base and adapter give, bit for bit; exit code 5 with what differs.

    OUTPUT may be made by any program, and be cut into shards otherwise. Without --base and --adapter its headers,
    index, config and record are compared with each other, and files with their checksums where it has a SHA256SUMS.
    """
    from rawmerge.planning import PlanChoices
    from rawmerge.report import verification_json, verification_text

    if (base is None) == bool(adapters):
        raise click.UsageError("--base and --adapter go together.")
    given = [
        name.replace("_", "-")
        for name, value in options.items()
        if name in PlanChoices.__annotations__ and value is not None
    ]
    if base is None and given:
        raise click.UsageError(f"--{', --'.join(sorted(given))}: of no use without --base and --adapter.")
    gc.enable()
    with progress_bar(0) as progress:
        made = rawmerge.verify_merge(output, base, adapters or None, progress=progress, **options)
    say(verification_json(made) if as_json else verification_text(made))
    click.get_current_context().exit(VerificationError.exit_code if made.findings else 0)


@cli.command()
@click.argument("output", type=click.Path(path_type=Path))
@JSON
def clean(output: Path, as_json: bool) -> None:
    """Remove what merges to OUTPUT that were cut off have left beside it; OUTPUT itself is not touched.

    Refused where it is the only copy of something, or where a merge is at work.
    """
    from rawmerge.report import leftovers_json, leftovers_text

    removed = rawmerge.clean_output(output)
    say(leftovers_json(removed) if as_json else leftovers_text(removed))


@cli.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@JSON
def demo(directory: Path | None, as_json: bool) -> None:
    """Make a small base and adapter offline, merge them, and verify the result.

    Writes DIRECTORY/base, DIRECTORY/adapter and DIRECTORY/merged. DIRECTORY must not exist; without one, the first
    free of rawmerge-demo, rawmerge-demo-2 and so on is taken.
    """
    import json

    from rawmerge.demo import free_directory, run_demo

    def tell(line: str) -> None:
        say(printable(line), err=True)

    result = run_demo(directory or free_directory(Path("rawmerge-demo")), tell)
    say(json.dumps(result)) if as_json else say_path(result["output"])


def main() -> NoReturn:
    """Run the command line, and end the process.

    Everything is closed and durable by then; taking torch apart would only cost a tenth of a small merge's time.
    """
    try:
        cli(prog_name="rawmerge")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # closed, full, or none at all
                stream.flush()
        os._exit(code)
    raise AssertionError("click always raises SystemExit")
