"""The command `lomacs-fast`: generate, analyze, train, prune, evaluate, predict, svd, bench, info."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_args, get_type_hints

import torch

from . import __version__, backend_table, library_states

if TYPE_CHECKING:
    from .data.layouts import ChannelSource
    from .nn import LoMACSSVDNet

IN_MEMORY = 1 << 28  # bytes of a matrix up to which `svd` reads it whole
TEST_EPOCH = (1 << 32) - 1  # generated test samples never meet those of a training epoch

EXAMPLES = {
    "generate": "lomacs-fast generate --scenario 1 2 3 4 --size 64x64x32 --train 1500 --test 200 --out DIR",
    "analyze": "lomacs-fast analyze --data DIR --out REPORT",
    "train": "lomacs-fast train --data DIR --out RUN --max-epochs 10 --seed 0",
    "prune": "lomacs-fast prune --checkpoint RUN/best.ckpt --k-len 16 --gate-hidden 16 --out PRUNED",
    "evaluate": "lomacs-fast evaluate --checkpoint RUN/best.ckpt --data DIR --json out.json",
    "predict": "lomacs-fast predict --checkpoint RUN/best.ckpt --input H.npy --scenario 1 --out out.npz",
    "svd": "lomacs-fast svd --input H.npy --rank 16 --out svd.npz",
    "bench": "lomacs-fast bench --quick --json bench.json --markdown bench.md --figures FIGURES",
    "info": "lomacs-fast info",
}

DESCRIPTIONS = {
    "generate": "Make noisy channels and clean labels with the built-in generator.",
    "analyze": "Measure what a set of channels is like: table, JSON and figures.",
    "train": "Train a network on a contest folder, or on the built-in generator.",
    "prune": "Rebuild a smaller network from a trained one, and finetune it.",
    "evaluate": "Measure the approximation error of a checkpoint, its cost and its Score.",
    "predict": "Write U, S and V of channels in any layout, S in the scale of the input.",
    "svd": "The leading singular triplets of given matrices, by optimisation or directly.",
    "bench": "Time every stem, the training step and inference beside eager and the decompositions.",
    "info": "Show versions, devices, what is installed, and which backend can serve which op.",
}


def _path(text: str) -> str:
    """A path as an option; an empty one is a mistake, not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _write_json(values: Any, path: str | os.PathLike[str], overwrite: bool) -> None:
    from .data.files import atomic_path

    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table; floats get four significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    text = [list(header), *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(row[k]) for row in text) for k in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in text]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _progress(items: Iterable[Any], total: int, what: str, enabled: bool = True) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, desc=what, disable=not enabled, leave=False)


def _output_folder(path: str, overwrite: bool) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder, got a file")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; add --overwrite to write into it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add_generate(parser: Any) -> None:
    parser.add_argument("--scenario", type=int, nargs="+", default=[1, 2, 3, 4], help="scenarios, 1 to 4")
    parser.add_argument("--size", type=str, default="64x64x32", help="MxNxr")
    parser.add_argument("--train", type=int, default=1500, help="training samples a scenario")
    parser.add_argument("--test", type=int, default=200, help="test samples a scenario")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    parser.add_argument(
        "--kind",
        type=str,
        default="auto",
        choices=["auto", "covariance", "channel"],
        help="spatial covariances or plain channels; auto: covariances where M = N",
    )
    parser.add_argument(
        "--layout",
        type=str,
        default="contest",
        choices=["contest", "complex", "real"],
        help="the contest's folder, or .npy files (complex64, or float32 with a last axis of 2)",
    )
    parser.add_argument("--round", type=int, default=1, help="round of the contest's file names")
    parser.add_argument("--out", type=_path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _generate(args: Any) -> None:
    from .data.contest import ContestWriter, contest_path
    from .data.files import NpyWriter, refuse_existing, remove_stale, replace_group, temporary_beside
    from .data.generator import ChannelGenerator
    from .training.config import parse_size

    M, N, r = parse_size(args.size)
    kind = ("covariance" if M == N else "channel") if args.kind == "auto" else args.kind
    scenarios = sorted(set(args.scenario))
    for name in ("train", "test"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(args, name)}")
    if args.train + args.test == 0:
        raise ValueError("--train and --test are both 0, expected samples to make")
    generators = [ChannelGenerator(M, N, scenario=s, seed=args.seed, kind=kind) for s in scenarios]
    out = Path(args.out)

    def target(scenario: int, part: str, what: str) -> Path:
        if args.layout == "contest":
            return contest_path(out, args.round, f"{part.capitalize()}{what}", scenario)
        return out / f"scenario{scenario}_{part}_{'input' if what == 'Data' else 'label'}.npy"

    parts = [(part, getattr(args, part)) for part in ("train", "test") if getattr(args, part)]
    for s in scenarios:  # all or none: no scenario is written where a later one would be refused
        for part, _ in parts:
            for what in ("Data", "Label"):
                refuse_existing(target(s, part, what), args.overwrite)

    def chunks(generator: ChannelGenerator, part: str, count: int) -> Iterable[Any]:
        starts = range(0, count, 100)
        for start in _progress(starts, len(starts), f"scenario {generator.scenario}, {part}"):
            indices = range(start, min(start + 100, count))
            batch = generator.batch(list(indices), epoch=0 if part == "train" else TEST_EPOCH)
            yield start, batch.input, batch.label

    for s, generator in zip(scenarios, generators, strict=True):
        if args.layout == "contest":
            with ContestWriter(
                out,
                s,
                round=args.round,
                M=M,
                N=N,
                r=r,
                n_train=args.train,
                n_test=args.test,
                overwrite=args.overwrite,
            ) as writer:
                for part, count in parts:
                    for _, input, label in chunks(generator, part, count):
                        getattr(writer, part)(input, label)
            continue
        out.mkdir(parents=True, exist_ok=True)
        pairs = []
        try:
            for part, count in parts:
                files = [target(s, part, what) for what in ("Data", "Label")]
                shape = (count, M, N) if args.layout == "complex" else (count, M, N, 2)
                dtype = "<c8" if args.layout == "complex" else "<f4"
                pairs += [(temporary_beside(file), file) for file in files]
                for file in files:
                    remove_stale(file)
                first, second = (
                    NpyWriter(temporary, shape, dtype, target=file) for temporary, file in pairs[-2:]
                )
                with first as a, second as b:
                    for start, *both in chunks(generator, part, count):
                        for sink, H in zip((a, b), both, strict=True):
                            rows = H if args.layout == "complex" else torch.view_as_real(H)
                            sink.write(start, rows.numpy())
            replace_group(pairs)
        finally:
            for temporary, _ in pairs:
                temporary.unlink(missing_ok=True)
    print(f"{out}: scenarios {', '.join(map(str, scenarios))}, {args.train} training and {args.test} test "
          f"samples each of {M}x{N} ({kind}), r = {r}")  # fmt: skip


def _add_data_options(parser: Any, what: str) -> None:
    parser.add_argument("--data", type=_path, required=True, help=what)
    parser.add_argument("--scenarios", type=int, nargs="+", default=None, help="scenarios; all of the folder")
    parser.add_argument("--round", type=int, default=None, help="round, where the folder holds several")


def _add_analyze(parser: Any) -> None:
    _add_data_options(parser, "contest folder, or a file in any layout")
    parser.add_argument(
        "--label", type=_path, default=None, help="file with the clean label of a --data file"
    )
    parser.add_argument("--layout", type=str, default="auto", help="layout of the files")
    parser.add_argument("--key", type=str, default=None, help="name of the array inside a file")
    parser.add_argument("--part", type=str, default="train", choices=["train", "test"], help="contest part")
    parser.add_argument("--samples", type=int, default=1000, help="samples a scenario; 0 takes all")
    parser.add_argument(
        "--checkpoint", type=_path, default=None, help="also the energy of its column dictionary"
    )
    parser.add_argument("--out", type=_path, default=None, help="folder for statistics.json and the figures")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that exists")


def _analyze(args: Any) -> None:
    from .data.contest import open_contest
    from .data.layouts import open_channels
    from .data.statistics import channel_statistics, dictionary_energy, summarize

    if args.samples < 0:
        raise ValueError(f"--samples must be at least 0, got {args.samples}")
    sources: dict[str, tuple[ChannelSource, ChannelSource | None]] = {}
    if Path(args.data).is_dir():
        if args.label is not None:
            raise ValueError("--label goes with a --data file, a contest folder holds its own labels")
        for s in open_contest(args.data, scenarios=args.scenarios, round=args.round):
            pair = (s.train_input, s.train_label) if args.part == "train" else (s.test_input, s.test_label)
            if pair[0] is None:
                raise ValueError(f"{args.data}: scenario {s.scenario} has no {args.part} data")
            # what a network must learn is the label; the input stands beside it
            sources[f"scenario {s.scenario}"] = (pair[0], pair[1])
    else:
        if args.scenarios is not None or args.round is not None:
            raise ValueError(f"--scenarios and --round go with a contest folder, {args.data} is a file")
        label = None if args.label is None else open_channels(args.label, args.layout, key=args.key)
        source = open_channels(args.data, args.layout, key=args.key)
        if label is not None and (len(label), label.M, label.N) != (len(source), source.M, source.N):
            raise ValueError(
                f"{args.label}: expected {len(source)} labels of {source.M}x{source.N}, "
                f"got {len(label)} of {label.M}x{label.N}"
            )
        sources[Path(args.data).name] = (source, label)
    out = None if args.out is None else _output_folder(args.out, args.overwrite)

    values: dict[str, dict[str, torch.Tensor]] = {}
    for name, (source, label) in sources.items():
        count = len(source) if args.samples == 0 else min(args.samples, len(source))
        parts: list[dict[str, torch.Tensor]] = []
        starts = range(0, count, 64)
        for start in _progress(starts, len(starts), name):
            chunk = slice(start, min(start + 64, count))
            H = source.read(chunk)
            if label is None:
                parts.append(channel_statistics(H))
            else:
                parts.append(channel_statistics(label.read(chunk), input=H))
        values[name] = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    summary: dict[str, Any] = {name: summarize(stats) for name, stats in values.items()}
    rows = []
    for key in next(iter(summary.values())):
        means = [summary[name][key]["mean"] for name in summary]
        if isinstance(means[0], list):  # a curve over k: its first points
            rows += [[f"{key}, k = {k + 1}", *[m[k] for m in means]] for k in range(min(3, len(means[0])))]
        else:
            rows.append([key, *means])
    print(table(rows, ["mean of", *summary]))
    if args.checkpoint is not None:
        from .nn import GroupedProjectedAttention
        from .training import load_network

        net, _ = load_network(args.checkpoint)
        shares = {}
        for i, block in enumerate(net.blocks):
            mixer = cast(torch.nn.Sequential, block)[1]
            if isinstance(mixer, GroupedProjectedAttention):
                pk, pv = (torch.stack(list(p)) for p in (mixer.Pk, mixer.Pv))
                shares[f"blocks.{i}"] = dictionary_energy(pk.detach(), pv.detach()).tolist()
        summary["column_dictionary"] = shares
        print("\ncolumn dictionary: largest share of a column's energy, by block and group")
        for name, groups in shares.items():
            print(f"  {name}: " + ", ".join(f"{max(g):.3f}" for g in groups))
    if out is not None:
        from .plots import plot_column_dictionary, plot_statistics, save_figure

        files = ["statistics.json", "statistics.png"]
        save_figure(plot_statistics(values), out / "statistics.png")
        if summary.get("column_dictionary"):
            save_figure(plot_column_dictionary(summary["column_dictionary"]), out / "column_dictionary.png")
            files.append("column_dictionary.png")
        _write_json(summary, out / "statistics.json", overwrite=True)
        print(f"\n{out}: {', '.join(files)}")


def _add_train(parser: Any) -> None:
    from .training.config import PRESETS, TrainConfig

    parser.add_argument("--config", type=_path, help="YAML file with the options below, _ in place of -")
    parser.add_argument("--out", type=_path, required=True, help="folder of the run")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="options to begin with, under --config and those given: published is the default of each; "
        "refined is the angular head with three steps of refinement, for covariances",
    )
    parser.add_argument("--init", type=_path, help="checkpoint to start from, with its architecture")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its options")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    hints = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        option: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
        if f.name == "scenarios":
            option |= {"type": int, "nargs": "+"}
        elif hints[f.name] is bool:
            option |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            option["type"] = next(
                (kind for kind in (int, float) if kind in (hints[f.name], *get_args(hints[f.name]))), str
            )
        parser.add_argument("--" + f.name.replace("_", "-"), **option)


def _train(args: Any) -> None:
    from .training import PRESETS, TrainConfig, load_network, read_config_values, train

    values: dict[str, Any] = {} if args.preset is None else dict(PRESETS[args.preset])
    if args.resume:
        # the run's own options, then those given again
        values |= read_config_values(Path(args.out) / "config.yaml")
    if args.config is not None:
        values |= read_config_values(args.config)
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    config = TrainConfig(**(values | {name: value for name, value in given.items() if value is not None}))
    init, scenarios = None, None
    if args.init is not None:
        if args.resume:
            raise ValueError("--init starts a new run, --resume goes on with one: expected one of them")
        init, info = load_network(args.init)
        scenarios = info.scenarios
    best = train(
        config,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        init=init,
        init_scenarios=scenarios,
    )
    print(f"{best}: best checkpoint; {best.with_name('last.ckpt').name} is the last one")


def _add_prune(parser: Any) -> None:
    parser.add_argument("--checkpoint", type=_path, required=True, help="trained network")
    parser.add_argument("--out", type=_path, required=True, help="folder for pruned.ckpt and prune.json")
    parser.add_argument("--k-len", type=int, default=None, help="columns to keep")
    parser.add_argument("--gate-hidden", type=int, default=None, help="hidden channels to keep")
    parser.add_argument("--energy", type=float, default=None, help="share of the scores to keep, in (0, 1]")
    parser.add_argument("--macs", type=float, default=None, help="budget in millions, the contest's count")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of P_v in a column's score")
    parser.add_argument(
        "--data", type=_path, default=None, help="contest folder, for finetuning and the sweep"
    )
    parser.add_argument("--finetune-epochs", type=int, default=0, help="epochs of finetuning (published: 60)")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of the finetuning")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step of the finetuning")
    parser.add_argument("--seed", type=int, default=0, help="seed of the finetuning")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--sweep-k-len", type=int, nargs="+", default=None, help="sizes to measure")
    parser.add_argument("--sweep-gate-hidden", type=int, nargs="+", default=None, help="sizes to measure")
    parser.add_argument("--progress", type=_boolean, default=True, help="show a progress bar")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that exists")


def _prune(args: Any) -> None:
    from .data.contest import open_contest
    from .evaluation import batches, check_size
    from .inference import decompose
    from .metrics import evaluate
    from .pruning import prune, sweep
    from .training import TrainConfig, load_network, remove_run, save_network

    net, info = load_network(args.checkpoint)
    targets = (args.k_len, args.gate_hidden, args.energy, args.macs)
    sweeping = args.sweep_k_len or args.sweep_gate_hidden
    if all(t is None for t in targets) and not sweeping:
        raise ValueError("expected a target: --k-len, --gate-hidden, --energy, --macs or a sweep")
    if args.finetune_epochs < 0:
        raise ValueError(f"--finetune-epochs must be at least 0, got {args.finetune_epochs}")
    if (args.finetune_epochs or sweeping) and args.data is None:
        raise ValueError("--finetune-epochs and the sweep need --data")
    scenarios = [] if args.data is None else open_contest(args.data, scenarios=info.scenarios)
    check_size(net, scenarios)
    smaller: LoMACSSVDNet | None = None
    report: dict[str, Any] = {}
    if any(t is not None for t in targets):
        smaller, pruned = prune(
            net,
            k_len=args.k_len,
            gate_hidden=args.gate_hidden,
            energy=args.energy,
            macs=args.macs,
            alpha=args.alpha,
        )
        report |= {"before": pruned.before, "after": pruned.after}
    elif args.finetune_epochs:
        raise ValueError("--finetune-epochs needs a target: --k-len, --gate-hidden, --energy or --macs")
    k_lens, hidden = args.sweep_k_len or [net.k_len], args.sweep_gate_hidden or [net.gate_hidden]
    if sweeping:
        for k_len, gate_hidden in ((max(k_lens), max(hidden)), (min(k_lens), min(hidden))):
            prune(net, k_len=k_len, gate_hidden=gate_hidden, alpha=args.alpha)
    config = None
    if args.finetune_epochs:
        config = TrainConfig(
            data=args.data,
            scenarios=list(info.scenarios),
            max_epochs=args.finetune_epochs,
            lr=args.lr,
            batch_size=args.batch_size,
            seed=args.seed,
            threads=args.threads,
            finetune=True,
            progress=args.progress,
        )
    out = _output_folder(args.out, args.overwrite)
    if (out / "finetune").is_dir():  # of the network that is replaced now
        remove_run(out / "finetune")
    keys = ("k_len", "gate_hidden", "macs_m", "parameters")
    if smaller is not None:
        save_network(smaller, out / "pruned.ckpt", scenarios=info.scenarios, pruned_from=str(args.checkpoint))
        report |= {"before": pruned.before, "after": pruned.after}
        header = ["", "k_len", "gate_hidden", "MACs (M)", "parameters"]
        rows = [[name, *[report[name][key] for key in keys]] for name in ("before", "after")]
        print(table(rows, header))
        if config is not None:
            from .training import train

            best = train(config, out / "finetune", init=smaller, init_scenarios=info.scenarios)
            print(f"{best}: finetuned")
    if sweeping:
        from .plots import plot_pareto, save_figure

        def error(candidate: Any) -> float:
            data = batches(scenarios, info)
            return evaluate(lambda H, sid: decompose(candidate, H, sid), data)["ae"]

        points = sweep(net, error, k_lens, hidden, alpha=args.alpha)
        report["sweep"] = points
        save_figure(plot_pareto(points), out / "pareto.png")
        columns = (*keys, "ae")
        print(table([[p[key] for key in columns] for p in points], columns))
    _write_json(report, out / "prune.json", overwrite=True)


def _add_evaluate(parser: Any) -> None:
    parser.add_argument("--checkpoint", type=_path, required=True, help="network to evaluate")
    _add_data_options(parser, "contest folder with labels")
    parser.add_argument(
        "--part", type=str, default="test", choices=["train", "test"], help="part of the data"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="samples at once")
    parser.add_argument(
        "--refine-steps",
        type=int,
        nargs="+",
        default=None,
        help="also at these numbers of refinement steps, with time and LAPACK beside them; with --figures a "
        "figure of AE against cost",
    )
    parser.add_argument(
        "--published",
        type=_path,
        default=None,
        help="checkpoint of a network without refinement, for a point in that figure",
    )
    parser.add_argument("--svd", action="store_true", help="also torch.linalg.svd of the noisy input")
    parser.add_argument("--json", type=_path, default=None, help="file for the numbers")
    parser.add_argument("--figures", type=_path, default=None, help="folder for figures")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _evaluate(args: Any) -> None:
    from .data.contest import open_contest
    from .data.files import refuse_existing
    from .evaluation import evaluate_knob, evaluate_network, evaluate_svd, published_point, sample_of_each
    from .training import load_network

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    net, info = load_network(args.checkpoint)
    if args.refine_steps is not None and not net.trained_steps:
        raise ValueError(f"--refine-steps needs a network with refinement, {args.checkpoint} has none")
    for count in args.refine_steps or []:
        if count < 0:
            raise ValueError(f"--refine-steps must be at least 0, got {count}")
    if args.published is not None and args.refine_steps is None:
        raise ValueError("--published goes with --refine-steps")
    scenarios = open_contest(args.data, scenarios=args.scenarios, round=args.round)
    if args.json is not None:
        refuse_existing(args.json, args.overwrite)
        if not Path(args.json).absolute().parent.is_dir():
            raise FileNotFoundError(f"{args.json}: the folder {Path(args.json).parent} does not exist")
    folder = None if args.figures is None else _output_folder(args.figures, args.overwrite)
    part = args.part
    result = evaluate_network(net, info, scenarios, part=part, batch_size=args.batch_size)
    keys = (
        *("samples", "ae", "rec", "ortho_u", "ortho_v"),
        *("profiler_macs_m", "true_macs_m", "fast_true_macs_m", "score"),
    )
    rows = [[name, *[entry[k] for k in keys]] for name, entry in result["scenarios"].items()]
    rows.append(["all", *[result[k] for k in keys]])
    if args.svd:
        svd = evaluate_svd(scenarios, net.r, part=part, batch_size=args.batch_size)
        result["svd"] = svd
        entries = [*((f"SVD {name}", e) for name, e in svd["scenarios"].items()), ("SVD all", svd)]
        rows += [[name, *[e.get(k) for k in keys]] for name, e in entries]
    print(table(rows, ["scenario", *keys]))
    if args.refine_steps is not None:
        knob = evaluate_knob(net, info, scenarios, args.refine_steps, part=part, batch_size=args.batch_size)
        if args.published is not None:
            other, about = load_network(args.published)
            if other.trained_steps:
                raise ValueError(f"--published needs a network without refinement, {args.published} has one")
            knob.append(published_point(other, about, scenarios, part=part, batch_size=args.batch_size))
        result["knob"] = knob
        columns = ("name", "ae", "profiler_macs_m", "true_macs_m", "score", "microseconds")
        print("\n" + table([[p.get(c) for c in columns] for p in knob], columns))
    if args.json is not None:
        _write_json(result, args.json, args.overwrite)
    if folder is not None:
        from .plots import plot_channels, plot_gate, plot_gram, plot_spectrum, save_figure

        samples = sample_of_each(net, info, scenarios, part=part)
        save_figure(plot_channels(samples), folder / "channels.png")
        names = ["channels.png", "gram.png", "spectrum.png"]
        if net.head == "pooled":
            save_figure(plot_gate(samples), folder / "gate.png")
            names.insert(1, "gate.png")
        if "knob" in result:
            from .plots import plot_knob

            save_figure(plot_knob(result["knob"]), folder / "knob.png")
            names.append("knob.png")
        save_figure(plot_gram(samples[0]["U"], samples[0]["V"]), folder / "gram.png")
        predicted, true = ([s[key] for s in samples] for key in ("S", "S_true"))
        labels = [f"scenario {s['scenario']}" for s in samples]
        save_figure(plot_spectrum(predicted, true, labels), folder / "spectrum.png")
        print(f"{folder}: {', '.join(names)}")


def _add_predict(parser: Any) -> None:
    parser.add_argument("--checkpoint", type=_path, required=True, help="network to use")
    parser.add_argument("--input", type=_path, required=True, help="file in any layout, or a contest folder")
    parser.add_argument("--layout", type=str, default="auto", help="layout of the file")
    parser.add_argument("--key", type=str, default=None, help="name of the array inside the file")
    parser.add_argument("--scenario", type=int, default=None, help="scenario; needed where there are several")
    parser.add_argument("--round", type=int, default=None, help="round, where a folder holds several")
    parser.add_argument("--batch-size", type=int, default=256, help="samples at once")
    parser.add_argument("--out", type=_path, required=True, help="file ending in .npz (contest), .npy or .pt")
    parser.add_argument("--progress", type=_boolean, default=True, help="show a progress bar")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def _predict(args: Any) -> None:
    from .data.contest import open_contest
    from .data.layouts import open_channels
    from .data.output import PredictionWriter
    from .evaluation import check_size
    from .freezing import freeze
    from .inference import decompose
    from .metrics import contest_macs
    from .training import load_network

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    net, info = load_network(args.checkpoint)
    sid = info.sid(args.scenario)
    source: ChannelSource | None
    if Path(args.input).is_dir():
        scenario = open_contest(args.input, scenarios=[info.scenarios[sid]], round=args.round)[0]
        check_size(net, [scenario])
        source = scenario.test_input
        if source is None:
            raise ValueError(f"{args.input}: scenario {scenario.scenario} has no test data")
    else:
        source = open_channels(args.input, args.layout, key=args.key)
    if (source.M, source.N) != (net.M, net.N):
        raise ValueError(
            f"{args.input}: holds {source.M}x{source.N} channels, the checkpoint takes {net.M}x{net.N}"
        )
    macs = contest_macs(net) / 1e6
    pooled = net.trained_steps and net.head == "pooled"
    n, served = len(source), net if pooled else freeze(net)
    with PredictionWriter(args.out, n, net.M, net.N, net.r, macs=macs, overwrite=args.overwrite) as writer:
        starts = range(0, n, args.batch_size)
        for start in _progress(starts, len(starts), "predict", args.progress):
            H = source.read(slice(start, min(start + args.batch_size, n)))
            writer.write(start, *decompose(served, H, sid, first=start, name=str(source.path)))
    print(f"{args.out}: {n} samples, U {net.M}x{net.r}, S {net.r}, V {net.N}x{net.r}")


def _add_svd(parser: Any) -> None:
    from .neural_svd.extraction import PHASES
    from .neural_svd.factors import NESTINGS, NETS, ORTHS
    from .neural_svd.solver import METHODS, SIGMAS

    def number_or_balance(text: str) -> float | str:
        return text if text == "balance" else float(text)

    number_or_balance.__name__ = "number or balance"
    parser.add_argument("--input", type=_path, required=True, help=".npy of one matrix, or channels")
    parser.add_argument("--layout", type=str, default="auto", help="layout of channels in the file")
    parser.add_argument("--key", type=str, default=None, help="name of the array inside the file")
    parser.add_argument("--rank", type=int, nargs="+", default=None, metavar="L",
                        help="triplets, or transmit and receive chains; all where nothing says")  # fmt: skip
    parser.add_argument(
        "--energy", type=float, default=None, help="share of the energy that chooses the rank"
    )
    parser.add_argument(
        "--trim", type=float, default=None, help="share of the largest singular value to cut at"
    )
    parser.add_argument("--method", type=str, default="auto", choices=METHODS, help="how")
    parser.add_argument("--net", type=str, default="table", choices=NETS, help="what gives the factors")
    parser.add_argument("--orth", type=str, default="bjorck", choices=ORTHS, help="orthogonality")
    parser.add_argument("--nesting", type=str, default="joint", choices=NESTINGS, help="nesting")
    parser.add_argument("--phase", type=str, default="sigma", choices=PHASES[:2], help="signs and phases")
    parser.add_argument("--sigma", type=str, default="rayleigh", choices=SIGMAS, help="singular values")
    parser.add_argument(
        "--lam", type=number_or_balance, default=1.0, help="weight of the penalty, or balance"
    )
    parser.add_argument("--lr", type=float, default=None, help="learning rate of Adam")
    parser.add_argument("--batch", type=int, default=None, help="rows and columns of a minibatch of Adam")
    parser.add_argument("--max-steps", type=int, default=None, help="largest number of steps")
    parser.add_argument("--tol", type=float, default=None, help="relative step at which it ends")
    parser.add_argument("--seed", type=int, default=0, help="seed of the start")
    parser.add_argument("--threads", type=int, default=None, help="threads")
    parser.add_argument("--checkpoint", type=_path, default=None, help="file to go on from when interrupted")
    parser.add_argument("--checkpoint-every", type=int, default=1, help="steps between two of them")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--out", type=_path, required=True, help=".npz for U, S and Vh")
    parser.add_argument("--json", type=_path, default=None, help="file for errors, steps and history")
    parser.add_argument("--figure", type=_path, default=None, help="file for the spectrum and its cut")
    parser.add_argument("--progress", type=_boolean, default=True, help="show a progress bar")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _matrix_of(args: Any) -> Any:
    """One matrix of a `.npy` file, memory-mapped where it is large; else a batch of channels."""
    import numpy as np

    from .data.layouts import open_channels

    path = Path(args.input)
    if path.suffix.lower() == ".npy" and args.layout == "auto" and path.is_file():
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: expected an array, the file cannot be read ({error})") from None
        if found.ndim == 2:
            small = found.nbytes <= IN_MEMORY and args.checkpoint is None
            return torch.from_numpy(np.array(found)) if small else found
    source = open_channels(path, args.layout, key=args.key)
    H = source.read(slice(None))
    return H[0] if len(H) == 1 else H


def _svd(args: Any) -> None:
    import numpy as np

    from .data.files import atomic_path, refuse_existing
    from .neural_svd import neural_svd

    if Path(args.out).suffix != ".npz":
        raise ValueError(f"{args.out}: expected a file ending in .npz")
    for target in (args.out, args.json, args.figure):
        if target is not None:
            refuse_existing(target, args.overwrite)
            if not Path(target).absolute().parent.is_dir():
                raise FileNotFoundError(f"{target}: the folder {Path(target).parent} does not exist")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    H = _matrix_of(args)
    rank = args.rank[0] if args.rank is not None and len(args.rank) == 1 else args.rank
    if args.figure is not None and H.ndim > 2:
        raise ValueError("--figure is for one matrix, the input has several")
    names = "energy net orth nesting phase method lam sigma trim lr max_steps tol seed progress batch"
    names += " checkpoint checkpoint_every resume"
    found = neural_svd(H, rank, **{name: getattr(args, name) for name in names.split()})
    if int(os.environ.get("RANK", "0")):
        return
    with (
        atomic_path(args.out, overwrite=args.overwrite) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, U=found.U.numpy(), S=found.S.numpy(), Vh=found.Vh.resolve_conj().numpy())

    def worst(value: Any) -> float | None:
        largest = float(value.max()) if isinstance(value, torch.Tensor) else float(value)
        return None if largest != largest else largest

    facts = {
        "shape": list(H.shape),
        "rank": found.S.shape[-1],
        "method": found.method,
        "steps": found.steps,
        "converged": found.converged,
        "vectors": found.vectors,
        "rel_error": worst(found.rel_error),
        "span_error": worst(found.span_error),
        "ortho_error": worst(found.ortho_error),
    }
    print(table([list(facts.values())], list(facts)))
    print(f"{args.out}: U, S, Vh; {found.advice}")
    if args.json is not None:
        _write_json(facts | {"advice": found.advice, "history": found.history}, args.json, args.overwrite)
    if args.figure is not None:
        from .plots import plot_trim, save_figure

        save_figure(plot_trim(found.spectrum, found.S.shape[-1]), args.figure, overwrite=args.overwrite)


def _add_bench(parser: Any) -> None:
    parser.add_argument("--quick", action="store_true", help="64x64 and batch 1 alone: five minutes at most")
    parser.add_argument("--stem", type=str, nargs="+", default=[], help="stems to measure instead of all")
    parser.add_argument("--device", type=str, default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch")
    parser.add_argument("--seconds", type=float, default=None, help="of timing a variant (1; 0.3 if quick)")
    parser.add_argument("--rounds", type=int, default=3, help="passes that the timing is spread over")
    parser.add_argument("--compile", type=_boolean, default=True, help="torch.compile is a variant")
    parser.add_argument("--json", type=_path, default=None, help="file for the rows")
    parser.add_argument("--markdown", type=_path, default=None, help="file for the tables")
    parser.add_argument("--figures", type=_path, default=None, help="folder for figures")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def _bench(args: Any) -> None:
    from .benchmarks import report, suite
    from .data.files import atomic_path, refuse_existing

    for path in (args.json, args.markdown):
        if path is not None:
            refuse_existing(path, args.overwrite)
            if not Path(path).absolute().parent.is_dir():
                raise FileNotFoundError(f"{path}: the folder {Path(path).parent} does not exist")
    seconds = (0.3 if args.quick else 1.0) if args.seconds is None else args.seconds
    if not 0 < seconds < 1e6:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    folder = None if args.figures is None else _output_folder(args.figures, args.overwrite)
    options = suite.Options(
        args.device, args.quick, seconds, args.rounds, tuple(args.stem), compiled=args.compile
    )

    def tell(number: int, rows: list[dict[str, Any]]) -> None:
        # a case a line while they run, the table at the end
        if number > 1:
            first = rows[0]
            print(
                f"round {number}: {first['function']} {first['pass']} {first['size']} x {first['batch']}",
                flush=True,
            )
            return
        shown = [(r["variant"], r.get("median_s"), r["batch"]) for r in rows]
        times = ", ".join(f"{n} {1e6 * t / b:.3g} us" if t else f"{n} no time" for n, t, b in shown)
        first = rows[0]
        print(f"{first['function']} {first['pass']} {first['size']} x {first['batch']}: {times}", flush=True)

    result = suite.run(options, tell)
    text = report.markdown(result)
    print("\n" + text)
    if args.json is not None:
        _write_json(result, args.json, args.overwrite)
    if args.markdown is not None:
        with atomic_path(args.markdown, overwrite=args.overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if folder is not None:
        from .plots import save_figure

        for name, figure in report.draw(result).items():
            save_figure(figure, folder / name)


def _add_info(parser: Any) -> None:
    parser.add_argument("--json", type=_path, default=None, help="file for the same as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def processor_name() -> str:
    """The name of the CPU, as exactly as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _info(args: Any) -> None:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    extras = {
        "data": ["scipy", "h5py"],
        "plots": ["matplotlib"],
        "train": ["lightning", "tensorboard"],
        "cli": ["pyyaml", "tqdm"],
        "sionna": ["sionna-no-rt"],
    }
    cpu = {"device": "cpu", "name": processor_name(), "threads": torch.get_num_threads()}
    devices: list[dict[str, Any]] = [cpu]
    for k in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(k)
        devices.append(
            {"device": f"cuda:{k}", "name": p.name, "memory_gib": round(p.total_memory / 2**30, 1)}
        )
    facts: dict[str, Any] = {
        "lomacs_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "cuda": torch.version.cuda,
        "libraries": library_states(),
        "backends": backend_table(),
        "devices": devices,
        "extras": {extra: {p: version(p) for p in packages} for extra, packages in extras.items()},
    }
    for name in ("lomacs_fast", "python", "torch", "numpy", "cuda"):
        print(f"{name:12} {facts[name] or 'none'}")
    states = [
        [row["op"], row["backend"], row["device"], "; ".join(row["reasons"]) or "yes"]
        for row in facts["backends"]
    ]
    print("\n" + table([list(row) for row in facts["libraries"].items()], ["library", "state"]))
    print("\n" + table(states, ["op", "backend", "device", "serves"]))
    print("\n" + table([[d["device"], d["name"]] for d in devices], ["device", "name"]))
    rows = [
        [e, ", ".join(f"{p} {v or 'absent'}" for p, v in ps.items())] for e, ps in facts["extras"].items()
    ]
    print("\n" + table(rows, ["extra", "packages"]))
    if args.json is not None:
        _write_json(facts, args.json, args.overwrite)


COMMANDS: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "generate": (_add_generate, _generate),
    "analyze": (_add_analyze, _analyze),
    "train": (_add_train, _train),
    "prune": (_add_prune, _prune),
    "evaluate": (_add_evaluate, _evaluate),
    "predict": (_add_predict, _predict),
    "svd": (_add_svd, _svd),
    "bench": (_add_bench, _bench),
    "info": (_add_info, _info),
}


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as everything here does."""

    def error(self, message: str) -> NoReturn:
        print(f"lomacs-fast: error: {message} ({self.prog} --help shows the options)", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps an example on its line, and says what an option is when it is not given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        if not silent and "default" not in text:
            text += " (default: %(default)s)"
        return text


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all commands; the options of a command are only made where `words` names it."""
    parser = _Parser(prog="lomacs-fast", description="Networks that learn the SVD of MIMO channels.")
    parser.add_argument("--version", action="version", version=f"lomacs_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (add, _) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=DESCRIPTIONS[name],
            description=DESCRIPTIONS[name],
            epilog=f"Example:\n  {EXAMPLES[name]}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        if name in words:
            add(command)
    return parser


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    text = str(error)
    if "Original Traceback" in text:  # from a process that loads data: its last line is the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if _is_out_of_memory(error):
        return f"not enough memory for what was asked ({' '.join(text.split())[:200] or 'MemoryError'})"
    return " ".join(text.split()) or type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


def _is_refusal(error: BaseException) -> bool:
    """Whether an error says what the user asked for and cannot have, not that this package is broken."""
    kinds = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
    return isinstance(error, kinds) or _is_out_of_memory(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence on standard error for what cannot be served.

    `LOMACS_FAST_TRACEBACK=1` shows where an error came from.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(words).parse_args(words)
    try:
        COMMANDS[args.command][1](args)
    except KeyboardInterrupt:
        print("lomacs-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_refusal(error):
            raise
        if os.environ.get("LOMACS_FAST_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"lomacs-fast: error: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0
