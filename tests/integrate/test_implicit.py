"""Implicit steps: stability functions, orders, derivatives, what has no solution; whole solves of stiff problems."""

import math

import pytest
import torch

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.integrate.implicit import implicit_step, is_stiffly_accurate
from ocnopt.integrate.tableaus import IMPLICIT, RADAU2, get_tableau
from ocnopt.ocp import OCP
from ocnopt.solvers.solve import solve
from ocnopt.staged import transcribe

F64 = torch.float64
STABILITY = {
    "implicit_euler": lambda z: 1 / (1 - z),
    "implicit_midpoint": lambda z: (1 + z / 2) / (1 - z / 2),
    "radau2": lambda z: (1 + z / 3) / (1 - 2 * z / 3 + z**2 / 6),
}


@pytest.mark.parametrize("name", IMPLICIT)
@pytest.mark.parametrize("z", [-1e6, -30.0, -1.0, -1e-3, 0.4])
def test_stability_functions(name, z):
    x = torch.tensor([2.0], dtype=F64)
    end, _ = implicit_step(IMPLICIT[name], lambda t, x: z * x, 0.0, 1.0, x)
    torch.testing.assert_close(end, x * STABILITY[name](z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", IMPLICIT)
def test_coefficients_satisfy_the_order_conditions(name):
    tableau = IMPLICIT[name]
    for power in range(tableau.order):
        assert sum(b * c**power for b, c in zip(tableau.b, tableau.c, strict=True)) == pytest.approx(1 / (power + 1))
    for c, row in zip(tableau.c, tableau.a, strict=True):
        assert sum(row) == pytest.approx(c)


@pytest.mark.parametrize("name", IMPLICIT)
def test_orders_on_a_time_dependent_nonlinear_field(name):
    """x' = x cos t has x = exp(sin t); times are tensors with leading axes, as in a transcription."""
    errors = []
    for steps in (20, 40):
        x = torch.ones(2, 1, dtype=F64)
        for k in range(steps):
            t = torch.full((2,), 2.0 * k / steps, dtype=F64)
            x, _ = implicit_step(get_tableau(name), lambda t, x: torch.cos(t)[..., None] * x, t, 2.0 / steps, x)
        errors.append(abs(float(x[0, 0]) - math.exp(math.sin(2.0))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(IMPLICIT[name].order, abs=0.25)


@pytest.mark.parametrize("name", IMPLICIT)
def test_first_and_second_derivatives_in_state_and_control(name):
    x = torch.tensor([[0.7, -0.3], [0.2, 1.1]], dtype=F64, requires_grad=True)
    u = torch.tensor([[0.5], [-0.8]], dtype=F64, requires_grad=True)

    def step(x, u):
        def field(t, y):
            rate = 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0] + u[..., 0] ** 2
            return torch.stack([y[..., 1], rate], dim=-1)

        return implicit_step(IMPLICIT[name], field, 0.0, 0.3, x)[0]

    assert torch.autograd.gradcheck(step, (x, u), atol=1e-7)
    assert torch.autograd.gradgradcheck(step, (x, u), atol=1e-6)


def test_a_step_without_a_solution_is_nan_for_that_state_alone():
    """y = x + h (y^2 + 1) has no real solution for large h x."""
    x = torch.tensor([[0.0], [50.0]], dtype=F64)
    end, _ = implicit_step(IMPLICIT["implicit_euler"], lambda t, y: y**2 + 1, 0.0, 0.1, x)
    assert torch.isfinite(end[0]).all()
    assert torch.isnan(end[1]).all()


def test_radau_ends_at_its_last_stage():
    assert is_stiffly_accurate(RADAU2)
    assert not is_stiffly_accurate(IMPLICIT["implicit_midpoint"])
    end, seen = implicit_step(RADAU2, lambda t, x: -(x**3), 0.0, 0.5, torch.ones(1, dtype=F64))
    assert torch.equal(end, seen.points[-1])


def stiff(batch=()):
    """A fast state (rate 1000) that follows a slow one, which a bounded control moves."""

    def dynamics(t, x, u):
        return torch.stack([u[..., 0] - torch.sin(x[..., 0]), 1000 * (torch.cos(x[..., 0]) - x[..., 1])], dim=-1)

    return OCP(
        dynamics,
        lambda t, x, u: x[..., 0] ** 2 + (x[..., 1] - 0.5) ** 2 + 0.1 * (u**2).sum(-1),
        lambda t, x: 2 * (x[..., 0] - 1) ** 2,
        initial_state=torch.zeros(*batch, 2, dtype=F64) if batch else [0.0, 0.0],
        control_dim=1,
        control_bounds=(-1.0, 1.0),
        horizon=2.0,
    )


@pytest.mark.parametrize("name", ["radau2", "implicit_midpoint"])
def test_stiff_dynamics_by_both_solvers(name):
    ddp, ipopt = (solve(stiff(), solver, steps=10, integrator=name) for solver in ("ddp", "casadi"))
    assert bool(ddp.converged)
    assert "torch kernel" in ddp.status
    torch.testing.assert_close(ddp.cost, ipopt.cost, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ddp.states, ipopt.states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ddp.controls, ipopt.controls, rtol=1e-4, atol=1e-4)


def test_where_an_explicit_method_fails():
    with pytest.raises(NonFiniteError):
        solve(stiff(), steps=40, integrator="rk4", kernel="torch", initial_guess=torch.full((40, 1), 0.1))


def test_a_batch_steps_as_each_does():
    batch, one = (transcribe(stiff(shape), 4, "radau2") for shape in ((3,), ()))
    x, u = torch.randn(3, 2, dtype=F64), torch.randn(3, 1, dtype=F64)
    p = x.new_zeros(3, 0)
    together = batch.advance(batch.groups[0].stage, 1, x, u, p)
    for i in range(3):
        alone = one.advance(one.groups[0].stage, 1, x[i], u[i], p[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


def test_the_lowered_kernel_refuses_implicit_steps():
    with pytest.raises(ProblemError, match="its integrator 'radau2' is implicit"):
        solve(stiff(), steps=4, integrator="radau2", kernel="lowered")


def test_unknown_names_offer_all():
    with pytest.raises(ProblemError, match="implicit_midpoint, radau2"):
        get_tableau("radau")
