"""The time of an event and the state there, for autograd."""

from typing import Any

import torch
from torch import Tensor

from ocnopt.integrate.events import Met, Watch
from ocnopt.neural.checks import check_event_not_transformed
from ocnopt.neural.second import ONCE, Last


class _Meeting(torch.autograd.Function):
    """The time of an event and the state there, which moves with it."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, met: Met) -> tuple[Tensor, Tensor]:
        ctx.met = met
        ctx.save_for_backward(g, x)
        return x.new_full((), met.time), x.clone()

    @staticmethod
    def backward(ctx: Any, by_time: Tensor, by_state: Tensor) -> Any:
        felt = by_time + (by_state * ctx.met.slope).sum()
        gradients = (-felt / ctx.met.along, by_state)
        return (*(Last.apply(ONCE, 2, *gradients, *ctx.saved_tensors) if torch.is_grad_enabled() else gradients), None)


def meet(watch: Watch, met: Met, x: Tensor) -> tuple[Tensor, Tensor]:
    """The time of an event and the state there, differentiable by the implicit function theorem.

    With x differentiable at a fixed time: dt = -(g_x dx + dg) / (g_t + g_x F), dx_event = dx + F dt, dg the change of g
    by what it depends on besides, and F how the state moves with the length of the last step.
    """
    g = watch.value(met.time, x)
    check_event_not_transformed((g, x))
    return _Meeting.apply(g, x, met)
