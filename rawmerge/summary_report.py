"""What a merge did, as text for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from rawmerge.byte_sizes import format_bytes
from rawmerge.errors import printable
from rawmerge.output.cast_losses import CastLosses, cast_losses, cast_record
from rawmerge.output.survivals import Surviving, surviving
from rawmerge.report import some_names
from rawmerge.run import MergeSummary


def summary_text(summary: MergeSummary) -> str:
    """Return what a merge did, in lines for people."""
    done = ", ".join(f"{count} {what}" for what, count in summary.counts.items() if count)
    shards = {
        "linked": summary.linked,
        "reused": summary.reused,
        "resumed": summary.resumed,
        "deleted from the base": summary.consumed,
    }
    ways = "".join(f", {count} shard{'s'[: count != 1]} {what}" for what, count in shards.items() if count)
    verified = "; read back and verified" if summary.verified else ""
    lines = [f"{done}{ways}; {_speed_text(summary)}{verified}"]
    if peaks := [
        f"{format_bytes(count)} {what}"
        for count, what in ((summary.measured_peak_bytes, "at the peak"), (summary.predicted_peak_bytes, "predicted"))
        if count is not None
    ]:
        lines.append(f"memory {', '.join(peaks)}")
    lines += _surviving_lines(surviving(summary.survivals), summary.unchanged)
    lines += _cast_lines(cast_losses(summary.casts))
    return "\n".join(map(printable, lines))


def _surviving_lines(left: Surviving, unchanged: Sequence[str]) -> Iterator[str]:
    """Yield what rounding left of the deltas in all, and where it left nothing; the notes say where it left little."""
    if left.changed is not None and left.lost is not None:
        yield (
            f"of the elements that the deltas move, {left.changed:.1%} changed in storage; "
            f"the rounding error is {left.lost:.1%} of the deltas' length"
        )
    if unchanged:
        yield (
            f"{len(unchanged)} updated tensors equal the base: their delta is smaller than the rounding "
            f"({some_names(unchanged)}); --dtype float32 keeps it"
        )


def _cast_lines(lost: CastLosses) -> Iterator[str]:
    """Yield what casts took in all; nothing where none could take anything."""
    if not lost.tensors:
        return
    cast, tensors = f"cast to {' or '.join(lost.dtypes)}", f"{lost.tensors} tensor{'s'[: lost.tensors != 1]}"
    if not lost.rounded:
        yield f"the {cast} changed none of {lost.elements:,} elements in {tensors}"
        return
    low = {"became 0": lost.zeroed, "became subnormal": lost.subnormal}
    became = "".join(f", {count:,} {what}" for what, count in low.items() if count)
    others = " of the others" if lost.zeroed else ""
    error = f"; the largest relative error{others} is {lost.largest}" if lost.rounded > lost.zeroed else ""
    yield f"{lost.rounded:,} of {lost.elements:,} elements in {tensors} were rounded in the {cast}{became}{error}"


def _speed_text(summary: MergeSummary) -> str:
    """Return what was written how fast; what was there already counts for nothing."""
    rate = format_bytes(int(summary.written_bytes / max(summary.seconds, 1e-9)))
    written, total = format_bytes(summary.written_bytes), format_bytes(summary.byte_count)
    if summary.written_bytes == summary.byte_count:
        return f"{total} in {summary.seconds:.1f} s ({rate}/s)"
    return f"{written} of {total} written, the rest was there, in {summary.seconds:.1f} s ({rate}/s)"


def summary_json(summary: MergeSummary) -> str:
    """Return a summary as one JSON object."""
    fields = dataclasses.asdict(summary)
    del fields["survivals"]  # the record has them; there may be thousands
    fields |= {"surviving": dataclasses.asdict(surviving(summary.survivals)), "casts": cast_record(summary.casts)}
    return json.dumps(fields)
