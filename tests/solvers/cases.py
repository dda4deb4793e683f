"""Problems that several tests of solvers use, and what it means to have converged."""

import torch

from ocnopt.ocp import OCP, FreeHorizon


def swing(initial_state=(2.0, 0.0), **options):
    """A pendulum that wants to be upright, short and coarse."""
    settings = {"horizon": 1.5, "control_dim": 1} | options
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1),
        lambda t, x, u: 1 - torch.cos(x[..., 0]) + 0.1 * x[..., 1] ** 2 + 0.1 * u[..., 0] ** 2,
        lambda t, x: 5 * (1 - torch.cos(x[..., 0])) + x[..., 1] ** 2,
        initial_state=initial_state,
        **settings,
    )


def assert_converged(solution):
    assert bool(solution.converged.all()), solution.status
    assert float(solution.constraint_violation.max()) == 0.0


def pushed(running_cost, terminal_cost=None, initial_state=(1.0,), **options):
    """x' = u for one unit of time: what it costs is the whole problem."""
    settings = {"control_dim": 1, "horizon": 1.0} | options
    return OCP(lambda t, x, u: u, running_cost, terminal_cost, initial_state=initial_state, **settings)


def scalar_lqr(**options):
    return pushed(lambda t, x, u: (x**2 + u**2).sum(-1), **options)


def free_end(**options):
    """A free end time and a parameter in the dynamics and in the cost."""
    return OCP(
        lambda t, x, u, p: torch.sin(x) * p + u,
        lambda t, x, u, p: 1 + (x**2).sum(-1) + (u**2).sum(-1) + (p**2).sum(-1),
        lambda t, x, p: 20 * (x**2).sum(-1),
        initial_state=[1.5],
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.2, 3.0),
        parameters=[0.5],
        **options,
    )


def regulator(**options):
    settings = {"initial_state": [1.0, 0.0], "control_dim": 1, "horizon": 1.0} | options
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (x**2).sum(-1) + (u**2).sum(-1),
        **settings,
    )


def pendulum(initial_state=(0.0, 0.0), **options):
    """Hanging at zero: at rest there, zero controls are a stationary point."""
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0] - torch.sin(x[..., 0])], dim=-1),
        lambda t, x, u: 0.01 * (u**2).sum(-1),
        lambda t, x: 1 + torch.cos(x[..., 0]),
        initial_state=initial_state,
        control_dim=1,
        horizon=2.0,
        **options,
    )
