"""What modules with a row for each token are called: input embeddings and output projections."""

from __future__ import annotations

from typing import Final

#: Last parts of the names of input embeddings that an output projection may be tied to.
INPUT_EMBEDDINGS: Final = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "tokens_embed",
    "embed_in",
    "shared",
)
OUTPUT_EMBEDDINGS: Final = ("lm_head", "embed_out", "output_projection")
#: All names of modules with a row for each token.
EMBEDDINGS: Final = frozenset(
    {*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, "embeddings", "input_embedding", "token_embedding", "proj_out"}
)


def module_of(tensor_name: str) -> str:
    """Return the name of the module that a weight belongs to, an empty string for other parameters."""
    path, _, parameter = tensor_name.rpartition(".")
    return path.rpartition(".")[2] if parameter == "weight" else ""


def is_embedding(tensor_name: str) -> bool:
    """Whether a tensor has a row for each token, by the name of its module."""
    return module_of(tensor_name) in EMBEDDINGS
