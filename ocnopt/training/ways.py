"""Ways through the solve of a Neural ODE and back, which studies compare: ours by adjoint, and torchdiffeq's two."""

import copy
from collections.abc import Callable, Mapping
from statistics import median
from time import process_time
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.problems import Task
from ocnopt.training.trainer import TrainConfig, Trainer

ODEINT, ODEINT_ADJOINT = "torchdiffeq odeint", "torchdiffeq odeint_adjoint"
DISCRETE, CONTINUOUS, BACKPROP = "discrete", "continuous", "backprop"
Found = TypeVar("Found")


class Foreign(nn.Module):
    """torchdiffeq in the place of a :class:`ocnopt.neural.neural_ode.NeuralODE` over the horizon from 0 to 1.

    Args:
        field: ``field(t, x)``.
        method: of torchdiffeq.
        adjoint: whether by ``odeint_adjoint``.
        steps: equal ones, of a method without error control.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """

    def __init__(
        self, field: nn.Module, method: str, *, adjoint: bool, steps: int | None, rtol: float, atol: float
    ) -> None:
        super().__init__()
        self.field, self.adjoint = field, adjoint
        self.options: dict[str, Any] = {"method": method, "rtol": rtol, "atol": atol}
        if steps is not None:
            self.options["options"] = {"step_size": 1 / steps}

    def forward(self, x: Tensor) -> Tensor:
        """x(0) to x(1), of any shape."""
        return self.solve(self.field, x, [0.0, 1.0])[-1]

    def solve(self, field: Callable[..., Any], x: Any, times: list[float], **options: Any) -> Any:
        """The states at some times, from the first.

        Args:
            field: another one than the module's own, over which ``odeint_adjoint`` may run as well.
            x: state at the first time, a tensor or a tuple.
            times: where.
            options: of ``odeint_adjoint``.
        """
        from torchdiffeq import odeint, odeint_adjoint

        like = x[0] if isinstance(x, tuple) else x
        solver = odeint_adjoint if self.adjoint else odeint
        return solver(field, x, torch.tensor(times, dtype=like.dtype), **self.options, **options)


def by(
    way: str,
    field: nn.Module,
    method: str,
    *,
    steps: int | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    **options: Any,
) -> nn.Module:
    """A layer that solves dx/dt = field(t, x) from 0 to 1 and is differentiated in one of the ways.

    Args:
        way: one of this module's names.
        field: ``field(t, x)``, shared, not copied.
        method: of the solve.
        steps: equal ones.
        rtol: relative tolerance.
        atol: absolute tolerance.
        options: of our layer.
    """
    if way in (ODEINT, ODEINT_ADJOINT):
        return Foreign(field, method, adjoint=way == ODEINT_ADJOINT, steps=steps, rtol=rtol, atol=atol)
    return NeuralODE(field, method=method, adjoint=way, steps=steps, rtol=rtol, atol=atol, **options)


def timed(ways: Mapping[str, Callable[[], Found]], repeats: int) -> dict[str, tuple[Found, float]]:
    """What each way finds, and the median of its CPU time in milliseconds.

    Args:
        ways: name -> work, which are done in turn.
        repeats: that count; one more goes before to warm up, and counts where there are none.
    """
    spent: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Found] = {}
    for _ in range(repeats + 1):
        for way, work in ways.items():
            began = process_time()
            found[way] = work()
            spent[way].append(1e3 * (process_time() - began))
    return {way: (found[way], median(spent[way][1:] or spent[way])) for way in ways}


def parts(model: Any) -> tuple[Any, NeuralODE, Any]:
    """What comes before the one Neural ODE of a chain, itself, and what follows.

    Args:
        model: an ``nn.Sequential``.
    """
    place, ode = next((i, module) for i, module in enumerate(model) if isinstance(module, NeuralODE))
    return model[:place], ode, model[place + 1 :]


def trained(task: Task, *, iterations: int, batch_size: int, seed: int, dtype: torch.dtype) -> Any:
    """The model of a task after some iterations of Adam: a field that has learned something bends more than a new one.

    Args:
        task: with a model.
        iterations: of training.
        batch_size: of training.
        seed: of weights and order.
        dtype: of the weights that come back.
    """
    config = TrainConfig(task.name, "adam", 0.01, iterations=iterations, batch_size=batch_size, seed=seed)
    trainer = Trainer(task, config)
    for _ in range(iterations):
        trainer.step()
    return copy.deepcopy(trainer.model).to(dtype)
