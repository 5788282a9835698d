"""Names of any transformers version meet in one canonical name, and disk tensors find their place in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.families import (
    Family,
    FusedPlace,
    auto_classes,
    base_prefixes,
    family_of,
    transformers_version,
)

DATA = json.loads(resources.files("rawmerge").joinpath("families.json").read_bytes())
KEYS = [family["keys"][0] for family in DATA["families"]]


def of(class_name: str, model_type: str, *nested: str) -> Family:
    return family_of([class_name, model_type], nested)


LLAVA = of("LlavaForConditionalGeneration", "llava", "llama", "clip_vision_model")
GEMMA3 = of("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", "siglip_vision_model")
MISTRAL3 = of("Mistral3ForConditionalGeneration", "mistral3", "mistral", "pixtral")
QWEN2_VL = of("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision")
OMNI = of("Qwen2_5OmniForConditionalGeneration", "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_talker")
THINKER = of("Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_thinker", "qwen2_5_omni_text")
CLIP = of("CLIPModel", "clip", "clip_text_model", "clip_vision_model")
VIT = of("ViTForImageClassification", "vit")
ARIA = of("AriaForConditionalGeneration", "aria", "aria_text", "idefics3_vision")
GRANITE = of("GraniteMoeForCausalLM", "granitemoe")
NEMOTRON = of("NemotronHForCausalLM", "nemotron_h")

#: Family, name in memory, and all names that checkpoints and adapters have had for it.
NAMES = [
    (
        LLAVA,
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",  # disk; adapters up to 4.51
        "model.language_model.model.layers.0.self_attn.q_proj.weight",
    ),
    (LLAVA, "lm_head.weight", "language_model.lm_head.weight"),
    (
        LLAVA,
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",  # adapters from 4.52 to 4.57
        "vision_tower.encoder.layers.0.mlp.fc1.weight",  # disk, saved by 5.x
    ),
    (LLAVA, "model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
    (GEMMA3, "model.language_model.norm.weight", "language_model.model.norm.weight"),
    (
        GEMMA3,
        "model.vision_tower.encoder.layers.0.self_attn.k_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight",
    ),
    (MISTRAL3, "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    (
        MISTRAL3,
        "model.vision_tower.transformer.layers.0.attention.q_proj.weight",
        "vision_tower.transformer.layers.0.attention.q_proj.weight",
    ),
    (QWEN2_VL, "model.language_model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    (QWEN2_VL, "model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
    (QWEN2_VL, "lm_head.weight"),
    (OMNI, "thinker.model.language_model.layers.0.mlp.up_proj.weight", "thinker.model.layers.0.mlp.up_proj.weight"),
    (OMNI, "thinker.model.visual.merger.mlp.0.weight", "thinker.visual.merger.mlp.0.weight"),
    (OMNI, "thinker.model.audio_tower.layers.0.fc1.weight", "thinker.audio_tower.layers.0.fc1.weight"),
    (
        THINKER,
        "model.language_model.layers.0.mlp.up_proj.weight",
        "thinker.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ),
    (CLIP, "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.text_model.encoder.layers.0.mlp.fc1.weight"),
    (CLIP, "vision_model.encoder.layers.0.mlp.fc1.weight"),
    (
        of("CLIPVisionModel", "clip_vision_model"),
        "encoder.layers.0.mlp.fc1.weight",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    (VIT, "vit.layers.0.attention.q_proj.weight", "vit.encoder.layer.0.attention.attention.query.weight"),
    (VIT, "vit.layers.0.attention.o_proj.bias", "vit.encoder.layer.0.attention.output.dense.bias"),
    (VIT, "vit.layers.0.mlp.fc1.weight", "vit.encoder.layer.0.intermediate.dense.weight"),
    (VIT, "vit.layers.0.mlp.fc2.weight", "vit.encoder.layer.0.output.dense.weight"),
    (of("ViTModel", "vit"), "layers.0.mlp.fc2.weight", "encoder.layer.0.output.dense.weight"),
    (of("GPTNeoXForCausalLM", "gpt_neox"), "lm_head.weight", "embed_out.weight"),
    (of("BertModel", "bert"), "embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
    (of("BertModel", "bert"), "embeddings.LayerNorm.bias", "embeddings.LayerNorm.beta"),
    (
        of("PhimoeForCausalLM", "phimoe"),
        "model.layers.0.mlp.router.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
    ),
    (NEMOTRON, "model.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"),
    (
        GRANITE,
        "model.layers.0.block_sparse_moe.experts.gate_up_proj",
        "model.layers.0.block_sparse_moe.input_linear.weight",
    ),
    (GRANITE, "model.layers.0.block_sparse_moe.router.weight", "model.layers.0.block_sparse_moe.router.layer.weight"),
    (
        ARIA,
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "language_model.model.layers.0.mlp.experts.fc1.weight",
    ),
    (of("LlamaForCausalLM", "llama"), "model.layers.0.self_attn.q_proj.weight"),
]
#: Class, model type, disk name, parameter, expert, part, parts.
EXPERTS = [
    ("MixtralForCausalLM", "mixtral", "block_sparse_moe.experts.3.w1", "mlp.experts.gate_up_proj", 3, 0, 2),
    ("MixtralForCausalLM", "mixtral", "block_sparse_moe.experts.3.w3", "mlp.experts.gate_up_proj", 3, 1, 2),
    ("MixtralForCausalLM", "mixtral", "block_sparse_moe.experts.7.w2", "mlp.experts.down_proj", 7, 0, 1),
    ("PhimoeForCausalLM", "phimoe", "block_sparse_moe.experts.15.w3", "mlp.experts.gate_up_proj", 15, 1, 2),
    ("Qwen2MoeForCausalLM", "qwen2_moe", "mlp.experts.0.gate_proj", "mlp.experts.gate_up_proj", 0, 0, 2),
    ("Qwen3MoeForCausalLM", "qwen3_moe", "mlp.experts.127.up_proj", "mlp.experts.gate_up_proj", 127, 1, 2),
    ("DeepseekV3ForCausalLM", "deepseek_v3", "mlp.experts.255.down_proj", "mlp.experts.down_proj", 255, 0, 1),
    ("JambaForCausalLM", "jamba", "feed_forward.experts.1.up_proj", "feed_forward.experts.gate_up_proj", 1, 1, 2),
    ("Lfm2MoeForCausalLM", "lfm2_moe", "feed_forward.experts.1.w2", "feed_forward.experts.down_proj", 1, 0, 1),
    ("NemotronHForCausalLM", "nemotron_h", "mixer.experts.5.up_proj", "mixer.experts.up_proj", 5, 0, 1),
]


@pytest.mark.parametrize(("family", "memory", "older"), [(row[0], row[1], row[2:]) for row in NAMES])
def test_all_names_of_a_tensor_meet(family: Family, memory: str, older: tuple[str, ...]) -> None:
    assert {family.canonical(name) for name in (memory, *older)} == {memory}


@pytest.mark.parametrize(("class_name", "model_type", "disk", "parameter", "expert", "part", "parts"), EXPERTS)
def test_an_experts_own_tensor_lies_in_a_fused_parameter(
    class_name: str, model_type: str, disk: str, parameter: str, expert: int, part: int, parts: int
) -> None:
    family = of(class_name, model_type)
    place = family.fused_place(family.canonical(f"model.layers.4.{disk}.weight"))
    assert place == FusedPlace(f"model.layers.4.{parameter}", expert, part, parts)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.4.mlp.experts.3.gate_proj.weight_scale_inv",
        "model.layers.4.mlp.experts.gate_up_proj",
        "model.layers.4.mlp.experts.1234567890.gate_proj.weight",
        "model.layers.4.mlp.gate.weight",
    ],
)
def test_other_tensors_of_a_mixture_lie_nowhere_else(name: str) -> None:
    assert of("DeepseekV3ForCausalLM", "deepseek_v3").fused_place(name) is None


def test_a_tensor_that_is_split_into_equal_chunks() -> None:
    family = of("NomicBertModel", "nomic_bert")
    name = family.canonical("encoder.layers.0.attn.Wqkv.weight")
    assert family.chunks(name) == tuple(f"layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    assert family.chunks("layers.0.mlp.up_proj.weight") == ()


def test_tensors_that_are_stacked() -> None:
    family = of("OlmoHybridForCausalLM", "olmo_hybrid")
    stacked = [family.stacked(f"model.layers.0.linear_attn.{part}_conv1d.weight") for part in "qkv"]
    assert stacked == [("model.layers.0.linear_attn.conv1d.weight", place, 3) for place in range(3)]
    assert family.stacked("model.layers.0.linear_attn.o_proj.weight") is None


def test_what_is_not_followed_is_named() -> None:
    kimi = of("KimiK25ForConditionalGeneration", "kimi_k25")
    assert "PermuteForRope" in kimi.unsupported("vision_tower.encoder.blocks.0.wqkv.weight")
    assert "GroupWeightRename" in kimi.unsupported("vision_tower.encoder.blocks.0.norm1.weight")
    assert kimi.unsupported("language_model.model.layers.0.self_attn.o_proj.weight") == ""


def test_the_inner_models_renames_do_not_hide_what_is_not_followed() -> None:
    """The text model's `.attention.` to `.self_attn.` would also rename the vision tower's tensor."""
    family = of("X", "mistral_large4", "mistral_large4_text")
    assert "PermuteForRope" in family.unsupported("vision_encoder.transformer.layers.0.attention.wq.weight")


def test_the_first_known_identifier_gives_the_rules_of_the_whole_model() -> None:
    by_type = family_of(["LlavaForConditionalGeneration", "llava"])
    by_class = family_of(["LlavaModel", "llava"])
    assert by_type.canonical("language_model.model.norm.weight") == "model.language_model.norm.weight"
    assert by_class.canonical("language_model.model.norm.weight") == "language_model.norm.weight"


def test_a_lone_model_type_stands_for_its_only_head() -> None:
    assert family_of(["gpt_neox"]).canonical("embed_out.weight") == "lm_head.weight"
    assert family_of(["qwen2_vl"]).canonical("visual.blocks.0.x") == "model.visual.blocks.0.x"
    assert family_of(["GPTNeoXForTokenClassification", "gpt_neox"]).canonical("embed_out.weight") == "embed_out.weight"


@pytest.mark.parametrize(("family", "memory"), [(row[0], row[1]) for row in NAMES if row[0] is OMNI])
def test_auto_classes_among_the_nested_types_change_nothing(family: Family, memory: str) -> None:
    types = ["qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_talker"]
    with_classes = [name for model_type in types for name in (model_type, *auto_classes(model_type))]
    again = family_of(["Qwen2_5OmniForConditionalGeneration", "qwen2_5_omni"], with_classes)
    assert again.canonical(memory) == family.canonical(memory) == memory


def test_towers_side_by_side_keep_their_names_below_a_prefix() -> None:
    names = [f"clip.{tower}_model.encoder.layers.0.mlp.fc1.weight" for tower in ("text", "vision")]
    family = of("X", "x", "clip_text_model", "clip_vision_model")
    assert [family.canonical(name) for name in names] == names


def test_a_neighbours_names_change_on_both_sides() -> None:
    """Where a ViT stands in the model is unknown; its BERT neighbour's names change too, and stay distinct."""
    family = of("VisionEncoderDecoderModel", "vision-encoder-decoder", "vit", "bert")
    leaves = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    leaves += ["attention.output.LayerNorm", "output.LayerNorm", "crossattention.output.dense"]
    names = [f"{half}.encoder.layer.0.{leaf}.weight" for half in ("encoder", "decoder.bert") for leaf in leaves]
    assert len({family.canonical(name) for name in names}) == len(names)


def test_unknown_models_keep_their_names() -> None:
    family = family_of(["SomeModel", "some_type"], ["another"])
    assert family.canonical("model.language_model.layers.0.x.weight") == "model.language_model.layers.0.x.weight"
    assert not family.has_transposed_experts


def test_a_name_of_absurd_length_is_left_alone() -> None:
    name = "encoder." * 20_000
    assert of("CohereAsrForConditionalGeneration", "cohere_asr").canonical(name) == name


def test_what_only_the_source_says() -> None:
    assert family_of(["GptOssForCausalLM", "gpt_oss"]).has_transposed_experts
    assert ARIA.has_transposed_experts
    assert not of("MixtralForCausalLM", "mixtral").has_transposed_experts
    assert base_prefixes(["bert", "gpt2", "gpt_neox", "mistral", "unknown"]) == {
        *("bert", "transformer", "gpt_neox", "model")
    }
    assert base_prefixes(["qwen2_5_omni"]) == {"model"}
    assert base_prefixes(["qwen2_5_omni_talker"]) == {"model", "talker"}
    assert auto_classes("clip_vision_model") == ("CLIPVisionModel",)
    assert auto_classes("vit") == ("ViTModel",)
    assert auto_classes("qwen2_vl") == ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    assert auto_classes("llama") == ()
    assert transformers_version() == DATA["transformers"]


PREFIXES = ["", "model.", "language_model.", "model.language_model.", "language_model.model.", "vit.", "backbone."]
PREFIXES += ["vision_tower.", "model.visual.", "visual.", "vision_tower.vision_model.", "thinker.", "encoder."]
BLOCKS = ["", "layers.0.", "encoder.layer.3.", "encoder.layers.11.", "blocks.2.", "h.1.", "transformer.resblocks.0."]
LEAVES = ["self_attn.q_proj", "attn.qkv", "attention.attention.query", "attention.output.dense", "attention.wq"]
LEAVES += ["mlp.gate_proj", "mlp.fc2", "output.dense", "intermediate.dense", "fc1", "mlp.experts.3.up_proj", "norm1"]
LEAVES += ["block_sparse_moe.experts.1.w2", "mlp.gate", "feed_forward.experts.2.w1", "embed_tokens", "norm", "lm_head"]


def realistic() -> Iterator[str]:
    return (f"{prefix}{block}{leaf}.weight" for prefix, block, leaf in product(PREFIXES, BLOCKS, LEAVES))


@pytest.mark.parametrize("key", KEYS)
def test_a_canonical_name_is_its_own_canonical_name(key: str) -> None:
    family = family_of([key])
    assert [name for name in map(family.canonical, realistic()) if family.canonical(name) != name] == []


@given(st.sampled_from([LLAVA, GEMMA3, QWEN2_VL, OMNI, CLIP, VIT, ARIA, NEMOTRON]), st.lists(st.sampled_from(
    ["model", "language_model", "vision_tower", "vision_model", "visual", "thinker", "layers", "0", "mlp", "weight"]
), min_size=1, max_size=6))  # fmt: skip
def test_any_path_settles(family: Family, path: list[str]) -> None:
    name = family.canonical(".".join(path))
    assert family.canonical(name) == name


TEXT_LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "input_layernorm"]


@pytest.mark.parametrize(
    ("family", "places"),
    [
        (LLAVA, ["language_model.model.layers.0.", "vision_tower.vision_model.encoder.layers.0."]),
        (GEMMA3, ["language_model.model.layers.0.", "vision_tower.vision_model.encoder.layers.0."]),
        (MISTRAL3, ["language_model.model.layers.0.", "vision_tower.transformer.layers.0."]),
        (QWEN2_VL, ["model.layers.0.", "visual.blocks.0."]),
        (
            OMNI,
            ["thinker.model.layers.0.", "thinker.visual.blocks.0.", "talker.model.layers.0.", "thinker.audio_tower."],
        ),
        (CLIP, ["text_model.encoder.layers.0.", "vision_model.encoder.layers.0."]),
    ],
)
def test_distinct_tensors_stay_distinct(family: Family, places: list[str]) -> None:
    names = [f"{place}{leaf}.weight" for place in places for leaf in TEXT_LEAVES]
    assert len({family.canonical(name) for name in names}) == len(names)
