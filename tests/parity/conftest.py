"""Which cases of the parity tests run by default, and which with `-m slow` only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

_HERE: Final = Path(__file__).parent
#: Where every case of a kind or family is tried in every dtype.
_PRODUCTS: Final = (_HERE / "kinds", _HERE / "test_families.py")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take pairs of a product: by default the first case runs in all dtypes, each other one in one, in turn.

    What a kind computes and how a result is rounded to a dtype are two steps, so that the rest of the product widens
    the same check: it is slow. A test of one case, and one with no `dtype`, is left whole. The choice is that of a
    Latin square: of two other parameters, each value meets as many dtypes as the other has values.
    """
    places: dict[tuple[Path, str, str], dict[int, int]] = {}
    chosen_from = [item for item in items if any(item.path.is_relative_to(part) for part in _PRODUCTS)]
    counted = [(item, _places(item, places)) for item in chosen_from if hasattr(item, "callspec")]
    for item, own in counted:
        others = sum(place for name, place in own.items() if name != "dtype")
        dtypes = places.get((item.path, _name(item), "dtype"), {})
        if others and dtypes and own["dtype"] != others % len(dtypes):
            item.add_marker(pytest.mark.slow)


def _places(item: Any, known: dict[tuple[Path, str, str], dict[int, int]]) -> dict[str, int]:
    """Return the place of each parameter's value among those of its test, in the order in which they come."""
    found = {}
    for name, value in item.callspec.params.items():
        values = known.setdefault((item.path, _name(item), name), {})
        found[name] = values.setdefault(id(value), len(values))
    return found


def _name(item: Any) -> str:
    name: str = item.originalname
    return name
