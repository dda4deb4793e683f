"""One picture of solutions: which panels, which lines, which numbers behind them."""

import numpy as np
import pytest
import torch

import ocnopt as oc
from ocnopt.solvers.plotting import plot_solutions


def lines(axis):
    return [line.get_ydata() for line in axis.lines]


@pytest.fixture(scope="module")
def solution():
    return oc.solve(oc.problems.control("mimo_lqr_two_masses").build(), steps=8)


def test_a_panel_for_each_state_control_and_gain(solution):
    axes = solution.plot().axes
    labels = ["x0", "x1", "x2", "x3", "u0", "u1", "gains on u0", "gains on u1", "distance from final cost"]
    assert [axis.get_ylabel() for axis in axes] == labels
    assert np.array_equal(lines(axes[2])[0], solution.states[:, 2].numpy())
    for i in (0, 1):
        held = torch.cat([solution.controls[:, i], solution.controls[-1:, i]]).numpy()
        assert np.array_equal(lines(axes[4 + i])[0], held)
        assert np.array_equal(axes[4 + i].lines[0].get_xdata(), solution.times.numpy())
        assert [gain[3] for gain in lines(axes[6 + i])] == solution.gains.K[3, i].tolist()
    cost = solution.history["cost"]
    gaps = (cost - cost[-1]).abs() / max(1.0, abs(float(cost[-1])))
    assert np.allclose(lines(axes[8])[0], torch.where(gaps > 0, gaps, torch.nan).numpy(), equal_nan=True)


def test_solvers_lie_on_top_of_each_other(solution):
    figure = plot_solutions({"ddp": solution, "again": solution}, states=list("abcd"), controls=["e", "f"], time="s")
    assert [axis.get_ylabel() for axis in figure.axes[:7]] == ["a", "b", "c", "d", "e", "f", "gains on e, ddp"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddp", "again"]
    assert len(figure.axes[0].lines) == 2
    assert figure.axes[0].get_xlabel() == "s"


def test_bounds_are_dotted():
    figure = oc.solve(oc.problems.control("pendulum_swing_up_u5").build(), steps=10, max_iterations=1).plot()
    assert [line[0] for line in lines(figure.axes[2])[1:]] == [-5.0, 5.0]


def test_a_batch():
    problem = oc.problems.control("scalar_lqr").build(initial_state=[[1.0], [2.0], [3.0]])
    figure = oc.solve(problem, steps=5).plot()
    assert [line[0] for line in lines(figure.axes[0])] == [1.0, 2.0, 3.0]


def test_many_states_share_a_panel_and_no_control_has_none(tmp_path):
    problem = oc.OCP(
        lambda t, x, u, p: x * 0 - p,
        terminal_cost=lambda t, x, p: (x**2).sum(-1),
        initial_state=torch.linspace(1, 2, 9, dtype=torch.float64),
        parameters=[0.5],
        horizon=1.0,
    )
    figure = oc.solve(problem, steps=4).plot(tmp_path / "picture.png")
    assert [axis.get_ylabel() for axis in figure.axes] == ["x0 to x8", "distance from final cost"]
    assert len(figure.axes[0].lines) == 9
    assert (tmp_path / "picture.png").stat().st_size > 1000
