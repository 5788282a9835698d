"""Mixture-of-experts models: transformers' families in small, and bases laid out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import pytest
import torch

from tests.builders import random_tensor, write_base

transformers = pytest.importorskip("transformers")

#: Sizes differ from each other and from the expert count, and some are odd.
_SIZES: Final = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LOCAL: Final = {"num_local_experts": 5, "num_experts_per_tok": 2}
_PLAIN: Final = {"num_experts": 5, "num_experts_per_tok": 2}
_NARROW: Final = {**_PLAIN, "moe_intermediate_size": 21}
_ROUTED: Final = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 21,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT: Final = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_FULL: Final = {"layer_types": ["full_attention"] * 2}


@dataclass(frozen=True)
class Family:
    """A family of transformers and what its experts are called.

    Attributes:
        config: class of its config.
        fields: of that config.
        renames: from names on disk to names in memory.
        module: the experts' path within a layer, in memory.
        parameters: of the experts, in the order of registration.
        transposed: whether the experts' class says so to PEFT.
        keeps_float32: whether transformers loads the routers' biases as float32, whatever they are on disk.
    """

    config: str
    fields: Mapping[str, Any]
    renames: Sequence[tuple[str, str]] = ()
    module: str = "mlp.experts"
    parameters: Sequence[str] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    keeps_float32: bool = False

    def build(self, **fields: Any) -> Any:
        """Return a config, with other sizes if given."""
        return getattr(transformers, self.config)(**{**_SIZES, **self.fields, **fields})

    def targets(self, *parameters: str) -> list[str]:
        """Return the value of `target_parameters` for some parameters of the experts, or for all."""
        return [f"{self.module}.{name}" for name in parameters or self.parameters]

    def memory_name(self, disk_name: str) -> str:
        """Return what transformers 5 calls the tensor, its expert's number left in."""
        for disk, memory in self.renames:
            disk_name = disk_name.replace(disk, memory)
        return disk_name


_W_NAMES: Final = ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))
_MIXTRAL_NAMES: Final = (("block_sparse_moe", "mlp"), *_W_NAMES)
_PHIMOE_NAMES: Final = (("block_sparse_moe.gate", "mlp.router"), *_MIXTRAL_NAMES)
_GRANITE_NAMES: Final = (
    ("input_linear.weight", "experts.gate_up_proj"),
    ("output_linear.weight", "experts.down_proj"),
    ("router.layer", "router"),
)
_HEAD: Final = {"head_dim": 8}
_SHARED: Final = {"shared_expert_intermediate_size": 30}

FAMILIES: Final[Mapping[str, Family]] = {
    "mixtral": Family("MixtralConfig", _LOCAL, _MIXTRAL_NAMES),
    "minimax": Family("MiniMaxConfig", {**_LOCAL, **_HEAD, **_FULL}, _MIXTRAL_NAMES),
    "minimax_m2": Family("MiniMaxM2Config", {**_LOCAL, **_HEAD, "rotary_dim": 4}, _MIXTRAL_NAMES),
    "phimoe": Family("PhimoeConfig", {**_LOCAL, **_HEAD}, _PHIMOE_NAMES),
    "olmoe": Family("OlmoeConfig", _PLAIN),
    "flex_olmo": Family("FlexOlmoConfig", _PLAIN),
    "qwen2_moe": Family("Qwen2MoeConfig", {**_NARROW, **_SHARED}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_NARROW, **_HEAD, "mlp_only_layers": [0]}),
    "qwen3_next": Family("Qwen3NextConfig", {**_NARROW, **_SHARED, **_HEAD, **_FULL}),
    "afmoe": Family("AfmoeConfig", {**_NARROW, **_HEAD, "num_dense_layers": 1, "num_shared_experts": 1}),
    "deepseek_v2": Family("DeepseekV2Config", {**_ROUTED, **_LATENT}),
    "deepseek_v3": Family("DeepseekV3Config", {**_ROUTED, **_LATENT}, keeps_float32=True),
    "glm4_moe": Family("Glm4MoeConfig", {**_ROUTED, **_HEAD}),
    "dots1": Family("Dots1Config", {**_ROUTED, **_HEAD}, keeps_float32=True),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_intermediate_size": 21,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
        },
    ),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", {"num_experts": 5, "moe_topk": 2, **_HEAD}),
    "jamba": Family(
        "JambaConfig",
        {
            **_PLAIN,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
        },
        module="feed_forward.experts",
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        {**_NARROW, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        _W_NAMES,
        module="feed_forward.experts",
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            **_ROUTED,
            **_HEAD,
            "n_group": 1,
            "moe_shared_expert_intermediate_size": 30,
            "layers_block_type": ["attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "use_mamba_kernels": False,
        },
        (("backbone.", "model."),),
        module="mixer.experts",
        parameters=("up_proj", "down_proj"),
        keeps_float32=True,
    ),
    "granitemoe": Family("GraniteMoeConfig", _LOCAL, _GRANITE_NAMES, module="block_sparse_moe.experts"),
    "granitemoeshared": Family(
        "GraniteMoeSharedConfig",
        {**_LOCAL, "shared_intermediate_size": 30},
        _GRANITE_NAMES,
        module="block_sparse_moe.experts",
    ),
    "llama4_text": Family(
        "Llama4TextConfig",
        {**_LOCAL, **_HEAD, "intermediate_size_mlp": 44, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
        module="feed_forward.experts",
    ),
    "gpt_oss": Family("GptOssConfig", {**_LOCAL, **_HEAD}, transposed=True),
}


class Experts(NamedTuple):
    """The matrices of all experts of a layer: (E, I, H), (E, I, H) and (E, H, I)."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


Layout: TypeAlias = Literal["rows", "columns", "alternating"]


def stack(layout: Layout, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate_up_proj and down_proj: gate above up, the same transposed, or transposed with columns by turns."""
    gate, up, down = experts
    if layout == "rows":
        return torch.cat([gate, up], dim=1), down
    both = torch.cat([gate, up], dim=1) if layout == "columns" else torch.stack([gate, up], dim=2).flatten(1, 2)
    return both.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()


def unstack(layout: Layout, gate_up: torch.Tensor, down: torch.Tensor) -> Experts:
    """Undo `stack`."""
    if layout == "rows":
        gate, up = gate_up.chunk(2, dim=1)
        return Experts(gate, up, down)
    both, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if layout == "alternating":
        return Experts(both[:, ::2], both[:, 1::2], down)
    gate, up = both.chunk(2, dim=1)
    return Experts(gate, up, down)


class Sizes(NamedTuple):
    """How many experts, and the widths outside and inside of them."""

    experts: int = 5
    hidden: int = 12
    inner: int = 10


@dataclass(frozen=True)
class Disk:
    """One way in which experts lie on disk.

    Attributes:
        model_type: of the config.
        layout: of the parameters in transformers 5, and on disk if they are stacked there.
        leaves: names of gate, up and down of a single expert on disk; empty if they are stacked.
        memory: the experts' module within a layer in transformers 5.
        path: the same on disk.
        old_path: the same in adapters of transformers 4.
        old_leaves: names of gate, up and down in those adapters.
        transposed: whether PEFT is told that the layout is transposed.
    """

    model_type: str
    layout: Layout = "rows"
    leaves: Sequence[str] = ()
    memory: str = "mlp.experts"
    path: str = "mlp.experts"
    old_path: str = "mlp.experts"
    old_leaves: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    transposed: bool = False

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, int, int]]:
        """Return the shapes of the parameters in transformers 5."""
        count, hidden, inner = sizes
        if self.layout == "rows":
            return {"gate_up_proj": (count, 2 * inner, hidden), "down_proj": (count, hidden, inner)}
        return {"gate_up_proj": (count, hidden, 2 * inner), "down_proj": (count, inner, hidden)}

    def store(self, layer: int, experts: Experts) -> dict[str, torch.Tensor]:
        """Return the tensors on disk that hold these matrices, be they weights or deltas."""
        prefix = f"model.layers.{layer}.{self.path}"
        if not self.leaves:
            gate_up, down = stack(self.layout, experts)
            return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}
        return {
            f"{prefix}.{number}.{leaf}.weight": matrices[number].contiguous()
            for leaf, matrices in zip(self.leaves, experts, strict=True)
            for number in range(len(matrices))
        }


_W_LEAVES: Final = ("w1", "w3", "w2")
_MIXTRAL_PATH: Final = "block_sparse_moe.experts"
_LLAMA4_PATH: Final = "feed_forward.experts"

DISKS: Final[Mapping[str, Disk]] = {
    "single": Disk("qwen3_moe", leaves=("gate_proj", "up_proj", "down_proj")),
    "single-w": Disk("mixtral", leaves=_W_LEAVES, path=_MIXTRAL_PATH, old_path=_MIXTRAL_PATH, old_leaves=_W_LEAVES),
    "stacked": Disk("qwen3_moe"),
    "stacked-w": Disk("mixtral", old_path=_MIXTRAL_PATH, old_leaves=_W_LEAVES),
    "columns": Disk("llama4_text", "columns", memory=_LLAMA4_PATH, path=_LLAMA4_PATH, old_path=_LLAMA4_PATH),
    "alternating": Disk("gpt_oss", "alternating", transposed=True),
}

LAYERS: Final = 2


def experts_of_layer(sizes: Sizes, layer: int, dtype: torch.dtype = torch.bfloat16) -> Experts:
    """Return the weights of one layer's experts."""
    count, hidden, inner = sizes
    shapes = [(count, inner, hidden), (count, inner, hidden), (count, hidden, inner)]
    return Experts(*(random_tensor(shape, dtype, seed=10 * layer + kind) for kind, shape in enumerate(shapes)))


def write_experts(folder: Path, disk: Disk, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a base of two layers, whose experts lie unevenly in three shards."""
    tensors = {"model.embed_tokens.weight": random_tensor((20, sizes.hidden), dtype)}
    for layer in range(LAYERS):
        tensors |= disk.store(layer, experts_of_layer(sizes, layer, dtype)) | _beside(disk, layer, sizes, dtype)
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for position, name in enumerate(sorted(tensors)):
        shards[position * position % 3 if position % 4 else 2][name] = tensors[name]
    config = {
        "model_type": disk.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "moe_intermediate_size": sizes.inner,
        "num_hidden_layers": LAYERS,
        "num_experts": sizes.experts,
        "num_local_experts": sizes.experts,
    }
    return write_base(folder, shards, config)


def _beside(disk: Disk, layer: int, sizes: Sizes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what no adapter for experts may touch: attention, router, shared experts, biases, a dense MLP."""
    count, hidden, inner = sizes
    prefix = f"model.layers.{layer}"
    block = f"{prefix}.{disk.path.removesuffix('.experts')}"
    shapes = {
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.dense.gate_proj.weight": (inner, hidden),
        f"{prefix}.dense.down_proj.weight": (hidden, inner),
        f"{block}.gate.weight": (count, hidden),
        f"{block}.shared_expert.gate_proj.weight": (inner, hidden),
        f"{block}.shared_expert.up_proj.weight": (inner, hidden),
        f"{block}.shared_expert.down_proj.weight": (hidden, inner),
    }
    if disk.layout == "alternating":
        shapes |= {
            f"{block}.experts.gate_up_proj_bias": (count, 2 * inner),
            f"{block}.experts.down_proj_bias": (count, hidden),
        }
    return {name: random_tensor(shape, dtype, seed=layer) for name, shape in shapes.items()}
