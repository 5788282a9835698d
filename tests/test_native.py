"""The compiled kernel beside torch and exact arithmetic: every bit, every flag, on each instruction set there is."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.calibration import find_block
from rawmerge.native import PANEL, kernel
from rawmerge.native.pair_kernel import PairChain, PairKernel, pack_factor
from rawmerge.native.recipe import Recipe
from rawmerge.native.row_sums import MergedRows, RowSums
from tests.builders import raw

pytestmark = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LEVELS = range(1, (kernel().LEVEL if kernel() else 0) + 1)  # type: ignore[union-attr]


def make_recipe(rows: int, columns: int, rank: int, stored: str = "BF16", **fields: Any) -> Recipe:
    plain: dict[str, Any] = {"is_transposed": False, "is_double": False, "result": stored, "rounds_delta": False}
    return Recipe(rows=rows, columns=columns, rank=rank, stored=stored, **(plain | fields))


def values(recipe: Recipe, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return base (rows, columns), left (rows, rank) and right (columns, rank)."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(recipe.rows, recipe.columns, generator=random).to(DTYPES[recipe.stored])
    left = torch.randn(recipe.rows, recipe.rank, generator=random)
    return base, left, torch.randn(recipe.columns, recipe.rank, generator=random)


def view(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def packed(recipe: Recipe, left: torch.Tensor, right: torch.Tensor) -> tuple[memoryview, memoryview]:
    is_double, rank = recipe.is_double, recipe.rank
    return (
        pack_factor(view(left), "F32", (len(left), rank), is_double=is_double),
        pack_factor(view(right), "F32", (len(right), rank), is_right=True, is_double=is_double),
    )


def merged(
    recipe: Recipe,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float = 1.3,
    block: int = 0,
    level: int = 0,
    height: int = 0,
) -> tuple[torch.Tensor, bool, bool]:
    """Return what the kernel makes of all rows, `height` at a time, and its two answers."""
    base, left, right = tensors
    pair = PairKernel(recipe, block or recipe.rank, scaling, *packed(recipe, left, right), level=level)
    result = torch.empty(base.shape, dtype=DTYPES[recipe.result])
    answers = [
        pair.merge(view(base[at : at + count]), view(result[at : at + count]), (at, count), finds_changes=True)
        for at in range(0, recipe.rows, height or recipe.rows)
        for count in [min(height or recipe.rows, recipe.rows - at)]
    ]
    return result, any(changed for changed, _ in answers), any(care for _, care in answers)


def by_float64(
    recipe: Recipe, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float
) -> torch.Tensor:
    """Return the sum in float64."""
    base, left, right = (tensor.double() for tensor in tensors)
    return base + (left @ right.T) * scaling


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(
    "shape", [(64, 96, 4), (96, 96, 5), (130, 70, 16), (67, 331, 3), (1, 200, 8), (200, 1, 8), (6, 64, 1), (7, 65, 200)]
)
def test_the_result_is_the_float32_sum_rounded_once(shape: tuple[int, int, int], stored: str, level: int) -> None:
    recipe = make_recipe(*shape, stored)
    tensors = values(recipe)
    result, changed, care = merged(recipe, tensors, level=level)
    assert changed
    assert not care
    exact = by_float64(recipe, tensors, 1.3)
    # float32 sums of `rank` terms, then one rounding to the result's own precision
    slack = (tensors[1].abs().double() @ tensors[2].abs().double().T) * 1.3 * (recipe.rank + 2) * 2**-24
    step = torch.finfo(DTYPES[stored]).eps
    assert ((result.double() - exact).abs() <= slack + exact.abs() * step).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_float64_rounds_the_exact_sum_once(stored: str, result: str, level: int) -> None:
    recipe = make_recipe(7, 70, 5, stored, result=result, is_double=True)
    base, left, right = values(recipe)
    # few bits: the sums are exact in float64, so that what is left is the one rounding
    left, right = (left * 8).round() / 64, (right * 8).round() / 4096
    found, _, _ = merged(recipe, (base, left, right), scaling=1.375, level=level)
    for row in range(recipe.rows):
        for column in range(0, recipe.columns, 3):
            exact = Fraction(float(base[row, column])) + Fraction(11, 8) * sum(
                Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left[row], right[column], strict=True)
            )
            assert is_nearest(Fraction(float(found[row, column])), exact, found[row, column])


def is_nearest(found: Fraction, exact: Fraction, stored: torch.Tensor) -> bool:
    """Whether no neighbour of the stored value is nearer to the exact one; on a tie, the last bit must be even."""
    bits = stored.reshape(1).view({2: torch.int16, 4: torch.int32}[stored.element_size()])
    for step in (-1, 1):
        neighbour = Fraction(float((bits + step).view(stored.dtype)[0]))
        if abs(neighbour - exact) < abs(found - exact):
            return False
        if abs(neighbour - exact) == abs(found - exact) and int(bits) & 1:
            return False
    return True


@pytest.mark.parametrize("stored", ["BF16", "F16"])
@pytest.mark.parametrize("level", LEVELS)
def test_float64_does_not_round_ties_of_float32_twice(stored: str, level: int) -> None:
    recipe = make_recipe(4, 64, 1, stored, is_double=True)
    base = torch.ones(4, 64, dtype=DTYPES[stored])
    half = {"BF16": 2.0**-8, "F16": 2.0**-11}[stored]
    # just above and below half a step, by less than float32 can hold beside one
    left = torch.ones(4, 1)
    right = torch.full((64, 1), half)
    for nudge, expected in ((2.0**-40, 1 + 2 * half), (-(2.0**-40), 1.0)):
        found, _, _ = merged(recipe, (base, left, right), scaling=1 + nudge, level=level)
        assert (found.float() == expected).all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rounds_delta", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(320, 1000, 16), (512, 640, 7), (1024, 1024, 4), (300, 2100, 260)]
)
def test_the_bits_are_torch_s_however_tiles_are_cut(
    rows: int, columns: int, rank: int, level: int, rounds_delta: bool, is_transposed: bool
) -> None:
    recipe = make_recipe(rows, columns, rank, is_transposed=is_transposed, rounds_delta=rounds_delta)
    blas = BlasThreads()
    blas.adopt()
    try:
        block = find_block(recipe, blas)
    finally:
        blas.restore()
    if not block:
        pytest.skip("torch sums in an order of its own on this machine")
    base, left, right = values(recipe, seed=8)
    product = (right @ left.T).T if is_transposed else left @ right.T
    delta = product * 1.3
    if rounds_delta:
        delta = delta.bfloat16().float()
    expected = (base.float() + delta).bfloat16()
    for height in (0, 64, 5, 1):
        found, _, _ = merged(recipe, (base, left, right), block=block, level=level, height=height)
        assert raw(found) == raw(expected)


def test_another_block_has_other_bits() -> None:
    recipe = make_recipe(64, 256, 64, "F32")
    tensors = values(recipe)
    assert raw(merged(recipe, tensors, block=64)[0]) != raw(merged(recipe, tensors, block=24)[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
def test_a_delta_that_rounds_away_changes_nothing_and_a_single_one_shows(
    stored: str, is_double: bool, level: int
) -> None:
    recipe = make_recipe(13, 77, 2, stored, is_double=is_double)
    base, left, right = values(recipe)
    base[2, 5] = -0.0  # becomes +0.0, which equals it
    nothing = torch.zeros_like(left)
    result, changed, care = merged(recipe, (base, nothing, right), level=level)
    assert (changed, care) == (False, False)
    assert torch.equal(result, base)
    nothing[12, 1], right[76, 1] = 3.0, 2.0
    result, changed, _ = merged(recipe, (base, nothing, right), level=level)
    assert changed
    assert torch.equal(result[:12], base[:12])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (12, 76), (5, 64)])
def test_what_is_not_finite_is_left_to_the_other_path(
    place: tuple[int, int], bad: float, stored: str, is_double: bool, level: int
) -> None:
    recipe = make_recipe(13, 77, 2, stored, is_double=is_double)
    base, left, right = values(recipe)
    assert not merged(recipe, (base, left, right), level=level)[2]
    base[place] = bad
    assert merged(recipe, (base, left, right), level=level)[2]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
def test_overflow_is_left_to_the_other_path(stored: str, is_double: bool, level: int) -> None:
    recipe = make_recipe(6, 64, 1, stored, is_double=is_double)
    highest = torch.finfo(DTYPES[stored]).max
    base = torch.full((6, 64), highest, dtype=DTYPES[stored])
    left, right = torch.zeros(6, 1), torch.full((64, 1), highest / 4)
    left[5, 0] = 1.0
    assert not merged(recipe, (base, left * 0, right), level=level)[2]
    assert merged(recipe, (base, left, right), level=level)[2]


@pytest.mark.parametrize("level", LEVELS)
def test_a_rounded_delta_that_overflows_is_noticed(level: int) -> None:
    recipe = make_recipe(6, 64, 1, "F16", rounds_delta=True)
    base, left, right = values(recipe)
    assert merged(recipe, (base, left * 0 + 1, right * 0 + 65520.0), scaling=1.0, level=level)[2]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("rounds_delta", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000])
def test_no_payload_of_a_nan_carries_into_a_number(
    bits: int, result: str, stored: str, rounds_delta: bool, is_double: bool, level: int
) -> None:
    rounds_delta = rounds_delta and not is_double and stored == result
    recipe = make_recipe(6, 64, 2, stored, result=result, is_double=is_double, rounds_delta=rounds_delta)
    for place in range(3):
        tensors = [tensor.clone() for tensor in values(recipe)]
        is_wide = tensors[place].dtype == torch.float32
        tensors[place].view(torch.int32 if is_wide else torch.int16)[1, 1] = bits if is_wide else bits >> 16 | 1
        assert tensors[place].isnan().any()
        assert merged(recipe, (tensors[0], tensors[1], tensors[2]), level=level)[2]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_subnormal_sums_in_float64_are_left_to_the_other_path(stored: str, level: int) -> None:
    recipe = make_recipe(6, 64, 1, stored, is_double=True)
    base = torch.zeros(6, 64, dtype=DTYPES[stored])
    assert not merged(recipe, (base, torch.zeros(6, 1), torch.ones(64, 1)), level=level)[2]
    assert merged(recipe, (base, torch.full((6, 1), 2.0**-70), torch.full((64, 1), 2.0**-60)), level=level)[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lies_transposed", [False, True])
@pytest.mark.parametrize("is_double", [False, True])
def test_factors_are_packed_exactly(is_double: bool, lies_transposed: bool, dtype: str) -> None:
    random = torch.Generator().manual_seed(1)
    factor = (torch.randn(70, 3, generator=random) * 2.0 ** torch.randint(-16, 15, (70, 3), generator=random)).to(
        DTYPES[dtype]
    )
    factor[0] = torch.tensor([2.0**-24, -(2.0**-17), 0.0]).to(DTYPES[dtype])  # subnormal in half precision
    stored = factor.T.contiguous() if lies_transposed else factor
    compute = torch.float64 if is_double else torch.float32
    options: dict[str, Any] = {"lies_transposed": lies_transposed, "is_double": is_double}
    left = torch.frombuffer(pack_factor(view(stored), dtype, (70, 3), **options), dtype=compute)
    assert raw(left.view(70, 3)) == raw(factor.to(compute))
    right = torch.frombuffer(pack_factor(view(stored), dtype, (70, 3), is_right=True, **options), dtype=compute)
    panels = right.view(2, 3, PANEL).transpose(1, 2).reshape(2 * PANEL, 3)
    assert raw(panels[:70]) == raw(factor.to(compute))
    assert not panels[70:].any()


def test_every_half_is_widened_exactly() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    wide = torch.frombuffer(pack_factor(view(halves), "F16", (2**16, 1)), dtype=torch.float32)
    expected = halves.float()
    same = (wide == expected) | (wide.isnan() & expected.isnan())
    assert same.all()
    assert torch.equal(torch.signbit(wide), torch.signbit(expected))


def tallied(
    recipe: Recipe, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], level: int, height: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result, `height` rows at a time from the last on, and the sums (sampled rows, 5)."""
    base, left, right = tensors
    pair = PairKernel(recipe, recipe.rank, 1.3, *packed(recipe, left, right), level=level)
    fits = DTYPES[recipe.stored].itemsize == DTYPES[recipe.result].itemsize
    stored = base.clone()
    result = stored.view(DTYPES[recipe.result]) if fits else torch.empty(base.shape, dtype=DTYPES[recipe.result])
    sums = torch.full((-(-recipe.rows // stride), 5), float("nan"), dtype=torch.float64)
    for at in reversed(range(0, recipe.rows, height)):
        count = min(height, recipe.rows - at)
        tally = RowSums(sums.view(-1).numpy().data, at, stride)
        own, to = view(stored[at : at + count]), view(result[at : at + count])
        pair.merge(own, to, (at, count), finds_changes=True, tally=tally)
    return result, sums


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_rows_are_summed_whatever_the_tiles(stored: str, result: str, is_double: bool, level: int) -> None:
    for rows, columns, rank in ((59, 331, 3), (7, 64, 2), (1, 5, 2), (13, 1, 2)):
        recipe = make_recipe(rows, columns, rank, stored, result=result, is_double=is_double)
        base, left, right = values(recipe)
        left, right = (left * 8).round() / 8, (right * 8).round() / 64  # their sums are exact
        left[0] = 0
        compute = torch.float64 if is_double else torch.float32
        before = base.to(compute)
        updated = before + (left.to(compute) @ right.to(compute).T) * 1.3
        expected, _, _ = merged(recipe, (base, left, right), level=level)
        delta = (updated - before).double()
        applied = expected.double() - base.to(DTYPES[result]).double()
        parts = [delta != 0, applied != 0, delta**2, applied**2, (applied - delta) ** 2]
        wanted = torch.stack([part.double().sum(1) for part in parts], 1)
        for stride in (1, 4, 64):
            found, sums = tallied(recipe, (base, left, right), level, rows, stride)
            assert raw(found) == raw(expected)
            torch.testing.assert_close(sums, wanted[::stride], rtol=1e-12, atol=0)
            for height in (1, 5, 48, 50):
                again, others = tallied(recipe, (base, left, right), level, height, stride)
                assert raw(again) == raw(expected)
                assert torch.equal(others, sums)


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_rows_that_torch_has_merged_have_the_same_sums(stored: str, result: str, is_double: bool) -> None:
    recipe = make_recipe(59, 331, 3, stored, result=result, is_double=is_double)
    base, left, right = values(recipe)
    left, right = (left * 8).round() / 8, (right * 8).round() / 64  # torch has the kernel's sums, for they are exact
    compute = torch.float64 if is_double else torch.float32
    updated = base.to(compute) + (left.to(compute) @ right.to(compute).T) * 1.3
    for stride in (1, 4, 64):
        output, wanted = tallied(recipe, (base, left, right), 0, 59, stride)
        sums = torch.full_like(wanted, float("nan"))
        for at, count in ((30, 29), (0, 30)):
            parts = [view(tensor[at : at + count]) for tensor in (base, updated, output)]
            rows = MergedRows((count, 331), parts[0], parts[1], parts[2], (stored, result), is_double)
            rows.measure(RowSums(sums.view(-1).numpy().data, at, stride))
        assert torch.equal(sums, wanted)


def test_rows_whose_buffers_are_too_small_are_not_summed() -> None:
    compiled = kernel()
    assert compiled is not None
    sums = view(torch.zeros(10, dtype=torch.float64))
    sound = [view(torch.zeros(2, 7, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    numbers: tuple[Any, ...] = (sums, (2, 7), 0, 1, 0, 1, False, 1)
    compiled.measure(*sound, *numbers)
    for place in range(3):
        short = [buffer[:-1] if place == at else buffer for at, buffer in enumerate(sound)]
        with pytest.raises(ValueError, match="too small"):
            compiled.measure(*short, *numbers)
    wrong: list[tuple[int, object]] = [(0, sums[:-1]), (1, (-1, 7)), (1, (2, 2**62)), (2, -1), (2, 1), (3, 0), (3, -1)]
    for place, value in [*wrong, (3, 2**62), (4, 3), (5, -1), (6, True), (7, 0), (7, 9)]:
        with pytest.raises(ValueError, match="out of its range"):
            compiled.measure(*sound, *(value if at == place else number for at, number in enumerate(numbers)))


class KernelCall:
    """A sound call of the compiled kernel, to be spoilt."""

    def __init__(self) -> None:
        recipe = make_recipe(8, 70, 3)
        base, left, right = values(recipe)
        self.stored, self.result = view(base), view(torch.empty_like(base))
        self.left = pack_factor(view(left), "F32", (8, 3))
        self.right = pack_factor(view(right), "F32", (70, 3), is_right=True)

    def made(self, *pairs: dict[str, Any], **at: Any) -> int:
        compiled = kernel()
        assert compiled is not None
        usual: dict[str, Any] = {"left": self.left, "right": self.right, "rank": 3, "block": 3, "scale": 1.0}
        usual |= {"rounds": False, "sums": None}
        whole: dict[str, Any] = {"stored": self.stored, "result": self.result}
        whole |= {"pairs": tuple(tuple((usual | own).values()) for own in pairs), "sizes": (8, 70), "dtypes": (0, 0)}
        whole |= {"double": False, "between": True, "finds": True, "level": 1, "sampled": (0, 0)}
        found: int = compiled.merge(*(whole | at).values())
        return found


def test_buffers_that_are_too_small_for_a_tile_are_refused() -> None:
    call, huge = KernelCall(), 2**62
    assert call.made({}) == call.made({}, {}) == 1
    wrong: list[dict[str, Any]] = [{"stored": call.stored[:-1]}, {"result": call.result[:-1]}, {"pairs": ()}]
    wrong += [{"sizes": (-1, 70)}, {"sizes": (huge, 70)}, {"sizes": (8, huge)}]
    wrong += [{"dtypes": (7, 0)}, {"dtypes": (0, -1)}, {"level": 9}, {"level": 0}]
    for at in wrong:
        with pytest.raises(ValueError, match="too small for the tile"):
            call.made({}, **at)
    wrong_pairs: list[object] = [[], (1,), tuple(range(7))]
    for no_pair in wrong_pairs:
        with pytest.raises(TypeError):
            call.made(pairs=(no_pair,))
    with pytest.raises(ValueError, match="too small"):
        pack_factor(call.stored[:-1], "BF16", (8, 70))


def test_buffers_that_are_too_small_for_a_pair_are_refused() -> None:
    call, huge = KernelCall(), 2**62
    wrong: list[dict[str, Any]] = [{"left": call.left[:-1]}, {"right": call.right[:-1]}]
    wrong += [{"rank": 0}, {"block": 0}, {"rank": huge}, {"rank": -3}, {"rank": 4}]
    for own in wrong:
        for pairs in ([own], [own, {}], [{}, own]):
            with pytest.raises(ValueError, match="too small for a pair"):
                call.made(*pairs)
    with pytest.raises(ValueError, match="too small for a pair"):
        call.made({"rounds": True}, double=True)


def test_sums_have_room_for_all_sampled_rows() -> None:
    call, huge = KernelCall(), 2**62
    sums = torch.full((15,), -1.0, dtype=torch.float64)
    room, odd = view(sums), view(torch.zeros(16, dtype=torch.float64))[1:]
    assert call.made({"sums": room}, sampled=(2, 4)) == 1
    assert (sums[:5] == -1).all()  # row 0 is not in a tile that begins with row 2
    assert (sums[5:] > -1).all()
    wrong: list[tuple[Any, tuple[int, int]]] = [(room[:-1], (2, 4)), (room, (9, 4)), (room, (2, 3)), (room, (2, -4))]
    wrong += [(room, (-1, 4)), (room, (huge, 4)), (room, (2, huge)), (odd, (2, 4)), (room, (2, 0))]
    for own, sampled in wrong:
        for pairs in ([{"sums": own}], [{"sums": own}, {}], [{}, {"sums": own}]):
            with pytest.raises(ValueError, match="out of its range"):
                call.made(*pairs, sampled=sampled)
    with pytest.raises((TypeError, BufferError)):
        call.made({"sums": bytes(120)}, sampled=(2, 4))


def chain_of(
    recipe: Recipe, count: int, level: int, *, is_summed: bool
) -> tuple[torch.Tensor, PairChain, list[torch.Tensor]]:
    """Return a base, a chain, and its deltas in compute dtype; sums are exact, so that their order does not matter."""
    base = (values(recipe)[0] * 8).round().to(DTYPES[recipe.stored]) / 8
    compute, pairs, deltas = torch.float64 if recipe.is_double else torch.float32, [], []
    for place in range(count):
        _, left, right = values(recipe, seed=place)
        left, right = (left * 4).round() / 4, (right * 8).round() / 64
        left[min(place, recipe.rows - 1)] = 0
        pairs.append(PairKernel(recipe, 2, 1.25 - place, *packed(recipe, left, right), level=level))
        deltas.append((left.to(compute) @ right.to(compute).T) * (1.25 - place))
    return base, PairChain(pairs, rounds_between=not is_summed), deltas


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("is_summed", [False, True])
def test_several_pairs_in_one_pass_are_the_formula(
    is_summed: bool, count: int, stored: str, result: str, is_double: bool, level: int
) -> None:
    for rows, columns, stride in ((29, 331, 3), (7, 64, 1), (1, 5, 1)):
        recipe = make_recipe(rows, columns, 3, stored, result=result, is_double=is_double)
        recipe = replace(recipe, rounds_delta=not is_double and not is_summed)
        base, chain, deltas = chain_of(recipe, count, level, is_summed=is_summed)
        compute = torch.float64 if is_double else torch.float32
        expected, sums, now = [], [], base.to(compute)
        for given in [torch.stack(deltas).sum(0)] if is_summed else deltas:
            delta = given.to(DTYPES[result]).to(compute) if recipe.rounds_delta else given
            after = now + delta
            stored_after = after.to(DTYPES[result])
            expected.append((now, after, stored_after))
            sums.append(torch.full((-(-rows // stride), 5), float("nan"), dtype=torch.float64))
            now = stored_after.to(compute)
        found = torch.empty(base.shape, dtype=DTYPES[result])
        tallies = [RowSums(own.view(-1).numpy().data, 0, stride) for own in sums]
        flags = chain.merge(view(base), view(found), (0, rows), finds_changes=True, tallies=tallies)
        changes = [not torch.equal(now, before.to(now.dtype)) for before, _, now in expected]
        assert flags == (any(changes), False)
        assert any(changes) == (rows > 1)
        assert raw(found) == raw(expected[-1][2])
        for own, (before, after, stored_after) in zip(sums, expected, strict=True):
            old = before.to(DTYPES[result]).double()
            delta, applied = (after - before).double(), stored_after.double() - old
            wanted = [delta != 0, applied != 0, delta**2, applied**2, (applied - delta) ** 2]
            whole = torch.stack([part.double().sum(1) for part in wanted], 1)[::stride]
            torch.testing.assert_close(own, whole, rtol=1e-12, atol=0)  # of some hundred float64, in another order


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
def test_one_pair_that_changes_something_is_enough(is_double: bool, level: int) -> None:
    recipe = make_recipe(9, 70, 2, "F32", is_double=is_double)
    base, left, right = torch.ones(9, 70), torch.zeros(9, 2), torch.ones(70, 2)
    left[8, 1] = 1.0
    factors = packed(recipe, left, right)
    there, back = (PairKernel(recipe, 2, scaling, *factors, level=level) for scaling in (1.0, -1.0))
    nothing = PairKernel(recipe, 2, 0.0, *factors, level=level)
    cases = [((there, back), True, True), ((there, back), False, False), ((nothing, nothing), True, False)]
    cases += [((nothing, there), True, True), ((there, nothing), True, True), ((nothing, there), False, True)]
    for pairs, rounds_between, wanted in cases:
        found = torch.empty_like(base)
        chain = PairChain(pairs, rounds_between=rounds_between)
        assert chain.merge(view(base), view(found), (0, 9), finds_changes=True) == (wanted, False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("is_summed", [False, True])
def test_what_overflows_on_the_way_is_left_to_the_other_path(
    is_summed: bool, result: str, is_double: bool, level: int
) -> None:
    recipe = make_recipe(9, 70, 2, result, is_double=is_double)
    base, left, right = torch.ones(9, 70).to(DTYPES[result]), torch.zeros(9, 2), torch.ones(70, 2)
    left[8, 1] = torch.finfo(DTYPES[result]).max
    factors = packed(recipe, left, right)
    there, back = (PairKernel(recipe, 2, scaling, *factors, level=level) for scaling in (2.0, -2.0))
    found = torch.empty_like(base)
    chain = PairChain((there, back), rounds_between=not is_summed)
    _, needs_care = chain.merge(view(base), view(found), (0, 9), finds_changes=True)
    # as a sum it is not infinite in float64, nor in float32 but where that is the result's dtype
    assert needs_care == (not is_summed or (result != "F16" and not is_double))


def test_in_place_has_the_same_bits() -> None:
    recipe = make_recipe(50, 130, 6)
    base, left, right = values(recipe)
    expected, _, _ = merged(recipe, (base, left, right))
    factors = packed(recipe, left, right)
    pair = PairKernel(recipe, 6, 1.3, *factors)
    own = base.clone()
    pair.merge(view(own), view(own), (0, 50), finds_changes=False)
    assert raw(own) == raw(expected)
    wider = PairKernel(replace(recipe, result="F32"), 6, 1.3, *factors)
    with pytest.raises(ValueError, match="too small"):
        wider.merge(view(own), view(own), (0, 50), finds_changes=False)


def test_the_compiled_file_is_told(tmp_path: Path) -> None:
    from rawmerge.native import library_path

    path = library_path()
    assert path is not None
    assert path.stat().st_size > 1000
