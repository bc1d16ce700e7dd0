"""Every figure of accuracy: the published and the refined network, trained alike, on test data.

`python benchmarks/accuracy.py --out DIR` trains both presets at 64x64x32 and 128x128x64 with the same
samples, batch and number of steps, from seed 0 on the built-in generator's four scenarios, and writes
`accuracy.json`, `accuracy.md` and the logs of the runs; a quarter of an hour on two cores. `--weights`
writes the weights and the card that come with the package, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomacs_fast import __version__
from lomacs_fast.cli import TEST_EPOCH, processor_name, table
from lomacs_fast.data.generator import SCENARIOS, ChannelGenerator
from lomacs_fast.evaluation import baselines, costs, refined_by
from lomacs_fast.inference import decompose
from lomacs_fast.metrics import (
    chordal_distance,
    evaluate,
    score,
    spectral_efficiency,
    truncated_svd,
)
from lomacs_fast.pretrained import save_weights
from lomacs_fast.training import PRESETS, TrainConfig, load_network, parse_size, train

SIZES = ("64x64x32", "128x128x64")
STEPS = (0, 1, 2, 4, 8, 16)
SNR_DB = (-10.0, 0.0, 10.0, 20.0, 30.0)
LEADING = 4  # columns whose span is compared
WEIGHTS = Path(__file__).parents[1] / "lomacs_fast" / "weights"
ROOM = ("samples", "batch_size", "max_epochs", "seed")  # what both presets share

Decompose = Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
Batch = tuple[int, int, Tensor, Tensor]


def test_data(size: str, count: int, seed: int) -> list[Batch]:
    M, N, _ = parse_size(size)
    batches = []
    for sid, scenario in enumerate(SCENARIOS):
        generator = ChannelGenerator(M, N, scenario=scenario, seed=seed)
        for start in range(0, count, 64):
            batch = generator.batch(list(range(start, min(start + 64, count))), epoch=TEST_EPOCH)
            batches.append((scenario, sid, batch.input, batch.label))
    return batches


def trained(size: str, preset: str, out: Path, seed: int, threads: int, reuse: bool) -> tuple[Any, dict]:
    """The network of a preset, and what it was trained on; the schedule in epochs is the refined one's."""
    shared = {name: PRESETS["refined"][name] for name in ("samples", "batch_size", "max_epochs")}
    config = TrainConfig(**(PRESETS[preset] | shared), size=size, seed=seed, threads=threads, progress=False)
    best, seconds = out / size / preset / "best.ckpt", None
    if not (reuse and best.is_file()):
        begin = time.perf_counter()
        best = train(config, out / size / preset, overwrite=True)
        seconds = time.perf_counter() - begin
    net, info = load_network(best)
    saved = info.history["training"]
    differ = [name for name in ROOM if saved[name] != getattr(config, name)]
    if differ:
        raise ValueError(f"{best}: was trained with other {', '.join(differ)}; leave out --reuse")
    facts = {name: saved[name] for name in ROOM} | {"seconds": seconds}
    return net, facts | {"step": info.step}


def task(run: Decompose, batches: list[Batch]) -> dict[str, Any]:
    """Means over the test samples: spectral efficiency by allocation and SNR, and the chordal distance."""
    efficiency: dict[str, list[Tensor]] = {f"{a} {s:g}": [] for a in ("equal", "water") for s in SNR_DB}
    distance = []
    for _, sid, H, label in batches:
        U, S, V = run(H, sid)
        for key, found in efficiency.items():
            allocation, snr = key.split()
            found.append(spectral_efficiency(U, S, V, label, float(snr), allocation=allocation))
        best = truncated_svd(label, LEADING)[0]
        distance.append(chordal_distance(U[..., :LEADING], best))
    means = {key: float(torch.cat(found).mean()) for key, found in efficiency.items()}
    return {"efficiency": means, "chordal": float(torch.cat(distance).mean())}


def entry(result: dict[str, Any]) -> dict[str, Any]:
    by = {name: found["ae"] for name, found in result["scenarios"].items()}
    return {"ae": result["ae"], "ortho": result["ortho_u"] + result["ortho_v"], "scenarios": by}


def measure(size: str, args: Any) -> dict[str, Any]:
    r = parse_size(size)[2]
    nets = {
        preset: trained(size, preset, args.out, args.seed, args.threads, args.reuse)
        for preset in ("published", "refined")
    }
    count = args.test if size == SIZES[0] else max(args.test // 2, 1)
    batches = test_data(size, count, args.seed)

    def served(net: Any) -> Decompose:
        return lambda H, sid: decompose(net, H, sid)

    rows: list[dict[str, Any]] = []
    published, refined = nets["published"][0], nets["refined"][0]
    steps = sorted({*STEPS, refined.trained_steps})
    found = evaluate(served(published), batches)
    rows.append({"name": "published"} | entry(found) | costs(published))
    for n in steps:
        with refined_by(refined, n):
            found = evaluate(served(refined), batches)
            rows.append({"name": f"refined, {n} steps", "steps": n} | entry(found) | costs(refined))
    for name, run in baselines(r, True).items():
        found = evaluate(run, batches)
        row = entry(found)
        if name.startswith("svd_lowrank"):  # fewer columns than r: its reconstruction alone
            row |= {"ae": found["rec"], "ortho": None}
            row["scenarios"] = {s: part["rec"] for s, part in found["scenarios"].items()}
        rows.append({"name": name} | row)
    base = next(row["ae"] for row in rows if row["name"] == "svd")
    for row in rows:
        row["ratio"] = row["ae"] / base
        if "profiler_macs_m" in row:
            row["score"] = score(row["ae"], row["profiler_macs_m"])
    few = [(s, sid, H[: args.task], L[: args.task]) for s, sid, H, L in batches]
    runs = {"published": served(published), "refined": served(refined)}
    runs |= {name: baselines(r, True)[name] for name in ("svd", "svd, floor subtracted")}
    tasks = {name: task(run, few) for name, run in runs.items()}
    clean = [(s, sid, L, L) for s, sid, _, L in few]
    tasks["SVD of the clean channel"] = task(baselines(r, True)["svd"], clean)
    training = {preset: facts for preset, (_, facts) in nets.items()}
    return {
        "size": size,
        "test_samples": count,
        "trained_steps": refined.trained_steps,
        "active": refined.refiner.active,
        "rows": rows,
        "tasks": tasks,
        "training": training,
    }


def steps_of(facts: dict[str, Any]) -> int:
    """Steps of a run; the weights that are kept are those of the epoch that validated best."""
    return facts["max_epochs"] * -(-len(SCENARIOS) * round(0.9 * facts["samples"]) // facts["batch_size"])


def report(result: dict[str, Any]) -> str:
    lines = [f"## {result['size']}", ""]
    facts = result["training"]["refined"]
    lines += [
        f"Both networks: {steps_of(facts)} steps of {facts['batch_size']} samples, seed {facts['seed']}; "
        f"{result['test_samples']} test samples a scenario; {result['active']} active columns.",
        "",
    ]
    header = ["", "AE", "of the SVD's", *(f"scenario {s}" for s in SCENARIOS), "MACs, contest (M)",
              "MACs, true (M)", "Score"]  # fmt: skip
    rows = [
        [
            row["name"],
            row["ae"],
            row["ratio"],
            *row["scenarios"].values(),
            row.get("profiler_macs_m"),
            row.get("true_macs_m"),
            row.get("score"),
        ]
        for row in result["rows"]
    ]
    lines += [table(rows, header), ""]
    header = ["bit/s/Hz", *(f"{a}, {s:g} dB" for a in ("equal", "water") for s in SNR_DB),
              f"chordal distance, {LEADING}"]  # fmt: skip
    rows = [
        [name, *(round(v, 3) for v in found["efficiency"].values()), round(found["chordal"], 4)]
        for name, found in result["tasks"].items()
    ]
    return "\n".join([*lines, table(rows, header), ""])


def card(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Weights that come with the package",
        "",
        '`lomacs_fast.load_pretrained("64x64x32")` and `"128x128x64"`: the angular head with refinement, '
        "preset `refined`. Plain arrays and a JSON text in `.npz`, read without pickle.",
        "",
        "Data: spatial covariances of the built-in generator, scenarios 1 to 4 (scene 0 to 3), input divided "
        "by its Frobenius norm; a panel of two polarisations, near square, antennas numbered polarisation, "
        "row, column. Loss: the reconstruction of the clean label.",
        "",
        "| size | steps | active columns | training steps | seed | AE | AE of the SVD | "
        + " | ".join(f"scenario {s}" for s in SCENARIOS)
        + " |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        n = result["trained_steps"]
        row = next(row for row in result["rows"] if row.get("steps") == n)
        svd = next(row for row in result["rows"] if row["name"] == "svd")
        facts = result["training"]["refined"]
        numbers = " | ".join(f"{x:.4f}" for x in (row["ae"], svd["ae"], *row["scenarios"].values()))
        lines.append(
            f"| {result['size']} | {n} | {result['active']} | {facts['step']} of {steps_of(facts)} | "
            f"{facts['seed']} | {numbers} |"
        )
    lines += [
        "",
        "Where they fail: on anything but a noisy covariance. A plain channel is taken by its Hermitian "
        "part, which is another matrix. Of a covariance whose energy needs more columns than the active "
        "ones, what is beyond them is lost. Another panel, or another order of its antennas, makes the "
        "gate filter at the wrong angles: train anew with `--array`. Without noise the filter and the "
        "columns left out still cost their share; `lomacs_fast.approx_svd` is the choice there. Noise "
        "that is not white is not removed.",
        "",
        "Made by `python benchmarks/accuracy.py --weights`.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, logs and results")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--test", type=int, default=200, help="test samples a scenario at 64, half at 128")
    parser.add_argument("--task", type=int, default=25, help="of these in each batch for the task metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", action="store_true", help="take what is finished in --out as it is")
    parser.add_argument("--weights", action="store_true", help="write the weights of the package")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results = list(measurements(args))
    machine = {"processor": processor_name(), "threads": args.threads, "torch": torch.__version__}
    seconds = None if args.reuse else time.perf_counter() - begin
    facts = {"version": __version__, "machine": machine, "seconds": seconds}
    (args.out / "accuracy.json").write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    text = "# Accuracy\n\n" + "\n".join(map(report, results))
    text += f"\n{machine['processor']}, {args.threads} threads, torch {machine['torch']}.\n"
    (args.out / "accuracy.md").write_text(text)
    if args.weights:
        WEIGHTS.mkdir(exist_ok=True)
        for result in results:
            net, _ = load_network(args.out / result["size"] / "refined" / "best.ckpt")
            save_weights(net, WEIGHTS / f"{result['size']}.npz", lean(result), overwrite=True)
        (WEIGHTS / "README.md").write_text(card(results))
    return 0


def measurements(args: Any) -> Iterator[dict[str, Any]]:
    for size in args.sizes:
        file = args.out / size / "result.json"
        if args.reuse and file.is_file():
            result = json.loads(file.read_text())
        else:
            result = measure(size, args)
            file.write_text(json.dumps(result, indent=1) + "\n")
        print(report(result), flush=True)
        yield result


def lean(result: dict[str, Any]) -> dict[str, Any]:
    """What a network says of itself: its data, and its AE by scenario."""
    row = next(row for row in result["rows"] if row.get("steps") == result["trained_steps"])
    keys = ("samples", "batch_size", "max_epochs", "seed", "step")
    facts = {key: result["training"]["refined"][key] for key in keys}
    return {
        "scenarios": list(SCENARIOS),
        "training": facts,
        "ae": row["ae"],
        "ae_by_scenario": row["scenarios"],
    }


if __name__ == "__main__":
    sys.exit(main())
