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
MARK = re.compile(r"<!-- measured: (\w+) -->")
HEADER = (
    "function", "pass", "size", "batch", "eager µs", "ours µs", "ratio", "floor µs", "ours / floor", "binds"
)  # fmt: skip

result: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))


def rows_of(stem: str) -> list[dict[str, Any]]:
    kinds = ("main", "latency")
    return [r for r in result["cases"] if r["stem"] == stem and r["kind"] in kinds]


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
    return f"{told}\n\n{table(cells, ('data', 'batch', 'call', 'µs', 'SVD / this', 'floor µs'))}\n"


def measured(stem: str) -> str:
    """Eager, ours and the floor of every case of a stem, microseconds a channel."""
    if stem == "refine":
        return refinement()
    rows = rows_of(stem)
    if not rows:
        raise ValueError(f"{RESULTS} holds nothing of {stem!r}: run lomacs-fast bench")
    cells = []
    for case in dict.fromkeys(map(report.case_of, rows)):
        mine = {r["variant"]: r for r in rows if report.case_of(r) == case and r["median_s"]}
        ours, eager = mine.get("frozen", mine["ours"]), mine["eager"]
        micro = [1e6 * x / ours["batch"] for x in (eager["median_s"], ours["median_s"], ours["floor_s"])]
        cells.append(
            [
                ours["function"],
                ours["pass"],
                ours["size"],
                ours["batch"],
                *(f"{x:.1f}" for x in micro[:2]),
                f"{ours['ratio_to_eager']:.1f}",
                f"{micro[2]:.1f}",
                f"{ours['times_the_floor']:.1f}",
                ours["bound"],
            ]
        )
    told = f"Microseconds a channel. {report.conditions(result)}; medians of interleaved runs."
    return f"{told}\n\n{table(cells, HEADER)}\n\n![Times faster than eager](../figures/{stem}.png)\n"


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
            for r in rows_of(stem)
            if r["ratio_to_eager"] and r["variant"] in (*report.OURS, "torch.compile")
        ]
        if bars:
            drawn[f"{stem}.png"] = figures.ratios(bars, report.conditions(result))
    for name, figure in drawn.items():
        files.append(File.generated(config, f"figures/{name}", content=_png(figure)))
    return files
