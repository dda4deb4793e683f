r"""Errors of adjoints: the gradient and second derivatives of a small Neural ODE, and what they cost.

With the loss L(x(1)), the field's parameters p and a fixed unit vector v, all relative in the 2-norm:

    gradient    dL/dp, against back-propagation through the very same steps, and against that through a solve at 1e-10
    Hessian     (d2L/dp2) v, likewise
    factors     mean z z^T and mean g g^T of each layer, z its inputs over time, g the gradients at its outputs

The recursive way to the Hessian integrates the costate equation by ``odeint_adjoint`` too, and lets that be
differentiated once more: an adjoint of an adjoint. The factors are gathered in the one backward pass of the gradient.
Source: Liu, Chen, Theodorou, arXiv 2109.14158, Table 1 and Algorithm 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ocnopt.differential.hvp import hvp
from ocnopt.differential.kronecker import Collector
from ocnopt.modules import from_module
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.problems import learning_task
from ocnopt.solvers.plotting import COLOURS, finish, legend, panels
from ocnopt.training.curves import plain_numbers
from ocnopt.training.measurement import Drawn, Line, Lines, Measurement, Sheet, cell, chosen, distinct, middle
from ocnopt.training.ways import (
    BACKPROP,
    CONTINUOUS,
    DISCRETE,
    ODEINT,
    ODEINT_ADJOINT,
    Foreign,
    by,
    parts,
    timed,
    trained,
)

STEPS, TOLERANCE = 10, 1e-3
METHODS: dict[str, dict[str, Any]] = {"rk4": {"steps": STEPS}, "implicit_adams": {"steps": STEPS}, "dopri5": {}}
QUOTED = {"rk4": 7.63e-5, "implicit_adams": 2.11e-3, "dopri5": 3.44e-4}
GRADIENT, HESSIAN, FACTORS = "gradient", "Hessian times v", "Kronecker factors"
RECURSIVE, SINGLE = "recursive", "single"
LABELS = {
    ODEINT: "odeint, back-propagation",
    ODEINT_ADJOINT: "odeint_adjoint",
    RECURSIVE: "odeint_adjoint, recursive",
    DISCRETE: "ours, discrete",
    CONTINUOUS: "ours, continuous",
    SINGLE: "ours, single pass",
}
Ways = dict[str, Callable[[], list[Tensor]]]


@dataclass(frozen=True)
class Case:
    """A field with what lies around it: ``each(x(1))`` are the losses of the samples, from the states x.

    For the single pass ``each`` takes further leading axes too.
    """

    field: nn.Module
    x: Tensor
    each: Callable[[Tensor], Tensor]

    @property
    def p(self) -> list[nn.Parameter]:
        """The parameters."""
        return [*self.field.parameters()]

    @property
    def direction(self) -> Tensor:
        """v."""
        v = torch.randn(sum(w.numel() for w in self.p), generator=torch.Generator().manual_seed(0), dtype=self.x.dtype)
        return v / v.norm()

    def loss(self, end: Tensor) -> Tensor:
        """L, the mean over samples."""
        return self.each(end).mean()

    def gradient(self, layer: nn.Module) -> list[Tensor]:
        """dL/dp."""
        return [*torch.autograd.grad(self.loss(layer(self.x)), self.p)]

    def twice(self, layer: nn.Module) -> list[Tensor]:
        """(d2L/dp2) v by differentiating the gradient."""
        first = torch.autograd.grad(self.loss(layer(self.x)), self.p, create_graph=True)
        return [*torch.autograd.grad(_flat(first) @ self.direction, self.p)]

    def recursive(self, layer: Foreign) -> list[Tensor]:
        """(d2L/dp2) v by the adjoint of the costate equation."""
        end = layer(self.x)
        (costate,) = torch.autograd.grad(self.loss(end), end, create_graph=True)
        back = Backward(self.field)
        none = torch.zeros_like(self.direction)
        *_, total = layer.solve(back, (end, costate, none), [1.0, 0.0], adjoint_params=tuple(self.p))
        return [*torch.autograd.grad(total[-1] @ self.direction, self.p)]

    def single(self, tolerance: float) -> list[Tensor]:
        """(d2L/dp2) v by one solve forward and one backward."""
        problem = from_module(self.field, lambda t, x: self.each(x), initial_state=self.x, horizon=1.0)
        return [hvp(problem, None, self.direction, rtol=tolerance, atol=tolerance)]

    def factors(self, layer: nn.Module) -> list[Tensor]:
        """Both factors of every linear layer of the field."""
        linear: dict[nn.Module, bool] = {
            module: True for module in self.field.modules() if isinstance(module, nn.Linear)
        }
        collector = Collector(linear, linear)
        handles = [*collector.attach(), cast(NeuralODE, layer).observe(collector)]
        self.loss(layer(self.x)).backward()
        samples = collector.take()
        for handle in handles:
            handle.remove()
        for parameter in self.p:
            parameter.grad = None
        seen = [part[0] for module in linear for part in samples[module]]  # of one group each
        return [part.mT @ part / len(part) for part in seen]


class Backward(nn.Module):
    """The costate equation of a field: the state (x, a, dL/dp), of which the last is integrated from zero."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Slopes of all three."""
        x, a, _ = state
        if not torch.is_grad_enabled():  # on its way, not differentiated
            x = x.detach().requires_grad_()
        with torch.enable_grad():
            slope = self.field(t, x)
            in_x, *in_p = torch.autograd.grad(slope, [x, *self.field.parameters()], a, create_graph=True)
            return slope, -in_x, -_flat(in_p)


def trained_case(seed: int, *, quick: bool = False) -> Case:
    """The field of digits_ode after some epochs of training, on test images.

    Args:
        seed: of weights and order.
        quick: a few samples, and one iteration of training.
    """
    task = learning_task("digits_ode").build()
    iterations, batch = (1, 16) if quick else (55, 128)
    before, ode, after = parts(trained(task, iterations=iterations, batch_size=batch, seed=seed, dtype=torch.float64))
    with torch.no_grad():
        x = before(task.test_inputs[:batch].double())
    chosen_class = nn.functional.one_hot(task.test_targets[:batch], 10).double()

    def each(end: Tensor) -> Tensor:
        return -(after(end).log_softmax(-1) * chosen_class).sum(-1)

    return Case(ode.field, x, each)


def measure(seed: int, quick: bool) -> Iterator[Line]:
    """The lines of one seed.

    Args:
        seed: of weights and order.
        quick: see :func:`trained_case`; two steps, and each way is taken once.
    """
    case = trained_case(seed, quick=quick)
    tight = 1e-7 if quick else 1e-10
    exact = by(BACKPROP, case.field, "dopri8", rtol=tight, atol=tight)
    watched = by(DISCRETE, case.field, "dopri8", rtol=tight, atol=tight)
    truth = {GRADIENT: case.gradient(exact), HESSIAN: case.twice(exact), FACTORS: case.factors(watched)}
    for method, control in METHODS.items():
        settings = {**control, "steps": 2} if quick and control else control
        layers = {
            way: by(way, case.field, method, rtol=TOLERANCE, atol=TOLERANCE, **settings)
            for way in (ODEINT, ODEINT_ADJOINT, DISCRETE, CONTINUOUS, BACKPROP)
        }
        for quantity, ways in _ways(case, method, layers).items():
            graphs = {layers[_graph(way)] for way in ways if way != SINGLE}
            derive = case.gradient if quantity == GRADIENT else case.twice
            own = {graph: derive(graph) for graph in graphs}
            for way, (found, milliseconds) in timed(ways, 0 if quick else 5).items():
                same = own.get(layers[_graph(way)]) if way != SINGLE else None
                yield {
                    "method": method,
                    "quantity": quantity,
                    "way": way,
                    "to_solve": None if same is None else error(found, same),
                    "to_flow": error(found, truth[quantity]),
                    "ms": milliseconds,
                }


def _ways(case: Case, method: str, layers: dict[str, Any]) -> dict[str, Ways]:
    """Quantity -> way -> what finds it."""
    ours = (DISCRETE, CONTINUOUS) if method != "implicit_adams" else ()  # which is torchdiffeq's in our layer too
    found: dict[str, Ways] = {
        GRADIENT: {way: partial(case.gradient, layers[way]) for way in (ODEINT, ODEINT_ADJOINT, *ours)},
        HESSIAN: {
            ODEINT: partial(case.twice, layers[ODEINT]),
            RECURSIVE: partial(case.recursive, layers[ODEINT_ADJOINT]),
        },
    }
    if ours:
        found[HESSIAN][DISCRETE] = partial(case.twice, layers[DISCRETE])
        found[FACTORS] = {SINGLE: partial(case.factors, layers[DISCRETE])}
    if method == "dopri5":
        found[HESSIAN][SINGLE] = partial(case.single, TOLERANCE)
    return found


def _graph(way: str) -> str:
    """The way of back-propagation through the steps that a way takes."""
    return BACKPROP if way in (DISCRETE, CONTINUOUS) else ODEINT


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """|found - truth| / |truth|, of all tensors as one vector; of factors, the mean of theirs.

    Args:
        found: tensors.
        truth: as many numbers.

    Example:
        >>> round(error([torch.tensor([3.0, 5.0])], [torch.tensor([3.0]), torch.tensor([4.0])]), 6)
        0.2
    """
    return float((_flat(found) - _flat(truth)).norm() / _flat(truth).norm())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def sheets(lines: Lines) -> list[Sheet]:
    """A table for each quantity.

    Args:
        lines: of all seeds.
    """
    found = []
    for quantity in distinct(lines, "quantity"):
        own = chosen(lines, quantity=quantity)
        rows = []
        for method in distinct(own, "method"):
            for way in distinct(chosen(own, method=method), "way"):
                values = [middle(own, key, method=method, way=way) for key in ("to_solve", "to_flow", "ms")]
                rows.append(
                    (f"{method}, {LABELS[way]}", *(cell(value, ".1e") for value in values[:2]), cell(values[2]))
                )
        found.append(Sheet(quantity, ("way", "to solve", "to flow", "ms"), rows, _NOTES[quantity]))
    return found


_FIRST = ", ".join(f"{value:.2e} {method}" for method, value in QUOTED.items())
_NOTES = {
    GRADIENT: (
        "Relative errors, medians over seeds: to back-propagation through the same steps, and to that through a solve "
        f"at 1e-10. ms: CPU time forward and backward. rk4, implicit_adams: {STEPS} steps; dopri5: tolerance "
        f"{TOLERANCE:g}. Published for a larger model on CIFAR10 (arXiv 2109.14158, Table 1; quoted from notes, not "
        f"checked against the paper): {_FIRST}."
    ),
    HESSIAN: (
        "As above, for a fixed v. Recursive: the adjoint of the costate equation, by odeint_adjoint. Single pass: "
        "oc.hvp, which has error control of its own."
    ),
    FACTORS: "Of all layers of the field, gathered in the backward pass of the gradient, whose time is in ms.",
}


def draw(lines: Lines) -> list[Drawn]:
    """The error against the time, a panel for each quantity, a colour for each way and a marker for each method.

    Args:
        lines: of all seeds.
    """
    figure, axes = panels(2, columns=2)
    for axis, quantity in zip(axes, (GRADIENT, HESSIAN), strict=True):
        for colour, way in zip(COLOURS[: len(LABELS)], LABELS, strict=True):
            for marker, method in zip("os^", METHODS, strict=True):
                own = {"quantity": quantity, "method": method, "way": way}
                time, off = middle(lines, "ms", **own), middle(lines, "to_flow", **own)
                if time is not None:
                    axis.loglog([time], [off], marker, color=colour, ms=8, mec="white")
        finish(axis, "CPU time (ms)", "relative error\nto a solve at 1e-10")
        axis.set_title(quantity)
        axis.margins(0.12)
        plain_numbers(axis.xaxis)
    for colour, way in zip(COLOURS[: len(LABELS)], LABELS, strict=True):
        axes[0].plot([], [], "o", color=colour, label=LABELS[way])
    for marker, method in zip("os^", METHODS, strict=True):
        axes[0].plot([], [], marker, color="#6b7480", label=method)
    legend(figure, axes[0])
    return [
        Drawn(
            "errors",
            figure,
            "First and second derivatives: error to a solve at 1e-10 against time; lower left is better.",
        )
    ]


def says(lines: Lines) -> str:
    """What they show.

    Args:
        lines: of all seeds.
    """

    def off(quantity: str, way: str, key: str = "to_flow") -> float:
        return middle(lines, key, quantity=quantity, way=way, method="dopri5") or 0.0

    once, again = off(GRADIENT, ODEINT_ADJOINT), off(HESSIAN, RECURSIVE)
    return (
        f"By dopri5 the recursive adjoint is off by {again:.1e} in second derivatives, {again / once:.0f} times its "
        f"error in the gradient; the discrete adjoint differentiates its own steps to {_rounded(lines)} and is off by "
        f"{off(HESSIAN, DISCRETE):.1e}, the single pass by {off(HESSIAN, SINGLE):.1e}."
    )


def _rounded(lines: Lines) -> str:
    worst = max(line["to_solve"] for line in chosen(lines, way=DISCRETE))
    return "rounding" if worst < 1e-12 else f"{worst:.0e}"


ADJOINTS = Measurement(
    "adjoints",
    "errors and times of first and second derivatives: recursive, single pass, discrete, continuous",
    "digits_ode",
    measure,
    sheets,
    draw,
    says,
)
