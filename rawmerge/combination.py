"""How a plan tells that deltas of several adapters become one in another way than by their sum.

A step has one update of the kind `COMBINATION` then. Its tensors and settings are those of the adapters' own updates,
under names that begin with the adapter's place and the update's, both from 0: `1/0/lora_a` plays `lora_a` in the first
update of the second adapter, and `1/weight` is that adapter's weight.

Source: PEFT 0.21.2 `tuners/lora/model.py`: `_svd_generalized_task_arithmetic_weighted_adapter`, which combines deltas
so before it takes their singular values, and the functions of `utils/merge_utils.py` that it calls. What PEFT does to
factors is an update of the kind `combined_lora`, on the same names without the update's place.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final, TypeVar

from rawmerge.engine.tiles import Matrix, block_elements
from rawmerge.errors import Problem
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_options import COMBINATIONS, MAJORITY_SIGNS
from rawmerge.merge_plan import COMBINATION, ROUNDING, WINDOWS, ReplaceTensor, Setting, Update, UpdateTensor, matrix_of
from rawmerge.methods import combined_lora, lora
from rawmerge.methods.interface import COLUMNS, ROWS, WHOLE, number
from rawmerge.window import Window

_KIND: Final = "kind"
_WINDOW: Final = WINDOWS.removeprefix("/")
#: Blocks of one dtype that a thread holds beside those of all deltas: where signs are elected, where deltas are pruned,
#: and where they are only summed.
_ELECTION_BLOCKS: Final = 7
_PRUNING_BLOCKS: Final = 6
_SUM_BLOCKS: Final = 2
#: What a pass over magnitudes takes: its counts, and bytes for each element that is looked at, with what the allocator
#: keeps of it.
_COUNTS_BYTES: Final = 3 * 8 * 2**16
_LOOK_BYTES: Final = 44
#: What importing numpy's random numbers takes, and a block of them.
_RANDOM_BYTES: Final = 8 * 10**6
#: What combining factors takes for each of their elements: the stack, its product, signs and masks, the result.
_FACTOR_BYTES: Final = 32

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter's part in a tensor.

    Attributes:
        place: the adapter's among those that are combined, from 0.
        weight: by what its delta is multiplied once it is pruned.
        updates: what adds up to the delta; the base does not enter.
    """

    place: int
    weight: float
    updates: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Combination:
    """How a tensor's deltas become one.

    Attributes:
        how: a key of `COMBINATIONS`.
        density: the share of a delta's elements that is kept; 0 where none is pruned.
        majority_sign: one of `MAJORITY_SIGNS`.
        seed: of the elements that are kept by chance.
        tensor: the output tensor's name, on which chance depends.
        count: of the adapters that are combined, with those that leave the tensor alone.
        tasks: of those that change it, in the order in which they are named.
    """

    how: str
    density: float
    majority_sign: str
    seed: int
    tensor: str
    count: int
    tasks: tuple[Task, ...]

    @property
    def prunes_by_magnitude(self) -> bool:
        """Whether only a delta's largest elements are kept."""
        return self.how in ("magnitude", "ties") and self.density < 1

    @property
    def prunes_by_chance(self) -> bool:
        """Whether chance decides which elements of a delta are kept."""
        return self.how in ("dare", "dare-ties") and self.density < 1

    @property
    def elects_signs(self) -> bool:
        """Whether elements with another sign than most have are left out."""
        return "majority_sign" in COMBINATIONS[self.how]

    def kept_of(self, count: int) -> int:
        """Return how many of so many elements are kept at least where their magnitude decides; PEFT keeps as many."""
        return int(self.density * count)

    @property
    def updates(self) -> Iterator[Update]:
        """All updates of all adapters."""
        return (update for task in self.tasks for update in task.updates)


def combined(step: UpdateTensor, combination: Combination) -> UpdateTensor:
    """Return a step with the one update that a combination is; what else it has stays."""
    settings: dict[str, Setting] = {
        "combine": combination.how,
        "density": combination.density,
        "majority_sign": combination.majority_sign,
        "seed": combination.seed,
        "tensor": combination.tensor,
        "count": combination.count,
    }
    tensors: dict[str, TensorSource] = {}
    for task in combination.tasks:
        settings[f"{task.place}/weight"] = task.weight
        for place, update in enumerate(task.updates):
            name = f"{task.place}/{place}/"
            tensors |= {name + role: source for role, source in update.tensors.items()}
            settings |= {name + key: value for key, value in _settings(update).items()}
    made = replace(step, updates=(Update(COMBINATION, tensors, settings, reach=_reach(combination)),))
    working = _working_bytes(combination, matrix_of(made))
    return replace(made, updates=(replace(made.updates[0], working_bytes=working),))


def combined_factors(step: UpdateTensor, combination: Combination, rank: int) -> UpdateTensor:
    """Return a step with one LoRA in place of those of a combination, which `factors_reason` has nothing against.

    Args:
        step: what is changed.
        combination: one pair for each task.
        rank: of all adapters together.
    """
    first = next(combination.updates)
    settings: dict[str, Setting] = {
        **{name: value for name, value in first.settings.items() if name != "scaling"},
        "combine": combination.how,
        "density": combination.density,
        "majority_sign": combination.majority_sign,
        "rank": rank if combination.how == combined_lora.CAT else first.rank,
    }
    tensors: dict[str, TensorSource] = {}
    for task in combination.tasks:
        (own,) = task.updates
        settings |= {f"{task.place}/weight": task.weight, f"{task.place}/scaling": own.settings["scaling"]}
        tensors |= {f"{task.place}/{role}": source for role, source in own.tensors.items()}
    elements = sum(prod(source.shape) for source in tensors.values())
    made = Update(combined_lora.KIND, tensors, settings, first.window, working_bytes=_FACTOR_BYTES * elements)
    return replace(step, updates=(made,))


def factors_reason(combination: Combination) -> str:
    """Return what keeps the factors of a combination's updates from being combined, empty for nothing."""
    others = [update.kind for update in combination.updates if update.kind != lora.KIND]
    if others:
        return f"an update of the kind {others[0]}, which has not the factors of plain LoRA"
    if any(len(task.updates) > 1 for task in combination.tasks):
        return "several pairs of factors of one adapter"
    layouts = {(update.window, update.settings["is_transposed"], *update.tensors) for update in combination.updates}
    ranks = {update.rank for update in combination.updates}
    if len(layouts) > 1:
        return "pairs for other parts of it, or stored otherwise"
    if combination.how != combined_lora.CAT and len(ranks) > 1:
        return f"pairs of the ranks {' and '.join(map(str, sorted(ranks)))}"
    smallest = min(prod(source.shape) for update in combination.updates for source in update.tensors.values())
    if combination.density and not combination.kept_of(smallest):
        return f"a density of {combination.density:g} on a factor of {smallest} elements, of which it keeps none"
    return ""


def _settings(update: Update) -> dict[str, Setting]:
    at = update.window
    window = (at.row, at.row_count, at.delta_row, at.column, at.column_step, at.column_count) if at else ()
    return {**update.settings, _KIND: update.kind, **({_WINDOW: window} if window else {})}


def _reach(combination: Combination) -> str:
    reaches = {update.reach for update in combination.updates}
    if WHOLE in reaches:
        return WHOLE
    return COLUMNS if combination.prunes_by_magnitude or COLUMNS in reaches else ROWS


def _working_bytes(combination: Combination, matrix: Matrix) -> int:
    whole = max((count for _, count in matrix.tiles()), default=0) * matrix.columns if matrix.has_low else 0
    elements = max(whole, block_elements(matrix.columns))
    looking = (_COUNTS_BYTES + _LOOK_BYTES * elements) * combination.prunes_by_magnitude
    drawing = _RANDOM_BYTES * combination.prunes_by_chance
    return looking + drawing + sum(update.working_bytes for update in combination.updates)


def combination_of(update: Update) -> Combination:
    """Return what an update of the kind `COMBINATION` stands for.

    Its updates have the reach of all together, and no working memory of their own.

    Raises:
        KeyError, TypeError, ValueError: it is none that this version can compute, as a plan from elsewhere may have.
    """
    settings, tensors = _by_part(update.settings), _by_part(update.tensors)
    parts: dict[int, list[Update]] = {}
    for place, own in sorted(settings.items()):
        parts.setdefault(place[0], []).append(_part(own, tensors.get(place, {}), update.reach))
    tasks = (Task(place, number(update.settings, f"{place}/weight"), tuple(own)) for place, own in parts.items())
    return Combination(
        how=_choice(update, "combine", COMBINATIONS),
        density=number(update.settings, "density"),
        majority_sign=_choice(update, "majority_sign", MAJORITY_SIGNS),
        seed=int(number(update.settings, "seed")),
        tensor=str(update.settings["tensor"]),
        count=int(number(update.settings, "count")),
        tasks=tuple(tasks),
    )


def _by_part(named: Mapping[str, _T]) -> dict[tuple[int, int], dict[str, _T]]:
    """Return what is named for one update of one adapter, by their places."""
    found: dict[tuple[int, int], dict[str, _T]] = {}
    for name, value in named.items():
        task, _, rest = name.partition("/")
        update, _, own = rest.partition("/")
        if own:
            found.setdefault((int(task), int(update)), {})[own] = value
    return found


def _part(settings: Mapping[str, Setting], tensors: Mapping[str, TensorSource], reach: str) -> Update:
    own = {name: value for name, value in settings.items() if name not in (_KIND, _WINDOW)}
    window = settings.get(_WINDOW)
    if window is not None and not isinstance(window, tuple):
        raise TypeError(f"a window must be numbers, not {window!r}")
    return Update(str(settings[_KIND]), tensors, own, Window(*window) if window else None, reach)


def _choice(update: Update, name: str, choices: Iterable[str]) -> str:
    value = str(update.settings[name])
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, not {value!r}")
    return value


def parts_of(update: Update) -> Iterator[Update]:
    """Yield the updates that a combination is made up of, or another update itself."""
    if update.kind == COMBINATION:
        yield from combination_of(update).updates
    else:
        yield update


def block_count(step: UpdateTensor | ReplaceTensor) -> int:
    """Return how many blocks a thread holds for a step's combination beside those of any step; 0 where it has none."""
    updates = step.updates if isinstance(step, UpdateTensor) else ()
    mixes = [combination_of(update) for update in updates if update.kind == COMBINATION]
    return max((len(mix.tasks) + _blocks_beside(mix) for mix in mixes), default=0)


def _blocks_beside(mix: Combination) -> int:
    if mix.elects_signs:
        return _ELECTION_BLOCKS
    return _PRUNING_BLOCKS if mix.prunes_by_magnitude or mix.prunes_by_chance else _SUM_BLOCKS


def update_problems(step: UpdateTensor, known: Container[str]) -> Iterator[Problem]:
    """Yield what of a step, which may come from a stranger's file, cannot be computed.

    Args:
        step: what is computed.
        known: the kinds of updates that there are, beside those that a plan makes of them.
    """
    for update in step.updates:
        try:
            kinds = [part.kind for part in parts_of(update)] if update.kind != ROUNDING else []
        except (KeyError, TypeError, ValueError) as error:
            yield Problem(step.entry.name, "a combination that can be computed", str(error)[:200])
        else:
            unknown = (kind for kind in kinds if kind not in known)
            yield from (Problem(step.entry.name, "an update that can be computed", kind) for kind in unknown)
