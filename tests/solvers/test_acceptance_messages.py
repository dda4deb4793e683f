"""An inventory: kinds of bad input and kinds of solver trouble, each with what it says.

Every refusal has three parts, what came, what was expected and what to do; every trouble has a reason, and advice or
the place. The details of each are tested beside the code that says it.
"""

import math
import re
import signal

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.solution import load_solution
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP
from tests.solvers.cases import free_end, pendulum, pushed, regulator

NAN = math.nan


def squares(t, x, u):
    return (x**2).sum(-1) + (u**2).sum(-1)


def drift(t, x, u):
    return -x + u


def made(dynamics=drift, running_cost=squares, **options):
    return OCP(dynamics, running_cost, **({"initial_state": [1.0], "control_dim": 1, "horizon": 1.0} | options))


BAD_INPUT = {
    "dynamics of another shape": (lambda: made(lambda t, x, u: x.sum(-1)), r"dynamics returned shape \(\); expected"),
    "a list": (lambda: made(lambda t, x, u: [x]), "dynamics returned list; expected a tensor: end with torch.stack"),
    "float32 captured": (lambda: made(lambda t, x, u: x.float()), "dtype torch.float32; expected torch.float64"),
    "arguments that do not fit": (lambda: made(lambda t, x: x), r"expected .* that takes \(t, x, u\)"),
    "rows that mix": (
        lambda: made(lambda t, x, u: x.mean(0) + u, initial_state=[[1.0], [2.0]]),
        "dynamics.* expected",
    ),
    "a branch on a value": (lambda: made(lambda t, x, u: x if x[..., 0] > 0 else u), "branches or loops on the value"),
    "leaving torch": (lambda: made(lambda t, x, u: math.sin(x) + u), r"Python numbers .*use torch.sin\(x\)"),
    "writing into an argument": (lambda: made(lambda t, x, u: x.mul_(1.0)), "writes into its argument x; expected"),
    "not finite at the start": (lambda: made(lambda t, x, u: u / 0.0 / 0.0), "dynamics returned nan at entry"),
    "a cost of another shape": (
        lambda: made(running_cost=lambda t, x, u: torch.cat([x, u], -1)),
        "running_cost returned shape .*expected one number per state",
    ),
    "no function": (lambda: made(running_cost=lambda t, x, u: "1"), "running_cost returned str; expected a tensor"),
    "a constraint without an axis": (
        lambda: made(terminal_constraint=lambda t, x: x.sum(-1)),
        r"terminal_constraint returned shape \(\); expected \(\) and one last axis",
    ),
    "initial state without an axis": (lambda: made(initial_state=1.0), r"initial_state has shape \(\); expected"),
    "initial state NaN": (lambda: made(initial_state=[NAN]), "initial_state holds NaN or infinity .*; expected"),
    "horizon of no length": (lambda: made(horizon=0.0), "is empty or infinite; expected two different finite times"),
    "horizon NaN": (lambda: made(horizon=NAN), "horizon|is empty or infinite"),
    "end times out of order": (lambda: FreeHorizon(1.0, 2.0, 3.0), "is out of order; expected finite end times"),
    "crossed bounds": (lambda: made(control_bounds=(1.0, -1.0)), "control_bounds.*expected"),
    "bounds of another size": (lambda: made(control_bounds=([0.0, 0.0], 1.0)), "control_bounds.*expected"),
    "state bounds of another size": (lambda: made(state_bounds=([0.0, 0.0], 1.0)), r"state_bounds\[0\].*expected"),
    "bounds in time, free end": (
        lambda: solve(made(control_bounds=lambda t: (-1.0, 1.0), horizon=FreeHorizon(1.0, 0.5, 2.0))),
        "a function of time, but the end time is free",
    ),
    "parameters outside their bounds": (
        lambda: made(lambda t, x, u, p: x + p, None, parameters=[5.0], parameter_bounds=(0.0, 1.0)),
        r"parameters\[0\] is 5.0, outside its bounds",
    ),
    "names that are too few": (lambda: made(state_names=("a", "b")), "state_names.*expected"),
    "data that nothing reads": (lambda: prepare(made(data=(torch.ones(1).double(),))), "read by none"),
    "a number of steps": (lambda: solve(made(), steps=0), "steps is 0; expected an integer >= 1"),
    "an integrator": (lambda: solve(made(), integrator="rk5"), r"integrator 'rk5' is unknown; .*did you mean 'rk4'"),
    "a solver": (lambda: solve(made(), "dpp"), "solver 'dpp' is unknown; .*did you mean 'ddp'"),
    "an option": (lambda: solve(made(), kernle="torch"), "has no option 'kernle'; .*did you mean 'kernel'"),
    "a choice": (lambda: solve(made(), "casadi", method="shoot"), "method is 'shoot'; expected 'multiple_sh"),
    "a tolerance": (lambda: solve(made(), tolerance=NAN), "tolerance of DDP is nan; expected tolerance > 0"),
    "an iteration limit": (lambda: solve(made(), max_iterations=0), "max_iterations of DDP is 0; expected"),
    "a time limit": (lambda: solve(made(), time_limit=-1.0), "time_limit of DDP is -1.0; expected"),
    "options beside an object": (lambda: solve(made(), oc.solvers.DDP(), tolerance=1e-6), "beside a solver object"),
    "a guess of another shape": (
        lambda: solve(made(), steps=3, initial_guess=torch.ones(4, 1)),
        r"initial_guess controls has shape \(4, 1\); expected \(..., 3, 1\): one row per step",
    ),
    "a guess that is NaN": (
        lambda: solve(made(), steps=3, initial_guess=torch.full((3, 1), NAN)),
        "initial_guess controls holds NaN or infinity at",
    ),
    "a key of the guess": (lambda: solve(made(), initial_guess={"control": 1}), "the key 'control'; .*did you mean"),
    "an end time that is fixed": (lambda: solve(made(), initial_guess={"horizon": 2.0}), "the problem's end time is"),
    "what a solver cannot": (
        lambda: solve(made(path_constraint=lambda t, x, u: x - 9), "indirect"),
        "has path_constraint; .* use solver='ddp' or 'casadi'",
    ),
    "what cannot be lowered": (
        lambda: solve(made(lambda t, x, u: torch.special.i1(x) + u), kernel="lowered", steps=3),
        "kernel='torch'",
    ),
    "another batch": (lambda: prepare(made(), steps=3).solve([[1.0], [2.0]]), "as the problem was prepared for"),
    "gradients of nothing": (lambda: solve(made(), steps=3, differentiable=True), "need no gradients; expected one"),
    "a name for a problem": (lambda: oc.problems.get("cartpol"), "no problem is called 'cartpol'.*expected one of"),
    "a file that is not there": (lambda: load_solution("/nowhere/one.pt"), "does not exist; expected a file"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_named(kind):
    wrong, message = BAD_INPUT[kind]
    with pytest.raises((oc.ProblemError, oc.DataError), match=message) as caught:
        wrong()
    said = str(caught.value)
    assert "expected" in said or ": " in said


def test_the_inventory_is_long_enough():
    assert len(BAD_INPUT) >= 25
    assert len(TROUBLE) >= 10


def unbounded():
    return pushed(lambda t, x, u: -(x**4).sum(-1) + 1e-3 * (u**2).sum(-1))


def rough():
    return pushed(lambda t, x, u: (u**2).sum(-1) + (x[..., 0] - 1).abs().sqrt())


class Backwards(torch.autograd.Function):
    """The identity, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def uphill():
    return pushed(lambda t, x, u: (u**2).sum(-1), lambda t, x: (Backwards.apply(x) - 3).sum(-1) ** 2)


def explosive(**options):
    given = {"initial_state": [2.0], "horizon": 2.0} | options
    return made(lambda t, x, u: x**3 + u, **given)


def unreachable():
    return regulator(terminal_constraint=lambda t, x: x - 9, control_bounds=(-1.0, 1.0))


def still(steps, **options):
    return {"steps": steps, "kernel": "torch", "initial_guess": torch.zeros(steps, 1)} | options


TROUBLE = {
    "iteration limit": (
        lambda: solve(pendulum([0.1, 0.0], control_names=("torque",)), steps=10, max_iterations=1),
        r"the iteration limit was reached; the gradient is still 8.3e-03, largest in control torque at step 2; raise",
    ),
    "no step descends": (
        lambda: solve(uphill(), **still(5)),
        r"under the largest regularisation; the gradient is still \d.*, largest in control \[0\] at step 0; look for a",
    ),
    "a derivative that is NaN": (
        lambda: solve(rough(), **still(4)),
        "a derivative is NaN or infinite; the last such is at step 3; look for a square root",
    ),
    "a cost without bound": (
        lambda: solve(unbounded(), **still(5, initial_guess=torch.ones(5, 1))),
        "the cost falls without bound; bound the controls",
    ),
    "time limit": (lambda: solve(pendulum([0.1, 0.0]), steps=10, time_limit=1e-9), "the time limit was reached; "),
    "constraints that exclude each other": (
        lambda: solve(unreachable(), steps=10),
        r"cannot be met near this path; terminal_constraint\[1\] at the end is off by",
    ),
    "too few rounds": (
        lambda: solve(regulator(terminal_constraint=lambda t, x: x), steps=5, max_outer=1),
        "max_outer rounds were not enough; terminal_constraint",
    ),
    "one of a batch that cannot begin": (
        lambda: solve(explosive(initial_state=[[0.1], [40.0]]), steps=8),
        "given up: the first path is not finite; pass another initial_guess",
    ),
    "infeasible by IPOPT": (
        lambda: solve(unreachable(), "casadi", steps=5, restarts=0),
        "found no feasible path near the start; check",
    ),
    "iteration limit of IPOPT": (
        lambda: solve(pendulum([0.1, 0.0]), "casadi", steps=10, max_iterations=1, restarts=0),
        "iteration|max_iterations",
    ),
    "iteration limit of shooting": (
        lambda: solve(pendulum([0.1, 0.0]), "shooting", steps=10, max_iterations=1),
        "the gradient is still",
    ),
}


@pytest.mark.filterwarnings("ignore:.*derivative", "ignore:.*stationary")
@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_is_named_and_leaves_numbers(kind):
    troubled, message = TROUBLE[kind]
    solution = troubled()
    said = solution.status if isinstance(solution.status, str) else "; ".join(solution.status)
    assert re.search(message, said), said
    assert not bool(solution.converged.all())
    known = solution.converged if kind == "one of a batch that cannot begin" else torch.ones_like(solution.converged)
    for value in (solution.states, solution.controls, solution.cost):
        assert bool(torch.isfinite(value[known] if value.ndim and known.ndim else value).all())


def test_a_first_path_that_is_not_finite():
    with pytest.raises(oc.NonFiniteError, match=r"dynamics led to (inf|nan) in state component 0 at .*expected finite"):
        solve(explosive(), **still(50))


@pytest.mark.filterwarnings("ignore:.*stationary")
def test_a_stationary_start_is_left_with_a_warning():
    with pytest.warns(UserWarning, match="the start .* is a stationary point: .*Pass initial_guess="):
        assert bool(solve(pendulum(), steps=10).converged)


def test_strict_raises_what_the_status_says():
    with pytest.raises(oc.ConvergenceError, match="the iteration limit was reached; the gradient is still") as caught:
        solve(pendulum([0.1, 0.0]), steps=10, max_iterations=1, strict=True)
    assert bool(torch.isfinite(caught.value.solution.cost))


def test_what_is_left_is_said_of_each_problem_of_a_batch_and_of_parameters():
    batch = solve(pendulum([[0.1, 0.0], [0.2, 0.0]]), steps=10, max_iterations=1)
    assert ["8.3e-03" in batch.status[0], "1.6e-02" in batch.status[1]] == [True, True]
    assert "largest in" not in solve(free_end(), steps=5, max_iterations=1).status


def test_a_terminal_cost_with_an_infinite_derivative_is_named():
    with pytest.warns(UserWarning, match="derivative"):
        problem = pushed(lambda t, x, u: (u**2).sum(-1), lambda t, x: (x[..., 0] - 1).abs().sqrt())
    assert "it is one of the terminal cost" in solve(problem, **still(4)).status


@pytest.mark.parametrize("call", [1, 40, 90, 200])
def test_ctrl_c_at_any_moment_of_a_search_returns_what_there_is(call):
    """At the first sweep, and later on: the constrained search has several inner ones."""
    before, calls = signal.signal(signal.SIGINT, signal.default_int_handler), []
    stage = Stage(lambda k, x, u: x + 0.1 * torch.sin(x) + u, lambda k, x, u: press(x, u), control_dim=1)

    def press(x, u):
        calls.append(1)
        if armed and len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return 0.1 * torch.cosh(u).sum(-1)

    armed = False
    problem = StagedOCP(stage, initial_state=[0.5], steps=8, terminal_constraint=lambda x: x - 1)
    prepared = prepare(problem, kernel="torch")
    try:
        armed, calls[:] = True, []
        solution = prepared.solve()
    finally:
        signal.signal(signal.SIGINT, before)
    assert bool(torch.isfinite(solution.cost))
    assert bool(solution.converged) or "Ctrl-C was pressed" in solution.status
    assert len(calls) < call or not bool(solution.converged)
