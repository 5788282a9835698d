"""A vocabulary that grows: everything that has a row, or a number, for each token has to grow with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from rawmerge.errors import PlanError, Problem, quote
from rawmerge.matching.embedding_names import OUTPUT_EMBEDDINGS, is_embedding
from rawmerge.matching.ledger import Ledger

#: Vectors of one number for each token, beside the matrices of embeddings and output projections.
_TOKEN_BIAS: Final = re.compile(
    rf"(.*\.)?(final_logits_bias|({'|'.join(OUTPUT_EMBEDDINGS)})\.bias|predictions\.(decoder\.)?bias)"
)


def check_vocabulary(ledger: Ledger) -> None:
    """Refuse an adapter that lets one of the vocabulary's tensors grow, and not another.

    Raises:
        PlanError: with every tensor that keeps the old vocabulary.
    """
    sizes: dict[int, str] = {}
    for name, source in ledger.replacements.items():
        old = ledger.base.tensors[name].shape
        if is_embedding(name) and source.shape[0] > old[0]:
            sizes.setdefault(source.shape[0], name)
            ledger.problems.add(PlanError, _left_behind(ledger, name, old[0], source.shape[0]))
    if len(sizes) > 1:
        found = ", ".join(f"{rows} in {quote(name)}" for rows, name in sizes.items())
        ledger.problems.add(PlanError, [Problem("vocabulary", "one size of the grown vocabulary", found)])
    ledger.problems.add(PlanError, _unlike_biases(ledger))


def _unlike_biases(ledger: Ledger) -> Iterator[Problem]:
    """Yield the heads whose weight and bias would have unlike numbers of rows."""
    shapes = {name: source.shape for name, source in ledger.base.tensors.items()}
    changed = {name: addition.source.shape for name, addition in ledger.additions.items()}
    changed |= {name: source.shape for name, source in ledger.replacements.items() if source.shape != shapes[name]}
    for name in (name for name in changed if not is_of_vocabulary(name)):
        module, _, parameter = name.rpartition(".")
        weight, bias = ({**shapes, **changed}.get(f"{module}.{part}", ()) for part in ("weight", "bias"))
        if parameter in {"weight", "bias"} and len(weight) == 2 and len(bias) == 1 and weight[0] != bias[0]:
            hint = "the adapter stores only a part of the head; save it with weight and bias"
            yield Problem(name, f"{weight[0]} rows and as many biases in {quote(module)}", f"{bias[0]} biases", hint)


def is_of_vocabulary(name: str) -> bool:
    """Whether a base tensor has a row, or a number, for each token."""
    return is_embedding(name) or bool(_TOKEN_BIAS.fullmatch(name))


def _left_behind(ledger: Ledger, grown: str, old: int, new: int) -> Iterator[Problem]:
    for name, source in ledger.base.tensors.items():
        is_bias = bool(_TOKEN_BIAS.fullmatch(name)) and source.shape[-1:] == (old,)
        is_matrix = is_embedding(name) and source.shape[:1] == (old,)
        is_replaced = name in ledger.replacements and ledger.replacements[name].shape != source.shape
        if (is_bias or is_matrix) and not is_replaced:
            expected = f"one for each of the {new} tokens that {quote(grown)} has rows for"
            hint = "the adapter stores only a part of the grown vocabulary; save all of it (save_embedding_layers)"
            yield Problem(name, expected, f"{old}, as in the base", hint)
