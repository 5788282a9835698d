"""Edited configs as transformers reads them: the vocabulary, the layers, the tie and the labels that were meant."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rawmerge.formats.config_edits import with_labels, with_vocab_size
from rawmerge.formats.layer_edits import ALIKE_FAMILIES, LISTED_FAMILIES, layer_config_paths, with_layer_count
from rawmerge.formats.model_config import ModelConfig, parse_model_config, with_untied_embeddings
from tests.parity.tiny_models import bert, gpt2, llama

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, **TOKENS, "vocab_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
VISION = {**SMALL, "image_size": 16, "patch_size": 8, "vocab_size": 96}


def llava(text_type: str = "llama", **fields: Any) -> Any:
    text = {**TEXT, "model_type": text_type, "tie_word_embeddings": False, **fields}
    return transformers.LlavaConfig(
        text_config=transformers.CONFIG_MAPPING[text_type](**text),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=95,
    )


def gemma3(**fields: Any) -> Any:
    text = transformers.Gemma3TextConfig(**{**TEXT, "head_dim": 8, **fields})
    vision = transformers.SiglipVisionConfig(**VISION)
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95, **fields
    )


def qwen2_vl(**fields: Any) -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return transformers.Qwen2VLConfig(text_config={**text, **fields}, vision_config=vision, **ids, **fields)


def save(config: Any, folder: Path, auto_class: str) -> tuple[Any, ModelConfig]:
    """Save a model with random weights; return it, and its config as rawmerge reads it."""
    torch.manual_seed(1)
    model = getattr(transformers, auto_class).from_config(config)
    model.save_pretrained(folder)
    return model, read(folder)


def read(folder: Path) -> ModelConfig:
    return parse_model_config((folder / "config.json").read_bytes(), "config.json")


def load_config(text: str, folder: Path) -> Any:
    (folder / "config.json").write_text(text)
    return transformers.AutoConfig.from_pretrained(folder)


CAUSAL, CHAT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
MODELS = {
    "llama": (llama, CAUSAL),
    "gpt2": (gpt2, CAUSAL),
    "bert": (bert, "AutoModelForMaskedLM"),
    "llava": (llava, CHAT),
    "gemma3": (gemma3, CHAT),
    "qwen2_vl": (qwen2_vl, CHAT),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_resized_vocabulary_is_the_one_that_transformers_writes(name: str, tmp_path: Path) -> None:
    build, auto_class = MODELS[name]
    model, config = save(build(), tmp_path, auto_class)
    edit = with_vocab_size(config, config.text, 96, 101)
    model.resize_token_embeddings(101, mean_resizing=False)
    model.save_pretrained(tmp_path)
    theirs = read(tmp_path)
    assert edit.is_certain
    assert json.loads(edit.text) == theirs.fields
    assert load_config(edit.text, tmp_path).get_text_config().vocab_size == 101


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_a_text_config_that_states_no_vocabulary_gets_one(name: str, tmp_path: Path) -> None:
    build, auto_class = MODELS[name]
    _, config = save(build(), tmp_path, auto_class)
    fields = json.loads(config.text)
    del fields["text_config"]["vocab_size"]
    config = parse_model_config(json.dumps(fields, indent=2).encode(), "config.json")
    edit = with_vocab_size(config, config.text, 96, 101)
    assert edit.is_certain
    assert load_config(edit.text, tmp_path).get_text_config().vocab_size == 101


def flat_qwen2_vl(config: ModelConfig) -> dict[str, Any]:
    """Return the config in the shape that Qwen2-VL's checkpoints have: the text model's fields at the top."""
    text = {key: value for key, value in config.fields["text_config"].items() if key != "model_type"}
    return {**text, **{key: value for key, value in config.fields.items() if key != "text_config"}}


def test_a_flat_vision_language_config_is_followed(tmp_path: Path) -> None:
    _, config = save(qwen2_vl(tie_word_embeddings=True), tmp_path, CHAT)
    flat = parse_model_config(json.dumps(flat_qwen2_vl(config)).encode(), "config.json")
    edit = with_vocab_size(flat, with_untied_embeddings(flat, flat.text), 96, 101)
    loaded = load_config(edit.text, tmp_path)
    assert edit.is_certain
    assert (loaded.get_text_config().vocab_size, loaded.tie_word_embeddings) == (101, False)


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def without_ties(fields: dict[str, Any], kept: str) -> dict[str, Any]:
    """Return the fields with the tie stated where `kept` says only: `top`, `text`, both or nowhere."""
    text = {key: value for key, value in fields["text_config"].items() if key != "tie_word_embeddings"}
    top = {key: value for key, value in fields.items() if key not in {"tie_word_embeddings", "text_config"}}
    tie = {"tie_word_embeddings": True}
    return {**top, **(tie if "top" in kept else {}), "text_config": {**text, **(tie if "text" in kept else {})}}


TIED = {
    "llava": lambda: llava(tie_word_embeddings=True),
    "llava of gemma": lambda: llava("gemma", head_dim=8, tie_word_embeddings=True),
    "gemma3": lambda: gemma3(tie_word_embeddings=True),
    "qwen2_vl": lambda: qwen2_vl(tie_word_embeddings=True),
}


@pytest.mark.parametrize("stated", ["top", "text", "top and text", "nowhere"])
@pytest.mark.parametrize("name", TIED)
def test_no_vision_language_model_is_tied_after_the_edit(name: str, stated: str, tmp_path: Path) -> None:
    model, saved = save(TIED[name](), tmp_path, CHAT)
    fields = without_ties(json.loads(saved.text), stated)
    config = parse_model_config(json.dumps(fields, indent=2).encode(), "config.json")
    (tmp_path / "config.json").write_text(config.text)
    was_tied = is_tied(type(model).from_pretrained(tmp_path))
    assert config.ties_embeddings or not was_tied
    (tmp_path / "config.json").write_text(with_untied_embeddings(config, config.text))
    assert not is_tied(type(model).from_pretrained(tmp_path))
    assert not read(tmp_path).ties_embeddings


@pytest.mark.parametrize("stated", [None, True])
@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_no_language_model_is_tied_after_the_edit(build: Any, stated: bool | None, tmp_path: Path) -> None:
    auto_class = "AutoModelForMaskedLM" if build is bert else CAUSAL
    model, config = save(build(tie_word_embeddings=True), tmp_path, auto_class)
    fields = {key: value for key, value in config.fields.items() if key != "tie_word_embeddings"}
    fields |= {} if stated is None else {"tie_word_embeddings": stated}
    config = parse_model_config(json.dumps(fields).encode(), "config.json")
    (tmp_path / "config.json").write_text(with_untied_embeddings(config, config.text))
    assert not is_tied(type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_labels_are_those_that_transformers_writes(count: int, tmp_path: Path) -> None:
    bert(num_labels=count).save_pretrained(tmp_path)
    theirs = read(tmp_path).fields
    bert().save_pretrained(tmp_path)
    config = read(tmp_path)
    edited = with_labels(config, config.text, count)
    assert edited is not None
    assert json.loads(edited) == theirs
    loaded = load_config(edited, tmp_path)
    assert (loaded.num_labels, len(loaded.label2id)) == (count, count)


def test_a_classifier_loads_with_the_edited_labels(tmp_path: Path) -> None:
    _, config = save(bert(), tmp_path, "AutoModelForMaskedLM")
    labelled = with_labels(config, config.text, 5)
    assert labelled is not None
    model = transformers.BertForSequenceClassification(load_config(labelled, tmp_path))
    assert model.classifier.weight.shape == (5, 48)


# Layers


LAYERS = 6
ORDER = [3, 0, 1, 0, 5, 2, 4, 5, 1]


def family_fields(family: str) -> dict[str, Any]:
    """Return the family's default config with six layers, as its class fills in the lists."""
    made = transformers.CONFIG_MAPPING[family]().to_dict()
    count = next(made[key] for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in made)
    fields = {key: value for key, value in made.items() if not (isinstance(value, list) and len(value) == count)}
    fields |= {key: LAYERS for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in made}
    filled = transformers.CONFIG_MAPPING[family].from_dict(dict(fields))
    return dict(json.loads(json.dumps(filled.to_dict(), default=str)))


def layers_of(fields: dict[str, Any], count: int) -> list[Any]:
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    return [list(describe(layer)) for layer in next(found)]


def describe(layer: torch.nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield what each module of a layer is: its class, its plain attributes and its tensors' shapes, not its index."""
    indices = {"layer_idx", "layer_id", "layer_index"}
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k not in indices}
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        yield name, type(module).__name__, plain, {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def families() -> list[Any]:
    quick = {"llama", "qwen2", "gemma2", "gpt2", "smollm3"}
    known = sorted(ALIKE_FAMILIES | LISTED_FAMILIES.keys())
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in known]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("family", families())
def test_moved_layers_are_built_as_they_were(family: str) -> None:
    fields = family_fields(family)
    before = layers_of(fields, LAYERS)
    config = parse_model_config(json.dumps(fields).encode(), "config.json")
    after = json.loads(with_layer_count(config, config.text, (), ORDER))
    assert layers_of(after, len(ORDER)) == [before[index] for index in ORDER]
    if family in ALIKE_FAMILIES:
        assert all(layer == before[0] for layer in before)


@pytest.mark.parametrize("build", [llama, bert], ids=["llama", "bert"])
def test_repeated_layers_give_what_peft_computes(build: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    auto_class = "AutoModelForMaskedLM" if build is bert else CAUSAL
    model, config = save(build(num_hidden_layers=3), tmp_path, auto_class)
    settings = peft.LoraConfig(
        layer_replication=[(0, 2), (1, 3)], target_modules=["q_proj", "query"], init_lora_weights=False
    )
    ids = torch.arange(5, 15).view(1, 10)
    merged = peft.get_peft_model(model, settings).merge_and_unload().eval()
    text = with_layer_count(config, config.text, (), [0, 1, 1, 2])
    rebuilt = getattr(transformers, auto_class).from_config(load_config(text, tmp_path)).eval()
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(ids).logits, merged(ids).logits)


def test_a_vision_language_model_has_its_layer_counts_found(tmp_path: Path) -> None:
    _, config = save(llava(), tmp_path, CHAT)
    assert layer_config_paths(config) == {("text_config",): 2, ("vision_config",): 2}
    text = with_layer_count(config, config.text, ("text_config",), [0, 1, 0])
    loaded = load_config(text, tmp_path)
    assert (loaded.text_config.num_hidden_layers, loaded.vision_config.num_hidden_layers) == (3, 2)
