"""Vocabularies that grew before training, and such that are smaller than the base's padded one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests import builders
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.family_models import FAMILIES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    *oracle.QUIET,
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning:peft"),
]

BASE_SIZE, GROWN, SHRUNK = 96, 104, 90
#: Name: auto class and config of a base in several shards.
BASES: dict[str, tuple[str, Any]] = {
    "llama": (tiny.CAUSAL, tiny.llama),
    "llama-tied": (tiny.CAUSAL, lambda: tiny.llama(tie_word_embeddings=True)),
    "gpt2": (tiny.CAUSAL, tiny.gpt2),
    "llava": FAMILIES["llava"][:2],
    "gemma3": FAMILIES["gemma3"][:2],
    "qwen2-vl": FAMILIES["qwen2-vl"][:2],
}
#: Fields of peft.LoraConfig; EMBEDDING and LINEAR stand for the model's own names.
EMBEDDING, LINEAR, HEAD = "EMBEDDING", "LINEAR", "lm_head"
FIELDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": [LINEAR]},
    "lora-embedding": {"target_modules": [LINEAR, EMBEDDING]},
    "lora-head": {"target_modules": [LINEAR, HEAD]},
    "lora-both": {"target_modules": [LINEAR, EMBEDDING, HEAD]},
    "saved-both": {"target_modules": [LINEAR], "modules_to_save": [EMBEDDING, HEAD]},
    "saved-embedding": {"target_modules": [LINEAR], "modules_to_save": [EMBEDDING]},
    "rows": {"target_modules": [LINEAR], "trainable_token_indices": [97, 5, 103]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name and a dtype to a base, made once."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        folder, (auto, config) = root / f"{name}-{dtype}", BASES[name]
        return folder if folder.exists() else oracle.save_base(folder, auto, config(), dtype, "30KB")

    return make


def resized(base: Path, name: str, size: int) -> oracle.Loader:
    """Return a loader that changes the vocabulary, the same at every call."""

    def load() -> torch.nn.Module:
        torch.manual_seed(7)
        model: Any = oracle.load_pretrained(base, BASES[name][0])
        model.resize_token_embeddings(size)
        assert isinstance(model, torch.nn.Module)
        return model

    return load


def train(load: oracle.Loader, name: str, case: str, folder: Path) -> Path:
    names = {EMBEDDING: "wte", LINEAR: "c_attn"} if name == "gpt2" else {EMBEDDING: "embed_tokens", LINEAR: "q_proj"}
    fields: dict[str, Any] = {field: [names.get(each, each) for each in value] for field, value in FIELDS[case].items()}
    return oracle.save_adapter(load, folder, r=6, lora_alpha=9, **fields)


def vocabulary_sizes(folder: Path) -> dict[str, int]:
    """Return the size at the top of the config, and in the text model's part, where they are."""
    config = json.loads((folder / "config.json").read_text())
    parts = {"top": config, "text": config.get("text_config", {})}
    return {name: part["vocab_size"] for name, part in parts.items() if "vocab_size" in part}


def without_vocabulary(folder: Path) -> dict[str, Any]:
    """Return the config without what a new vocabulary and a new tie change."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("vocab_size", None)
        part.pop("tie_word_embeddings", None)
    return config


def check_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lying = {name: path.name for path in folder.glob("*.safetensors") for name in oracle.read_tensors(path)}
    assert index["weight_map"] == lying
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in oracle.read_tensors(folder).values())


def with_plain_head(tensors: Mapping[str, oracle.RawTensor]) -> dict[str, oracle.RawTensor]:
    """Name the head alike: what unties it in a nested model may choose either name that transformers loads."""
    return {HEAD + ".weight" if name.endswith("lm_head.weight") else name: each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("llama", "linear"),
        ("llama", "lora-both"),
        ("llama", "saved-both"),
        ("llama", "saved-embedding"),
        ("llama", "rows"),
        ("llama-tied", "linear"),
        ("llama-tied", "saved-both"),
        ("llama-tied", "saved-embedding"),
        ("llama-tied", "rows"),
        ("gpt2", "linear"),
        ("gpt2", "saved-both"),
        ("gpt2", "rows"),
        ("llava", "lora-both"),
        ("llava", "saved-both"),
        ("gemma3", "saved-both"),
        ("qwen2-vl", "saved-both"),
    ],
)
def test_grown_vocabulary_equals_pefts_merge_of_the_grown_model(
    bases: Any, tmp_path: Path, name: str, case: str
) -> None:
    base = bases(name)
    load = resized(base, name, GROWN)
    adapter = train(load, name, case, tmp_path / "adapter")
    expected = oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    oracle.assert_same_checkpoint(with_plain_head(ours), with_plain_head(expected))
    check_index(tmp_path / "ours")
    assert vocabulary_sizes(tmp_path / "ours") == vocabulary_sizes(tmp_path / "peft")
    assert set(vocabulary_sizes(tmp_path / "ours").values()) == {GROWN}
    assert without_vocabulary(tmp_path / "ours") == without_vocabulary(base)
    auto_class = getattr(transformers, BASES[name][0])
    _, info = auto_class.from_pretrained(tmp_path / "ours", output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info


def test_adapter_of_a_grown_model_holds_more_keys_than_one_for_its_saved_modules(bases: Any, tmp_path: Path) -> None:
    adapter = train(resized(bases("llama"), "llama", GROWN), "llama", "saved-both", tmp_path / "adapter")
    stored = oracle.read_tensors(adapter)
    for module in ("lm_head", "model.embed_tokens"):
        saved, original, plain = (
            stored[f"{builders.PREFIX}{module}.{kind}weight"] for kind in ("modules_to_save.", "original_module.", "")
        )
        assert saved == plain != original


def test_tied_vocabulary_that_grew_below_a_pair_on_the_embedding(bases: Any, tmp_path: Path) -> None:
    base = bases("llama-tied", torch.float32)
    load = resized(base, "llama-tied", GROWN)
    adapter = train(load, "llama-tied", "lora-embedding", tmp_path / "adapter")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    tokens = torch.arange(GROWN - 18, GROWN).reshape(2, 9)
    loaded: Any = oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL)
    trained: Any = oracle.unmerged_model(load, adapter)
    with torch.no_grad():
        ours, truth = loaded(input_ids=tokens).logits, trained(input_ids=tokens).logits
    assert ours.shape[-1] == GROWN
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)
    check_index(tmp_path / "ours")


def refused(base: Path, adapter: Path, folder: Path) -> str:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(rawmerge.RefusedError) as caught:
        rawmerge.merge_adapter(base, adapter, folder / "ours")
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "case", "lost"),
    [
        ("llama", "lora-embedding", "lm_head"),
        ("llama", "lora-head", "embed_tokens"),
        ("llava", "lora-embedding", "lm_head"),
        ("llava", "saved-embedding", "lm_head"),
    ],
)
def test_refused_where_the_adapter_holds_one_of_two_embeddings_that_grew(
    bases: Any, tmp_path: Path, name: str, case: str, lost: str
) -> None:
    # PEFT stores nothing of the other one; its new rows are lost with the training
    base = bases(name)
    adapter = train(resized(base, name, GROWN), name, case, tmp_path / "adapter")
    assert not any(lost in tensor for tensor in oracle.read_tensors(adapter))
    assert lost in refused(base, adapter, tmp_path)


def test_refused_where_token_rows_lie_beyond_the_base(bases: Any, tmp_path: Path) -> None:
    # a model with a nested config: PEFT does not see that the vocabulary grew, and stores no embedding
    base = bases("llava")
    adapter = train(resized(base, "llava", GROWN), "llava", "rows", tmp_path / "adapter")
    assert not any("base_layer" in tensor for tensor in oracle.read_tensors(adapter))
    assert "103" in refused(base, adapter, tmp_path)


SMALLER = [
    ("llama", "linear"),
    ("llama", "saved-both"),
    ("llama-tied", "linear"),
    ("gpt2", "linear"),
    ("llava", "saved-both"),
]


@pytest.mark.parametrize(("name", "case"), SMALLER)
def test_smaller_vocabulary_is_refused_with_the_option_that_merges_it(
    bases: Any, tmp_path: Path, name: str, case: str
) -> None:
    base = bases(name)
    adapter = train(resized(base, name, SHRUNK), name, case, tmp_path / "adapter")
    text = refused(base, adapter, tmp_path)
    assert "--vocab overlay" in text
    assert all(str(size) in text for size in (SHRUNK, BASE_SIZE))


@pytest.mark.parametrize(("name", "case"), SMALLER)
def test_overlay_writes_the_rows_over_the_first_and_keeps_the_rest(
    bases: Any, tmp_path: Path, name: str, case: str
) -> None:
    base = bases(name)
    load = resized(base, name, SHRUNK)
    adapter = train(load, name, case, tmp_path / "adapter")
    before, merged = oracle.read_tensors(base), oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    expected = {
        tensor: found._replace(shape=before[tensor].shape, data=found.data + before[tensor].data[len(found.data) :])
        for tensor, found in merged.items()
    }
    smaller = {tensor for tensor, found in merged.items() if found.shape != before[tensor].shape}
    assert len(smaller) == (1 if name in {"llama-tied", "gpt2"} else 2)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", vocab="overlay")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
    check_index(tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_overlay_changes_nothing_for_a_vocabulary_that_grew(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    load = resized(base, "llama", GROWN)
    adapter = train(load, "llama", "saved-both", tmp_path / "adapter")
    expected = oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", vocab="overlay")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
