r"""A classifier in the plane trained as what it is: an optimal-control problem, by DDP or by scipy.

All points together are the state of one problem, x_k ``(2 B)``; the weights of layer k, and its step size where it is
learned, are the control u_k = (A_k, b_k[, h_k]); the weights of the logistic function are the static control p. The
terminal cost is half the mean squared error. Nothing else bounds the controls unless a running cost
``decay/2 |u_k|^2`` is asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ocnopt.errors import ProblemError
from ocnopt.problems.learning.networks import PlaneClassifier
from ocnopt.problems.learning.plane import half_squared_error
from ocnopt.solvers import Solution
from ocnopt.staged import Stage, StagedOCP


def as_problem(model: PlaneClassifier, inputs: Tensor, targets: Tensor, *, decay: float = 0.0) -> StagedOCP:
    """Write the training of a model as a discrete control problem that starts from the model's own weights.

    Args:
        model: with step="fixed" or "free".
        inputs: points, ``(B, 2)``; B of some tens, since DDP carries a matrix of 2 B rows.
        targets: ``(B,)``, 0 or 1.
        decay: weight of the running cost.

    Raises:
        ProblemError: the step sizes live on a simplex, which ties the layers together.
    """
    _refuse_simplex(model)
    net, count = model.net, len(inputs)
    sizes = [net.width**2, net.width] + [1] * (net.step == "free")

    def dynamics(k: Any, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        weight, bias, *free = u.split(sizes, dim=-1)
        h = free[0][..., None] if free else net.horizon / net.layers
        x_next = net.layer(x.unflatten(-1, (count, net.width)), weight.unflatten(-1, (net.width,) * 2), bias, h)
        return x_next.flatten(-2)

    def cost(k: Any, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return 0.5 * decay * u.square().sum(-1)

    def terminal_cost(x: Tensor, p: Tensor) -> Tensor:
        y = x.unflatten(-1, (count, net.width))
        outputs = torch.sigmoid((y * p[..., None, :-1]).sum(-1) + p[..., -1:])
        return 0.5 * (outputs - targets).square().mean(-1)

    stacks = [net.weight.flatten(1), net.bias, *([net.step_sizes[:, None]] if net.step == "free" else [])]
    return StagedOCP(
        Stage(dynamics, cost if decay else None, control_dim=sum(sizes)),
        terminal_cost,
        initial_state=inputs.flatten(),
        steps=net.layers,
        parameters=parameters_to_vector(model.head.parameters()),
        initial_guess={"controls": torch.cat(stacks, dim=-1).detach()},
        dtype=inputs.dtype,
    )


@torch.no_grad()
def take_solution(model: PlaneClassifier, solution: Solution) -> None:
    """Put a solution's controls and static parameters into the model that the problem was made from, in place.

    Args:
        model: as given to :func:`as_problem`.
        solution: of that problem.
    """
    net, controls = model.net, torch.as_tensor(solution.controls)
    square = net.width**2
    net.weight.copy_(controls[:, :square].unflatten(-1, (net.width,) * 2))
    net.bias.copy_(controls[:, square : square + net.width])
    if net.step == "free":
        net.sizes.copy_(controls[:, -1])
    vector_to_parameters(solution.parameters, model.head.parameters())


def minimise(
    model: PlaneClassifier,
    inputs: Tensor,
    targets: Tensor,
    *,
    method: Any = "L-BFGS-B",
    iterations: int = 200,
    loss: Callable[[Tensor, Tensor], Tensor] = half_squared_error,
) -> Any:
    """Train a model, in place, by scipy's optimisers on the gradient that the network's adjoint gives.

    Args:
        model: with step="fixed" or "free".
        inputs: ``(B, 2)``.
        targets: ``(B,)``.
        method: of ``scipy.optimize.minimize``: "L-BFGS-B", "trust-constr" (a trust region with quasi-Newton updates),
            or another that needs gradients alone.
        iterations: at most.
        loss: ``loss(outputs, targets) -> ()``.

    Returns:
        scipy's result; the model holds its weights.

    Raises:
        ProblemError: the step sizes live on a simplex.
    """
    from scipy.optimize import minimize

    _refuse_simplex(model)
    parameters: list[nn.Parameter] = [*model.parameters()]

    def value_and_gradient(w: Any) -> tuple[float, Any]:
        vector_to_parameters(torch.as_tensor(w, dtype=inputs.dtype), parameters)
        value = loss(model(inputs), targets)
        return float(value.detach()), parameters_to_vector(torch.autograd.grad(value, parameters)).numpy()

    start = parameters_to_vector(parameters).detach().numpy().copy()
    result = minimize(value_and_gradient, start, jac=True, method=method, options={"maxiter": iterations})
    vector_to_parameters(torch.as_tensor(result.x, dtype=inputs.dtype), parameters)
    return result


def _refuse_simplex(model: PlaneClassifier) -> None:
    if model.net.step == "simplex":
        raise ProblemError(
            'the model has step="simplex", which ties the step sizes of all layers together; expected "fixed" or '
            '"free": train it by ocnopt.optim.backtracking.descend or any torch optimiser'
        )
