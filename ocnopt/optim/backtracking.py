r"""Gradient descent whose step length is found by backtracking: a loop for all samples at once, and an optimiser.

With the gradient g at p, a step goes to p+ = p - s g/L and is taken where the quadratic model of curvature L bounds the
loss,  J(p+) <= J(p) + <g, d> + L/2 <d, d/s>,  d = p+ - p;  else L is doubled. After a step that is taken L shrinks. The
scales s, one for each parameter tensor, are 1 unless their units differ; the code keeps the rates s/L. A parameter that
its module projects when it is read (the simplex of :class:`ocnopt.neural.runge_kutta_net.RungeKuttaNet`) is stepped and
projected as in the forward-backward method, since d is measured behind the projection.

Source: Benning et al., arXiv 1904.05657, algorithm 1; Beck and Teboulle, SIAM J. Imaging Sci. 2 (2009).
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.checks import check_count
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.descent import POSITIVE, Descent, calls_backward, check_finite, found_gradients, loss_of, needed

GROW, SHRINK, SHORTEST = 2.0, 0.9, 1e-20


class Backtracking(Descent):
    """Gradient descent with backtracking, drop-in where the loss comes as a closure.

    A step takes the gradient of the loss once, and its value a little more than once. The loss of the batch of a step
    never rises.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser; rates that differ between groups
            are scales, and keep their ratio.
        lr: s/L of the first trial. Every step leaves there where the next one starts.

    Raises:
        ProblemError: an option is out of range.

    Source: Benning et al., arXiv 1904.05657, algorithm 1.

    >>> x = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> optimizer = Backtracking([x], lr=8.0)
    >>> loss = optimizer.step(lambda: 0.5 * (x**2).sum())  # refused at 8, 4 and 2, taken at 1
    >>> x.tolist(), optimizer.param_groups[0]["lr"]
    ([0.0, 0.0], 1.1...)
    """

    expected: ClassVar = {"lr": POSITIVE}

    def __init__(self, params: ParamsT, lr: float | Any = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Go down the gradient as far as the loss can be bounded; stay where no step lowers it.

        Args:
            closure: computes the loss and returns it: always the same for the same parameters, and without backward.

        Returns:
            The loss before the step.

        Raises:
            ProblemError: there is no closure, it calls backward, returns no number or one without a gradient.
            NonFiniteError: the loss before the step, or a gradient, is NaN or infinite; nothing was changed.
        """
        closure = needed(closure, "computes the loss: optimizer.step(lambda: loss(model(x)))")
        self.zero_grad()
        with torch.enable_grad():
            loss = loss_of(closure)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ProblemError(
                    "the loss has no gradient; expected one that depends on a parameter with requires_grad=True: "
                    "compute it in torch, and without detach() or no_grad()"
                )
            _check_first(loss)
            try:
                loss.backward()
            except RuntimeError as error:
                raise (calls_backward() if "second time" in str(error) else error) from error
        found = found_gradients(self)
        check_finite(found)
        gradients = [(p, g, moved.group["lr"]) for moved in found for p, g in zip(*moved[1:3], strict=True)]
        _, factor = _search(gradients, float(loss), lambda: torch.as_tensor(loss_of(closure)))
        for group in self.param_groups:
            group["lr"] *= factor
        return loss.detach()


class Course(NamedTuple):
    """The loss before each iteration and after the last, and 1/L at the end."""

    losses: list[float]
    step: float


def descend(
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    iterations: int,
    *,
    step: float = 1.0,
    scales: Sequence[float] | None = None,
    on_step: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Course:
    """Lower a loss by gradient descent with backtracking.

    Args:
        parameters: what is changed, in place.
        loss: the loss of all samples, a number with a graph; the same function at every call.
        iterations: steps to take; fewer where no step lowers the loss any more.
        step: 1/L of the first trial.
        scales: s > 0 of each parameter, the square of the size of change that matters in it; 1 if None.
        on_step: called after each step with its number, from 1, and the loss there.

    Raises:
        ProblemError: iterations, step or scales out of range, or nothing to change.
        NonFiniteError: the first loss is NaN or infinite.

    >>> x = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> losses, step = descend([x], lambda: 0.5 * (x**2).sum(), 1, step=8.0)
    >>> losses, step, x.tolist()
    ([5.0, 0.0], 1.1..., [0.0, 0.0])
    """
    check_count("iterations", iterations, 10_000)
    if not 0 < step < inf:
        raise ProblemError(f"step is {step!r}; expected a positive number, 1/L of the first trial")
    given = [*parameters]
    scales = [1.0] * len(given) if scales is None else scales
    if len(scales) != len(given) or not all(0 < s < inf for s in scales):
        raise ProblemError(f"scales are {scales}; expected {len(given)} positive numbers, one for each parameter")
    if not any(p.requires_grad for p in given):
        raise ProblemError("no parameter requires gradients; expected one at least: call requires_grad_(True) on them")
    moved = [(p, s) for p, s in zip(given, scales, strict=True) if p.requires_grad]
    value = loss()
    _check_first(value)
    losses = [float(value.detach())]
    for iteration in range(1, iterations + 1):
        slopes = torch.autograd.grad(value, [p for p, _ in moved])
        following, factor = _search(
            [(p, g, s * step) for (p, s), g in zip(moved, slopes, strict=True)], losses[-1], loss
        )
        if following is None:
            break
        value, step = following, step * factor
        losses.append(float(value.detach()))
        on_step(iteration, losses[-1])
    return Course(losses, step)


def _search(
    slopes: Sequence[tuple[Tensor, Tensor, float]], value: float, loss: Callable[[], Tensor]
) -> tuple[Tensor | None, float]:
    """The first trial that the model bounds, and the factor on the rates for the next step.

    Slopes are parameters with gradients and rates s/L; nothing moved where there is no such trial.
    """
    start, factor = [p.detach().clone() for p, _, _ in slopes], 1.0
    try:
        while factor * max((rate for _, _, rate in slopes), default=0.0) >= SHORTEST:
            _put(slopes, [p0 - g * (factor * rate) for p0, (_, g, rate) in zip(start, slopes, strict=True)])
            trial = loss()
            d = [p.detach() - p0 for p0, (p, _, _) in zip(start, slopes, strict=True)]
            if not any(bool(dp.any()) for dp in d):
                break
            parts = [
                (g * dp).sum() + (dp * dp).sum() / (2 * factor * s) for dp, (_, g, s) in zip(d, slopes, strict=True)
            ]
            if float(trial.detach()) <= min(value, value + float(torch.stack(parts).sum())):
                return trial, factor / SHRINK
            factor /= GROW
    except BaseException:
        _put(slopes, start)
        raise
    _put(slopes, start)
    return None, 1.0


@torch.no_grad()
def _put(slopes: Sequence[tuple[Tensor, Tensor, float]], values: Sequence[Tensor]) -> None:
    for (p, _, _), v in zip(slopes, values, strict=True):
        p.copy_(v)


def _check_first(value: Tensor) -> None:
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"the first loss is {float(value.detach())}; expected a finite number: look at the inputs and the weights"
        )
