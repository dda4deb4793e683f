"""Whether samples meet in a field, for solves that must not let them: a look at its gradients and its values."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import ProblemError
from ocnopt.integrate.samples import column
from ocnopt.neural.evaluation import Evaluation

_Call = Callable[[Tensor, Tensor], Tensor]
_LOOKS = 4  # times that a field is evaluated at where it is called with one for all samples


def require_apart(
    evaluation: Evaluation, span: tuple[float, float], x: Tensor, known: dict[object, int], what: str, *, each: bool
) -> None:
    """Call the field, and refuse one that fails on the times, draws random numbers or lets samples meet.

    That is done in the first, second, fourth, eighth... solve of a shape of the state: what makes samples meet may have
    been zero before. The field is evaluated at the start, at times spread over the horizon.

    Args:
        evaluation: the field.
        span: the first and the last time of all samples.
        x: the state, samples along its leading axis.
        known: remembers how many solves there were of which states.
        what: what asks for it, as the user has written it.
        each: whether the field is called with a time for each sample, not with one of no axes.

    Raises:
        ProblemError: the field does one of these.
    """
    surroundings, statistics = evaluation.surroundings, evaluation.statistics
    surroundings.note_buffers()
    key = ("apart", each, x.shape, x.dtype, evaluation.field.training)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or torch.is_inference_mode_enabled()
    if transformed or not x.numel():
        return
    solves = known.get(key, 0) + 1
    if solves & (solves - 1) == 0:
        forward = statistics.forward

        def call(t: Tensor, x: Tensor) -> Tensor:
            surroundings.set_buffers()
            return _called(evaluation, t, x, what)

        with torch.enable_grad(), surroundings.restored():
            before, leaf = surroundings.noise(), x.detach().requires_grad_()
            draws = meets = False
            for t in _times(span, x, solves, each=each):
                slope = call(t.requires_grad_(), leaf)
                draws = surroundings.moved(before)
                meets = not draws and _meet(call, slope, t, leaf, _slack(evaluation, x))
                if draws or meets:
                    break
        statistics.forward = forward
        if draws:
            raise ProblemError(
                f"{what} met a field that draws random numbers (dropout?), while its solve asks for one slope at one "
                "time and state; expected such a field: ode.field.eval(), or a solve without"
            )
        if meets:
            raise ProblemError(
                f"{what} met a field in which samples meet; expected "
                "samples along the leading axis of the state, each with a slope of its own time and state: eval() "
                "for batch normalisation, x[None] for a state without samples, times that are not paired with "
                f"other axes (x[:, :1] * t for x[:, 0] * t), or a solve without {what}"
            )
    known[key] = solves


def _times(span: tuple[float, float], x: Tensor, solves: int, *, each: bool) -> list[Tensor]:
    """Times over the horizon, distinct from sample to sample or one after the other, others in every look."""
    first, last = span
    generator = torch.Generator().manual_seed(solves)
    if not each:
        places = (torch.arange(_LOOKS) + torch.rand(_LOOKS, generator=generator, dtype=torch.float64)) / _LOOKS
        return [x.new_full((), first + (last - first) * place) for place in places.tolist()]
    places = torch.linspace(0.0, 1.0, len(x), dtype=torch.float64)
    if solves > 1 or len(x) == 1:
        places = torch.rand(len(x), generator=generator, dtype=torch.float64)
    return [column((first + (last - first) * places).to(x), x)]


def _slack(evaluation: Evaluation, x: Tensor) -> float:
    """What rounding may do to a slope, relatively: half of the digits of the coarsest precision around."""
    dtypes = {x.dtype, *(p.dtype for p in evaluation.surroundings.parameters if p.is_floating_point())}
    dtypes |= {dtype for enabled, dtype, _ in evaluation.surroundings.autocast.values() if enabled}
    return max(float(torch.finfo(dtype).eps) for dtype in dtypes) ** 0.5


def _meet(call: _Call, slope: Tensor, t: Tensor, x: Tensor, slack: float) -> bool:
    """Whether a slope depends on another sample's input, by its gradient or, where it has none, by its value."""
    others_t, others_x = (v.detach().roll(max(1, len(x) // 2), 0) if v.ndim else v for v in (t, x))
    now = slope.detach()
    within = slack * float(now.nan_to_num(0.0, 0.0, 0.0).abs().max())
    for held in _groups(x):
        if slope.requires_grad:
            felt = column(held, x).to(slope.dtype).expand_as(slope)
            found: Any = torch.autograd.grad(slope, (t, x), felt, retain_graph=True, allow_unused=True)
            if any(g is not None and g.ndim and bool((g[~held].abs() > 0).any()) for g in found):
                return True
        kept = column(held, x)
        mixed = (torch.where(kept, t, others_t) if t.ndim else t, torch.where(kept, x, others_x))
        came = call(*(v.detach().requires_grad_() for v in mixed)).detach()
        if bool(((came - now)[held].abs() > within).any()):
            return True
    return False


def _groups(x: Tensor) -> Iterator[Tensor]:
    """Groups of samples, of any two of which one holds the one without the other.

    Two samples differ in a bit of their indices: those that have it are a group, and those that lack it.
    """
    index = torch.arange(len(x), device=x.device)
    for bit in range((len(x) - 1).bit_length()):
        for value in (0, 1):
            yield (index >> bit & 1) == value


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
