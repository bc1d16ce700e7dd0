"""Every stem, the training step and inference against eager, `torch.compile` and the decompositions.

`lomacs-fast bench`, `pytest benchmarks/` and `gpu_acceptance.sh` run these same cases. A variant is timed
only where its values and gradients are right; variants take turns, so that drift and load fall on all.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lomacs_fast
from lomacs_fast import functional, metrics, reference, use_backend
from lomacs_fast.benchmarks import stems
from lomacs_fast.cli import processor_name
from lomacs_fast.data.generator import SCENARIOS, ChannelGenerator

Call = Callable[[], Sequence[Tensor]]
Row = dict[str, Any]

MAIN = ((stems.Size(64, 64, 32), 256), (stems.Size(128, 128, 64), 64))
SMALL = stems.Size(64, 64, 32)
# channels in a slot of 273 resource blocks and 16 users; a quarter of them at four times the size
SLOT = {64: 4368, 128: 1092}
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
SIDES = (16, 32, 48, 64, 96, 128)
LOSS_WEIGHTS = (0.4, 0.3, 0.3, 0.2)
EPS = torch.finfo(torch.float32).eps
ACTIVE = 16
# a percentile is given from so many repeats on
TAIL = 100
# seconds that torch.compile gets for a variant
PATIENCE = 60.0


@dataclass(frozen=True)
class Options:
    """What to measure and for how long.

    Attributes:
        device: "cpu" or "cuda".
        quick: the first main size and batch 1, and `torch.compile` only for the network.
        seconds: of timing a variant of a case, all rounds together.
        rounds: passes over the cases that are no sweeps. A shared machine drifts over minutes: what is seen
            in every round is not drift. `torch.compile` takes part in the first.
        stems: those measured; all when empty. "network" and "inference" count as stems.
        end: on the clock of `time.monotonic`: no case begins after it.
        sweeps: also time against batch and against size.
        compiled: whether `torch.compile` of the eager functions is a variant.
    """

    device: str = "cpu"
    quick: bool = False
    seconds: float = 1.0
    rounds: int = 1
    stems: tuple[str, ...] = ()
    end: float = float("inf")
    sweeps: bool = True
    compiled: bool = True


@dataclass(frozen=True)
class Case:
    """Variants that do the same work: `variants` by name, eager first; `macs` and `bytes` are the batch's.

    A variant outside `alike` computes something else, a decomposition; its error is in `errors`. Where it
    decomposes one matrix after the other it is timed on the share of the batch in `shares`.
    """

    stem: str
    function: str
    size: str
    batch: int
    backward: bool
    device: str
    variants: Mapping[str, Call]
    exact: Sequence[Tensor]
    factor: float
    macs: float
    bytes: float
    compared: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    alike: Sequence[str] = ("eager", "torch.compile", "ours")
    errors: Mapping[str, float] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    kind: str = "main"


class Machine:
    """What floors are counted against, measured in this process.

    Attributes:
        product: multiply-adds a second of a float32 matrix product, the best of some.
        copy: bytes a second, read and written, of a copy that no cache holds.
    """

    def __init__(self, device: str) -> None:
        n, count = (1024, 1 << 25) if device == "cpu" else (8192, 1 << 29)
        a = torch.randn(n, n, device=device)
        source, target = (torch.empty(count, device=device).zero_() for _ in range(2))
        self.product = n**3 / min(seconds(partial(torch.mm, a, a), device) for _ in range(8))
        self.copy = 8 * count / min(seconds(partial(target.copy_, source), device) for _ in range(5))

    def floor(self, case: Case) -> tuple[float, str]:
        """The least time that arithmetic or memory allow the case in seconds, and which of the two binds."""
        times = {"arithmetic": case.macs / self.product, "memory": case.bytes / self.copy}
        bound = max(times, key=times.__getitem__)
        return times[bound], bound


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def timer(call: Callable[[], Any], device: str, captured: bool = True) -> Callable[[], float]:
    """What times one run of `call`: replays of a captured graph on a device, else the clock."""
    if device == "cpu" or not captured:
        return partial(seconds, call, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(times: int = 10) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    return replay


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The largest sum of torch's allocations during a call, what it returns included."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activity = torch.profiler.ProfilerActivity.CPU
    with (
        metrics.quiet_profiler(),
        torch.profiler.profile(activities=[activity], profile_memory=True) as profiler,
    ):
        call()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def largest_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative L2 error of the tensors; NaN where a value is not finite."""
    norm = torch.linalg.vector_norm
    pairs = zip(values, exact, strict=True)
    return max(float(norm(x.detach() - y) / norm(y).clamp_min(1e-300)) for x, y in pairs)


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"


def _quantile(times: Sequence[float], q: float) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(q))


class Timing:
    """What is known of the variants of a case: errors, what went wrong, peak memory, and times by round."""

    def __init__(self, case: Case, machine: Machine) -> None:
        self.floor_s, self.bound = machine.floor(case)
        names = ("stem", "function", "size", "batch", "device", "kind", "macs", "bytes")
        self.facts: Row = {name: getattr(case, name) for name in names}
        self.facts["pass"] = "forward+backward" if case.backward else "forward"
        self.variants = list(case.variants)
        self.errors: dict[str, float | None] = {}
        self.trouble: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self.rounds: list[dict[str, list[float]]] = []

    def check(self, case: Case) -> None:
        """Compare every variant with `case.exact`; one that is wrong or fails is in `trouble`."""
        for name, call in case.variants.items():
            try:
                with warnings.catch_warnings(), patience(PATIENCE if name == "torch.compile" else None):
                    warnings.simplefilter("ignore")
                    result = call()
                if name in case.alike:
                    self.errors[name] = largest_error(case.compared(result), case.exact)
                elif case.errors is not None:
                    self.errors[name] = case.errors.get(name)
            except Exception as failure:
                if name == "torch.compile":
                    end_compilers()
                self.trouble[name] = f"failed: {_reason(failure)}"
        eager = self.errors.get("eager") or 0.0
        for name in case.alike:
            error = self.errors.get(name)
            if error is not None and not error <= case.factor * eager + 4 * EPS:
                self.trouble[name] = f"wrong: error {error:.1e}, eager {eager:.1e}"

    def time(self, case: Case, budget: float, least: int = 5) -> None:
        """A round: variants in turns for `budget` seconds a variant, and `least` turns."""
        timers: dict[str, Callable[[], float]] = {}
        for name, call in case.variants.items():
            if name in self.trouble:
                continue
            try:
                timers[name] = timer(call, case.device, name in case.alike)
                if name not in self.peaks:
                    self.peaks[name] = peak_bytes(call, case.device)
            except Exception as failure:
                self.trouble[name] = f"failed: {_reason(failure)}"
                timers.pop(name, None)
        times: dict[str, list[float]] = {name: [] for name in timers}
        order, begin, turn = list(timers), time.perf_counter(), 0
        while order and (time.perf_counter() - begin < budget * len(order) or turn < least) and turn < 2000:
            for i in range(len(order)):
                name = order[(turn + i) % len(order)]
                times[name].append(timers[name]() / case.shares.get(name, 1))
            turn += 1
        self.rounds.append(times)

    def ratios(self, name: str) -> list[float]:
        """The ratio of eager's time to a variant's, the median of its turns, for each round with both."""
        return [
            median(e / o for e, o in zip(times["eager"], times[name], strict=True))
            for times in self.rounds
            if name in times and "eager" in times
        ]

    def rows(self) -> list[Row]:
        """A row a variant; every time is one of all rounds together, the ratio is the rounds' median."""
        rows = []
        for name in self.variants:
            times = [x for found in self.rounds for x in found.get(name, ())]
            row: Row = self.facts | {
                "variant": name,
                "median_s": None,
                "ratio_to_eager": None,
                "floor_s": self.floor_s,
                "bound": self.bound,
                "error": self.errors.get(name),
            }
            if name in self.trouble:
                row["trouble"] = self.trouble[name]
            elif times:
                middle = median(times)
                row |= {
                    "median_s": middle,
                    "p99_s": _quantile(times, 0.99) if len(times) >= TAIL else None,
                    "spread": (_quantile(times, 0.75) - _quantile(times, 0.25)) / middle,
                    "times_the_floor": middle / self.floor_s if self.floor_s else None,
                    "peak_bytes": self.peaks[name],
                    "repeats": len(times),
                }
                ratios = self.ratios(name)
                if ratios:
                    row |= {"ratio_to_eager": median(ratios), "ratios": ratios}
            rows.append(row)
        return rows


@contextlib.contextmanager
def patience(limit: float | None) -> Iterator[None]:
    """Raise `TimeoutError` in the main thread after `limit` seconds, where the system has alarms."""
    served = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if limit is None or not served:
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"took more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_compilers() -> None:
    """End what a compilation that failed or was left has running: it would be timed with the next case."""
    with contextlib.suppress(Exception):
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(path.parent.name)] = int(
                path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            )
    mine, compilers = os.getpid(), []
    for pid in parents:
        above: int | None = pid
        while above is not None and above != mine:
            above = parents.get(above)
        if above == mine and pid != mine:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
                compilers += [pid] * any(part in name for part in ("cc1plus", "g++", "clang", "c++"))
    for pid in compilers:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def measure(case: Case, machine: Machine, budget: float) -> list[Row]:
    """A row a variant: checked against `exact`, then timed in turns for `budget` seconds a variant.

    A variant is wrong where its error is above `factor` times eager's plus 4 eps: it gets no time.
    """
    timing = Timing(case, machine)
    timing.check(case)
    timing.time(case, budget)
    return timing.rows()


def _counted(call: Callable[[], Any]) -> float:
    """Real multiply-adds of a call of ours, forward and backward as they run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metrics.true_macs(call, samples=1)


def _bytes(*groups: Sequence[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for group in groups for x in group))


def function_case(
    case: stems.Case, size: stems.Size, batch: int, backward: bool, device: str, compiled: bool, kind: str
) -> Case:
    """A public function at a size: eager, compiled where asked for, and ours as `auto` serves it."""
    drawn = stems.tensors(case, batch, size)
    single = stems.cast(drawn, device)
    exact = stems.call(case, reference, stems.cast(drawn, device, double=True), backward)
    variants = {"eager": partial(stems.call, case, reference, single, backward)}
    if compiled:
        torch._dynamo.reset()
        names = {case.function: torch.compile(getattr(reference, case.function))}
        variants["torch.compile"] = partial(stems.call, case, _Namespace(names), single, backward)
    variants["ours"] = partial(stems.call, case, functional, single, backward)
    outputs = stems.call(case, functional, single, False)
    results = variants["ours"]()
    moved = _bytes(list(single.values()), results, outputs if backward else [])
    macs = _counted(variants["ours"])
    return Case(
        case.stem,
        case.function,
        str(size),
        batch,
        backward,
        device,
        variants,
        exact,
        2,
        macs,
        moved,
        kind=kind,
    )


class _Namespace:
    """Functions by name, as a module holds them."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(functions)


def channels(size: stems.Size, batch: int, device: str) -> Tensor:
    """Noisy covariances of the built-in generator where the size is square, else channels; unit norm."""
    kind = "covariance" if size.M == size.N else "channel"
    few = range(min(-(-batch // len(SCENARIOS)), 64))
    generators = [ChannelGenerator(size.M, size.N, scenario=s, kind=kind) for s in SCENARIOS]
    H = torch.stack([g.batch(few).input for g in generators], 1).flatten(0, 1)
    H = H.repeat(-(-batch // len(H)), 1, 1)[:batch]
    return (H / torch.linalg.vector_norm(H, dim=(1, 2), keepdim=True)).to(device)


def network(kind: type[nn.Module], size: stems.Size, device: str, double: bool = False) -> nn.Module:
    """A network of four scenarios with the same weights for every kind."""
    torch.manual_seed(0)
    net = reference.LoMACSSVDNet(*size, 4)
    made = net if kind is reference.LoMACSSVDNet else kind(*size, 4)
    made.load_state_dict(net.state_dict())
    return made.to(device, torch.float64 if double else torch.float32)


def step(net: nn.Module, loss: nn.Module, H: Tensor, sid: Tensor, optimizer: Any = None) -> list[Tensor]:
    """Forward, AE+ loss and backward; with an optimizer also clipping and its step. Loss and gradients."""
    parameters = list(net.parameters())
    U, S, V, _ = net(H, sid)
    value = loss(U, S, V, H, *LOSS_WEIGHTS)
    gradients = torch.autograd.grad(value, parameters)
    if optimizer is not None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return [value.detach(), *gradients]


def _joined(results: Sequence[Tensor]) -> Sequence[Tensor]:
    # one vector of all gradients: a single small one may be rounding alone
    return [results[0], torch.cat([g.flatten() for g in results[1:]])]


def _stepper(net: nn.Module, loss: nn.Module, H: Tensor, sid: Tensor, device: str) -> Call:
    # a captured graph holds the whole step only where the optimizer can be captured; on a CPU the fused form
    # is the fastest, as in bench_network.py
    form = {"capturable": True} if device == "cuda" else {"fused": True}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=1e-4, **form)
    return partial(step, net, loss, H, sid, optimizer)


def training_case(size: stems.Size, batch: int, device: str, compiled: bool, kind: str) -> Case:
    """Forward, loss, backward, clipping and AdamW of the published network."""
    H, sid = channels(size, batch, device), torch.arange(batch, device=device) % 4
    double = network(reference.LoMACSSVDNet, size, device, double=True)
    exact = _joined(_stepper(double, reference.AEPlusLoss(), H.to(torch.complex128), sid, device)())
    eager = network(reference.LoMACSSVDNet, size, device)
    variants = {"eager": _stepper(eager, reference.AEPlusLoss(), H, sid, device)}
    if compiled:
        torch._dynamo.reset()
        other = network(reference.LoMACSSVDNet, size, device)
        compiled_net = torch.compile(other)
        variants["torch.compile"] = _stepper(compiled_net, reference.AEPlusLoss(), H, sid, device)
    ours = network(lomacs_fast.LoMACSSVDNet, size, device)
    variants["ours"] = _stepper(ours, lomacs_fast.AEPlusLoss(), H, sid, device)
    # weights, gradients and both moments of AdamW: read forward, written, read and written again
    weights = list(ours.parameters())
    moved = _bytes([H], *[weights] * 8)
    macs = _counted(partial(step, ours, lomacs_fast.AEPlusLoss(), H, sid))
    return Case(
        "network",
        "training step",
        str(size),
        batch,
        True,
        device,
        variants,
        exact,
        4,
        macs,
        moved,
        compared=_joined,
        kind=kind,
    )


def _infer(net: nn.Module, H: Tensor, sid: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return net(H, sid)[:3]


def _product(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    # columns of close singular values may change places between precisions
    U, S, V = factors
    return [(U * S[:, None].to(U.dtype)) @ V.mH]


def _approximate(H: Tensor, rank: int) -> Sequence[Tensor]:
    with torch.no_grad():
        return lomacs_fast.approx_svd(H, rank)


def decompositions(H: Tensor, rank: int, device: str) -> dict[str, Call]:
    """What a user would call instead: the SVD by every driver, `eigh` for Hermitian input, the sketch."""
    calls: dict[str, Call] = {}
    for driver in ("gesvd", "gesvdj", "gesvda") if device == "cuda" else (None,):
        name = f"svd {driver}" if driver else "svd"
        calls[name] = partial(torch.linalg.svd, H, full_matrices=False, driver=driver)
    if H.shape[-2] == H.shape[-1] and bool(torch.allclose(H, H.mH, atol=1e-6)):
        calls["eigh"] = partial(torch.linalg.eigh, H)
    calls["svd_lowrank"] = partial(torch.svd_lowrank, H, q=min(ACTIVE, rank))
    return calls


def _spectrum_error(result: Sequence[Tensor], exact: Tensor) -> float:
    # (U, S, V) of an SVD, (values, vectors) of eigh
    values = result[1] if len(result) == 3 else result[0].abs().flip(-1)
    values = values.sort(-1, descending=True).values
    k = min(ACTIVE, values.shape[-1])
    return largest_error([values[..., :k].double()], [exact[..., :k]])


def inference_case(size: stems.Size, batch: int, device: str, compiled: bool, kind: str) -> Case:
    """Factors of channels: eager network, ours, frozen, `approx_svd`, and the decompositions."""
    H, sid = channels(size, batch, device), torch.zeros(batch, dtype=torch.int64, device=device)
    double = network(reference.LoMACSSVDNet, size, device, double=True)
    few = min(batch, 32)
    exact = _product(_infer(double, H[:few].to(torch.complex128), sid[:few]))
    eager = network(reference.LoMACSSVDNet, size, device)
    ours = network(lomacs_fast.LoMACSSVDNet, size, device)
    variants: dict[str, Call] = {"eager": partial(_infer, eager, H, sid)}
    if compiled:
        torch._dynamo.reset()
        variants["torch.compile"] = partial(_infer, torch.compile(eager), H, sid)
    variants["ours"] = partial(_infer, ours, H, sid)
    frozen = lomacs_fast.freeze(ours)
    variants["frozen"] = partial(_infer, frozen, H, sid)
    alike = tuple(variants)
    variants["approx_svd"] = partial(_approximate, H, size.r)
    # on a device they decompose one matrix after the other: a part tells the time of all
    part = H[: max(1, batch // 64)] if device == "cuda" else H
    others = decompositions(part, size.r, device)
    variants |= others
    spectrum = torch.linalg.svdvals(H[:few].to(torch.complex128))
    errors = {
        name: _spectrum_error([x[:few] for x in call()], spectrum[: len(part)])
        for name, call in others.items()
    }
    macs = _counted(variants["ours"])
    moved = _bytes([H], variants["frozen"]())
    return Case(
        "inference",
        "U, S, V",
        str(size),
        batch,
        False,
        device,
        variants,
        exact,
        4,
        macs,
        moved,
        compared=lambda factors: _product([x[:few] for x in factors]),
        alike=alike,
        errors=errors,
        shares=dict.fromkeys(others, len(part) / batch),
        kind=kind,
    )


def cases(options: Options) -> Iterator[Callable[[], Case]]:
    """The suite, each case made when its turn comes: functions, then the network, then sweeps.

    On a device the network comes first, and last the refinement, whose kernels take minutes to compile.
    """
    device = options.device
    wanted = options.stems or tuple(dict.fromkeys([*(c.stem for c in stems.CASES), "network", "inference"]))
    main = [(s, SLOT[s.M] if device == "cuda" else b, b) for s, b in MAIN]
    main = main[:1] if options.quick else main
    whole = options.compiled
    # compiling every function takes minutes, which an acceptance run does not have
    compiled = options.compiled and not options.quick and device == "cpu"
    sizes = [(size, batch, "main") for size, _, batch in main] + [(SMALL, 1, "latency")]

    def functions(last: bool) -> Iterator[Callable[[], Case]]:
        for size, batch, kind in sizes:
            for case in stems.CASES:
                if case.stem in wanted and last == (device == "cuda" and case.stem == "refine"):
                    for backward in (False, True):
                        traced = compiled and kind == "main"
                        yield partial(function_case, case, size, batch, backward, device, traced, kind)

    def networks() -> Iterator[Callable[[], Case]]:
        for size, slot, batch in main:
            if "network" in wanted:
                yield partial(training_case, size, batch, device, whole, "main")
            if "inference" in wanted:
                yield partial(inference_case, size, slot, device, whole, "main")
        if "inference" in wanted:
            yield partial(inference_case, SMALL, 1, device, whole and not options.quick, "latency")

    if device == "cuda":
        yield from networks()
        yield from functions(last=False)
        yield from functions(last=True)
    else:
        yield from functions(last=False)
        yield from networks()
    if options.sweeps and "inference" in wanted:
        for batch in BATCHES[:5:2] if options.quick else BATCHES:
            yield partial(inference_case, SMALL, batch, device, False, "batch")
        for side in () if options.quick else SIDES:
            size = stems.Size(side, side, side // 2)
            yield partial(inference_case, size, 64, device, False, "size")


def facts(device: str) -> dict[str, Any]:
    """Versions, processor or device, threads and date."""
    found: dict[str, Any] = {
        "date": str(date.today()),
        "lomacs_fast": lomacs_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def run(
    options: Options, each: Callable[[int, list[Row]], None] = lambda number, rows: None
) -> dict[str, Any]:
    """Measure the suite; `each` is told the round, from 1, and the rows of every case as it ends.

    Returns:
        Facts of the machine with its measured rates, `cases` (the rows), and `left_out`, the number of cases
        that failed or did not begin before `options.end`.

    Raises:
        ValueError: for a stem that the suite does not have, and for CUDA where there is no device.
    """
    known = {*(c.stem for c in stems.CASES), "network", "inference"}
    for stem in options.stems:
        if stem not in known:
            raise ValueError(f"stem must be one of {', '.join(sorted(known))}, got {stem!r}")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu here: torch sees no CUDA device")
    # sweeps come last: a later round is the same cases from the beginning, as far as it goes
    again = replace(options, compiled=False, sweeps=False)
    timings: dict[int, Timing] = {}
    left = 0
    with use_backend("auto"):
        machine = Machine(options.device)
        for number in range(options.rounds):
            for place, make in enumerate(cases(again if number else options)):
                late = time.monotonic() > options.end
                if late or (number and place not in timings):
                    left += number == 0
                    continue
                try:
                    case = make()
                    if number == 0:
                        timing = Timing(case, machine)
                        timing.check(case)
                    else:
                        timing = timings[place]
                    swept = case.kind in ("batch", "size")
                    share = 1 if swept else options.rounds
                    timing.time(case, options.seconds / share, least=-(-5 // share))
                except Exception as failure:
                    # a device that is out of memory, or a graph that cannot be captured, ends no other case
                    print(f"left out: {_reason(failure)}", flush=True)
                    left += number == 0
                    continue
                timings[place] = timing
                each(number + 1, timing.rows())
    rows = [row for timing in timings.values() for row in timing.rows()]
    rates = {"product_gmacs": machine.product / 1e9, "copy_gb": machine.copy / 1e9}
    told = {"quick": options.quick, "rounds": options.rounds, "left_out": left}
    return facts(options.device) | rates | told | {"cases": rows}
