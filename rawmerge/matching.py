"""Which adapter tensor goes to which base tensor: every one of them is used, or the merge is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from rawmerge.adapter import Adapter
from rawmerge.base_checkpoint import BaseCheckpoint
from rawmerge.dtypes import DTYPES
from rawmerge.errors import AdapterError, PlanError, Problem, ProblemCollector, UnsupportedAdapterError, quote
from rawmerge.formats.adapter_names import AdapterTensorName, describe_foreign, parse_adapter_name
from rawmerge.merge_plan import AdapterUse, Update
from rawmerge.methods import METHODS, lora
from rawmerge.methods.interface import ModuleFacts, ShapeMismatchError
from rawmerge.naming import suggest
from rawmerge.tensor_source import TensorSource
from rawmerge.tied_embeddings import OUTPUT_EMBEDDING

#: Finding near misses compares names with names; past this many, one more suggestion tells nothing new.
_MAX_SUGGESTIONS = 25
#: How quantised formats name a module's packed weight: GPTQ and AWQ, compressed-tensors, MXFP4.
_PACKED_ENDINGS = ("qweight", "weight_packed", "weight_blocks")
_EMBEDDING_MODULES = ("embed_tokens", "lm_head")


@dataclass(slots=True)
class _Pair:
    """The tensors of one module's LoRA pair, found so far: role to name."""

    module_path: str
    target: str
    names: dict[str, AdapterTensorName] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Matches:
    """Where the adapter's tensors go.

    Attributes:
        updates: base tensor name to the updates it gets, in order.
        replacements: base tensor name to the adapter tensor that replaces it.
        embeddings: base tensors that an embedding pair updates.
        uses: every adapter tensor, in file order.
    """

    updates: Mapping[str, tuple[Update, ...]]
    replacements: Mapping[str, TensorSource]
    embeddings: frozenset[str]
    uses: tuple[AdapterUse, ...]


def match_adapter(base: BaseCheckpoint, adapter: Adapter) -> Matches:
    """Return where each adapter tensor goes.

    Raises:
        PlanError, AdapterError, UnsupportedAdapterError: with every tensor that finds no place, or does not fit.
    """
    matcher = _Matcher(base, adapter)
    names = [parse_adapter_name(name) for name in adapter.tensors]
    matcher.refuse_foreign(name for name in names if name.role == "foreign")
    matcher.match_stored(name for name in names if name.role == "stored")
    matcher.match_pairs(name for name in names if name.role not in {"stored", "foreign"})
    matcher.problems.raise_if_any()
    if not matcher.uses:
        raise PlanError(Problem(str(adapter.weights.path), "tensors of a LoRA adapter", "no tensor at all"))
    order = {name: place for place, name in enumerate(adapter.tensors)}
    uses = tuple(sorted(matcher.uses, key=lambda use: order[use.name]))
    return Matches(matcher.updates, matcher.replacements, frozenset(matcher.embeddings), uses)


class _Matcher:
    def __init__(self, base: BaseCheckpoint, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.problems = ProblemCollector()
        self.updates: dict[str, tuple[Update, ...]] = {}
        self.replacements: dict[str, TensorSource] = {}
        self.embeddings: set[str] = set()
        self.uses: list[AdapterUse] = []
        self._suggestions = 0

    def refuse_foreign(self, names: Iterable[AdapterTensorName]) -> None:
        self.problems.add(UnsupportedAdapterError, (foreign_problem(name.text) for name in names))

    def match_stored(self, names: Iterable[AdapterTensorName]) -> None:
        for name in names:
            if not self._may_replace(name):
                self.problems.add(UnsupportedAdapterError, [self._undeclared(name)])
            elif problem := self._stored_problem(name):
                self.problems.add(PlanError, [problem])
            else:
                self.replacements[name.target] = self.adapter.tensors[name.text]
                self.uses.append(AdapterUse(name.text, "replaces", name.target))

    def match_pairs(self, names: Iterable[AdapterTensorName]) -> None:
        pairs = _group_pairs(names)
        layout = _SquareLayout(self.base, self.adapter, pairs)
        for pair in pairs:
            if problem := _half_problem(pair):
                self.problems.add(AdapterError, [problem])
            elif problem := self._target_problem(pair):
                self.problems.add(PlanError, [problem])
            else:
                self._add_update(pair, layout.is_transposed(pair.module_path))

    def _add_update(self, pair: _Pair, square_is_transposed: bool | None) -> None:
        config, path = self.adapter.config, pair.module_path
        tensors = {role: self.adapter.tensors[name.text] for role, name in pair.names.items()}
        facts = ModuleFacts(
            base_shape=self.base.tensors[pair.target].shape,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            square_is_transposed=square_is_transposed,
        )
        try:
            settings = METHODS[lora.KIND].settings({role: at.shape for role, at in tensors.items()}, facts)
        except ShapeMismatchError as error:
            subject = pair.names[error.role].text if error.role in pair.names else pair.target
            self.problems.add(PlanError, [Problem(subject, error.expected, error.found, error.hint)])
            return
        self.updates[pair.target] = (*self.updates.get(pair.target, ()), Update(lora.KIND, tensors, settings))
        if any(role.startswith("lora_embedding") for role in pair.names):
            self.embeddings.add(pair.target)
        self.uses.extend(AdapterUse(name.text, "updates", pair.target) for name in pair.names.values())

    def _may_replace(self, name: AdapterTensorName) -> bool:
        saved = self.adapter.config.modules_to_save
        # PEFT matches modules_to_save by plain suffix; a parameter may lie deeper in the saved module
        parts = name.module_path.split(".")
        above = [".".join(parts[: count + 1]) for count in range(len(parts))]
        declared = any(path.endswith(module) for path in above for module in saved)
        return declared or parts[-1] in _EMBEDDING_MODULES

    def _undeclared(self, name: AdapterTensorName) -> Problem:
        expected = "a tensor of a LoRA pair, or of a module in modules_to_save"
        found = f"a tensor {quote(name.parameter)} of module {quote(name.module_path)}"
        return Problem(name.text, expected, found, "this version does not merge it; nothing may be dropped")

    def _stored_problem(self, name: AdapterTensorName) -> Problem | None:
        source, base_source = self.adapter.tensors[name.text], self.base.tensors.get(name.target)
        if base_source is None:
            expected = f"a base tensor {quote(name.target)} that it replaces"
            return Problem(name.text, expected, "none", self._head_hint(name.target) or self._suggest(name.target))
        if source.shape != base_source.shape:
            hint = "changed vocabularies and heads are not merged yet"
            return Problem(name.text, f"the base's shape {list(base_source.shape)}", f"{list(source.shape)}", hint)
        if not (DTYPES[source.dtype].is_mergeable and DTYPES[base_source.dtype].is_mergeable):
            same = source.dtype == base_source.dtype
            return None if same else Problem(name.text, f"dtype {base_source.dtype}", source.dtype)
        return None

    def _target_problem(self, pair: _Pair) -> Problem | None:
        first = next(iter(pair.names.values())).text
        base_source = self.base.tensors.get(pair.target)
        if base_source is None:
            packed = next((name for name in self._packed_names(pair) if name in self.base.tensors), "")
            hint = "merge into the unquantised base" if packed else ""
            hint = hint or self._head_hint(pair.target) or self._suggest(pair.target)
            found = f"packed weights, {quote(packed)}" if packed else "none"
            return Problem(first, f"a base tensor {quote(pair.target)} for this pair", found, hint)
        if not DTYPES[base_source.dtype].is_mergeable:
            hint = "merge into the unquantised base"
            return Problem(pair.target, "a plain float dtype (F64, F32, BF16, F16)", base_source.dtype, hint)
        for name in pair.names.values():
            dtype = self.adapter.tensors[name.text].dtype
            if not DTYPES[dtype].is_mergeable:
                return Problem(name.text, "a plain float dtype (F32, BF16, F16)", dtype)
        return None

    def _head_hint(self, target: str) -> str:
        if target == OUTPUT_EMBEDDING and self.base.config.ties_embeddings:
            return "the base ties its output to its input embedding; untie it and save it first, or merge with PEFT"
        return ""

    def _packed_names(self, pair: _Pair) -> Iterator[str]:
        return (f"{pair.module_path}.{ending}" for ending in _PACKED_ENDINGS)

    def _suggest(self, target: str) -> str:
        self._suggestions += 1
        return suggest(target, self.base.tensors) if self._suggestions <= _MAX_SUGGESTIONS else ""


def _group_pairs(names: Iterable[AdapterTensorName]) -> list[_Pair]:
    pairs: dict[tuple[str, bool], _Pair] = {}
    for name in names:
        key = (name.module_path, name.role.startswith("lora_embedding"))
        pair = pairs.setdefault(key, _Pair(name.module_path, name.target))
        pair.names[name.role] = name
    return list(pairs.values())


def _half_problem(pair: _Pair) -> Problem | None:
    for roles in lora.PAIRS:
        present = [role for role in roles if role in pair.names]
        if len(present) == 1:
            missing = next(role for role in roles if role not in pair.names)
            hint = "the file is incomplete; save the adapter again"
            return Problem(pair.names[present[0]].text, f"its partner {missing}", "none", hint)
    return None


def foreign_problem(name: str) -> Problem:
    """Return why a tensor of this name is not merged."""
    expected = "a tensor of a LoRA pair, or of a module in modules_to_save"
    return Problem(name, expected, describe_foreign(name), "this version does not merge it")


class _SquareLayout:
    """Which square weights are stored (in, out): by family, else by what modules of the same name show.

    PEFT's `fan_in_fan_out` flag is that of the module it visited last, so it says nothing of the others.
    """

    def __init__(self, base: BaseCheckpoint, adapter: Adapter, pairs: Iterable[_Pair]) -> None:
        self.config = base.config
        self.flag = adapter.config.fan_in_fan_out
        self.seen: dict[str, set[bool]] = {}
        for leaf, is_transposed in _seen_layouts(base, adapter, pairs):
            self.seen.setdefault(leaf, set()).add(is_transposed)

    def is_transposed(self, module_path: str) -> bool | None:
        leaf = _leaf(module_path)
        if self.config.is_conv1d(leaf):
            return True
        if len(evidence := self.seen.get(leaf, set())) == 1:
            return next(iter(evidence))
        unexplained = any(True in found for name, found in self.seen.items() if not self.config.is_conv1d(name))
        is_linear = self.config.is_of_transformers or not self.flag
        return False if is_linear and not unexplained else None


def _leaf(module_path: str) -> str:
    return module_path.rpartition(".")[2]


def _seen_layouts(base: BaseCheckpoint, adapter: Adapter, pairs: Iterable[_Pair]) -> Iterator[tuple[str, bool]]:
    """Yield, for each pair on a weight that is not square, its module's name and whether it is stored (in, out)."""
    for pair in pairs:
        base_source = base.tensors.get(pair.target)
        if base_source is None or set(pair.names) != {"lora_a", "lora_b"}:
            continue
        shapes = [adapter.tensors[pair.names[role].text].shape for role in ("lora_b", "lora_a")]
        if all(len(shape) == 2 for shape in shapes):
            delta = (shapes[0][0], shapes[1][1])
            if delta[0] != delta[1] and base_source.shape in (delta, delta[::-1]):
                yield _leaf(pair.module_path), base_source.shape == delta[::-1]
