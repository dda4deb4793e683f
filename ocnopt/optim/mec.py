"""MEC learning: weights as the points of a rigid body that turns in the potential J and in a viscous fluid.

U ``(..., n, p)`` has orthonormal columns, B ``(..., n, n)`` is skew, gamma is the viscosity:

    U' = B U,      B' = (F + P) U^T - U (F + P)^T,      F = -dJ/dU,      P = -gamma B U

so that d/dt (J + |B|^2/4) = -gamma |B U|^2. The viscous part alone is B' = -gamma (B Pi + Pi B) with Pi = U U^T; its
flow over a time h is B <- D B D with D = I - (1 - e^(-gamma h)) Pi, taken exactly. A step is

    B <- D B D + h (F U^T - U F^T);      U <- (I - h B/2)^-1 (I + h B/2) U

Weights that are not constrained are free particles x in the same fluid: v <- e^(-gamma h) v + h F;  x <- x + h v.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.optim.descent import NOT_NEGATIVE, Change, GradientDescent, Moved, is_constrained, state_of
from ocnopt.optim.manifolds import orthonormal, rotate


class MEC(GradientDescent):
    """Mechanical learning on matrices with orthonormal columns: second order in time, stable for any viscosity.

    Weights are put onto the manifold when the optimiser gets them, as by :class:`ocnopt.optim.Riemannian`; the state is
    one skew matrix of the size of the longer side of each.

    Args:
        params: matrices ``(..., n, p)``, leading axes are a batch.
        lr: the time step h; forces act on velocities and velocities on weights, so that weights move by h^2 F at first.
        damping: gamma; 0 conserves the energy up to rounding and the error of the step.
        manifold: "stiefel", or "euclidean" for a group of biases and the like.
        maximize: whether to go up.

    Raises:
        ProblemError: an option is out of range, or a parameter is no matrix of full rank.

    Source: Fiori, "A theory for learning by weight flow on Stiefel-Grassman manifold", Neural Computation 13 (2001);
    Celledoni, Fiori, "Neural learning by geometric integration of reduced 'rigid-body' equations" (2004).

    >>> u = torch.tensor([[1.0], [1.0]], requires_grad=True)  # minimise x^T A x on the circle
    >>> optimizer = MEC([u], lr=0.2)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (u.mT @ torch.diag(torch.tensor([1.0, 3.0])) @ u).sum().backward()
    ...     optimizer.step()
    >>> print(u.detach().mT.round(decimals=4).abs())
    tensor([[1., 0.]])
    """

    expected: ClassVar = {
        "lr": NOT_NEGATIVE,
        "damping": NOT_NEGATIVE,
        "manifold": ("stiefel", "euclidean"),
        "maximize": bool,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        damping: float | Any = 1.0,
        manifold: str = "stiefel",
        maximize: bool | Any = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "damping": damping, "manifold": manifold, "maximize": maximize})

    def _change(self, moved: Moved) -> Change:
        turns = is_constrained(moved.group)
        velocities = state_of(self, "velocity", moved, _skew_shape if turns else Tensor.size)
        advanced = _turned if turns else _pushed
        items = zip(moved.parameters, moved.gradients, velocities, strict=True)
        values, found = zip(*(advanced(*item, moved.group) for item in items), strict=True)
        return Change(values, {"velocity": found})


def _skew_shape(parameter: Tensor) -> torch.Size:
    longer = max(parameter.shape[-2:])
    return torch.Size((*parameter.shape[:-2], longer, longer))


def _turned(parameter: Tensor, gradient: Tensor, B: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    h, slower = group["lr"], 1.0 - math.exp(-group["damping"] * group["lr"])
    U, G = orthonormal(parameter), orthonormal(gradient)
    DB = B - slower * U @ (U.mT @ B)
    B = DB - slower * (DB @ U) @ U.mT
    GUt = G @ U.mT
    B = B - h * (GUt - GUt.mT)
    U = rotate(U, h * B)
    return (U if U.shape == parameter.shape else U.mT), B


def _pushed(x: Tensor, G: Tensor, v: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    h = group["lr"]
    v = math.exp(-group["damping"] * h) * v - h * G
    return x + h * v, v
