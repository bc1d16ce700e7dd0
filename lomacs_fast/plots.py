"""Figures of channels, spectra, training, pruning and statistics, drawn without a display or global state.

Every `plot_*` function takes tensors, arrays or plain containers and returns a `matplotlib.figure.Figure`;
`save_figure` writes it. Matplotlib is imported at the first call: without it that call raises `ImportError`.
Labels are plain Unicode, since matplotlib's parser of mathematics is shared between threads.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "plot_channels",
    "plot_column_dictionary",
    "plot_cumulative_energy",
    "plot_gate",
    "plot_gram",
    "plot_knob",
    "plot_learning_curve",
    "plot_pareto",
    "plot_spectrum",
    "plot_statistics",
    "plot_time",
    "plot_trim",
    "save_figure",
]

Array = npt.NDArray[Any]

WIDTH = 9.0
DPI = 180
TITLE, TEXT, SMALL = 10.0, 9.0, 8.0
# Okabe and Ito's palette without yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY, PALE, MISSING = "#555555", "#DDDDDD", "#C8C8C8"

FLOOR_DB = -50.0
SPECTRUM_FLOOR_DB = -80.0
SHARES = (0.90, 0.99, 0.999)
BAND = (5, 95)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _style(i: int) -> str:
    # Style changes with the colour, and the pair repeats only after every combination of a full palette.
    return STYLES[(i + i // len(COLOURS)) % len(STYLES)]


def _new_figure(height: float, width: float = WIDTH) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'lomacs_fast[plots]'") from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.07, h_pad=0.07)
    return figure


def _plain(ax: Axes, *, grid: bool = True) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", labelsize=SMALL)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(True, color=PALE, linewidth=0.6)


def _integer_axis(axis: Any, ticks: int = 8) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 1.5, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def _note(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=TEXT, color=GREY)


def _number(value: float, position: Any = None) -> str:
    mantissa, _, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−") if exponent else mantissa.replace("-", "−")


def _log_axis(ax: Axes, which: str, low: float, high: float) -> None:
    """Logarithmic axis with plain numbers at 1, 2, 5 where it is short and at decades where it is long."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(ax, f"set_{which}scale")("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.7 else (1.0,), numticks=6))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_formatter(NullFormatter())


def _scale_y(ax: Axes, *series: Array) -> None:
    """Logarithmic for positive values that spread, symmetric for signed ones over decades, else linear."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = np.concatenate([np.ravel(y) for y in series])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    small, large = sorted((abs(low), abs(high)))
    if low > 0 and high > 6 * low:
        _log_axis(ax, "y", low, high)
    elif low < 0 < high and large > 10 * small:
        # Linear over what lies on the minor side of zero: fluctuation about zero stays a band.
        ax.set_yscale("symlog", linthresh=10.0 ** round(math.log10(small)))
        ax.yaxis.set_major_formatter(FuncFormatter(_number))
        ax.axhline(0, color=GREY, linewidth=0.6)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if low < 0 < high:
            ax.axhline(0, color=GREY, linewidth=0.6)


def _text(value: object) -> str:
    """A name as plain text: an even number of dollar signs would be read as mathematics."""
    return str(value).replace("$", r"\$")


def _scenario(value: object) -> str:
    return _text(value) if isinstance(value, str) else f"scenario {value}"


def _array(value: Any, name: str, shapes: Mapping[int, str], *, real: bool = False) -> Array:
    """`value` in double precision, of one of the numbers of dimensions in `shapes`, not empty."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.to(torch.complex128 if value.is_complex() else torch.float64)
        value = value.resolve_conj().resolve_neg().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array: {error}") from None
    if array.dtype.kind not in ("biuf" if real else "biufc"):
        raise TypeError(f"{name} must be {'real' if real else 'real or complex'}, got {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty, got shape {array.shape}")
    if array.ndim not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(shapes.values())}, got {array.shape}")
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _records(value: Any, name: str, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """`value` as a non-empty list of mappings that have every key."""
    records = list(value)
    if not records:
        raise ValueError(f"{name} is empty")
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise TypeError(f"{name}[{i}] must be a mapping, got {type(record).__name__}")
        lacking = [key for key in keys if key not in record]
        if lacking:
            raise ValueError(f"{name}[{i}] has no {', '.join(lacking)}; it needs {', '.join(keys)}")
    return records


def _named(value: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} is empty")
    return value


def _fft_magnitude(H: Array) -> Array:
    return np.abs(np.fft.fftshift(np.fft.fft2(H, norm="ortho")))


def _decibel(magnitude: Array, reference: Array | float, floor: float) -> Array:
    """`20 log10(magnitude / reference)`, at least `floor`; NaN stays, a reference of 0 gives the floor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decibel = 20 * np.log10(magnitude / np.where(np.equal(reference, 0), np.inf, reference))
    return np.maximum(decibel, floor)


def _finite_max(*arrays: Array) -> float:
    values = np.concatenate([a[np.isfinite(a)] for a in arrays])
    return float(values.max()) if len(values) else 0.0


def _error(X: Array, reference: Array) -> str:
    """`|X - reference| / |reference|` in words."""
    norm = np.linalg.norm(reference)
    error = float(np.linalg.norm(X - reference) / norm) if norm > 0 else math.nan
    return f"error {error:.3g}" if math.isfinite(error) else "error n/a"


def _colours(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=MISSING)


def _image(ax: Axes, values: Array, colours: Any, *, shifted: bool = False, **limits: Any) -> Any:
    """Rows downward; pixel (m, n) at its index, or at its signed frequency bin where `shifted`."""
    M, N = values.shape
    m, n = (M // 2, N // 2) if shifted else (0, 0)
    extent = (-n - 0.5, N - n - 0.5, M - m - 0.5, -m - 0.5)
    image = ax.imshow(values, cmap=colours, aspect="auto", extent=extent, interpolation="nearest", **limits)
    for axis in (ax.xaxis, ax.yaxis):
        _integer_axis(axis, 3)
    ax.tick_params(labelsize=SMALL, length=2, pad=2)
    return image


def _colour_bar(figure: Any, image: Any, axes: Any, label: str, **options: Any) -> Any:
    bar = figure.colorbar(image, ax=axes, **({"fraction": 0.06, "pad": 0.02, "aspect": 18} | options))
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2, pad=2)
    bar.outline.set_visible(False)
    return bar


def _row_height(panel: float, shapes: Sequence[tuple[int, ...]]) -> float:
    """Height that makes pixels about square, within a factor that keeps flat and tall channels readable."""
    return panel * min(2.0, max(0.6, max(M / N for M, N in shapes)))


def plot_channels(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """Magnitude of input, label and estimate in space and in frequency, one row a sample.

    Left, `|H|` on one colour scale a row; right, `|FFT2 H|` (orthonormal, shifted to the centre) in dB below
    the label's largest bin, floored at -50 dB. The titles of input and estimate state
    `|X - label| / |label|` in Frobenius norms. Entries that are not finite are grey.

    Args:
        samples: mappings with `scenario` (number or name) and `input`, `label`, `estimate`, each complex
            `(M, N)`; sizes may differ between samples.

    Raises:
        ValueError: no samples, a missing key, or shapes that differ within a sample.
    """
    names = ("input", "label", "estimate")
    records = _records(samples, "samples", ("scenario", *names))
    rows: list[list[Array]] = []
    for i, record in enumerate(records):
        row = [_array(record[name], f"samples[{i}].{name}", {2: "(M, N)"}) for name in names]
        for name, H in zip(names, row, strict=True):
            if H.shape != row[1].shape:
                raise ValueError(f"samples[{i}].{name} has shape {H.shape}, its label {row[1].shape}")
        rows.append(row)
    shapes = [row[1].shape for row in rows]
    height = sum(_row_height(1.3, [shape]) + 0.25 for shape in shapes) + 0.95
    figure = _new_figure(height, 10.0)
    # Two halves of the same make-up, so that their rows align.
    halves: Any = figure.subfigures(1, 2)
    space, frequency = halves
    ratios = [_row_height(1.3, [shape]) for shape in shapes]
    parts = {}
    for part, title in ((space, "Spatial magnitude |H|"), (frequency, "Frequency magnitude |FFT2 H|")):
        part.set_facecolor("white")
        part.suptitle(title, fontsize=TITLE, fontweight="bold")
        parts[title] = part.subplots(len(rows), 3, squeeze=False, height_ratios=ratios)
    spatial_axes, frequency_axes = parts.values()
    viridis, magma = _colours("viridis"), _colours("magma")
    for i, (record, row) in enumerate(zip(records, rows, strict=True)):
        top = _finite_max(*(np.abs(H) for H in row)) or 1.0
        spectra = [_fft_magnitude(H) for H in row]
        reference = _finite_max(spectra[1])
        errors = (_error(row[0], row[1]), "", _error(row[2], row[1]))
        last = i == len(rows) - 1
        for j, name in enumerate(names):
            left, right = spatial_axes[i, j], frequency_axes[i, j]
            spatial_image = _image(left, np.abs(row[j]), viridis, vmin=0.0, vmax=top)
            decibel = _decibel(spectra[j], reference, FLOOR_DB)
            frequency_image = _image(right, decibel, magma, shifted=True, vmin=FLOOR_DB, vmax=0.0)
            head = f"{name}\n" if i == 0 else ""
            left.set_title(head + (errors[j] or " "), fontsize=TEXT)
            right.set_title(head + " ", fontsize=TEXT)
            for ax in (left, right):
                ax.tick_params(labelleft=j == 0, labelbottom=last or len(set(shapes)) > 1)
        _colour_bar(space, spatial_image, list(spatial_axes[i]), "|H|")
        _colour_bar(frequency, frequency_image, list(frequency_axes[i]), "dB re label max")
        label = _scenario(record["scenario"])
        spatial_axes[i, 0].set_ylabel(f"{label}\nrow m", fontsize=TEXT)
        frequency_axes[i, 0].set_ylabel("row bin", fontsize=TEXT)
    spatial_axes[-1, 1].set_xlabel("column n", fontsize=TEXT)
    frequency_axes[-1, 1].set_xlabel("column bin", fontsize=TEXT)
    return figure


def plot_cumulative_energy(curves: Mapping[str, Any]) -> Figure:
    """Share of the energy in the k largest singular values, and what remains beyond them.

    Left, the cumulative share of the squared singular values; right, one minus it on a logarithmic axis. Mean
    over the samples, with a band from the 5th to the 95th percentile where there are several. Markers, and
    the numbers in the legend, are the first k at which the mean reaches 90%, 99% and 99.9%.

    Args:
        curves: name -> singular values `(r,)` or `(n, r)`, in any order within a sample. Samples with values
            that are not finite, or without energy, are left out.

    Raises:
        ValueError: no curves, no values, or not one sample that can be drawn under a name.
    """
    shares: dict[str, Array] = {}
    for name, value in _named(curves, "curves").items():
        values = np.atleast_2d(_array(value, f"curves[{name!r}]", {1: "(r,)", 2: "(n, r)"}, real=True))
        energy = -np.sort(-(values**2), axis=1)
        energy = energy[np.isfinite(energy).all(1) & (energy.sum(1) > 0)]
        if not len(energy):
            raise ValueError(f"curves[{name!r}] has no sample with finite singular values and some energy")
        shares[_text(name)] = np.cumsum(energy, 1) / energy.sum(1, keepdims=True)
    figure = _new_figure(3.7)
    left, right = figure.subplots(1, 2)
    end = 1
    for i, (name, share) in enumerate(shares.items()):
        mean, k = share.mean(0), np.arange(1, share.shape[1] + 1)
        reached = [int(np.argmax(mean >= level - 1e-12)) for level in SHARES]
        end = max(end, min(int(1.3 * (reached[-1] + 1)) + 1, len(k)))
        label = f"{name}  ({' / '.join(str(j + 1) for j in reached)})"
        # The last partial sum is 1 up to rounding: nothing remains, which a logarithm cannot show.
        remaining = np.where(np.arange(len(k)) < len(k) - 1, 1 - share, np.nan)
        remaining[remaining <= 1e-12] = np.nan
        for ax, y, bands in (
            (left, mean, share),
            (right, np.where(1 - mean > 1e-12, 1 - mean, np.nan), remaining),
        ):
            if len(k) > 1:
                y = np.where(k < len(k), y, np.nan) if ax is right else y
            ax.plot(k, y, _style(i), color=_colour(i), linewidth=1.5, label=label)
            ax.plot(k[reached], y[reached], MARKERS[i % len(MARKERS)], color=_colour(i), markersize=5)
            if len(share) > 1:
                low, high = np.percentile(bands, BAND, axis=0)
                ax.fill_between(k, low, high, color=_colour(i), alpha=0.15, linewidth=0)
    for level in SHARES:
        for ax, y in ((left, level), (right, 1 - level)):
            ax.axhline(y, color=GREY, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
    for ax in (left, right):
        _plain(ax)
        ax.set_xlim(0.5, end + 0.5)
        _integer_axis(ax.xaxis)
        ax.set_xlabel("number of singular values k", fontsize=TEXT)
    left.set_ylim(top=1.01)
    left.set_ylabel("cumulative energy", fontsize=TEXT)
    left.set_title("Energy in the k largest", fontsize=TITLE)
    legend = left.legend(fontsize=SMALL, frameon=False, loc="lower right")
    legend.set_title("k at 90 / 99 / 99.9%", {"size": SMALL})
    _log_axis(right, "y", 1e-4, 1.0)
    right.set_ylim(2e-4, 1.0)
    right.set_ylabel("remaining energy", fontsize=TEXT)
    right.set_title("Energy beyond the k largest", fontsize=TITLE)
    return figure


def _column(history: Mapping[str, Any], key: str) -> Array:
    """A logged column in float64, NaN where a cell is empty."""

    def cell(value: Any) -> float:
        if value is None or (isinstance(value, str) and not value.strip()):
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"history[{key!r}] holds {value!r}, expected numbers") from None

    return np.array([cell(value) for value in history[key]], dtype=np.float64)


def _per_epoch(history: Mapping[str, Any], key: str, epochs: Array) -> tuple[Array, Array]:
    """Epochs at which a column was logged, and its mean in each."""
    if key not in history:
        return np.empty(0), np.empty(0)
    values = _column(history, key)
    if values.shape != epochs.shape:
        raise ValueError(f"history[{key!r}] has {len(values)} rows, history['epoch'] {len(epochs)}")
    logged = np.isfinite(values) & np.isfinite(epochs)
    x, where = np.unique(epochs[logged], return_inverse=True)
    return x, np.bincount(where, values[logged], minlength=len(x)) / np.bincount(where, minlength=len(x))


_TERMS = {
    "train/rec": "reconstruction",
    "train/ortho": "orthogonality",
    "train/energy": "energy",
    "train/diag": "off-diagonal",
    "train/match": "spectral match",
}


def plot_learning_curve(history: Mapping[str, Sequence[Any]], *, finetune: float | None = None) -> Figure:
    """Loss and validation AE over epochs, the five terms of the loss, and the schedule.

    Top, training loss and validation AE with its best epoch marked; below, a panel for each unweighted term
    on the scale that suits it (logarithmic, linear, or symmetric logarithmic where signs differ) and one for
    lam and tau. Several rows of one epoch are averaged. A column that is absent or empty leaves a note.

    Args:
        history: column -> cells, as read from a CSV log, with `epoch` and any of `train/loss`, `val/ae`,
            `train/rec`, `train/ortho`, `train/energy`, `train/diag`, `train/match`, `lam`, `tau_s`. Cells are
            numbers or their text; NaN, None and empty text where nothing was logged. Other columns are
            ignored.
        finetune: epoch at which a vertical line marks the beginning of the finetune.

    Raises:
        ValueError: no `epoch`, no other column with a finite value, columns of different lengths, or cells
            that are not numbers.
    """
    if len(_named(history, "history").get("epoch", ())) == 0:
        raise ValueError("history has no epoch, or no rows")
    epochs = _column(history, "epoch")
    keys = ("train/loss", "val/ae", *_TERMS, "lam", "tau_s")
    series = {key: _per_epoch(history, key, epochs) for key in keys}
    if not any(len(x) for x, _ in series.values()):
        raise ValueError(f"history has no finite value in any of {', '.join(keys)}")
    figure = _new_figure(6.6)
    grid = figure.add_gridspec(3, 3, height_ratios=(1.5, 1, 1))
    top = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1 + i // 3, i % 3], sharex=top) for i in range(6)]

    def draw(ax: Axes, key: str, i: int, **options: Any) -> bool:
        x, y = series[key]
        if not len(x):
            return False
        marker = "o" if len(x) <= 2 else ""
        ax.plot(x, y, color=_colour(i), linewidth=1.4, marker=marker, markersize=4, **options)
        return True

    drawn = [draw(top, "train/loss", 0, label="training loss")]
    x, y = series["val/ae"]
    if len(x):
        best = int(np.argmin(y))
        draw(top, "val/ae", 1, label="validation AE")
        label = f"best {y[best]:.3g} at epoch {x[best]:g}"
        top.plot(x[best], y[best], "o", color=_colour(1), markersize=5, markerfacecolor="white", label=label)
    drawn[0] |= bool(len(x))
    _scale_y(top, series["train/loss"][1], y)
    top.set_title("Loss and validation AE", fontsize=TITLE, loc="left")
    top.margins(x=0.02)
    if drawn[0]:
        # Above the axes, where no curve can pass.
        top.legend(
            fontsize=SMALL, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0
        )
    for ax, (key, title) in zip(below, _TERMS.items(), strict=False):
        drawn.append(draw(ax, key, 0))
        _scale_y(ax, series[key][1])
        ax.set_title(title, fontsize=TEXT)
    schedule = below[5]
    shown = [draw(schedule, "lam", 2, label="λ"), draw(schedule, "tau_s", 3, label="τ", linestyle="--")]
    drawn.append(any(shown))
    schedule.set_ylim(-0.03, 1.03)
    schedule.set_title("schedule", fontsize=TEXT)
    if any(shown):
        schedule.legend(fontsize=SMALL, frameon=False, ncols=2)
    for ax, any_line in zip((top, *below), drawn, strict=True):
        _plain(ax)
        if not any_line:
            _note(ax, "not logged")
            ax.set_yticks([])
        if finetune is not None:
            ax.axvline(finetune, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    if finetune is not None:
        place = top.get_xaxis_transform()
        top.text(finetune, 0.98, " finetune", transform=place, fontsize=SMALL, color=GREY, va="top")
    # The axes share x, and with it the locator.
    _integer_axis(top.xaxis)
    for ax in (top, *below[3:]):
        ax.set_xlabel("epoch", fontsize=TEXT)
    for ax in below[:3]:
        ax.tick_params(labelbottom=False)
    return figure


def plot_gram(U: Any, V: Any) -> Figure:
    """`|U^H U|` and `|V^H V|` of one sample on one logarithmic colour scale.

    Titles state the Frobenius distance of the Gram matrix to I. The scale spans the magnitudes off the
    diagonal, at most eight decades; zeros take its lowest colour, entries that are not finite are grey.

    Args:
        U: `(M, r)`, real or complex.
        V: `(N, r)`; its r may differ.

    Raises:
        ValueError: an empty factor, or one that is not a matrix.
    """
    from_factor = {
        "UᴴU": _array(U, "U", {2: "(M, r)"}),
        "VᴴV": _array(V, "V", {2: "(N, r)"}),
    }
    grams = {name: X.conj().T @ X for name, X in from_factor.items()}
    sizes = {name: np.abs(G) for name, G in grams.items()}
    off = np.concatenate([G[~np.eye(len(G), dtype=bool)] for G in sizes.values()])
    off = off[np.isfinite(off) & (off > 0)]
    top = max(1.0, _finite_max(*sizes.values()))
    low = float(np.percentile(off, 2)) if len(off) else 1e-8
    low = 10.0 ** math.floor(math.log10(min(max(low, 1e-8 * top), 0.1 * top)))
    figure = _new_figure(4.1)

    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes = figure.subplots(1, 2)
    norm, colours = LogNorm(low, top), _colours("viridis")
    for ax, (name, size) in zip(axes, sizes.items(), strict=True):
        image = _image(ax, np.maximum(size, low), colours, norm=norm)
        ax.set_aspect("equal")
        distance = float(np.linalg.norm(grams[name] - np.eye(len(size))))
        stated = f"{distance:.3g}" if math.isfinite(distance) else "n/a"
        ax.set_title(f"|{name}|,  ‖{name} − I‖ = {stated}", fontsize=TITLE)
        ax.set_xlabel("column", fontsize=TEXT)
    axes[0].set_ylabel("column", fontsize=TEXT)
    bar = _colour_bar(figure, image, list(axes), "magnitude", fraction=0.04)
    bar.locator = LogLocator(numticks=9)
    bar.formatter = FuncFormatter(_number)
    bar.minorformatter = NullFormatter()
    bar.update_ticks()
    return figure


def _spectra(value: Any, name: str) -> list[Array]:
    """One `(n, r)` array of non-increasing rows a scenario."""
    whole = {1: "(r,)", 2: "(scenarios, r)", 3: "(scenarios, n, r)"}
    if isinstance(value, torch.Tensor | np.ndarray):
        array = _array(value, name, whole, real=True)
        parts = [array] if array.ndim == 1 else list(array)
    else:
        items = list(value)
        if not items:
            raise ValueError(f"{name} is empty")
        if all(np.ndim(item) == 0 for item in items):
            items = [items]
        each = {1: "(r,)", 2: "(n, r)"}
        parts = [_array(item, f"{name}[{i}]", each, real=True) for i, item in enumerate(items)]
    return [-np.sort(-np.atleast_2d(part), axis=1) for part in parts]


def plot_spectrum(predicted: Any, true: Any, names: Sequence[object] | None = None) -> Figure:
    """Predicted against true singular values, sorted, in dB below the largest true one of each sample.

    Left, both over the index (true dashed with open markers, predicted solid); the median over the samples,
    with a band from the 5th to the 95th percentile of the predicted where there are several. Right, one
    against the other with the diagonal. Values below -80 dB, zeros included, are drawn at -80 dB. The legend
    states `|predicted - true| / |true|`, the median over the samples.

    Args:
        predicted: `(r,)`, `(scenarios, r)`, `(scenarios, n, r)`, or a sequence with `(r,)` or `(n, r)` a
            scenario, real, in any order.
        true: the same shapes.
        names: one a scenario; `scenario 1`, ... by default.

    Raises:
        ValueError: nothing to draw, shapes that differ, or another number of names.
    """
    ours, theirs = _spectra(predicted, "predicted"), _spectra(true, "true")
    count = len(theirs)
    if len(ours) != count:
        raise ValueError(f"predicted has {len(ours)} scenarios, true {count}")
    pairs = list(zip(ours, theirs, strict=True))
    for i, (p, t) in enumerate(pairs):
        if p.shape != t.shape:
            raise ValueError(f"predicted[{i}] has shape {p.shape}, true[{i}] {t.shape}")
    labels = [f"scenario {i + 1}" for i in range(count)] if names is None else [_scenario(x) for x in names]
    if len(labels) != count:
        raise ValueError(f"names has {len(labels)} entries for {count} scenarios")

    figure = _new_figure(4.2)

    from matplotlib.lines import Line2D

    left, right = figure.subplots(1, 2)
    extremes = [0.0]
    for i, ((p, t), name) in enumerate(zip(pairs, labels, strict=True)):
        reference = t[:, :1]
        p_db, t_db = (_decibel(x, reference, SPECTRUM_FLOOR_DB) for x in (p, t))
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = np.linalg.norm(p - t, axis=1) / np.linalg.norm(t, axis=1)
        errors = errors[np.isfinite(errors)]
        stated = f"{np.median(errors):.3g}" if len(errors) else "n/a"
        k, colour = np.arange(1, p.shape[1] + 1), _colour(i)
        kept = [x[np.isfinite(x).all(1)] if np.isfinite(x).all(1).any() else x[:1] for x in (p_db, t_db)]
        if len(kept[0]) > 1:
            left.fill_between(k, *np.percentile(kept[0], BAND, axis=0), color=colour, alpha=0.15, linewidth=0)
        marker = MARKERS[i % len(MARKERS)]
        every = max(1, len(k) // 12)
        open_marker = {"marker": marker, "markersize": 4, "markerfacecolor": "white", "markevery": every}
        left.plot(k, np.median(kept[1], 0), "--", color=colour, linewidth=1.0, **open_marker)
        single = {"marker": "o", "markersize": 4} if len(k) == 1 else {}
        left.plot(k, np.median(kept[0], 0), "-", color=colour, linewidth=1.5, **single)
        x, y = t_db.ravel(), p_db.ravel()
        alpha = 0.8 if len(x) <= 300 else 0.25
        label = f"{name}  ({stated})"
        right.plot(x, y, marker, color=colour, markersize=3.5, alpha=alpha, markeredgewidth=0, label=label)
        both = np.concatenate([x, y])
        both = both[np.isfinite(both)]
        extremes += [float(both.min()), float(both.max())] if len(both) else []
    low, high = 5 * math.floor(min(extremes) / 5) - 2.0, max(extremes) + 4.0
    right.plot([low, high], [low, high], color=GREY, linewidth=0.8, zorder=0)
    for ax in (left, right):
        _plain(ax)
        ax.set_ylim(low, high)
        ax.set_ylabel("predicted singular value (dB)", fontsize=TEXT)
    left.set_ylabel("singular value (dB re largest true)", fontsize=TEXT)
    left.set_xlabel("index k", fontsize=TEXT)
    _integer_axis(left.xaxis)
    left.set_title("Sorted spectrum", fontsize=TITLE)
    right.set_xlim(low, high)
    right.set_xlabel("true singular value (dB)", fontsize=TEXT)
    right.set_title("Predicted against true", fontsize=TITLE)
    handles = [
        Line2D([], [], color=GREY, label="predicted"),
        Line2D([], [], color=GREY, linestyle="--", marker="o", markersize=4, label="true"),
    ]
    handles[1].set_markerfacecolor("white")
    left.legend(handles=handles, fontsize=SMALL, frameon=False, loc="upper right")
    legend = right.legend(fontsize=SMALL, frameon=False, loc="upper left", markerscale=1.4)
    legend.set_title("relative error in brackets", {"size": SMALL})
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def plot_trim(spectrum: Any, kept: int) -> Figure:
    """Singular values of a start with more columns than needed, and where its tail is cut.

    Left in dB below the largest, right the share of their squared sum that the first k hold; what is kept is
    filled, what is cut open. Values below -80 dB, zeros included, are drawn at -80 dB.

    Args:
        spectrum: `(L,)`, real, in any order.
        kept: how many of the largest are kept, 1 to L.

    Raises:
        ValueError: nothing to draw, another shape, or kept outside 1 to L.
    """
    S = _spectra(spectrum, "spectrum")
    if len(S) != 1 or len(S[0]) != 1:
        raise ValueError("spectrum must have shape (L,)")
    values = S[0][0]
    if not 1 <= kept <= len(values):
        raise ValueError(f"kept must lie in 1 to {len(values)}, got {kept}")
    figure = _new_figure(3.8)
    left, right = figure.subplots(1, 2)
    k = np.arange(1, len(values) + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.cumsum(values**2) / np.sum(values**2)
    decibel = _decibel(values, values[0], SPECTRUM_FLOOR_DB)
    for ax, y, what in (
        (left, decibel, "singular value (dB re largest)"),
        (right, share, "share of the squared sum"),
    ):
        _plain(ax)
        ax.plot(k, y, "-", color=PALE, linewidth=1.0, zorder=1)
        ax.plot(k[:kept], y[:kept], "o", color=_colour(0), markersize=4, label=f"kept ({kept})")
        if kept < len(values):
            style = {"markersize": 4, "markerfacecolor": "white"}
            ax.plot(k[kept:], y[kept:], "o", color=_colour(1), label=f"cut ({len(values) - kept})", **style)
        ax.axvline(kept + 0.5, color=GREY, linewidth=0.8, linestyle="--")
        ax.set_xlabel("index k", fontsize=TEXT)
        ax.set_ylabel(what, fontsize=TEXT)
        _integer_axis(ax.xaxis)
    left.set_title("Spectrum", fontsize=TITLE)
    right.set_title("Cumulative energy", fontsize=TITLE)
    left.legend(fontsize=SMALL, frameon=False)
    return figure


def _pareto_front(x: Array, y: Array) -> list[int]:
    """Indices of the points that no other beats in both, by rising x."""
    front: list[int] = []
    for i in np.lexsort((y, x)):
        if not front or y[i] < y[front[-1]]:
            front.append(int(i))
    return front


def _place_labels(ax: Axes, points: Array, labels: Sequence[str], below: int, lines: Sequence[Array]) -> None:
    """Write each label beside its point where it covers no point, line or other label; else leave it out.

    The first `below` labels look for room below and to the left first, the others above and to the right.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    # Lines are sampled, so that one test of points against boxes serves for them too.
    steps = np.linspace(0, 1, 200)[:, None]
    along = [
        a + (b - a) * steps for line in lines for a, b in itertools.pairwise(ax.transData.transform(line))
    ]
    obstacles = np.concatenate([ax.transData.transform(points), *along])
    inside = ax.get_window_extent(renderer)
    taken: list[Any] = []
    upper = ((1, 1), (0, 1.2), (1.2, 0), (-1, 1), (1, -1), (0, -1.2), (-1.2, 0), (-1, -1))
    lower = ((-1, -1), (0, -1.2), (1, 1), (0, 1.2), (-1.2, 0), (1.2, 0), (1, -1), (-1, 1))
    for i, (point, label) in enumerate(zip(points, labels, strict=True)):
        directions = lower if i < below else upper
        for scale, (dx, dy) in itertools.product((4, 8, 13), directions):
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": ("center", "left", "right")[int(np.sign(dx))],
                "va": ("center", "bottom", "top")[int(np.sign(dy))],
            }
            note = ax.annotate(label, point, (scale * dx, scale * dy), fontsize=SMALL, color=GREY, **place)
            note.set_in_layout(False)
            box = note.get_window_extent(renderer)
            hit = ((obstacles >= box.min) & (obstacles <= box.max)).all(1).any()
            outside = np.any(box.min < inside.min) or np.any(box.max > inside.max)
            if not (hit or outside or any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            note.remove()


def _far_baseline(y: Array, baseline: float) -> bool:
    """Whether one axis for both would flatten the points."""
    return float(min(abs(y - baseline))) > 2 * float(np.ptp(y)) > 0


def _broken_axes(figure: Figure, y: Array, baseline: float) -> tuple[Axes, Axes | None]:
    """Axes for the points and, where the baseline is far, a strip for it beyond a marked break."""
    if not _far_baseline(y, baseline):
        return figure.subplots(), None
    under = baseline < y.min()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(8, 1) if under else (1, 8))
    ax, strip = (upper, lower) if under else (lower, upper)
    _plain(strip)
    reach = 0.05 * abs(baseline) or 0.05
    strip.set_ylim(baseline - reach, baseline + reach)
    strip.set_yticks([baseline], [f"{baseline:.3g}"])
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(axis="x", length=0, labelbottom=False)
    cut = {
        "marker": [(-1, -0.5), (1, 0.5)],
        "markersize": 9,
        "linestyle": "none",
        "color": "black",
        "clip_on": False,
    }
    upper.plot([0], [0], transform=upper.transAxes, **cut)
    lower.plot([0], [1], transform=lower.transAxes, **cut)
    return ax, strip


def plot_pareto(points: Sequence[Mapping[str, Any]], *, baseline: float | None = None) -> Figure:
    """AE against multiply-adds of pruned networks, with the Pareto front.

    The front joins the points that no other beats in both; the rest are pale. A ring marks the lowest
    `100 AE + MACs(M)`. Points are labelled `(k_len, gate_hidden)` where there is room.

    Args:
        points: mappings with `k_len`, `gate_hidden`, `macs_m` (millions) and `ae`. Points whose `macs_m` or
            `ae` is not finite are left out.
        baseline: AE of the truncated SVD of the same input, drawn as a horizontal line; in a strip beyond a
            break of the axis where it lies so far off that one axis would flatten the points.

    Raises:
        ValueError: no points, a missing key, or no finite point.
    """
    records = _records(points, "points", ("k_len", "gate_hidden", "macs_m", "ae"))
    x = np.array([float(p["macs_m"]) for p in records])
    y = np.array([float(p["ae"]) for p in records])
    labels = [f"({_text(p['k_len'])}, {_text(p['gate_hidden'])})" for p in records]
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        raise ValueError("points holds no finite macs_m and ae")
    x, y = x[finite], y[finite]
    labels = [label for label, keep in zip(labels, finite, strict=True) if keep]
    front = _pareto_front(x, y)
    rest = np.setdiff1d(np.arange(len(x)), front)
    best = int(np.argmin(100 * y + x))
    figure = _new_figure(4.6, 8.0)
    shown = baseline is not None and math.isfinite(baseline)
    ax, strip = (
        _broken_axes(figure, y, baseline) if shown and baseline is not None else (figure.subplots(), None)
    )
    _plain(ax)
    lines = [np.column_stack([x[front], y[front]])]
    if len(rest):
        ax.plot(x[rest], y[rest], "o", color="#A9A9A9", markersize=5, label="dominated")
    ax.plot(x[front], y[front], "o-", color=_colour(0), markersize=6, linewidth=1.4, label="Pareto front")
    (ring,) = ax.plot(x[best], y[best], "o", color=_colour(1), markersize=11, markeredgewidth=1.5)
    ring.set_markerfacecolor("none")
    ring.set_label(f"lowest Score, {100 * y[best] + x[best]:.4g}")
    ax.margins(0.1)
    handles, texts = ax.get_legend_handles_labels()
    if shown and baseline is not None:
        host = ax if strip is None else strip
        level = host.axhline(baseline, color=GREY, linewidth=1.0, linestyle="--")
        handles, texts = [*handles, level], [*texts, f"truncated SVD, AE {baseline:.3g}"]
        if strip is None:
            lines.append(np.column_stack([ax.get_xlim(), [baseline, baseline]]))
    lowest = strip if strip is not None and strip.get_position().y0 < ax.get_position().y0 else ax
    highest = ax if lowest is not ax or strip is None else strip
    lowest.set_xlabel("MACs a channel (millions)", fontsize=TEXT)
    highest.set_title("AE against MACs, points labelled (k_len, gate hidden)", fontsize=TITLE)
    ax.set_ylabel("AE", fontsize=TEXT)
    ax.legend(handles, texts, fontsize=SMALL, frameon=False)
    order = [*front, *rest.tolist()]
    points_ = np.column_stack([x[order], y[order]])
    _place_labels(ax, points_, [labels[i] for i in order], len(front), lines)
    return figure


def plot_knob(points: Sequence[Mapping[str, Any]]) -> Figure:
    """AE against multiply-adds and against time of a refined network, its steps as one line.

    Left against `true_macs_m`, right against `microseconds`, both logarithmic; what has no number there is
    left out of that half. Points with `steps` make the line, each labelled with its number; the others stand
    alone, named in the legend.

    Args:
        points: mappings with `name`, `steps` (None for what is no network with that knob), `ae`, and
            `true_macs_m` (millions), `microseconds` or both, as `lomacs_fast.evaluation.evaluate_knob` gives.

    Raises:
        ValueError: no points, or a missing key.
    """
    records = _records(points, "points", ("name", "steps", "ae"))
    figure = _new_figure(4.4, 10.0)
    halves = figure.subplots(1, 2, sharey=True)
    keys = (
        ("true_macs_m", "real multiply-adds a channel (millions)"),
        ("microseconds", "microseconds a channel"),
    )
    alone = [p["name"] for p in records if p["steps"] is None]
    for ax, (key, label) in zip(halves, keys, strict=True):
        _plain(ax)
        there = [p for p in records if p.get(key) is not None and math.isfinite(p[key]) and p[key] > 0]
        line = sorted((p for p in there if p["steps"] is not None), key=lambda p: p["steps"])
        x, y = ([float(p[k]) for p in line] for k in (key, "ae"))
        ax.plot(x, y, "o-", color=_colour(0), linewidth=1.4, markersize=5, label="refined, by steps")
        for p, at, ae in zip(line, x, y, strict=True):
            ax.annotate(str(p["steps"]), (at, ae), xytext=(3, 4), textcoords="offset points", fontsize=SMALL)
        for p in there:
            if p["steps"] is None:
                i = 1 + alone.index(p["name"])
                marker = MARKERS[i % len(MARKERS)]
                # the first colour is the line's
                colour = _colour(i) if i < len(COLOURS) else GREY
                ax.plot(p[key], p["ae"], marker, color=colour, markersize=6, label=p["name"])
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(label, fontsize=TEXT)
    halves[0].set_ylabel("AE", fontsize=TEXT)
    halves[1].legend(fontsize=SMALL, frameon=False)
    figure.suptitle("AE against cost", fontsize=TITLE)
    return figure


def plot_time(times: Mapping[str, Any]) -> Figure:
    """Microseconds a channel of several variants as horizontal bars, each with its number.

    The axis is logarithmic where the slowest takes more than 30 times the fastest.

    Args:
        times: variant -> median, or `(median, low, high)` for a bar of the spread. A median that is not
            finite is listed as `n/a`.

    Raises:
        ValueError: no variants, another number of values, values that are not positive, no finite median, or
            a median outside its own spread.
    """
    rows: list[tuple[str, float, float, float]] = []
    for name, value in _named(times, "times").items():
        numbers = np.atleast_1d(_array(value, f"times[{name!r}]", {0: "()", 1: "(3,)"}, real=True))
        if len(numbers) not in (1, 3):
            raise ValueError(f"times[{name!r}] must be a median or (median, low, high), got {value!r}")
        median, low, high = numbers if len(numbers) == 3 else (numbers[0], math.nan, math.nan)
        if (numbers <= 0).any():
            raise ValueError(f"times[{name!r}] must be positive, got {numbers.tolist()}")
        if low > median or high < median:
            raise ValueError(
                f"times[{name!r}]: the median {median:g} is outside its spread {low:g} to {high:g}"
            )
        rows.append((_text(name), float(median), float(low), float(high)))
    medians = np.array([row[1] for row in rows])
    finite = medians[np.isfinite(medians)]
    if not len(finite):
        raise ValueError("times holds no finite median")
    figure = _new_figure(0.9 + 0.38 * len(rows), 8.0)
    ax = figure.subplots()
    _plain(ax)
    ax.grid(False, axis="y")
    at = np.arange(len(rows))
    logarithmic = finite.max() > 30 * finite.min()
    ends = np.fmax(medians, [row[3] for row in rows])
    longest = float(np.nanmax(ends))
    # A decade below half of the fastest, so that its bar has a length.
    start = 10.0 ** math.floor(math.log10(finite.min() / 2))
    if logarithmic:
        _log_axis(ax, "x", start, longest)
        ax.set_xlim(start, start * (longest / start) ** 1.15)
    else:
        ax.set_xlim(0, 1.15 * longest)
    bars = np.where(np.isfinite(medians), medians, 0 if not logarithmic else start)
    ax.barh(at, bars, height=0.62, color=[_colour(0)] * len(rows))
    for i, (_, median, low, high) in enumerate(rows):
        if math.isfinite(low) and math.isfinite(high):
            spread = [[median - low], [high - median]]
            ax.errorbar(median, i, xerr=spread, color="black", capsize=3, linewidth=1.0, fmt="none")
        end = ends[i] if math.isfinite(median) else bars[i]
        stated = f"{median:.3g}" if median < 1000 else f"{median:,.0f}"
        ax.annotate(
            f"{stated} µs" if math.isfinite(median) else "n/a",
            (end, i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
    ax.set_yticks(at, [row[0] for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=TEXT)
    ax.invert_yaxis()
    unit = "µs a channel, logarithmic" if logarithmic else "µs a channel"
    ax.set_xlabel(f"time ({unit})", fontsize=TEXT)
    return figure


def plot_gate(gates: Sequence[Mapping[str, Any]]) -> Figure:
    """The frequency gate beside the spectrum that it weighs, one column a sample.

    Top, `|FFT2 input|` (orthonormal) in dB below its largest bin, floored at -50 dB; below, the gate from 0
    to 1. Both are shifted so that frequency zero is in the centre.

    Args:
        gates: mappings with `scenario` (number or name), `input`, complex `(M, N)`, and `gate`, real
            `(M, N)` in the order of `fft2`, as `AxialLowRankFreqGate` returns it.

    Raises:
        ValueError: no samples, a missing key, or a gate of another shape than its input.
    """
    records = _records(gates, "gates", ("scenario", "input", "gate"))
    pairs = []
    for i, record in enumerate(records):
        H = _array(record["input"], f"gates[{i}].input", {2: "(M, N)"})
        gate = _array(record["gate"], f"gates[{i}].gate", {2: "(M, N)"}, real=True)
        if gate.shape != H.shape:
            raise ValueError(f"gates[{i}].gate has shape {gate.shape}, its input {H.shape}")
        pairs.append((H, gate))
    blocks = math.ceil(len(pairs) / 4)
    columns = math.ceil(len(pairs) / blocks)
    tall = max(1.0, max(H.shape[0] / H.shape[1] for H, _ in pairs))
    panel = min(2.6, 7.6 / columns, max(1.4, 2.8 / tall))
    row = _row_height(panel, [H.shape for H, _ in pairs])
    figure = _new_figure(blocks * (2 * row + 0.6) + 0.4, columns * panel + 1.4)
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    magma, viridis = _colours("magma"), _colours("viridis")
    for i in range(blocks * columns):
        upper, lower = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        if i >= len(pairs):
            # Hidden, not removed: the colour bars of the row keep their place.
            upper.set_visible(False)
            lower.set_visible(False)
            continue
        H, gate = pairs[i]
        spectrum = _fft_magnitude(H)
        decibel = _decibel(spectrum, _finite_max(spectrum), FLOOR_DB)
        spectrum_image = _image(upper, decibel, magma, shifted=True, vmin=FLOOR_DB, vmax=0.0)
        gate_image = _image(lower, np.fft.fftshift(gate), viridis, shifted=True, vmin=0.0, vmax=1.0)
        upper.set_title(_scenario(records[i]["scenario"]), fontsize=TITLE)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("column bin", fontsize=TEXT)
        for ax in (upper, lower):
            ax.tick_params(labelleft=i % columns == 0)
        if i % columns == 0:
            upper.set_ylabel("|FFT2 input|\nrow bin", fontsize=TEXT)
            lower.set_ylabel("gate\nrow bin", fontsize=TEXT)
    for b in range(blocks):
        _colour_bar(figure, spectrum_image, list(axes[2 * b]), "dB re max")
        _colour_bar(figure, gate_image, list(axes[2 * b + 1]), "gate")
    return figure


def plot_column_dictionary(shares: Mapping[str, Any]) -> Figure:
    """How the energy of the attention's column dictionary spreads over its columns, one panel a block.

    A curve a group: cumulative share of `|P_k[:, c]|^2 + alpha |P_v[:, c]|^2` over the columns, largest
    first, as pruning would keep them; the dotted line is an even spread.

    Args:
        shares: block -> real `(groups, k_len)`, each group summing to 1, as `dictionary_energy` gives them.

    Raises:
        TypeError, ValueError: no blocks, or shares of another shape.
    """
    arrays = {
        name: _array(value, f"shares[{name!r}]", {2: "(groups, k_len)"}, real=True)
        for name, value in _named(shares, "shares").items()
    }
    columns = min(3, len(arrays))
    rows = math.ceil(len(arrays) / columns)
    figure = _new_figure(2.7 * rows + 0.2, 3.0 * columns + 1.2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(arrays) :]:
        ax.set_visible(False)
    for ax, (name, share) in zip(axes, arrays.items(), strict=False):
        k_len = share.shape[1]
        kept = np.arange(1, k_len + 1)
        ax.plot(kept, kept / k_len, ":", color=GREY, linewidth=1.0, label="even")
        for g, group in enumerate(share):
            cumulative = np.cumsum(np.sort(group)[::-1])
            ax.plot(kept, cumulative, _style(g), color=_colour(g), linewidth=1.4, label=f"group {g}")
        _plain(ax)
        _integer_axis(ax.xaxis)
        ax.set_ylim(0, 1.02)
        ax.set_title(f"{name}, k_len {k_len}", fontsize=TITLE)
        ax.set_xlabel("columns kept", fontsize=TEXT)
        ax.set_ylabel("share of the energy", fontsize=TEXT)
    axes[0].legend(fontsize=SMALL, frameon=False, loc="lower right")
    return figure


class _Panel(NamedTuple):
    title: str
    unit: str = ""
    logarithmic: bool = False


# In the order of the page; keys that are not here follow under their own names.
_STATISTICS = {
    "cumulative_energy": _Panel("cumulative energy", "singular values k"),
    "effective_rank_99": _Panel("effective rank, 99% energy", "singular values"),
    "effective_rank_entropy": _Panel("effective rank, entropy", "singular values"),
    "condition_number": _Panel("condition number", "", True),
    "fft_energy_top1": _Panel("energy in top 1% FFT bins", "share"),
    "fft_energy_top5": _Panel("energy in top 5% FFT bins", "share"),
}


def _density(values: Array) -> tuple[Array, Array] | None:
    """Gaussian kernel estimate over the range of the values, largest 1; None where they do not spread."""
    if len(values) > 4000:
        values = values[:: math.ceil(len(values) / 4000)]
    quartiles = np.percentile(values, (25, 75))
    spread = float(values.std())
    between = float(quartiles[1] - quartiles[0]) / 1.34
    width = 0.9 * (min(spread, between) if between > 0 else spread) * len(values) ** -0.2
    if len(values) < 5 or width <= 1e-9 * max(1.0, float(np.abs(values).max())):
        return None
    x = np.linspace(values.min(), values.max(), 160)
    density = np.exp(-0.5 * ((x[:, None] - values) / width) ** 2).sum(1)
    return x, density / density.max()


def _spans_decades(samples: Sequence[Array | None]) -> bool:
    values = np.concatenate([x[np.isfinite(x)] for x in samples if x is not None])
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.percentile(values, BAND)
    return bool(high > 1000 * low)


def _draw_distributions(ax: Axes, samples: Sequence[Array | None], logarithmic: bool) -> None:
    """A density a dataset, one above the other, over the line from the 5th to the 95th percentile."""
    from matplotlib.ticker import MaxNLocator

    rows = [None if x is None else x[np.isfinite(x) & ((x > 0) | (not logarithmic))] for x in samples]
    drawn = [x for x in rows if x is not None and len(x)]
    if logarithmic and drawn:
        _log_axis(ax, "x", min(float(x.min()) for x in drawn), max(1.01 * float(x.max()) for x in drawn))
    elif drawn:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    for i, x in enumerate(rows):
        if x is None or not len(x):
            continue
        colour, base = _colour(i), float(-i)
        density = _density(np.log(x) if logarithmic else x)
        if density is None:
            ax.plot(x, np.full(len(x), base + 0.42), "o", color=colour, markersize=5, alpha=0.7)
        else:
            at = np.exp(density[0]) if logarithmic else density[0]
            ax.fill_between(at, base, base + 0.85 * density[1], color=colour, alpha=0.35, linewidth=0)
            ax.plot(at, base + 0.85 * density[1], color=colour, linewidth=1.0)
            ax.plot(np.percentile(x, BAND), [base, base], color=colour, linewidth=2.2, solid_capstyle="butt")
        if len(np.unique(x)) > 1:
            ax.plot([np.median(x)] * 2, [base, base + 0.85], color="black", linewidth=1.0)
    ax.set_ylim(-len(rows) + 0.75, 1.0)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    if not drawn:
        _note(ax, "no finite value")


def _draw_curves(ax: Axes, samples: Sequence[Array | None]) -> None:
    """Mean of each column a dataset, with a band from the 5th to the 95th percentile."""
    for i, x in enumerate(samples):
        if x is None:
            continue
        x = x[np.isfinite(x).all(1)]
        if not len(x):
            continue
        k = np.arange(1, x.shape[1] + 1)
        marker = "o" if len(k) == 1 else ""
        ax.plot(k, x.mean(0), _style(i), color=_colour(i), linewidth=1.3, marker=marker, markersize=4)
        if len(x) > 1:
            ax.fill_between(k, *np.percentile(x, BAND, axis=0), color=_colour(i), alpha=0.15, linewidth=0)
    _integer_axis(ax.xaxis, 5)


def plot_statistics(stats: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A page of small panels, one a statistic, that compares datasets by their distributions.

    A statistic with one number a sample is drawn as a density a dataset (in the order of the legend from the
    top), with the median as a black line and the 5th to 95th percentile as a bar under it; with fewer than
    five samples, or no spread, as points. One with several numbers a sample is a mean curve with its 5th to
    95th percentile. Condition numbers, and whatever positive values span three decades, are on a logarithmic
    axis. Values that are not finite, or on that axis not positive, are left out.

    Args:
        stats: dataset -> statistic -> values `(n,)` or `(n, k)`. Known statistics come first under readable
            titles, others follow under their own names; any may be absent. Values that are not real numbers,
            or have more dimensions, are ignored.

    Raises:
        ValueError: no datasets, or nothing that can be drawn.
    """
    _named(stats, "stats")
    found: dict[str, dict[Any, Array]] = {}
    for dataset, values in stats.items():
        if not isinstance(values, Mapping):
            raise TypeError(f"stats[{dataset!r}] must be a mapping, got {type(values).__name__}")
        for key, value in values.items():
            try:
                array = _array(value, key, {0: "()", 1: "(n,)", 2: "(n, k)"}, real=True)
            except (TypeError, ValueError):
                continue
            array = np.atleast_1d(array)
            others = found.setdefault(str(key), {})
            if all(other.ndim == array.ndim for other in others.values()):
                others[dataset] = array
    keys = [key for key in _STATISTICS if key in found] + [key for key in found if key not in _STATISTICS]
    if not keys:
        raise ValueError("stats holds no real statistic of shape (n,) or (n, k)")
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = _new_figure(rows * (1.25 + 0.14 * len(stats)) + 0.5, max(4.5, WIDTH * columns / 4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(keys) :]:
        ax.remove()
    for ax, key in zip(axes.flat, keys, strict=False):
        panel = _STATISTICS.get(key, _Panel(_text(key.replace("_", " "))))
        samples = [found[key].get(dataset) for dataset in stats]
        _plain(ax)
        if next(x for x in samples if x is not None).ndim == 2:
            _draw_curves(ax, samples)
        else:
            _draw_distributions(ax, samples, panel.logarithmic or _spans_decades(samples))
        ax.set_title(panel.title, fontsize=TEXT)
        if panel.unit:
            ax.set_xlabel(panel.unit, fontsize=SMALL)

    from matplotlib.patches import Patch

    handles = [Patch(color=_colour(i), alpha=0.6, label=_scenario(name)) for i, name in enumerate(stats)]
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=TEXT, frameon=False)
    return figure


def save_figure(fig: Figure, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Write `fig` in the format that the suffix of `path` names (PNG without one) and return the path.

    The file appears whole or not at all: it is written under a temporary name in the same folder and renamed.

    Raises:
        ValueError: a suffix that matplotlib cannot write, or a path that is a folder.
        FileExistsError: `path` exists and `overwrite` is false.
        FileNotFoundError: its folder does not exist.
    """
    from .data.files import atomic_path

    target = Path(path)
    kind = target.suffix[1:].lower() or "png"
    known = fig.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{target}: no format of matplotlib; expected one of {', '.join(sorted(known))}")
    with atomic_path(target, overwrite=overwrite) as temporary:
        fig.savefig(temporary, format=kind, dpi=DPI)
    return target
