"""What happens where a gradient of a solve is differentiated once more.

The gradient of a discrete solve, g(x, theta, c) with c the cotangents of the outputs, is a node of its own: it has been
found by the sweep already, and keeps nothing besides. Only its own backward pass takes the steps again with a graph of
all of them, forms g with that graph, and differentiates it: second derivatives of the steps taken, step sizes held.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.differential.discrete import Taken
from ocnopt.errors import OcnoptError
from ocnopt.integrate.runge_kutta import interpolate, step
from ocnopt.integrate.tableaus import Tableau
from ocnopt.neural.evaluation import Evaluation

ONCE = (
    "the gradient of a NeuralODE was differentiated once more; the continuous adjoint, times that need "
    "gradients, and the time of an event with any adjoint, give first derivatives only, the discrete adjoint "
    "second ones: use "
    'adjoint="discrete" with plain times, or "backprop", or oc.hvp and oc.differentiate'
)
TWICE = (
    'the second derivative of a NeuralODE with adjoint="discrete" was differentiated once more; expected two '
    "derivatives at most of steps that keep no graph: use "
    'adjoint="backprop", or leave out create_graph=True where the second is taken'
)


class Last(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, refusal: str, count: int, *tensors: Tensor | None) -> Any:
        """Copy the tensors before the inputs they depend on."""
        ctx.refusal = refusal
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Refuse."""
        raise OcnoptError(ctx.refusal)


@runtime_checkable
class Repeatable(Protocol):
    """An adjoint whose steps can be taken again."""

    @property
    def evaluation(self) -> Evaluation:
        """The field."""

    def again(self, x: Tensor, saved: Sequence[Tensor]) -> Mapping[int, Tensor]:
        """The outputs by their index, with the graph of all steps from x."""


class Twice(torch.autograd.Function):
    """The gradients of a solve as functions of x, parameters and cotangents, which may be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any,
        adjoint: Repeatable,
        places: Sequence[int],
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        x: Tensor,
        *tensors: Tensor,
    ) -> Any:
        """Pass the gradients on.

        Args:
            ctx: autograd's.
            adjoint: takes the steps again.
            places: the outputs that cotangents have come for.
            gradients: those of x, of the times (None) and of the parameters.
            saved: what the adjoint kept.
            x: where the steps start.
            tensors: the parameters, then the cotangents.
        """
        ctx.adjoint, ctx.places = adjoint, places
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *saved)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        """Differentiate the sum of the products of gradients and directions."""
        evaluation, places = ctx.adjoint.evaluation, ctx.places
        parameters, (start, *tensors) = evaluation.parameters, ctx.saved_tensors
        count = len(parameters)
        x = start.detach().requires_grad_()
        felt = [tensor.detach().requires_grad_() for tensor in tensors[count : count + len(places)]]
        with evaluation.replaying(), torch.enable_grad():
            outputs = ctx.adjoint.again(x, tensors[count + len(places) :])
            ends = [outputs[place] for place in places]
            firsts: Sequence[Tensor | None] = torch.autograd.grad(
                ends, (x, *parameters), felt, create_graph=True, allow_unused=True
            )
            pairs = zip(firsts, (directions[0], *directions[2:]), strict=True)
            kept = [(g, v) for g, v in pairs if g is not None and v is not None and g.requires_grad]
            inputs = (x, *parameters, *felt)
            seconds: Sequence[Tensor | None] = [None] * len(inputs)
            if kept:
                seconds = torch.autograd.grad([g for g, _ in kept], inputs, [v for _, v in kept], allow_unused=True)
        if torch.is_grad_enabled():
            seconds = Last.apply(TWICE, len(seconds), *seconds, start, *tensors[: count + len(places)], *directions)
        return None, None, None, None, *seconds


def take_again(
    tableau: Tableau, evaluation: Evaluation, steps: Sequence[Taken], times: Sequence[float], x: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """The outputs by their index, and the end, in the current gradient mode.

    Args:
        tableau: the method.
        evaluation: the field.
        steps: those to take.
        times: start and outputs.
        x: where they start.
    """
    outputs: dict[int, Tensor] = {}
    first = None
    for taken in steps:
        before, field = x, evaluation.noted(taken.notes[first is not None :])
        x, seen = step(tableau, field, taken.time, taken.size, before, first)
        first = seen.slopes[-1] if tableau.first_same_as_last else None
        for i in taken.inside:
            theta = torch.tensor([(times[i] - taken.time) / taken.size], dtype=torch.float64, device=x.device)
            outputs[i] = interpolate(tableau, taken.size, before, seen.slopes, theta)[0]
        if taken.output is not None:
            outputs[taken.output] = x
    return outputs, x
