"""A vocabulary that grows: everything that has a row, or a number, for each token has to grow with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from rawmerge.errors import PlanError, Problem, quote
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.tied_embeddings import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS

#: Vectors of one number for each token, beside the matrices of embeddings and output projections.
_TOKEN_BIAS: Final = re.compile(
    rf"(.*\.)?(final_logits_bias|({'|'.join(OUTPUT_EMBEDDINGS)})\.bias|predictions\.(decoder\.)?bias)"
)


def check_vocabulary(ledger: Ledger) -> None:
    """Refuse an adapter that lets one of the vocabulary's tensors grow, and not another.

    Raises:
        PlanError: with every tensor that keeps the old vocabulary.
    """
    for name, source in ledger.replacements.items():
        old = ledger.base.tensors[name].shape
        if _is_embedding(name) and source.shape[0] > old[0]:
            ledger.problems.add(PlanError, _left_behind(ledger, name, old[0], source.shape[0]))


def _left_behind(ledger: Ledger, grown: str, old: int, new: int) -> Iterator[Problem]:
    for name, source in ledger.base.tensors.items():
        is_bias = bool(_TOKEN_BIAS.fullmatch(name)) and source.shape[-1:] == (old,)
        is_matrix = _is_embedding(name) and source.shape[:1] == (old,)
        if (is_bias or is_matrix) and name not in ledger.replacements:
            expected = f"one for each of the {new} tokens that {quote(grown)} has rows for"
            hint = "the adapter stores only a part of the grown vocabulary; save all of it (save_embedding_layers)"
            yield Problem(name, expected, f"the base's {old}, and none in the adapter", hint)


def _is_embedding(name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in {*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS}
