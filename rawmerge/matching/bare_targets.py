"""Modules of an adapter that holds no tensor of their own, so that only its config tells which they are.

Such a kind deals out one shared tensor to all modules, so all must be known, none more and none less. What a model has
outside its layers, and which of several stacks of layers, depends on its class: where a target fits there, nothing is
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from rawmerge.errors import Problem, quote
from rawmerge.families import base_prefixes
from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.formats.model_config import ModelConfig
from rawmerge.formats.target_names import is_targeted
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.module_order import known_layers

_HINT: Final = "save the adapter with save_indices=True in its config"
#: What configs call the number of layers.
_LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class UnknownTargetsError(ValueError):
    """Which modules are targeted cannot be told for sure; fields as in `rawmerge.errors.Problem`."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found

    def problem(self, subject: str) -> Problem:
        """Return the problem of a shared tensor."""
        return Problem(subject, self.expected, self.found, _HINT)


def bare_targets(model: ModelConfig, config: AdapterConfig, disk: DiskNames) -> list[str]:
    """Return the paths of all targeted modules, as the canonical names of the base's tensors have them.

    Args:
        model: the base's config.
        config: the adapter's config.
        disk: the base's tensors.

    Raises:
        UnknownTargetsError: they cannot be told for sure.
    """
    layers = known_layers(model)
    if layers is None:
        raise UnknownTargetsError("a model of one stack of layers whose module order is known", "module order unknown")
    prefixes = ("", *(f"{prefix}." for prefix in sorted(base_prefixes([model.model_type]))))
    for prefix in prefixes:
        for path in _fitting(config, layers.outside, prefix):
            raise UnknownTargetsError("targets inside the layers, which all classes have", f"one on {quote(path)}")
    inside = {bare: path for bare, path in _paths(disk, prefixes) if bare.startswith(f"{layers.stack}.")}
    _check_count(model, layers.stack, inside)
    # the trained class may hold the bare model under a prefix or be it, which a pattern can tell apart
    sets = {found for prefix in prefixes if (found := _fitting(config, inside, prefix))}
    if len(sets) != 1:
        raise UnknownTargetsError(
            "target_modules that fit modules of the layers", "none" if not sets else "several ways"
        )
    return [inside[bare] for bare in sets.pop()]


def _fitting(config: AdapterConfig, paths: Collection[str], prefix: str) -> tuple[str, ...]:
    return tuple(path for path in paths if is_targeted(config, f"{prefix}{path}"))


def _paths(disk: DiskNames, prefixes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (path in the bare model, path) of each matrix."""
    for name, source in disk.tensors.items():
        path, _, parameter = disk.family.canonical(name).rpartition(".")
        if len(source.shape) == 2 and parameter == "weight":
            yield next((path.removeprefix(way) for way in prefixes if way and path.startswith(way)), path), path


def _check_count(model: ModelConfig, stack: str, paths: Collection[str]) -> None:
    """Refuse a base that lacks layers of the model, or has some that the model does not."""
    pattern = re.compile(rf"{re.escape(stack)}\.([0-9]{{1,9}})\.")
    numbers = {int(found[1]) for path in paths if (found := pattern.match(path))}
    stated = next((model.fields[name] for name in _LAYER_COUNTS if name in model.fields), None)
    if numbers != set(range(len(numbers))) or type(stated) is not int or stated != len(numbers):
        raise UnknownTargetsError(
            f"layers as the base's config states, {ascii(stated)[:20]}", f"{len(numbers)} of them"
        )
