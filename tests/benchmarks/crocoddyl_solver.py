"""crocoddyl's solvers behind the interface of ours, for problems with one stage and no parameters.

Its models are written in Python, as a user of Python writes them: an ActionModel whose values and derivatives are
CasADi functions, here those of the very step that our own kernels run, its cost's second derivatives exact (those of
the dynamics have no place in it). ``Unicycle`` is crocoddyl's own model in C++ instead.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import casadi
import numpy as np
import torch

import ocnopt as oc
from ocnopt.solvers.lowered.problem import lower_step
from ocnopt.solvers.solution import Guess, Result

INSTALLED = find_spec("crocoddyl") is not None
UNICYCLE_STEP = 0.1


@dataclass(frozen=True)
class Crocoddyl:
    """FDDP, or BoxFDDP where controls are bounded; ``models`` makes the running and the terminal one."""

    models: Callable[[oc.StagedOCP], tuple[Any, Any]]
    tolerance: float = 1e-9
    max_iterations: int = 300

    def prepare(self, problem: oc.StagedOCP, guess: Guess) -> "Prepared":
        """Build the models once."""
        import crocoddyl

        running, terminal = self.models(problem)
        shooting = crocoddyl.ShootingProblem(problem.initial_state.numpy(), [running] * problem.steps, terminal)
        bounded = problem.control_bounds[0] is not None
        solver = (crocoddyl.SolverBoxFDDP if bounded else crocoddyl.SolverFDDP)(shooting)
        solver.th_stop = self.tolerance
        return Prepared(solver, self.max_iterations)

    def solve(self, problem: oc.StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Build and solve."""
        return self.prepare(problem, guess).solve(problem, guess)


@dataclass(frozen=True)
class Prepared:
    """One of crocoddyl's solvers with its problem."""

    solver: Any
    max_iterations: int
    build_time: float = 0.0

    def solve(self, problem: oc.StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve from the same guess as the others."""
        solver, began = self.solver, time.perf_counter()
        controls = list(torch.stack(list(guess.controls)).numpy())
        given = guess.states is not None
        states = list(torch.stack(list(guess.states)).numpy()) if given else solver.problem.rollout(controls)
        converged = solver.solve(states, controls, self.max_iterations, not given)
        wall_time = time.perf_counter() - began
        number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
        return Result(
            states=number(np.array(solver.xs.tolist())),
            controls=number(np.array(solver.us.tolist())),
            parameters=guess.parameters,
            cost=number(solver.cost),
            converged=torch.tensor(bool(converged)),
            iterations=torch.tensor(solver.iter),
            status="converged" if converged else "not converged",
            constraint_violation=number(solver.ffeas),
            wall_time=wall_time,
            build_time=0.0,
            history={},
        )


class _Buffered:
    """A CasADi function that reads and writes arrays of its own."""

    def __init__(self, function: casadi.Function) -> None:
        self.buffer, self.run = function.buffer()  # kept, or its memory goes
        sizes = [[function.size_in(i) for i in range(function.n_in())]]
        sizes += [[function.size_out(i) for i in range(function.n_out())]]
        self.given, self.found = ([np.zeros(size[::-1]).T for size in some] for some in sizes)
        for place, arrays in ((self.buffer.set_arg, self.given), (self.buffer.set_res, self.found)):
            for i, array in enumerate(arrays):
                place(i, memoryview(array.T.reshape(-1)))
        # crocoddyl wants one column, or one row of it, as a vector
        self.results = [array.reshape(-1) if 1 in array.shape else array for array in self.found]

    def __call__(self, *values: np.ndarray) -> Sequence[np.ndarray]:
        for array, value in zip(self.given, values, strict=True):
            array[:, 0] = value
        self.run()
        return self.results


def _functions(problem: oc.StagedOCP) -> list[_Buffered]:
    """Values and derivatives of the step and of the end."""
    n, m = problem.state_dim, problem.groups[0].stage.control_dim
    lowered = lower_step(problem, torch.zeros(m, dtype=torch.float64), problem.start_parameters())
    x, u, none = casadi.SX.sym("x", n), casadi.SX.sym("u", m), casadi.SX(0, 1)
    following, cost = lowered.step(0, x, u, none, none)
    end = lowered.end(x, none, none)
    jacobian = casadi.jacobian(following, casadi.vertcat(x, u))
    hessian, gradient = casadi.hessian(cost, casadi.vertcat(x, u))
    second = [hessian[:n, :n], hessian[:n, n:], hessian[n:, n:]]
    outputs = [
        ([x, u], [following, cost]),
        ([x, u], [jacobian[:, :n], jacobian[:, n:], gradient[:n], gradient[n:], *second]),
        ([x], [end]),
        ([x], list(reversed(casadi.hessian(end, x)))),
    ]
    return [
        _Buffered(casadi.Function(f"f{i}", given, [casadi.densify(value) for value in found]))
        for i, (given, found) in enumerate(outputs)
    ]


def python_models(problem: oc.StagedOCP) -> tuple[Any, Any]:
    """A model in Python, the same at all steps and at the end; the problem's functions must not depend on time."""
    import crocoddyl

    step, slopes, end, end_slopes = _functions(problem)

    class Model(crocoddyl.ActionModelAbstract):
        def __init__(self) -> None:
            super().__init__(crocoddyl.StateVector(problem.state_dim), problem.groups[0].stage.control_dim, 1)
            if problem.control_bounds[0] is not None:
                self.u_lb, self.u_ub = (bound.numpy() for bound in problem.control_bounds[0])

        def calc(self, data: Any, x: np.ndarray, u: np.ndarray | None = None) -> None:
            if u is None:
                data.cost = float(end(x)[0][0])
                data.xnext = x
            else:
                data.xnext, cost = step(x, u)
                data.cost = float(cost[0])

        def calcDiff(self, data: Any, x: np.ndarray, u: np.ndarray | None = None) -> None:
            if u is None:
                data.Lx, data.Lxx = end_slopes(x)
            else:
                data.Fx, data.Fu, data.Lx, data.Lu, data.Lxx, data.Lxu, data.Luu = slopes(x, u)

    return Model(), Model()


def unicycle_models(problem: oc.StagedOCP) -> tuple[Any, Any]:
    """crocoddyl's own, in C++; ``unicycle`` is the same problem."""
    import crocoddyl

    model = crocoddyl.ActionModelUnicycle()
    model.dt = UNICYCLE_STEP
    return model, model


def unicycle(steps: int) -> oc.StagedOCP:
    """What ActionModelUnicycle computes: 50 |x|^2 + |u|^2 / 2 at each step and 50 |x|^2 at the end, Euler steps."""

    def dynamics(k: torch.Tensor, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        speed, heading = u[..., 0], x[..., 2]
        slope = torch.stack([speed * torch.cos(heading), speed * torch.sin(heading), u[..., 1]], -1)
        return x + UNICYCLE_STEP * slope

    return oc.StagedOCP(
        oc.Stage(dynamics, lambda k, x, u: 50 * x.square().sum(-1) + 0.5 * u.square().sum(-1), control_dim=2),
        lambda x: 50 * x.square().sum(-1),
        initial_state=[-1.0, -1.0, 1.0],
        steps=steps,
    )
