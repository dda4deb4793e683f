"""Workloads that every version of the package can run, each one function from nothing to (CPU seconds, amount of work).

As a script it runs the ones named on its standard input, one a line, with whatever version of the package it imports.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import ocnopt as oc

_GRAVITY = 9.81


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came out."""
    began = process_time()
    found = work()
    return process_time() - began, found


def quadrotors(batch: int, seed: int = 0) -> oc.OCP:
    """Planar quadrotors of unit mass, arm and inertia 1 / 5, that fly to the origin; state (x, z, angle, rates)."""
    spread = torch.tensor([2.0, 2.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    noise = torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        angle, thrust = x[..., 2], u.sum(-1)
        pushed = [-thrust * torch.sin(angle), thrust * torch.cos(angle) - _GRAVITY, 5 * (u[..., 0] - u[..., 1])]
        return torch.cat([x[..., 3:], torch.stack(pushed, -1)], -1)

    return oc.OCP(
        dynamics,
        lambda t, x, u: 0.05 * (u - _GRAVITY / 2).square().sum(-1) + 0.1 * x[..., :3].square().sum(-1),
        lambda t, x: 10 * x.square().sum(-1),
        initial_state=noise * spread,
        control_dim=2,
        horizon=2.0,
        control_bounds=(0.0, 12.0),
        initial_guess=lambda steps: {"controls": torch.full((steps, 2), _GRAVITY / 2, dtype=torch.float64)},
    )


def torch_kernel(**options: Any) -> oc.solvers.DDP:
    """DDP on tensors; a version with one kernel has no option for it."""
    named = {"kernel": "torch"} if "kernel" in {field.name for field in fields(oc.solvers.DDP)} else {}
    return oc.solvers.DDP(**options, **named)


def solve_quadrotors(batch: int = 256, steps: int = 100, max_iterations: int = 1) -> tuple[float, int]:
    """The work is counted in problems times sweeps."""
    problem, solver = quadrotors(batch), torch_kernel(max_iterations=max_iterations)
    seconds, solution = timed(lambda: oc.solve(problem, solver, steps=steps))
    return seconds, int(solution.iterations.sum())


def solve_pendulum(steps: int = 100) -> tuple[float, int]:
    """One problem, the work counted in sweeps."""
    problem, solver = oc.problems.control("pendulum_swing_up").build(), torch_kernel()
    seconds, solution = timed(lambda: oc.solve(problem, solver, steps=steps))
    return seconds, int(solution.iterations)


class _Field(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


def _perceptron() -> tuple[nn.Module, Tensor]:
    return _Field(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)), 2 * torch.randn(128, 16)


def _convolution() -> tuple[nn.Module, Tensor]:
    """Steep, and with kinks."""
    field = _Field(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    with torch.no_grad():
        for weight in field.parameters():
            weight.mul_(2.0 if weight.ndim > 1 else 1.0)
    return field, torch.randn(64, 32, 8, 8)


def backward_passes(
    adjoint: str, make: Callable[[], tuple[nn.Module, Tensor]] = _perceptron, times: int = 10
) -> tuple[float, int]:
    """Solves forward and backward, dopri5."""
    torch.manual_seed(0)
    field, start = make()
    module = oc.NeuralODE(field, adjoint=adjoint)

    def work() -> None:
        for _ in range(times):
            module(start).square().mean().backward()

    return timed(work)[0], times


@cache
def network(width: int = 4, batch: int = 64) -> oc.OCP:
    """dx/dt = tanh(W x + b), the weights as static parameters."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(width * width + width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    start = torch.randn(batch, width, generator=generator, dtype=torch.float64)

    def dynamics(t: Tensor, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        W = p[..., : width * width].unflatten(-1, (width, width))
        return torch.tanh((W @ x[..., None])[..., 0] + p[..., width * width :])

    return oc.OCP(
        dynamics,
        lambda t, x, u, p: 0.1 * x.square().sum(-1),
        lambda t, x, p: x.square().sum(-1),
        initial_state=start,
        parameters=weights,
        horizon=1.0,
    )


def hessians() -> tuple[float, int]:
    """The dense Hessian with its other blocks."""
    return timed(lambda: oc.differentiate(network(), rtol=1e-6, atol=1e-6))[0], 1


def products(times: int = 5) -> tuple[float, int]:
    """Products with the Hessian."""
    v = torch.ones(network().parameter_dim, dtype=torch.float64)
    return timed(lambda: [oc.hvp(network(), None, v, rtol=1e-6, atol=1e-6) for _ in range(times)])[0], times


CASES: dict[str, Callable[[], tuple[float, int]]] = {
    "quadrotors": solve_quadrotors,
    "pendulum": solve_pendulum,
    "discrete": lambda: backward_passes("discrete"),
    "continuous": lambda: backward_passes("continuous"),
    "continuous, convolution": lambda: backward_passes("continuous", _convolution, times=1),
    "differentiate": hessians,
    "hvp": products,
}

# over another version's time
WANTED = {**dict.fromkeys(CASES, 1.05), "quadrotors": 1 / 3}


def main() -> None:
    """Say where the package lies, then answer names with numbers."""
    torch.set_num_threads(1)
    print(oc.__file__, flush=True)
    for line in sys.stdin:
        print(*CASES[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
