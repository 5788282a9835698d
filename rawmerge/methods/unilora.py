"""Uni-LoRA: W + B @ A, whose elements all come from one short vector for the whole model.

Source: PEFT 0.21.2 `tuners/unilora/layer.py`: `Linear._get_lora_matrices`, `get_delta_weight` and
`UniLoraLayer.update_scaling` (scales are rounded to the base's dtype); `tuners/unilora/model.py`: `generate_index` and
`_assign_unilora_indices_and_scales`, for adapters that do not hold the places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.errors import MergeError
from rawmerge.formats.kind_fields import KindFields, switch, whole_number
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    Peer,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.randomness import matrix_of_linear
from rawmerge.methods.registration import registered_peers

if TYPE_CHECKING:
    import torch

_SAVED: Final = ("indices_A", "indices_B", "scales_A", "scales_B")


class UniloraMethod:
    """The delta of one module, as a LoRA pair."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; places and scales are drawn where they are not among the tensors.

        Raises:
            MergeError: a stored place is none of the vector's.
        """
        vector = tensors["vector"].to(context.compute_dtype)
        saved = {role: tensors[role] for role in _SAVED if role in tensors} or _drawn(settings, context)
        pair = {}
        for half in ("A", "B"):
            places = saved[f"indices_{half}"].long()
            _check(places, half, len(vector))
            pair[half] = vector[places] * saved[f"scales_{half}"].to(context.compute_dtype)
        return PreparedLora(pair["A"], pair["B"], 1.0, bool(settings["is_transposed"]), None)


def _check(places: torch.Tensor, half: str, length: int) -> None:
    lowest, highest = int(places.min()), int(places.max())
    if lowest < 0 or highest >= length:
        found = f"{lowest} to {highest}"
        raise MergeError(f"'unilora_indices_{half}': expected places from 0 to {length - 1}, found {found}")


def _drawn(settings: Mapping[str, Setting], context: TileContext) -> dict[str, torch.Tensor]:
    """Return places and scales of one module: A (rank, in), then B (out, rank) of all modules' places."""
    total, length, seed, first, rank = (int(number(settings, name)) for name in _NUMBERS)
    places, scales = _draw(total, length, seed)
    outputs, inputs = context.shape[::-1] if settings["is_transposed"] else context.shape
    rounded = scales.to(context.base_dtype)
    halves = {}
    for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        halves[f"indices_{half}"] = places[first : first + shape[0] * shape[1]].view(shape)
        halves[f"scales_{half}"] = rounded[halves[f"indices_{half}"]]
        first += shape[0] * shape[1]
    return halves


_NUMBERS: Final = ("total", "length", "seed", "first", "rank")


@lru_cache(maxsize=1)  # all modules of an adapter share them
def _draw(total: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place of each element (total,) int64, and the scale of each place (length,) float32.

    numpy's streams may change between its versions; tests hold this one to literal values.
    """
    import numpy as np
    import torch

    generator = np.random.default_rng(seed)
    drawn = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        drawn = np.concatenate([drawn, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(drawn)
    places = torch.as_tensor(drawn, dtype=torch.long)
    counts = torch.bincount(places, minlength=length)
    return places, torch.where(counts > 0, counts.float().rsqrt(), 0.0)


class UniloraKind(AdapterKind):
    """UNILORA, LoRA out of one vector."""

    peft_type: ClassVar[str] = "UNILORA"
    title: ClassVar[str] = "Uni-LoRA"
    formula: ClassVar[str] = "W + B@A, elements c·θ[place]"
    parts: ClassVar[Mapping[str, str]] = {f"unilora_{role}": role for role in _SAVED}
    shared: ClassVar[Mapping[str, str]] = {"unilora_theta_d": "vector"}
    integers: ClassVar[tuple[str, ...]] = ("indices_A", "indices_B")
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(4, 1),
            "theta_d_length": whole_number(256, 1),
            "proj_seed": whole_number(42, 0, 2**63),
            "save_indices": switch(False),
        },
        ignored=("unilora_dropout", "init_theta_d_bound", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"unilora": UniloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in), where the places are stored."""
        left, right = shapes.get("indices_B", ()), shapes.get("indices_A", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def needs_all_targets(self, values: Mapping[str, Any]) -> bool:
        """Whether places are drawn, for all modules together."""
        return not values["save_indices"]

    def has_bare_targets(self, values: Mapping[str, Any]) -> bool:
        """Whether places are drawn: then the file holds the vector alone."""
        return not values["save_indices"]

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        values, (rows, columns) = module.values, matrix_of_linear(module)
        rank = values["r"]
        module.expect("vector", values["theta_d_length"])
        settings: dict[str, Setting] = {"is_transposed": module.needs_transpose}
        working = 16 * rank * (rows + columns)
        if values["save_indices"] or "indices_A" in module.shapes:
            for kind in ("indices", "scales"):
                module.expect(f"{kind}_A", rank, columns)
                module.expect(f"{kind}_B", rows, rank)
            for role in self.integers:
                if module.dtypes[role] not in ("I32", "I64"):
                    module.refuse(role, "dtype I32 or I64", module.dtypes[role])
            yield PlannedUpdate("unilora", (*_SAVED, "vector"), settings, working_bytes=working)
            return
        if rank > max(rows, columns):
            raise UnmergeableError(f"r of at most {max(rows, columns)}, for as many places are drawn", f"{rank}")
        before, total = _counts(module)
        settings |= {"total": total, "first": before, "rank": rank}
        settings |= {"length": values["theta_d_length"], "seed": values["proj_seed"]}
        drawn = 24 * total + 24 * values["theta_d_length"]
        yield PlannedUpdate("unilora", ("vector",), settings, working_bytes=working + drawn)


def _counts(module: TargetModule) -> tuple[int, int]:
    """Return how many elements all modules registered before this one have, and how many all have."""
    peers = registered_peers(module)
    sizes = [_size(peer, module.values["r"]) for peer in peers]
    place = next(place for place, peer in enumerate(peers) if peer.path == module.path)
    return sum(sizes[:place]), sum(sizes)


def _size(peer: Peer, rank: int) -> int:
    return rank * sum(peer.matrix_shape)
