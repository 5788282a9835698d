"""The choices of a merge that decide the output's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from rawmerge.dtypes import AUTO_DTYPE, COMPUTE_DTYPES, OUTPUT_DTYPES
from rawmerge.errors import PlanError, Problem

#: What may become of a vocabulary that is smaller than the base's.
OVERLAY: Final = "overlay"
#: Whose tokenizer files the output gets.
TOKENIZERS: Final = ("base", "adapter")
#: How the columns of a lora_B on fused experts are ordered: PEFT's way, and Unsloth's until September 2026.
GROUPED: Final = "grouped_by_expert"
LAYOUTS: Final = ("rank_major", GROUPED)


#: Of what the output's shards are files: the safetensors library's, or `torch.save`'s.
SAFETENSORS: Final = "safetensors"
BIN: Final = "bin"
FORMATS: Final = (SAFETENSORS, BIN)
#: Whose way of saving the output's tensors have, and the most bytes of a shard there.
LLAMAFACTORY: Final = "llamafactory"
LIKE_SHARD_BYTES: Final = 5 * 10**9
#: What several adapters mean: one merged after the other, each result rounded; or the sum of all, rounded once.
SERIAL: Final = "serial"
ONCE: Final = "once"
ORDERS: Final = (SERIAL, ONCE)
#: How several deltas of a tensor become one: their plain sum, which is what `ONCE` does, and others, each with the
#: options that it uses.
SUM: Final = "sum"
COMBINATIONS: Final[Mapping[str, frozenset[str]]] = {
    "average": frozenset(),
    "magnitude": frozenset({"density"}),
    "ties": frozenset({"density", "majority_sign"}),
    "dare": frozenset({"density", "seed"}),
    "dare-ties": frozenset({"density", "majority_sign", "seed"}),
    "peft-linear": frozenset(),
    "peft-cat": frozenset(),
    "peft-magnitude": frozenset({"density"}),
    "peft-ties": frozenset({"density", "majority_sign"}),
}
#: Those of them that combine the factors of LoRA instead of deltas begin so.
OF_FACTORS: Final = "peft-"
#: The fields of `MergeOptions` that are about combining.
COMBINING: Final = ("combine", "density", "majority_sign", "seed")
#: What decides the sign of an element: the sum of all deltas, or how many of them have which sign.
MAJORITY_SIGNS: Final = ("total", "frequency")


#: Field of `MergeOptions` to what it may be; an empty text stands for what is said of it there.
CHOICES: Final = {
    "compute_dtype": COMPUTE_DTYPES,
    "dtype": ("", *OUTPUT_DTYPES, AUTO_DTYPE),
    "vocab": ("", OVERLAY),
    "tokenizer": TOKENIZERS,
    "moe_lora_b_layout": ("", *LAYOUTS),
    "order": ORDERS,
    "combine": ("", *COMBINATIONS),
    "majority_sign": MAJORITY_SIGNS,
    "format": FORMATS,
    "like": ("", LLAMAFACTORY),
}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The choices that decide the output's bytes; `choose_options` makes them of what a user says.

    Attributes:
        compute_dtype: `float32` is bit-equal to PEFT's default merge on CPU; `float64` sums in float64 and rounds once.
        dtype: `float32`, `bfloat16` or `float16` for all float tensors of the output; `auto` for the one that the
            base's `config.json` states, which planning puts in its place; empty for each tensor's own.
        vocab: `overlay` writes the rows of an adapter's smaller vocabulary over the first rows of the base's; empty
            refuses such an adapter.
        tokenizer: whose tokenizer and chat template files the output gets, the `base`'s or the `adapter`'s.
        moe_lora_b_layout: how the columns of lora_B on fused experts are ordered, `rank_major` (PEFT) or
            `grouped_by_expert` (Unsloth until September 2026); empty goes by the adapter's own marker, else PEFT's.
        force: merge although the adapter names another base, its stored embeddings are not the base's, or the base
            already holds this adapter.
        card: write a model card, `README.md`, beside which the base's own becomes `README_base.md`.
        max_shard_size: most bytes of an output shard's tensors, cut and named as transformers does; what fits in one
            file is `model.safetensors`. 0 keeps the base's shards.
        format: what the shards are: `safetensors`, or `bin`, the files of `torch.save` that transformers 4 wrote with
            `safe_serialization=False`.
        like: `llamafactory` for the tensors that LLaMA-Factory's export would save with the installed transformers:
            which there are, their dtypes, order, shards and index, and roundings. Needs a `dtype` and a
            `max_shard_size`, which `choose_options` sets to `auto` and 5 GB. Empty for all that the base has.
        order: of several adapters, `serial` merges one after the other and rounds after each, as PEFT does; `once` adds
            all deltas up and rounds once, whatever the order in which they are named. `once` where they are combined.
        replaced_by: which of several adapters, from 1, gives a tensor that more than one replace; 0 refuses that.
        combine: how the deltas of several adapters become one, tensor by tensor, in float32 (or `compute_dtype`), a key
            of `COMBINATIONS`: `average` over all adapters, `magnitude`, `ties`, `dare` or `dare-ties`. Weights apply
            after pruning. Adapters that leave a tensor alone have no say in it. `peft-linear`, `peft-cat`,
            `peft-magnitude` and `peft-ties` combine the factors of plain LoRA, as PEFT's `add_weighted_adapter` does.
            Empty for what `order` says.
        density: the share of each delta's elements that `magnitude` and `ties` keep, the largest, and `dare` and
            `dare-ties` by chance; above 0 to 1, and 0 where none is used.
        majority_sign: what decides the sign that `ties` and `dare-ties` keep of an element: the `total` of all deltas,
            or the `frequency` of signs.
        seed: of what `dare` and `dare-ties` keep by chance, from 0 below 2^63; the same seed gives the same bytes.
    """

    compute_dtype: str = "float32"
    dtype: str = ""
    vocab: str = ""
    tokenizer: str = "base"
    moe_lora_b_layout: str = ""
    force: bool = False
    card: bool = True
    max_shard_size: int = 0
    format: str = SAFETENSORS
    like: str = ""
    order: str = SERIAL
    replaced_by: int = 0
    combine: str = ""
    density: float = 0.0
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be told in a plan; what a choice may be is seen when a merge is planned.

        Raises:
            TypeError: a value is of another type than its field. ValueError: a number is below 0.
        """
        for choice in fields(self):
            value, expected = getattr(self, choice.name), type(choice.default)
            if expected is float and type(value) is int:  # JSON tells 1 from 1.0
                object.__setattr__(self, choice.name, float(value))
            elif type(value) is not expected:
                hint = " (choose_options takes sizes such as '5GB')" if choice.name == "max_shard_size" else ""
                raise TypeError(f"{choice.name} must be of the type {expected.__name__}, not {value!r}{hint}")
            elif isinstance(value, int) and value < 0:
                raise ValueError(f"{choice.name} must be at least 0, not {value}")


def order_problem(combine: str, order: str) -> Problem:
    """Return the problem of an order that a combination does not have."""
    hint = "a combination looks at all deltas together and rounds once; leave --order out"
    return Problem(f"--order {order}", f"--order {ONCE} with --combine {combine}", order, hint)


def like_problems(options: MergeOptions, adapter_count: int) -> Iterator[Problem]:
    """Yield the choices that LLaMA-Factory does not have, where the output is to be like its own.

    Args:
        options: the choices, each one of those that there are.
        adapter_count: how many adapters have a weight that is not 0.
    """
    if not options.like:
        return
    given = f"--like {options.like}"
    needed = {
        "compute_dtype": options.compute_dtype == "float32",
        "order": options.order == SERIAL or adapter_count < 2,
        "combine": not options.combine,
        "vocab": not options.vocab,
        "format": options.format == SAFETENSORS,
    }
    for name in (name for name, is_fit in needed.items() if not is_fit):
        flag, found = f"--{name.replace('_', '-')}", f"{getattr(options, name)}"
        yield Problem(flag, f"its default, for {given} equals what LLaMA-Factory writes", found, "leave one out")
    if not (options.dtype and options.max_shard_size):
        hint = "choose_options sets them to auto and 5GB"
        yield Problem("like", "a dtype and a max_shard_size beside it", "none of one", hint)


def settled_order(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return choices in which a combination has its order, and `sum`, another name for that order, is none.

    Args:
        given: fields of `MergeOptions`, those that were chosen.

    Raises:
        PlanError: `sum` in another order.
    """
    settled = dict(given)
    if settled.get("combine"):
        settled.setdefault("order", ONCE)
    if settled.get("combine") == SUM:
        if settled["order"] != ONCE:
            raise PlanError(order_problem(SUM, settled["order"]))
        settled["combine"] = ""
    return settled


def combination_problems(options: MergeOptions, adapter_count: int) -> Iterator[Problem]:
    """Yield what of the choices about combining does not go together.

    Args:
        options: the choices, each one of those that there are.
        adapter_count: how many adapters have a weight that is not 0.
    """
    used, given = COMBINATIONS.get(options.combine, frozenset()), f"--combine {options.combine}"
    if options.combine and options.order != ONCE:
        yield order_problem(options.combine, options.order)
    if options.combine and adapter_count < 2:
        yield Problem(given, "two adapters or more whose weights are not 0", f"{adapter_count}")
    if "density" in used and not 0 < options.density <= 1:
        hint = "--density (density=) is the share of each delta's elements that is kept, such as 0.5"
        yield Problem("--density", f"a number above 0 to 1 for {given}", f"{options.density or 'none, or 0'}", hint)
    if not 0 <= options.seed < 2**63:
        yield Problem("--seed", "a whole number from 0, below 2^63", f"{options.seed}")
    for name in COMBINING[1:]:
        value = getattr(options, name)
        if name not in used and value != getattr(MergeOptions(), name):
            those = " or ".join(how for how, fields in COMBINATIONS.items() if name in fields)
            flag = f"--{name.replace('_', '-')}"
            yield Problem(flag, f"--combine {those}", given if options.combine else "no --combine", f"leave {flag} out")
