"""The Itoh-Abe discrete gradient: descent without gradients, for every step size.

Coordinate after coordinate the equation of a discrete gradient flow of V with step tau = lr,

    s / tau = - (V(x + s e_j) - V(x)) / s,      x <- x + s e_j

is solved for s, so that V falls by exactly s^2 / tau whatever tau and however rough V. On a manifold the lines
x + s e_j become the curves R_U(s W U) of the rotations W = e_i e_j^T - e_j e_i^T, i < j, and V falls by s^2 / tau too.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.checks import check_same_shape
from ocnopt.optim.descent import POSITIVE, Descent, Number, is_constrained, loss_of, names_of, needed
from ocnopt.optim.manifolds import (
    DRIFT,
    MANIFOLDS,
    RETRACTIONS,
    check_on_manifold,
    drifts,
    orthonormal,
    retract,
    tangent,
)
from ocnopt.optim.scalar import Equation, solve

ROUNDING = 8  # units in the last place of V that say nothing


class Curve(NamedTuple):
    """A line or curve through where a parameter stands, and the size of what moves along it."""

    move: Callable[[float], None]
    size: float


class ItohAbe(Descent):
    """Descent by the Itoh-Abe discrete gradient, with a closure instead of gradients.

    A step takes three values of the loss for each trained number if the loss is quadratic, five to ten else: meant for
    small models, and for losses that are rough or have no gradient. The loss should be computed in float64: what falls
    below its rounding errors is not seen.

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser. Those with
            ``requires_grad=False`` are left alone.
        lr: tau, any positive number.
        tolerance: of the scalar equations, relative to the fall of the loss.
        manifold: "euclidean"; "stiefel" or "grassmann" put matrices ``(..., n, p)`` onto the manifold, as
            :class:`ocnopt.optim.Riemannian` does, and keep them there; n (n - 1) / 2 curves for each.
        retraction: "qr", "polar" or "cayley" on a manifold.

    Raises:
        ProblemError: an option is out of range, or a parameter on a manifold is no matrix of full rank.

    Source: Itoh, Abe, "Hamiltonian-conserving discrete canonical equations based on variational difference quotients"
    (1988); Celledoni, Eidnes, Owren, Ringholm, "Dissipative numerical schemes on Riemannian manifolds with applications
    to gradient flows", arXiv 1804.08104.

    >>> x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = ItohAbe([x], lr=2.0)
    >>> loss = optimizer.step(lambda: (x * x / 2).sum())
    >>> print(f"{x.item():.6f}")  # s = -x / (1/2 + 1/tau)
    0.000000
    """

    expected: ClassVar = {
        "lr": POSITIVE,
        "tolerance": Number("a number in [0, 1)", below=1.0),
        "manifold": MANIFOLDS,
        "retraction": RETRACTIONS,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Any,
        *,
        tolerance: float | Any = 1e-10,
        manifold: str = "euclidean",
        retraction: str = "cayley",
    ) -> None:
        options = {"lr": lr, "tolerance": tolerance, "manifold": manifold, "retraction": retraction}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every coordinate once.

        Args:
            closure: computes the loss and returns it: always the same for the same parameters, and without backward.

        Returns:
            The loss before the step.

        Raises:
            ProblemError: there is no closure, it returns no number or another one at the same parameters, or it falls
                without bound; an option is out of range, a matrix was moved off its manifold, or the shape of a
                parameter is not that of its state. Parameters and state are those before the step.
            NonFiniteError: the loss before the step is NaN or infinite.
        """
        closure = needed(closure, "computes the loss: optimizer.step(lambda: loss(model(x)))")
        trained = self._trained()
        loss, value, unit = _first(closure)
        start, steps = [p.clone() for _, p in trained], []
        try:
            for group, p in trained:
                value, found = self._sweep(group, p, closure, value, max(unit, torch.finfo(p.dtype).eps))
                steps.append(found)
        except BaseException:
            for (_, p), old in zip(trained, start, strict=True):
                p.copy_(old)
            raise
        for (_, p), found in zip(trained, steps, strict=True):
            self.state[p]["steps"] = p.new_tensor(found)
        return loss

    def _trained(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The parameters that a step moves, with their groups, looked at before anything moves."""
        trained = []
        for group in self.param_groups:
            self._check_group(group)
            items = [item for item in zip(group["params"], names_of(group), strict=True) if item[0].requires_grad]
            if is_constrained(group):
                check_on_manifold([p for p, _ in items], [name for _, name in items])
            for p, name in items:
                if "steps" in self.state.get(p, {}):
                    check_same_shape(name, "steps", self.state[p]["steps"].shape, torch.Size([_count(p, group)]))
                trained.append((group, p))
        if not trained:
            raise ProblemError("no parameter is trained; expected one or more with requires_grad=True: set one free")
        return trained

    def _sweep(
        self, group: dict[str, Any], parameter: Tensor, closure: Callable[[], Any], value: float, unit: float
    ) -> tuple[float, list[float]]:
        """Move along every curve of a parameter; V is known before, and returned after with the steps."""
        before = self.state.get(parameter, {}).get("steps")
        guesses = itertools.repeat(0.0) if before is None else before.tolist()
        steps = []
        for curve, guess in zip(_curves(parameter, group), guesses, strict=before is not None):
            scale = unit ** (1 / 3) * curve.size
            equation = Equation(
                partial(_value, curve.move, closure),
                value,
                group["lr"],
                ROUNDING * unit * abs(value),
                group["tolerance"],
            )
            point = solve(equation, max(abs(guess), scale), scale, unit * curve.size)
            curve.move(point.s)
            value = point.value
            steps.append(point.s)
        return value, steps


def _count(parameter: Tensor, group: dict[str, Any]) -> int:
    """Lines or curves of a parameter."""
    if not is_constrained(group):
        return parameter.numel()
    n = max(parameter.shape[-2:])
    return math.prod(parameter.shape[:-2]) * n * (n - 1) // 2


def _curves(parameter: Tensor, group: dict[str, Any]) -> Iterator[Curve]:
    """The lines or curves of a parameter, each from where the one before it ended."""
    if not is_constrained(group):
        entries = parameter.detach()
        for index in itertools.product(*map(range, entries.shape)):
            yield _line(entries, index)
        return
    U = orthonormal(parameter.detach())
    for batch in itertools.product(*map(range, U.shape[:-2])):
        for i, j in itertools.combinations(range(U.shape[-2]), 2):
            yield _rotation(U[batch], i, j, group)


def _line(entries: Tensor, index: tuple[int, ...]) -> Curve:
    x = entries[index].item()

    def move(s: float) -> None:
        entries[index] = x + s

    return Curve(move, max(1.0, abs(x)))


def _rotation(U: Tensor, i: int, j: int, group: dict[str, Any]) -> Curve:
    start, xi = U.clone(), torch.zeros_like(U)
    xi[i], xi[j] = start[j], -start[i]
    xi = tangent(start, xi, group["manifold"])

    def move(s: float) -> None:
        end = retract(start, s * xi, group["retraction"]) if s else start
        if not drifts([end])[0] <= DRIFT:
            raise torch.linalg.LinAlgError
        U.copy_(end)

    return Curve(move, 1.0)


def _value(move: Callable[[float], None], closure: Callable[[], Any], s: float) -> float:
    try:
        move(s)
    except torch.linalg.LinAlgError:
        return math.inf  # so far out that the retraction cannot be computed
    return _number(closure())


def _first(closure: Callable[[], Any]) -> tuple[Any, float, float]:
    """The loss before the step, the number it is, and its rounding unit.

    It is computed twice: dropout or a new batch would make every difference of two losses meaningless.
    """
    loss = loss_of(closure)
    unit = torch.finfo(loss.dtype if isinstance(loss, Tensor) else torch.float64).eps
    value, again = _number(loss), _number(closure())
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss before the step is {value}; expected a finite number: start elsewhere")
    if not abs(value - again) <= math.sqrt(unit) * abs(value):
        raise ProblemError(
            f"the closure returned {value:.6g} and then {again:.6g} for the same parameters; expected the same loss: "
            "use one batch for a step, and model.eval() if it has dropout"
        )
    return loss, value, unit


def _number(loss: Any) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)
