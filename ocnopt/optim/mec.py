"""MEC learning: weights as the points of a rigid body that turns in the potential J and in a viscous fluid.

U ``(..., n, p)`` has orthonormal columns, B ``(..., n, n)`` is skew, gamma is the viscosity:

    U' = B U,      B' = (F + P) U^T - U (F + P)^T,      F = -dJ/dU,      P = -gamma B U

so that d/dt (J + |B|^2/4) = -gamma |B U|^2. The viscous part alone is B' = -gamma (B Pi + Pi B) with Pi = U U^T; its
flow over a time h is B <- D B D with D = I - (1 - e^(-gamma h)) Pi, taken exactly. A step is

    B <- D B D + h (F U^T - U F^T);      U <- (I - h B/2)^-1 (I + h B/2) U
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.optim.descent import NOT_NEGATIVE, Descent, evaluated, found_gradients
from ocnopt.optim.manifolds import check_on_manifold, orthonormal, put_onto, rotate


class MEC(Descent):
    """Mechanical learning on matrices with orthonormal columns: second order in time, stable for any viscosity.

    Weights are put onto the manifold when the optimiser gets them, as by :class:`ocnopt.optim.Riemannian`; the state is
    one skew matrix of the size of the longer side of each.

    Args:
        params: matrices ``(..., n, p)``, leading axes are a batch.
        lr: the time step h; forces act on velocities and velocities on weights, so that weights move by h^2 F at first.
        damping: gamma; 0 conserves the energy up to rounding and the error of the step.

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

    expected: ClassVar = {"lr": NOT_NEGATIVE, "damping": NOT_NEGATIVE}

    def __init__(self, params: ParamsT, lr: float | Any, *, damping: float | Any = 1.0) -> None:
        super().__init__(params, {"lr": lr, "damping": damping})

    def _admit(self, group: dict[str, Any], names: list[str]) -> None:
        put_onto(group["params"], names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Turn the weights.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; parameters and state are those before the step.
            ProblemError: a gradient is sparse, or a matrix was moved off its manifold.
        """
        loss = evaluated(closure)
        found = found_gradients(self)
        for moved in found:
            check_on_manifold(moved.parameters, moved.names)
        for group, parameters, gradients, _ in found:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                self._turn(orthonormal(parameter), orthonormal(gradient), self.state[parameter], group)
        return loss

    @staticmethod
    def _turn(U: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        h, slower = group["lr"], 1.0 - math.exp(-group["damping"] * group["lr"])
        B = state["velocity"].to(U) if state else U.new_zeros((*U.shape[:-1], U.shape[-2]))
        UtB = U.mT @ B
        DB = B - slower * U @ UtB
        B = DB - slower * (DB @ U) @ U.mT
        GUt = G @ U.mT
        state["velocity"] = B = B - h * (GUt - GUt.mT)
        U.copy_(rotate(U, h * B))
