"""LoRA on bare parameters: fused experts, on disk as one tensor or as a tensor for each expert.

Source: PEFT 0.21.2 `tuners/lora/layer.py` `ParamWrapper`. Its tensors do not name the parameter: wrappers nest, the
parameter that the module registered first innermost, each further one a `.base_layer` less.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import permutations
from typing import Final

from rawmerge.errors import AdapterError, PlanError, Problem
from rawmerge.formats.adapter_config import matches_target
from rawmerge.formats.adapter_fields import lora_variants
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.module_tensors import ModuleTensors
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_options import GROUPED
from rawmerge.merge_plan import Setting, Update
from rawmerge.methods.expert_lora import ExpertLoraMethod
from rawmerge.methods.interface import ModuleFacts, Shape, ShapeMismatchError
from rawmerge.methods.lora import LoraMethod

KIND: Final = "expert_lora"
#: In this order transformers' expert classes register their parameters.
_REGISTERED: Final = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
#: More bare parameters than this on one module would take too many ways to tell apart.
_MOST_PARAMETERS: Final = 6
_FUSED: Final = ("gate_up_proj", "down_proj")
_VERSION: Final = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})(?:\.([0-9]{1,6}))?")


class ExpertMatcher:
    """Finds the parameter of each pair, and writes its updates into the ledger."""

    def __init__(self, ledger: Ledger, resolver: NameResolver, unmatched: Unmatched, layout: str) -> None:
        self._ledger = ledger
        self._unmatched = unmatched
        self._resolver = resolver
        config = ledger.adapter.config
        self._is_grouped = (layout or config.lora_b_layout) == GROUPED
        self._leaves = tuple(dict.fromkeys(target.rpartition(".")[2] for target in config.target_parameters))

    def match(self, pairs: Iterable[ModuleTensors]) -> list[ModuleTensors]:
        """Record the pairs on bare parameters; return those on modules."""
        modules: dict[str, list[ModuleTensors]] = defaultdict(list)
        for pair in pairs:
            modules[pair.module_path].append(pair)
        for path, found in self._parameter_places(modules).items():
            self._assign(modules.pop(path), found)
        return [pair for group in modules.values() for pair in group]

    def _parameter_places(self, modules: dict[str, list[ModuleTensors]]) -> dict[str, dict[str, Place]]:
        """Return, for each module whose pairs are on parameters, the parameters that the base has."""
        wanted = {
            f"{path}.{leaf}": (path, leaf)
            for path, pairs in modules.items()
            if not any(pair.is_embedding for pair in pairs)
            for leaf in self._leaves_of(path)
        }
        targets = [Target(name, _has_matrices) for name in wanted]
        found: dict[str, dict[str, Place]] = defaultdict(dict)
        missed: dict[str, tuple[str, Resolution]] = {}
        for name, resolution in self._resolver.resolve(targets).items():
            path, leaf = wanted[name]
            if resolution.place:
                found[path][leaf] = resolution.place
            else:
                missed[path] = (name, resolution)
        self._refuse_missed(modules, {path: at for path, at in missed.items() if path not in found})
        return found

    def _refuse_missed(
        self, modules: dict[str, list[ModuleTensors]], missed: Mapping[str, tuple[str, Resolution]]
    ) -> None:
        """Refuse pairs on modules of which the base has neither the parameters that the config names nor a weight."""
        if not self._ledger.adapter.config.target_parameters:
            return
        weights = self._resolver.resolve([Target(f"{path}.weight", lambda _: True) for path in missed])
        for path, at in missed.items():
            if weights[f"{path}.weight"].place is None:
                problem = self._unmatched.problem(modules.pop(path)[0].first, *at, "for this pair")
                self._ledger.problems.add(PlanError, [problem])

    def _leaves_of(self, path: str) -> Iterable[str]:
        targets = self._ledger.adapter.config.target_parameters
        if targets:
            return [leaf for leaf in self._leaves if matches_target(targets, f"{path}.{leaf}")]
        return _FUSED if path.rpartition(".")[2] == "experts" else ()

    def _assign(self, pairs: list[ModuleTensors], places: Mapping[str, Place]) -> None:
        """Give each pair its parameter: by shape, and where several fit, by the order of registration."""
        inner_first = sorted(pairs, key=lambda pair: -pair.depth)
        depths = [pair.depth for pair in inner_first]
        if depths != list(reversed(range(len(depths)))):
            expected = f"pairs at depths {list(range(max(depths) + 1))}, for wrappers nest without gaps"
            self._ledger.problems.add(AdapterError, [Problem(pairs[0].first, expected, f"{depths[::-1]}")])
            return
        if self._ledger.adapter.config.target_parameters and len(pairs) < len(places):
            expected = (
                f"a pair for each of the {len(places)} parameters that target_parameters names: {', '.join(places)}"
            )
            hint = "the file is incomplete; save the adapter again"
            self._ledger.problems.add(AdapterError, [Problem(pairs[0].first, expected, f"{len(pairs)}", hint)])
            return
        ordered = sorted(places, key=lambda leaf: _REGISTERED.index(leaf) if leaf in _REGISTERED else -1)
        fitting = [
            leaves
            for leaves in permutations(ordered[:_MOST_PARAMETERS], len(inner_first))
            if all(self._fits(pair, places[leaf]) for pair, leaf in zip(inner_first, leaves, strict=True))
        ]
        if len(fitting) > 1 and len(pairs) == len(places) and set(places) <= set(_REGISTERED):
            fitting = fitting[:1]
        if len(fitting) != 1:
            self._ledger.problems.add(PlanError, [self._assignment_problem(inner_first, places, len(fitting))])
            return
        for pair, leaf in zip(inner_first, fitting[0], strict=True):
            self._record(pair, f"{pair.module_path}.{leaf}", places[leaf])

    def _fits(self, pair: ModuleTensors, place: Place) -> bool:
        lora_a, lora_b = (self._ledger.source(name).shape for name in pair.factors)
        if len(lora_a) != 2 or len(lora_b) != 2:
            return False
        return (lora_b[0], lora_a[1]) in (place.shape[-2:], place.shape[-2:][::-1])

    def _assignment_problem(self, pairs: list[ModuleTensors], places: Mapping[str, Place], count: int) -> Problem:
        shapes = {leaf: list(place.shape) for leaf, place in places.items()}
        expected = f"{len(pairs)} of the parameters {shapes} that these pairs fit" if not count else "one order of them"
        deltas = [[self._ledger.source(name).shape for name in pair.factors] for pair in pairs]
        found = f"pairs of {deltas}" if not count else f"{count} that fit"
        hint = "" if count else "is this the base the adapter was trained on, and is target_parameters complete?"
        return Problem(pairs[0].first, expected, found, hint)

    def _record(self, pair: ModuleTensors, parameter: str, place: Place) -> None:
        name_a, name_b = pair.factors
        if "lora_b_bias" in pair.names:
            problem = Problem(pair.names["lora_b_bias"].text, "no bias on a bare parameter", "one")
            self._ledger.problems.add(PlanError, [problem])
            return
        if stray := self._variant_problem(pair):
            self._ledger.problems.add(PlanError, [stray])
            return
        if reason := self._unmatched.dtype_problem(place) or self._ledger.claim(place, pair.first):
            self._ledger.problems.add(PlanError, [reason])
            return
        tensors = {"lora_a": self._ledger.source(name_a), "lora_b": self._ledger.source(name_b)}
        kind = KIND if len(place.shape) == 3 and place.shape[0] > 1 else "lora"
        try:
            settings = self._settings(kind, parameter, place, tensors)
        except ShapeMismatchError as error:
            subject = pair.names[error.role].text if error.role in pair.names else parameter
            self._ledger.problems.add(PlanError, [Problem(subject, error.expected, error.found, error.hint)])
            return
        self._update(kind, place, tensors, settings)
        self._ledger.account([name_a, name_b], "updates", place)

    def _variant_problem(self, pair: ModuleTensors) -> Problem | None:
        """Return what makes more of a pair than plain LoRA, which PEFT does not train on bare parameters."""
        expected = "plain LoRA on a bare parameter, for PEFT trains nothing else there"
        if variants := lora_variants(self._ledger.adapter.config.values):
            return Problem(pair.first, expected, f"a variant by {', '.join(variants)}")
        others = [name.text for name in pair.names.values() if name not in pair.factors]
        return Problem(others[0], expected, "a tensor beside the pair") if others else None

    def _settings(
        self, kind: str, parameter: str, place: Place, tensors: Mapping[str, TensorSource]
    ) -> Mapping[str, Setting]:
        config = self._ledger.adapter.config
        shape = place.shape if kind == KIND else place.shape[-2:]
        facts = ModuleFacts(
            base_shape=shape,
            rank=config.rank_of(parameter),
            scaling=config.scaling_of(parameter),
            square_is_transposed=self._square_is_transposed() if kind == KIND else False,
            rounds_delta=True,
        )
        shapes: dict[str, Shape] = {role: source.shape for role, source in tensors.items()}
        if kind != KIND:
            return LoraMethod().settings(shapes, facts)
        return {**ExpertLoraMethod().settings(shapes, facts), "grouped_by_expert": self._is_grouped}

    def _square_is_transposed(self) -> bool | None:
        """Return how PEFT reads a square parameter: its versions differ, and the file does not tell.

        Source: `ParamWrapper.update_layer` of PEFT 0.18 (always in, out), 0.19.0 (inverted), 0.19.1 and later.
        """
        stated = self._ledger.adapter.config.peft_version
        match = _VERSION.match(stated)
        version = tuple(int(part or 0) for part in match.groups()) if match else ()
        # development builds between these releases may lie on either side of a change
        if not version or ("dev" in stated and (0, 18) <= version <= (0, 19, 1)):
            return None
        is_transposed = self._resolver.names.family.has_transposed_experts
        if version < (0, 19):
            return True
        return not is_transposed if version < (0, 19, 1) else is_transposed

    def _update(
        self, kind: str, place: Place, tensors: Mapping[str, TensorSource], settings: Mapping[str, Setting]
    ) -> None:
        if kind == KIND and not place.is_whole:
            self._update_experts(place, tensors, settings)
            return
        self._ledger.update_place(place, Update(kind, tensors, settings))
        if place.is_whole and len(place.shape) == 3:
            experts, height, width = place.shape
            self._ledger.columns[place.name] = width
            self._ledger.cuts[place.name] |= {expert * height for expert in range(1, experts)}

    def _update_experts(
        self, place: Place, tensors: Mapping[str, TensorSource], settings: Mapping[str, Setting]
    ) -> None:
        """Record the update of each expert's own tensors."""
        rank = tensors["lora_a"].shape[0] // place.shape[0]
        for piece in place.pieces:
            # one expert's rows of A lie together in the file; its columns of B do not
            own = {**tensors, "lora_a": tensors["lora_a"].rows(piece.expert * rank, rank)}
            update = Update(KIND, own, {**settings, "expert": piece.expert})
            self._ledger.update_piece(place, piece, update, piece.at - piece.expert * place.shape[1])


def _has_matrices(place: Place) -> bool:
    return len(place.shape) in (2, 3)
