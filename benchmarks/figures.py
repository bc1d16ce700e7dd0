"""Figures of what the suite measured, in the style of `lomacs_fast.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lomacs_fast.plots import (
    DPI,
    GREY,
    MARKERS,
    PALE,
    SMALL,
    TEXT,
    TITLE,
    _colour,
    _log_axis,
    _new_figure,
    _plain,
    _style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "ratios", "roofline", "scaling"]

Row = Mapping[str, Any]


def ratios(rows: Sequence[Row], conditions: str) -> Figure:
    """How many times faster than eager: a bar a case and variant, forward and forward+backward apart.

    Args:
        rows: of the suite, timed, `ratio_to_eager` known.
        conditions: processor, threads and date, under the title.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one timed row, got none")
    passes = sorted({r["pass"] for r in rows})
    groups = {p: list(dict.fromkeys(_name(r) for r in rows if r["pass"] == p)) for p in passes}
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    figure = _new_figure(1.4 + 0.34 * max(len(g) for g in groups.values()) * 1.2, 11.0)
    axes = figure.subplots(1, len(passes), squeeze=False, sharex=True)[0]
    for ax, name in zip(axes, passes, strict=True):
        _plain(ax)
        ax.grid(False, axis="y")
        at = np.arange(len(groups[name]))
        height = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            found = {
                _name(r): r["ratio_to_eager"] for r in rows if r["pass"] == name and r["variant"] == variant
            }
            values = [found.get(g, np.nan) for g in groups[name]]
            offset = (i - (len(variants) - 1) / 2) * height
            ax.barh(at + offset, values, height=0.92 * height, color=_colour(i), label=variant)
            for y, value in zip(at + offset, values, strict=True):
                if np.isfinite(value):
                    ax.annotate(
                        f"{value:.1f}",
                        (value, y),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=SMALL - 1,
                    )
        ax.axvline(1, color=GREY, linewidth=1.0, linestyle="--")
        ax.set_yticks(at, groups[name])
        ax.tick_params(axis="y", length=0, labelsize=SMALL)
        ax.invert_yaxis()
        ax.set_title(name, fontsize=TITLE)
        ax.set_xlabel("times faster than eager (dashed: as fast)", fontsize=TEXT)
    axes[0].legend(fontsize=SMALL, frameon=False, loc="lower right")
    figure.suptitle(conditions, fontsize=SMALL, color=GREY)
    return figure


def _name(row: Row) -> str:
    return f"{row['function']}\n{row['size']}, batch {row['batch']}"


def scaling(rows: Sequence[Row], key: str, conditions: str) -> Figure:
    """Microseconds a channel against batch or size, a line a variant.

    Args:
        rows: of the suite, timed.
        key: "batch", or "size" for the larger side.
        conditions: processor, threads and date, under the title.

    Raises:
        ValueError: no rows, or another key.
    """
    if not rows:
        raise ValueError("rows must hold at least one timed row, got none")
    if key not in ("batch", "size"):
        raise ValueError(f'key must be "batch" or "size", got {key!r}')
    figure = _new_figure(4.4, 8.0)
    ax = figure.subplots()
    _plain(ax)
    low, high = np.inf, 0.0
    for i, variant in enumerate(dict.fromkeys(r["variant"] for r in rows)):
        mine = [r for r in rows if r["variant"] == variant]
        x = [r["batch"] if key == "batch" else max(map(int, r["size"].split("x")[:2])) for r in mine]
        y = [1e6 * r["median_s"] / r["batch"] for r in mine]
        low, high = min(low, *y), max(high, *y)
        ax.plot(
            x,
            y,
            _style(i),
            marker=MARKERS[i % len(MARKERS)],
            color=_colour(i),
            markersize=5,
            label=variant,
        )
    _log_axis(ax, "y", low, high)
    ax.set_xscale("log", base=2)
    places = sorted({r["batch"] if key == "batch" else max(map(int, r["size"].split("x")[:2])) for r in rows})
    ax.set_xticks(places, [str(p) for p in places])
    ax.minorticks_off()
    first = rows[0]
    fixed = first["size"] if key == "batch" else f"batch {first['batch']}, rank half the side"
    ax.set_xlabel("channels a call" if key == "batch" else "side of the channel matrix", fontsize=TEXT)
    ax.set_ylabel("µs a channel", fontsize=TEXT)
    ax.set_title(f"U, S, V of a batch: {fixed}", fontsize=TITLE)
    ax.legend(fontsize=SMALL, frameon=False, ncols=2)
    figure.suptitle(conditions, fontsize=SMALL, color=GREY)
    return figure


def roofline(rows: Sequence[Row], product: float, copy: float, conditions: str) -> Figure:
    """Multiply-adds a second against multiply-adds a byte, under what product and memory allow.

    Args:
        rows: of the suite, timed, with `macs` and `bytes` of the batch.
        product: multiply-adds a second of a float32 product.
        copy: bytes a second of a copy.
        conditions: processor, threads and date, under the title.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one timed row, got none")
    figure = _new_figure(5.2, 8.6)
    ax = figure.subplots()
    _plain(ax)
    x = np.array([r["macs"] / r["bytes"] for r in rows])
    y = np.array([r["macs"] / r["median_s"] for r in rows]) / 1e9
    span = np.geomspace(min(x.min(), product / copy) / 2, max(x.max(), product / copy) * 2, 64)
    span = np.sort(np.append(span, product / copy))
    ax.plot(span, np.minimum(span * copy, product) / 1e9, color=GREY, linewidth=1.4)
    names = list(dict.fromkeys(r["function"] for r in rows))
    for i, name in enumerate(names):
        for told in ("forward", "forward+backward"):
            mine = [k for k, r in enumerate(rows) if r["function"] == name and r["pass"] == told]
            (line,) = ax.plot(x[mine], y[mine], MARKERS[i % len(MARKERS)], color=_colour(i), markersize=6)
            if told == "forward":
                line.set_markerfacecolor("none")
        # the legend shows every function filled, whichever passes were measured
        ax.plot([], [], MARKERS[i % len(MARKERS)], color=_colour(i), markersize=6, label=name)
    _log_axis(ax, "x", span[0], span[-1])
    _log_axis(ax, "y", y.min(), product / 1e9)
    ax.grid(True, which="major", color=PALE, linewidth=0.6)
    ax.set_xlabel("real multiply-adds a byte of operands and results", fontsize=TEXT)
    ax.set_ylabel("G multiply-adds a second", fontsize=TEXT)
    ax.set_title("Roofline: filled forward+backward, hollow forward", fontsize=TITLE)
    ax.legend(fontsize=SMALL - 1, frameon=False, ncols=2, loc="lower right")
    figure.suptitle(conditions, fontsize=SMALL, color=GREY)
    return figure
