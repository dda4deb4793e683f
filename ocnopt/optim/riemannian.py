"""Gradient descent with momentum on matrices with orthonormal columns (:mod:`ocnopt.optim.manifolds`).

With the tangent projection P_U and a retraction R_U, a step with the gradient G of the loss at U is

    v <- mu P_U(v) - lr P_U(G);      U <- R_U(v)

where v is carried from one tangent space to the next by projection.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.optim.descent import FRACTION, NOT_NEGATIVE, Change, GradientDescent, Moved, is_constrained, state_of
from ocnopt.optim.manifolds import MANIFOLDS, RETRACTIONS, alike, orthonormal, retract, tangent


class Riemannian(GradientDescent):
    """Descent on Stiefel and Grassmann manifolds, for orthogonal layers and subspaces.

    Weights are put onto the manifold when the optimiser gets them: each matrix that is trained is replaced by the
    nearest one with orthonormal columns, or orthonormal rows where it is wider than high.

    Args:
        params: matrices ``(..., n, p)``, leading axes are a batch: the weight of a Linear layer as it is, that of a
            convolution as many small matrices. Biases go into a group of their own with ``manifold="euclidean"``.
        lr: learning rate.
        momentum: mu.
        manifold: "stiefel", "grassmann" (the loss depends on the span of the columns alone: no square matrices, whose
            span is everything) or "euclidean".
        retraction: "qr", "polar" or "cayley".
        maximize: whether to go up.

    Raises:
        ProblemError: an option is out of range, or a parameter is no matrix of full rank.

    >>> u = torch.tensor([[1.0], [1.0]], requires_grad=True)  # minimise x^T A x on the circle
    >>> optimizer = Riemannian([u], lr=0.2)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     (u.mT @ torch.diag(torch.tensor([1.0, 3.0])) @ u).sum().backward()
    ...     optimizer.step()
    >>> print(u.detach().mT.round(decimals=4).abs())
    tensor([[1., 0.]])
    """

    expected: ClassVar = {
        "lr": NOT_NEGATIVE,
        "momentum": FRACTION,
        "manifold": MANIFOLDS,
        "retraction": RETRACTIONS,
        "maximize": bool,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        momentum: float | Any = 0.0,
        manifold: str = "stiefel",
        retraction: str = "qr",
        maximize: bool | Any = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "manifold": manifold, "retraction": retraction, "maximize": maximize}
        super().__init__(params, options)

    def _change(self, moved: Moved) -> Change:
        group, parameters, gradients, _ = moved
        velocities = state_of(self, "velocity", moved)
        values = [*parameters]
        for same in alike(parameters):
            found = _advanced(group, *([tensors[i] for i in same] for tensors in (parameters, gradients, velocities)))
            for i, U, v in zip(same, *found, strict=True):
                values[i], velocities[i] = U, v
        return Change(values, {"velocity": velocities})


def _advanced(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], velocities: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """U and v after a step of parameters of one shape."""
    manifold, turned = group["manifold"], orthonormal if is_constrained(group) else _as_it_is
    U, G, v = (turned(torch.stack(tensors)) for tensors in (parameters, gradients, velocities))
    v = group["momentum"] * tangent(U, v, manifold) - group["lr"] * tangent(U, G, manifold)
    U = retract(U, v, group["retraction"]) if is_constrained(group) else U + v
    return (U, v) if U.shape[1:] == parameters[0].shape else (U.mT, v.mT)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
