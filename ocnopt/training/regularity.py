r"""How hard the learned field is to solve: evaluations, kinetic energy and Jacobian norm as an optimiser trains it.

Along the paths x(t) of the test part, over t in [t0, t1] and per dimension d of the state,

    kinetic     mean of 1/|t1 - t0| int |F(t, x)|^2 / d dt
    jacobian    mean of 1/|t1 - t0| int |eps^T F_x(t, x)|^2 / d dt,   eps of independent signs: |F_x|^2 in the mean

by Gauss-Legendre quadrature. Source: Finlay et al., arXiv 2002.02798; evaluations and this sum beside one another:
Liu, Chen, Theodorou, arXiv 2109.14158.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems import Task, learning_task
from ocnopt.solvers.plotting import finish, legend, panels, styled, whole_numbers
from ocnopt.training.measurement import Drawn, Line, Lines, Measurement, Sheet, cell, distinct, middle
from ocnopt.training.study import Method, Study
from ocnopt.training.trainer import Trainer

# close to what was published; its steps are as long as the division leaves them, so lr and damping are its own
_OPTIONS = {"curvature": "costate", "power": 1, "length": "division", "adaptation": 0, "damping": 0.5}
PUBLISHED = Method("snopt", lr=3e-5, variant="published", settings={"options": _OPTIONS})
COMPARED = Study("regularity", "", ("digits_ode",), (Method("adam"), Method("snopt"), replace(PUBLISHED, lr=1e-4)))
TIGHT = 1e-6
FIGURES = {"tight": f"evaluations\nat {TIGHT:g}", "kinetic": "kinetic energy", "jacobian": "Jacobian norm squared"}


class Regularity(NamedTuple):
    """Evaluations of a solve, and both means, per dimension."""

    evaluations: int
    kinetic: float
    jacobian: float


def regularity(ode: NeuralODE, x: Tensor | Any, *, nodes: int = 8, seed: int = 0) -> Regularity:
    """Measure the field of a layer along its paths.

    Args:
        ode: the layer.
        x: where its paths start, ``(B, ...)``, one tensor.
        nodes: of the quadrature.
        seed: of the signs.

    Raises:
        ProblemError: the state is a tuple.

    Example:
        With dx/dt = -x from 1 both integrands are known: exp(-2 t) and 1.

        >>> ode = NeuralODE(lambda t, x: -x, rtol=1e-9, atol=1e-9)
        >>> found = regularity(ode, torch.ones(1, 3, dtype=torch.float64))
        >>> from math import exp
        >>> round(found.kinetic, 6) == round((1 - exp(-2)) / 2, 6), round(found.jacobian, 6)
        (True, 1.0)
    """
    if not isinstance(x, Tensor):
        raise ProblemError(
            f"x is a {type(x).__name__}; expected a state of one tensor, over whose dimension means are taken: "
            "join its parts along the last axis"
        )
    horizon = ode.horizon
    start, end = horizon.t0, float(ode.T) if isinstance(horizon, FreeHorizon) else horizon.t1
    places, weights = np.polynomial.legendre.leggauss(nodes)
    times = [start, *(start + (end - start) * (places + 1) / 2)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        ode(x)
        evaluations = ode.statistics.forward
        states = ode(x, times)[1:]
    kinetic = jacobian = 0.0
    for time, weight, state in zip(times[1:], weights / 2, states, strict=True):
        signs = torch.randint(0, 2, state.shape, generator=generator).to(state) * 2 - 1
        point = state.detach().requires_grad_()
        slope = ode.field(torch.as_tensor(time).to(state), point) + 0 * point  # fields that do not see x too
        (along,) = torch.autograd.grad(slope, point, signs)
        kinetic += weight * slope.detach().square().mean().item()
        jacobian += weight * along.square().mean().item()
    return Regularity(evaluations, float(kinetic), float(jacobian))


def measure(seed: int, quick: bool) -> Iterator[Line]:
    """The lines of one seed: the optimisers stepped in turn, and measured at the start and after each epoch.

    Args:
        seed: of weights and order.
        quick: two iterations, and few images.
    """
    task = learning_task("digits_ode").build()
    images = task.test_inputs[: 16 if quick else None]
    trainers = {}
    for method, config in COMPARED.configs("digits_ode", len(task.train_targets), seed):
        settings: dict[str, Any] = {"iterations": 2, "batch_size": 16} if quick else {}
        trainers[method.label] = Trainer(task, replace(config, **settings))
    any_trainer = next(iter(trainers.values()))
    iterations, epoch = any_trainer.config.iterations, 1 if quick else any_trainer.batches_per_epoch
    for iteration in range(0, iterations + 1, epoch):
        for label, trainer in trainers.items():
            losses = [trainer.step()["loss"] for _ in range(epoch if iteration else 0)]
            yield {
                "method": label,
                "iteration": iteration,
                **_of_model(trainer.model, images),
                "loss": sum(losses) / epoch if losses else None,
                "accuracy": _accuracy(task, trainer.model, images),
            }


def _of_model(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Of its one Neural ODE, along the paths of some images."""
    ode = next(module for module in model.modules() if isinstance(module, NeuralODE))
    starts: list[Tensor] = []
    handle = ode.register_forward_pre_hook(lambda layer, arguments: starts.append(arguments[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    tight = copy.copy(ode)
    tight.rtol = tight.atol = TIGHT
    with torch.no_grad():
        tight(starts[0])
    return {**regularity(ode, starts[0])._asdict(), "tight": tight.statistics.forward}


@torch.no_grad()
def _accuracy(task: Task, model: nn.Module, images: Tensor) -> float:
    return float(task.metrics["accuracy"](model(images), task.test_targets[: len(images)]).mean())


def sheets(lines: Lines) -> list[Sheet]:
    """The figures at the end of training, beside those at its start.

    Args:
        lines: of all seeds.
    """
    last = max(distinct(lines, "iteration"))
    rows = []
    for name, iteration in (("before training", 0), *((method, last) for method in distinct(lines, "method"))):
        method = name if iteration else distinct(lines, "method")[0]
        own = {"method": method, "iteration": iteration}
        values = [middle(lines, key, **own) for key in ("evaluations", "tight", "kinetic", "jacobian", "loss")]
        share = middle(lines, "accuracy", **own)
        rows.append((name, *map(cell, values), "-" if share is None else f"{100 * share:.1f}"))
    head = ("method", "evaluations", f"at {TIGHT:g}", "kinetic", "jacobian", "loss", "test accuracy %")
    note = (
        f"After {last} iterations; medians over seeds. Evaluations of one solve, at the tolerance of training and "
        f"at {TIGHT:g}; means over its length of |F|² (kinetic) and of |εᵀ dF/dx|² (jacobian), per dimension, "
        "along the paths of the test part. Loss: of the last epoch."
    )
    return [Sheet("regularity of the learned field", head, rows, note)]


def draw(lines: Lines) -> list[Drawn]:
    """Each figure against the iteration, a band from the least to the greatest seed.

    Args:
        lines: of all seeds.
    """
    figure, axes = panels(3)
    iterations = distinct(lines, "iteration")
    for axis, (key, name) in zip(axes, FIGURES.items(), strict=True):
        for method, _, look in styled(dict.fromkeys(distinct(lines, "method"))):
            own = [
                [line[key] for line in lines if (line["method"], line["iteration"]) == (method, i)] for i in iterations
            ]
            axis.plot(iterations, np.median(own, axis=1), **look, label=method)
            axis.fill_between(
                iterations, np.min(own, axis=1), np.max(own, axis=1), color=look["color"], alpha=0.15, lw=0
            )
        axis.set_ylim(bottom=0)
        whole_numbers(axis.xaxis)
        finish(axis, "iteration" if axis is axes[-1] else "", name)
    legend(figure, axes[0])
    return [Drawn("regularity", figure, "Medians over the seeds, in a band from the least to the greatest.")]


def says(lines: Lines) -> str:
    """What they show.

    Args:
        lines: of all seeds.
    """
    last = max(distinct(lines, "iteration"))

    def ends(key: str) -> str:
        of = {method: middle(lines, key, method=method, iteration=last) or 0.0 for method in distinct(lines, "method")}
        return ", ".join(f"{method} {value:.3g}" for method, value in of.items())

    return (
        f"At the end a solve at {TIGHT:g} takes {ends('tight')} evaluations; kinetic energy: {ends('kinetic')}; "
        f"Jacobian norm squared: {ends('jacobian')}."
    )


REGULARITY = Measurement(
    "regularity",
    "evaluations, kinetic energy and Jacobian norm of the field that each optimiser learns",
    "digits_ode",
    measure,
    sheets,
    draw,
    says,
)
