"""A table of small problems that between them have every feature a derivative pass must handle."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.differential.differentiate import Expansion, differentiate
from ocnopt.modules import from_module
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from tests.differential.dense import Dense, Oracle


class Case(NamedTuple):
    """A problem and the controls at which it is differentiated."""

    problem: OCP
    controls: Tensor | None = None


class Field(nn.Module):
    """A small network that joins t to the state along the feature axis, as most Neural ODEs do."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n + 1, width), nn.Tanh(), nn.Linear(width, n)).to(torch.float64)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(x.shape[0], 1)], dim=1))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(), dtype=torch.float64)


def pendulum(t, x, u, p):
    return torch.stack(
        [x[..., 1], -p[..., 0] * torch.sin(x[..., 0]) - p[..., 1] * x[..., 1] + torch.cos(2 * t)], dim=-1
    )


def parameters_only() -> Case:
    return Case(OCP(pendulum, None, lambda t, x, p: x[..., 0] ** 2 + torch.cos(x[..., 1]), initial_state=[1.0, -0.3],
                    parameters=[2.0, 0.3], horizon=0.8))  # fmt: skip


def parameters_in_every_cost() -> Case:
    def running(t, x, u, p):
        return torch.exp(-t) * p[..., 0] * (x**2).sum(-1) + p[..., 1] ** 3

    def terminal(t, x, p):
        return x[..., 0] ** 2 * p[..., 1] + p[..., 0] ** 2

    return Case(
        OCP(pendulum, running, terminal, initial_state=[1.0, -0.3], parameters=[2.0, 0.3], horizon=Horizon(0.5, 1.2))
    )


def batch_with_targets() -> Case:
    x0 = _randn(2, 3, 2)
    targets = x0.roll(1, 0)
    return Case(OCP(pendulum, None, lambda t, x, p: ((x - targets) ** 2).sum(-1), initial_state=x0,
                    parameters=[2.0, 0.3], horizon=0.8))  # fmt: skip


def terminal_cost_reads_parameters() -> Case:
    def terminal(t, x, p):
        return p[..., 0] * (x**2).sum(-1) + p[..., 1] ** 2 * x[..., 0]

    return Case(OCP(pendulum, None, terminal, initial_state=_randn(3, 2), parameters=[2.0, 0.3], horizon=1.0))


def free_horizon() -> Case:
    def terminal(t, x, p):
        return (x**2).sum(-1) * (1 + p[..., 1]) + 0.5 * t**2

    return Case(OCP(pendulum, lambda t, x, u, p: t * x[..., 0] ** 2 * p[..., 0], terminal, initial_state=_randn(3, 2),
                    parameters=[2.0, 0.3], horizon=FreeHorizon(0.9, 0.5, 2.0, t0=0.2)))  # fmt: skip


def free_horizon_without_running_cost() -> Case:
    return Case(OCP(pendulum, None, lambda t, x, p: (x**2).sum(-1) + t**3, initial_state=_randn(3, 2),
                    parameters=[2.0, 0.3], horizon=FreeHorizon(0.8, 0.5, 2.0)))  # fmt: skip


def only_the_horizon() -> Case:
    def dynamics(t, x, u):
        return torch.stack([torch.sin(x[..., 1]) + t, -(x[..., 0] ** 2)], dim=-1)

    return Case(OCP(dynamics, lambda t, x, u: (x**2).sum(-1), lambda t, x: t * x[..., 0] ** 2,
                    initial_state=_randn(3, 2), horizon=FreeHorizon(0.8, 0.5, 2.0)))  # fmt: skip


def controlled(t, x, u, p):
    return torch.stack(
        [x[..., 1] * p[..., 1], -torch.sin(x[..., 0]) + p[..., 0] * u[..., 0] + u[..., 1] ** 2 * x[..., 0]], dim=-1
    )


def staged_controls() -> Case:
    def running(t, x, u, p):
        return (x**2).sum(-1) * (1 + t) + p[..., 0] * (u**2).sum(-1) + u[..., 0] * x[..., 1]

    problem = OCP(controlled, running, lambda t, x, p: x[..., 0] ** 2 * p[..., 1], initial_state=_randn(2, 2),
                  control_dim=2, parameters=[0.7, 1.1], horizon=FreeHorizon(0.9, 0.5, 2.0))  # fmt: skip
    return Case(problem, _randn(2, 3, 2))


def staged_controls_shared_no_running_cost() -> Case:
    problem = OCP(controlled, None, lambda t, x, p: (x**4).sum(-1), initial_state=_randn(2, 2), control_dim=2,
                  parameters=[0.7, 1.1], horizon=0.9)  # fmt: skip
    return Case(problem, _randn(3, 2))


def staged_controls_only() -> Case:
    problem = OCP(lambda t, x, u: torch.sin(x) + u, lambda t, x, u: x[..., 0] ** 4 + torch.cosh(u[..., 0]),
                  lambda t, x: x[..., 0] ** 2, initial_state=[0.4], control_dim=1, horizon=1.0)  # fmt: skip
    return Case(problem, _randn(4, 1))


def parameters_as_one_vector_in_a_batch() -> Case:
    def dynamics(t, x, u, p):
        return torch.tanh(x @ p.reshape(2, 2)) * torch.cos(t)[..., None]

    def running(t, x, u, p):
        return (x**2).sum(-1) * p[0]

    return Case(OCP(dynamics, running, lambda t, x, p: (x**3).sum(-1) * p[1], initial_state=_randn(3, 2),
                    parameters=_randn(4), horizon=FreeHorizon(1.0, 0.5, 2.0)))  # fmt: skip


def one_vector_and_a_plain_terminal_cost() -> Case:
    return Case(OCP(lambda t, x, u, p: torch.tanh(x @ p.reshape(2, 2)), None, lambda t, x, p: (x**4).sum(-1),
                    initial_state=_randn(3, 2), parameters=_randn(4), horizon=1.0))  # fmt: skip


def autograd_inside() -> Case:
    def energy(x, p):
        return (torch.tanh(x @ p.reshape(2, 2)) ** 2).sum(-1) + 0.1 * (x**4).sum(-1)

    def dynamics(t, x, u, p):
        tracked = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(point, p).sum(), point, create_graph=tracked)
        return torch.stack([slope[..., 1], -slope[..., 0]], dim=-1)

    return Case(
        OCP(
            dynamics,
            None,
            lambda t, x, p: x[..., 0] ** 3,
            initial_state=_randn(3, 2),
            parameters=_randn(4),
            horizon=0.8,
        )
    )


def network() -> Case:
    torch.manual_seed(2)
    x0 = _randn(4, 2)
    problem = from_module(Field(2, 3), lambda t, x: ((x - x0) ** 4).sum(-1), initial_state=x0, horizon=1.0,
                          running_cost=lambda t, x, u, p: 1e-1 * (p**2).sum(-1) * x[..., 0])  # fmt: skip
    return Case(problem)


def no_dependence() -> Case:
    """Nothing in the cost moves: every derivative that could be a missing graph is a zero."""
    return Case(OCP(lambda t, x, u, p: torch.ones_like(x), None, lambda t, x, p: x[..., 0], initial_state=_randn(2, 1),
                    parameters=[1.0, 2.0], horizon=1.0))  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        parameters_only,
        parameters_in_every_cost,
        batch_with_targets,
        terminal_cost_reads_parameters,
        free_horizon,
        free_horizon_without_running_cost,
        only_the_horizon,
        staged_controls,
        staged_controls_shared_no_running_cost,
        staged_controls_only,
        parameters_as_one_vector_in_a_batch,
        one_vector_and_a_plain_terminal_cost,
        network,
        no_dependence,
    )
}


@functools.cache
def case(name: str) -> Case:
    """A case, made once."""
    return CASES[name]()


@functools.cache
def expansion(name: str, curvature: str) -> Expansion:
    """Its derivatives: by matrices to 1e-7, by columns to the default."""
    problem, controls = case(name)
    options = {} if curvature == "gauss_newton" and problem.running_cost is None else {"rtol": 1e-7, "atol": 1e-7}
    return differentiate(problem, controls=controls, curvature=curvature, **options)


@functools.cache
def oracle(name: str, curvature: str, k: int = 0) -> Dense:
    """Its dense derivatives at the start of control step k."""
    return Oracle(*case(name)).dense(k, exact=curvature == "exact")
