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

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ocnopt.optim.descent import FRACTION, NOT_NEGATIVE, Change, GradientDescent, Moved, Tensors, state_of
from ocnopt.optim.gradient_checks import sizes


class Conformal(GradientDescent):
    """Conformal symplectic momentum, or Nesterov's.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser.
        lr: eps.
        momentum: mu.
        nesterov: whether the gradient is that at y. Nesterov's method is not conformal: its contraction depends on the
            loss.
        maximize: whether to go up.

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

    expected: ClassVar = {"lr": NOT_NEGATIVE, "momentum": FRACTION, "nesterov": bool, "maximize": bool}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        momentum: float | Any = 0.9,
        nesterov: bool | Any = False,
        maximize: bool | Any = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "maximize": maximize})

    def _change(self, moved: Moved) -> Change:
        group, y, gradients, _ = moved
        mu = group["momentum"]
        v: Tensors = state_of(self, "velocity", moved)
        back = [-float(self.state.get(parameter, {}).get("ahead", 0.0)) for parameter in y]
        old, v = v, torch._foreach_mul(v, mu)
        torch._foreach_add_(v, gradients, alpha=-group["lr"])
        ahead = mu if group["nesterov"] else 0.0
        x = torch._foreach_add(y, v, alpha=1.0 + ahead)
        _back(x, old, back)
        return Change(x, {"velocity": v, "ahead": [ahead] * len(v)})


class Relativistic(GradientDescent):
    """Relativistic gradient descent: no step of x is longer than 1/sqrt(delta), however steep the loss.

    The parameters hold y, which is at most as far again ahead of x.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser. |v| is the norm over all
            parameters of a group that have gradients.
        lr: eps.
        momentum: mu.
        delta: (2 times) the inverse square of the speed of light; 0 for the classical kinetic energy.
        alpha: 1 for the conformal symplectic method, 0 with delta=0 for Nesterov's.
        maximize: whether to go up.

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

    expected: ClassVar = {
        "lr": NOT_NEGATIVE,
        "momentum": FRACTION,
        "delta": NOT_NEGATIVE,
        "alpha": FRACTION,
        "maximize": bool,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        momentum: float | Any = 0.9,
        delta: float | Any = 1.0,
        alpha: float | Any = 1.0,
        maximize: bool | Any = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "delta": delta, "alpha": alpha, "maximize": maximize}
        super().__init__(params, options)

    def _change(self, moved: Moved) -> Change:
        group, parameters, gradients, _ = moved
        root, delta = group["momentum"] ** 0.5, group["delta"]
        v: Tensors = state_of(self, "velocity", moved)
        back = [(group["alpha"] - 1.0) * float(self.state.get(p, {}).get("ahead", 0.0)) for p in parameters]
        old, v = v, torch._foreach_mul(v, root)
        torch._foreach_add_(v, gradients, alpha=-group["lr"])
        x, _ = _slowed(v, delta)
        torch._foreach_add_(x, parameters)
        _back(x, old, back)
        torch._foreach_mul_(v, root)
        steps, factor = _slowed(v, group["momentum"] * delta)
        torch._foreach_add_(x, steps, alpha=root)
        return Change(x, {"velocity": v, "ahead": [root * factor] * len(v)})


def _back(x: Tensors, v: Tensors, factors: Sequence[float]) -> None:
    """Add to each its own multiple of v."""
    if len({*factors}) == 1:
        factor, *_ = factors
        if factor:
            torch._foreach_add_(x, v, alpha=factor)
    else:
        torch._foreach_add_(x, torch._foreach_mul(v, factors))


def _slowed(v: Tensors, delta: float) -> tuple[Tensors, float]:
    """The vectors v / sqrt(1 + delta |v|^2), and the factor; what is too large to be squared is scaled first."""
    norm = float(sizes(v).norm())
    if math.isfinite(norm):
        factor = 1.0 / math.hypot(1.0, delta**0.5 * norm)
        return torch._foreach_mul(v, factor), factor
    largest = max(1.0, float(torch.stack([size.to(v[0]) for size in torch._foreach_norm(v, math.inf)]).amax()))
    units = torch._foreach_div(v, largest)
    norm = float(sizes(units).norm())
    factor = 1.0 / math.hypot(1.0 / largest, delta**0.5 * norm)
    torch._foreach_mul_(units, factor)
    return units, factor / largest
