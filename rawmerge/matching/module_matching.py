"""Modules that an adapter changes: each to the disk tensors that hold its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import AdapterError, PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.adapter_fields import LORA, changes_base
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.matching.bare_targets import UnknownTargetsError, bare_targets
from rawmerge.matching.expert_matching import ExpertMatcher
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.module_recorder import ModuleRecorder, PlacedModule
from rawmerge.matching.module_tensors import ModuleTensors, group_by_module, half_problem, lost_biases
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place
from rawmerge.matching.square_layout import lies_as
from rawmerge.matching.tie import Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_options import MergeOptions
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.interface import (
    AdapterKind,
    Shape,
)

_OTHER_BASE: Final = "is this the base the adapter was trained on?"


class ModuleMatcher:
    """Writes the updates of all modules into the ledger."""

    def __init__(
        self, ledger: Ledger, resolver: NameResolver, unmatched: Unmatched, tie: Tie | None, options: MergeOptions
    ) -> None:
        self._ledger = ledger
        self._resolver = resolver
        self._unmatched = unmatched
        self._tie = tie
        self._config = ledger.adapter.config
        self._kind: AdapterKind = ADAPTER_KINDS[self._config.kind]
        self._is_forced = options.force
        self._experts = ExpertMatcher(ledger, resolver, unmatched, options.moe_lora_b_layout)

    def match(self, names: Iterable[AdapterTensorName]) -> None:
        """Record the updates that these tensors, the kind's own, make."""
        names = list(names)
        self._check_dtypes(name for name in names if not name.module_path)
        modules = list(self._whole_modules(name for name in names if name.module_path))
        if self._config.kind == LORA:
            modules = self._experts.match(modules)
            lost = lost_biases(modules) if self._config.lora_bias and not self._config.values["use_bdlora"] else ()
            self._ledger.problems.add(AdapterError, lost)
        if self._kind.has_bare_targets(self._config.values) and not modules:
            modules = self._bare_modules(names)
        targets = {self._target(module): module for module in modules}
        resolutions = self._resolver.resolve([Target(name, _Fit(self, module)) for name, module in targets.items()])
        placed = [
            PlacedModule(module, place)
            for name, module in targets.items()
            if (place := self._place(module, resolutions[name]))
        ]
        tied_dtype = self._ledger.base.tensors[self._tie.input].dtype if self._tie else "F32"
        shared = {name.role: name for name in names if not name.module_path}
        recorder = ModuleRecorder(self._ledger, self._resolver, self._unmatched, shared, tied_dtype)
        recorder.record(placed, is_forced=self._is_forced)

    def _target(self, module: ModuleTensors) -> str:
        """Return the name of the parameter that the module's tensors are about."""
        return f"{module.module_path}.{'in_proj_weight' if module.is_attention else 'weight'}"

    def delta_shape(self, module: ModuleTensors) -> Shape | None:
        """Return what the module's tensors tell of its weight's shape."""
        shapes = {role: self._ledger.source(name).shape for role, name in module.names.items()}
        return self._kind.delta_shape(shapes, self._config.values)

    def base_shape(self, place: Place) -> Shape:
        """Return the shape that updates of a place meet."""
        return self._ledger.place_shape(place)

    # --- which tensors belong together, and where they go ---

    def _whole_modules(self, names: Iterable[AdapterTensorName]) -> Iterator[ModuleTensors]:
        for module in group_by_module(names):
            problem = half_problem(module) if self._config.kind == LORA else None
            if problem:
                self._ledger.problems.add(AdapterError, [problem])
            elif self._check_dtypes(module.names.values()):
                yield module

    def _bare_modules(self, shared: Iterable[AdapterTensorName]) -> list[ModuleTensors]:
        """Return the modules that an adapter without tensors of their own targets."""
        subject = next((name.text for name in shared if name.role not in self._kind.ignored), "")
        if not subject:
            return []
        try:
            paths = bare_targets(self._ledger.base.config, self._config, self._resolver.names)
        except UnknownTargetsError as error:
            self._ledger.problems.add(UnsupportedAdapterError, [error.problem(subject)])
            return []
        return [ModuleTensors(path, 0, subject=subject) for path in paths]

    def _check_dtypes(self, names: Iterable[AdapterTensorName]) -> bool:
        """Refuse tensors of dtypes that their kind does not compute with; return whether there are none."""
        free = {*self._kind.integers, *self._kind.ignored}
        stored = [(name, self._ledger.source(name).dtype) for name in names if name.role not in free]
        expected = "a plain float dtype (F64, F32, BF16, F16)"
        wrong = [Problem(name.text, expected, dtype) for name, dtype in stored if not DTYPES[dtype].is_mergeable]
        self._ledger.problems.add(AdapterError, wrong[:1])
        return not wrong

    def _place(self, module: ModuleTensors, resolution: Resolution) -> Place | None:
        target = self._target(module)
        place = resolution.place
        if place is None and not resolution.candidates and self._tie:
            place = self._tie.place_of(self._resolver.names.family.canonical(target), self._ledger)
        problem = None
        if place is None and module.depth:  # a base may have wrappers of its own in its names
            own = f"{module.module_path}{'.base_layer' * module.depth}.weight"
            place = self._resolver.resolve([Target(own, _Fit(self, module))])[own].place
            module.depth = 0 if place else module.depth
        if place is None:
            problem = self._unmatched.problem(module.first, target, resolution, "for this pair")
        elif module.depth:
            expected = "target_parameters that name the parameters of this module"
            problem = Problem(module.first, expected, "a nested pair on a module of one weight")
        else:
            tied_dtype = self._ledger.base.tensors[self._tie.input].dtype if self._tie else "F32"
            problem = self._unmatched.dtype_problem(place, tied_dtype) or self._fit_problem(module, place)
            problem = problem or self._ledger.claim(place, module.first)
        if problem:
            self._ledger.problems.add(PlanError, [problem])
            return None
        return place

    def _fit_problem(self, module: ModuleTensors, place: Place) -> Problem | None:
        """Return why a module's tensors cannot be about this place, although their shapes or their name allow it."""
        if changes_base(self._config.values) and self._tie and place.name in {self._tie.input, self._tie.output}:
            expected = "a projection of its own, for its initialisation changed the embedding that is tied to it"
            return Problem(module.first, expected, f"{quote(place.name)}, tied to {quote(self._tie.input)}")
        delta, shape, model = self.delta_shape(module), self.base_shape(place), self._ledger.base.config
        is_open = delta is None or len(shape) != 2 or module.is_embedding or place.is_transposed is not None
        if is_open or not model.is_of_transformers or model.is_conv1d(module.module_path.rpartition(".")[2]):
            return None
        if lies_as(delta, shape) == {True}:
            found = f"{quote(place.name)} of shape {list(shape)}, which only its transpose fits"
            return Problem(module.first, f"a weight for a delta of {_shown(delta)}", found, _OTHER_BASE)
        return None


def _shown(delta: Shape | None) -> str:
    return f"({', '.join('any' if size < 0 else str(size) for size in delta or ())})"


class _Fit:
    """Whether a place can take a module's delta, by shape."""

    def __init__(self, matcher: ModuleMatcher, module: ModuleTensors) -> None:
        self._matcher = matcher
        self._delta = matcher.delta_shape(module)
        self._is_embedding = module.is_embedding

    def __call__(self, place: Place) -> bool:
        if self._delta is None:
            return True
        shape = self._matcher.base_shape(place)
        ways = lies_as(self._delta, shape)
        if self._is_embedding or place.is_transposed:
            return True in ways
        return bool(ways) if place.is_transposed is None else False in ways
