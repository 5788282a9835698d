"""What an adapter kind must offer: the extension point of rawmerge.

Torch is named in annotations only, so that a plan can be made without importing it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias

from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.target_module import MissingTensorError as MissingTensorError  # kinds take all from here
from rawmerge.methods.target_module import Peer as Peer
from rawmerge.methods.target_module import Shape as Shape
from rawmerge.methods.target_module import ShapeMismatchError as ShapeMismatchError
from rawmerge.methods.target_module import TargetModule as TargetModule
from rawmerge.methods.target_module import UnmergeableError as UnmergeableError

if TYPE_CHECKING:
    import torch

#: How much of the base an update must see to compute some rows: those rows; all rows, once, in a pass before, of which
#: it keeps little; or the whole tensor in memory.
ROWS: Final = "rows"
COLUMNS: Final = "columns"
WHOLE: Final = "whole"
#: In a planned update's roles: the module's weight as the base has it, beside the adapter's own tensors.
BASE_WEIGHT: Final = "base_weight"
#: What a method may note for `prepare`, besides the tensors; a plan keeps it as JSON.
Setting: TypeAlias = bool | int | float | str | tuple[int, ...]


def number(settings: Mapping[str, Setting], name: str) -> float:
    """Return a setting that is a number.

    Raises:
        TypeError: it is none.
    """
    value = settings[name]
    if not isinstance(value, int | float):
        raise TypeError(f"setting {name} must be a number, not {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What a method may know about a module when it is planned.

    Attributes:
        base_shape: shape of the base tensor; where updates change a part of it only, of that part.
        rank: the rank that the config states for the module.
        scaling: alpha / rank or what the config makes of it, dimensionless.
        square_is_transposed: for a square weight, whether it is stored (in, out); None where that is undecidable.
        rounds_delta: whether PEFT rounds the delta to the base's dtype before it adds it, whatever the kind's habit.
        token_indices: which rows of the base the adapter's rows replace.
    """

    base_shape: Shape
    rank: int
    scaling: float
    square_is_transposed: bool | None
    rounds_delta: bool = False
    token_indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """What a kind does to one tensor of a module.

    Attributes:
        method: which of `rawmerge.methods.METHODS` computes it.
        roles: which tensors it needs: of the module, shared ones, or `BASE_WEIGHT`.
        settings: its own numbers and switches.
        parameter: which of the module's parameters it changes.
        reach: how much of the base it must see: `ROWS`, `COLUMNS` or `WHOLE`.
        working_bytes: most memory it takes besides tiles and the adapter's tensors as stored, in bytes.
    """

    method: str
    roles: tuple[str, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    parameter: str = "weight"
    reach: str = ROWS
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TileContext:
    """What a prepared update may know about the tensor that it will be applied to.

    Attributes:
        shape: shape of the base tensor, as stored.
        compute_dtype: dtype of the delta's arithmetic: float32, or float64 where asked for or where the base is.
        rounding_dtype: dtype to which kinds that PEFT rounds twice round their delta first; None for none, which also
            says that PEFT's roundings on the way are not wanted.
        base_dtype: dtype of the base as stored.
        tiles: goes through the tensor's matrix view once, from its first row to its last: (first row, rows in compute
            dtype, with all earlier updates applied). What it yields is valid until the next step; copy what you keep.
    """

    shape: Shape
    compute_dtype: torch.dtype
    rounding_dtype: torch.dtype | None
    base_dtype: torch.dtype | None = None
    tiles: Callable[[], Iterator[tuple[int, torch.Tensor]]] = lambda: iter(())

    def whole(self) -> torch.Tensor:
        """Return the tensor as its matrix view (first dimension, all others), in compute dtype, a copy of its own."""
        import torch

        matrix = torch.empty(self.shape[0], prod(self.shape[1:]), dtype=self.compute_dtype)
        for first_row, rows in self.tiles():
            matrix[first_row : first_row + len(rows)] = rows
        return matrix


class Scratch(Protocol):
    """Memory that the calling thread reuses from tile to tile; a fresh allocation costs more than the product."""

    def tensor(self, slot: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor (rows, columns), the same memory for each call with this slot."""


class PreparedUpdate(Protocol):
    """One update with its tensors in memory, ready for tiles in any order, from any thread."""

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Change `tile` in place.

        Args:
            tile: (rows, columns) of the tensor's matrix view, or those of its columns that the update changes, in
                compute dtype; never rows of two products.
            first_row: which row of the update's own matrix the tile begins with.
            scratch: the calling thread's memory.
        """


class Method(Protocol):
    """The arithmetic of one adapter kind, or of one way in which it changes a tensor."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update, its tensors (role to tensor, dtype as stored) converted once."""


@dataclass(frozen=True, slots=True)
class KindRow:
    """A row of the README's table of kinds.

    Attributes:
        title: what people call it; config: what `adapter_config.json` says.
        modules: what it changes; formula: how; bits: "equal" to PEFT's, or the tolerance and its reason.
    """

    title: str
    config: str
    modules: str
    formula: str
    bits: str


class AdapterKind(ABC):
    """One kind of PEFT adapter: what its file holds, what its config says, and what it does to a module.

    Attributes:
        peft_type: what `adapter_config.json` calls it.
        title: what people call it.
        formula: what a merge does, for the README's table; W is the base's weight, s the scaling.
        modules: on which modules, for the same table.
        bits: "equal" to PEFT's, or the tolerance and its reason, for the same table.
        parts: what stands behind the module's path in a tensor's name, to its role; `*` is any number, which the role's
            `*` repeats: `peanut_encoders.*.weight` to `encoder.*`.
        shared: the same for tensors of the whole adapter.
        ignored: roles that do not change a merge, to the reason.
        integers: roles of tensors that need not be plain floats, such as indices.
        in_parts: methods that may change a part of a base tensor, where the disk fuses what the model splits.
        fields: the config fields beside those that all kinds have.
        methods: what its updates are computed with, by the names that its plans use.
        is_foreign: whether its files are not PEFT's, so that no `adapter_config.json` names the kind.
        has_flat_names: whether paths of modules are flattened in its files, `_` for each dot.
        embedding_roles: role to that of the same tensor on an embedding, where names do not tell them apart; those that
            begin with `lora_embedding` say that the module is one.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    modules: ClassVar[str] = "Linear, Conv1D"
    bits: ClassVar[str] = "equal"
    parts: ClassVar[Mapping[str, str]] = {}
    shared: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[Mapping[str, str]] = {}
    integers: ClassVar[Collection[str]] = ()
    in_parts: ClassVar[Collection[str]] = ()
    fields: ClassVar[KindFields] = KindFields()
    methods: ClassVar[Mapping[str, Method]] = {}
    is_foreign: ClassVar[bool] = False
    has_flat_names: ClassVar[bool] = False
    embedding_roles: ClassVar[Mapping[str, str]] = {}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return what the module's tensors tell of its weight's shape, (out, in) with -1 for what they do not tell.

        It decides which base tensor a name may mean and how that is stored. Of an embedding, out is its dimension and
        in its vocabulary. None: they tell nothing. Shapes may be
        anything a file can hold; `values` are the config's.
        """
        return None

    @abstractmethod
    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield what to do to the module; every one of its tensors must be in a role or ignored.

        Raises:
            MissingTensorError, ShapeMismatchError: the tensors contradict the base, one another or the config.
            UnmergeableError: this module cannot be merged faithfully, with the reason.
        """

    def needs_all_targets(self, values: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether a module that the adapter lacks changes what the others get, as with drawn numbers that all share."""
        return False

    def has_bare_targets(self, values: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether the file holds shared tensors only, so that target_modules must tell the modules."""
        return False

    def variants(self, values: Mapping[str, Any]) -> Iterable[str]:  # noqa: ARG002
        """Return which of the kind's variants a config asks for, as people call them."""
        return ()

    def rows(self) -> Iterable[KindRow]:
        """Return the kind's rows in the README's table; more than one for a kind with variants."""
        yield KindRow(self.title, f"`{self.peft_type}`", self.modules, self.formula, self.bits)
