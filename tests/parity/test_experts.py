"""Mixture-of-experts: stacked and single experts, in the adapter and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from tests.parity import expert_oracle as experts
from tests.parity import peft_oracle as oracle
from tests.parity.expert_models import DISKS, FAMILIES, Disk, Sizes, write_experts

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

AUTO: Final = "AutoModelForCausalLM"
ATTENTION: Final = ["q_proj", "v_proj", "q_b_proj"]
W: Final = ["w1", "w2", "w3"]
GATE_UP_DOWN: Final = ["gate_proj", "up_proj", "down_proj"]


class Fused(NamedTuple):
    """An adapter that PEFT makes for a model of transformers 5; `in_memory`: the base has that model's own names."""

    family: str
    dtype: torch.dtype = torch.bfloat16
    fields: Mapping[str, Any] = {}
    lora: Mapping[str, Any] = {}
    in_memory: bool = False


class Case(NamedTuple):
    base: Path
    adapter: Path
    peft: Path
    deltas: experts.Deltas


class Workshop:
    """Makes each base once, and merges each case by PEFT once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._bases: dict[str, Path] = {}
        self._cases: dict[str, Case] = {}

    def case(self, name: str) -> Case:
        if name not in self._cases:
            self._cases[name] = self._make(FUSED[name], self._root / name)
        return self._cases[name]

    def base(self, fused: Fused) -> Path:
        key = repr(fused._replace(lora={}))
        if key not in self._bases:
            self._bases[key] = self._save_base(fused, self._root / f"base-{len(self._bases)}")
        return self._bases[key]

    def _make(self, fused: Fused, folder: Path) -> Case:
        family, base = FAMILIES[fused.family], self.base(fused)
        lora = {"r": 3, "lora_alpha": 7, "target_modules": ATTENTION, "target_parameters": family.targets()}
        load = oracle.pretrained(base, AUTO)
        adapter = oracle.save_adapter(load, folder / "adapter", **{**lora, **fused.lora})
        oracle.merge_with_peft(load, adapter, folder / "peft")
        return Case(base, adapter, folder / "peft", experts.deltas_of_peft_file(base, adapter, family))

    def _save_base(self, fused: Fused, folder: Path) -> Path:
        family = FAMILIES[fused.family]
        oracle.save_base(folder, AUTO, family.build(**fused.fields), fused.dtype, "20KB")
        if not (family.keeps_float32 or fused.in_memory):
            return folder
        model: Any = oracle.load_pretrained(folder, AUTO)
        settled = folder.with_name(f"{folder.name}-settled")
        model.save_pretrained(settled, save_original_format=not fused.in_memory, max_shard_size="20KB")
        return settled


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("experts"))


def targets(family: str, *parameters: str) -> dict[str, Any]:
    return {"target_parameters": FAMILIES[family].targets(*parameters)}


IN_FLOAT32: Final = ["mixtral", "granitemoe", "gpt_oss"]
CONVERTED: Final = {"target_parameters": None}  # PEFT makes parameters of the names of transformers 4
WIDE: Final = {"hidden_size": 512, "intermediate_size": 1100, "num_local_experts": 2, "num_hidden_layers": 1}
PATTERNS: Final = {
    "rank_pattern": {"experts": 9, "mlp.experts.gate_up_proj": 5, "q_proj": 2},
    "alpha_pattern": {"experts.down_proj": 11, "1.mlp.experts.gate_up_proj": 4},
}
BIASES: Final = ["experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias", "router.weight"]

FUSED: Final = {
    **{name: Fused(name) for name in FAMILIES},
    **{f"{name}-float32": Fused(name, torch.float32) for name in IN_FLOAT32},
    "float16": Fused("mixtral", torch.float16),
    "rank-is-experts": Fused("mixtral", lora={"r": 5}),
    "rank-is-experts-transposed": Fused("gpt_oss", lora={"r": 5}),
    "square-gate-up": Fused("mixtral", fields={"intermediate_size": 20}, lora={"r": 5}),
    "square-gate-up-transposed": Fused("gpt_oss", fields={"intermediate_size": 20}),
    "square-gate-up-llama4": Fused("llama4_text", fields={"intermediate_size": 20}),
    "square-down": Fused("mixtral", fields={"intermediate_size": 40}),
    "square-down-transposed": Fused("gpt_oss", fields={"intermediate_size": 40}, lora={"r": 5}),
    "square-no-gate": Fused("nemotron_h", fields={"moe_intermediate_size": 40}),
    "fewer-than-16-rows": Fused("mixtral", fields={"hidden_size": 8, "intermediate_size": 7}),
    "fewer-than-16-rows-transposed": Fused("gpt_oss", fields={"hidden_size": 8, "intermediate_size": 7}),
    "one-expert": Fused("mixtral", fields={"num_local_experts": 1, "num_experts_per_tok": 1}),
    "gate-up-only": Fused("mixtral", lora=targets("mixtral", "gate_up_proj")),
    "down-only": Fused("mixtral", lora=targets("mixtral", "down_proj")),
    "down-only-transposed": Fused("gpt_oss", lora=targets("gpt_oss", "down_proj")),
    "down-only-no-gate": Fused("nemotron_h", lora=targets("nemotron_h", "down_proj")),
    "last-segments-only": Fused("mixtral", lora={"target_parameters": ["gate_up_proj", "down_proj"]}),
    "one-layer": Fused("qwen2_moe", lora={"layers_to_transform": [1]}),
    "patterns": Fused("mixtral", lora=PATTERNS),
    "rslora-patterns": Fused("mixtral", torch.float32, lora={"use_rslora": True, **PATTERNS}),
    "rslora": Fused("gpt_oss", lora={"use_rslora": True}),
    "biases-and-router": Fused("gpt_oss", lora={"target_parameters": BIASES}),
    "shared-expert-too": Fused("qwen2_moe", lora={"target_modules": ["gate_proj", "o_proj"]}),
    "router-mixtral": Fused("mixtral", lora={"target_parameters": ["gate_up_proj", "gate.weight"]}),
    "router-granite": Fused("granitemoe", lora={"target_parameters": ["gate_up_proj", "router.weight"]}),
    "router-deepseek": Fused("deepseek_v3", lora={"target_parameters": ["down_proj", "gate.weight"]}),
    "converted-mixtral": Fused("mixtral", lora={"target_modules": [*W, *ATTENTION], **CONVERTED}),
    "converted-rslora": Fused("mixtral", lora={"target_modules": W, "use_rslora": True, **CONVERTED}),
    "all-linear-deepseek": Fused("deepseek_v3", lora={"target_modules": "all-linear", **CONVERTED}),
    "stacked-mixtral": Fused("mixtral", in_memory=True),
    "stacked-qwen3": Fused("qwen3_moe", in_memory=True, lora={"r": 5}),
    "stacked-square": Fused("qwen2_moe", fields={"moe_intermediate_size": 20}, in_memory=True),
    "several-tiles": Fused("mixtral", fields=WIDE, lora={"r": 24}),
    "several-tiles-transposed": Fused("gpt_oss", fields=WIDE, lora={"r": 24}),
    "several-tiles-stacked": Fused("mixtral", torch.float32, fields=WIDE, lora={"r": 24}, in_memory=True),
}


@pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module was matched:RuntimeWarning:peft")
@pytest.mark.parametrize("name", FUSED)
def test_peft_adds_what_the_formula_says(workshop: Workshop, name: str) -> None:
    case = workshop.case(name)
    assert case.deltas
    experts.assert_merged(case.base, case.peft, case.deltas)


@pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module was matched:RuntimeWarning:peft")
@pytest.mark.parametrize("name", FUSED)
def test_stacked_adapter_equals_peft(workshop: Workshop, tmp_path: Path, name: str) -> None:
    case = workshop.case(name)
    rawmerge.merge_adapter(case.base, case.adapter, tmp_path / "ours")
    ours, before = oracle.read_tensors(tmp_path / "ours"), oracle.read_tensors(case.base)
    oracle.assert_same_checkpoint(ours, oracle.read_tensors(case.peft))
    oracle.assert_kept_bytes(before, ours, before.keys() - case.deltas.keys())


def test_experts_of_one_layer_lie_in_several_shards(workshop: Workshop) -> None:
    base = workshop.base(Fused("mixtral"))
    shards = [
        [name for name in oracle.read_tensors(file) if "1.block_sparse" in name] for file in base.glob("*.safetensors")
    ]
    assert len({len(names) for names in shards if names}) > 1


#: Families whose single experts PEFT 0.21 merges as they were trained under transformers 4.
CONVERTED_BY_PEFT: Final = {
    "mixtral": r"[qv]_proj|experts",
    "minimax_m2": r"[qv]_proj|experts",
    "olmoe": r"[qv]_proj|experts",
    "qwen3_moe": r"[qv]_proj|\.experts\.",
    "qwen3_next": r"[qv]_proj|\.experts\.",
    "deepseek_v3": r"o_proj|\.experts\.",
    "glm4_moe": r"[qv]_proj|\.experts\.",
    "ernie4_5_moe": r"[qv]_proj|\.experts\.",
    "hunyuan_v1_moe": r"[qv]_proj|\.experts\.",
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, torch.bfloat16) for name in CONVERTED_BY_PEFT), ("mixtral", torch.float32), ("olmoe", torch.float32)],
)
def test_single_experts_equal_peft(workshop: Workshop, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base = workshop.base(Fused(family, dtype))
    adapter, deltas = experts.make_linear_adapter(tmp_path / "adapter", base, CONVERTED_BY_PEFT[family])
    expected = oracle.merge_with_peft(oracle.pretrained(base, AUTO), adapter, tmp_path / "peft")
    experts.assert_merged(base, tmp_path / "peft", deltas)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize(("family", "pattern"), [("mixtral", r"experts|moe\.gate$"), ("olmoe", r"experts|mlp\.gate$")])
def test_single_experts_and_router_equal_peft(workshop: Workshop, tmp_path: Path, family: str, pattern: str) -> None:
    base = workshop.base(Fused(family))
    adapter, deltas = experts.make_linear_adapter(tmp_path / "adapter", base, rf"q_proj|{pattern}")
    assert any(name.endswith(".gate.weight") for name in deltas)
    expected = oracle.merge_with_peft(oracle.pretrained(base, AUTO), adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


NOT_ADDED: Final = "off, by up to"


class Single(NamedTuple):
    """A hand-made adapter of transformers 4 that PEFT 0.21 refuses, or merges in part or with a wrong scaling."""

    family: str
    pattern: str
    ranks: Mapping[str, int] = {}
    fields: Mapping[str, Any] = {}
    failure: str = NOT_ADDED


ANY_MLP: Final = r"q_proj|(gate|up|down)_proj$"
BY_FORMULA: Final = {
    "qwen2_moe": Single("qwen2_moe", ANY_MLP),
    "phimoe": Single("phimoe", r"q_proj|experts"),
    "jamba": Single("jamba", ANY_MLP),
    "lfm2_moe": Single("lfm2_moe", r"q_proj|w[123]$"),
    "nemotron_h": Single("nemotron_h", ANY_MLP),
    "qwen3_moe": Single("qwen3_moe", ANY_MLP),
    "qwen3_next": Single("qwen3_next", ANY_MLP),
    "deepseek_v3": Single("deepseek_v3", ANY_MLP),
    "glm4_moe": Single("glm4_moe", ANY_MLP),
    "ernie4_5_moe": Single("ernie4_5_moe", ANY_MLP),
    "hunyuan_v1_moe": Single("hunyuan_v1_moe", ANY_MLP),
    "rslora": Single("mixtral", r"q_proj|experts", fields={"use_rslora": True}),
    "ranks": Single("mixtral", r"q_proj|experts", ranks={"w1": 5, "w2": 2, "w3": 4}, failure="size mismatch"),
    "ranks-of-both": Single("olmoe", ANY_MLP, ranks={"gate_proj": 5, "up_proj": 5}, failure="size mismatch"),
    "alpha-of-down": Single("mixtral", r"q_proj|experts", fields={"alpha_pattern": {"w2": 11}}),
    "alpha-of-gate": Single("mixtral", r"q_proj|experts", fields={"alpha_pattern": {"w1": 11}}),
    "gate-only": Single("mixtral", r"q_proj|w1$", failure="Cannot convert"),
    "gate-and-up": Single("mixtral", r"q_proj|w[13]$"),
    "router": Single("deepseek_v3", r"mlp\.gate$|shared_experts"),
}


@pytest.mark.parametrize("name", BY_FORMULA)
def test_single_experts_shared_experts_and_dense_layers(workshop: Workshop, tmp_path: Path, name: str) -> None:
    family, pattern, ranks, fields, _ = BY_FORMULA[name]
    base = workshop.base(Fused(family))
    adapter, deltas = experts.make_linear_adapter(tmp_path / "adapter", base, pattern, ranks, **fields)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    experts.assert_merged(base, tmp_path / "ours", deltas)


@pytest.mark.filterwarnings("ignore:target_modules=.* were set but no module was matched:RuntimeWarning:peft")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys while loading the checkpoint:UserWarning:peft")
@pytest.mark.parametrize("name", BY_FORMULA)
def test_peft_does_not_merge_these(workshop: Workshop, tmp_path: Path, name: str) -> None:
    family, pattern, ranks, fields, failure = BY_FORMULA[name]
    base = workshop.base(Fused(family))
    adapter, deltas = experts.make_linear_adapter(tmp_path / "adapter", base, pattern, ranks, **fields)
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=failure):  # noqa: PT012  # each may
        oracle.merge_with_peft(oracle.pretrained(base, AUTO), adapter, tmp_path / "peft")
        experts.assert_merged(base, tmp_path / "peft", deltas)


#: Nothing is square; gate_up_proj is; down_proj is.
NOTHING, GATE_UP, DOWN = Sizes(), Sizes(hidden=20, inner=10), Sizes(hidden=10, inner=10)
GROUPED: Final = "grouped_by_expert"


def write_base(folder: Path, disk: str, sizes: Sizes) -> Path:
    return write_experts(folder / "base", DISKS[disk], sizes)


def check_stacked(folder: Path, disk: str, sizes: Sizes, options: Mapping[str, Any] | None = None, **made: Any) -> None:
    """Merge a hand-made adapter with `target_parameters` into a hand-made base."""
    base = write_base(folder, disk, sizes)
    adapter, deltas = experts.make_stacked_adapter(folder / "adapter", DISKS[disk], sizes, **made)
    rawmerge.merge_adapter(base, adapter, folder / "ours", **(options or {}))
    experts.assert_merged(base, folder / "ours", deltas)


def check_refused(folder: Path, disk: str, sizes: Sizes, match: str, of: Sizes | None = None, **made: Any) -> None:
    """The same must be refused for a reason that names what is missing; `of`: sizes for which the adapter was made."""
    base = write_base(folder, disk, sizes)
    adapter, _ = experts.make_stacked_adapter(folder / "adapter", DISKS[disk], of or sizes, **made)
    with pytest.raises(rawmerge.RefusedError, match=match):
        rawmerge.merge_adapter(base, adapter, folder / "ours")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def is_transposed(version: str, disk: Disk) -> bool:
    """PEFT up to 0.18 knows one form; 0.19.0 reads is_transposed the wrong way round, 0.19.1 the right way."""
    return version.startswith("0.18") or disk.transposed != (version == "0.19.0")


@pytest.mark.parametrize(("version", "rank"), [("0.21.2", 5), ("0.19.0", 3), ("0.18.1", 5)])
@pytest.mark.parametrize("disk", DISKS)
def test_shapes_tell_how_experts_are_oriented(tmp_path: Path, disk: str, version: str, rank: int) -> None:
    transposed = is_transposed(version, DISKS[disk])
    check_stacked(tmp_path, disk, NOTHING, rank=rank, transposed=transposed, peft_version=version)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("disk", DISKS)
def test_shapes_tell_it_without_a_version(tmp_path: Path, disk: str, transposed: bool) -> None:
    check_stacked(tmp_path, disk, NOTHING, rank=5, transposed=transposed)


@pytest.mark.parametrize("version", ["0.21.3.dev0@UNKNOWN", "0.21.2", "0.19.1", "0.19.0", "0.18.1"])
@pytest.mark.parametrize(("sizes", "rank"), [(GATE_UP, 3), (DOWN, 5)])
@pytest.mark.parametrize("disk", ["single", "stacked", "columns", "alternating"])
def test_peft_version_tells_it_of_square_experts(
    tmp_path: Path, disk: str, sizes: Sizes, rank: int, version: str
) -> None:
    transposed = is_transposed(version, DISKS[disk])
    check_stacked(tmp_path, disk, sizes, rank=rank, transposed=transposed, peft_version=version)


@pytest.mark.parametrize("fields", [{}, {"peft_version": ""}, {"peft_version": "unknown"}])
@pytest.mark.parametrize(("sizes", "parameter"), [(GATE_UP, "gate_up_proj"), (DOWN, "down_proj")])
@pytest.mark.parametrize("disk", ["single", "stacked", "columns", "alternating"])
def test_square_experts_without_a_version_are_refused(
    tmp_path: Path, disk: str, sizes: Sizes, parameter: str, fields: Mapping[str, Any]
) -> None:
    check_refused(tmp_path, disk, sizes, "peft_version", parameters=[parameter], **fields)


@pytest.mark.parametrize("of", [NOTHING._replace(experts=4), NOTHING._replace(hidden=14), NOTHING._replace(inner=9)])
@pytest.mark.parametrize("disk", ["single", "stacked", "alternating"])
def test_experts_of_another_size_are_refused(tmp_path: Path, disk: str, of: Sizes) -> None:
    check_refused(tmp_path, disk, NOTHING, "base", of=of, peft_version="0.21.2")


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize(
    ("marker", "option", "grouped"),
    [
        ("rank_major", None, False),
        (GROUPED, None, True),
        (None, GROUPED, True),
        ("rank_major", GROUPED, True),
        (GROUPED, "rank_major", False),
    ],
)
@pytest.mark.parametrize("disk", ["single", "stacked", "alternating"])
def test_layout_of_lora_b_by_marker_or_option(
    tmp_path: Path, disk: str, marker: str | None, option: str | None, grouped: bool, rank: int
) -> None:
    fields = {"lora_B_layout": marker} if marker else {}
    options = {"moe_lora_b_layout": option} if option else {}
    check_stacked(tmp_path, disk, NOTHING, options, rank=rank, grouped=grouped, peft_version="0.21.2", **fields)


def test_layout_of_lora_b_on_the_command_line(tmp_path: Path) -> None:
    base = write_base(tmp_path, "single", NOTHING)
    adapter, deltas = experts.make_stacked_adapter(tmp_path / "adapter", DISKS["single"], NOTHING, grouped=True)
    arguments = ["merge", str(base), str(adapter), "--output", str(tmp_path / "ours"), "--moe-lora-b-layout", GROUPED]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    experts.assert_merged(base, tmp_path / "ours", deltas)


def test_unknown_layout_of_lora_b_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path, "stacked", NOTHING, "lora_B_layout", peft_version="0.21.2", lora_B_layout="by_turns")


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("disk", DISKS)
def test_one_parameter_of_the_experts(tmp_path: Path, disk: str, parameter: str) -> None:
    check_stacked(
        tmp_path, disk, NOTHING, parameters=[parameter], peft_version="0.21.2", transposed=DISKS[disk].transposed
    )


@pytest.mark.parametrize("disk", DISKS)
def test_stacked_adapter_in_float64(tmp_path: Path, disk: str) -> None:
    options = {"compute_dtype": "float64"}
    check_stacked(tmp_path, disk, NOTHING, options, peft_version="0.21.2", transposed=DISKS[disk].transposed)


GATE, UP, ALL = [0], [1], [0, 1, 2]


@pytest.mark.parametrize(
    ("numbers", "leaves"), [(range(5), ALL), ([0, 3], ALL), (range(5), GATE), (range(5), UP), ([4], [0, 2])]
)
@pytest.mark.parametrize("disk", DISKS)
def test_single_experts_in_every_layout(
    tmp_path: Path, disk: str, numbers: Sequence[int], leaves: Sequence[int]
) -> None:
    base = write_base(tmp_path, disk, NOTHING)
    adapter, deltas = experts.make_single_adapter(tmp_path / "adapter", DISKS[disk], NOTHING, numbers, leaves)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    experts.assert_merged(base, tmp_path / "ours", deltas)
