"""The family table is transformers' own, and canonical names are the names that transformers' loader gives."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rawmerge import families
from rawmerge.families import Family, auto_classes, base_prefixes, family_of

transformers = pytest.importorskip("transformers")
tables = pytest.importorskip("transformers.conversion_mapping")
loading = pytest.importorskip("transformers.core_model_loading")

pytestmark = [pytest.mark.parity]

GENERATOR = Path(__file__).parents[2] / "scripts" / "make_families.py"

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **HEADS, **TOKENS}
MOE = {**TEXT, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 24}
IMAGE = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
IMAGE |= {"intermediate_size": 48, "num_hidden_layers": 1}
QWEN_IMAGE = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16}
AUDIO |= {"max_source_positions": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
INDEXED: dict[str, Any] = {
    "qk_rope_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "hc_mult": 2,
}
INDEXED |= {"mlp_layer_types": ["dense", "sparse"]}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2]}


def text(model_type: str, **fields: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **fields}


def image(model_type: str, **fields: Any) -> dict[str, Any]:
    return {**IMAGE, "model_type": model_type, **fields}


#: Name -> model class, config class and its fields: common families, and one at least of every kind of rule.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava with clip": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": text("llama"), "vision_config": image("clip_vision_model")},
    ),
    "llava with siglip": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": text("qwen2"), "vision_config": image("siglip_vision_model")},
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {"text_config": text("mistral"), "vision_config": image("clip_vision_model")},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {"text_config": text("gemma"), "vision_config": image("siglip_vision_model"), "projection_dim": 32},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": text("gemma3_text"), "vision_config": image("siglip_vision_model"), "mm_tokens_per_image": 4},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": text("mistral"), "vision_config": image("pixtral", head_dim=16)},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {"text_config": text("qwen2_vl_text", **MROPE), "vision_config": {**QWEN_IMAGE, "embed_dim": 32}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": text("qwen2_5_vl_text", **MROPE), "vision_config": QWEN_IMAGE},
    ),
    "qwen2_5_omni thinker": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5OmniThinkerConfig",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": QWEN_IMAGE,
            "audio_config": {**AUDIO, "output_dim": 32},
        },
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {"text_config": text("qwen2"), "audio_config": AUDIO},
    ),
    "aria": (
        "AriaForConditionalGeneration",
        "AriaConfig",
        {
            "text_config": text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            "vision_config": image("idefics3_vision"),
            "projector_patch_to_query_dict": {4: 4},
        },
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE),
    "beit": ("BeitForImageClassification", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**IMAGE, "use_swiglu_ffn": True}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {**STAGES, "decoder_hidden_size": 8}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": text("clip_text_model"), "vision_config": image("clip_vision_model"), "projection_dim": 16},
    ),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
    "clip vision with projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", IMAGE),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": text("siglip_text_model"), "vision_config": image("siglip_vision_model")},
    ),
    "hy_v4_vl": (
        "HYV4VLForConditionalGeneration",
        "HYV4VLConfig",
        {"text_config": {**MOE, **LATENT, **INDEXED, "num_hidden_layers": 2, "num_key_value_heads": 4, **MROPE}}
        | {"vision_config": {**IMAGE, "out_hidden_size": 32, "max_image_size": 64}},
    ),
    "exaone": ("LlamaForCausalLM", "ExaoneConfig", TEXT),
    "dory": (
        "DoryForCausalLM",
        "DoryConfig",
        {**TEXT, "num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "nomic_bert": ("NomicBertForMaskedLM", "NomicBertConfig", TEXT),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", MOE),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", MOE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**MOE, **LATENT, "num_hidden_layers": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {**MOE, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
        | {"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**MOE, "num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", MOE),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**MOE, "rope_parameters": {"rope_type": "default"}}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {**MOE, "num_hidden_layers": 3, "hybrid_override_pattern": "M*E", "mamba_num_heads": 4, "mamba_head_dim": 8}
        | {"ssm_state_size": 8, "n_groups": 1},
    ),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {**TEXT, **DELTA, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
}
#: Names in memory -> names as published before: transformers up to 4.51, then 4.52 to 4.57.
_OLD_VLM = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
_OLD_PARTS = (("model.vision_tower.", "vision_tower."), ("model.multi_modal_projector.", "multi_modal_projector."))
_OLD_CLIP = ("vision_tower.", "vision_tower.vision_model.")
OLDER: dict[str, list[tuple[tuple[str, str], ...]]] = {
    "llava with clip": [
        (*_OLD_VLM, *_OLD_PARTS, _OLD_CLIP),
        (("model.vision_tower.", "model.vision_tower.vision_model."),),
    ],
    "llava with siglip": [(*_OLD_VLM, *_OLD_PARTS, _OLD_CLIP)],
    "gemma3": [(*_OLD_VLM, *_OLD_PARTS, _OLD_CLIP), (("model.vision_tower.", "model.vision_tower.vision_model."),)],
    "mistral3": [(*_OLD_VLM, *_OLD_PARTS)],
    "qwen2_vl": [(("model.language_model.", "model."), ("model.visual.", "visual."))],
    "clip vision": [(("", "vision_model."),)],
}
#: Keys whose own rows do not settle as transformers' single pass leaves them, and why that is harmless.
NOT_SETTLED = {
    "RfDetrForInstanceSegmentation": "puts `model.` before all disk names, so also before canonical ones",
    "RfDetrForObjectDetection": "the same",
    "deepseek_ocr2": "names without `model.`: `language_model.layers` ends in what it renames",
    "unlimited_ocr": "the same",
    "ernie4_5_vl_moe": "a name with two `layers.`, which no tensor has",
    "t5gemma2_encoder": "the same",
    "inkling2": "appends `.weight`, also to a name that has it",
    "inkling2_text": "the same",
    "inkling2_loop": "the same",
    "inkling2_loop_text": "the same",
    "pi0": "drops the `model.` that its own last rules put in front",
}


class Saved:
    """A tiny model, what it wrote, and transformers' own way back from disk names to parameters."""

    def __init__(self, name: str, folder: Path) -> None:
        model_class, config_class, fields = MODELS[name]
        torch.manual_seed(5)
        self.model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
        self.model.save_pretrained(folder)
        self.disk = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        self.memory: dict[str, torch.Tensor] = self.model.state_dict()
        self.transforms = tables.get_model_conversion_mapping(self.model)
        config = self.model.config
        self.family = family_of([model_class, config.model_type], list(nested_types(config.to_dict())))

    def loaded_as(self, disk_name: str) -> str:
        return rename(disk_name, self.transforms, self.model.base_model_prefix, self.memory)


def nested_types(config: dict[str, Any]) -> Iterator[str]:
    for inner in config.values():
        if isinstance(inner, dict):
            yield from [inner["model_type"]] if inner.get("model_type") else []
            yield from nested_types(inner)


def rename(name: str, transforms: list[Any], *prefix_and_memory: Any) -> str:
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    renamed: str = loading.rename_source_key(name, renamings, converters, *prefix_and_memory)[0]
    return renamed


def parameter(family: Family, disk_name: str) -> str:
    """Return the parameter that holds the disk tensor; of several, the first, as transformers' renaming does."""
    name = family.canonical(disk_name)
    fused, stacked = family.fused_place(name), family.stacked(name)
    return fused.parameter if fused else stacked[0] if stacked else (*family.chunks(name), name)[0]


def from_memory(saved: Saved, disk_name: str) -> torch.Tensor:
    """Return the disk tensor's values, taken from the model by what the family says of the layout."""
    name = saved.family.canonical(disk_name)
    if place := saved.family.fused_place(name):
        return saved.memory[place.parameter][place.expert].chunk(place.parts)[place.part]
    if chunks := saved.family.chunks(name):
        return torch.cat([saved.memory[chunk] for chunk in chunks])
    if stacked := saved.family.stacked(name):
        rows = {place: len(tensor) for place, tensor in stacked_with(saved, stacked[0])}
        start = sum(rows[place] for place in range(stacked[1]))
        return saved.memory[stacked[0]][start : start + rows[stacked[1]]]
    return saved.memory[name]


def stacked_with(saved: Saved, whole: str) -> Iterator[tuple[int, torch.Tensor]]:
    for key, tensor in saved.disk.items():
        found = saved.family.stacked(saved.family.canonical(key))
        if found and found[0] == whole:
            yield found[1], tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}
    return lambda name: made.setdefault(name, Saved(name, tmp_path_factory.mktemp("family")))


MOVED = "transformers' table moved: run `python scripts/make_families.py` and read the diff of families.json"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_families", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    return generator


def test_the_tables_are_those_of_the_installed_transformers() -> None:
    generator = load_generator()
    assert families.transformers_version() == transformers.__version__, MOVED
    table = json.loads(generator.TARGET.read_text())
    assert table.keys() == {"transformers", "families", "auto_classes", "base_prefixes", "transposed_experts"}
    assert table["transformers"] == transformers.__version__, MOVED
    assert table["families"] == generator.families(), MOVED
    assert table["auto_classes"] == generator.auto_classes(), MOVED
    assert table["transposed_experts"] == generator.transposed_experts(), MOVED
    # parsing the code of every model takes 10 s, so every tenth here
    some = list(generator.sources())[::10]
    generator.sources = lambda: some
    own = {model_type: table["base_prefixes"].get(model_type) for model_type, _ in some}
    assert {name: prefixes for name, prefixes in own.items() if prefixes} == generator.base_prefixes(), MOVED


@pytest.mark.slow
def test_the_file_is_made_of_the_installed_transformers() -> None:
    generator = load_generator()
    assert generator.TARGET.read_text() == generator.document(), MOVED


@pytest.mark.parametrize("name", MODELS)
def test_disk_names_become_the_parameters_that_transformers_loads_them_into(
    saved: Callable[[str], Saved], name: str
) -> None:
    one = saved(name)
    assert {key: parameter(one.family, key) for key in one.disk} == {key: one.loaded_as(key) for key in one.disk}
    assert len({one.family.canonical(key) for key in one.disk}) == len(one.disk)
    assert {key for key in one.disk if one.family.unsupported(key)} == set()
    for key, tensor in one.disk.items():
        assert torch.equal(from_memory(one, key), tensor), key


@pytest.mark.parametrize("name", MODELS)
def test_names_in_memory_are_canonical(saved: Callable[[str], Saved], name: str) -> None:
    one = saved(name)
    assert {key for key in one.memory if one.family.canonical(key) != key} == set()


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name in OLDER for each in OLDER[name]])
def test_older_names_become_the_same(
    saved: Callable[[str], Saved], name: str, changes: tuple[tuple[str, str], ...]
) -> None:
    one = saved(name)
    older = {key: key for key in one.memory}
    for now, before in changes:
        older = {key: re.sub(f"^{re.escape(now)}", before, old) for key, old in older.items()}
    assert {one.family.canonical(old): key for key, old in older.items()} == {key: key for key in older}
    assert {one.loaded_as(old): key for key, old in older.items()} == {key: key for key in older}
    assert any(old != key for key, old in older.items())


def test_what_makes_one_layer_of_two_is_refused_where_it_does_so() -> None:
    parts = ["mixer.q_proj.weight", "mixer.up_proj.weight", "attn_alpha", "mlp_alpha"]
    parts += ["self_attn.q_proj.weight", "mlp.up_proj.weight", "lambda_1", "lambda_2", "mixer_norm.weight"]
    names = {f"backbone.layers.{number}.{part}" for number in (0, 1, 13) for part in parts} | {"lm_head.weight"}
    moved = {name for name in names if loading.LayerPairCollapse().rename_source_key(name)[0] != name}
    assert len(moved) == 3 * 4
    assert {name for name in names if family_of(["DoryForCausalLM", "dory"]).unsupported(name)} == moved


def example(pattern: str) -> str:
    """Return a text that a pattern of transformers' table matches."""
    return "".join(_example(part) for part in _parser.parse(pattern.replace("*.", r"\d+\.")))


def _example(part: tuple[Any, Any]) -> str:
    kind, value = part
    match kind:
        case _constants.LITERAL:
            return chr(value)
        case _constants.ANY:
            return "."
        case _constants.IN:
            return chr(value[0][1]) if value[0][0] is _constants.LITERAL else "3"
        case _constants.MAX_REPEAT:
            return "layers.3" if value[2][0][0] is _constants.ANY else _example(value[2][0])
        case _constants.SUBPATTERN:
            return "".join(map(_example, value[3]))
        case _constants.BRANCH:
            return "".join(map(_example, value[1][0]))
    assert kind in {_constants.AT, _constants.ASSERT, _constants.ASSERT_NOT}, kind
    return ""


def transforms_of(key: str) -> tuple[list[Any], list[Any]]:
    """Return the key's own rows, and all that hold where it is the root: the bare model's and the legacy ones too."""
    own = tables.get_checkpoint_conversion_mapping(key)
    bare = [each for name in auto_classes(key) if name.endswith("Model") for each in inner_transforms(key, name)]
    return own, [*own, *bare, *tables.get_checkpoint_conversion_mapping("legacy")]


def inner_transforms(key: str, bare_class: str) -> list[Any]:
    transforms: list[Any] = tables.get_checkpoint_conversion_mapping(bare_class)
    for each in transforms:
        each.scope_prefix = ""
        each.base_model_prefix = min(base_prefixes([key]), default="model")
    return transforms


def examples(own: list[Any]) -> Iterator[str]:
    for pattern in {pattern for each in own for pattern in each.source_patterns}:
        start = re.sub(r"^\.", "x.", example(pattern))
        yield from (start, f"{start.rstrip('.')}.weight", f"model.layers.0.{start.rstrip('.')}.weight")


@pytest.mark.parametrize("key", sorted(tables._build_checkpoint_conversion_mapping()))
def test_every_row_renames_as_transformers_does(key: str) -> None:
    own, transforms = transforms_of(key)
    family = family_of([key])
    followed = {name for name in examples(own) if not family.unsupported(name)}
    differ = {name for name in followed if parameter(family, name) != rename(name, transforms)}
    assert bool(differ) == (key in NOT_SETTLED), differ
    assert {name for name in followed if family.canonical(family.canonical(name)) != family.canonical(name)} == set()
