"""What `lomacs-fast bench` shows of its rows: a Markdown table, where we lose, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lomacs_fast.benchmarks import figures
from lomacs_fast.cli import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

OURS = ("ours", "frozen")
COLUMNS = (
    "what",
    "pass",
    "size",
    "batch",
    "variant",
    "us a channel",
    "ratio to eager",
    "p99 us",
    "spread %",
    "floor us",
    "x floor",
    "bound",
    "peak MB",
    "error",
)


def _what(row: Row) -> str:
    return f"{row['stem']}: {row['function']}" if row["function"] != row["stem"] else row["stem"]


def _micro(row: Row, key: str) -> float | None:
    """Microseconds a channel."""
    value = row.get(key)
    return None if value is None else 1e6 * value / row["batch"]


def cells(row: Row) -> list[Any]:
    """A row of the table; a variant without a time says why in its place."""
    percent, peak = row.get("spread"), row.get("peak_bytes")
    error = row.get("error")
    return [
        _what(row),
        row["pass"],
        row["size"],
        row["batch"],
        row["variant"],
        row["trouble"] if "trouble" in row else _micro(row, "median_s"),
        row["ratio_to_eager"],
        _micro(row, "p99_s"),
        None if percent is None else 100 * percent,
        _micro(row, "floor_s"),
        row.get("times_the_floor"),
        row["bound"],
        None if peak is None else peak / 1e6,
        None if error is None else f"{error:.1e}",
    ]


def case_of(row: Row) -> tuple[Any, ...]:
    """What rows of the same case share."""
    return tuple(row[key] for key in ("stem", "function", "pass", "size", "batch", "device", "kind"))


def losses(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of our fastest row and an alternative that is faster, a case at a time."""
    found = []
    for case in dict.fromkeys(map(case_of, rows)):
        timed = [r for r in rows if case_of(r) == case and r.get("median_s")]
        ours = [r for r in timed if r["variant"] in OURS]
        others = [r for r in timed if r["variant"] not in (*OURS, "approx_svd")]
        if ours and others:
            mine = min(ours, key=lambda r: r["median_s"])
            found += [(mine, r) for r in others if r["median_s"] < mine["median_s"]]
    return found


def reason(ours: Row) -> str:
    """Why an alternative is faster, as far as the numbers tell: calls, or the distance to the floor."""
    distance = ours.get("times_the_floor") or 0.0
    if distance > 5 and ours["batch"] <= 4:
        return "calls and preparation cost more than the arithmetic of so few channels"
    if distance <= 1.5:
        return f"our work is done at {distance:.1f} times its floor; the other does less"
    return f"we are at {distance:.1f} times the floor of the work"


def lost(rows: Sequence[Row]) -> str:
    """A table of the cases where an alternative is faster, with the reason."""
    found = [
        [
            _what(mine),
            mine["pass"],
            mine["size"],
            mine["batch"],
            other["variant"],
            mine["median_s"] / other["median_s"],
            reason(mine),
        ]
        for mine, other in losses(rows)
    ]
    return table(found, ("what", "pass", "size", "batch", "faster", "times", "why")) if found else "Nowhere."


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, the table of every variant, and where an alternative is faster, with the reason."""
    rows = result["cases"]
    lines = [
        f"{conditions(result)}: float32 product {result['product_gmacs']:.0f} G multiply-adds/s, "
        f"copy {result['copy_gb']:.1f} GB/s. Medians of interleaved runs.",
        "",
        table([cells(r) for r in rows], COLUMNS),
        "",
        "Where an alternative is faster:",
        "",
        lost(rows),
        "",
    ]
    if result.get("left_out"):
        lines += [f"{result['left_out']} cases failed or did not begin in time.", ""]
    return "\n".join(lines)


def conditions(result: Mapping[str, Any]) -> str:
    """Processor or device, threads, version of torch and date."""
    name = result["processor"] if result["device"] == "cpu" else result["gpu"]
    return f"{name}, {result['threads']} threads, torch {result['torch']}, {result['date']}"


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by file name: bars a stem, time against batch and against size, and the roofline."""
    rows = [r for r in result["cases"] if r.get("median_s")]
    told, drawn = conditions(result), {}
    bars = [
        r
        for r in rows
        if r["kind"] == "main" and r["variant"] in (*OURS, "torch.compile") and r["ratio_to_eager"]
    ]
    if bars:
        drawn["stems.png"] = figures.ratios(bars, told)
    for kind in ("batch", "size"):
        chosen = [r for r in rows if r["kind"] == kind]
        if chosen:
            drawn[f"time-{kind}.png"] = figures.scaling(chosen, kind, told)
    points = [r for r in rows if r["kind"] == "main" and r["variant"] in OURS and r["macs"]]
    if points:
        product, copy = 1e9 * result["product_gmacs"], 1e9 * result["copy_gb"]
        drawn["roofline.png"] = figures.roofline(points, product, copy, told)
    return drawn
