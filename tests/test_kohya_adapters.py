"""Files of kohya's scripts and of LyCORIS: their formulas, written out anew, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from rawmerge.errors import AdapterError, MissingFileError, PlanError, RefusedError, UnsupportedAdapterError
from rawmerge.inputs.adapter import is_adapter
from tests.builders import random_tensor, raw, read_all, write_base

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 6.0
Q = "text_model.encoder.layers.0.self_attn.q_proj"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
CONV = "text_model.patch"
FLAT_Q, FLAT_FC1, FLAT_CONV = (f"lora_te_{path.replace('.', '_')}" for path in (Q, FC1, CONV))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))) * 0.3 + 0.02


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = {
        f"{Q}.weight": random_tensor((8, 8), request.param),
        f"{Q}.bias": random_tensor((8,), request.param),
        f"{FC1}.weight": random_tensor((12, 8), request.param),
        f"{CONV}.weight": random_tensor((6, 4, 3, 3), request.param),
    }
    return write_base(tmp_path / "base", [tensors], {"model_type": "clip_text_model", "dtype": "float32"})


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "style.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def merged(base: Path, adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    output = base.parent / "out"
    rawmerge.merge_adapter(base, adapter, output, overwrite=True, **options)
    return read_all(output)


def check(base: Path, adapter: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """The merge is W + delta in float32, rounded once, where there is a delta; all else has the base's bytes."""
    before, ours = read_all(base), merged(base, adapter)
    for name, weight in before.items():
        if name.removesuffix(".weight") in expected:
            result = (weight.float() + expected[name.removesuffix(".weight")]).to(weight.dtype)
            assert not torch.equal(result, weight)
            assert raw(ours[name]) == raw(result), name
        else:
            assert raw(ours[name]) == raw(weight), name


def pair(flat: str, out: int, inside: int, alpha: torch.Tensor | None = None, rank: int = RANK) -> Tensors:
    tensors = {f"{flat}.lora_up.weight": rand(out, rank), f"{flat}.lora_down.weight": rand(rank, inside, seed=1)}
    return tensors if alpha is None else {**tensors, f"{flat}.alpha": alpha}


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(ALPHA),
        torch.tensor(ALPHA, dtype=torch.float16),
        torch.tensor(ALPHA, dtype=torch.bfloat16),
        torch.tensor(ALPHA, dtype=torch.float64),
        torch.tensor([int(ALPHA)]),
        torch.tensor(int(ALPHA), dtype=torch.int32),
    ],
)
def test_lora_is_scaled_by_its_own_alpha(base: Path, tmp_path: Path, alpha: torch.Tensor) -> None:
    own = pair(FLAT_Q, 8, 8, alpha) | pair(FLAT_FC1, 12, 8, torch.tensor(3.0), rank=2)
    q, fc1 = ((own[f"{flat}.lora_up.weight"] @ own[f"{flat}.lora_down.weight"]) for flat in (FLAT_Q, FLAT_FC1))
    check(base, write(tmp_path / "a", own, ss_network_dim="4"), {Q: q * (ALPHA / RANK), FC1: fc1 * (3 / 2)})


@pytest.mark.parametrize(
    "path",
    [FLAT_Q, FLAT_Q.replace("lora_te_", "lycoris_"), FLAT_Q.replace("lora_te_", "lora_te2_"), FLAT_Q[8:], Q],
)
def test_every_spelling_of_a_path_is_found_and_no_alpha_means_no_scaling(base: Path, tmp_path: Path, path: str) -> None:
    own = pair(path, 8, 8)
    check(base, write(tmp_path / "a", own), {Q: own[f"{path}.lora_up.weight"] @ own[f"{path}.lora_down.weight"]})


def test_a_folder_of_one_file_and_the_file_are_the_same(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a", pair(FLAT_Q, 8, 8))
    assert is_adapter(path)
    assert is_adapter(path.parent)
    assert not is_adapter(base)
    assert not is_adapter(base / "model.safetensors")
    one, other = merged(base, path), merged(base, path.parent)
    assert {name: raw(tensor) for name, tensor in one.items()} == {name: raw(tensor) for name, tensor in other.items()}
    save_file(pair(FLAT_FC1, 12, 8), path.parent / "second.safetensors")
    with pytest.raises(MissingFileError, match=r"second\.safetensors.*style\.safetensors"):
        rawmerge.plan_merge(base, path.parent)


def test_a_prefix_of_the_base_s_class_may_be_missing(tmp_path: Path) -> None:
    weight = random_tensor((8, 8))
    base = write_base(tmp_path / "base", [{"model.layers.0.q_proj.weight": weight}])
    for flat in ("lycoris_layers_0_q_proj", "lycoris_model_layers_0_q_proj"):
        own = pair(flat, 8, 8)
        delta = own[f"{flat}.lora_up.weight"] @ own[f"{flat}.lora_down.weight"]
        check(base, write(tmp_path / "a", own), {"model.layers.0.q_proj": delta})


def test_a_convolution_in_both_ways(base: Path, tmp_path: Path) -> None:
    up, down, mid = rand(6, RANK, 1, 1), rand(RANK, 4, 3, 3), rand(RANK, RANK, 3, 3)
    names = [f"{FLAT_CONV}.lora_{part}.weight" for part in ("up", "down", "mid")]
    own = dict(zip(names, (up, down), strict=False))
    delta = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)  # as merge_to_sd_model does
    check(base, write(tmp_path / "a", own), {CONV: delta})

    one_by_one = rand(RANK, 4, 1, 1)
    tucker = dict(zip(names, (up, one_by_one, mid), strict=True)) | {f"{FLAT_CONV}.alpha": torch.tensor(ALPHA)}
    delta = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    for m in range(RANK):
        for n in range(RANK):
            outer = torch.outer(up[:, m].flatten(), one_by_one[n].flatten()).double()
            delta += outer[:, :, None, None] * mid[m, n].double() * ALPHA / RANK
    check_close(base, write(tmp_path / "a", tucker), {CONV: delta})


def check_close(base: Path, adapter: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """As `check`, within a rounding of the sum: the formula is in float64, and sums in another order."""
    before, ours = read_all(base), merged(base, adapter, compute_dtype="float64")
    for path, delta in expected.items():
        weight, result = before[f"{path}.weight"], ours[f"{path}.weight"]
        exact = weight.double() + delta
        bound = exact.abs().max() * torch.finfo(weight.dtype).eps / 2 * 1.01
        assert float((result.double() - exact).abs().max()) <= bound
        assert not torch.equal(result, weight)


def test_a_projection_trained_as_a_convolution_of_one_pixel(base: Path, tmp_path: Path) -> None:
    own = {name: tensor[:, :, None, None] for name, tensor in pair(FLAT_FC1, 12, 8).items()}
    up, down = (own[f"{FLAT_FC1}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
    check(base, write(tmp_path / "a", own), {FC1: up @ down})


@pytest.mark.parametrize("path", [FLAT_FC1, FLAT_CONV])
def test_loha(base: Path, tmp_path: Path, path: str) -> None:
    out, inside, shape = (12, 8, (12, 8)) if path == FLAT_FC1 else (6, 36, (6, 4, 3, 3))
    factors = {"w1_a": rand(out, RANK), "w1_b": rand(RANK, inside), "w2_a": rand(out, RANK, seed=3)}
    factors["w2_b"] = rand(RANK, inside, seed=4)
    own = {f"{path}.hada_{name}": tensor for name, tensor in factors.items()} | {f"{path}.alpha": torch.tensor(ALPHA)}
    left, right = (factors[f"w{half}_a"] @ factors[f"w{half}_b"] for half in (1, 2))
    delta = (left * right * (ALPHA / RANK)).reshape(shape)
    check(base, write(tmp_path / "a", own), {FC1 if path == FLAT_FC1 else CONV: delta})


def test_loha_of_a_convolution_with_kernels(base: Path, tmp_path: Path) -> None:
    own: Tensors = {}
    halves = []
    for half in (1, 2):
        kernel, out_factor, in_factor = (
            rand(RANK, RANK, 3, 3, seed=half),
            rand(RANK, 6, seed=half),
            rand(RANK, 4, seed=half),
        )
        own |= dict(
            zip((f"hada_t{half}", f"hada_w{half}_a", f"hada_w{half}_b"), (kernel, out_factor, in_factor), strict=True)
        )
        rebuilt = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
        for i in range(RANK):
            for j in range(RANK):
                rebuilt += torch.outer(out_factor[i], in_factor[j]).double()[:, :, None, None] * kernel[i, j].double()
        halves.append(rebuilt)
    tensors = {f"{FLAT_CONV}.{name}": tensor for name, tensor in own.items()} | {
        f"{FLAT_CONV}.alpha": torch.tensor(1.0)
    }
    check_close(base, write(tmp_path / "a", tensors), {CONV: halves[0] * halves[1] / RANK})


@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("second", ["whole", "product", "kernel"])
def test_lokr_is_scaled_unless_both_factors_are_whole(base: Path, tmp_path: Path, first: str, second: str) -> None:
    left = {"w1": rand(3, 2)} if first == "whole" else {"w1_a": rand(3, RANK), "w1_b": rand(RANK, 2)}
    is_conv = second == "kernel"
    right = {
        "whole": {"w2": rand(4, 4)},
        "product": {"w2_a": rand(4, RANK), "w2_b": rand(RANK, 4)},
        "kernel": {"t2": rand(RANK, RANK, 3, 3), "w2_a": rand(RANK, 2), "w2_b": rand(RANK, 2, seed=1)},
    }[second]
    path, module, shape = (FLAT_CONV, CONV, (6, 4, 3, 3)) if is_conv else (FLAT_FC1, FC1, (12, 8))
    own = {f"{path}.lokr_{name}": tensor for name, tensor in {**left, **right}.items()} | {
        f"{path}.alpha": torch.tensor(2.0)
    }
    doubles = {name: tensor.double() for name, tensor in {**left, **right}.items()}
    one = doubles["w1"] if first == "whole" else doubles["w1_a"] @ doubles["w1_b"]
    if second == "whole":
        other = doubles["w2"]
    elif second == "product":
        other = doubles["w2_a"] @ doubles["w2_b"]
    else:
        other = torch.einsum("ijkl,ip,jr->prkl", doubles["t2"], doubles["w2_a"], doubles["w2_b"])
    delta = torch.zeros(shape, dtype=torch.float64)
    for (i, j), value in ((at, float(one[at])) for at in ((i, j) for i in range(3) for j in range(2))):
        rows, columns = other.shape[:2]
        delta[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = value * other
    scaling = 1.0 if first == second == "whole" else 2 / RANK
    check_close(base, write(tmp_path / "a", own), {module: delta * scaling})


def test_lokr_of_a_convolution_without_kernels(base: Path, tmp_path: Path) -> None:
    w1, w2_a, w2_b = rand(3, 2), rand(2, RANK), rand(RANK, 18)
    own = {f"{FLAT_CONV}.lokr_{name}": at for name, at in (("w1", w1), ("w2_a", w2_a), ("w2_b", w2_b))}
    delta = torch.kron(w1.double(), w2_a.double() @ w2_b.double()).reshape(6, 4, 3, 3)
    check_close(base, write(tmp_path / "a", own), {CONV: delta})


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_norms_of_rows_are_kept(base: Path, tmp_path: Path, kind: str) -> None:
    own = pair(FLAT_FC1, 12, 8, torch.tensor(ALPHA))
    up, down = own[f"{FLAT_FC1}.lora_up.weight"].double(), own[f"{FLAT_FC1}.lora_down.weight"].double()
    delta = up @ down * ALPHA / RANK
    if kind == "lokr":
        own = {f"{FLAT_FC1}.lokr_w1": rand(3, 2), f"{FLAT_FC1}.lokr_w2": rand(4, 4)}
        delta = torch.kron(*(tensor.double() for tensor in own.values()))
    norms = rand(12, 1, seed=5).abs() + 1
    weight = read_all(base)[f"{FC1}.weight"].double()
    found = (weight + delta).norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    exact = norms.double() * (weight + delta) / found
    check_close(base, write(tmp_path / "a", own | {f"{FLAT_FC1}.dora_scale": norms}), {FC1: exact - weight})


def test_several_kinds_may_share_a_file_and_every_tensor_is_accounted_for(base: Path, tmp_path: Path) -> None:
    own = pair(FLAT_Q, 8, 8, torch.tensor(1.0)) | {f"{FLAT_FC1}.lokr_w1": rand(3, 2), f"{FLAT_FC1}.lokr_w2": rand(4, 4)}
    plan = rawmerge.plan_merge(base, write(tmp_path / "a", own))
    assert {use.name: (use.use, use.tensor_name) for use in plan.adapter_uses} == {
        f"{FLAT_Q}.lora_up.weight": ("updates", f"{Q}.weight"),
        f"{FLAT_Q}.lora_down.weight": ("updates", f"{Q}.weight"),
        f"{FLAT_Q}.alpha": ("ignored", f"{Q}.weight"),
        f"{FLAT_FC1}.lokr_w1": ("updates", f"{FC1}.weight"),
        f"{FLAT_FC1}.lokr_w2": ("updates", f"{FC1}.weight"),
    }
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan


HADA = {
    f"{FLAT_FC1}.hada_{name}": rand(*((12, 4) if name[-1] == "a" else (4, 8)))
    for name in ("w1_a", "w1_b", "w2_a", "w2_b")
}
LOKR = {f"{FLAT_FC1}.lokr_w1": rand(3, 2), f"{FLAT_FC1}.lokr_w2_a": rand(4, 4), f"{FLAT_FC1}.lokr_w2_b": rand(4, 4)}
PAIR = pair(FLAT_FC1, 12, 8)
UP, DOWN = f"{FLAT_FC1}.lora_up.weight", f"{FLAT_FC1}.lora_down.weight"
REFUSED: dict[str, tuple[Tensors, type[RefusedError], str]] = {
    "no partner": ({UP: PAIR[UP]}, PlanError, "lora_down"),
    "another output": (PAIR | {UP: rand(11, 4)}, PlanError, FLAT_FC1),
    "another input": (PAIR | {DOWN: rand(4, 9)}, PlanError, FLAT_FC1),
    "another rank": (PAIR | {UP: rand(12, 5)}, PlanError, UP),
    "not gathered": (PAIR | {UP: rand(0)}, PlanError, FLAT_FC1),
    "empty": (PAIR | {DOWN: rand(0, 8), UP: rand(12, 0)}, PlanError, FLAT_FC1),
    "a middle of a matrix": (PAIR | {f"{FLAT_FC1}.lora_mid.weight": rand(4, 4, 3, 3)}, PlanError, FLAT_FC1),
    "alpha 0": (PAIR | {f"{FLAT_FC1}.alpha": torch.tensor(0.0)}, AdapterError, "other than 0"),
    "alpha nan": (PAIR | {f"{FLAT_FC1}.alpha": torch.tensor(float("nan"))}, AdapterError, "finite"),
    "alpha of two": (PAIR | {f"{FLAT_FC1}.alpha": torch.ones(2)}, AdapterError, "one number"),
    "alpha of bytes": (PAIR | {f"{FLAT_FC1}.alpha": torch.tensor(3, dtype=torch.uint8)}, AdapterError, "one number"),
    "alpha alone": (PAIR | {f"{FLAT_Q}.alpha": torch.tensor(3.0)}, UnsupportedAdapterError, f"{FLAT_Q}.alpha"),
    "LoHa half": ({name: at for name, at in HADA.items() if "w2_b" not in name}, PlanError, "hada_w2_b"),
    "LoHa rank": (HADA | {f"{FLAT_FC1}.hada_w2_a": rand(12, 5)}, PlanError, "hada_w2_a"),
    "LoHa kernel": (HADA | {f"{FLAT_FC1}.hada_t1": rand(4, 4, 3, 3)}, PlanError, FLAT_FC1),
    "LoKr half": ({name: at for name, at in LOKR.items() if "w2_b" not in name}, PlanError, "lokr_w2_b"),
    "LoKr shape": (LOKR | {f"{FLAT_FC1}.lokr_w1": rand(2, 3)}, PlanError, "lokr_w1"),
    "LoKr both": (LOKR | {f"{FLAT_FC1}.lokr_w2": rand(4, 4)}, PlanError, "lokr_w2"),
    "LoKr rank": (LOKR | {f"{FLAT_FC1}.lokr_w2_b": rand(5, 4)}, PlanError, "lokr_w2_b"),
    "LoKr first kernel": (LOKR | {f"{FLAT_FC1}.lokr_t1": rand(4, 4)}, UnsupportedAdapterError, "lokr_t1"),
    "two kinds on one module": (PAIR | LOKR, UnsupportedAdapterError, "factors of one kind"),
    "norms of columns": (PAIR | {f"{FLAT_FC1}.dora_scale": rand(1, 8)}, PlanError, "norms of columns"),
    "norms alone": (pair(FLAT_Q, 8, 8) | {f"{FLAT_FC1}.dora_scale": rand(12, 1)}, UnsupportedAdapterError, "dora_sc"),
    "an unknown part": (PAIR | {f"{FLAT_FC1}.diff_b": rand(12)}, UnsupportedAdapterError, "diff_b"),
    "a trained norm": (PAIR | {"lora_te_text_model_norm.w_norm": rand(8)}, UnsupportedAdapterError, "w_norm"),
    "an embedding in the file": (PAIR | {"bundle_emb.cat.emb_params": rand(1, 8)}, UnsupportedAdapterError, "bundle_"),
    "the U-Net's": (PAIR | pair("lora_unet_down_blocks_0_attn", 8, 8), PlanError, "lora_unet_* names a part"),
    "both text encoders'": (PAIR | pair(FLAT_FC1.replace("_te_", "_te2_"), 12, 8), AdapterError, "must be split"),
    "no such module": (pair("lora_te_text_model_encoder_layers_7_fc", 8, 8), PlanError, "flat name"),
    "no such path": (pair("text_model.encoder.layers.7.fc", 8, 8), PlanError, "layers.7.fc"),
    "whole numbers": ({name: at.int() for name, at in PAIR.items()}, AdapterError, "plain float dtype"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    tensors, error, word = REFUSED[what]
    with pytest.raises(error) as refusal:
        rawmerge.plan_merge(base, write(tmp_path / "a", tensors))
    assert word in str(refusal.value)


def test_two_modules_of_one_flat_name_are_refused(tmp_path: Path) -> None:
    tensors = {"a.b_c.weight": random_tensor((8, 8)), "a_b.c.weight": random_tensor((8, 8), seed=1)}
    base = write_base(tmp_path / "base", [tensors])
    with pytest.raises(PlanError, match=r"this flat name, found 2: 'a.b_c', 'a_b.c'"):
        rawmerge.plan_merge(base, write(tmp_path / "a", pair("lycoris_a_b_c", 8, 8)))


def test_conv1d_is_refused(tmp_path: Path) -> None:
    weight = {"transformer.h.0.attn.c_proj.weight": random_tensor((8, 8))}
    base = write_base(tmp_path / "base", [weight], {"model_type": "gpt2"})
    with pytest.raises(UnsupportedAdapterError, match=r"stored \(in, out\)"):
        rawmerge.plan_merge(base, write(tmp_path / "a", pair("lycoris_transformer_h_0_attn_c_proj", 8, 8)))


def test_peft_s_names_without_a_config_are_not_taken_for_kohya_s(base: Path, tmp_path: Path) -> None:
    own = {f"base_model.model.{name.replace(FLAT_FC1, FC1)}": tensor for name, tensor in HADA.items()}
    path = write(tmp_path / "a", own)
    assert not is_adapter(path)
    with pytest.raises(MissingFileError, match=r"adapter_config\.json"):
        rawmerge.plan_merge(base, path)


def test_a_config_that_names_the_kind_is_refused(base: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a", {f"x.{name}": tensor for name, tensor in HADA.items()})
    path.rename(path.with_name("adapter_model.safetensors"))
    (path.parent / "adapter_config.json").write_text('{"peft_type": "KOHYA"}')
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        rawmerge.plan_merge(base, path.parent)


def test_a_broken_file_is_refused_as_such(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(RefusedError, match="header"):
        rawmerge.plan_merge(base, path)


def test_a_layer_of_several_tiles_has_the_formula_s_bits(tmp_path: Path) -> None:
    weight = random_tensor((1100, 320))
    base = write_base(tmp_path / "base", [{"layers.0.fc.weight": weight}])
    w1, w2 = rand(11, 8), rand(100, 40)
    own = {"lycoris_layers_0_fc.lokr_w1": w1, "lycoris_layers_0_fc.lokr_w2": w2}
    check(base, write(tmp_path / "a", own), {"layers.0.fc": torch.kron(w1, w2)})
    own = pair("lycoris_layers_0_fc", 1100, 320, torch.tensor(2.0))
    up, down = own.pop("lycoris_layers_0_fc.lora_up.weight"), own["lycoris_layers_0_fc.lora_down.weight"]
    own["lycoris_layers_0_fc.lora_up.weight"] = up
    check(base, write(tmp_path / "a", own), {"layers.0.fc": up @ down * (2.0 / RANK)})
