"""Named synthetic checkpoints as data: which tensors a base has, and which of them the adapter changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointShape:
    """A Llama-like architecture, without its weights.

    Attributes:
        name: what the command lines call it.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        layers: number of decoder layers.
        heads: number of query heads; `hidden` is a multiple of it.
        kv_heads: number of key and value heads; less than `heads` means grouped-query attention.
        vocab: rows of the embedding and, untied, of the output head.
        shards: number of safetensors files.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def element_count(self) -> int:
        """Elements of all base tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def updated_element_count(self) -> int:
        """Elements of the tensors that the adapter changes."""
        return sum(math.prod(shape) for _, shape in self.target_modules())

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return the seven linear modules of one layer as path -> (out_features, in_features)."""
        kv_width = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def target_modules(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield every module that the adapter changes, as (module path, (out_features, in_features))."""
        for layer in range(self.layers):
            for projection, shape in self.projections().items():
                yield f"model.layers.{layer}.{projection}", shape

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every base tensor in the order transformers registers them, as (tensor name, shape)."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for projection, shape in self.projections().items():
                yield f"model.layers.{layer}.{projection}.weight", shape
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES: Final = {
    shape.name: shape
    for shape in (
        # For development: seconds, start-up time dominates every figure.
        CheckpointShape(
            name="tiny",
            hidden=256,
            intermediate=704,
            layers=4,
            heads=8,
            kv_heads=2,
            vocab=4096,
            shards=2,
        ),
        # Full width, few layers: for the cost of an element, not of a model.
        CheckpointShape(
            name="two_layers",
            hidden=2048,
            intermediate=4096,
            layers=2,
            heads=32,
            kv_heads=8,
            vocab=1024,
            shards=1,
        ),
        # 0.6 GB, 0.3 billion parameters.
        CheckpointShape(
            name="llama_0b3",
            hidden=1024,
            intermediate=3584,
            layers=16,
            heads=16,
            kv_heads=8,
            vocab=32_000,
            shards=2,
        ),
        # 1.4 GB, 0.7 billion parameters.
        CheckpointShape(
            name="llama_0b7",
            hidden=1536,
            intermediate=4864,
            layers=20,
            heads=24,
            kv_heads=8,
            vocab=32_000,
            shards=2,
        ),
        # 3.5 GB: large enough that bytes dominate, small enough that base and output stay in 16 GB.
        CheckpointShape(
            name="llama_1b5",
            hidden=2048,
            intermediate=6656,
            layers=24,
            heads=32,
            kv_heads=8,
            vocab=128_256,
            shards=4,
        ),
        # 6 GB: Llama 3.2 3B's layers, with a smaller vocabulary.
        CheckpointShape(
            name="llama_3b",
            hidden=3072,
            intermediate=8192,
            layers=28,
            heads=24,
            kv_heads=8,
            vocab=32_000,
            shards=3,
        ),
        # 13.5 GB: Llama 2 7B's own dimensions.
        CheckpointShape(
            name="llama_7b",
            hidden=4096,
            intermediate=11_008,
            layers=32,
            heads=32,
            kv_heads=32,
            vocab=32_000,
            shards=3,
        ),
    )
}
