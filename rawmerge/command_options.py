"""Options that commands share: their names, their choices, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from rawmerge.adapter_source import split_weight
from rawmerge.byte_sizes import parse_bytes
from rawmerge.dtypes import AUTO_DTYPE, COMPUTE_DTYPES, OUTPUT_DTYPES, did_you_mean
from rawmerge.merge_options import (
    COMBINATIONS,
    FORMATS,
    LAYOUTS,
    LLAMAFACTORY,
    MAJORITY_SIGNS,
    ORDERS,
    OVERLAY,
    SUM,
    TOKENIZERS,
)
from rawmerge.run_options import DEVICE_NAMES, MECHANISMS

BASE = click.argument("base")


def weighted(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a weight that is none."""
    for text in value:
        try:
            split_weight(text)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from None
    return value


#: One or more, each with a weight behind a colon.
ADAPTERS = click.argument("adapters", nargs=-1, required=True, callback=weighted, metavar="ADAPTER[:WEIGHT]...")


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta["rawmerge.json"] = value
    return value


JSON = click.option("--json", "as_json", is_flag=True, callback=_remember_json, help="Print JSON for programs.")


class _DtypeChoice(click.Choice):  # type: ignore[type-arg]  # which it takes from click 8.2 on
    """A choice of dtypes that knows what else people call them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the choice, or refuse it."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(error.message.removesuffix(".") + (did_you_mean(value, self.choices) or "."), param, ctx)


_DTYPES = _DtypeChoice([*OUTPUT_DTYPES, AUTO_DTYPE])
_COMPUTE_DTYPES = _DtypeChoice(COMPUTE_DTYPES)
_DTYPE = click.option(
    "--dtype",
    type=_DTYPES,
    help="Store all float tensors in this dtype; auto: the one that config.json states.  [default: each tensor's own]",
)
_COMPUTE = click.option(
    "--compute-dtype",
    type=_COMPUTE_DTYPES,
    default="float32",
    show_default=True,
    help="float32 is bit-equal to PEFT; float64 rounds once, from sums in float64.",
)


def _parsed_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    try:
        return parse_bytes(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


_SHARD_SIZE = click.option(
    "--max-shard-size",
    callback=_parsed_size,
    metavar="SIZE",
    help="Most bytes of an output shard, such as 5GB or 512MiB; what fits is one file.  [default: the base's shards]",
)
_FORMAT = click.option(
    "--format",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="What the shards are; bin: files of torch.save, such as pytorch_model.bin, for loaders that know no other.",
)
_LIKE = click.option(
    "--like",
    type=click.Choice([LLAMAFACTORY]),
    help="The tensors, dtypes, order and shards that LLaMA-Factory's export would save; needs transformers.  "
    "[default: all that the base has]",
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
_ORDER = click.option(
    "--order",
    type=click.Choice(ORDERS),
    help="Several adapters: one after the other, rounded after each, as PEFT; or their sum, rounded once.  "
    "[default: serial]",
)
_COMBINE = click.option(
    "--combine",
    type=click.Choice([SUM, *COMBINATIONS]),
    help="How several adapters' deltas of a tensor become one, rounded once; sum is --order once.",
)
_SHARES = click.FloatRange(min=0, max=1, min_open=True)
_SEEDS = click.IntRange(0, 2**63 - 1)
_PLACES = click.IntRange(min=1)
_DENSITY = click.option(
    "--density",
    type=_SHARES,
    metavar="SHARE",
    help="Share of a delta's elements that magnitude and ties keep, the largest, and dare and dare-ties by chance.",
)
_MAJORITY_SIGN = click.option(
    "--majority-sign",
    type=click.Choice(MAJORITY_SIGNS),
    default=MAJORITY_SIGNS[0],
    show_default=True,
    help="What decides the sign that ties and dare-ties keep: the sum of the deltas, or how many have which.",
)
_SEED = click.option(
    "--seed",
    type=_SEEDS,
    default=0,
    show_default=True,
    help="Of what dare and dare-ties keep by chance.",
)
_REPLACED_BY = click.option(
    "--replaced-by",
    type=_PLACES,
    metavar="N",
    help="Which of several adapters gives tensors that more than one replace.  [default: refuse them]",
)
_FORCE = click.option(
    "--force", is_flag=True, help="Merge although the base seems to be another one, or holds the adapter already."
)
_NO_CARD = click.option(
    "--no-card",
    "card",
    is_flag=True,
    callback=lambda _, __, is_given: not is_given,
    help="Write no model card; the base's README.md keeps its name.",
)


_PLAN_OPTIONS = (
    _DTYPE,
    _COMPUTE,
    _ORDER,
    _REPLACED_BY,
    _COMBINE,
    _DENSITY,
    _MAJORITY_SIGN,
    _SEED,
    _SHARD_SIZE,
    _FORMAT,
    _LIKE,
    _VOCAB,
    _TOKENIZER,
    _LAYOUT,
    _FORCE,
    _NO_CARD,
)


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that decide the output's bytes."""
    for option in reversed(_PLAN_OPTIONS):
        command = option(command)
    return command


def replay_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that decide an output's bytes; the output's record tells those that are not given."""
    recorded = "  [default: what the output's record tells, else the merge's own]"
    for flag, kind, metavar, text in (
        ("--seed", _SEEDS, None, "Of what dare and dare-ties kept by chance."),
        ("--density", _SHARES, "SHARE", "Share of a delta's elements that was kept."),
        ("--replaced-by", _PLACES, "N", "Which of several adapters gave tensors that more than one replace."),
    ):
        command = click.option(flag, type=kind, metavar=metavar, help=text + recorded)(command)
    for flag, choices, text in (
        ("--majority-sign", MAJORITY_SIGNS, "What decided the sign that ties and dare-ties kept."),
        ("--combine", [SUM, *COMBINATIONS], "How several adapters' deltas became one."),
        ("--order", ORDERS, "What several adapters mean."),
        ("--moe-lora-b-layout", LAYOUTS, "Order of lora_B's columns on fused experts."),
        ("--tokenizer", TOKENIZERS, "Whose tokenizer it got."),
        ("--vocab", [OVERLAY], "What became of a smaller vocabulary."),
        ("--like", [LLAMAFACTORY], "Whose tensors, dtypes, order and shards it has."),
    ):
        command = click.option(flag, type=click.Choice(choices), help=text + recorded)(command)
    for flag, dtypes, text in (
        ("--compute-dtype", _COMPUTE_DTYPES, "In what it was summed."),
        ("--dtype", _DTYPES, "In what float tensors are stored."),
    ):
        command = click.option(flag, type=dtypes, help=text + recorded)(command)
    return command


TOLERANCE = click.option(
    "--tolerance",
    type=click.FloatRange(min=0, max=1024),
    default=0.0,
    metavar="ULPS",
    help="Let tensors that the adapter changes be so far off, in units in the last place.  [default: 0, bit for bit]",
)
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

THREADS = click.option(
    "--threads", type=click.IntRange(1, 256), help="Working threads; changes no bit.  [default: up to 8]"
)
MAX_MEMORY = click.option("--max-memory", callback=_parsed_size, metavar="SIZE", help=_MEMORY_HELP)
WITHOUT = click.option(
    "--without",
    multiple=True,
    type=click.Choice(list(MECHANISMS)),
    help="Do not use this means of speed; changes no bit.  May be given more than once.",
)
DEVICE = click.option("--device", callback=_checked_device, default="cpu", show_default=True, help=_DEVICE_HELP)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a checkpoint that stands at the output.")
VERIFY = click.option(
    "--verify", is_flag=True, help="Read the output back and compute it again, before it is published."
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
