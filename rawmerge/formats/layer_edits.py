"""The edit of `config.json` that follows layers which are repeated, dropped or moved (PEFT's `layer_replication`).

PEFT clones the layers themselves; a loader builds each layer anew from its index. So the edit is made only where the
config says the kind of every layer in a list, which moves with the layers, or where all layers are of one kind.

Source: transformers 5.23 `configuration_*.py` (`attribute_map`, per-layer lists) and `modeling_*.py` (what a layer
takes from its index); PEFT 0.21.2 `tuners/tuners_utils.py` (`replicate_layers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rawmerge.errors import PlanError, Problem
from rawmerge.formats.config_text import replace_values
from rawmerge.formats.model_config import ModelConfig

#: The layer count, by the names that families give it.
COUNT_KEYS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Lists with one item for each layer.
PER_LAYER_KEYS: Final = (
    "indexer_types",
    "layer_rope_theta",
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
)
#: Fields that pick layers out by index, and the values with which they pick none, or all.
_INDEX_RULES: Final[Mapping[str, Any]] = {
    "attn_layer_indices": [],
    "cross_attention_layers": [],
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "full_attn_idxs": [],
    "kv_source_layers": [],
    "mlp_only_layers": [],
    "moe_layer_freq": 1,
    "num_kv_shared_layers": 0,
    "per_layer_config": {},
    "use_sliding_window": False,
}
#: Rules that families ignore where the file has the list.
_REPLACED_BY: Final = {"first_k_dense_replace": "mlp_layer_types", "use_sliding_window": "layer_types"}
#: Families whose layers are all of one kind, unless a list or a rule in the file says otherwise.
ALIKE_FAMILIES: Final = frozenset(
    """
    apertus arcee aria_text bamba bert bert-generation biogpt bitnet bloom camembert codegen cohere cpmant ctrl
    data2vec-text deepseek_v2 doge electra ernie ernie4_5 falcon falcon_h1 falcon_mamba flex_olmo gemma git glm
    glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hyperclovax internlm3 iquestcoder jais2 jetmoe llama longcat_flash mamba mamba2 megatron-bert mellum
    minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral moshi mpt nanochat olmo olmo2 olmoe openai-gpt opt
    persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta
    roberta-prelayernorm roc_bert roformer seed_oss solar_open stablelm starcoder2 xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod youtu
    """.split()  # noqa: SIM905  # a list would take a line for each
)
#: Families whose layers differ as lists say that the file must have, for else the index says it.
LISTED_FAMILIES: Final = {
    family: lists
    for lists, families in {
        ("layer_types",): (
            "cohere2 cohere2_moe cwm exaone4 gemma2 gemma3_text gpt_oss granite_swa granitemoe_swa "
            "inkling_text kolibri1 lfm3 olmo3 olmo_hybrid qwen3_5_moe_text "
            "qwen3_5_text qwen3_next vaultgemma"
        ),
        ("mlp_layer_types",): "axk1 axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v3 laguna",
        ("layer_types", "mlp_layer_types"): "bailing_hybrid deepseek_v4 exaone_moe mimo_v2_flash",
        ("mlp_layer_types", "indexer_types"): "hy_v4",
        ("mlp_layer_types", "layer_types"): "kimi_linear",
        ("no_rope_layers",): "smollm3",
    }.items()
    for family in families.split()
}

_Path = tuple[str, ...]


def layer_config_paths(config: ModelConfig) -> Mapping[_Path, int]:
    """Return the path of each config, this one (an empty path) or a nested one, that states its number of layers."""
    return dict(_layer_counts(config.fields, ()))


def with_layer_count(config: ModelConfig, text: str, path: _Path, order: Sequence[int]) -> str:
    """Return `text` for a model whose layers are those of the base in another order.

    Args:
        config: the base's config.
        text: its text, edited or not.
        path: keys to the config of these layers, from `layer_config_paths`.
        order: for each layer of the output, the base's layer that it is; indices from 0.

    Raises:
        PlanError: a layer's kind follows from its index, so that no number of layers gives the same ones.
    """
    fields = _config_at(config, path)
    old = next((fields[key] for key in COUNT_KEYS if key in fields), 0)
    problems = list(_problems(fields, old, order))
    if problems:
        raise PlanError(*problems)
    edits: dict[_Path, Any] = {(*path, key): len(order) for key in COUNT_KEYS if key in fields}
    for key in PER_LAYER_KEYS:
        if isinstance(fields.get(key), list):
            edits[(*path, key)] = [fields[key][index] for index in order]
    return replace_values(text, edits)


def _problems(fields: Mapping[str, Any], old: object, order: Sequence[int]) -> Iterator[Problem]:
    """Yield what keeps the config from being edited; `old` is the number of layers that it states."""
    if type(old) is not int or any(fields[key] != old for key in COUNT_KEYS if key in fields):
        yield Problem(COUNT_KEYS[0], "one whole number", ", ".join(ascii(fields.get(key)) for key in COUNT_KEYS))
        return
    if not order or not all(0 <= index < old for index in order):
        yield Problem("layer_replication", f"layers from 0 to {old - 1}", ascii(list(order))[:80])
        return
    yield from _family_problems(fields)
    for key in PER_LAYER_KEYS:
        if isinstance(fields.get(key), list) and len(fields[key]) != old:
            yield Problem(key, f"a list with one item for each of {old} layers", f"{len(fields[key])} items")
    for key, neutral in _INDEX_RULES.items():
        value = fields.get(key)
        is_replaced = isinstance(fields.get(_REPLACED_BY.get(key, "")), list)
        if value is not None and value != neutral and not is_replaced:
            hint = "it picks layers out by their index, and repeated layers have others"
            yield Problem(key, "it to be unset", ascii(value)[:80], hint)


def _family_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in ALIKE_FAMILIES | LISTED_FAMILIES.keys():
        expected = "a family whose layers do not depend on their index"
        yield Problem("model_type", expected, ascii(family)[:80], "layers of this family cannot be repeated on disk")
        return
    for key in LISTED_FAMILIES.get(family, ()):
        if not isinstance(fields.get(key), list):
            hint = "add the list as transformers fills it in"
            yield Problem(key, f"the list that says what each layer of {family} is", "none", hint)


def _config_at(config: ModelConfig, path: _Path) -> Mapping[str, Any]:
    fields = config.fields
    for key in path:
        fields = fields[key]
    return fields


def _layer_counts(fields: Mapping[str, Any], path: _Path) -> Iterator[tuple[_Path, int]]:
    counts = [fields[key] for key in COUNT_KEYS if type(fields.get(key)) is int and fields[key] > 0]
    if counts:
        yield path, counts[0]
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _layer_counts(value, (*path, key))
