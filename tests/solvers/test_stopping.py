"""Ctrl-C and time limits: a solver returns what it has, and what of a batch has not begun says so."""

import signal
import warnings

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP
from ocnopt.solvers import alone
from ocnopt.solvers.compare import compare
from ocnopt.solvers.direct import attempts, nlp
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.mpc import MPC
from ocnopt.solvers.solve import prepare, solve

F64 = torch.float64
SOLVERS = {"ddp": {"kernel": "torch"}, "casadi": {}, "indirect": {}, "shooting": {}}


class Nonlinear:
    """A problem that takes some iterations, and presses Ctrl-C at a chosen call of its dynamics."""

    def __init__(self):
        self.calls, self.press_at = 0, -1

    def dynamics(self, t, x, u):
        self.calls += 1
        if self.calls == self.press_at:
            signal.raise_signal(signal.SIGINT)
        return u + torch.sin(3 * x)

    def problem(self):
        return OCP(
            self.dynamics,
            lambda t, x, u: 0.01 * (u**2).sum(-1),
            lambda t, x: 10 * ((x - 3.0) ** 2).sum(-1),
            initial_state=[0.1],
            control_dim=1,
            horizon=2.0,
        )


@pytest.fixture(autouse=True)
def listening():
    """A shell that starts the tests in the background has them ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pressed_in_ipopt(monkeypatch):
    """Ctrl-C after the third iteration."""
    asked, before = [], nlp.Watch.eval

    def press(watch, given):
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return before(watch, given)

    monkeypatch.setattr(nlp.Watch, "eval", press)
    return asked


def interrupted(solver, share, **options):
    """What is returned where Ctrl-C is pressed after a share of the calls of a whole solve."""
    made = Nonlinear()
    problem = made.problem()
    made.calls = 0
    whole = solve(problem, solver, steps=4, **options)
    made.calls, made.press_at = 0, int(share * made.calls)
    return solve(problem, solver, steps=4, **options), whole


@pytest.mark.parametrize(
    ("method", "share"), [("trust-exact", 0.6), ("trust-constr", 0.75), ("L-BFGS-B", 0.9), ("TNC", 0.6), ("SLSQP", 0.9)]
)
def test_ctrl_c_in_shooting(method, share):
    """The costs of what is returned are those of the first steps of the whole search."""
    solution, whole = interrupted("shooting", share, method=method, max_iterations=8)
    assert not solution.converged
    assert "Ctrl-C was pressed" in solution.status
    assert "start from this solution to go on" in solution.status
    count = int(solution.iterations)
    assert 0 < count < int(whole.iterations)
    assert solution.history["cost"].tolist() == pytest.approx(whole.history["cost"][: count + 1].tolist(), rel=1e-6)
    assert solution.violations == ()


def test_ctrl_c_in_the_rounds_of_indirect():
    solution, _ = interrupted("indirect", 0.9)
    assert not solution.converged
    assert "Ctrl-C was pressed" in solution.status
    assert float(solution.cost) == pytest.approx(float(solve(Nonlinear().problem(), "ddp", steps=4).cost), rel=0.05)


def test_ctrl_c_in_the_start_of_indirect(pressed_in_ipopt):
    """It reaches the solver that looks for the first path."""
    solution = solve(Nonlinear().problem(), "indirect", steps=4, start="casadi")
    assert not solution.converged
    assert len(pressed_in_ipopt) == 3
    assert solution.status.startswith("stopped after 0 Newton steps: Ctrl-C was pressed")


def test_ctrl_c_in_ipopt_leaves_its_last_iterate(pressed_in_ipopt):
    solution = solve(Nonlinear().problem(), "casadi", steps=4)
    assert solution.status.startswith("stopped after 2 iterations: Ctrl-C was pressed")
    assert len(pressed_in_ipopt) == 3
    assert float(solution.cost) == pytest.approx(float(solution.history["cost"][-1]), rel=1e-9)
    assert solve(Nonlinear().problem(), "casadi", steps=4, initial_guess=solution).converged


def test_pressed_twice_in_ipopt_it_raises(monkeypatch):
    def press(watch, given):
        signal.raise_signal(signal.SIGINT)
        return [0.0]

    monkeypatch.setattr(nlp.Watch, "eval", press)
    with pytest.raises(KeyboardInterrupt):
        solve(Nonlinear().problem(), "casadi", steps=4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_time_limit_leaves_a_start_that_can_be_gone_on_from(solver):
    problem = Nonlinear().problem()
    late = solve(problem, solver, steps=4, time_limit=1e-9, **SOLVERS[solver])
    assert not late.converged
    assert late.status.startswith("stopped after 0 ")
    assert "the time limit was reached" in late.status
    assert "raise time_limit, or start from this solution" in late.status
    assert bool(torch.isfinite(late.cost))
    assert solve(problem, solver, steps=4, initial_guess=late).converged


@pytest.mark.parametrize("solver", ["casadi", "indirect", "shooting"])
def test_a_batch_keeps_what_is_done_and_says_what_has_not_begun(solver, monkeypatch):
    """The stopwatch runs out while the second problem is being solved."""
    offsets = torch.tensor([0.0, 0.1, 0.2], dtype=F64)

    def problem():
        return OCP(
            lambda t, x, u: u + torch.sin(x) + offsets[..., None],
            lambda t, x, u: (x**2 + u**2).sum(-1),
            initial_state=[[1.0], [1.1], [1.2]],
            control_dim=1,
            horizon=1.0,
        )

    whole = solve(problem(), solver, steps=3)
    begun: list[int] = []
    monkeypatch.setattr(Stopwatch, "reason", property(lambda self: None if len(begun) < 2 else 7))
    module, name = (attempts, "run_solver") if solver == "casadi" else (alone, "_row_of")
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: (begun.append(1), function(*given))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = solve(problem(), solver, steps=3)
    assert part.converged.tolist() == [True, False, False]
    assert float(part.cost[0]) == pytest.approx(float(whole.cost[0]), rel=1e-9)
    assert part.status[1].startswith("stopped after")
    assert part.status[2] == "not started: the time limit was reached; raise time_limit, or start from this solution"
    assert int(part.iterations[2]) == 0
    assert bool(torch.isfinite(part.cost[2]))
    assert part.controls[2].tolist() == [[0.0]] * 3


@pytest.mark.parametrize("solver", ["casadi", "indirect", "shooting"])
def test_limits_that_are_none_are_refused(solver):
    with pytest.raises(ProblemError, match="time_limit of"):
        solve(Nonlinear().problem(), solver, steps=4, time_limit=0.0)


def test_ctrl_c_ends_a_closed_loop():
    """The solve that notices it returns; the loop has to notice too."""
    made = Nonlinear()
    prepared = prepare(made.problem(), steps=4, kernel="torch")
    made.calls, made.press_at = 0, 40
    loop = MPC(prepared).simulate([0.1], steps=30)
    assert loop.status.startswith("interrupted at t = ")
    assert loop.controls.shape[-2] < 50


def test_ctrl_c_ends_a_comparison():
    made = Nonlinear()
    problem = made.problem()
    made.calls, made.press_at = 0, 40
    table = compare(problem, ("shooting", "casadi"), steps=4)
    assert [row.converged for row in table.rows] == [False, False]
    assert "not started: Ctrl-C was pressed" in table.rows[1].note
