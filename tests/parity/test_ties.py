"""Tied embeddings: each side gets exactly its own delta, and the tie stands as long as both sides are equal.

PEFT's merge changes both sides whatever was trained. The model before merging is the truth: its logits, and the sums
that torch makes of the adapter's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests import builders
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.family_models import FAMILIES, VLM

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    *oracle.QUIET,
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging:UserWarning:peft"),
]

RANK, ALPHA = 6, 9
HEAD = "lm_head"
#: Stand-ins for the input embedding's name and for a linear layer's.
EMBEDDING, LINEAR = "EMBEDDING", "LINEAR"


class TiedModel(NamedTuple):
    """A family with tied embeddings: its config, the embedding's path in the adapter, a linear layer to train."""

    auto: str
    config: Any
    path: str
    linear: str


MODELS = {
    "llama": TiedModel(tiny.CAUSAL, lambda: tiny.llama(tie_word_embeddings=True), "model.embed_tokens", "q_proj"),
    "gpt2": TiedModel(tiny.CAUSAL, tiny.gpt2, "transformer.wte", "c_attn"),
    "gemma3": TiedModel(tiny.CAUSAL, FAMILIES["gemma3-text"].config, "model.embed_tokens", "q_proj"),
    "gemma3-vlm": TiedModel(VLM, FAMILIES["gemma3"].config, "model.language_model.embed_tokens", "q_proj"),
}


class Case(NamedTuple):
    """Fields of peft.LoraConfig, whether the two sides come out equal, and which stored copy to overwrite."""

    fields: dict[str, Any]
    stays_tied: bool
    head_copy_from: str = ""


_BOTH = [EMBEDDING, HEAD]
CASES = {
    "lora-embedding": Case({"target_modules": [LINEAR, EMBEDDING]}, False),
    "lora-head": Case({"target_modules": [LINEAR, HEAD]}, False),
    "lora-both": Case({"target_modules": [LINEAR, *_BOTH]}, False),
    "lora-head-alone": Case({"target_modules": [HEAD]}, False),
    "ensured-head": Case({"target_modules": [LINEAR, HEAD], "ensure_weight_tying": True}, True),
    "ensured-both": Case({"target_modules": [LINEAR, *_BOTH], "ensure_weight_tying": True}, True),
    "ensured-embedding": Case({"target_modules": [LINEAR, EMBEDDING], "ensure_weight_tying": True}, True),
    "saved-embedding": Case({"modules_to_save": [EMBEDDING]}, False),
    "saved-head": Case({"modules_to_save": [HEAD]}, False),
    "saved-both": Case({"modules_to_save": _BOTH}, False),
    "saved-both-equal": Case({"modules_to_save": _BOTH}, True, head_copy_from="adapter"),
    "saved-head-untrained": Case({"modules_to_save": [HEAD]}, True, head_copy_from="base"),
    "saved-head-ensured": Case({"modules_to_save": [HEAD], "ensure_weight_tying": True}, True),
    "saved-both-ensured": Case({"modules_to_save": _BOTH, "ensure_weight_tying": True}, True),
    "rows-embedding": Case({"trainable_token_indices": {EMBEDDING: [9, 4]}}, True),
    "rows-head": Case({"trainable_token_indices": {HEAD: [9, 4]}}, False),
    "rows-of-both-differ": Case({"trainable_token_indices": {EMBEDDING: [9, 4], HEAD: [4, 11]}}, False),
    "rows-of-both-equal": Case({"trainable_token_indices": {EMBEDDING: [9, 4], HEAD: [9, 4]}}, True),
    "rows-ensured": Case({"trainable_token_indices": {EMBEDDING: [9, 4]}, "ensure_weight_tying": True}, True),
}
#: PEFT knows an embedding by the name embed_tokens; for GPT-2's wte the flag has no effect, and the sides part.
NOT_ENSURED = {("gpt2", "ensured-embedding")}
#: For the same reason PEFT drops the head's pair when it loads these; as trained, both sides had the delta.
LOST_ON_LOADING = {("gpt2", "ensured-head"), ("gpt2", "ensured-both")}
#: All cases for two layouts, a few for the others: a scaled embedding, and a text model inside another.
FEW = {"lora-embedding", "lora-head", "ensured-head", "saved-both", "saved-both-equal", "rows-of-both-differ"}
COMBINATIONS = [(model, case) for model in MODELS for case in CASES if model in {"llama", "gpt2"} or case in FEW]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a model and a dtype to a base, made once."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        folder, model = root / f"{name}-{dtype}", MODELS[name]
        return folder if folder.exists() else oracle.save_base(folder, model.auto, model.config(), dtype, "30KB")

    return make


def real_names(value: Any, model: TiedModel) -> Any:
    """Put the model's own names for the stand-ins."""
    names = {EMBEDDING: model.path.rpartition(".")[2], LINEAR: model.linear}
    if isinstance(value, dict):
        return {names.get(key, key): real_names(each, model) for key, each in value.items()}
    if isinstance(value, list):
        return [names.get(each, each) for each in value]
    return value


def train(base: Path, model: TiedModel, case: Case, folder: Path) -> Path:
    """Save the case's adapter."""
    fields = real_names({"target_modules": [LINEAR], **case.fields}, model)
    load = oracle.pretrained(base, model.auto)
    adapter = oracle.save_adapter(load, folder, r=RANK, lora_alpha=ALPHA, **fields)
    if case.head_copy_from:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        source = (
            tensors[f"{builders.PREFIX}{model.path}.weight"] if case.head_copy_from == "adapter" else tied_weight(base)
        )
        save_file({**tensors, f"{builders.PREFIX}{HEAD}.weight": source.clone()}, path, metadata={"format": "pt"})
    return adapter


def tied_weight(base: Path) -> torch.Tensor:
    tensors = builders.read_all(base)
    return next(tensor for name, tensor in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight")))


def side(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], config: dict[str, Any], path: str) -> torch.Tensor:
    """Return what an adapter alone makes of the embedding or the head at `path`, in float64."""
    own = {name.removeprefix(f"{builders.PREFIX}{path}."): tensor.double() for name, tensor in tensors.items()}
    result = own.get("weight", own.get("base_layer.weight", weight.double())).clone()
    if "lora_A.weight" in own:
        result += own["lora_B.weight"] @ own["lora_A.weight"] * ALPHA / RANK
    if "lora_embedding_A" in own:
        result += (own["lora_embedding_B"] @ own["lora_embedding_A"]).T * ALPHA / RANK
    if "token_adapter.trainable_tokens_delta" in own:
        result[config["trainable_token_indices"][path.rpartition(".")[2]]] = own["token_adapter.trainable_tokens_delta"]
    return result


def expected_sides(base: Path, adapter: Path, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input embedding and the head."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    embedding = side(tied_weight(base), tensors, config, path)
    has_head = any(name.startswith(f"{builders.PREFIX}{HEAD}.") for name in tensors)
    shares_rows = not has_head and config["trainable_token_indices"]  # token rows alone leave the tie as it is
    return embedding, embedding if shares_rows else side(tied_weight(base), tensors, config, HEAD)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(3, 21).reshape(2, 9)).logits
    assert isinstance(found, torch.Tensor)
    return found


def tie_flags(folder: Path) -> set[Any]:
    """Return what the config says of the tie: at the top, and in the text model's part where it says something."""
    config = json.loads((folder / "config.json").read_text())
    nested = config.get("text_config", {})
    return {part["tie_word_embeddings"] for part in (config, nested) if "tie_word_embeddings" in part}


def load_whole(folder: Path, auto: str) -> Any:
    model, info = getattr(transformers, auto).from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(("name", "case_name"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_each_side_gets_its_own_delta_and_equal_sides_stay_tied(
    bases: Any, tmp_path: Path, name: str, case_name: str
) -> None:
    model, case, base = MODELS[name], CASES[case_name], bases(name)
    stays_tied = case.stays_tied and (name, case_name) not in NOT_ENSURED
    adapter = train(base, model, case, tmp_path / "adapter")
    embedding, head = expected_sides(base, adapter, model.path)
    assert torch.allclose(embedding, head, atol=1e-6) == stays_tied, "the case is not what it says"
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")

    ours = builders.read_all(tmp_path / "ours")
    heads = [tensor for tensor_name, tensor in ours.items() if tensor_name.endswith("lm_head.weight")]
    assert len(heads) == (not stays_tied)
    torch.testing.assert_close(tied_weight(tmp_path / "ours").double(), embedding, atol=1e-6, rtol=1e-6)
    if heads:
        torch.testing.assert_close(heads[0].double(), head, atol=1e-6, rtol=1e-6)
        assert tie_flags(tmp_path / "ours") == {False}
    else:
        assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    loaded = logits(load_whole(tmp_path / "ours", model.auto))
    if (name, case_name) not in LOST_ON_LOADING:
        truth = logits(oracle.unmerged_model(oracle.pretrained(base, model.auto), adapter))
        torch.testing.assert_close(loaded, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("case_name", ["saved-embedding", "saved-head", "saved-both", "rows-embedding"])
def test_where_pefts_merge_keeps_its_word_the_bits_are_its_bits(
    bases: Any, tmp_path: Path, name: str, case_name: str
) -> None:
    model, base = MODELS[name], bases(name, torch.bfloat16)
    adapter = train(base, model, CASES[case_name], tmp_path / "adapter")
    expected = oracle.merge_with_peft(oracle.pretrained(base, model.auto), adapter, tmp_path / "peft")
    assert ("lm_head.weight" in expected) == (not CASES[case_name].stays_tied)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
    if "lm_head.weight" in expected:
        index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in expected.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bits_of_both_sides_of_a_half_base(bases: Any, tmp_path: Path, name: str) -> None:
    model, base = MODELS[name], bases(name, torch.bfloat16)
    adapter = train(base, model, CASES["lora-both"], tmp_path / "adapter")
    stored, weight = load_file(adapter / "adapter_model.safetensors"), tied_weight(base)
    at = f"{builders.PREFIX}{model.path}.lora_embedding_"
    # an embedding's delta is rounded before it is added, a linear layer's is not
    delta = ((stored[f"{at}B"] @ stored[f"{at}A"]) * (ALPHA / RANK)).T
    lora_a, lora_b = (stored[f"{builders.PREFIX}{HEAD}.lora_{side}.weight"] for side in "AB")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = builders.read_all(tmp_path / "ours")
    assert torch.equal(tied_weight(tmp_path / "ours"), weight + delta.bfloat16())
    assert torch.equal(ours["lm_head.weight"], builders.merged(weight, lora_a, lora_b, ALPHA / RANK))


def test_rows_of_a_tied_embedding_lie_under_the_heads_own_delta(bases: Any, tmp_path: Path) -> None:
    model, base = MODELS["llama"], bases("llama")
    fields = {"target_modules": [LINEAR, HEAD], "trainable_token_indices": {EMBEDDING: [9, 4]}}
    adapter = train(base, model, Case(fields, False), tmp_path / "adapter")
    load = oracle.pretrained(base, model.auto)
    with pytest.raises(RuntimeError, match="shared tensors"):  # PEFT merges this, but what comes out cannot be saved
        oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    try:
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    except rawmerge.RefusedError:
        return
    truth = logits(oracle.unmerged_model(load, adapter))
    torch.testing.assert_close(logits(load_whole(tmp_path / "ours", model.auto)), truth, atol=1e-4, rtol=1e-4)


def test_tied_base_with_a_copy_of_the_head_on_disk(bases: Any, tmp_path: Path) -> None:
    model, original = MODELS["llama"], bases("llama")
    tensors = builders.read_all(original)
    config = json.loads((original / "config.json").read_text())
    copy = {"lm_head.weight": tied_weight(original).clone()}
    base = builders.write_base(tmp_path / "base", [tensors, copy], config)
    adapter = train(base, model, CASES["lora-head"], tmp_path / "adapter")
    embedding, head = expected_sides(base, adapter, model.path)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = builders.read_all(tmp_path / "ours")
    assert torch.equal(ours["model.embed_tokens.weight"].double(), embedding)
    torch.testing.assert_close(ours["lm_head.weight"].double(), head, atol=1e-6, rtol=1e-6)
    assert tie_flags(tmp_path / "ours") == {False}
