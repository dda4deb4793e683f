"""Our Neural-ODE engine against torchdiffeq: forward and backward of one solve, stepped in turn.

Time-independent fields, float32, every weight matrix doubled, loss mean(y(1)^2), gradients for the start and the
parameters; dopri5 with tolerances 1e-3, or 20 steps of rk4. The gradient error is relative, against rk4 with 100 steps
in float64.
"""

import copy
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.neural.checks import ADJOINTS
from ocnopt.neural.neural_ode import NeuralODE


class Autonomous(nn.Module):
    """A field that does not look at the time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        return self.net(x)


class Engine(NamedTuple):
    """One way to solve: its name, time over that of torchdiffeq's odeint and odeint_adjoint, gradient error."""

    name: str
    over_backprop: float
    over_adjoint: float
    error: float
    milliseconds: float


class Wanted(NamedTuple):
    """Ratios that the default, "discrete", is to keep, at a gradient error no larger than that of odeint."""

    over_backprop: float
    over_adjoint: float | None = None


ADJOINT, BACKPROP = "odeint_adjoint", "odeint"
STEPS = 20
DEFAULT = "NeuralODE discrete"
# Errors below are those of float32.
ROUNDING = 1e-6
WANTED = {
    ("MLP", "dopri5"): Wanted(0.4, 0.2),
    ("CONV", "dopri5"): Wanted(0.55, 0.35),
    ("MLP", "rk4"): Wanted(0.85, 0.4),
    ("CONV", "rk4"): Wanted(1.0),
}


def limits(ways: list[Engine], wanted: Wanted) -> list[str]:
    """What is wanted of the three figures of the default, and whether it is missed."""
    found = {way.name: way for way in ways}
    came, error = found[DEFAULT], max(found[BACKPROP].error, ROUNDING)
    pairs = ((came.over_backprop, wanted.over_backprop), (came.over_adjoint, wanted.over_adjoint), (came.error, error))
    return ["" if most is None else f"<= {most:.2g}{', missed' * (value > most)}" for value, most in pairs]


def workloads() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name -> field and start."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    with torch.no_grad():
        for parameter in (*mlp.parameters(), *conv.parameters()):
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return {"MLP": (Autonomous(mlp), torch.randn(128, 16)), "CONV": (Autonomous(conv), torch.randn(64, 32, 8, 8))}


def gradients(field: nn.Module, start: Tensor, solve: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients for the start and the parameters."""
    x = start.clone().requires_grad_()
    for parameter in field.parameters():
        parameter.grad = None
    solve(x).square().mean().backward()
    return [x.grad, *(parameter.grad for parameter in field.parameters())]


def solvers(field: nn.Module, method: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> x(0) to x(1)."""
    from torchdiffeq import odeint, odeint_adjoint

    times = torch.tensor([0.0, 1.0])
    if method == "rk4":
        theirs, own = {"options": {"step_size": 1 / STEPS}}, {"steps": STEPS}
    else:
        theirs, own = {"rtol": 1e-3, "atol": 1e-3}, {"rtol": 1e-3, "atol": 1e-3}
    ours = {name: NeuralODE(field, method=method, adjoint=name, **own) for name in ADJOINTS}
    return {
        ADJOINT: lambda x: odeint_adjoint(field, x, times, method=method, **theirs)[-1],
        BACKPROP: lambda x: odeint(field, x, times, method=method, **theirs)[-1],
        **{f"NeuralODE {name}": module for name, module in ours.items()},
    }


def reference(field: nn.Module, start: Tensor) -> list[Tensor]:
    """Gradients in float64."""
    double = copy.deepcopy(field).double()
    return gradients(double, start.double(), NeuralODE(double, method="rk4", steps=100))


def measure(field: nn.Module, start: Tensor, method: str = "dopri5", repeats: int = 15) -> list[Engine]:
    """Ratios of the medians are avoided: every repeat gives a ratio of its own, and their median counts."""
    ways, truth = solvers(field, method), reference(field, start)
    size = torch.sqrt(sum(part.square().sum() for part in truth))
    errors, rounds = {}, []
    for _ in range(repeats + 1):
        spent = {}
        for name, solve in ways.items():
            began = process_time()
            found = gradients(field, start, solve)
            spent[name] = process_time() - began
            errors[name] = float(
                torch.sqrt(sum((a - b).square().sum() for a, b in zip(found, truth, strict=True))) / size
            )
        rounds.append(spent)
    del rounds[0]  # it warms up

    def ratio(name: str, other: str) -> float:
        return median(spent[name] / spent[other] for spent in rounds)

    return [
        Engine(
            name,
            ratio(name, BACKPROP),
            ratio(name, ADJOINT),
            errors[name],
            1e3 * median(spent[name] for spent in rounds),
        )
        for name in ways
    ]
