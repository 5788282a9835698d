"""A growth curve as an SVG: wall time of copy and merge on the left, the merge's memory on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt  # after the choice of backend
from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a plot shows; all sequences have one value for each point.

    Attributes:
        title: of the horizontal axis.
        is_log: whether that axis is logarithmic.
        labels: its marks.
        places: where these lie.
        copy_seconds: wall time of the copy.
        merge_seconds: wall time of the merge.
        peak_megabytes: resident peak of the merge.
    """

    title: str
    is_log: bool
    labels: Sequence[str]
    places: Sequence[float]
    copy_seconds: Sequence[float]
    merge_seconds: Sequence[float]
    peak_megabytes: Sequence[float]


def write_plot(path: Path, curve: Curve) -> None:
    """Write the plot to `path`; equal curves give equal bytes with one version of matplotlib."""
    with mpl.rc_context({"svg.hashsalt": "rawmerge", "svg.fonttype": "none", "font.size": 9}):
        figure, (time, memory) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        time.plot(curve.places, curve.copy_seconds, "o--", color="tab:gray", label="cp -r, sync")
        time.plot(curve.places, curve.merge_seconds, "o-", color="tab:blue", label="rawmerge")
        time.set_ylabel("wall time, s")
        time.legend(frameon=False)
        memory.plot(curve.places, curve.peak_megabytes, "o-", color="tab:blue")
        memory.set_ylabel("peak resident memory, MB")
        for axes in (time, memory):
            _finish(axes, curve)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _finish(axes: Axes, curve: Curve) -> None:
    if curve.is_log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(curve.places, curve.labels if curve.is_log else [f"{place:.1f}" for place in curve.places])
    axes.minorticks_off()
    axes.set_xlabel(curve.title)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
