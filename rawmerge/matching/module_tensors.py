"""The tensors of an adapter that belong together: all that it holds for one module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from rawmerge.errors import Problem
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.methods import lora

#: Roles of tensors that no embedding has.
_LINEAR_ROLES: Final = frozenset({"lora_a", "lora_b", "lora_b_bias"})

_BIAS: Final = "lora_b_bias"


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module: role to name.

    Attributes:
        module_path: path of the module in the trained model.
        depth: how many more wrappers lie around the pair's own, on a module with several bare parameters.
        names: role to the tensor's name.
        is_attention: whether the module is an nn.MultiheadAttention, whose weight is its in_proj_weight.
        subject: what to call it by where it has no tensors of its own.
    """

    module_path: str
    depth: int
    names: dict[str, AdapterTensorName] = field(default_factory=dict)
    is_attention: bool = False
    subject: str = ""

    @property
    def is_inner(self) -> bool:
        """Whether the module is the out_proj inside an nn.MultiheadAttention that is itself targeted."""
        return any(name.is_inner for name in self.names.values())

    @property
    def owner_path(self) -> str:
        """Path of the module that the config's patterns are about."""
        return self.module_path.rpartition(".")[0] if self.is_inner else self.module_path

    @property
    def is_embedding(self) -> bool:
        """Whether they act on an embedding's rows."""
        return any("_embedding" in role for role in self.names)

    @property
    def factors(self) -> list[AdapterTensorName]:
        """The names of a LoRA pair's A and B, in this order."""
        return [self.names[role] for roles in lora.PAIRS for role in roles if role in self.names]

    @property
    def first(self) -> str:
        """The name to call them by."""
        return next((name.text for name in self.names.values()), self.subject)


def group_by_module(names: Iterable[AdapterTensorName]) -> list[ModuleTensors]:
    """Return the modules in the order of their first tensors."""
    names = list(names)
    modules: dict[tuple[str, int, bool], ModuleTensors] = {}
    embeddings = {name.module_path for name in names if name.role.startswith("lora_embedding")}
    for name in names:
        # two pairs on one path are two modules; what else a pair has is of its own module
        is_embedding = name.module_path in embeddings and name.role not in _LINEAR_ROLES
        key = (name.module_path, name.depth, is_embedding)
        module = modules.setdefault(key, ModuleTensors(name.module_path, name.depth))
        module.names[name.role] = name
    attentions = {module.owner_path for module in modules.values() if module.is_inner}
    for module in modules.values():
        module.is_attention = module.module_path in attentions
    return list(modules.values())


def half_problem(pair: ModuleTensors) -> Problem | None:
    """Return what is missing from an incomplete LoRA pair."""
    for roles in lora.PAIRS:
        present = [role for role in roles if role in pair.names]
        if len(present) == 1:
            missing = next(role for role in roles if role not in pair.names)
            hint = "the file is incomplete; save the adapter again"
            return Problem(pair.names[present[0]].text, f"its partner {missing}", "none", hint)
    if not pair.factors:
        part = "this bias" if _BIAS in pair.names else "it"
        return Problem(pair.first, f"lora_a and lora_b beside {part}", "none")
    return None


def lost_biases(pairs: Iterable[ModuleTensors]) -> Iterator[Problem]:
    """Yield a problem for each pair on a module without its bias, where other pairs have theirs: `lora_bias` is set."""
    plain = [pair for pair in pairs if not (pair.is_embedding or pair.is_attention or pair.is_inner)]
    lacking = [pair for pair in plain if _BIAS not in pair.names]
    hint = "lora_bias is set, and the file is incomplete; save the adapter again"
    if len(lacking) < len(plain):
        yield from (Problem(pair.first, "its bias lora_B.bias", "none", hint) for pair in lacking)
