"""What a path breaks, in the user's words."""

import math
import re
from dataclasses import replace

import pytest
import torch

import ocnopt as oc
from ocnopt.errors import ProblemError
from ocnopt.solvers.audit import Violation

F64 = torch.float64
NAMES = {
    "state_names": ("place [m]", "speed [m/s]"),
    "control_names": ("thrust [N]",),
    "constraint_names": ("speed limit", "arrival", "stop"),
}


def problem(**changes):
    """A mass with a speed limit that has to arrive and stop."""
    given = {
        "initial_state": [0.0, 0.0],
        "control_dim": 1,
        "horizon": 2.0,
        "control_bounds": (-2.0, 2.0),
        "path_constraint": lambda t, x, u: x[..., 1:] - 0.8,
        "terminal_constraint": lambda t, x: x - torch.tensor([1.0, 0.0], dtype=F64),
    }
    return oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (u**2).sum(-1),
        **{**given, **NAMES, **changes},
    )


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_what_is_solved_breaks_nothing(solver):
    solution = oc.solve(problem(), solver, steps=10)
    assert bool(solution.converged)
    assert solution.violations == ()


def test_every_kind_is_named_with_its_step_and_time_the_worst_first():
    solution = oc.solve(problem(state_bounds=(-5.0, 0.9)), "casadi", steps=10)
    states, controls = solution.states.clone(), solution.controls.clone()
    controls[3] = 2.5
    states[5, 1] = 1.3
    states[10, 0] = 0.7
    broken = replace(solution, states=states, controls=controls)
    found = {(v.name, v.component, v.step): v for v in broken.violations}
    assert found["control_bounds", "thrust [N]", 3].value == pytest.approx(0.5)
    assert found["control_bounds", "thrust [N]", 3].time == pytest.approx(0.6)
    assert found["path_constraint", "speed limit", 5].value == pytest.approx(0.5)
    assert found["state_bounds", "speed [m/s]", 5].value == pytest.approx(0.4)
    assert found["terminal_constraint", "arrival", 10].value == pytest.approx(0.3)
    assert ("dynamics", "speed [m/s]", 4) in found
    sizes = [v.value for v in broken.violations]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(found)) == len(broken.violations)


def test_numbers_that_are_none_come_first():
    solution = oc.solve(problem(), "casadi", steps=6)
    states = solution.states.clone()
    states[2, 0] = torch.nan
    worst = replace(solution, states=states).violations[0]
    assert math.isnan(worst.value)
    assert "place [m] is no number at step" in str(worst)


def test_problems_of_a_batch_are_told_apart():
    batch = problem(initial_state=torch.zeros(3, 2), constraint_names=None)
    solution = oc.solve(batch, "casadi", steps=6)
    controls = solution.controls.clone()
    controls[1, 2] = -3.0
    (worst, *_) = (v for v in replace(solution, controls=controls).violations if v.name == "control_bounds")
    assert worst == Violation("control_bounds", "thrust [N]", 2, worst.time, pytest.approx(1.0), (1,))
    assert str(worst).endswith("in problem 1")


def test_a_problem_that_cannot_be_met_says_what_is_broken():
    short = problem(horizon=0.5)
    for solver in ("ddp", "casadi"):
        solution = oc.solve(short, solver, steps=6)
        assert not bool(solution.converged)
        assert {v.name for v in solution.violations} & {"terminal_constraint", "path_constraint"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"state_names": ("place",)}, "state_names has 1 names; expected 2"),
        ({"state_names": "xy"}, "state_names is 'xy'; expected a tuple of strings"),
        ({"control_names": ("a", "b")}, "control_names has 2 names; expected 1"),
        ({"state_names": ("a", "a")}, "state_names has 'a' twice"),
        ({"constraint_names": (1, 2, 3)}, r"constraint_names is \(1, 2, 3\)"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message):
    with pytest.raises(ProblemError, match=message):
        problem(**names)


def test_one_name_for_each_entry_of_a_constraint():
    with pytest.raises(ProblemError, match="constraint_names has 2 names; expected 3"):
        problem(constraint_names=("speed limit", "stop"))
    with pytest.raises(ProblemError, match="constraint_names has 3 names; expected 0"):
        problem(path_constraint=None, terminal_constraint=None)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (lambda t, x: x[..., :0], r"returned shape \(0,\); expected at least one entry"),
        (lambda t, x: x[..., 0], r"returned shape \(\); expected \(\) and one last axis: .* or keep it \(x\[..., :1\]"),
    ],
)
def test_a_constraint_has_entries(constraint, message):
    with pytest.raises(ProblemError, match=message):
        problem(terminal_constraint=constraint)


def test_plots_use_the_names():
    figure = oc.solve(problem(), "casadi", steps=6).plot()
    labels = {axis.get_ylabel() for axis in figure.axes}
    assert {"place [m]", "speed [m/s]", "thrust [N]"} <= labels


def test_plots_of_a_closed_loop_use_the_names_too():
    loop = oc.MPC(
        oc.prepare(problem(terminal_constraint=None, constraint_names=("speed limit",)), "casadi", steps=4)
    ).simulate([0.0, 0.1], 1)
    labels = [axis.get_ylabel() for axis in loop.plot().axes]
    assert labels == ["place [m]", "speed [m/s]", "thrust [N]", "solve [ms]"]


def test_what_only_fills_a_smaller_state_up_breaks_no_bound():
    grow = oc.Stage(lambda k, x, u: torch.cat([x + u, x - 0.2 * u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1)
    shrink = oc.Stage(lambda k, x, u: x.sum(-1, keepdim=True) / 2 + u, lambda k, x, u: (u**2).sum(-1), 1)
    end = {"terminal_cost": lambda x: ((x - 2) ** 2).sum(-1), "state_bounds": (0.9, 3.0)}
    solutions = {}
    for solver in ("ddp", "casadi"):
        solutions[solver] = oc.solve(oc.StagedOCP([grow, shrink], initial_state=[1.0], **end), solver)
        assert bool(solutions[solver].converged)
        assert solutions[solver].violations == ()
    assert float(solutions["ddp"].cost) == pytest.approx(float(solutions["casadi"].cost))
    assert float(solutions["ddp"].rollout(torch.ones(1, dtype=F64)).constraint_violation) < 1e-7
    low = replace(solutions["casadi"], states=[*solutions["casadi"].states[:2], torch.tensor([0.5], dtype=F64)])
    assert [(v.component, v.step) for v in low.violations if v.name == "state_bounds"] == [("[0]", 2)]


@pytest.mark.parametrize("solver", ["casadi", "ddp"])
@pytest.mark.parametrize("limit", [0, 1])
def test_the_status_of_a_failed_solve_names_the_constraint(solver, limit):
    """A speed limit that leaves no way to the end: the worst is one of the two, and it is named."""
    problem = oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (u**2).sum(-1),
        initial_state=[0.0, 0.0],
        control_dim=1,
        horizon=1.0,
        path_constraint=(lambda t, x, u: x[..., 1:] - 0.1) if limit else None,
        control_bounds=None if limit else (-1.0, 1.0),
        terminal_constraint=lambda t, x: x - torch.tensor([5.0, 0.0], dtype=torch.float64),
        constraint_names=(*(("speed limit",) if limit else ()), "arrival", "stop"),
        state_names=("place [m]", "speed [m/s]"),
    )
    options = {"restarts": 0, "max_iterations": 8} if solver == "casadi" else {"max_outer": 3}
    status = oc.solve(problem, solver, steps=4, **options).status
    assert re.search(
        r"(path_constraint speed limit at step \d|terminal_constraint (arrival|stop) at the end|"
        r"dynamics (place \[m\]|speed \[m/s\]) at step \d)",
        status,
    )
