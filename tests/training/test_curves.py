"""Every picture is written, with labelled axes; numbers behind the curves are right."""

import numpy as np
import pytest
import torch
from PIL import Image

from ocnopt.cli.control import draw
from ocnopt.problems import control
from ocnopt.runs import RunFolder
from ocnopt.solvers.plotting import COLOURS
from ocnopt.solvers.solve import solve
from ocnopt.training import adjoint_errors, curves, memory_depth
from ocnopt.training.metrics import last_loss, reaches, smooth


@pytest.fixture(scope="module")
def solution():
    return solve(control("mimo_lqr_two_masses").build(), "ddp", steps=8)


def lines(count, T=1.0):
    return [
        {
            "iteration": i + 1,
            "epoch": i // 4,
            "loss": 2.0 / (i + 1),
            "T": T,
            "forward": 20,
            "backward": 18,
            "seconds": 0.1 * i,
        }
        | ({"test_accuracy": 0.5} if i % 4 == 3 else {})
        for i in range(count)
    ]


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert pixels.min() < 100, "nothing is drawn"


def test_the_picture_of_a_control_problem(tmp_path, solution):
    record = control("mimo_lqr_two_masses")
    labels = (record.state_labels, record.control_labels)
    (tmp_path / "plots").mkdir()
    image = draw(RunFolder(tmp_path, {}), {"ddp": solution, "again": solution}, *labels, "time (s)", name="x")
    assert image.path == "plots/x.png"
    assert image.caption
    assert_picture(tmp_path / image.path)


def test_pictures_of_training(tmp_path):
    runs = {"Adam": [lines(12), lines(12)], "SNOpt": [lines(12, T=0.9)]}
    many = {"Adam": [lines(12)] * 5}
    folder = RunFolder(tmp_path, {})
    (tmp_path / "plots").mkdir()
    for i, figure in enumerate(
        (
            curves.draw_loss_against_time(runs, 4),
            curves.draw_loss_against_iteration(runs, 1),
            curves.draw_loss_against_iteration(many, 1),
            curves.draw_horizon(runs, {}),
            curves.draw_metric(runs, "test_accuracy"),
            curves.draw_rates({"Adam": {0.01: [1.0, 2.0], 0.1: [1.0, np.inf]}, "SGD": {0.1: [0.5, 0.6]}}),
        )
    ):
        assert_picture(tmp_path / folder.draw(str(i), figure))


def test_a_learning_rate_at_which_a_seed_diverged():
    (axis,) = curves.draw_rates({"Adam": {0.01: [1.0, 3.0], 0.1: [1.0, np.inf]}}).axes
    line, cross = [line for line in axis.lines if line.get_marker() in "ox"]
    assert line.get_ydata()[0] == 2.0
    assert np.isnan(line.get_ydata()[1])
    assert cross.get_xdata().tolist() == [0.1]


def test_the_mean_of_many_seeds():
    runs = {"Adam": [[{**line, "loss": line["loss"] + i} for line in lines(6)] for i in range(5)]}
    (axis,) = curves.draw_loss_against_time(runs, 1).axes
    assert axis.lines[0].get_ydata() == pytest.approx([2.0 / (i + 1) + 2 for i in range(6)])


@pytest.mark.parametrize("count", [8, 4 * 31])
def test_a_metric_of_many_seeds(count):
    (axis,) = curves.draw_metric({"Adam": [lines(count)] * 5}, "test_accuracy").axes
    (line,) = axis.lines
    assert line.get_ydata().tolist() == [50.0] * (count // 4)
    assert line.get_marker() == ("o" if count == 8 else "None")
    assert len(axis.collections) == 1  # the band


def test_the_integration_time_is_drawn_from_its_start():
    (axis,) = curves.draw_horizon({"fixed": [lines(3)], "moved": [lines(3, T=0.5), []]}, {"moved": 2.0}).axes
    fixed, moved, diverged = axis.lines
    assert fixed.get_xydata().tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]
    assert moved.get_xydata().tolist() == [[0, 2], [1, 0.5], [2, 0.5], [3, 0.5]]
    assert not len(diverged.get_xdata())


def test_whole_numbers_have_whole_ticks():
    runs = {"Adam": [lines(4)]}
    above, below = curves.draw_loss_against_iteration(runs, 1).axes
    (epochs,), (horizons,) = curves.draw_metric(runs, "test_accuracy").axes, curves.draw_horizon(runs, {}).axes
    for axis in (above.xaxis, below.xaxis, below.yaxis, epochs.xaxis, horizons.xaxis):
        assert all(float(tick).is_integer() for tick in axis.get_ticklocs())
    assert 1.0 in epochs.xaxis.get_ticklocs()  # the only epoch


@pytest.mark.parametrize(("lowest", "ticks"), [(0.1, [0.1, 0.2, 0.5, 1, 2]), (1e-5, [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1])])
def test_ticks_of_losses_do_not_crowd(lowest, ticks):
    fallen = [*lines(4), {**lines(5)[-1], "loss": lowest}]
    (axis,) = curves.draw_loss_against_time({"Adam": [fallen]}, 1).axes
    low, high = axis.get_ylim()
    assert [tick for tick in axis.get_yticks() if low <= tick <= high] == pytest.approx(ticks)


def test_as_many_colours_as_a_picture_has_lines():
    assert len(set(COLOURS)) == len(COLOURS) >= len(memory_depth.WAYS) > len(adjoint_errors.LABELS)


def test_a_mean_over_a_window():
    values = torch.rand(20, dtype=torch.float64).tolist()
    smoothed = smooth(values, 5)
    assert np.isnan(smoothed[:4]).all()
    assert smoothed[4:] == pytest.approx([np.mean(values[i - 4 : i + 1]) for i in range(4, 20)])
    assert smooth([1.0], 3).tolist() == pytest.approx([np.nan], nan_ok=True)


def test_when_a_loss_is_reached():
    metrics = lines(10)
    assert last_loss(metrics, 2) == pytest.approx((2 / 9 + 2 / 10) / 2)
    assert reaches(metrics, 1.5, 2) == (2, pytest.approx(0.1))
    assert reaches(metrics, 0.0, 2) is None
    # a falling run meets its own end at its end, to the last digit
    assert reaches(metrics, last_loss(metrics, 3), 3)[0] == 10
