"""The tensors of an adapter that belong together: a pair on a module, with its bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rawmerge.errors import Problem
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.methods import lora


@dataclass(slots=True)
class LoraPair:
    """The tensors of one LoRA pair: role to name.

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
        """Whether the pair acts on an embedding's rows."""
        return any(role.startswith("lora_embedding") for role in self.names)

    @property
    def factors(self) -> list[AdapterTensorName]:
        """The names of A and B, in this order."""
        return [self.names[role] for roles in lora.PAIRS for role in roles if role in self.names]

    @property
    def first(self) -> str:
        """The name to call the pair by."""
        return next(iter(self.names.values())).text


def group_pairs(names: Iterable[AdapterTensorName]) -> list[LoraPair]:
    """Return the pairs in the order of their first tensors."""
    pairs: dict[tuple[str, int, bool], LoraPair] = {}
    for name in names:
        key = (name.module_path, name.depth, name.role.startswith("lora_embedding"))
        pair = pairs.setdefault(key, LoraPair(name.module_path, name.depth))
        pair.names[name.role] = name
    return list(pairs.values())


def half_problem(pair: LoraPair) -> Problem | None:
    """Return what is missing from an incomplete pair."""
    for roles in lora.PAIRS:
        present = [role for role in roles if role in pair.names]
        if len(present) == 1:
            missing = next(role for role in roles if role not in pair.names)
            hint = "the file is incomplete; save the adapter again"
            return Problem(pair.names[present[0]].text, f"its partner {missing}", "none", hint)
    if not pair.factors:
        return Problem(pair.first, "lora_a and lora_b beside this bias", "none")
    return None
