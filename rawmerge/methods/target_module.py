"""A module that an adapter changes, as an adapter kind sees it: shapes and the config, no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

Shape = tuple[int, ...]


class ShapeMismatchError(ValueError):
    """A tensor's shape contradicts the base or its partner; fields as in `rawmerge.errors.Problem`."""

    def __init__(self, role: str, expected: str, found: str, hint: str = "") -> None:
        super().__init__(role, expected, found)
        self.role = role
        self.expected = expected
        self.found = found
        self.hint = hint


class MissingTensorError(ValueError):
    """A module lacks a tensor of its kind."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.role = role


class UnmergeableError(ValueError):
    """A module cannot be merged faithfully; fields as in `rawmerge.errors.Problem`."""

    def __init__(self, expected: str, found: str, hint: str = "") -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Peer:
    """A module of the adapter as its fellows may see it.

    Attributes:
        path: path in the trained model.
        shapes: role to shape of its own tensors.
        base_shape: shape of its weight on disk.
        is_transposed: whether that is stored (in, out); None where undecidable.
    """

    path: str
    shapes: Mapping[str, Shape]
    base_shape: Shape
    is_transposed: bool | None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight as the model multiplies by it; kernels of convolutions count as inputs."""
        rows, columns = self.base_shape[0], prod(self.base_shape[1:])
        return (columns, rows) if self.is_transposed and len(self.base_shape) == 2 else (rows, columns)


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One module that an adapter changes, as a kind sees it when it plans: shapes and the config, no data.

    Attributes:
        path: path in the trained model.
        shapes: role to shape of the module's own tensors in the adapter.
        shared: role to shape of those that all modules share.
        dtypes: role to storage dtype code, of both.
        base_shape: shape of the weight on disk; base_dtype: its storage dtype code.
        bias_shape: shape of the module's bias on disk, None where it has none.
        is_transposed: whether the weight is stored (in, out), as Conv1D does; None where nothing tells.
        rank: rank that the config states for it, 0 for kinds without; alpha: the same, dimensionless.
        scaling: alpha / rank, or what LoRA's config makes of it.
        rounds_delta: whether PEFT rounds the delta to the base's dtype before it adds it, whatever the kind's habit.
        is_embedding: whether the adapter treats the module as an embedding; then `is_transposed` is true.
        values: the kind's own config fields.
        peers: all modules of the adapter, this one included, in the order of the file.
        peft_version: version of PEFT that saved the adapter, empty where that is unknown: before 0.18.
        is_forced: whether the user asked to merge in spite of doubts (`--force`).
        is_stored_whole: whether the adapter stores the module's weight, too, so that it is no longer the base's own.
        is_attention: whether the weight is the in_proj_weight of an nn.MultiheadAttention.
        is_inner: whether it is the out_proj inside an nn.MultiheadAttention that is itself a module of the adapter.
        order: paths of all modules in the order in which the model registers them; None where that is unknown.
    """

    path: str
    shapes: Mapping[str, Shape]
    base_shape: Shape
    is_transposed: bool | None
    values: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Shape] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    base_dtype: str = "F32"
    bias_shape: Shape | None = None
    rank: int = 0
    alpha: float = 0.0
    scaling: float = 0.0
    rounds_delta: bool = False
    is_embedding: bool = False
    peers: Sequence[Peer] = ()
    peft_version: str = ""
    is_forced: bool = False
    is_stored_whole: bool = False
    is_attention: bool = False
    is_inner: bool = False
    order: Callable[[], Sequence[str] | None] = lambda: None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight as the model multiplies by it; kernels of convolutions count as inputs.

        Raises:
            ShapeMismatchError: the weight is square, and nothing tells how it is stored.
        """
        rows, columns = self.base_shape[0], prod(self.base_shape[1:])
        return (columns, rows) if self.needs_transpose else (rows, columns)

    @property
    def needs_transpose(self) -> bool:
        """Whether a delta of shape (out, in) must be transposed to lie as the base does.

        Raises:
            ShapeMismatchError: the weight is square, and nothing tells how it is stored.
        """
        if self.is_transposed is None:
            hint = "a square weight does not show its layout; a config.json with transformers' model_type would tell it"
            role = next(iter([*self.shapes, *self.shared]))
            raise ShapeMismatchError(role, "a known layout, (out, in) or (in, out)", "either", hint)
        return self.is_transposed and len(self.base_shape) == 2

    def need(self, *roles: str) -> None:
        """Check that tensors are there.

        Raises:
            MissingTensorError: one is not.
        """
        for role in roles:
            if role not in self.shapes and role not in self.shared:
                raise MissingTensorError(role)

    def expect(self, role: str, *dimensions: int) -> None:
        """Check a tensor's shape; a dimension of -1 may be anything but 0.

        Raises:
            MissingTensorError: there is no such tensor; ShapeMismatchError: it has another shape.
        """
        self.need(role)
        found = self.shapes[role] if role in self.shapes else self.shared[role]
        is_same = len(found) == len(dimensions) and 0 not in found
        if not is_same or any(want not in (-1, size) for want, size in zip(dimensions, found, strict=True)):
            wanted = "(" + ", ".join("any" if size < 0 else str(size) for size in dimensions) + ")"
            flat = "an empty or flat tensor comes from a ZeRO-3 or FSDP save that was not gathered; save it again"
            hint = (
                flat if 0 in found or len(found) < len(dimensions) else "is this the base the adapter was trained on?"
            )
            raise ShapeMismatchError(role, f"shape {wanted}", f"shape {list(found)}", hint)

    def refuse_transposed(self) -> None:
        """Refuse a weight that is stored (in, out), for a kind that PEFT does not train on such.

        Raises:
            UnmergeableError: it is.
        """
        if self.needs_transpose:
            hint = "PEFT does not train this kind on Conv1D"
            raise UnmergeableError("a weight stored (out, in)", f"one stored (in, out), {list(self.base_shape)}", hint)

    def refuse(self, role: str, expected: str, found: str, hint: str = "") -> None:
        """Raise a ShapeMismatchError about one of the module's tensors."""
        raise ShapeMismatchError(role, expected, found, hint)
