"""A module in pickle's place, for `torch.load`, that imports nothing but what a table of tensors names."""

from __future__ import annotations

import pickle
import re
from pickle import UnpicklingError as UnpicklingError  # torch takes it from here
from typing import Any, Final

#: Beside `torch.SOMETHING`, which are types of storages and dtypes.
_ALLOWED: Final = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
    }
)
_TYPE: Final = re.compile(r"[A-Z][A-Za-z0-9]*Storage|u?int\d+|float8_[a-z0-9]+")


class Unpickler(pickle.Unpickler):
    """Pickle's own machine, with a list of names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what is on the list.

        Raises:
            UnpicklingError: it is not.
        """
        is_type = module == "torch" and _TYPE.fullmatch(name)
        if not is_type and (module, name) not in _ALLOWED:
            raise UnpicklingError(f"{module}.{name} is not on the list")
        return super().find_class(module, name)
