"""Adapters that mlx-lm trains: its formulas, written out anew, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from rawmerge.errors import AdapterError, MissingFileError, PlanError, RefusedError, UnsupportedAdapterError
from rawmerge.inputs.adapter import is_adapter, read_adapter
from tests.builders import random_tensor, raw, read_all, write_base

Tensors = dict[str, torch.Tensor]
RANK, SCALE = 4, 2.5
Q, K, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.embed_tokens"
SHAPES = {Q: (8, 8), K: (12, 8), EMBED: (20, 8)}
PARAMETERS = {"rank": RANK, "scale": SCALE, "dropout": 0.1, "keys": ["self_attn.q_proj"]}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))) * 0.3 + 0.02


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = {f"{path}.weight": random_tensor(shape, request.param) for path, shape in SHAPES.items()}
    return write_base(tmp_path / "base", [{**tensors, "lm_head.weight": random_tensor((20, 8), request.param, 3)}])


def factors(*paths: str) -> Tensors:
    """Return pairs: of a linear module (in, rank) and (rank, out), of an embedding (rows, rank) and (rank, dim)."""
    tensors: Tensors = {}
    for path in paths:
        rows, columns = SHAPES[path] if path == EMBED else SHAPES[path][::-1]
        tensors |= {f"{path}.lora_a": rand(rows, RANK, seed=1), f"{path}.lora_b": rand(RANK, columns)}
    return tensors


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": PARAMETERS, "num_layers": 16, "model": "mlx_model", **fields}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def merged(base: Path, adapter: Path, **options: Any) -> Tensors:
    rawmerge.merge_adapter(base, adapter, base.parent / "out", overwrite=True, **options)
    return read_all(base.parent / "out")


def delta(own: Tensors, path: str) -> torch.Tensor:
    """Return what mlx-lm adds, as the weight lies, in float32: the scale first, then the product."""
    lora_a, lora_b = own[f"{path}.lora_a"], own[f"{path}.lora_b"]
    return (SCALE * lora_a) @ lora_b if path == EMBED else (SCALE * lora_b.T) @ lora_a.T


def test_the_delta_is_rounded_before_it_is_added(base: Path, tmp_path: Path) -> None:
    own = factors(Q, K)
    before, ours = read_all(base), merged(base, write(tmp_path / "a", own))
    for name, weight in before.items():
        path = name.removesuffix(".weight")
        expected = (weight + delta(own, path).to(weight.dtype)) if path in {Q, K} else weight
        assert raw(ours[name]) == raw(expected), name


def test_an_embedding_has_its_factors_the_other_way_round(base: Path, tmp_path: Path) -> None:
    own = factors(EMBED)
    before, ours = read_all(base), merged(base, write(tmp_path / "a", own))
    weight = before[f"{EMBED}.weight"]
    expected = weight.double() + delta(own, EMBED).double()
    # the product is summed in another order, and the delta rounded before the sum is
    bound = expected.abs().max() * torch.finfo(weight.dtype).eps * 1.01
    assert float((ours[f"{EMBED}.weight"].double() - expected).abs().max()) <= bound
    assert not torch.equal(ours[f"{EMBED}.weight"], weight)
    assert raw(ours["lm_head.weight"]) == raw(before["lm_head.weight"])


def test_a_square_embedding_is_one(tmp_path: Path) -> None:
    weight = random_tensor((8, 8), torch.float32)
    base = write_base(tmp_path / "base", [{f"{EMBED}.weight": weight, f"{Q}.weight": weight.clone()}])
    own = {f"{path}.lora_{part}": rand(*shape) for path in (EMBED, Q) for part, shape in (("a", (8, 4)), ("b", (4, 8)))}
    ours = merged(base, write(tmp_path / "a", own))
    for path in (EMBED, Q):
        torch.testing.assert_close(ours[f"{path}.weight"], weight + delta(own, path))


def test_float64_is_the_formula(base: Path, tmp_path: Path) -> None:
    own = factors(Q, K, EMBED)
    ours = merged(base, write(tmp_path / "a", own), compute_dtype="float64")
    for path in (Q, K, EMBED):
        weight = read_all(base)[f"{path}.weight"]
        exact = weight.double() + delta({name: tensor.double() for name, tensor in own.items()}, path)
        assert raw(ours[f"{path}.weight"]) == raw(exact.to(weight.dtype)), path


def test_dora_scales_rows_to_their_norms(base: Path, tmp_path: Path) -> None:
    paths = (Q, K, EMBED)
    own = factors(*paths) | {f"{path}.m": rand(SHAPES[path][0], seed=2).abs() + 0.5 for path in paths}
    for options in ({"fine_tune_type": "dora"}, {"fine_tune_type": None, "use_dora": True}):
        ours = merged(base, write(tmp_path / "a", own, **options), compute_dtype="float64")
        for path in paths:
            weight = read_all(base)[f"{path}.weight"]
            added = weight.double() + delta({name: tensor.double() for name, tensor in own.items()}, path)
            exact = own[f"{path}.m"].double()[:, None] * added / (added**2).sum(dim=1, keepdim=True).sqrt()
            found = ours[f"{path}.weight"].double()
            assert float((found - exact).abs().max()) <= exact.abs().max() * torch.finfo(weight.dtype).eps / 2 * 1.01


def test_a_weight_of_conv1d_lies_the_other_way(tmp_path: Path) -> None:
    path, weight = "transformer.h.0.attn.c_attn", random_tensor((8, 24), torch.float32)
    base = write_base(tmp_path / "base", [{f"{path}.weight": weight}], {"model_type": "gpt2"})
    own = {f"{path}.lora_a": rand(8, RANK), f"{path}.lora_b": rand(RANK, 24)}
    ours = merged(base, write(tmp_path / "a", own))
    torch.testing.assert_close(ours[f"{path}.weight"], weight + delta(own, path).T)
    dora = write(tmp_path / "a", {**own, f"{path}.m": rand(24)}, fine_tune_type="dora")
    with pytest.raises(UnsupportedAdapterError, match=r"stored \(in, out\)"):
        rawmerge.plan_merge(base, dora)


def test_the_folder_the_file_and_an_earlier_checkpoint_are_read(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(Q))
    save_file(factors(K), folder / "0000100_adapters.safetensors")
    for path in (folder, folder / "adapters.safetensors", folder / "adapter_config.json"):
        assert is_adapter(path)
        assert set(read_adapter(path).tensors) == set(factors(Q))
    earlier = folder / "0000100_adapters.safetensors"
    assert is_adapter(earlier)
    assert set(read_adapter(earlier).tensors) == set(factors(K))
    assert rawmerge.plan_merge(base, earlier)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mlx-community/Qwen3-0.6B-bf16", "Qwen3-0.6B"),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", "Llama-3.2-1B-Instruct"),
        ("mlx-community/Mistral-7B-v0.3-8bit-mlx", "Mistral-7B-v0.3"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/Users/me/models/tiny/", "tiny"),
        ("mlx_model", ""),
        ("a/B-bf16-4bit-DWQ-lr9e-8", "B"),
        ("a/B-4bits-8bit_x", "B"),
        ("a/B" + "-4bit" * 35 + "!", "B" + "-4bit" * 35 + "!"),  # took for ever
        ("a/B" + "-4bit" * 50_000 + "!", "B" + "-4bit" * 50_000 + "!"),
        (None, ""),
        (7, ""),
    ],
)
def test_the_base_s_name_is_taken_without_mlx_s_marks(tmp_path: Path, model: object, name: str) -> None:
    assert read_adapter(write(tmp_path / "a", factors(Q), model=model)).config.base_model_name == name


@pytest.mark.parametrize(
    ("fields", "is_clear"),
    [
        ({"num_layers": 16}, True),  # of a time at which alpha meant nothing
        ({"num_layers": None, "lora_layers": 16}, False),
        ({"num_layers": None, "lora_layers": 16, "alpha": RANK}, True),  # a factor of 1, if it is one
    ],
)
def test_an_alpha_that_may_be_a_factor_is_refused(
    base: Path, tmp_path: Path, fields: dict[str, Any], is_clear: bool
) -> None:
    parameters = {**PARAMETERS, "alpha": fields.get("alpha", 16)}
    folder = write(tmp_path / "a", factors(Q), **{**fields, "lora_parameters": parameters})
    if is_clear:
        own = factors(Q)
        weight = read_all(base)[f"{Q}.weight"]
        assert raw(merged(base, folder)[f"{Q}.weight"]) == raw(weight + delta(own, Q).to(weight.dtype))
        return
    with pytest.raises(UnsupportedAdapterError, match=r"lora_parameters\.alpha"):
        rawmerge.plan_merge(base, folder)


PAIR = factors(K)
A, B = f"{K}.lora_a", f"{K}.lora_b"
REFUSED_TENSORS: dict[str, tuple[Tensors, type[RefusedError], str]] = {
    "no partner": ({A: PAIR[A]}, PlanError, "lora_b"),
    "another rank": ({A: rand(8, 5), B: rand(5, 12)}, PlanError, A),
    "factors as PEFT has them": ({A: PAIR[A].T, B: PAIR[B].T}, PlanError, K),
    "another input": (PAIR | {A: rand(9, RANK)}, PlanError, K),
    "experts": ({"model.layers.0.mlp.switch_mlp.up_proj.lora_a": rand(3, RANK, 8)}, RefusedError, "switch_mlp"),
    "experts' factors": ({A: rand(3, RANK, 8), B: rand(3, 12, RANK)}, UnsupportedAdapterError, "one matrix"),
    "empty": ({A: rand(8, 0), B: rand(0, 12)}, PlanError, K),
    "a magnitude that the config lacks": (PAIR | {f"{K}.m": rand(12)}, PlanError, f"{K}.m"),
    "PEFT's name": ({f"{K}.lora_A.weight": rand(RANK, 8)}, UnsupportedAdapterError, "lora_A"),
    "a whole tensor": (PAIR | {f"{Q}.weight": rand(8, 8)}, UnsupportedAdapterError, f"{Q}.weight"),
    "no such module": ({A.replace("0", "9"): PAIR[A], B.replace("0", "9"): PAIR[B]}, PlanError, "layers.9"),
}  # fmt: skip
REFUSED_FIELDS: dict[str, tuple[dict[str, Any], type[RefusedError], str]] = {
    "a full fine-tuning": ({"fine_tune_type": "full"}, UnsupportedAdapterError, "whole tensors"),
    "an unknown type": ({"fine_tune_type": "hydra"}, UnsupportedAdapterError, "hydra"),
    "no magnitude": ({"fine_tune_type": "dora"}, PlanError, f"{K}.lora_a"),
    "no parameters": ({"lora_parameters": None}, AdapterError, "lora_parameters"),
    "a list": ({"lora_parameters": [1]}, AdapterError, "lora_parameters"),
    "no scale": ({"lora_parameters": {"rank": RANK}}, AdapterError, "scale"),
    "no rank": ({"lora_parameters": {"scale": SCALE}}, AdapterError, "rank"),
    "a rank of 0": ({"lora_parameters": {"rank": 0, "scale": SCALE}}, AdapterError, "rank"),
    "a rank that is true": ({"lora_parameters": {"rank": True, "scale": SCALE}}, AdapterError, "rank"),
    "an endless scale": ({"lora_parameters": {"rank": RANK, "scale": 10**400}}, AdapterError, "scale"),
    "an unknown parameter": ({"lora_parameters": {**PARAMETERS, "twist": 2}}, UnsupportedAdapterError, "twist"),
}


@pytest.mark.parametrize("what", REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    tensors, error, word = REFUSED_TENSORS[what]
    with pytest.raises(error) as refusal:
        rawmerge.plan_merge(base, write(tmp_path / "a", tensors))
    assert word in str(refusal.value)


@pytest.mark.parametrize("what", REFUSED_FIELDS)
def test_settings_that_cannot_be_followed_are_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    fields, error, word = REFUSED_FIELDS[what]
    with pytest.raises(error) as refusal:
        rawmerge.plan_merge(base, write(tmp_path / "a", PAIR, **fields))
    assert word in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", PAIR)
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")
    with pytest.raises(MissingFileError, match=r"an adapters\.safetensors"):
        read_adapter(folder)


@pytest.mark.parametrize("kind", [["lora"], {"a": 1}, 3, True], ids=str)
def test_a_kind_that_is_no_text_is_refused(tmp_path: Path, kind: object) -> None:
    with pytest.raises(UnsupportedAdapterError, match="'fine_tune_type': expected lora or dora"):
        read_adapter(write(tmp_path / "a", factors(Q), fine_tune_type=kind))
