"""The "casadi" solver where things go wrong: failed starts, Ctrl-C, several threads."""

import contextlib
import inspect
import math
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ocnopt.ocp import OCP
from ocnopt.solvers.direct import attempts, nlp
from ocnopt.solvers.solve import prepare, solve


def slope(scale=1.0, **options):
    settings = {"initial_state": [1.0, 0.0], "control_dim": 1, "horizon": 1.0} | options
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], scale * torch.sin(x[..., 0]) + u[..., 0]], dim=-1),
        lambda t, x, u: (x**2).sum(-1) + (u**2).sum(-1),
        **settings,
    )


def test_a_problem_without_a_finite_start_has_no_cost():
    problem = OCP(
        lambda t, x, u: u - 30 * torch.sqrt(x),
        terminal_cost=lambda t, x: (x**2).sum(-1),
        initial_state=[[1.0], [1e6]],
        control_dim=1,
        control_bounds=(-1e-3, 1e-3),
        horizon=2.0,
    )
    solution = solve(problem, "casadi", steps=5, restarts=0, initial_guess=torch.zeros(5, 1))
    assert solution.converged.tolist() == [False, True]
    assert not math.isfinite(solution.cost[0])
    assert solution.constraint_violation[0] == math.inf
    assert math.isfinite(solution.cost[1])
    assert solution.constraint_violation[1] < 1e-6


def test_a_solver_that_stopped_early_shows_the_cost_of_where_it_is():
    solution = solve(slope(), "casadi", steps=5, max_iterations=1)
    assert not solution.converged
    assert solution.cost > 0
    assert solution.constraint_violation > 0


class Swallowing:
    """Like CasADi: runs the signal's handler, swallows what it raises, and returns a failed solve."""

    calls = 0

    def __call__(self, **start):
        self.calls += 1
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        column = SimpleNamespace(full=lambda: np.zeros((1, 1)))
        return {"x": column, "f": 0.0, "g": column, "lam_g": column}

    def stats(self):
        return {"success": False, "return_status": "NonIpopt_Exception_Thrown", "iter_count": 0}


class TestControlC:
    program = SimpleNamespace(box=(0, 0), limits=(0, 0))

    @pytest.fixture(autouse=True)
    def listening(self):
        """A shell that starts the tests in the background has them ignore the signal."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_it_is_raised_again(self):
        solver, before = Swallowing(), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            inspect.unwrap(nlp.run_solver)(solver, self.program, np.zeros(1), np.zeros((0, 1)))
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_handler_of_the_users_is_kept(self):
        seen = []
        before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        try:
            with nlp._interruptible():
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)
        assert seen == [1]

    def test_it_starts_no_restarts(self, monkeypatch):
        solver, runs = Swallowing(), []
        run = attempts.run_solver
        monkeypatch.setattr(attempts, "run_solver", lambda *given: (runs.append(1), run(*given), solver())[1])
        solution = solve(slope(), "casadi", steps=3, max_iterations=1)
        assert len(runs) == solver.calls == 1
        assert solution.status.startswith("stopped after 1 iteration: Ctrl-C was pressed")


def in_threads(work):
    """What ``work(0), ..., work(7)`` return or raise, at once."""
    found = {}

    def run(i):
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(8)]


def test_threads_at_once():
    work = lambda i: float(solve(slope(1.0 + i % 4), "casadi", steps=4).cost)  # noqa: E731
    assert in_threads(work) == pytest.approx([work(i) for i in range(8)], rel=1e-12)


def test_threads_that_share_a_prepared_problem():
    prepared = prepare(slope(), "casadi", steps=20)
    work = lambda i: float(prepared.solve([1.0 + i, 0.1 * i]).cost)  # noqa: E731
    assert in_threads(work) == pytest.approx([work(i) for i in range(8)], rel=1e-9)
