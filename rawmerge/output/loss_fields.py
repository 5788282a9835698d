"""What a merge lost, as JSON: as the record tells it, and whole, for a merge that takes shards over."""

from __future__ import annotations

from typing import Any

from rawmerge.computing.losses import Losses
from rawmerge.output.cast_losses import cast_fields, cast_record, parse_casts
from rawmerge.output.survivals import parse_survivals, survival_fields, survival_records


def loss_records(losses: Losses) -> dict[str, Any]:
    """Return what the record tells; of casts nothing where none could lose anything."""
    casts = {"casts": cast_record(losses.casts)} if losses.casts else {}
    return {"surviving": survival_records(losses.survivals)} | casts


def loss_fields(losses: Losses) -> dict[str, Any]:
    """Return all of it."""
    return {"survivals": survival_fields(losses.survivals), "casts": cast_fields(losses.casts)}


def parse_losses(fields: Any) -> Losses:
    """Return what `loss_fields` gave, of fields that may hold more; notes of before casts were counted have none.

    Raises:
        AttributeError, LookupError, OverflowError, TypeError, ValueError: it is something else.
    """
    return Losses(parse_survivals(fields["survivals"]), parse_casts(fields.get("casts", {})))
