"""Figures: what the artists hold equals brute-force numbers, files are whole, bad input is named."""

import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from lomacs_fast import plots
from lomacs_fast.plots import (
    plot_channels,
    plot_cumulative_energy,
    plot_gate,
    plot_gram,
    plot_learning_curve,
    plot_pareto,
    plot_spectrum,
    plot_statistics,
    plot_time,
    save_figure,
)


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning of matplotlib or NumPy (an empty slice, a deprecated call, a missing glyph) is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def channel(M, N, rank=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(k, rank, dtype=torch.complex64, generator=g) for k in (M, N))
    label = left @ right.mH
    return label + 0.2 * torch.randn(M, N, dtype=torch.complex64, generator=g), label


def sample(M=16, N=12, scenario=1, seed=0):
    noisy, label = channel(M, N, seed=seed)
    return {"scenario": scenario, "input": noisy, "label": label, "estimate": 0.9 * label}


def panels(figure):
    """Axes other than colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def images(figure):
    return [np.ma.getdata(ax.images[0].get_array()) for ax in panels(figure) if ax.get_visible()]


def line(ax, label):
    return next(x for x in ax.lines if x.get_label() == label)


def texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def history(rows=6):
    """As two rows an epoch: training columns in one, validation in the other."""
    columns = {"epoch": [], "train/loss": [], "val/ae": []}
    for key in ("rec", "ortho", "energy", "diag", "match"):
        columns[f"train/{key}"] = []
    columns |= {"lam": [], "tau_s": []}
    for epoch in range(rows):
        for training in (True, False):
            for key, cells in columns.items():
                if key == "epoch":
                    cells.append(str(epoch))
                elif (key == "val/ae") == training:
                    cells.append("" if epoch % 2 else None)
                else:
                    cells.append(10.0 ** (-epoch / 2) - (0.02 if key == "train/energy" else 0.0))
    return columns


def points():
    table = [
        (8, 8, 1.0, 0.60),
        (16, 8, 1.5, 0.62),
        (16, 16, 2.0, 0.50),
        (32, 16, 2.5, 0.55),
        (32, 32, 3.0, 0.49),
    ]
    return [dict(zip(("k_len", "gate_hidden", "macs_m", "ae"), row, strict=True)) for row in table]


def stats(names=("scenario 1", "scenario 2"), n=40):
    g = torch.Generator().manual_seed(3)
    return {
        name: {
            "cumulative_energy": torch.rand(n, 5, generator=g).cumsum(1),
            "condition_number": 10 ** (10 * torch.rand(n, generator=g)),
            "alignment": torch.rand(n, generator=g),
            "own_number": torch.randn(n, generator=g),
        }
        for name in names
    }


CALLS = {
    "channels": lambda: plot_channels([sample()]),
    "cumulative_energy": lambda: plot_cumulative_energy({"a": torch.rand(5, 8) + 0.1}),
    "column_dictionary": lambda: plots.plot_column_dictionary({"blocks.0": torch.full((2, 4), 0.25)}),
    "gate": lambda: plot_gate([{"scenario": 1, "input": channel(8, 6)[0], "gate": torch.rand(8, 6)}]),
    "gram": lambda: plot_gram(torch.eye(6, 3), torch.eye(5, 3)),
    "learning_curve": lambda: plot_learning_curve(history()),
    "pareto": lambda: plot_pareto(points(), baseline=0.08),
    "spectrum": lambda: plot_spectrum(torch.tensor([3.0, 1.0]), torch.tensor([3.1, 0.9])),
    "statistics": lambda: plot_statistics(stats()),
    "time": lambda: plot_time({"ours": (1.0, 0.9, 1.2), "eager": 700.0}),
    "knob": lambda: plots.plot_knob(
        [
            {"name": "4 steps", "steps": 4, "ae": 0.05, "true_macs_m": 13.0, "microseconds": 400.0},
            {"name": "svd", "steps": None, "ae": 0.07, "true_macs_m": 11.0, "microseconds": 700.0},
        ]
    ),
    "trim": lambda: plots.plot_trim(torch.tensor([3.0, 1.0, 0.1, 0.0]), 2),
}


def test_every_function_is_called_here():
    assert {f"plot_{name}" for name in CALLS} | {"save_figure"} == set(plots.__all__)


@pytest.mark.parametrize("scenarios", [1, 4])
@pytest.mark.parametrize(("M", "N"), [(16, 16), (24, 12)])
def test_channels_hold_magnitudes_and_errors(scenarios, M, N):
    samples = [sample(M, N, i + 1, seed=i) for i in range(scenarios)]
    figure = plot_channels(samples)
    axes = panels(figure)
    assert len(axes) == 6 * scenarios
    # Half by half: the spatial panels of all rows come first.
    for i, s in enumerate(samples):
        spatial, frequency = axes[3 * i : 3 * i + 3], axes[3 * (scenarios + i) : 3 * (scenarios + i) + 3]
        peak = np.abs(np.fft.fft2(s["label"].numpy().astype(complex))).max()
        for ax, key in zip(spatial, ("input", "label", "estimate"), strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), s[key].abs().double(), rtol=1e-6)
        limits = {ax.images[0].get_clim() for ax in spatial}
        assert len(limits) == 1
        assert limits.pop() == pytest.approx((0, max(float(s[k].abs().max()) for k in ("input", "label"))))
        for ax, key in zip(frequency, ("input", "label", "estimate"), strict=True):
            F = np.abs(np.fft.fft2(s[key].numpy().astype(complex)))
            expected = np.maximum(20 * np.log10(np.roll(F, (M // 2, N // 2), (0, 1)) / peak), -50)
            np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
            assert ax.images[0].get_clim() == (-50, 0)
        error = float((s["input"] - s["label"]).norm() / s["label"].norm())
        assert f"error {error:.3g}" in spatial[0].get_title()
        assert "error 0.1" in spatial[2].get_title()
        assert f"scenario {i + 1}" in spatial[0].get_ylabel()
    assert axes[0].get_title().startswith("input\n")


def test_channels_of_unequal_size_nan_and_zero():
    broken, dead = sample(12, 12, "street"), sample(8, 16, 2)
    broken["input"][3, 4] = math.nan
    dead["label"] = torch.zeros_like(dead["label"])
    figure = plot_channels([broken, dead])
    axes = panels(figure)
    assert "error n/a" in axes[0].get_title()
    assert "error 0.1" in axes[2].get_title()
    assert "street" in axes[0].get_ylabel()
    assert np.isnan(np.ma.filled(axes[0].images[0].get_array(), np.nan)[3, 4])
    assert "error n/a" in axes[3].get_title()
    figure.draw_without_rendering()


def test_channels_take_conjugate_views_and_gradients():
    H = channel(10, 8)[0].to(torch.complex128).requires_grad_()
    figure = plot_channels(
        [{"scenario": 1, "input": H.mH, "label": H.mH, "estimate": H.detach().numpy().conj().T}]
    )
    np.testing.assert_allclose(images(figure)[0], H.detach().abs().T, rtol=1e-6)
    assert "error 0" in panels(figure)[2].get_title()
    negative = H.detach().conj().imag
    assert negative.is_neg()
    figure = plot_channels([{"scenario": 1, "input": negative, "label": negative, "estimate": negative}])
    np.testing.assert_allclose(images(figure)[0], H.detach().imag.abs(), rtol=1e-12)


def test_cumulative_energy_is_the_mean_share():
    s = torch.rand(30, 12, dtype=torch.float64) ** 3 + 1e-3
    figure = plot_cumulative_energy({"many": s, "one": torch.tensor([1.0, 3.0, 2.0])})
    left, right = panels(figure)
    energy = (s**2).sort(1, descending=True).values
    share = energy.cumsum(1) / energy.sum(1, keepdim=True)
    ranks = [int((share.mean(0) < level).sum()) + 1 for level in (0.9, 0.99, 0.999)]
    drawn = line(left, "many  ({} / {} / {})".format(*ranks))
    np.testing.assert_allclose(drawn.get_xdata(), np.arange(1, 13))
    np.testing.assert_allclose(drawn.get_ydata(), share.mean(0), rtol=1e-12)
    np.testing.assert_allclose(line(left, "one  (2 / 3 / 3)").get_ydata(), [9 / 14, 13 / 14, 1])
    markers = left.lines[left.lines.index(drawn) + 1]
    assert list(markers.get_xdata()) == ranks
    np.testing.assert_allclose(
        line(right, drawn.get_label()).get_ydata()[:-1], 1 - share.mean(0)[:-1], rtol=1e-9
    )
    # The band belongs to the curve with samples alone.
    (band,) = left.collections
    low = np.percentile(share.numpy(), 5, axis=0)
    assert all(
        (np.abs(band.get_paths()[0].vertices - (k + 1, y)).sum(1) < 1e-9).any() for k, y in enumerate(low)
    )


def test_cumulative_energy_leaves_out_what_has_none():
    figure = plot_cumulative_energy({"x": torch.tensor([[2.0, 0.0], [math.nan, 1.0], [0.0, 0.0]])})
    np.testing.assert_allclose(panels(figure)[0].lines[0].get_ydata(), [1, 1])
    with pytest.raises(ValueError, match=r"curves\['x'\].*no sample"):
        plot_cumulative_energy({"x": torch.zeros(3, 2)})


def test_learning_curve_reads_a_sparse_log():
    columns = history()
    figure = plot_learning_curve(columns, finetune=4)
    axes = panels(figure)
    assert len(axes) == 7
    expected = 10.0 ** (-np.arange(6) / 2)
    for label in ("training loss", "validation AE"):
        np.testing.assert_allclose(line(axes[0], label).get_xdata(), np.arange(6))
        np.testing.assert_allclose(line(axes[0], label).get_ydata(), expected)
    assert "best 0.00316 at epoch 5" in texts(axes[0].get_legend())
    assert [ax.get_title() for ax in axes[1:]] == [
        "reconstruction", "orthogonality", "energy", "off-diagonal", "spectral match", "schedule",
    ]  # fmt: skip
    np.testing.assert_allclose(axes[3].lines[0].get_ydata(), expected - 0.02)
    assert axes[0].get_yscale() == axes[1].get_yscale() == "log"
    # Signed: a logarithm would lose the last epochs.
    assert axes[3].get_yscale() == "symlog"
    assert texts(axes[6].get_legend()) == ["λ", "τ"]
    for ax in axes:
        assert any(list(x.get_xdata()) == [4, 4] for x in ax.lines)


def test_learning_curve_averages_steps_and_notes_gaps():
    log = {"epoch": [0, 0, 1], "train/loss": [1.0, 3.0, math.nan], "val/ae": np.array([math.nan] * 3)}
    figure = plot_learning_curve(log)
    axes = panels(figure)
    drawn = line(axes[0], "training loss")
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([0], [2])
    assert drawn.get_marker() == "o"
    assert ["not logged" in [t.get_text() for t in ax.texts] for ax in axes] == [False] + [True] * 6
    figure.draw_without_rendering()


def test_gram_holds_magnitudes_and_distance():
    U, V = (torch.randn(n, r, dtype=torch.complex128) / math.sqrt(n) for n, r in ((20, 6), (12, 4)))
    figure = plot_gram(U, V)
    axes = panels(figure)
    assert len(axes) == 2
    norms = []
    for ax, X, name in zip(axes, (U, V), ("UᴴU", "VᴴV"), strict=True):
        G = X.mH @ X
        np.testing.assert_allclose(
            ax.images[0].get_array(), np.maximum(G.abs().numpy(), ax.images[0].norm.vmin), rtol=1e-9
        )
        distance = float((G - torch.eye(len(G))).norm())
        assert ax.get_title() == f"|{name}|,  ‖{name} − I‖ = {distance:.3g}"
        norms.append(ax.images[0].norm)
    assert norms[0] is norms[1]
    assert norms[0].vmax >= 1 > norms[0].vmin > 0


def test_gram_of_exact_single_and_broken_factors():
    plot_gram(torch.eye(4), torch.ones(4, 1) / 2).draw_without_rendering()
    U = torch.eye(4)
    U[0, 0] = math.nan
    figure = plot_gram(U, torch.eye(4))
    assert panels(figure)[0].get_title().endswith("= n/a")
    assert panels(figure)[1].get_title().endswith("= 0")
    figure.draw_without_rendering()


def test_spectrum_sorts_and_scales():
    true = torch.tensor([[1.0, 4.0, 2.0], [8.0, 0.8, 0.0]])
    predicted = torch.tensor([[2.0, 1.0, 4.0], [8.0, 1.6, 0.0]])
    figure = plot_spectrum(predicted, true, names=[3, "street"])
    left, right = panels(figure)
    first, second = (line(right, label) for label in ("scenario 3  (0)", "street  (0.0995)"))
    np.testing.assert_allclose(first.get_ydata(), 20 * np.log10([1, 0.5, 0.25]))
    np.testing.assert_allclose(second.get_xdata(), [0, -20, -80], atol=1e-6)
    np.testing.assert_allclose(second.get_ydata(), [0, 20 * math.log10(0.2), -80], atol=1e-6)
    # Two lines a scenario: true, then predicted.
    np.testing.assert_allclose(left.lines[2].get_ydata(), second.get_xdata())
    np.testing.assert_allclose(left.lines[3].get_ydata(), second.get_ydata())
    (diagonal,) = [x for x in right.lines if len(x.get_xdata()) == 2]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_spectrum_of_samples_takes_the_median():
    true = [torch.rand(9, 5) + 0.1, torch.rand(7, 4) + 0.1]
    predicted = [2 * t for t in true]
    left, right = panels(plot_spectrum(predicted, true))
    assert texts(right.get_legend()) == ["scenario 1  (1)", "scenario 2  (1)"]
    t = true[1].double().sort(1, descending=True).values
    expected = 20 * np.log10(np.median((t / t[:, :1]).numpy(), 0))
    np.testing.assert_allclose(left.lines[2].get_ydata(), expected, atol=1e-6)
    # The largest predicted value, 6 dB above the true one, is inside the axes.
    assert right.get_ylim()[1] > 6.02


def test_spectrum_with_nan_and_one_value():
    plot_spectrum([1.0], [1.1]).draw_without_rendering()
    figure = plot_spectrum(torch.tensor([math.nan, 1.0]), torch.tensor([2.0, 1.0]))
    assert texts(panels(figure)[1].get_legend()) == ["scenario 1  (n/a)"]
    figure.draw_without_rendering()


def test_pareto_front_label_and_score():
    figure = plot_pareto(points(), baseline=0.52)
    (ax,) = panels(figure)
    front = line(ax, "Pareto front")
    np.testing.assert_allclose(front.get_xdata(), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(front.get_ydata(), [0.60, 0.50, 0.49])
    np.testing.assert_allclose(line(ax, "dominated").get_xdata(), [1.5, 2.5])
    np.testing.assert_allclose(line(ax, "lowest Score, 52").get_xdata(), [2.0])
    assert {t.get_text() for t in ax.texts} == {f"({p['k_len']}, {p['gate_hidden']})" for p in points()}
    assert "truncated SVD, AE 0.52" in texts(ax.get_legend())
    assert any(list(x.get_ydata()) == [0.52, 0.52] for x in ax.lines)


def test_pareto_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    crowd = [
        {
            "k_len": k,
            "gate_hidden": g,
            "macs_m": 1 + 0.03 * k + 0.02 * g,
            "ae": 0.5 + 0.5 / k + 0.1 * rng.random(),
        }
        for k in range(4, 36, 4)
        for g in range(4, 36, 4)
    ]
    figure = plot_pareto(crowd)
    (ax,) = panels(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in ax.texts]
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_pareto_breaks_the_axis_for_a_far_baseline():
    axes = panels(plot_pareto(points(), baseline=0.05))
    assert len(axes) == 2
    assert axes[0].get_ylim()[0] > 0.4
    assert axes[1].get_ylim()[0] < 0.05 < axes[1].get_ylim()[1] < 0.4
    above = panels(plot_pareto(points(), baseline=2.0))
    assert above[0].get_ylim()[0] < 2 < above[0].get_ylim()[1]
    assert above[0].get_title()


def test_pareto_of_one_point_and_nan():
    (ax,) = panels(plot_pareto([*points()[:1], points()[1] | {"ae": math.nan}], baseline=math.nan))
    assert [t.get_text() for t in ax.texts] == ["(8, 8)"]
    with pytest.raises(ValueError, match="points holds no finite"):
        plot_pareto([points()[0] | {"ae": math.nan}])


def test_time_bars_and_their_numbers():
    figure = plot_time({"ours": (10.0, 9.0, 13.0), "eager": 40.0, "slow": 1234.0})
    (ax,) = panels(figure)
    assert [bar.get_width() for bar in ax.patches] == [10, 40, 1234]
    assert [t.get_text() for t in ax.texts] == ["10 µs", "40 µs", "1,234 µs"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ours", "eager", "slow"]
    assert ax.get_xscale() == "log"
    (spread,) = ax.collections
    np.testing.assert_allclose(spread.get_segments()[0], [[9, 0], [13, 0]])
    (ax,) = panels(plot_time({"ours": 10.0, "eager": 40.0, "failed": math.nan}))
    assert ax.get_xscale() == "linear"
    assert ax.texts[2].get_text() == "n/a"


@pytest.mark.parametrize("count", [1, 4, 6])
def test_gate_beside_the_spectrum(count):
    inputs = [channel(16, 8, seed=i)[0] for i in range(count)]
    gates = [torch.rand(16, 8) for _ in range(count)]
    figure = plot_gate(
        [{"scenario": i, "input": H, "gate": g} for i, (H, g) in enumerate(zip(inputs, gates, strict=True))]
    )
    titled = [ax for ax in panels(figure) if ax.get_title()]
    assert [ax.get_title() for ax in titled] == [f"scenario {i}" for i in range(count)]
    drawn = images(figure)
    assert len(drawn) == 2 * count
    F = np.abs(np.fft.fft2(inputs[0].numpy().astype(complex)))
    expected = np.maximum(20 * np.log10(np.roll(F / F.max(), (8, 4), (0, 1))), -50)
    np.testing.assert_allclose(drawn[0], expected, atol=1e-6)
    rolled = [np.roll(g.double().numpy(), (8, 4), (0, 1)) for g in gates]
    assert all(any(np.array_equal(image, g) for image in drawn) for g in rolled)


def test_statistics_panels_and_medians():
    data = stats()
    del data["scenario 2"]["alignment"]
    data["scenario 1"] |= {
        "note": ["text"],
        "cube": torch.zeros(2, 2, 2),
        "turn": torch.zeros(3, dtype=torch.complex64),
    }
    figure = plot_statistics(data)
    axes = panels(figure)
    titles = [ax.get_title() for ax in axes]
    assert titles[:2] == ["cumulative energy", "condition number"]
    assert "own number" in titles
    assert len(titles) == 4
    np.testing.assert_allclose(
        axes[0].lines[1].get_ydata(), data["scenario 2"]["cumulative_energy"].double().mean(0), rtol=1e-9
    )
    assert axes[1].get_xscale() == "log"
    own = axes[titles.index("own number")]
    medians = [x.get_xdata()[0] for x in own.lines if x.get_color() == "black"]
    np.testing.assert_allclose(medians, [np.median(d["own_number"]) for d in data.values()], rtol=1e-6)
    assert texts(figure.legends[0]) == ["scenario 1", "scenario 2"]


def test_statistics_of_single_constant_and_broken_values():
    figure = plot_statistics(
        {
            "a": {
                "x": 3.0,
                "same": torch.ones(20),
                "bad": torch.tensor([math.nan, math.inf]),
                "curve": [[1.0]],
            },
            "b": {"x": [1.0, 2.0], "condition_number": [math.inf, 1e10, 0.0]},
        }
    )
    by_title = {ax.get_title(): ax for ax in panels(figure)}
    assert [t.get_text() for t in by_title["bad"].texts] == ["no finite value"]
    assert list(by_title["x"].lines[0].get_xdata()) == [3.0]
    assert list(by_title["condition number"].lines[0].get_xdata()) == [1e10]
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plot_channels([]), "samples is empty"),
        (lambda: plot_channels([{"scenario": 1}]), r"samples\[0\] has no input, label, estimate"),
        (
            lambda: plot_channels([sample() | {"estimate": torch.ones(2, 2)}]),
            r"samples\[0\].estimate has shape",
        ),
        (
            lambda: plot_channels([sample() | {"input": torch.ones(2, 2, 2)}]),
            r"samples\[0\].input must have shape",
        ),
        (lambda: plot_channels([sample() | {"input": torch.ones(0, 4)}]), r"samples\[0\].input is empty"),
        (lambda: plot_cumulative_energy({}), "curves is empty"),
        (lambda: plot_cumulative_energy({"x": []}), r"curves\['x'\] is empty"),
        (lambda: plot_learning_curve({}), "history is empty"),
        (lambda: plot_learning_curve({"epoch": [], "train/loss": []}), "history has no epoch"),
        (lambda: plot_learning_curve({"epoch": [0], "lr": [1.0]}), "history has no finite value"),
        (
            lambda: plot_learning_curve({"epoch": [0], "val/ae": [1.0, 2.0]}),
            r"history\['val/ae'\] has 2 rows",
        ),
        (lambda: plot_learning_curve({"epoch": [0], "val/ae": ["x"]}), r"history\['val/ae'\] holds 'x'"),
        (lambda: plot_gram(torch.ones(0, 2), torch.eye(2)), "U is empty"),
        (lambda: plot_gram(torch.eye(2), torch.ones(1, 2, 2)), r"V must have shape \(N, r\)"),
        (lambda: plot_spectrum([], []), "predicted is empty"),
        (lambda: plot_spectrum(torch.ones(2, 3), torch.ones(1, 3)), "predicted has 2 scenarios, true 1"),
        (lambda: plot_spectrum(torch.ones(3), torch.ones(4)), r"predicted\[0\] has shape"),
        (lambda: plot_spectrum(torch.ones(3), torch.ones(3), names=[]), "names has 0 entries for 1"),
        (lambda: plot_pareto([]), "points is empty"),
        (lambda: plot_pareto([{"k_len": 1, "ae": 0.1}]), r"points\[0\] has no gate_hidden, macs_m"),
        (lambda: plot_time({}), "times is empty"),
        (lambda: plot_time({"x": (1.0, 2.0)}), r"times\['x'\] must be a median or"),
        (lambda: plot_time({"x": -1.0}), r"times\['x'\] must be positive"),
        (lambda: plot_time({"x": (1.0, 2.0, 3.0)}), r"times\['x'\]: the median 1 is outside"),
        (lambda: plot_gate([]), "gates is empty"),
        (
            lambda: plot_gate([{"scenario": 1, "input": torch.ones(2, 2), "gate": torch.ones(3, 2)}]),
            r"gates\[0\].gate has shape",
        ),
        (lambda: plot_statistics({}), "stats is empty"),
        (lambda: plot_statistics({"a": {"text": "x"}}), "stats holds no real statistic"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match=r"samples\[0\] must be a mapping"):
        plot_channels([torch.eye(2)])
    with pytest.raises(TypeError, match=r"times\['x'\] must be real"):
        plot_time({"x": 1j})
    with pytest.raises(TypeError, match="stats must be a mapping"):
        plot_statistics([1])


@pytest.mark.parametrize("name", CALLS)
def test_saved_file_is_whole_and_legible(name, tmp_path):
    figure = CALLS[name]()
    assert isinstance(figure, Figure)
    path = save_figure(figure, tmp_path / f"{name}.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert 600 <= int.from_bytes(data[16:20], "big") <= 2000
    assert os.listdir(tmp_path) == [path.name]


def test_suffix_names_the_format(tmp_path):
    figure = CALLS["time"]()
    assert save_figure(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in save_figure(figure, tmp_path / "a.svg").read_bytes()
    assert save_figure(figure, tmp_path / "plain").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no format of matplotlib"):
        save_figure(figure, tmp_path / "a.docx")
    assert sorted(os.listdir(tmp_path)) == ["a.pdf", "a.svg", "plain"]


def test_failed_or_refused_write_leaves_the_old_file(tmp_path, monkeypatch):
    figure, path = CALLS["time"](), tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        save_figure(figure, path, overwrite=False)

    def half(target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]
    monkeypatch.undo()
    save_figure(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_threads_draw_the_same_bytes(tmp_path):
    names = ["gram", "time", "spectrum"] * 2
    alone = {name: save_figure(CALLS[name](), tmp_path / f"{name}.png").read_bytes() for name in set(names)}

    def draw(job):
        i, name = job
        return name, save_figure(CALLS[name](), tmp_path / f"{i}.png").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        for name, data in pool.map(draw, enumerate(names)):
            assert data == alone[name]


def test_names_are_plain_text():
    # Read as mathematics, the first is an unknown command.
    names = {r"$\price$": 1.0, "$a": 2.0, "100%_fast": 3.0}
    (ax,) = panels(plot_time(names))
    assert [t.get_text().replace(r"\$", "$") for t in ax.get_yticklabels()] == list(names)
    ax.figure.draw_without_rendering()


def test_no_global_state_is_touched():
    import matplotlib

    before = dict(matplotlib.rcParams)
    for call in CALLS.values():
        call()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_imports_without_matplotlib_and_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
import torch
from lomacs_fast import plots as p
one = torch.eye(4)
calls = [
    lambda: p.plot_channels([{"scenario": 1, "input": one, "label": one, "estimate": one}]),
    lambda: p.plot_cumulative_energy({"a": one}),
    lambda: p.plot_gate([{"scenario": 1, "input": one, "gate": one}]),
    lambda: p.plot_gram(one, one),
    lambda: p.plot_learning_curve({"epoch": [0], "lam": [0.1]}),
    lambda: p.plot_pareto([{"k_len": 1, "gate_hidden": 1, "macs_m": 1.0, "ae": 1.0}], baseline=0.1),
    lambda: p.plot_spectrum(one, one),
    lambda: p.plot_statistics({"a": {"b": [1.0]}}),
    lambda: p.plot_time({"a": 1.0}),
]
for call in calls:
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["figures need matplotlib: pip install 'lomacs_fast[plots]'"] * 9


def test_column_dictionary():
    shares = {"blocks.0": [[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]], "blocks.2": [[1.0]]}
    figure = plots.plot_column_dictionary(shares)
    first, second = figure.axes[:2]
    curves = [line.get_ydata() for line in first.get_lines()]
    np.testing.assert_allclose(curves, [[1 / 3, 2 / 3, 1], [0.6, 0.9, 1], [0.6, 0.8, 1]])
    assert first.get_title() == "blocks.0, k_len 3"
    assert len(second.get_lines()) == 2
    with pytest.raises(ValueError, match="shares is empty"):
        plots.plot_column_dictionary({})
    with pytest.raises(ValueError, match="shares"):
        plots.plot_column_dictionary({"blocks.0": [0.5, 0.5]})


def test_the_knob_is_a_line_of_steps_among_points():
    rows = [
        {
            "name": f"{k} steps",
            "steps": k,
            "ae": 0.2 / (k + 1),
            "true_macs_m": 1.0 + k,
            "microseconds": 9.0 + k,
        }
        for k in (4, 0, 1)
    ]
    rows.append({"name": "svd", "steps": None, "ae": 0.08, "true_macs_m": 11.0, "microseconds": 350.0})
    rows.append({"name": "eigh", "steps": None, "ae": 0.08, "microseconds": 300.0})
    left, right = panels(plots.plot_knob(rows))
    np.testing.assert_allclose(line(left, "refined, by steps").get_xdata(), [1.0, 2.0, 5.0])
    np.testing.assert_allclose(line(right, "refined, by steps").get_ydata(), [0.2, 0.1, 0.04])
    assert [t.get_text() for t in left.texts] == ["0", "1", "4"]
    assert [x.get_label() for x in left.lines] == ["refined, by steps", "svd"]
    assert [x.get_label() for x in right.lines] == ["refined, by steps", "svd", "eigh"]
    rows += [{"name": str(i), "steps": None, "ae": 0.5, "microseconds": 9.0} for i in range(6)]
    own, *others = (x.get_color() for x in panels(plots.plot_knob(rows))[1].lines)
    assert own not in others
    with pytest.raises(ValueError, match="steps"):
        plots.plot_knob([{"name": "a", "ae": 1.0}])
