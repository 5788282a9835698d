"""A verification takes what makes one of several adapters from the record, or from what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import PlanError
from rawmerge.inputs.identity import RECORD_NAME
from tests.builders import PREFIX, lora_pair, merged, random_tensor, read_all, write_adapter, write_base

Q = "model.layers.0.q_proj"
NORM = "model.norm.weight"
WAYS: dict[str, dict[str, Any]] = {
    "serial": {},
    "once": {"order": "once"},
    "average": {"combine": "average"},
    "magnitude": {"combine": "magnitude", "density": 0.5},
    "ties": {"combine": "ties", "density": 0.4, "majority_sign": "frequency"},
    "dare": {"combine": "dare", "density": 0.5, "seed": 7},
    "dare-ties": {"combine": "dare-ties", "density": 0.5, "majority_sign": "frequency", "seed": 7},
    "peft-linear": {"combine": "peft-linear"},
    "replaced": {"replaced_by": 2},
}
WEIGHTED = [name for name in WAYS if name != "serial"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Return a base and three adapters on one of its tensors, of which the last two replace another."""
    base = write_base(tmp_path / "base", [{f"{Q}.weight": random_tensor((12, 8)), NORM: random_tensor((8,), seed=3)}])
    adapters = []
    for seed, name in enumerate("abc", 4):
        norm = {f"{PREFIX}{NORM}": random_tensor((8,), seed=seed)} if name != "a" else {}
        fields: dict[str, Any] = {"modules_to_save": ["norm"]} if norm else {}
        adapters.append(write_adapter(tmp_path / name, lora_pair(Q, 12, 8, seed=seed) | norm, **fields))
    return base, adapters


def adapters_of(way: str, inputs: tuple[Path, list[Path]]) -> list[Path]:
    """Return adapters that may be merged in this way: two that replace the same tensor for `replaced_by` alone."""
    return inputs[1][1:] if way == "replaced" else inputs[1][:2]


def made_by_another(output: Path) -> None:
    """Take away what says that rawmerge made an output, and how."""
    for name in (RECORD_NAME, "README.md"):
        (output / name).unlink()


@pytest.mark.parametrize("way", WAYS)
def test_the_record_tells_how_our_own_output_was_made(
    inputs: tuple[Path, list[Path]], tmp_path: Path, way: str
) -> None:
    base, adapters = inputs[0], adapters_of(way, inputs)
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", **WAYS[way])
    assert rawmerge.verify_merge(tmp_path / "out", base, adapters).findings == ()


@pytest.mark.parametrize("way", WEIGHTED)
def test_of_an_output_of_another_program_options_tell(
    inputs: tuple[Path, list[Path]], tmp_path: Path, way: str
) -> None:
    base, adapters = inputs[0], adapters_of(way, inputs)
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", **WAYS[way])
    made_by_another(tmp_path / "out")
    assert rawmerge.verify_merge(tmp_path / "out", base, adapters, **WAYS[way]).findings == ()
    command = ["verify", str(tmp_path / "out"), "--base", str(base)]
    command += [text for adapter in adapters for text in ("--adapter", str(adapter))]
    flags = [text for name, value in WAYS[way].items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = CliRunner().invoke(cli, [*command, *flags, "--json"])
    assert (done.exit_code, json.loads(done.stdout)["findings"]) == (0, [])
    if way == "replaced":
        with pytest.raises(PlanError, match="--replaced-by"):
            rawmerge.verify_merge(tmp_path / "out", base, adapters)
    elif way == "once":  # rounded once or twice: some elements differ
        assert rawmerge.verify_merge(tmp_path / "out", base, adapters, tolerance=2).differences
    else:
        assert CliRunner().invoke(cli, command).exit_code == 5


@pytest.mark.parametrize(("combine", "share"), [("sum", 1.0), ("average", 0.5)])
def test_what_the_formula_gives_is_equal(
    inputs: tuple[Path, list[Path]], tmp_path: Path, combine: str, share: float
) -> None:
    base, adapters = inputs[0], adapters_of(combine, inputs)
    tensors = {name: tensor.float() for name, tensor in read_all(base).items()}
    zero = torch.zeros_like(tensors[f"{Q}.weight"])
    pairs = [read_all(adapter) for adapter in adapters]
    path = f"{PREFIX}{Q}.lora"
    deltas = [merged(zero, pair[f"{path}_A.weight"], pair[f"{path}_B.weight"], 1.5) for pair in pairs]
    tensors[f"{Q}.weight"] += (deltas[0] + deltas[1]) * share
    tensors[NORM] = read_all(adapters[1])[f"{PREFIX}{NORM}"].float()
    (tmp_path / "theirs").mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "theirs/model.safetensors")
    (tmp_path / "theirs/config.json").write_bytes((base / "config.json").read_bytes())
    found = rawmerge.verify_merge(tmp_path / "theirs", base, adapters, combine=combine, tolerance=1)
    assert found.findings == ()
    assert sum(item.differing for item in found.differences) <= 2  # sums in another order


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "sum"},
        {"combine": "average"},
        {"combine": "dare", "density": 0.4},
        {"density": 0.9},
        {"majority_sign": "frequency"},
        {"order": "serial"},
    ],
)
def test_options_that_are_given_come_before_the_record_s(
    inputs: tuple[Path, list[Path]], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, adapters = inputs[0], inputs[1][:2]
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", combine="ties", density=0.4)
    subjects = {item.subject for item in rawmerge.verify_merge(tmp_path / "out", base, adapters, **options).findings}
    assert f"{RECORD_NAME}: options" in subjects
    assert rawmerge.verify_merge(tmp_path / "out", base, adapters, combine="ties", density=0.4).findings == ()


@pytest.mark.parametrize(
    "options", [{"combine": "sum", "order": "serial"}, {"combine": "ties", "order": "serial"}, {"combine": "ties"}]
)
def test_options_that_do_not_go_together_are_refused(
    inputs: tuple[Path, list[Path]], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, adapters = inputs[0], inputs[1][:2]
    rawmerge.merge_adapter(base, adapters, tmp_path / "out", order="once")
    with pytest.raises(PlanError):
        rawmerge.verify_merge(tmp_path / "out", base, adapters, **options)


def test_an_order_that_is_given_is_not_the_record_s_combination(
    inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = inputs[0], adapters_of("ties", inputs)
    rawmerge.merge_adapter(base, adapters, tmp_path / "ties", combine="ties", density=0.5)
    rawmerge.merge_adapter(base, adapters, tmp_path / "once", order="once")
    assert rawmerge.verify_merge(tmp_path / "ties", base, adapters).is_equal
    for order in ("once", "serial"):
        assert not rawmerge.verify_merge(tmp_path / "ties", base, adapters, order=order).is_equal
    assert rawmerge.verify_merge(tmp_path / "once", base, adapters, order="once").is_equal


def test_options_without_inputs_are_of_no_use(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = inputs[0], adapters_of("ties", inputs)
    rawmerge.merge_adapter(base, adapters, tmp_path / "out")
    assert rawmerge.verify_merge(tmp_path / "out", threads=1, combine=None).is_equal
    for chosen in ({"combine": "ties"}, {"seed": 0}, {"options": rawmerge.MergeOptions()}):
        with pytest.raises(ValueError, match="of no use without base and adapter"):
            rawmerge.verify_merge(tmp_path / "out", **chosen)
    told = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--seed", "1", "--combine", "ties"])
    assert told.exit_code == 2
    assert "--combine, --seed: of no use without --base and --adapter" in told.output
