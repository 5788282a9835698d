"""What becomes of modules whose place is known: their kind's plans, as updates in the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rawmerge.errors import PlanError, Problem, UnsupportedAdapterError
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.module_order import registration_order
from rawmerge.matching.module_tensors import ModuleTensors
from rawmerge.matching.naming import NameResolver, Resolution
from rawmerge.matching.places import Place, whole
from rawmerge.matching.square_layout import SquareLayout
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_plan import Update
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.interface import (
    BASE_WEIGHT,
    AdapterKind,
    MissingTensorError,
    Peer,
    PlannedUpdate,
    Shape,
    ShapeMismatchError,
    TargetModule,
    UnmergeableError,
)


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """A module's tensors and where its weight lies."""

    tensors: ModuleTensors
    place: Place


class ModuleRecorder:
    """Writes the updates of placed modules into the ledger.

    Args:
        ledger: where they go.
        resolver: knows the base's names.
        unmatched: makes the problems of parameters that the base lacks.
        shared: role to tensor of those that all modules share.
        tied_dtype: storage dtype of the tensor that a place not on disk is tied to.
    """

    def __init__(
        self,
        ledger: Ledger,
        resolver: NameResolver,
        unmatched: Unmatched,
        shared: Mapping[str, AdapterTensorName],
        tied_dtype: str,
    ) -> None:
        self._ledger = ledger
        self._resolver = resolver
        self._unmatched = unmatched
        self._shared = shared
        self._tied_dtype = tied_dtype
        self._config = ledger.adapter.config
        self._kind: AdapterKind = ADAPTER_KINDS[self._config.kind]
        self._is_forced = False
        self._told: set[str] = set()

    def record(self, placed: list[PlacedModule], *, is_forced: bool) -> None:
        """Record what becomes of all modules, and of the tensors that they share.

        Args:
            placed: the modules of the adapter.
            is_forced: whether to merge in spite of doubts.
        """
        self._is_forced = is_forced
        deltas = [self._delta_shape(one.tensors) for one in placed]
        seen = [
            (one.tensors.module_path, one.place, delta, one.tensors.is_embedding)
            for one, delta in zip(placed, deltas, strict=True)
        ]
        layout = SquareLayout(self._ledger.base.config, self._config, seen)
        peers = [
            Peer(
                path=one.tensors.module_path,
                shapes=self._shapes(one.tensors),
                base_shape=self._ledger.place_shape(one.place),
                is_transposed=one.tensors.is_embedding
                or layout.orientation(one.tensors.module_path, one.place, self._ledger.place_shape(one.place), delta),
            )
            for one, delta in zip(placed, deltas, strict=True)
        ]
        used: dict[str, list[Place]] = {}
        for one, peer in zip(placed, peers, strict=True):
            for role in self._record(one, self._target_module(one, peer, peers)):
                used.setdefault(role, []).append(one.place)
        self._account_shared(used)

    def _target_module(self, one: PlacedModule, peer: Peer, peers: list[Peer]) -> TargetModule:
        config, path = self._config, peer.path
        bias = self._ledger.base.tensors.get(_bias_name(one.place))
        sources = {role: self._ledger.source(name) for role, name in {**self._shared, **one.tensors.names}.items()}
        return TargetModule(
            path=path,
            shapes=peer.shapes,
            shared={role: sources[role].shape for role in self._shared},
            dtypes={role: source.dtype for role, source in sources.items()},
            base_shape=peer.base_shape,
            base_dtype=self._base_dtype(one.place),
            bias_shape=bias.shape if bias and one.place.is_whole else None,
            is_transposed=peer.is_transposed,
            rank=config.rank_of(one.tensors.owner_path),
            alpha=config.alpha_of(one.tensors.owner_path),
            scaling=config.scaling_of(one.tensors.owner_path),
            rounds_delta=self._is_expert(one.place),
            is_embedding=one.tensors.is_embedding,
            values=config.values,
            peers=peers,
            peft_version=config.peft_version,
            is_forced=self._is_forced,
            is_stored_whole=self._ledger.is_stored(one.place.name),
            is_attention=one.tensors.is_attention,
            is_inner=one.tensors.is_inner,
            order=lambda: registration_order(self._ledger.base.config, [peer.path for peer in peers]),
        )

    def _base_dtype(self, place: Place) -> str:
        known = self._ledger.base.tensors.get(place.name)
        return known.dtype if known else self._tied_dtype

    def _shapes(self, module: ModuleTensors) -> Mapping[str, Shape]:
        return {role: self._ledger.source(name).shape for role, name in module.names.items()}

    def _record(self, one: PlacedModule, module: TargetModule) -> set[str]:
        """Record what becomes of a module; return the roles that it used."""
        try:
            planned = list(self._kind.plan(module))
        except (MissingTensorError, ShapeMismatchError) as error:
            self._ledger.problems.add(PlanError, [self._shape_problem(one, error)])
            return set()
        except UnmergeableError as error:
            problem = Problem(one.tensors.first, error.expected, error.found, error.hint)
            self._ledger.problems.add(UnsupportedAdapterError, [problem])
            return set()
        if problems := list(self._uncovered(one.tensors, planned)):
            self._ledger.problems.add(PlanError, problems)
            return set()
        for update in planned:
            self._record_update(one, update)
        for role, name in one.tensors.names.items():
            if role in self._kind.ignored:
                self._ledger.account([name], "ignored", one.place, self._kind.ignored[role])
        if one.tensors.is_embedding or module_of(one.place.name) in INPUT_EMBEDDINGS:
            self._ledger.embeddings.add(one.place.name)
        return {role for update in planned for role in update.roles}

    def _shape_problem(self, one: PlacedModule, error: MissingTensorError | ShapeMismatchError) -> Problem:
        if isinstance(error, MissingTensorError):
            hint = "the file is incomplete; save the adapter again"
            return Problem(one.tensors.first, f"its partner {self._part_of(error.role)}", "none", hint)
        return Problem(self._subject(error.role, one), error.expected, error.found, error.hint)

    def _subject(self, role: str, one: PlacedModule) -> str:
        name = one.tensors.names.get(role) or self._shared.get(role)
        return name.text if name else one.place.name

    def _part_of(self, role: str) -> str:
        parts = {**self._kind.parts, **self._kind.shared}
        return next((part for part, known in parts.items() if known == role), role)

    def _uncovered(self, module: ModuleTensors, planned: Iterable[PlannedUpdate]) -> Iterator[Problem]:
        """Yield a problem for each tensor that no update uses: nothing may be dropped."""
        used = {role for update in planned for role in update.roles}
        for role, name in module.names.items():
            if role not in used and role not in self._kind.ignored:
                expected = f"a tensor that a merge of {self._kind.title} uses here"
                yield Problem(name.text, expected, "one that it does not", "the config may belong to another adapter")

    def _record_update(self, one: PlacedModule, planned: PlannedUpdate) -> None:
        own = [one.tensors.names[role] for role in planned.roles if role in one.tensors.names]
        place: Place | None = one.place
        if planned.parameter != "weight":
            place = self._beside(one, planned)
        elif not one.place.is_whole and planned.method not in self._kind.in_parts:
            expected = f"one whole base tensor, for {self._kind.title} is not merged into a part of one"
            self._ledger.problems.add(PlanError, [Problem(one.tensors.first, expected, f"a part of {one.place.name}")])
            return
        if place is None:
            return
        sources = {role: self._source(role, one) for role in planned.roles}
        update = Update(
            planned.method, sources, planned.settings, reach=planned.reach, working_bytes=planned.working_bytes
        )
        self._ledger.update_place(place, update)
        # a tensor that changes weight and bias is told of once
        self._ledger.account([name for name in own if name.text not in self._told], "updates", place)
        self._told.update(name.text for name in own)

    def _source(self, role: str, one: PlacedModule) -> TensorSource:
        if role == BASE_WEIGHT:
            return self._ledger.base.tensors[one.place.name]
        return self._ledger.source(one.tensors.names.get(role) or self._shared[role])

    def _beside(self, one: PlacedModule, planned: PlannedUpdate) -> Place | None:
        """Return the place of a module's other parameter: beside its weight, for towers may share names."""
        subject = one.tensors.first
        for role in planned.roles:  # the tensor that is about this parameter alone names it best
            name = one.tensors.names.get(role)
            if name and name.parameter == planned.parameter:
                subject = name.text
        beside = f"{one.place.name.removesuffix('weight')}{planned.parameter}"
        base = self._ledger.base.tensors.get(beside)
        if base is None or not one.place.is_whole:
            target = f"{one.tensors.module_path}.{planned.parameter}"
            what = f"that this {planned.parameter} is added to"
            self._ledger.problems.add(PlanError, [self._unmatched.problem(subject, target, Resolution(None), what)])
            return None
        place = whole(beside, base.shape)
        if problem := self._unmatched.dtype_problem(place) or self._ledger.claim(place, subject):
            self._ledger.problems.add(PlanError, [problem])
            return None
        return place

    def _account_shared(self, used: Mapping[str, list[Place]]) -> None:
        for role, name in self._shared.items():
            if role in used:
                pieces = tuple(piece for place in used[role] for piece in place.pieces)
                self._ledger.account([name], "updates", Place((), pieces))
            elif role in self._kind.ignored:
                self._ledger.account([name], "ignored", name.text, self._kind.ignored[role])
            elif used or not self._ledger.problems.errors:
                expected = f"a shared tensor that a module of this {self._kind.title} adapter uses"
                problem = Problem(name.text, expected, "one that none does", "nothing may be dropped")
                self._ledger.problems.add(PlanError, [problem])

    def _delta_shape(self, module: ModuleTensors) -> Shape | None:
        return self._kind.delta_shape(self._shapes(module), self._config.values)

    def _is_expert(self, place: Place) -> bool:
        """Whether transformers holds the tensor in a fused parameter, to which PEFT adds a rounded delta."""
        names = self._resolver.names
        canonical = names.family.canonical(place.name)
        if place.pieces[0].expert >= 0 or names.family.fused_place(canonical):
            return True
        # PEFT turns a pair on the router of such experts into one on its bare parameter
        layer, _, router = canonical.rpartition(".gate.")
        beside = names.places.get(f"{layer}.experts.gate_up_proj", ())
        return router == "weight" and any(not place.is_whole for place in beside)


def _bias_name(place: Place) -> str:
    return f"{place.name.removesuffix('weight')}bias"
