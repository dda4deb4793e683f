"""From continuous time to steps: of equal length, or between given times.

Steps between given times are a :class:`ocnopt.StagedOCP` whose stage looks its begin t_k and its length h_k up in a
table; on the unit interval sigma = (t - t_k) / h_k a step's dynamics are h_k F, its running cost h_k l.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.integrate.runge_kutta import Stages, combine, stages
from ocnopt.integrate.tableaus import IMPLICIT, get_tableau
from ocnopt.ocp import OCP, FreeHorizon, Lifted, lift
from ocnopt.staged import Index, Stage, StagedOCP, cut
from ocnopt.staged import transcribe as transcribe_equal


def transcribe(problem: OCP, steps: Any, integrator: str = "rk4") -> StagedOCP:
    """Cut a continuous problem into steps, each with one constant control.

    The integrator's stages integrate the running cost along with the state.

    Args:
        problem: the continuous problem; a free T becomes the last static control.
        steps: N equal steps, or the N + 1 times between which they run, from t0 to T (a fixed one).
        integrator: "euler", "midpoint", "rk4", or any tableau of :mod:`ocnopt.integrate.tableaus`; for stiff dynamics,
            on equal steps, an implicit one: "implicit_euler", "implicit_midpoint", "radau2".

    Returns:
        The discrete problem; for equal steps its ``origin`` is the lifted continuous one.

    Raises:
        ProblemError: steps < 1, times that do not run from t0 to T, or an unknown integrator.

    Example:
        >>> problem = OCP(lambda t, x, u: u, terminal_cost=lambda t, x: t + (x**2).sum(-1), initial_state=[1.0],
        ...     control_dim=1, horizon=1.0)
        >>> transcribe(problem, [0.0, 0.1, 0.4, 1.0]).steps
        3
    """
    if not isinstance(steps, Tensor | np.ndarray | Sequence) or isinstance(steps, str) or np.ndim(steps) == 0:
        return transcribe_equal(problem, steps, integrator)
    if isinstance(problem.horizon, FreeHorizon):
        raise ProblemError("steps are given as times, but the end time is free; expected a whole number of steps")
    if integrator in IMPLICIT:
        raise ProblemError(
            f"steps are given as times, and the integrator {integrator!r} is implicit; expected an explicit one, or a "
            "whole number of steps"
        )
    nodes = _read_times(problem, steps)
    lifted = lift(problem)
    grid = _Grid(lifted, get_tableau(integrator), nodes)
    along = problem.path_constraint and (lambda k, x, u, p: lifted.path_constraint(grid.nodes[k], x, u, p))
    stage = Stage(grid.dynamics, problem.running_cost and grid.cost, problem.control_dim, parts=grid.parts)
    return cut(problem, lifted, stage, nodes, along)


class _Grid:
    """The steps between given times as functions of their number k."""

    def __init__(self, lifted: Lifted, tableau: Any, nodes: Tensor) -> None:
        self.lifted, self.tableau, self.nodes, self.lengths = lifted, tableau, nodes, nodes.diff()

    def _stages(self, k: Index, x: Tensor, u: Tensor, p: Tensor) -> tuple[Stages, list[Tensor], Tensor]:
        """What the method sees on the unit interval, the times there, and h_k."""
        t, h = self.nodes[k], self.lengths[k]

        def field(sigma: Any, y: Tensor) -> Tensor:
            return h[..., None] * self.lifted.dynamics(t + sigma * h, y, u, p)

        seen = stages(self.tableau, field, 0.0, 1.0, x)
        return seen, [t + sigma * h for sigma in seen.times], h

    def dynamics(self, k: Index, x: Tensor, u: Tensor, *p: Tensor) -> Tensor:
        """x_{k+1}."""
        seen, _, _ = self._stages(k, x, u, p[0] if p else x.new_zeros(0))
        return combine(x, 1.0, self.tableau.b, seen.slopes)

    def cost(self, k: Index, x: Tensor, u: Tensor, *p: Tensor) -> Tensor:
        """The running cost of a step."""
        own = p[0] if p else x.new_zeros(0)
        seen, times, h = self._stages(k, x, u, own)
        used = [i for i, b in enumerate(self.tableau.b) if b != 0.0]
        costs = [h * self.lifted.running_cost(times[i], seen.points[i], u, own) for i in used]
        return combine(x.new_zeros(x.shape[:-1]), 1.0, [self.tableau.b[i] for i in used], costs)

    def parts(self, k: Index, x: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """What a step calls at each of its stages, called once."""
        return self.lifted.dynamics(self.nodes[k], x, u, p), self.lifted.running_cost(self.nodes[k], x, u, p)


def _read_times(problem: OCP, value: Any) -> Tensor:
    """The times of the nodes, from t0 to t1 without a way back."""
    nodes = checks.float_tensor("steps", value, problem.dtype, problem.device)
    ends = problem.initial_state.new_tensor([problem.horizon.t0, problem.horizon.t1])  # type: ignore[union-attr]
    if nodes.ndim != 1 or len(nodes) < 2:
        raise ProblemError(f"steps has shape {checks.shape(nodes)}; expected a whole number, or a row of N + 1 times")
    onwards = bool((nodes.diff() * (ends[1] - ends[0]) > 0).all())
    if not onwards or not torch.allclose(nodes[[0, -1]], ends, rtol=1e-12, atol=1e-12):
        raise ProblemError(
            f"steps are times from {float(nodes[0]):.6g} to {float(nodes[-1]):.6g}"
            f"{'' if onwards else ', not one after the other'}; expected them to run from {float(ends[0]):.6g} to "
            f"{float(ends[1]):.6g}, each later than the one before"
        )
    return nodes
