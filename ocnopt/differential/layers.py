r"""Layers of a network as links of a path: the step of the sweep when all samples share one control.

Stack the samples' states. Layer t maps them by x' = f(x, u) with one u, its weights. Along the costates p_i = dL/dx_i
the cost-to-go is kept as columns, P with p_i in the rows of sample i,

    V_x = P v,   V_xx = P S P^T,   at the end   v = 1,  S diagonal

(:func:`terminal`). A pull takes p_i through f_x and gives the weights' gradients of the single samples, the columns of
P_u: all of that is one back-propagation. With the metric M of a first-order method as the proximal cost 1/2 du^T M du,
N = P_u^T M^-1 P_u (samples x samples) and s_i = p_i . dx_i, minimising u out is exact in the span of P:

    du = -M^-1 P_u w,    w = v + S s,    [v  S] = (I + S' N)^-1 [v'  S']

since (M + P_u S' P_u^T)^-1 P_u = M^-1 P_u (I + S' N)^-1. Without cost along the path nothing else changes S and v, so
on a graph P runs over the cut, the edges that lead on, and joints (additions, concatenations) need no step.

Layers that act on the same states at the same time are players of a game:

    cooperative   one after the other, each sees what those before it did: the joint minimum
    feedback      each by its own (I + S' N_j)^-1; V is then that of their joint move
    open_loop     nobody expects the others to react: w = (I + S' N_j)^-1 v', V as at the end

``sample`` is the step as published: M replaces Q_uu, samples do not meet, n_i = N_ii:

    w = v' + S' s,   v = (1 - S' n) v',   S = (1 - S' n) S',   the bracket within [0, 1]

Shapes: v ``(B,)``, S = R (L L^T)^-1 R^T with R ``(B, B)``, at the end and for ``sample`` a diagonal ``(B,)``.

Sources: Liu, Chen, Theodorou, DDPNOpt (arXiv 2002.08809); Chen, Liu, Theodorou, DGNOpt (2105.03788); OCNOpt
(2510.14168). The form over the batch is Woodbury's identity applied to the Bellman step of the stacked samples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

# More numbers of single samples' gradients than these are not spelt out for the products of a diagonal metric.
_MANY = 2**18
# Matrices of fewer numbers are factorised together: calls, not arithmetic, are what they cost.
_SMALL = 2**14


class CostToGo(NamedTuple):
    """V in the span of the costates, S = R (L L^T)^-1 R^T; R is ``(B,)`` where it is diagonal, no L is the identity."""

    v: Tensor
    R: Tensor
    L: Tensor | None = None

    @property
    def root(self) -> Tensor:
        """Q of S = Q Q^T."""
        if self.L is None:
            return self.R
        return torch.linalg.solve_triangular(self.L, _matrix(self.R).mT, upper=False).mT


class Answer(NamedTuple):
    """What a player answers to, w = v + S s; S is ``(B,)`` where samples do not meet, None where nothing is fed back.

    The matrix is spelt out: triangular factors would cost every player two solutions.
    """

    v: Tensor
    S: Tensor | None

    def weights(self, s: Tensor | None) -> Tensor:
        """The weight w of each sample's gradient; None is no change."""
        if s is None or self.S is None:
            return self.v
        return torch.addmv(self.v, self.S, s) if self.S.ndim == 2 else torch.addcmul(self.v, self.S, s)


Answers = list[Answer]


@runtime_checkable
class Metric(Protocol):
    """M of one layer."""

    def gram(self, gradients: "Gradients") -> Tensor:
        """N ``(B, B)``."""

    def squares(self, gradients: "Gradients") -> Tensor:
        """The diagonal of N ``(B,)``."""


Group = Sequence[Tensor]  # N of each player


def cooperative(group: Group, value: CostToGo) -> tuple[CostToGo, Answers]:
    """The joint minimum; the last player is minimised out first, and each N becomes the sum from there on."""
    totals = [*accumulate(reversed(group), lambda total, N: N.add_(total))]  # S^-1 grows by N
    at_once = max(1, _SMALL // value.v.numel() ** 2)
    answers: Answers = []
    start = value
    for k in range(0, len(totals), at_once):
        start, part = _minimised(totals[k : k + at_once], value)
        answers += part
    return start, answers[::-1]


def feedback(group: Group, value: CostToGo) -> tuple[CostToGo, Answers]:
    """Each player against V' alone, and V under their joint move."""
    if len(group) == 1:
        return cooperative(group, value)
    _, answers = _minimised(group, value)
    R = _matrix(value.root)
    own = [(N, answer.v, answer.S) for N, answer in zip(group, answers, strict=True) if answer.S is not None]
    # s' = s - sum_j N_j (v_j + S_j s), at the price 1/2 sum_j w_j^T N_j w_j
    stays = torch.diag(torch.ones_like(value.v)) - sum(N @ S for N, _, S in own)
    back, ahead = R.mT @ stays, value.v - R @ (R.mT @ sum(N @ v for N, v, _ in own))
    S = back.mT @ back + sum(S @ N @ S for N, _, S in own)
    v = stays.mT @ ahead + sum(S @ (N @ v) for N, v, S in own)
    values, vectors = torch.linalg.eigh(S)
    return CostToGo(v, vectors * values.clamp(min=0.0).sqrt()), answers


def open_loop(group: Group, value: CostToGo) -> tuple[CostToGo, Answers]:
    """Each player alone, without feedback."""
    return value, [Answer(own.v, None) for own in _minimised(group, value)[1]]


def sample(group: Group, value: CostToGo) -> tuple[CostToGo, Answers]:
    """The published step; N are the diagonals, and players are taken one after the other."""
    answers = []
    for n in reversed(group):
        S = value.R.square()
        answers.append(Answer(value.v, S))
        left = (1.0 - S * n).clamp(0.0, 1.0)
        value = CostToGo(left * value.v, left.sqrt() * value.R)
    return value, answers[::-1]


def grams(players: Sequence[tuple[Metric, "Gradients"]]) -> list[Tensor]:
    """N of each player; of small layers under M = I / scale, whose calls are what they cost, in few."""
    scales = [metric.scale for metric, _ in players if isinstance(metric, Scaled)]
    owns, rows = [own for _, own in players], len(players[0][1])
    pairs = [own.factored for own in owns if own.factored is not None]
    kinds = {(own.bias, own.weight, g.dtype, g.device) for own, (_, g) in zip(owns, pairs, strict=False)}
    is_small = len(players) * rows**2 <= _SMALL
    if not is_small or len(scales) < len(players) or len(pairs) < len(players) or len(kinds) > 1:
        return [metric.gram(own) for metric, own in players]
    parts = [part for of_one in zip(*pairs, strict=True) for part in of_one]
    products = parts[0].new_empty(len(parts), rows, rows)
    for part, product in zip(parts, products.unbind(), strict=True):
        torch.mm(part, part.mT, out=product)
    of_z, of_g = products.chunk(2)
    return [*_products(of_z, of_g, owns[0]).mul_(of_g.new_tensor(scales)[:, None, None]).unbind()]


def _minimised(group: Group, value: CostToGo) -> tuple[CostToGo, Answers]:
    """(I + S N)^-1 [v  S] with S = R R^T for each N, so R (I + R^T N R)^-1 R^T for S; the value behind the last."""
    v, R, N = value.v, value.root, torch.stack([*group])
    pull = (N @ v)[:, :, None]
    N = R.mT @ N @ R if R.ndim == 2 else N.mul_(R).mul_(R[:, None])
    N.diagonal(dim1=1, dim2=2).add_(1.0)
    L = torch.linalg.cholesky_ex(N)[0]
    S = torch.cholesky_inverse(L)
    S = R @ S @ R.mT if R.ndim == 2 else S.mul_(R).mul_(R[:, None])
    left = torch.baddbmm(v[:, None], S, pull, alpha=-1.0)[:, :, 0]
    answers = [Answer(*answer) for answer in zip(left.unbind(), S.unbind(), strict=True)]
    return CostToGo(answers[-1].v, R, L[-1]), answers


def _matrix(R: Tensor) -> Tensor:
    return R if R.ndim == 2 else torch.diag(R)


@dataclass
class Gradients:
    """The weights' gradients of the single samples at one layer: g_i z_i^T, or one tensor for each parameter.

    Args:
        z: inputs ``(B, a)``, without the 1 of the bias; None where ``of`` holds the gradients.
        g: costates at the outputs ``(B, b)``.
        bias: whether there is one to train.
        weight: whether the weight is trained.
        of: the gradients ``(B, *shape)`` of each parameter.
    """

    z: Tensor | None = None
    g: Tensor | None = None
    bias: bool = False
    weight: bool = True
    of: Sequence[Tensor] = ()

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self.of[0] if self.g is None else self.g)

    @cached_property
    def rows(self) -> Sequence[Tensor]:
        """The gradients ``(B, *shape)``, spelt out."""
        if self.z is None or self.g is None:
            return self.of
        weight = [self.g[:, :, None] * self.z[:, None, :]] if self.weight else []
        return [*weight, *([self.g] if self.bias else [])]

    @property
    def factored(self) -> tuple[Tensor, Tensor] | None:
        """z and g, where every gradient is their outer product."""
        return None if self.z is None or self.g is None else (self.z, self.g)

    @property
    def size(self) -> int:
        """How many numbers ``rows`` holds."""
        if self.z is None or self.g is None:
            return sum(rows.numel() for rows in self.of)
        return self.g.shape[0] * self.g.shape[1] * (self.z.shape[1] + 1)

    def add_weighted(self, w: Tensor, totals: Sequence[Tensor]) -> list[Tensor]:
        """Each total, one for each trained parameter, plus sum_i w_i times the gradient of sample i."""
        if self.z is None or self.g is None:
            sums = [(w.to(rows) @ rows.flatten(1)).view_as(total) for rows, total in zip(self.of, totals, strict=True)]
            return [total + part.to(total) for total, part in zip(totals, sums, strict=True)]
        dtypes, z, g = [total.dtype for total in totals], self.z, self.g.mT
        w, *totals = [part if part.dtype == g.dtype else part.to(g) for part in (w, *totals)]
        found = [torch.addmm(totals[0], g * w, z)] if self.weight else []
        found += [torch.addmv(totals[-1], g, w)] if self.bias else []
        return [part if part.dtype == dtype else part.to(dtype) for part, dtype in zip(found, dtypes, strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One row after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def together(parts: Sequence[Gradients]) -> Gradients:
    """The samples of several passes as one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.z is None or first.g is None:
        return Gradients(of=[torch.cat(rows) for rows in zip(*(part.of for part in parts), strict=True)])
    z, g = ([part.z for part in parts if part.z is not None], [part.g for part in parts if part.g is not None])
    return Gradients(torch.cat(z), torch.cat(g), first.bias, first.weight)


@dataclass(frozen=True)
class Scaled:
    """M = I / scale."""

    scale: float

    def gram(self, gradients: Gradients) -> Tensor:
        """N ``(B, B)``."""
        if gradients.factored is None:
            return self.scale * _sum(rows.flatten(1) @ rows.flatten(1).mT for rows in gradients.rows)
        z, g = gradients.factored
        return _products(z.mm(z.mT), g.mm(g.mT), gradients).mul_(self.scale)

    def squares(self, gradients: Gradients) -> Tensor:
        """The diagonal of N ``(B,)``."""
        if gradients.factored is None:
            return self.scale * _sum(rows.flatten(1).square().sum(1) for rows in gradients.rows)
        z, g = gradients.factored
        return _products(z.square().sum(1), g.square().sum(1), gradients).mul_(self.scale)


@dataclass(frozen=True)
class Diagonal:
    """M = 1 / scale, entry by entry: one tensor for each trained parameter.

    Where single gradients would fill too much memory, the scale of a matrix counts as the outer product of its means.
    """

    scales: Sequence[Tensor]

    def gram(self, gradients: Gradients) -> Tensor:
        """N ``(B, B)``."""
        factored = gradients.factored
        if factored is None or gradients.size <= _MANY:
            pairs = zip(gradients.rows, self.scales, strict=True)
            return _sum((rows * scale).flatten(1) @ rows.flatten(1).mT for rows, scale in pairs)
        z, g = factored
        N = torch.zeros_like(g @ g.mT)
        if gradients.weight:
            down, across = self._means()
            N = ((g * down) @ g.mT) * ((z * across) @ z.mT)
        return N + (g * self.scales[-1]) @ g.mT if gradients.bias else N

    def squares(self, gradients: Gradients) -> Tensor:
        """The diagonal of N ``(B,)``."""
        factored = gradients.factored
        if factored is None:
            pairs = zip(gradients.rows, self.scales, strict=True)
            return _sum((rows.square() * scale).flatten(1).sum(1) for rows, scale in pairs)
        z, g = factored
        n = ((g.square() @ self.scales[0]) * z.square()).sum(1) if gradients.weight else torch.zeros_like(g[:, 0])
        return n + (g.square() * self.scales[-1]).sum(1) if gradients.bias else n

    def _means(self) -> tuple[Tensor, Tensor]:
        scale = self.scales[0]
        down = scale.mean(1)
        return down, scale.mean(0) / down.mean()


@dataclass(frozen=True)
class Factored:
    """M^-1 = scale B^-1 (X) A^-1, with the bias as the last input: the metric of Kronecker factors.

    ``inputs`` is A^-1 ``(groups, a, a)``, ``outputs`` B^-1 ``(groups, b, b)``.
    """

    scale: float
    inputs: Tensor
    outputs: Tensor

    def gram(self, gradients: Gradients) -> Tensor:
        """N ``(B, B)``."""
        if gradients.factored is None:
            rows = _matrices(gradients.rows)
            rows = rows.reshape(len(rows), len(self.inputs), -1, rows.shape[-1])
            return self.scale * (self.outputs @ rows @ self.inputs).flatten(1) @ rows.flatten(1).mT
        z, g = gradients.factored
        z = functional.pad(z, (0, 1), value=1.0) if gradients.bias else z
        return self.scale * ((g @ self.outputs[0]) @ g.mT) * ((z @ self.inputs[0]) @ z.mT)

    def squares(self, gradients: Gradients) -> Tensor:
        """The diagonal of N ``(B,)``."""
        return self.gram(gradients).diagonal()


def _matrices(rows: Sequence[Tensor]) -> Tensor:
    """Weight and bias ``(..., b, *), (..., b)`` as one matrix ``(..., b, a)``, for rows of a leading axis."""
    weight = rows[0].flatten(2)
    return weight if len(rows) == 1 else torch.cat([weight, rows[1][..., None]], dim=-1)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _products(of_z: Tensor, of_g: Tensor, gradients: Gradients) -> Tensor:
    """Products of gradients g z^T from those of z and g, with the 1 of the bias."""
    if not gradients.weight:
        return of_g
    return torch.addcmul(of_g, of_g, of_z) if gradients.bias else of_g.mul_(of_z)
