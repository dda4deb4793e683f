"""Gradient descent with momentum that keeps the structure of damped motion.

A heavy ball in a potential with friction contracts volumes of (position x, velocity v) at a constant rate. Methods that
do so too, by the factor mu per parameter and step, dissipate at the rate of the motion that they follow, whatever the
loss. With eps = lr and mu = momentum:

    conformal      v <- mu v - eps g(x);      x <- x + v
    Nesterov       y = x + mu v;              v <- mu v - eps g(y);             x <- x + v
    relativistic   y = x + sqrt(mu) v / sqrt(1 + mu delta |v|^2);               w = sqrt(mu) v - eps g(y)
                   x <- alpha y + (1 - alpha) x + w / sqrt(1 + delta |w|^2);    v <- sqrt(mu) w

Where a gradient belongs to y, the parameters hold y between steps: y = x + c v with a number c in the state.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.optim.descent import FRACTION, NOT_NEGATIVE, GradientDescent, Moved, state_of


class Conformal(GradientDescent):
    """Conformal symplectic momentum, or Nesterov's.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser.
        lr: eps.
        momentum: mu.
        nesterov: whether the gradient is that at y. Nesterov's method is not conformal: its contraction depends on the
            loss.

    Raises:
        ProblemError: an option is out of range.

    Source: França, Sulam, Robinson, Vidal, "Conformal symplectic and relativistic optimization", arXiv 1903.04100.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = Conformal([x], lr=0.1, momentum=0.5)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     (x * x / 2).sum().backward()
    ...     optimizer.step()
    >>> print(f"{x.item():.3f}")  # v = -0.1, then v = -0.05 - 0.09
    0.760
    """

    expected: ClassVar = {"lr": NOT_NEGATIVE, "momentum": FRACTION, "nesterov": bool}

    def __init__(
        self, params: ParamsT, lr: float | Any, *, momentum: float | Any = 0.9, nesterov: bool | Any = False
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    def _move(self, moved: Moved) -> None:
        group, parameters, gradients, _ = moved
        mu = group["momentum"]
        v = state_of(self, "velocity", parameters)
        back = [self.state[parameter].get("ahead", 0.0) for parameter in parameters]
        if any(back):
            torch._foreach_sub_(parameters, torch._foreach_mul(v, back))
        torch._foreach_mul_(v, mu)
        torch._foreach_add_(v, gradients, alpha=-group["lr"])
        ahead = mu if group["nesterov"] else 0.0
        torch._foreach_add_(parameters, v, alpha=1.0 + ahead)
        for parameter in parameters:
            self.state[parameter]["ahead"] = ahead


class Relativistic(GradientDescent):
    """Relativistic gradient descent: no step is longer than 1/sqrt(delta), however steep the loss.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser. |v| is the norm over all
            parameters of a group that have gradients.
        lr: eps.
        momentum: mu.
        delta: (2 times) the inverse square of the speed of light; 0 for the classical kinetic energy.
        alpha: 1 for the conformal symplectic method, 0 with delta=0 for Nesterov's.

    Raises:
        ProblemError: an option is out of range.

    Source: França, Sulam, Robinson, Vidal, "Conformal symplectic and relativistic optimization", arXiv 1903.04100.

    >>> x = torch.tensor([1e6], requires_grad=True)
    >>> optimizer = Relativistic([x], lr=1.0, momentum=0.0, delta=4.0)
    >>> x.square().sum().backward()
    >>> optimizer.step()
    >>> print(f"{1e6 - x.item():.3f}")  # a gradient of 2e6, a step of 1/sqrt(delta)
    0.500
    """

    expected: ClassVar = {"lr": NOT_NEGATIVE, "momentum": FRACTION, "delta": NOT_NEGATIVE, "alpha": FRACTION}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        momentum: float | Any = 0.9,
        delta: float | Any = 1.0,
        alpha: float | Any = 1.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "alpha": alpha})

    def _move(self, moved: Moved) -> None:
        group, parameters, gradients, _ = moved
        root, delta = group["momentum"] ** 0.5, group["delta"]
        v = state_of(self, "velocity", parameters)
        if group["alpha"] < 1.0:
            back = [torch.as_tensor(self.state[p].get("ahead", 0.0)).to(p) for p in parameters]
            torch._foreach_addcmul_(parameters, v, back, value=group["alpha"] - 1.0)
        torch._foreach_mul_(v, root)
        torch._foreach_add_(v, gradients, alpha=-group["lr"])
        torch._foreach_add_(parameters, torch._foreach_mul(v, _slowdown(v, delta)))
        torch._foreach_mul_(v, root)
        ahead = root * _slowdown(v, group["momentum"] * delta)
        for parameter in parameters:
            self.state[parameter]["ahead"] = ahead.to(parameter)
        torch._foreach_add_(parameters, torch._foreach_mul(v, ahead))


def _slowdown(v: list[Tensor], delta: float) -> Tensor:
    """1/sqrt(1 + delta |v|^2)."""
    size = delta**0.5 * torch.stack([norm.to(v[0]) for norm in torch._foreach_norm(v)]).norm()
    return 1.0 / torch.hypot(size, torch.ones_like(size))
