"""The steps of parameters, above all of matrices in the eigenbases of their Kronecker factors, on the state of each.

Shapes: gradient, momentum and step of a matrix ``(groups, b, a)``, factors A ``(groups, a, a)`` and B
``(groups, b, b)``. In A = U_A E_A U_A^T and B = U_B E_B U_B^T a gradient reads U_B^T G U_A, its second moments s (first
E_B E_A^T) are kept entry by entry, and the preconditioned gradient is U_B (U_B^T G U_A / (s + damping)^power) U_A^T.
Power 1 with s = E_B E_A^T is KFAC: vec(B^-1 G A^-1) = (A (X) B)^-1 vec(G). A has at most as many eigenvalues above zero
as there are samples, so U_A may hold its leading eigenvectors alone; the directions outside of it, *the rest*, share
one second moment per row. The rule as a whole is in :mod:`ocnopt.optim.snopt`.

Source: George et al., arXiv 1806.03884.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import Samples, working_dtype
from ocnopt.optim.checks import check_same_shape, is_live
from ocnopt.optim.ranks import Shared

DECAY = 0.95  # beta, of second moments and of factors made of gradients
KEEP = 0.5  # share of the old factors in a refresh from samples
RANK = 128  # eigenvectors of A that are kept where it comes from samples, or is wider than WIDEST
WIDEST = 2048  # inputs up to which A is kept whole

_OF_NO_DTYPE = ("step", "squares_step", "factor")  # of a state, which stay as they are when its parameter goes elsewhere
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero

State = MutableMapping[str, Any]


class Eigen(NamedTuple):
    """Leading eigenvectors ``(groups, d, r)`` and eigenvalues ``(groups, r)`` of a factor scaled to trace one."""

    vectors: Tensor
    values: Tensor

    @property
    def rest(self) -> int:
        """The number of directions in the rest."""
        return self.vectors.shape[-2] - self.vectors.shape[-1]


class Basis(NamedTuple):
    """Eigenbases of A, perhaps its leading part alone, and of B, complete.

    A matrix M ``(groups, b, a)`` is *turned* into U_B^T M and its leading part U_B^T M U_A. Second moments belong to
    directions: ``(groups, b, a)`` if the basis is complete, else ``(groups, b, r + 1)``, whose last column is the mean
    over the rest.
    """

    input: Eigen
    output: Eigen

    def turn(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """U_B^T M ``(..., b, a)`` and U_B^T M U_A ``(..., b, r)``."""
        turned = self.output.vectors.mT @ matrix
        return turned, turned @ self.input.vectors

    def spectrum(self) -> Tensor:
        """Eigenvalues E_B E_A^T of the curvature, laid out as second moments."""
        values = self.input.values
        if self.input.rest:
            outside = (1.0 - values.sum(-1, keepdim=True)).clamp(min=0.0) / self.input.rest
            values = torch.cat([values, outside], -1)
        return self.output.values[..., :, None] * values[..., None, :]

    def squares(self, turned: Tensor, leading: Tensor) -> Tensor:
        """Squared entries of a turned matrix, laid out as second moments."""
        squares = leading.square()
        if not self.input.rest:
            return squares
        outside = turned.square().sum(-1, keepdim=True) - squares.sum(-1, keepdim=True)
        return torch.cat([squares, outside.clamp_(min=0.0).div_(self.input.rest)], -1)

    def split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Second moments of the leading part and, ``(groups, b, 1)``, of each direction of the rest."""
        rank = self.input.vectors.shape[-1]
        return moments[..., :rank], moments[..., rank:] if self.input.rest else moments.new_zeros(())

    def mean(self, moments: Tensor) -> Tensor:
        """Mean of second moments over all directions: the trace of the curvature over its size."""
        if not self.input.rest:
            return moments.mean()
        inside, outside = self.split(moments)
        return (inside.sum() + outside.sum() * self.input.rest) / (outside.numel() * self.input.vectors.shape[-2])

    def precondition(self, turned: Tensor, leading: Tensor, moments: Tensor, floor: Tensor, power: float) -> Tensor:
        """U_B (M / (s + floor)^power) U_A^T of a turned matrix."""
        scales = (moments + floor).pow_(-power)
        if not self.input.rest:
            return self.output.vectors @ (scales.mul_(leading) @ self.input.vectors.mT)
        inside, outside = self.split(scales)
        step = outside * turned + ((inside - outside) * leading) @ self.input.vectors.mT
        return self.output.vectors @ step


def eigenbasis(samples: Samples, rank: int, old: Basis | None = None, keep: float = 0.0) -> Basis:
    """Eigenbasis of the factors of some samples, averaged with the factors behind an old basis.

    Args:
        samples: of one layer.
        rank: how many eigenvectors of A to keep at most; if A is larger, 4 rank to 8 rank samples are enough.
        old: weighs ``keep`` in the average, the samples 1 - keep.
        keep: see ``old``.

    >>> eye = torch.eye(2)[None]
    >>> eigenbasis(Samples(eye * torch.tensor([1.0, 3.0]), eye), rank=2).input.values
    tensor([[0.9000, 0.1000]])
    """
    inputs = samples.inputs
    if inputs.shape[2] > rank:
        inputs = inputs[:, :: max(1, inputs.shape[1] // (4 * rank))]
    return Basis(
        _leading(inputs, rank, old and old.input, keep),
        _leading(samples.gradients, samples.gradients.shape[-1], old and old.output, keep),
    )


def _leading(rows: Tensor, rank: int, old: Eigen | None, keep: float) -> Eigen:
    """Leading eigenvectors of rows^T rows, for rows ``(groups, k, d)``."""
    rows = rows / torch.linalg.matrix_norm(rows, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    if old is not None:
        kept = (keep * old.values).sqrt()[..., None] * old.vectors.mT
        rows = torch.cat([kept, (1.0 - keep) ** 0.5 * rows], -2)
    if rows.shape[-2] < rows.shape[-1] and rank < rows.shape[-1]:
        # Fewer rows than directions: a small eigenproblem in the span of the rows, by a stable route.
        span, triangle = torch.linalg.qr(rows.mT)
        values, small = eigh(triangle @ triangle.mT)
        vectors = span @ small
    else:
        values, vectors = eigh(rows.mT @ rows)
    return Eigen(vectors.flip(-1)[..., :rank].contiguous(), values.flip(-1)[..., :rank].clamp(min=0.0))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of symmetric matrices ``(..., d, d)``."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        # Single precision can fail to converge on nearly equal eigenvalues.
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix), vectors.to(matrix)


def first_moments(basis: Basis, gradient: Tensor) -> Tensor:
    """Second moments to start from: the spectrum of the curvature, in the units of the squared gradient."""
    squares, spectrum = basis.squares(*basis.turn(gradient)), basis.spectrum()
    inside, shape = basis.split(squares)[0], basis.split(spectrum)[0]
    tiny = torch.finfo(shape.dtype).tiny
    moments = spectrum * (inside.sum((-2, -1), keepdim=True) / shape.sum((-2, -1), keepdim=True).clamp(min=tiny))
    if basis.input.rest:
        moments[..., -1] = squares[..., -1]
    return moments


def carried_moments(moments: Tensor, old: Basis, new: Basis) -> Tensor:
    """Second moments in a new eigenbasis.

    Entries that are uncorrelated in the old basis, with second moments s, have in the new one the second moments
    (R_B o R_B) s (R_A o R_A)^T with R_A = U_A'^T U_A, R_B = U_B'^T U_B; what leaves the leading part joins the rest.
    """
    inside, outside = old.split(moments)
    mixing = (new.input.vectors.mT @ old.input.vectors).square()
    moved = inside @ mixing.mT
    if old.input.rest:
        moved += outside * (1.0 - mixing.sum(-1)).clamp(min=0.0)[..., None, :]
    if new.input.rest:
        total = inside.sum(-1, keepdim=True) + outside * old.input.rest
        left = (total - moved.sum(-1, keepdim=True)).clamp(min=0.0) / new.input.rest
        moved = torch.cat([moved, left], -1)
    return (new.output.vectors.mT @ old.output.vectors).square() @ moved


def newest(count: Any, decay: float) -> float:
    """The weight of the newest of ``count`` values in a running mean that weighs all of them alike at first.

    >>> [round(newest(count, decay=0.9), 3) for count in (1, 2, 1000)]
    [1.0, 0.526, 0.1]
    """
    return (1.0 - decay) / (1.0 - decay ** int(count))


def take_in(
    groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], names: Mapping[Tensor, str]
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """The gradients, with weight decay, and their running means, in working precision."""
    gradients: dict[Tensor, Tensor] = {}
    momenta: dict[Tensor, Tensor] = {}
    for group in groups:
        parameters = [p for p in group["params"] if p.grad is not None and is_live(p)]
        if not parameters:
            continue
        found = [parameter.grad.to(working_dtype(parameter)) for parameter in parameters]
        if group["weight_decay"]:
            decayed = [parameter.to(gradient) for parameter, gradient in zip(parameters, found, strict=True)]
            found = [*torch._foreach_add(found, decayed, alpha=group["weight_decay"])]
        means = [_momentum(states[p], names[p], gradient) for p, gradient in zip(parameters, found, strict=True)]
        average(means, found, [newest(states[parameter]["step"], group["momentum"]) for parameter in parameters])
        gradients.update(zip(parameters, found, strict=True))
        momenta.update(zip(parameters, means, strict=True))
    return gradients, momenta


def _momentum(state: State, name: str, gradient: Tensor) -> Tensor:
    """The running mean of a parameter's gradients; its state follows where the parameter went (``model.to``)."""
    momentum = state.get("momentum")
    if momentum is None:
        momentum, state["step"] = gradient.clone(), torch.zeros((), dtype=torch.float32)
        state["momentum"] = momentum
    elif momentum.dtype != gradient.dtype or momentum.device != gradient.device:
        for key, value in state.items():
            state[key] = value if key in _OF_NO_DTYPE else value.to(gradient)
        momentum = state["momentum"]
    check_same_shape(name, "momentum", momentum.shape, gradient.shape)
    state["step"] += 1
    return momentum


def restore(groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], saved: Mapping[str, Any]) -> None:
    """States as they were saved: torch has cast them to the parameter's precision, theirs may be finer."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if key != "factor":
                place = value.device if key in _OF_NO_DTYPE else parameter.device
                states[parameter][key] = value.to(place, copy=True)


def first_order(state: State, gradient: Tensor, momentum: Tensor) -> Tensor:
    """The step of a parameter that is no such matrix, without lr: Adam's rule.

    A parameter may come to it late, with a momentum of other gradients: its squares count as one of them.
    """
    if "squares" not in state:
        state["squares"] = torch.maximum(gradient.square(), momentum.square())
        state["squares_step"] = torch.ones((), dtype=torch.float32)
    else:
        state["squares_step"] += 1
        state["squares"].lerp_(gradient.square(), newest(state["squares_step"], DECAY))
    return momentum / (state["squares"].sqrt() + EPSILON)


def forget_squares(state: State) -> None:
    """Let go of what :func:`first_order` knows of a parameter that moves as a matrix now."""
    state.pop("squares", None)
    state.pop("squares_step", None)


def fits(state: Mapping[str, Any], gradient: Tensor) -> bool:
    """Whether there is an eigenbasis for a matrix, which changes as a bias is frozen or set free."""
    if "input_vectors" not in state:
        return False
    groups, rows, columns = gradient.shape
    came = [state[f"{side}_vectors"].shape[:2] for side in ("output", "input")]
    return came == [(groups, rows), (groups, columns)]


def observe(state: State, gradient: Tensor) -> None:
    """Take a gradient into the running means of G^T G and G G^T."""
    groups, rows, columns = gradient.shape
    if columns > WIDEST:
        return
    if "input_factor" not in state or state["input_factor"].shape[:2] != (groups, columns):
        state["input_factor"] = gradient.new_zeros(groups, columns, columns)
        state["output_factor"] = gradient.new_zeros(groups, rows, rows)
    weight = newest(state["step"], DECAY)
    state["input_factor"].baddbmm_(gradient.mT, gradient, beta=1.0 - weight, alpha=weight)
    state["output_factor"].baddbmm_(gradient, gradient.mT, beta=1.0 - weight, alpha=weight)


class Pair(NamedTuple):
    """A matrix that is to move: its state with an eigenbasis, its gradient and momentum, and its damping."""

    state: State
    gradient: Tensor
    momentum: Tensor
    damping: float


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
            {i: [*new.input, *new.output] for i, new in made.items()}, due
        ).items():
            _go_over(due[i][0], Basis(Eigen(UA, EA), Eigen(UB, EB)))


def _new_basis(pair: Pair, samples: Samples | None, *, mixed: bool) -> Basis:
    state, gradient, momentum, _ = pair
    is_whole = gradient.shape[-1] <= WIDEST
    if samples is None and is_whole:
        return Basis(_complete(state["input_factor"]), _complete(state["output_factor"]))
    old = _basis(state) if fits(state, gradient) else None
    if samples is not None and mixed and is_whole:
        rows = samples.gradients
        return Basis(_complete(state["input_factor"]), _leading(rows, rows.shape[-1], old and old.output, KEEP))
    return eigenbasis(samples or Samples(momentum, momentum.mT), RANK, old, KEEP)


def _go_over(pair: Pair, new: Basis) -> None:
    """Take a new eigenbasis; the second moments move into it."""
    state, gradient, *_ = pair
    old = _basis(state) if fits(state, gradient) else None
    state["moments"] = first_moments(new, gradient) if old is None else carried_moments(state["moments"], old, new)
    (state["input_vectors"], state["input_values"]), (state["output_vectors"], state["output_values"]) = new


def turn(pairs: Sequence[Pair], power: float, length: str) -> list[Tensor]:
    """The steps of some matrices, without lr, as long as ``length`` says ("noise" or "division")."""
    if not pairs:
        return []
    bases = [_basis(pair.state) for pair in pairs]
    turned = [basis.turn(torch.stack(pair[1:3])) for basis, pair in zip(bases, pairs, strict=True)]
    moments = [pair.state["moments"] for pair in pairs]
    squares = [basis.squares(whole[0], part[0]) for basis, (whole, part) in zip(bases, turned, strict=True)]
    # what the moments began with counts as one observation
    average(moments, squares, [newest(pair.state["step"] + 1, DECAY) for pair in pairs])
    means = [basis.mean(moment) for basis, moment in zip(bases, moments, strict=True)]
    floors = torch._foreach_mul(means, [pair.damping for pair in pairs])
    tiny = torch.finfo(means[0].dtype).tiny
    torch._foreach_add_(floors, tiny)
    torch._foreach_add_(means, tiny)
    steps = [
        basis.precondition(whole[1], part[1], moment, floor, power)
        for basis, (whole, part), moment, floor in zip(bases, turned, moments, floors, strict=True)
    ]
    if length == "division":
        return steps
    norms = torch._foreach_norm(steps)
    torch._foreach_add_(norms, tiny)
    torch._foreach_sqrt_(means)
    torch._foreach_mul_(norms, means)
    lengths = torch._foreach_norm([pair.momentum for pair in pairs])
    torch._foreach_mul_(steps, [*torch._foreach_div(lengths, norms)])
    return steps


def move(groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], steps: Mapping[Tensor, Tensor]) -> None:
    """Move parameters by their steps, lr times their factor long, and remember the changes, of this iteration alone."""
    for group in groups:
        moved = [parameter for parameter in group["params"] if parameter in steps]
        for parameter in group["params"]:
            states.get(parameter, {}).pop("change", None)
        if moved:
            changes = [steps[parameter] for parameter in moved]
            torch._foreach_mul_(changes, [-group["lr"] * states[parameter].get("factor", 1.0) for parameter in moved])
            torch._foreach_add_(moved, changes)
            for parameter, change in zip(moved, changes, strict=True):
                states[parameter]["change"] = change


def cosines(groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[float]:
    """Of the angle between gradients and changes, for each group of such pairs; 0 where one of them is zero.

    >>> along, across = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    >>> cosines([[(along, along), (across, -across)], [(along, across)]])
    [-0.28, 0.0]
    """
    gradients, changes = ([*one] for one in zip(*itertools.chain(*groups), strict=True))
    products = [product.sum() for product in torch._foreach_mul(gradients, changes)]
    parts = [*products, *torch._foreach_norm(gradients), *torch._foreach_norm(changes)]
    numbers = torch.stack([part.to(parts[0]) for part in parts]).tolist()
    found, count, start = [], len(products), 0
    for group in groups:
        along, *sizes = (numbers[i + start : i + start + len(group)] for i in (0, count, 2 * count))
        size = math.prod(math.hypot(*norms) for norms in sizes)
        found.append(sum(along) / size if size > 0.0 else 0.0)
        start += len(group)
    return found


def average(means: list[Tensor], values: list[Tensor], weights: Sequence[float]) -> None:
    """Take new values, each of its weight, into running means."""
    if len({*weights}) == 1:
        torch._foreach_lerp_(means, values, weights[0])
    else:
        for mean, value, weight in zip(means, values, weights, strict=True):
            mean.lerp_(value, weight)


def _basis(state: Mapping[str, Any]) -> Basis:
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )


def _complete(factor: Tensor) -> Eigen:
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(factor.dtype).tiny)
    values, vectors = eigh(factor / trace[:, None, None])
    return Eigen(vectors.flip(-1).contiguous(), values.flip(-1).clamp(min=0.0))
