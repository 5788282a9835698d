"""The merged checkpoint equals PEFT's, byte for byte: families, layouts, dtypes, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Base dtype and adapter file dtype; each of the three on either side, equal and unequal.
DTYPE_PAIRS = [
    ("float32", "bfloat16"),
    ("float32", "float32"),
    ("bfloat16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float16"),
    ("float16", "bfloat16"),
]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Workshop:
    """Makes bases once and merges adapters on them, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0

    def folder(self, name: str) -> Path:
        return self._root / name

    def fresh(self) -> Path:
        self._count += 1
        return self._root / f"merge-{self._count}"

    def base(self, name: str, auto: str, config: Any, dtype: torch.dtype, max_shard_size: str = "60KB") -> Path:
        folder = self.folder(f"{name}-{dtype}")
        return folder if folder.exists() else oracle.save_base(folder, auto, config, dtype, max_shard_size)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("parity"))


def check_parity(base: Path, load: oracle.Loader, adapter: Path, folder: Path) -> set[str]:
    """Merge both ways, compare, and return the names of the tensors that PEFT changed."""
    expected = oracle.merge_with_peft(load, adapter, folder / "peft")
    rawmerge.merge_adapter(base, adapter, folder / "ours")
    ours, before = oracle.read_tensors(folder / "ours"), oracle.read_tensors(base)
    changed = oracle.changed_names(before, expected)
    oracle.assert_same_checkpoint(ours, expected)
    if kept := before.keys() - changed:
        oracle.assert_kept_bytes(before, ours, kept)
    return changed


def check_plain_parity(build: oracle.Loader, folder: Path, dtype: torch.dtype, **lora: Any) -> set[str]:
    """The same for a module without config, whose base is one file."""
    folder.mkdir()
    base = tiny.save_plain(build, folder / "net.safetensors", dtype)
    load = tiny.load_plain(build, base)
    adapter = oracle.save_adapter(load, folder / "adapter", **lora)
    (folder / "peft").mkdir()
    save_file(oracle.merged_model(load, adapter).state_dict(), folder / "peft" / "net.safetensors")
    expected = oracle.read_tensors(folder / "peft")
    rawmerge.merge_adapter(base, adapter, folder / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(folder / "ours"), expected)
    assert (folder / "ours" / "net.safetensors").exists()
    return oracle.changed_names(oracle.read_tensors(base), expected)


@pytest.mark.parametrize("file_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_llama_every_linear_in_every_pair_of_dtypes(workshop: Workshop, base_dtype: str, file_dtype: str) -> None:
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=15, target_modules=ALL_LINEAR)
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    changed = check_parity(base, load, adapter, folder)
    assert len(list(base.glob("*.safetensors"))) >= 3
    assert len(changed) == 2 * len(ALL_LINEAR)


def test_llama_in_float64(workshop: Workshop) -> None:
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), torch.float64)
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=15, target_modules=ALL_LINEAR)
    changed = check_parity(base, load, adapter, folder)
    assert {oracle.read_tensors(base)[name].dtype for name in changed} == {"F64"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_first_matching_pattern_in_file_order_sets_rank_and_alpha(
    workshop: Workshop, base_dtype: str, use_rslora: bool
) -> None:
    ranks = {
        "layers.0.self_attn.q_proj": 5,
        "proj": 90,  # the whole last segment has to match, so this one never does
        r"layers\.1\.mlp\.(gate|up)_proj": 7,
        "q_proj": 3,
        r"self_attn\..*_proj": 10,
        "v_proj": 91,  # the key before matches first
        "model": 92,
    }
    alphas = {"mlp.down_proj": 11.5, r".*\.layers\.1\..*": 2, r"(k|o)_proj": 17, "1.self_attn.k_proj": 93, "oj": 94}
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 13, "use_rslora": use_rslora, "target_modules": ALL_LINEAR}
    # PEFT sorts the keys when it saves; the file shall have them in this order
    adapter = oracle.save_adapter(load, folder / "adapter", edits=patterns, **lora, **patterns)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if ".lora_A." in name} == {3, 4, 5, 7, 10}
    assert len(check_parity(base, load, adapter, folder)) == 2 * len(ALL_LINEAR)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("base_dtype", "file_dtype"), DTYPE_PAIRS)
def test_gpt2_square_and_other_conv1d_whatever_the_flag(
    workshop: Workshop, base_dtype: str, file_dtype: str, flag: bool
) -> None:
    config = tiny.gpt2(add_cross_attention=True, tie_word_embeddings=False)
    base = workshop.base("gpt2", tiny.CAUSAL, config, DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    lora: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj", "c_fc", "q_attn"]}
    adapter = oracle.save_adapter(load, folder / "adapter", edits={"fan_in_fan_out": flag}, **lora)
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    changed = check_parity(base, load, adapter, folder)
    assert {"transformer.h.0.attn.c_proj.weight", "transformer.h.1.crossattention.q_attn.weight"} < changed


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("targets", [["c_proj"], ["c_proj", "lm_head"], ["c_fc", "c_proj", "lm_head"]])
def test_gpt2_conv1d_beside_a_linear_head(workshop: Workshop, targets: list[str], flag: bool) -> None:
    base = workshop.base("gpt2-head", tiny.CAUSAL, tiny.gpt2(tie_word_embeddings=False), torch.bfloat16)
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    lora: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": targets}
    adapter = oracle.save_adapter(load, folder / "adapter", edits={"fan_in_fan_out": flag}, **lora)
    changed = check_parity(base, load, adapter, folder)
    assert ("lm_head.weight" in changed) == ("lm_head" in targets)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_square_linear_weights_whatever_the_flag(workshop: Workshop, base_dtype: str, flag: bool) -> None:
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    lora: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj"]}
    adapter = oracle.save_adapter(load, folder / "adapter", edits={"fan_in_fan_out": flag}, **lora)
    assert len(check_parity(base, load, adapter, folder)) == 4


@pytest.mark.parametrize("targets", [["query", "value", "c_attn"], ["query", "intermediate.dense", "c_fc"], ["query"]])
def test_square_linear_of_an_encoder_beside_conv1d_of_its_decoder_is_right_or_refused(
    workshop: Workshop, targets: list[str]
) -> None:
    auto = "AutoModelForSeq2SeqLM"
    base = workshop.base("bert-to-gpt2", auto, tiny.bert_to_gpt2(), torch.float32)
    load, folder = oracle.pretrained(base, auto), workshop.fresh()
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, target_modules=targets)
    try:
        changed = check_parity(base, load, adapter, folder)
    except rawmerge.RefusedError:
        return
    assert "encoder.encoder.layer.0.attention.self.query.weight" in changed


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "value", "dense", "word_embeddings"]])
@pytest.mark.parametrize(("base_dtype", "file_dtype"), DTYPE_PAIRS)
def test_bert_encoder(workshop: Workshop, base_dtype: str, file_dtype: str, targets: list[str]) -> None:
    base = workshop.base("bert", "AutoModel", tiny.bert(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, "AutoModel"), workshop.fresh()
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, target_modules=targets)
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    changed = check_parity(base, load, adapter, folder)
    assert ("embeddings.word_embeddings.weight" in changed) == ("word_embeddings" in targets)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("file_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_untied_embedding_stored_whole_beside_its_pair(
    workshop: Workshop, base_dtype: str, file_dtype: str, module: str
) -> None:
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, target_modules=[module, "v_proj"])
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    name = "lm_head" if module == "lm_head" else "model.embed_tokens"
    assert f"base_model.model.{name}.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    changed = check_parity(base, load, adapter, folder)
    assert changed & {"lm_head.weight", "model.embed_tokens.weight"} == {f"{name}.weight"}


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
@pytest.mark.parametrize("base_dtype", ["bfloat16", "float16"])
def test_half_base_and_adapter_trained_on_its_float32_original(
    workshop: Workshop, base_dtype: str, targets: list[str]
) -> None:
    original = workshop.base("llama", tiny.CAUSAL, tiny.llama(), torch.float32)
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    folder = workshop.fresh()
    lora: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": targets, "modules_to_save": ["norm"]}
    # its embedding and norms are stored in float32, with bits that the base has no room for
    adapter = oracle.save_adapter(oracle.pretrained(original, tiny.CAUSAL), folder / "adapter", **lora)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    changed = check_parity(base, oracle.pretrained(base, tiny.CAUSAL), adapter, folder)
    assert "model.norm.weight" in changed


@pytest.mark.parametrize(("base_dtype", "file_dtype"), DTYPE_PAIRS)
def test_modules_to_save_replace_by_plain_suffix(workshop: Workshop, base_dtype: str, file_dtype: str) -> None:
    base = workshop.base("llama", tiny.CAUSAL, tiny.llama(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, tiny.CAUSAL), workshop.fresh()
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, **lora)
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    changed = check_parity(base, load, adapter, folder)
    # "norm" ends input_layernorm and post_attention_layernorm too
    assert {"lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"} < changed
    assert len(changed) == 2 + 2 + 2 * 2


@pytest.mark.parametrize(("base_dtype", "file_dtype"), DTYPE_PAIRS)
def test_resnet_convolutions_and_saved_head(workshop: Workshop, base_dtype: str, file_dtype: str) -> None:
    auto = "AutoModelForImageClassification"
    base = workshop.base("resnet", auto, tiny.resnet(), DTYPES[base_dtype])
    load, folder = oracle.pretrained(base, auto), workshop.fresh()
    lora: dict[str, Any] = {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, **lora)
    oracle.recast_adapter(adapter, DTYPES[file_dtype])
    changed = check_parity(base, load, adapter, folder)
    assert {"classifier.1.bias", "resnet.embedder.embedder.convolution.weight"} < changed


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_with_nested_configs(workshop: Workshop, dtype: str) -> None:
    base = workshop.base("clip", "AutoModel", tiny.clip(), DTYPES[dtype])
    load, folder = oracle.pretrained(base, "AutoModel"), workshop.fresh()
    targets = ["q_proj", "fc1", "patch_embedding", "text_projection"]
    adapter = oracle.save_adapter(load, folder / "adapter", r=6, lora_alpha=9, target_modules=targets)
    assert "vision_model.embeddings.patch_embedding.weight" in check_parity(base, load, adapter, folder)


def convolutions() -> nn.Module:
    return tiny.plain(
        one=nn.Conv1d(6, 20, 3),
        one_point=nn.Conv1d(6, 20, 1),
        two=nn.Conv2d(20, 18, 3),
        two_point=nn.Conv2d(18, 24, 1),
        two_flat=nn.Conv2d(24, 10, (1, 3)),
        three=nn.Conv3d(4, 9, 3),
        three_flat=nn.Conv3d(4, 9, (3, 1, 2)),
        norm=nn.BatchNorm2d(9),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_of_all_dimensions_in_one_file(workshop: Workshop, dtype: str) -> None:
    names = ["one", "one_point", "two", "two_point", "two_flat", "three", "three_flat"]
    lora: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": names}
    changed = check_plain_parity(convolutions, workshop.fresh(), DTYPES[dtype], **lora)
    assert changed == {f"{name}.weight" for name in names}


def low_matrices() -> nn.Module:
    sizes = {"one": (64, 1), "two": (70, 2), "five": (40, 5), "fifteen": (300, 15), "from_one": (1, 33)}
    return tiny.plain(**{name: nn.Linear(*size) for name, size in sizes.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_matrices_of_fewer_than_16_rows(workshop: Workshop, dtype: str, rank: int) -> None:
    names = ["one", "two", "five", "fifteen", "from_one"]
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 3, "target_modules": names}
    changed = check_plain_parity(low_matrices, workshop.fresh(), DTYPES[dtype], **lora)
    assert changed == {f"{name}.weight" for name in names}


def middling() -> nn.Module:
    return tiny.plain(wide=nn.Linear(320, 290), tall=tiny.conv1d(270, 400), low=nn.Linear(300, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [256, 300])
def test_ranks_of_256_and_more(workshop: Workshop, dtype: str, rank: int) -> None:
    lora: dict[str, Any] = {"r": rank, "lora_alpha": 40, "target_modules": ["wide", "tall", "low"]}
    changed = check_plain_parity(middling, workshop.fresh(), DTYPES[dtype], **lora)
    assert changed == {"wide.weight", "tall.weight", "low.weight"}


def large_matrices() -> nn.Module:
    return tiny.plain(
        linear=nn.Linear(1280, 1536),
        wide=nn.Linear(3000, 1100),
        conv1d=tiny.conv1d(1280, 1536),
        wide_conv1d=tiny.conv1d(1100, 3000),
        very_wide=nn.Linear(70_000, 40),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_of_several_tiles(workshop: Workshop, dtype: str) -> None:
    names = ["linear", "wide", "conv1d", "wide_conv1d", "very_wide"]
    lora: dict[str, Any] = {"r": 24, "lora_alpha": 36, "target_modules": names}
    changed = check_plain_parity(large_matrices, workshop.fresh(), DTYPES[dtype], **lora)
    assert changed == {f"{name}.weight" for name in names}


def large_others() -> nn.Module:
    return tiny.plain(
        table=nn.Embedding(5000, 300),
        square=nn.Conv2d(320, 512, 3),
        point=nn.Conv2d(1280, 1100, 1),
        line=nn.Conv1d(600, 700, 5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_convolutions_of_several_tiles(workshop: Workshop, dtype: str) -> None:
    names = ["table", "square", "point", "line"]
    lora: dict[str, Any] = {"r": 12, "lora_alpha": 18, "target_modules": names}
    changed = check_plain_parity(large_others, workshop.fresh(), DTYPES[dtype], **lora)
    assert changed == {f"{name}.weight" for name in names}
