"""The tensors of an adapter that belong together: all that it holds for one module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rawmerge.errors import Problem
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.methods import lora


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module: role to name.

    Attributes:
        module_path: path of the module in the trained model.
        depth: how many more wrappers lie around the pair's own, on a module with several bare parameters.
        names: role to the tensor's name.
    """

    module_path: str
    depth: int
    names: dict[str, AdapterTensorName] = field(default_factory=dict)

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
        return next(iter(self.names.values())).text


def group_by_module(names: Iterable[AdapterTensorName]) -> list[ModuleTensors]:
    """Return the modules in the order of their first tensors."""
    modules: dict[tuple[str, int, bool], ModuleTensors] = {}
    for name in names:
        key = (name.module_path, name.depth, name.role.startswith("lora_embedding"))
        module = modules.setdefault(key, ModuleTensors(name.module_path, name.depth))
        module.names[name.role] = name
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
        part = "this bias" if "lora_b_bias" in pair.names else "it"
        return Problem(pair.first, f"lora_a and lora_b beside {part}", "none")
    return None
