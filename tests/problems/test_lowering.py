"""Every function of every control problem means the same to CasADi as to torch: values, Jacobians and Hessians."""

import casadi
import numpy as np
import pytest
import torch
from torch.func import hessian, jacrev

from ocnopt.ocp import OCP
from ocnopt.problems import control, names
from ocnopt.solvers.lowering import tracing
from ocnopt.solvers.lowering.lowering import lower, scattered

F64 = torch.float64


def functions():
    """(name of problem and function, function of z = (x, u), size of z)."""
    for name in names("control"):
        problem = control(name).build()
        n = problem.state_dim
        t = torch.tensor(0.5, dtype=F64)
        if isinstance(problem, OCP):
            along = {key: getattr(problem, key) for key in ("dynamics", "running_cost", "path_constraint")}
            at_end = {key: getattr(problem, key) for key in ("terminal_cost", "terminal_constraint")}
            m = problem.control_dim
        else:
            stage = problem.groups[0].stage
            along, at_end, t, m = {"dynamics": stage.dynamics, "cost": stage.cost}, {}, 3, stage.control_dim
            yield f"{name}.terminal_cost", problem.terminal_cost, n
        for key, function in along.items():
            if function is not None:
                yield f"{name}.{key}", lambda z, f=function, n=n, t=t: f(t, z[:n], z[n:]), n + m
        for key, function in at_end.items():
            if function is not None:
                yield f"{name}.{key}", lambda z, f=function, t=t: f(t, z) + 0 * z[0], n


@pytest.mark.parametrize(("name", "function", "size"), [pytest.param(*case, id=case[0]) for case in functions()])
def test_a_lowered_function_agrees_with_torch(name, function, size, monkeypatch):
    monkeypatch.setattr(tracing, "_export", None)  # the quick way is enough for each
    generator = torch.Generator().manual_seed(1)
    points = [torch.randn(size, generator=generator, dtype=F64) for _ in range(3)]
    if name.startswith("goddard_rocket"):  # near the ground: below it the air grows denser without bound
        points = [torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64)[:size] + 1e-3 * point for point in points]
    lowered = lower(function, scattered([points[0]]), name).function()
    z = casadi.MX.sym("z", size)
    y = lowered(z)
    weights = torch.linspace(0.5, 1.5, y.shape[0], dtype=F64)
    second, _ = casadi.hessian(casadi.dot(casadi.DM(weights.numpy()), y), z)
    ours = casadi.Function("ours", [z], [y, casadi.jacobian(y, z), second])

    def flat(point):
        return function(point).reshape(-1)

    for point in points:
        theirs = flat(point), jacrev(flat)(point), hessian(lambda v: flat(v) @ weights)(point)
        for got, expected in zip(ours(point.numpy()), theirs, strict=True):
            got = torch.from_numpy(np.array(casadi.densify(got).full())).reshape(expected.shape)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
