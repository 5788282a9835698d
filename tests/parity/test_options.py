"""What the options promise: output dtype, exact compute dtype, threads, shard layout, tied embeddings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

import rawmerge
from rawmerge.formats.model_config import CONV1D_MODULES, TIED_BY_DEFAULT
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny
from tests.parity.exact_rounding import FORMATS, BinaryFormat, exact_product, exact_values

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

#: Base and output dtype of an exact merge.
ROUNDINGS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
]


# --- output dtype ---


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_float32_output_equals_pefts_merge_of_the_base_loaded_in_float32(
    tmp_path: Path, base_dtype: torch.dtype
) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), base_dtype)
    load = oracle.pretrained(base, tiny.CAUSAL, torch.float32)
    lora: dict[str, Any] = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    expected = oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", dtype="float32")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_output_of_a_float32_base_is_pefts_merge_rounded_once(tmp_path: Path, dtype: str) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.float32)
    load = oracle.pretrained(base, tiny.CAUSAL)
    lora: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    oracle.merged_model(load, adapter).to(getattr(torch, dtype)).save_pretrained(tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", dtype=dtype)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), oracle.read_tensors(tmp_path / "peft"))


def test_config_follows_the_output_dtype_in_nested_configs_too_and_nothing_else_changes(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", "AutoModel", tiny.clip(), torch.bfloat16)
    load = oracle.pretrained(base, "AutoModel", torch.float32)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["q_proj", "fc1"])
    expected = oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", dtype="float32")
    before, after = (base / "config.json").read_text(), (tmp_path / "ours" / "config.json").read_text()
    assert before.count('"dtype": "bfloat16"') == 3
    assert after == before.replace('"dtype": "bfloat16"', '"dtype": "float32"')
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
    loaded = oracle.load_pretrained(tmp_path / "ours", "AutoModel")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_config_is_untouched_where_no_dtype_is_asked_for(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", "AutoModel", tiny.clip(), torch.bfloat16)
    load = oracle.pretrained(base, "AutoModel")
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["q_proj"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").read_bytes() == (base / "config.json").read_bytes()


# --- exact compute dtype ---


def write_pair(folder: Path, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> tuple[Path, Path]:
    """Write a base of one matrix and an adapter for it."""
    save_file({"layer.weight": base}, folder / "base.safetensors")
    prefix = "base_model.model.layer"
    write_adapter(folder / "adapter", {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, alpha=alpha)
    return folder / "base.safetensors", folder / "adapter"


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], alpha: float, **fields: Any) -> None:
    folder.mkdir()
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_exactly(folder: Path, base: Path, adapter: Path, dtype: str) -> oracle.RawTensor:
    rawmerge.merge_adapter(base, adapter, folder / "ours", compute_dtype="float64", dtype=dtype)
    return oracle.read_tensors(folder / "ours")["layer.weight"]


def rounded_once(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: Fraction, to: BinaryFormat) -> bytes:
    """Return the bytes of W + scale * B @ A, computed without rounding and then rounded once."""
    delta = exact_product(exact_values(b), exact_values(a))
    pairs = [zip(*rows, strict=True) for rows in zip(exact_values(base), delta, strict=True)]
    expected = to.tensor([[w + scale * d for w, d in row] for row in pairs])
    return expected.view(torch.uint8).numpy().tobytes()


def numbers_and_ties(narrow: BinaryFormat, to: BinaryFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return W, A and B whose sums with scale 4 lie on ties of `to`, or off them by 2**-28 of its last place.

    Every row has one exponent, from subnormal numbers up. All steps are exact in float64; in float32, or when
    rounded to float32 on the way, most of those just off a tie become ties.
    """
    rng = random.Random(5)
    top = min(to.bias, narrow.bias, 90)
    exponents = [1 - to.bias - 1, 1 - to.bias, 1 - to.bias + 1, *range(-min(top, 30), top, 7)]
    exponents = [exponent for exponent in exponents if exponent >= 1 - narrow.bias]
    spread = Fraction(2) ** 30  # keeps A and B within float32 where their product is not
    rows, b, columns = [], [], 24
    for exponent in exponents:
        codes = [rng.randrange(2**narrow.fraction_bits) for _ in range(columns)]
        field = (exponent + narrow.bias) << narrow.fraction_bits
        rows.append([narrow.decode(field + code) * rng.choice([-1, 1]) for code in codes])
        b.append([to.ulp(exponent) * spread / 8, to.ulp(exponent)])
    halves = [Fraction(rng.choice([-3, -1, 1, 3])) / spread for _ in range(columns)]
    nudges = [Fraction(rng.choice([-1, 0, 1])) / spread for _ in range(columns)]
    float32 = FORMATS["float32"]
    return narrow.tensor(rows), float32.tensor([halves, nudges]), float32.tensor(b)


@pytest.mark.parametrize(("base_dtype", "dtype"), ROUNDINGS)
def test_float64_rounds_once_at_and_beside_ties(tmp_path: Path, base_dtype: str, dtype: str) -> None:
    stored, to = FORMATS[base_dtype], FORMATS[dtype]
    narrow = min(stored, to, key=lambda fmt: fmt.fraction_bits)
    weight, a, b = numbers_and_ties(narrow, to)
    base = weight.to(stored.torch_dtype)
    assert exact_values(base) == exact_values(weight)
    expected = rounded_once(base, a, b, Fraction(4), to)
    in_float32 = (base.float() + (b @ a) * 4.0).to(to.torch_dtype)
    assert in_float32.view(torch.uint8).numpy().tobytes() != expected, "the case shows nothing"
    ours = merge_exactly(tmp_path, *write_pair(tmp_path, base, a, b, alpha=8), dtype)
    assert ours.data == expected


@pytest.mark.parametrize(("base_dtype", "dtype"), ROUNDINGS)
def test_float64_gives_the_nearest_number_to_the_exact_sum(tmp_path: Path, base_dtype: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(33, 40, generator=generator).to(FORMATS[base_dtype].torch_dtype)
    a, b = torch.randn(5, 40, generator=generator), torch.randn(33, 5, generator=generator)
    ours = merge_exactly(tmp_path, *write_pair(tmp_path, base, a, b, alpha=7), dtype)
    assert ours.data == rounded_once(base, a, b, Fraction(7, 5), FORMATS[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_oracle_agrees_with_torch_where_torch_rounds_once(dtype: str) -> None:
    generator = torch.Generator().manual_seed(7)
    powers = torch.linspace(-60, 15, 400).exp2()[:, None]
    values = torch.randn(400, 8, generator=generator) * powers
    expected = values.to(FORMATS[dtype].torch_dtype)
    assert torch.equal(FORMATS[dtype].tensor(exact_values(values)).view(torch.uint8), expected.view(torch.uint8))


# --- threads and shards ---


@pytest.fixture(scope="module")
def several_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one shard and in three, with an adapter on matrices of one tile and of several."""
    folder = tmp_path_factory.mktemp("tiles")
    generator = torch.Generator().manual_seed(8)
    shapes = {"wide": (1100, 3000), "tall": (2300, 900), "low": (5, 700), "small": (40, 30), "kept": (70, 50)}
    base = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    pairs: dict[str, torch.Tensor] = {}
    for name in ("wide", "tall", "low", "small"):
        rows, columns = shapes[name]
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(24, columns, generator=generator)
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 24, generator=generator)
    write_adapter(folder / "adapter", pairs, alpha=36)
    for count in (1, 3):
        write_shards(folder / f"base-{count}", base, count)
    return folder


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], count: int) -> None:
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        held = names[number::count]
        weight_map.update(dict.fromkeys(held, shard))
        save_file({name: tensors[name] for name in held}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_number_of_threads_changes_no_byte_of_any_file(several_tiles: Path, tmp_path: Path, compute_dtype: str) -> None:
    base, adapter = several_tiles / "base-3", several_tiles / "adapter"
    for threads in (1, 2, 3, 4):
        output = tmp_path / str(threads)
        rawmerge.merge_adapter(base, adapter, output, compute_dtype=compute_dtype, threads=threads)
        assert all_bytes(output) == all_bytes(tmp_path / "1")


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_shard_layout_changes_no_byte_of_any_tensor(several_tiles: Path, tmp_path: Path, compute_dtype: str) -> None:
    for count in (1, 3):
        base, output = several_tiles / f"base-{count}", tmp_path / str(count)
        rawmerge.merge_adapter(base, several_tiles / "adapter", output, compute_dtype=compute_dtype)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "3"), oracle.read_tensors(tmp_path / "1"))


@pytest.mark.parametrize("threads", [2, 4])
def test_small_convolutions_have_the_same_bytes_in_every_run_on_any_threads(tmp_path: Path, threads: int) -> None:
    # torch convolves tensors this small in other ways when it has one thread, so a count that leaks shows
    generator = torch.Generator().manual_seed(9)
    base = {f"m{number}.weight": torch.randn(20, 6, 1, generator=generator) for number in range(4)}
    pairs: dict[str, torch.Tensor] = {}
    for number in range(4):
        pairs[f"base_model.model.m{number}.lora_A.weight"] = torch.randn(3, 6, 1, generator=generator)
        pairs[f"base_model.model.m{number}.lora_B.weight"] = torch.randn(20, 3, 1, generator=generator)
    save_file(base, tmp_path / "net.safetensors")
    write_adapter(tmp_path / "adapter", pairs, alpha=4.5)
    written = []
    for run in range(1 + 40):
        output = tmp_path / str(run)
        rawmerge.merge_adapter(
            tmp_path / "net.safetensors", tmp_path / "adapter", output, threads=threads if run else 1
        )
        written.append((output / "net.safetensors").read_bytes())
    different = [run for run, data in enumerate(written) if data != written[0]]
    assert not different


# --- tied embeddings ---


def token_ids() -> torch.Tensor:
    return torch.arange(3, 3 + 2 * 9).reshape(2, 9) % 96


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=token_ids(), **_decoder_inputs(model)).logits
    assert isinstance(found, torch.Tensor)
    return found


def _decoder_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    config: Any = model.config
    return {"decoder_input_ids": token_ids()[:, :4]} if config.is_encoder_decoder else {}


#: The logits of these models are below 1 in size and are float32 sums of some hundred products, rounded to 2**-24 of
#: themselves. Adding the delta to the weight instead of to the activation may reorder those sums: some 1e-6. What
#: an adapter does to the logits, and a wrong tie too, is a thousand times as much.
TOLERANCE = 1e-5

TIED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "gpt2": (tiny.gpt2, "wte", "transformer.wte.weight"),
    "llama": (lambda: tiny.llama(tie_word_embeddings=True), "embed_tokens", "model.embed_tokens.weight"),
    "opt": (tiny.opt, "embed_tokens", "model.decoder.embed_tokens.weight"),
}


@pytest.mark.parametrize("family", TIED)
def test_adapter_on_a_tied_embedding_unties_and_keeps_the_trained_logits(tmp_path: Path, family: str) -> None:
    config, module, name = TIED[family]
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, config(), torch.float32)
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=[module])
    before = oracle.read_tensors(base)
    assert "lm_head.weight" not in before
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    assert ours["lm_head.weight"] == before[name]
    assert ours[name] == oracle.merge_with_peft(load, adapter, tmp_path / "peft")[name]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is False
    trained = logits(oracle.unmerged_model(load, adapter))
    merged = logits(oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL))
    torch.testing.assert_close(merged, trained, rtol=0.0, atol=TOLERANCE)
    for other in (load(), oracle.load_pretrained(tmp_path / "peft", tiny.CAUSAL)):
        assert (logits(other) - trained).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("auto", "config", "module"),
    [
        (tiny.CAUSAL, tiny.bloom, "word_embeddings"),
        ("AutoModelForMaskedLM", tiny.bert, "word_embeddings"),
        ("AutoModelForSeq2SeqLM", tiny.t5, "shared"),
        (tiny.CAUSAL, tiny.gpt2, "lm_head"),
    ],
    ids=["bloom", "bert", "t5", "gpt2-head"],
)
def test_adapter_on_any_other_tied_weight_keeps_the_trained_logits_or_is_refused(
    tmp_path: Path, auto: str, config: Any, module: str
) -> None:
    base = oracle.save_base(tmp_path / "base", auto, config(), torch.float32)
    load = oracle.pretrained(base, auto)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=[module])
    try:
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    except rawmerge.RefusedError:
        return
    merged = logits(oracle.load_pretrained(tmp_path / "ours", auto))
    trained = logits(oracle.unmerged_model(load, adapter))
    torch.testing.assert_close(merged, trained, rtol=0.0, atol=TOLERANCE)


# --- what rawmerge knows of transformers ---


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_families_tied_by_default_are_those_of_transformers() -> None:
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    ties = {name: _ties_by_default(known[name]) for name in known}
    assert {name for name, is_tied in ties.items() if is_tied} == TIED_BY_DEFAULT


def _ties_by_default(config_class: Any) -> bool:
    try:
        config = config_class()
    except (StrictDataclassError, ValueError, TypeError, ImportError):
        config = config_class  # it has no valid default; its fields have
    # composite configs leave it to their parts
    return bool(getattr(config, "tie_word_embeddings", False))


def test_conv1d_families_are_those_of_transformers() -> None:
    models = Path(transformers.__file__).parent / "models"
    using = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if "pytorch_utils import" in (text := file.read_text(encoding="utf-8"))
        and any("Conv1D" in line for line in text.splitlines() if "pytorch_utils import" in line)
    }
    folders = {"openai-gpt": "openai", "clvp_decoder": "clvp"}
    assert using == {folders.get(model_type, model_type) for model_type in CONV1D_MODULES}
