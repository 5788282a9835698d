"""What LoRA settles before it computes: the layout of the delta, or why the shapes cannot be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.methods.interface import ModuleFacts, Shape, ShapeMismatchError
from rawmerge.methods.lora import LoraMethod
from tests.strategies import SETTINGS

RANK, SCALING = 4, 1.5
sizes = st.integers(1, 9)


def settle(
    a: Shape, b: Shape, base: Shape, *, rank: int = RANK, square_is_transposed: bool | None = None, prefix: str = "lora"
) -> Mapping[str, Any]:
    facts = ModuleFacts(base, rank, SCALING, square_is_transposed)
    return LoraMethod().settings({f"{prefix}_b": b, f"{prefix}_a": a}, facts)


def layout_of(a: Shape, b: Shape, base: Shape, **facts: Any) -> Any:
    return settle(a, b, base, **facts)["is_transposed"]


@pytest.mark.parametrize(
    ("a", "b", "base"),
    [
        ((4, 8), (12, 4), (12, 8)),
        ((4, 1), (1, 4), (1, 1)),
        ((4, 8, 3), (12, 4, 1), (12, 8, 3)),
        ((4, 8, 3, 3), (12, 4, 1, 1), (12, 8, 3, 3)),
        ((4, 8, 1, 1), (12, 4, 1, 1), (12, 8, 1, 1)),
        ((4, 8, 2, 3, 5), (12, 4, 1, 1, 1), (12, 8, 2, 3, 5)),
        ((4, 12, 3, 3), (12, 4, 1, 1), (12, 12, 3, 3)),
    ],
    ids=str,
)
def test_linear_and_convolution_deltas_lie_as_the_base_does(a: Shape, b: Shape, base: Shape) -> None:
    found = settle(a, b, base, square_is_transposed=False)
    assert found == {"scaling": SCALING, "is_transposed": False, "rounds_delta": False}


def test_a_weight_stored_in_out_takes_the_delta_transposed() -> None:
    assert layout_of((4, 8), (12, 4), (8, 12)) is True


@pytest.mark.parametrize("rows", [20, 8])
def test_an_embedding_takes_the_delta_transposed_and_rounded_even_when_square(rows: int) -> None:
    found = settle((4, rows), (8, 4), (rows, 8), prefix="lora_embedding", square_is_transposed=False)
    assert found == {"scaling": SCALING, "is_transposed": True, "rounds_delta": True}


def test_a_delta_is_rounded_first_where_the_module_s_facts_say_so() -> None:
    facts = ModuleFacts((12, 8), RANK, SCALING, None, rounds_delta=True)
    assert LoraMethod().settings({"lora_a": (4, 8), "lora_b": (12, 4)}, facts)["rounds_delta"] is True


@pytest.mark.parametrize("known", [True, False])
def test_a_square_weight_follows_what_is_known_of_its_layout(known: bool) -> None:
    assert layout_of((4, 8), (8, 4), (8, 8), square_is_transposed=known) is known


@pytest.mark.parametrize("known", [True, False, None])
def test_a_weight_that_is_not_square_shows_its_layout_itself(known: bool | None) -> None:
    assert layout_of((4, 8), (12, 4), (12, 8), square_is_transposed=known) is False
    assert layout_of((4, 8), (12, 4), (8, 12), square_is_transposed=known) is True


def test_a_square_weight_of_unknown_layout_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="a known layout") as caught:
        settle((4, 8), (8, 4), (8, 8))
    assert "model_type" in caught.value.hint


@pytest.mark.parametrize("role", ["lora_a", "lora_b"])
@pytest.mark.parametrize("shape", [(), (0,), (96,), (0, 8), (4, 0)], ids=str)
def test_a_factor_that_was_not_gathered_is_refused_as_such(role: str, shape: Shape) -> None:
    shapes = {"lora_a": (4, 8), "lora_b": (12, 4), role: shape}
    with pytest.raises(ShapeMismatchError, match="a matrix") as caught:
        settle(shapes["lora_a"], shapes["lora_b"], (12, 8))
    assert caught.value.role == role
    assert "ZeRO-3 or FSDP" in caught.value.hint


@pytest.mark.parametrize(
    ("a", "b", "base", "role", "expected", "found"),
    [
        ((4, 8), (12, 4), (12, 8, 3), "lora_a", "3 dimensions like the base's [12, 8, 3]", "shape [4, 8]"),
        ((4, 8, 1), (12, 4, 1), (12, 8), "lora_a", "2 dimensions like the base's [12, 8]", "shape [4, 8, 1]"),
        ((4, 8), (12, 4), (8,), "lora_a", "1 dimensions like the base's [8]", "shape [4, 8]"),
        ((4, 8, 3), (12, 4), (12, 8, 3), "lora_b", "(out, rank, 1)", "shape [12, 4]"),
        ((4, 8, 3), (12, 4, 3), (12, 8, 3), "lora_b", "(out, rank, 1)", "shape [12, 4, 3]"),
        ((4, 8), (12, 3), (12, 8), "lora_b", "rank 4 like lora_a", "rank 3"),
        ((8, 4), (4, 12), (12, 8), "lora_b", "rank 8 like lora_a", "rank 12"),
        ((3, 8), (12, 3), (12, 8), "lora_a", "rank 4 as the config says", "rank 3"),
        ((4, 8), (12, 4), (12, 9), "lora_b @ lora_a", "the base's shape [12, 9]", "a delta of [12, 8]"),
        ((4, 8), (12, 4), (32000, 4096), "lora_b @ lora_a", "the base's shape [32000, 4096]", "a delta of [12, 8]"),
        ((4, 8, 3), (12, 4, 1), (12, 8, 5), "lora_b @ lora_a", "the base's shape [12, 8, 5]", "a delta of [12, 8, 3]"),
        ((4, 8, 3), (12, 4, 1), (8, 12, 3), "lora_b @ lora_a", "the base's shape [8, 12, 3]", "a delta of [12, 8, 3]"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_role(
    a: Shape, b: Shape, base: Shape, role: str, expected: str, found: str
) -> None:
    with pytest.raises(ShapeMismatchError, match=re.escape(role)) as caught:
        settle(a, b, base)
    assert (caught.value.role, caught.value.expected, caught.value.found) == (role, expected, found)


def test_a_padded_vocabulary_is_refused_with_the_embedding_s_own_roles() -> None:
    with pytest.raises(ShapeMismatchError, match="the base's shape") as caught:
        settle((4, 20), (8, 4), (24, 8), prefix="lora_embedding")
    assert caught.value.role == "lora_embedding_b @ lora_embedding_a"
    assert caught.value.found == "a delta of [20, 8]"


def test_a_convolution_with_groups_is_named_as_the_reason() -> None:
    with pytest.raises(ShapeMismatchError, match="the base's shape") as caught:
        settle((4, 8, 3, 3), (12, 4, 1, 1), (12, 2, 3, 3))
    assert caught.value.hint == "a convolution with groups cannot take a LoRA delta in its weight"


@SETTINGS
@given(sizes, sizes, sizes, st.tuples(sizes, sizes) | st.tuples(sizes, sizes, sizes))
def test_what_is_accepted_has_the_base_s_shape(rank: int, rows: int, columns: int, base: Shape) -> None:
    try:
        is_transposed = layout_of((rank, columns), (rows, rank), base, rank=rank, square_is_transposed=False)
    except ShapeMismatchError:
        assert base not in {(rows, columns), (columns, rows)}
    else:
        assert base == ((columns, rows) if is_transposed else (rows, columns))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Conv1D"])
def test_the_shapes_that_peft_makes_are_accepted_in_peft_s_layout(kind: str) -> None:
    peft, nn = pytest.importorskip("peft"), pytest.importorskip("torch.nn")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    make = {
        "Linear": lambda: nn.Linear(8, 12),
        "Embedding": lambda: nn.Embedding(20, 8),
        "Conv1D": lambda: conv1d(12, 8),
    }
    base = make.get(kind, lambda: getattr(nn, kind)(8, 12, 3))()
    config = peft.LoraConfig(r=RANK, target_modules=["0"], fan_in_fan_out=kind == "Conv1D")
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    prefix = "lora_embedding" if kind == "Embedding" else "lora"
    a, b = (getattr(layer, f"{prefix}_{side}")["default"] for side in "AB")
    shapes = [tuple(getattr(factor, "weight", factor).shape) for factor in (a, b)]
    assert tuple(layer.get_delta_weight("default").shape) == tuple(base.weight.shape)
    assert layout_of(shapes[0], shapes[1], tuple(base.weight.shape), prefix=prefix) is (kind in {"Embedding", "Conv1D"})
