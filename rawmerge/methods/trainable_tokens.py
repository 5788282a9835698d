"""Trainable tokens: rows of embeddings, replaced by the trained ones.

Source: PEFT 0.21.2 `tuners/trainable_tokens/layer.py` `TrainableTokensLayer.merge`, `model.py` (which module: the input
embedding unless `target_modules` names others, each with its own rows for the same tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from rawmerge.formats.kind_fields import Field, KindFields
from rawmerge.methods.interface import AdapterKind, PlannedUpdate, TargetModule


class TrainableTokensKind(AdapterKind):
    """TRAINABLE_TOKENS; the rows are computed as LoRA's `trainable_token_indices` are, by `methods/token_rows`."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    title: ClassVar[str] = "Trainable tokens"
    formula: ClassVar[str] = "trained rows in place of W's"
    modules: ClassVar[str] = "Embedding, Linear"
    parts: ClassVar[Mapping[str, str]] = {"trainable_tokens_delta": "token_rows"}
    fields: ClassVar[KindFields] = KindFields(
        followed={"token_indices": Field(lambda value: isinstance(value, list), "a list of tokens", is_required=True)},
        ignored=("init_weights",),
        token_indices="token_indices",
    )

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:  # noqa: ARG002  # `matching/row_matching` plans
        """Yield nothing: rows are matched by the tokens that they are for."""
        return ()
