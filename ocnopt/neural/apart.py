"""Whether samples meet in a field, for solves that must not let them: a look at one evaluation and its gradients."""

from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import ProblemError
from ocnopt.neural.evaluation import Evaluation


def require_apart(evaluation: Evaluation, t: Tensor, x: Tensor, known: dict[object, int], what: str) -> None:
    """Call the field once, and refuse one that fails on the times, draws random numbers or lets samples meet.

    Args:
        evaluation: the field.
        t: 0-d, or a time for each sample.
        x: the state, samples along its leading axis.
        known: remembers for which states that was done.
        what: what asks for it, as the user has written it.

    Raises:
        ProblemError: the field does one of these.
    """
    surroundings = evaluation.surroundings
    surroundings.note_buffers()
    key = ("apart", t.ndim, x.shape, x.dtype, evaluation.field.training)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or torch.is_inference_mode_enabled()
    if key in known or transformed or not x.numel():
        return
    t, leaf = t.to(x.dtype).clone().requires_grad_(), x.detach().requires_grad_()
    with torch.enable_grad(), surroundings.restored():
        slope = _called(evaluation, t, leaf, what)
        noise = surroundings.noise()
    evaluation.statistics.forward -= 1
    if surroundings.moved(noise):
        raise ProblemError(
            f"{what} met a field that draws random numbers (dropout?), while its solve asks for one slope at one time "
            "and state; expected such a field: ode.field.eval(), or a solve without"
        )
    if _meet(slope, (t, leaf)):
        raise ProblemError(
            f"{what} met a field in which samples meet; expected "
            "samples along the leading axis of the state, each with a slope of its own time and state: eval() "
            "for batch normalisation, x[None] for a state without samples, times that are not paired with "
            f"other axes (x[:, :1] * t for x[:, 0] * t), or a solve without {what}"
        )
    known[key] = 1


def _meet(slope: Tensor, inputs: tuple[Tensor, Tensor]) -> bool:
    """Whether a slope depends on another sample's input.

    Two samples differ in a bit of their indices: a group of those that have it, or of those that lack it, holds the
    one sample and not the other.
    """
    if not slope.requires_grad:
        return False
    index = torch.arange(len(slope), device=slope.device)
    for bit in range((len(slope) - 1).bit_length()):
        for value in (0, 1):
            others = (index >> bit & 1) != value
            felt = torch.ones_like(slope)
            felt[others] = 0.0
            found: Any = torch.autograd.grad(slope, inputs, felt, retain_graph=True, allow_unused=True)
            if any(g is not None and g.ndim and bool((g[others].abs() > 0).any()) for g in found):
                return True
    return False


def _called(evaluation: Evaluation, t: Tensor, x: Tensor, what: str) -> Tensor:
    try:
        return evaluation.at(t, x)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if t.ndim == 0:
            raise
        raise ProblemError(
            f"with {what} the field was called with times of shape {tuple(t.shape)}, one for each "
            f"sample, and failed: {error}; expected a field that takes them as it takes a 0-d t: by "
            "broadcasting, t * x or t.expand(x.shape[0], 1), without item(), float(t) or reshape"
        ) from error
