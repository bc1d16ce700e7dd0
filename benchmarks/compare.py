"""Whether a ratio to eager has fallen: `python -m lomacs_fast.benchmarks.compare NEW [BASE]`.

Compares the rows of `lomacs-fast bench --json NEW` with BASE, by default what is committed of the same
processor or device in `benchmarks/results/`. Exit 1 where a ratio of ours fell by more than the share allowed
in every round of NEW, or a variant of ours has become wrong, 2 where there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = ("ours", "frozen")
KEYS = ("stem", "function", "pass", "size", "batch", "device", "kind", "variant")


def of_ours(result: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The rows of our variants by what identifies them."""
    return {tuple(row[key] for key in KEYS): row for row in result["cases"] if row["variant"] in OURS}


def same_machine(new: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether both were measured on the same processor or device with as many threads."""
    keys = ("device", "gpu") if new["device"] == "cuda" else ("device", "processor", "threads", "cores")
    return all(new.get(key) == base.get(key) for key in keys)


def committed(new: Mapping[str, Any], folder: Path = RESULTS) -> Path | None:
    """The committed results of the machine that `new` was measured on, the latest if there are several."""
    found = []
    for path in sorted(folder.glob("*/suite.json")):
        base = json.loads(path.read_text(encoding="utf-8"))
        if same_machine(new, base):
            found.append((base["date"], path))
    return max(found)[1] if found else None


def regressions(new: Mapping[str, Any], base: Mapping[str, Any], share: float) -> list[str]:
    """A sentence a row of ours whose ratio to eager fell by more than `share`, or that has no time now.

    A row fell where the best of its rounds did: what fell in one round alone is the load of the machine.
    """
    before, now = of_ours(base), of_ours(new)
    found = []
    for key in before.keys() & now.keys():
        old, ratio = before[key]["ratio_to_eager"], now[key]["ratio_to_eager"]
        name = f"{key[1]} {key[2]} {key[3]} batch {key[4]}, {key[7]}"
        if old is None:
            continue
        if ratio is None:
            found.append(f"{name}: {now[key].get('trouble', 'no time')}; it was {old:.2f} times eager")
        elif max(now[key].get("ratios", [ratio])) < (1 - share) * old:
            found.append(f"{name}: {ratio:.2f} times eager, it was {old:.2f}")
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("new", type=Path, help="JSON of `lomacs-fast bench`")
    parser.add_argument("base", type=Path, nargs="?", help="JSON to compare with")
    parser.add_argument("--share", type=float, default=0.2, help="how much a ratio may fall (default 0.2)")
    args = parser.parse_args(argv)
    new = json.loads(args.new.read_text(encoding="utf-8"))
    path = args.base or committed(new)
    if path is None:
        print(f"no results of this machine under {RESULTS}: nothing to compare with", file=sys.stderr)
        return 2
    base = json.loads(path.read_text(encoding="utf-8"))
    shared = len(of_ours(base).keys() & of_ours(new).keys())
    if not shared:
        print(f"{path}: no row in common with {args.new}", file=sys.stderr)
        return 2
    found = regressions(new, base, args.share)
    print("\n".join(found) or f"{shared} ratios of ours are within {args.share:.0%} of {path.parent.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
