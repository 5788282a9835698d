"""LoRA pairs on modules: each to the disk tensors that hold the module's weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rawmerge.dtypes import DTYPES
from rawmerge.errors import AdapterError, PlanError, Problem
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.matching.expert_matching import ExpertMatcher
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.lora_pairs import LoraPair, group_pairs, half_problem
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place, whole
from rawmerge.matching.tied_embeddings import Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_plan import Setting
from rawmerge.methods import METHODS, lora
from rawmerge.methods.interface import ModuleFacts, ShapeMismatchError, number


class LoraMatcher:
    """Writes the updates of all LoRA pairs into the ledger."""

    def __init__(
        self, ledger: Ledger, resolver: NameResolver, unmatched: Unmatched, tie: Tie | None, layout: str
    ) -> None:
        self._ledger = ledger
        self._resolver = resolver
        self._unmatched = unmatched
        self._tie = tie
        self._experts = ExpertMatcher(ledger, resolver, unmatched, layout)

    def match(self, names: Iterable[AdapterTensorName]) -> None:
        """Record the updates of the pairs that these tensors form."""
        pairs = list(self._whole_pairs(names))
        on_modules = self._experts.match(pairs)
        targets = [Target(f"{pair.module_path}.weight", self._fit(pair)) for pair in on_modules]
        resolutions = self._resolver.resolve(targets)
        places = [
            (pair, self._place(pair, resolutions[target.name]))
            for pair, target in zip(on_modules, targets, strict=True)
        ]
        placed = [(pair, place) for pair, place in places if place]
        layout = SquareLayout(self._ledger, placed)
        for pair, place in placed:
            self._record(pair, place, layout)

    def _whole_pairs(self, names: Iterable[AdapterTensorName]) -> Iterator[LoraPair]:
        for pair in group_pairs(names):
            problem = half_problem(pair) or self._dtype_problem(pair)
            if problem:
                self._ledger.problems.add(AdapterError, [problem])
            else:
                yield pair

    def _dtype_problem(self, pair: LoraPair) -> Problem | None:
        for name in pair.names.values():
            dtype = self._ledger.source(name).dtype
            if not DTYPES[dtype].is_mergeable:
                return Problem(name.text, "a plain float dtype (F64, F32, BF16, F16)", dtype)
        return None

    def _fit(self, pair: LoraPair) -> _Fit:
        return _Fit(self._ledger, pair)

    def _place(self, pair: LoraPair, resolution: Resolution) -> Place | None:
        target = f"{pair.module_path}.weight"
        place = resolution.place
        if place is None and not resolution.candidates and self._tie:
            place = self._tie.place_of(self._resolver.names.family.canonical(target), self._ledger)
        problem = None
        if place is None and pair.depth:  # a base may have wrappers of its own in its names
            own = f"{pair.module_path}{'.base_layer' * pair.depth}.weight"
            place = self._resolver.resolve([Target(own, self._fit(pair))])[own].place
            pair.depth = 0 if place else pair.depth
        if place is None:
            problem = self._unmatched.problem(pair.first, target, resolution, "for this pair")
        elif pair.depth:
            expected = "target_parameters that name the parameters of this module"
            problem = Problem(pair.first, expected, "a nested pair on a module of one weight")
        else:
            tied_dtype = self._ledger.base.tensors[self._tie.input].dtype if self._tie else "F32"
            problem = self._unmatched.dtype_problem(place, tied_dtype) or self._ledger.claim(place, pair.first)
        if problem:
            self._ledger.problems.add(PlanError, [problem])
            return None
        return place

    def _record(self, pair: LoraPair, place: Place, layout: SquareLayout) -> None:
        try:
            settings = self._settings(pair, place, layout)
        except ShapeMismatchError as error:
            subject = pair.names[error.role].text if error.role in pair.names else place.name
            self._ledger.problems.add(PlanError, [Problem(subject, error.expected, error.found, error.hint)])
            return
        tensors = {name.role: self._ledger.source(name) for name in pair.factors}
        self._ledger.update_place(place, lora.KIND, tensors, settings)
        if pair.is_embedding:
            self._ledger.embeddings.add(place.name)
        self._ledger.account(pair.factors, "updates", place)
        if bias := pair.names.get("lora_b_bias"):
            self._record_bias(bias, place, number(settings, "scaling"))

    def _settings(self, pair: LoraPair, place: Place, layout: SquareLayout) -> Mapping[str, Setting]:
        config = self._ledger.adapter.config
        facts = ModuleFacts(
            base_shape=self._ledger.place_shape(place),
            rank=config.rank_of(pair.module_path),
            scaling=config.scaling_of(pair.module_path),
            square_is_transposed=layout.is_transposed(pair.module_path, place),
            rounds_delta=self._is_expert(place),
        )
        shapes = {name.role: self._ledger.source(name).shape for name in pair.factors}
        return METHODS[lora.KIND].settings(shapes, facts)

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

    def _record_bias(self, name: AdapterTensorName, weight: Place, scaling: float) -> None:
        """Record the pair's bias: it goes where the pair's weight went, for another tower may have one of its name."""
        beside = f"{weight.name.removesuffix('.weight')}.bias"
        source, base = self._ledger.source(name), self._ledger.base.tensors.get(beside)
        if base is None or not weight.is_whole:
            lacking = self._unmatched.problem(name.text, name.target, Resolution(None), "that this bias is added to")
            self._ledger.problems.add(PlanError, [lacking])
            return
        place = whole(beside, base.shape)
        problem = self._unmatched.dtype_problem(place) or self._ledger.claim(place, name.text)
        if source.shape != place.shape or len(source.shape) != 1:
            problem = Problem(name.text, f"the base's shape {list(place.shape)}", f"{list(source.shape)}")
        if problem:
            self._ledger.problems.add(PlanError, [problem])
            return
        self._ledger.update_place(place, "lora_bias", {"bias": source}, {"scaling": scaling})
        self._ledger.account([name], "updates", place)


class _Fit:
    """Whether a place can take a pair's delta, by shape."""

    def __init__(self, ledger: Ledger, pair: LoraPair) -> None:
        shape_a, shape_b = (ledger.source(name).shape for name in pair.factors)
        self._ledger = ledger
        self._delta = (shape_b[0], *shape_a[1:]) if shape_a and shape_b else ()
        self._is_embedding = pair.is_embedding

    def __call__(self, place: Place) -> bool:
        shape = self._ledger.place_shape(place)
        if self._is_embedding or place.is_transposed:
            return shape == self._delta[::-1]
        if place.is_transposed is not None or len(self._delta) != 2:
            return shape == self._delta
        return shape in (self._delta, self._delta[::-1])


class SquareLayout:
    """Which square weights are stored (in, out): by family, else by what modules of the same name show.

    PEFT's `fan_in_fan_out` flag is that of the module it visited last, so it says nothing of the others.
    """

    def __init__(self, ledger: Ledger, placed: Iterable[tuple[LoraPair, Place]]) -> None:
        self._config = ledger.base.config
        self._flag = ledger.adapter.config.fan_in_fan_out
        self._seen: dict[str, set[bool]] = {}
        for leaf, is_transposed in _seen_layouts(ledger, placed):
            self._seen.setdefault(leaf, set()).add(is_transposed)

    def is_transposed(self, module_path: str, place: Place) -> bool | None:
        """Return whether the module's square weight is stored (in, out); None where nothing tells."""
        if place.is_transposed is not None:
            return place.is_transposed
        leaf = _leaf(module_path)
        if self._config.is_conv1d(leaf):
            return True
        if len(evidence := self._seen.get(leaf, set())) == 1:
            return next(iter(evidence))
        unexplained = any(True in found for name, found in self._seen.items() if not self._config.is_conv1d(name))
        is_linear = self._config.is_of_transformers or not self._flag
        return False if is_linear and not unexplained else None


def _leaf(module_path: str) -> str:
    return module_path.rpartition(".")[2]


def _seen_layouts(ledger: Ledger, placed: Iterable[tuple[LoraPair, Place]]) -> Iterator[tuple[str, bool]]:
    """Yield, for each pair on a weight that is not square, its module's name and whether it is stored (in, out)."""
    for pair, place in placed:
        if pair.is_embedding or place.is_transposed is not None:
            continue
        shape_a, shape_b = (ledger.source(name).shape for name in pair.factors)
        if len(shape_a) == len(shape_b) == 2:
            delta = (shape_b[0], shape_a[1])
            if delta[0] != delta[1] and place.shape in (delta, delta[::-1]):
                yield _leaf(pair.module_path), place.shape == delta[::-1]
