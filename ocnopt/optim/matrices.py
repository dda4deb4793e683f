"""Steps of matrices in the eigenbases of their Kronecker factors, which are made anew now and then.

Shapes: gradient, momentum and step of a matrix ``(groups, b, a)``, factors A ``(groups, a, a)`` and B
``(groups, b, b)``. In A = U_A E_A U_A^T and B = U_B E_B U_B^T a gradient reads U_B^T G U_A, its second moments s (first
E_B E_A^T) are kept entry by entry, and the preconditioned gradient is U_B (U_B^T G U_A / (s + damping)^power) U_A^T.
Power 1 with s = E_B E_A^T is KFAC: vec(B^-1 G A^-1) = (A (X) B)^-1 vec(G). Bases of wide sides, and of samples fewer
than inputs, are leading parts (:mod:`ocnopt.optim.bases`). The rule as a whole is in :mod:`ocnopt.optim.snopt`.

Source: George et al., arXiv 1806.03884.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import Samples
from ocnopt.optim.bases import (
    KEEP,
    RANK,
    TURNING,
    Basis,
    Eigen,
    carried_moments,
    complete,
    eigenbasis,
    first_moments,
    follow,
    is_leading,
    is_wide,
    kept,
    of_rows,
    tracked,
)
from ocnopt.optim.ranks import Shared
from ocnopt.optim.stack import Stack
from ocnopt.optim.states import State, age, basis_of, fits, is_turn_of_output, renewed


class Pair(NamedTuple):
    """A matrix that gets a new eigenbasis: the state of its weight, gradient and momentum."""

    state: State
    gradient: Tensor
    momentum: Tensor


def in_full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Without autocast, which would make products of matrices of half precision."""
    # entering the context takes longer than asking
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def is_received(gradient: Tensor | None) -> bool:
    """Whether there is a gradient other than the zeros of an empty batch."""
    # the norm of a large one takes a sixth of the time, but it may underflow
    return gradient is not None and (bool(gradient.norm()) or bool(gradient.any()))


def refresh(due: Mapping[int, tuple[Pair, Samples | None]], shared: Shared | None, *, mixed: bool) -> None:
    """Go over to new eigenbases, each made by the rank that it was shared out to.

    They are of the samples, where there are some, else of the gradients; ``mixed``: B of samples, A of gradients.
    """
    made: dict[int, Basis] = {}
    for i, (pair, samples) in due.items():
        if shared is None:
            _go_over(pair, _new_basis(pair, samples, mixed=mixed))
        elif shared.is_mine(i):
            with suppress(torch.linalg.LinAlgError):  # the others wait: all hear of it together
                made[i] = _new_basis(pair, samples, mixed=mixed)
    if shared is not None:
        for i, (UA, EA, UB, EB) in shared.spread(
            {i: [part for side in new for part in side[:2]] for i, new in made.items()}, due
        ).items():
            _go_over(due[i][0], Basis(Eigen(UA, EA), Eigen(UB, EB)))


def _new_basis(pair: Pair, samples: Samples | None, *, mixed: bool) -> Basis:
    state, gradient, momentum = pair
    old = basis_of(state) if fits(state, gradient.shape) else None
    if samples is not None and not mixed:
        return eigenbasis(samples, RANK, old, KEEP)
    UA, UB = (None, None) if old is None else old
    rows, columns = gradient.shape[1:]
    # one side at a time, where the power method goes from each to the other
    is_apart = samples is None and is_wide(max(rows, columns)) and old is not None and is_leading(old)
    alone = old if is_apart else None
    if alone is not None and is_turn_of_output(state, rows, columns):
        return alone._replace(output=_of_gradients(state, "output_factor", momentum.mT, UB, UA))
    new = _of_gradients(state, "input_factor", momentum, UA, UB)
    if alone is not None:
        return alone._replace(input=new)
    if samples is not None:
        return Basis(new, of_rows(samples.gradients, kept(rows, columns), UB, KEEP))
    return Basis(new, _of_gradients(state, "output_factor", momentum.mT, UB, new))


def _of_gradients(state: State, factor: str, momentum: Tensor, own: Eigen | None, other: Eigen | None) -> Eigen:
    """The basis of one side: of the running mean of G^T G, or of the momentum alone where that side is wide."""
    if not is_wide(momentum.shape[-1]):
        is_near = own is not None and not own.is_part and age(state) >= TURNING
        return tracked(state[factor], own.vectors) if own is not None and is_near else complete(state[factor])
    return follow(momentum, own, other)


def _go_over(pair: Pair, new: Basis) -> None:
    """Take a new eigenbasis; the second moments move into it."""
    state, gradient, _ = pair
    old = basis_of(state) if fits(state, gradient.shape) else None
    state["moments"] = first_moments(new, gradient) if old is None else carried_moments(state["moments"], old, new)
    for side, (vectors, values, _) in zip(("input", "output"), new, strict=True):
        state[f"{side}_vectors"], state[f"{side}_values"] = vectors, values
    if old is None:
        state["basis_since"] = state["step"].clone()
    if is_wide(max(gradient.shape[1:])):
        renewed(state)


def changes(
    stacks: Iterable[Stack],
    rates: Mapping[Tensor, float],
    groups: Mapping[Tensor, Mapping[str, Any]],
    power: float,
    length: str,
) -> dict[Tensor, Tensor]:
    """What to add to the parameters of the matrices that have an eigenbasis: steps times -rate of each parameter."""
    found: dict[Tensor, Tensor] = {}
    for stack in stacks:
        own = [{rates.get(p, 0.0) for p in block.parameters} for block in stack.blocks]
        common = [next(iter(rate)) if len(rate) == 1 else 1.0 for rate in own]  # no bias of another group
        damping = [float(groups[block.weight]["damping"]) for block in stack.blocks]
        if any(stack.is_ready):
            stack.keep(_changed(stack, common, damping, power, length))
        for i, is_ready in enumerate(stack.is_ready):
            if is_ready:
                parts = stack.parts(i)
                found.update(parts if len(own[i]) == 1 else {p: part * rates[p] for p, part in parts.items()})
    return found


def _changed(stack: Stack, rates: list[float], damping: list[float], power: float, length: str) -> Tensor:
    """The changes of the matrices of a stack: steps as long as ``length`` says ("noise" or "division"), times -rate."""
    basis = stack.basis
    gradient, momentum = stack.turned()
    stack.learn(basis.squares(gradient))
    tiny, eps = torch.finfo(gradient.core.dtype).tiny, torch.finfo(gradient.core.dtype).eps
    means = stack.means().clamp_(min=tiny)
    if not basis.is_complete:
        damping = [max(eps, one) for one in damping]  # where a rest has nothing, its moments are rounding
    numbers = means.new_tensor(stack.of_slices(damping) + stack.of_slices([-rate for rate in rates]))
    floors, factors = numbers.view(2, *means.shape).unbind()
    scales = inverse_power(torch.addcmul(stack.moments, floors, means).clamp_(min=tiny), power)
    step = basis.scaled(momentum, scales, stack.room())  # memory costs more to allocate than to fill
    if length == "noise":
        # measured as it is: what the moments of a rest say of it, a difference of squares, may be rounding
        long, short = (torch.linalg.vector_norm(of, dim=(-2, -1), keepdim=True) for of in (momentum.matrix, step))
        factors = factors.mul_(long).div_(short.mul_(means.sqrt_()).clamp_(min=tiny))
    return step.mul_(factors)


def inverse_power(numbers: Tensor, power: float) -> Tensor:
    """Numbers to the -power, in their memory.

    >>> inverse_power(torch.tensor([16.0, 1.0]), 0.75)
    tensor([0.1250, 1.0000])
    """
    if power != 0.75:
        return numbers.pow_(-power)
    root = numbers.rsqrt_()  # two roots take a third of the time
    return root.mul_(root.sqrt())


def move(changes: Mapping[Tensor, Tensor], states: Mapping[Tensor, State], step: int) -> None:
    """Move parameters, and remember the changes, and that they are of this step of the optimiser."""
    torch._foreach_add_([*changes], [*changes.values()])
    for parameter, change in changes.items():
        state = states[parameter]
        state["change"], state["changed_at"] = change, step
