"""The whole way in one run: generate, train, prune, finetune, evaluate, compare with LAPACK, report.

`python -m lomacs_fast.demo --out runs/demo` runs the commands that a user would, shows each, and gathers
what they wrote into `report.md`, `report.json` and figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .cli import EXAMPLES, main, processor_name, table
from .data.contest import ContestScenario, open_contest
from .data.files import atomic_path
from .evaluation import evaluate_network, evaluate_svd, labelled_part, sample_of_each
from .inference import decompose
from .metrics import time_per_channel, true_macs, truncated_svd
from .nn import LoMACSSVDNet
from .training import NetworkInfo, load_network, read_history

TERMS = ("ae", "rec", "ortho_u", "ortho_v")


def run(*words: str) -> None:
    """Show a command and run it; the program ends with its exit code if it fails."""
    print(f"\n$ lomacs-fast {shlex.join(words)}", flush=True)
    code = main(words)
    if code:
        raise SystemExit(code)


def _times(nets: dict[str, LoMACSSVDNet], scenario: ContestScenario) -> dict[str, Any]:
    """Median milliseconds a channel at batch 256 and batch 1, all variants taking turns."""
    input, _ = labelled_part(scenario, "train")
    times: dict[str, Any] = {}
    for batch in (256, 1):
        H = input.read(slice(0, batch))
        fns: dict[str, Any] = {name: partial(decompose, net, sid=0) for name, net in nets.items()}
        fns["torch.linalg.svd"] = partial(truncated_svd, r=scenario.config.r)
        measured = time_per_channel(fns, H, repeats=9)
        for name, seconds in measured.items():
            row = {key: 1e3 * seconds[key] for key in ("median", "q25", "q75")}
            times.setdefault(name, {})[f"batch_{batch}"] = row
    return times


def _figures(
    out: Path, nets: dict[str, LoMACSSVDNet], info: NetworkInfo, scenarios: list[ContestScenario], facts: Any
) -> list[tuple[str, str]]:
    from .plots import (
        plot_channels,
        plot_cumulative_energy,
        plot_gate,
        plot_gram,
        plot_learning_curve,
        plot_pareto,
        plot_spectrum,
        plot_time,
        save_figure,
    )

    net = nets["network"]
    samples = sample_of_each(net, info, scenarios)
    names = [f"scenario {s['scenario']}" for s in samples]
    labels = {f"scenario {s.scenario}": labelled_part(s, "test")[1].read(slice(0, 100)) for s in scenarios}
    history = read_history(out / "train")
    tuned = read_history(out / "pruned" / "finetune")
    whole = {key: [*history[key], *tuned[key]] for key in history}
    whole["epoch"] = [float(k) for k in range(len(whole["epoch"]))]
    medians = {
        name: tuple(1e3 * t["batch_256"][key] for key in ("median", "q25", "q75"))
        for name, t in facts["milliseconds_a_channel"].items()
    }
    figures = {
        "channels": ("Input, label and estimate", plot_channels(samples)),
        "cumulative_energy": (
            "Cumulative energy of the labels",
            plot_cumulative_energy({name: torch.linalg.svdvals(H) for name, H in labels.items()}),
        ),
        "learning_curve": (
            "Training, then finetuning of the pruned network",
            plot_learning_curve(whole, finetune=len(history["epoch"])),
        ),
        "gram": ("Orthogonality of one sample", plot_gram(samples[0]["U"], samples[0]["V"])),
        "spectrum": (
            "Predicted and true spectrum",
            plot_spectrum([s["S"] for s in samples], [s["S_true"] for s in samples], names=names),
        ),
        "pareto": (
            "AE against MACs of pruned networks, before finetuning",
            plot_pareto(facts["sweep"], baseline=facts["results"]["torch.linalg.svd"]["ae"]),
        ),
        "gate": ("The frequency gate", plot_gate(samples)),
        "time": ("Time a channel at batch 256, two variants of the network and LAPACK", plot_time(medians)),
    }
    for name, (_, figure) in figures.items():
        save_figure(figure, out / f"{name}.png")
    return [(f"{name}.png", title) for name, (title, _) in figures.items()]


def _report(facts: dict[str, Any], figures: list[tuple[str, str]]) -> str:
    results, times = facts["results"], facts["milliseconds_a_channel"]
    ae_rows = []
    for scenario in (*next(iter(results.values()))["scenarios"], "all"):
        for name, result in results.items():
            entry = result if scenario == "all" else result["scenarios"][scenario]
            ae_rows.append([scenario, name, *[float(entry[t]) for t in TERMS]])
    cost_rows = []
    for name, result in results.items():
        timed = times.get(name, {})
        cost_rows.append(
            [
                name,
                float(result["ae"]),
                result.get("profiler_macs_m"),
                result.get("true_macs_m"),
                result.get("score"),
                result.get("parameters"),
                timed.get("batch_256", {}).get("median"),
                timed.get("batch_1", {}).get("median"),
            ]
        )
    cost_header = ["", "AE", "MACs, contest (M)", "MACs, true (M)", "Score", "parameters", "ms, batch 256",
                   "ms, batch 1"]  # fmt: skip
    m = facts["machine"]
    lines = [
        "# Demonstration",
        "",
        f"{facts['size']}, {facts['train_samples']} training and {facts['test_samples']} test samples in "
        f"each of four scenarios; {facts['epochs']} epochs of training and {facts['finetune_epochs']} of "
        "finetuning. "
        f"The published schedule has 400 and 60: this shows the way, not the end of it. "
        f"{m['processor']}, {m['threads']} threads, torch {m['torch']}; {facts['seconds']:.0f} s in all.",
        "",
        "AE is measured against the clean label, on test samples; `torch.linalg.svd` decomposes the same "
        f"noisy input and is cut at r = {facts['r']}.",
        "",
        table(cost_rows, cost_header),
        "",
        "Score = 100 AE + MACs (contest), in millions. The contest's count sees no operation of an SVD, so "
        "the SVD has none. Times are medians of interleaved runs, in milliseconds a channel.",
        "",
        table(ae_rows, ["scenario", "", "AE", "reconstruction", "orthogonality U", "orthogonality V"]),
        "",
    ]
    for file, title in figures:
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    lines += ["## The commands", "", "```", *facts["commands"], "```", ""]
    return "\n".join(lines)


def demo(
    out: Path,
    *,
    size: str = "64x64x32",
    train: int = 1500,
    test: int = 200,
    epochs: int = 16,
    finetune_epochs: int = 4,
    k_len: int = 16,
    gate_hidden: int = 16,
    batch_size: int = 64,
    lr: float = 4e-3,
) -> dict[str, Any]:
    """Run everything into the folder `out` and return what `report.json` holds."""
    begin = time.perf_counter()
    data, checkpoint = str(out / "data"), str(out / "train" / "best.ckpt")
    commands: list[str] = []

    def step(*words: str) -> None:
        commands.append(f"lomacs-fast {shlex.join(words)}")
        run(*words)

    step("generate", "--scenario", "1", "2", "3", "4", "--size", size, "--train", str(train),
         "--test", str(test), "--seed", "0", "--out", data, "--overwrite")  # fmt: skip
    step("analyze", "--data", data, "--samples", "200", "--out", str(out / "statistics"), "--overwrite")
    step("train", "--data", data, "--out", str(out / "train"), "--max-epochs", str(epochs), "--seed", "0",
         "--batch-size", str(batch_size), "--lr", str(lr), "--overwrite")  # fmt: skip
    step("evaluate", "--checkpoint", checkpoint, "--data", data, "--json", str(out / "network.json"),
         "--overwrite")  # fmt: skip
    sizes = sorted({max(1, k_len // 4), max(1, k_len // 2), k_len, 2 * k_len})
    hidden = sorted({max(1, gate_hidden // 2), gate_hidden, 2 * gate_hidden})
    step("prune", "--checkpoint", checkpoint, "--k-len", str(k_len), "--gate-hidden", str(gate_hidden),
         "--data", data, "--finetune-epochs", str(finetune_epochs), "--batch-size", str(batch_size),
         "--lr", str(lr / 2), "--sweep-k-len", *map(str, sizes), "--sweep-gate-hidden", *map(str, hidden),
         "--out", str(out / "pruned"), "--overwrite")  # fmt: skip
    scenarios = open_contest(data)
    net, info = load_network(checkpoint)
    pruned, _ = load_network(out / "pruned" / "pruned.ckpt")
    tuned, _ = load_network(out / "pruned" / "finetune" / "best.ckpt")
    nets = {"network": net, "pruned": pruned, "pruned, finetuned": tuned}
    print("\nComparing with torch.linalg.svd", flush=True)
    results: dict[str, Any] = {name: evaluate_network(n, info, scenarios) for name, n in nets.items()}
    svd = evaluate_svd(scenarios, net.r)
    sample = labelled_part(scenarios[0], "test")[0].read([0])
    results["torch.linalg.svd"] = svd | {
        "true_macs_m": true_macs(lambda H: truncated_svd(H, net.r), sample) / 1e6
    }
    timed = {name: nets[name] for name in ("network", "pruned, finetuned")}
    facts: dict[str, Any] = {
        "size": size,
        "r": net.r,
        "train_samples": train,
        "test_samples": test,
        "epochs": epochs,
        "finetune_epochs": finetune_epochs,
        "results": results,
        "milliseconds_a_channel": _times(timed, scenarios[0]),
        "sweep": json.loads((out / "pruned" / "prune.json").read_text())["sweep"],
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lomacs_fast": __version__,
        },
        "commands": commands,
    }
    figures = _figures(out, timed, info, scenarios, facts)
    facts["seconds"] = time.perf_counter() - begin
    report = _report(facts, figures)
    for name, text in (("report.json", json.dumps(facts, indent=2) + "\n"), ("report.md", report)):
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"\n{report.split('## ')[0].strip()}\n\n{out / 'report.md'}: the whole report, with figures")
    return facts


def cli() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lomacs_fast.demo", description=__doc__, epilog=f"By hand: {EXAMPLES['generate']}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the report")
    parser.add_argument("--size", default="64x64x32", help="MxNxr")
    for name, value in (("train", 1500), ("test", 200), ("epochs", 16), ("finetune-epochs", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    demo(
        out,
        size=args.size,
        train=args.train,
        test=args.test,
        epochs=args.epochs,
        finetune_epochs=args.finetune_epochs,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli())
