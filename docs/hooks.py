"""What the site shows of the committed results: `<!-- measured: STEM -->` becomes a table and a figure."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from lomacs_fast.benchmarks import figures, report
from lomacs_fast.cli import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "epyc-2-cores" / "suite.json"
DEVICES = [ROOT / "benchmarks" / "results" / chip / "suite.json" for chip in ("h200", "h100")]
MARK = re.compile(r"<!-- measured: (\w+) -->")
HEADER = (
    "function", "pass", "size", "batch", "eager µs", "ours µs", "ratio", "floor µs", "ours / floor", "binds"
)  # fmt: skip

result: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
on_devices: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in DEVICES]


def rows_of(stem: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = ("main", "latency")
    return [r for r in found["cases"] if r["stem"] == stem and r["kind"] in kinds]


def refinement() -> str:
    """Times of an SVD by refinement beside the decompositions, from the benchmark of that stem."""
    found = json.loads(RESULTS.with_name("refine.json").read_text(encoding="utf-8"))
    cells = [
        [
            row["data"],
            row["batch"],
            row["call"],
            f"{row['us']:.0f}",
            f"{row['svd_ratio']:.1f}" if row["svd_ratio"] else "",
            f"{row['floor_us']:.0f}" if row["floor_us"] else "",
        ]
        for row in found["cases"]
        if not row["call"].startswith("eager") or row["call"].endswith("step")
    ]
    told = (
        f"Microseconds a channel, 64x64, 32 columns, 16 of them active. {found['processor']}, "
        f"{found['threads']} threads, torch {found['torch']}, {found['date']}; "
        "`benchmarks/bench_refine.py --times`. The floor takes a complex product as four real ones; "
        "the kernel does three, so it can be below."
    )
    measured = table(cells, ("data", "batch", "call", "µs", "SVD / this", "floor µs"))
    return f"{told}\n\n{measured}\n"


def distances(rows: list[dict[str, Any]], digits: int) -> str:
    """Eager, ours and the floor of every case that was timed, microseconds a channel."""
    cells = []
    for case in dict.fromkeys(map(report.case_of, rows)):
        mine = {r["variant"]: r for r in rows if report.case_of(r) == case and r["median_s"]}
        ours, eager = mine.get("frozen", mine.get("ours")), mine.get("eager")
        if ours is None or eager is None:
            continue
        micro = [1e6 * x / ours["batch"] for x in (eager["median_s"], ours["median_s"], ours["floor_s"])]
        cells.append(
            [
                ours["function"],
                ours["pass"],
                ours["size"],
                ours["batch"],
                *(f"{x:.{digits}f}" for x in micro[:2]),
                f"{ours['ratio_to_eager']:.1f}",
                f"{micro[2]:.{digits}f}",
                f"{ours['times_the_floor']:.1f}",
                ours["bound"],
            ]
        )
    return table(cells, HEADER)


def measured(stem: str) -> str:
    """What the benchmark found of a stem on two cores, and on a device where one has run it."""
    if stem == "refine":
        return refinement()
    rows = rows_of(stem, result)
    if not rows:
        raise ValueError(f"{RESULTS} holds nothing of {stem!r}: run lomacs-fast bench")
    text = f"Microseconds a channel. {report.conditions(result)}; medians of interleaved runs.\n\n"
    text += f"{distances(rows, 1)}\n\n![Times faster than eager](../figures/{stem}.png)\n"
    for found in on_devices:
        device = rows_of(stem, found)
        if device:
            text += f"\nOn a device: {report.conditions(found)}; captured graphs, every kernel let in.\n\n"
            text += f"{distances(device, 3)}\n"
    return text


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    up = "../" if "/" in page.file.src_uri else ""
    text = MARK.sub(lambda found: measured(found.group(1)).replace("../figures", f"{up}figures"), markdown)
    return text.replace("<!-- losses -->", report.lost(result["cases"]))


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """The figures of the results: one a stem, and those of the whole suite."""
    drawn = report.draw(result)
    for stem in dict.fromkeys(r["stem"] for r in result["cases"]):
        bars = [
            r
            for r in rows_of(stem, result)
            if r["ratio_to_eager"] and r["variant"] in (*report.OURS, "torch.compile")
        ]
        if bars:
            drawn[f"{stem}.png"] = figures.ratios(bars, report.conditions(result))
    for name, figure in drawn.items():
        files.append(File.generated(config, f"figures/{name}", content=_png(figure)))
    return files
