"""Whole tensors in an adapter: saved modules, heads that the base lacks, biases, token rows, embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.family_models import FAMILIES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    *oracle.QUIET,
    # PEFT takes the bias of a pair for a weight that lost its shape
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

SEQUENCES, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
MASKED, BODY = "AutoModelForMaskedLM", "AutoModel"
LABELS = 3

#: Name: auto class and config of a base, several shards each.
BASES: dict[str, tuple[str, Any]] = {
    "llama": (tiny.CAUSAL, tiny.llama),
    "llama-tied": (tiny.CAUSAL, lambda: tiny.llama(tie_word_embeddings=True)),
    "llama-biases": (tiny.CAUSAL, lambda: tiny.llama(attention_bias=True, mlp_bias=True)),
    "gpt2": (tiny.CAUSAL, tiny.gpt2),
    "bert": (MASKED, tiny.bert),
    "bert-body": (BODY, tiny.bert),
    "bert-classifier": (SEQUENCES, lambda: tiny.bert(num_labels=LABELS)),
    "roberta": (MASKED, FAMILIES["roberta"].config),
    "llava": FAMILIES["llava"][:2],
    "phi": FAMILIES["phi"][:2],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a name to a base in bfloat16, made once."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        auto, config = BASES[name]
        folder = root / name
        return folder if folder.exists() else oracle.save_base(folder, auto, config(), torch.bfloat16, "30KB")

    return make


def with_new_head(base: Path, auto: str) -> oracle.Loader:
    """Return a loader that puts a head on the base, the same at every call."""

    def load() -> nn.Module:
        torch.manual_seed(5)
        auto_class = getattr(transformers, auto)
        model = auto_class.from_pretrained(base, dtype="auto", num_labels=LABELS, local_files_only=True)
        assert isinstance(model, nn.Module)
        return model.eval()

    return load


def edit_tensors(adapter: Path, change: Any) -> None:
    """Replace tensors of the adapter's file; `change` maps name and tensor to a tensor."""
    path = adapter / "adapter_model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def check_index(folder: Path) -> None:
    """The index lists exactly the tensors that lie in the shards, with their total size."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lying = {name: path.name for path in folder.glob("*.safetensors") for name in oracle.read_tensors(path)}
    assert index["weight_map"] == lying
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in oracle.read_tensors(folder).values())


def check(base: Path, load: oracle.Loader, adapter: Path, folder: Path, force: bool = False) -> set[str]:
    """Compare with PEFT's merge and return the names that changed."""
    before, expected = oracle.read_tensors(base), oracle.merge_with_peft(load, adapter, folder / "peft")
    rawmerge.merge_adapter(base, adapter, folder / "ours", force=force)
    oracle.assert_same_checkpoint(oracle.read_tensors(folder / "ours"), expected)
    check_index(folder / "ours")
    return oracle.changed_names(before, expected)


# --- saved modules ---


def norms() -> nn.Module:
    return tiny.plain(one=nn.Linear(12, 20), norm=nn.BatchNorm1d(20), two=nn.Linear(20, 7), layer_norm=nn.LayerNorm(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_module_with_buffers_of_floats_and_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny.save_plain(norms, tmp_path / "net.safetensors", dtype)
    load = tiny.load_plain(norms, base)
    lora: dict[str, Any] = {"target_modules": ["one", "two"], "modules_to_save": ["norm"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=3, lora_alpha=7, **lora)
    # as a training leaves them behind
    edit_tensors(adapter, lambda name, tensor: tensor + 3 if "running" in name or "tracked" in name else tensor)
    (tmp_path / "peft").mkdir()
    save_file(oracle.merged_model(load, adapter).state_dict(), tmp_path / "peft" / "net.safetensors")
    expected = oracle.read_tensors(tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
    changed = oracle.changed_names(oracle.read_tensors(base), expected)
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert (
        changed
        == {"one.weight", "two.weight", "norm.weight", "norm.bias", "layer_norm.weight", "layer_norm.bias"} | buffers
    )


def test_saved_projector_whose_names_differ_from_the_disks(bases: Any, tmp_path: Path) -> None:
    base = bases("llava")
    load = oracle.pretrained(base, BASES["llava"][0])
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    changed = check(base, load, adapter, tmp_path)
    assert {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"} < changed


# --- heads ---


@pytest.mark.parametrize(
    ("name", "auto", "targets", "head"),
    [
        ("llama", SEQUENCES, ["q_proj", "v_proj"], {"score.weight"}),
        ("llama-tied", SEQUENCES, ["q_proj", "v_proj"], {"score.weight"}),
        ("gpt2", SEQUENCES, ["c_attn"], {"score.weight"}),
        ("llama", TOKENS, ["q_proj", "v_proj"], {"score.weight", "score.bias"}),
        ("bert", SEQUENCES, ["query", "intermediate.dense"], {"classifier.weight", "classifier.bias"}),
        ("bert-body", TOKENS, ["query", "intermediate.dense"], {"classifier.weight", "classifier.bias"}),
        (
            "roberta",
            SEQUENCES,
            ["query", "dense"],
            {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
    ],
)
def test_head_that_the_base_lacks_is_added(
    bases: Any, tmp_path: Path, name: str, auto: str, targets: list[str], head: set[str]
) -> None:
    base = bases(name)
    load = with_new_head(base, auto)
    task = "SEQ_CLS" if auto == SEQUENCES else "TOKEN_CLS"
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, task_type=task, target_modules=targets)
    stored = {tensor.removeprefix("base_model.model.") for tensor in oracle.read_tensors(adapter)}
    assert {tensor for tensor in stored if "lora" not in tensor} == head
    before, merged = oracle.read_tensors(base), oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    prefix = "bert." if name == "bert-body" else ""
    same = {tensor: merged[prefix + tensor] for tensor in before if prefix + tensor in merged}
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    expected = before | same | {tensor: merged[tensor] for tensor in head}
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
    check_index(tmp_path / "ours")
    _, info = getattr(transformers, auto).from_pretrained(
        tmp_path / "ours", num_labels=LABELS, output_loading_info=True, local_files_only=True
    )
    # the pooler is not in the base of a masked model, nor in an adapter
    assert {key for key in info["missing_keys"] if "pooler" not in key} == set()
    assert not info["mismatched_keys"]


def test_head_that_the_base_has_is_replaced(bases: Any, tmp_path: Path) -> None:
    base = bases("bert-classifier")
    load = oracle.pretrained(base, SEQUENCES)
    lora: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "pooler.dense"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    changed = check(base, load, adapter, tmp_path)
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} < changed
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()


# --- biases ---


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama-biases", ["q_proj", "down_proj"]), ("bert", ["query", "output.dense"]), ("phi", ["fc1", "lm_head"])],
)
def test_trained_biases_replace_the_bases(bases: Any, tmp_path: Path, name: str, targets: list[str], bias: str) -> None:
    base = bases(name)
    load = oracle.pretrained(base, BASES[name][0])
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, bias=bias, target_modules=targets)
    changed = {tensor for tensor in check(base, load, adapter, tmp_path) if tensor.endswith(".bias")}
    every = {tensor for tensor in oracle.read_tensors(base) if tensor.endswith(".bias")}
    assert changed == every if bias == "all" else changed < every
    assert changed


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_of_the_pair_is_scaled_and_added(bases: Any, tmp_path: Path, bias: str) -> None:
    base = bases("llama-biases")
    load = oracle.pretrained(base, tiny.CAUSAL)
    lora: dict[str, Any] = {"lora_bias": True, "bias": bias, "target_modules": ["q_proj", "up_proj"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    changed = check(base, load, adapter, tmp_path)
    assert {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias"} < changed
    assert ("model.layers.0.self_attn.k_proj.bias" in changed) == (bias == "all")


def test_bias_of_the_pair_is_refused_where_the_base_has_none(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    load = oracle.pretrained(base, tiny.CAUSAL)
    lora: dict[str, Any] = {"lora_bias": True, "target_modules": ["q_proj"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        oracle.merged_model(load, adapter)
    with pytest.raises(rawmerge.RefusedError, match="bias"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- token rows ---

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "indices", "fields", "embeddings"),
    [
        ("llama", [90, 2, 5], {}, {EMBEDDING}),
        ("llama", {"embed_tokens": [5, 2]}, {}, {EMBEDDING}),
        ("llama", {"lm_head": [5, 2]}, {}, {HEAD}),
        ("llama", {"embed_tokens": [5, 2], "lm_head": [7, 1, 3]}, {}, {EMBEDDING, HEAD}),
        ("llama", [5, 2], {"modules_to_save": ["lm_head"]}, {EMBEDDING, HEAD}),
        ("llama", [5, 2], {"target_modules": ["q_proj", "lm_head"]}, {EMBEDDING, HEAD}),
        ("llama-tied", [90, 2, 5], {}, {EMBEDDING}),
        ("llama-tied", {"embed_tokens": [5, 2], "lm_head": [5, 2]}, {}, {EMBEDDING}),
        ("gpt2", [90, 2, 5], {"target_modules": ["c_attn"]}, {"transformer.wte.weight"}),
        (
            "bert-body",
            {"word_embeddings": [3, 1]},
            {"target_modules": ["query"]},
            {"embeddings.word_embeddings.weight"},
        ),
    ],
)
def test_trained_token_rows_replace_the_bases(
    bases: Any, tmp_path: Path, name: str, indices: Any, fields: dict[str, Any], embeddings: set[str]
) -> None:
    base = bases(name)
    load = oracle.pretrained(base, BASES[name][0])
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": indices, **fields}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    assert any("trainable_tokens_delta" in tensor for tensor in oracle.read_tensors(adapter))
    changed = check(base, load, adapter, tmp_path)
    assert {
        tensor for tensor in changed if ".layers." not in tensor and ".h." not in tensor and ".layer." not in tensor
    } == embeddings
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()


# --- embeddings stored beside their pairs ---


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embedding_of_another_base_is_refused_or_by_force_what_the_delta_is_added_to(
    bases: Any, tmp_path: Path, targets: list[str]
) -> None:
    base = bases("llama")
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["q_proj", *targets])
    edit_tensors(adapter, lambda name, tensor: tensor * 2 + 1 if "base_layer" in name else tensor)
    with pytest.raises(rawmerge.RefusedError, match=r"base_layer[\s\S]*--force"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    changed = check(base, load, adapter, tmp_path, force=True)
    assert len(changed & {EMBEDDING, HEAD}) == len(targets)
