"""Eigenbases of the Kronecker factors of a matrix's curvature: what they do to a matrix, and how they are made.

Shapes: a matrix M ``(groups, b, a)``, eigenvectors U_A ``(groups, a, r)`` of A and U_B ``(groups, b, q)`` of B. A has
at most as many eigenvalues above zero as there are samples, so that U_A may hold its leading eigenvectors alone; those
of a wide side always do. The directions outside of them, *the rest* of a side, share one second moment with
each direction of the other side. Products with so few vectors are thin; complete bases of a wide matrix would take
six whole ones in each iteration, each as much work as the gradient of as many samples as the matrix has rows.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.kronecker import Samples

# On plain nets of width 192 and more, leading bases reach a loss in half the time of complete ones; inside of Neural
# ODEs both are even there. 8 eigenvectors need more iterations than 16; more than 16 pay where the other side is short.
WIDEST = 160  # directions of a side up to which its eigenbasis is complete
LEADING = 16  # eigenvectors of a wider side that are kept beside one as wide
BESIDE_SHORT = 32  # and beside one that is not
MOST_OUTPUTS = 2048  # of a matrix (in a group) that has an eigenbasis at all: those of more are mostly vocabularies
RANK = 128  # eigenvectors of A that are kept at most where it comes from samples
TURNING = 8  # gradients by which eigenbases, made anew, turn so fast that one step would not follow them
KEEP = 0.5  # share of the old factors in a refresh from samples, or of a wide side


def is_wide(*widths: int) -> bool:
    """Whether sides have, each of them, so many directions that their leading eigenvectors alone are kept."""
    return min(widths) > WIDEST


def kept(width: int, other: int) -> int:
    """How many eigenvectors of a side are kept, given the width of the other side too."""
    if not is_wide(width):
        return width
    return min(width, LEADING if is_wide(other) else BESIDE_SHORT)


def is_leading(basis: "Basis") -> bool:
    """Whether a basis has as many vectors as are kept, other than one from before a side was wide."""
    (_, b, q), (_, a, r) = basis.output.vectors.shape, basis.input.vectors.shape
    return (q, r) == (kept(b, a), kept(a, b))


class Eigen(NamedTuple):
    """Leading eigenvectors ``(groups, d, r)`` and eigenvalues ``(groups, r)`` of a factor scaled to trace one.

    ``rests`` are the directions in the rest of each ``(groups, 1, 1)``, if some have fewer than d, and are padded.
    """

    vectors: Tensor
    values: Tensor
    rests: Tensor | None = None

    @property
    def is_part(self) -> bool:
        """Whether there is a rest."""
        return self.vectors.shape[-2] > self.vectors.shape[-1]

    @property
    def rest(self) -> int | Tensor:
        """The number of directions in the rest."""
        return self.vectors.shape[-2] - self.vectors.shape[-1] if self.rests is None else self.rests

    def multiplicities(self) -> Tensor:
        """How many directions each vector, and behind them the rest, is of: ``(1 or groups, 1, r + 1)``."""
        single = self.values.new_ones(1, 1, self.values.shape[-1])
        if not self.is_part:
            return single
        rest = single.new_full((1, 1, 1), self.rest) if isinstance(self.rest, int) else self.rest
        return torch.cat([single.expand(len(rest), -1, -1), rest], -1)

    def leading(self, count: int, of: Tensor) -> Tensor:
        """What is of the largest values, of ``(groups, ..., r)``: where vectors follow a factor they have no order."""
        if count >= self.values.shape[-1]:
            return of
        order = self.values.argsort(dim=-1, descending=True, stable=True)[:, :count]
        return of.take_along_dim(order[:, None], -1)

    def spectrum(self) -> Tensor:
        """The eigenvalues, and behind them their mean over the rest, if there is one."""
        if not self.is_part:
            return self.values
        outside = (1.0 - self.values.sum(-1, keepdim=True)).clamp(min=0.0) / self.rest
        return torch.cat([self.values, outside], -1)


class Turned(NamedTuple):
    """A matrix M and what a basis makes of it.

    ``core`` is U_B^T M U_A ``(..., q, r)``, ``left`` U_B^T M ``(..., q, a)`` where A has a rest, and ``right`` M U_A
    ``(..., b, r)`` where B has one, else None. ``total`` is |M|^2 ``(..., 1, 1)`` where that is known beforehand.
    """

    matrix: Tensor
    left: Tensor | None
    core: Tensor
    right: Tensor | None
    total: Tensor | None = None


class Basis(NamedTuple):
    """Eigenbases of A and B, perhaps their leading parts alone.

    Second moments belong to directions: ``(groups, q + 1, r + 1)``, whose last row and column are means over the rest
    of B and A, and missing where there is none.
    """

    input: Eigen
    output: Eigen

    @property
    def is_complete(self) -> bool:
        """Whether there is no rest on either side."""
        return not self.input.is_part and not self.output.is_part

    def turn(
        self,
        matrix: Tensor,
        out: Sequence[Tensor | None] = (None, None, None),
        known: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Turned:
        """U_B^T M U_A, and U_B^T M and M U_A where there are rests.

        ``out`` may be memory for left, core and right, and ``known`` left and right where they are at hand.
        """
        UA, UB, (left, right) = self.input.vectors, self.output.vectors, known
        if left is None:
            left = torch.bmm(UB.mT, matrix, out=out[0])
        if right is None and self.output.is_part:
            right = torch.bmm(matrix, UA, out=out[2])
        return Turned(matrix, left if self.input.is_part else None, torch.bmm(left, UA, out=out[1]), right)

    def spectrum(self) -> Tensor:
        """Eigenvalues E_B E_A^T of the curvature, laid out as second moments."""
        return self.output.spectrum()[..., :, None] * self.input.spectrum()[..., None, :]

    def squares(self, turned: Turned) -> Tensor:
        """Squared entries of a turned matrix, laid out as second moments."""
        squares = inside = turned.core.square()
        if self.is_complete:
            return squares
        if turned.left is not None:
            beside, lengths = self.input.rest, _sums_of_squares(turned.left, -1)
            squares = torch.cat([squares, (lengths - inside.sum(-1, keepdim=True)) / beside], -1)
        if turned.right is not None:
            below = self.output.rest
            outside = (_sums_of_squares(turned.right, -2) - inside.sum(-2, keepdim=True)) / below
            if turned.left is not None:
                total = _sums_of_squares(turned.matrix, (-2, -1)) if turned.total is None else turned.total
                corner = ((total - lengths.sum(-2, keepdim=True)) / below - outside.sum(-1, keepdim=True)) / beside
                outside = torch.cat([outside, corner], -1)
            squares = torch.cat([squares, outside], -2)
        return squares.clamp_(min=0.0)

    def inside(self, moments: Tensor) -> Tensor:
        """Second moments of the leading part ``(groups, q, r)``."""
        return moments[..., : self.output.vectors.shape[-1], : self.input.vectors.shape[-1]]

    def totals(self, moments: Tensor) -> Tensor:
        """Sums of second moments over all directions ``(groups, 1, 1)``: the trace of the curvature."""
        return (moments * self.multiplicities()).sum((-2, -1), keepdim=True)

    def multiplicities(self) -> Tensor:
        """How many directions each second moment is of."""
        return self.output.multiplicities().mT * self.input.multiplicities()

    def scaled(self, turned: Turned, scales: Tensor, out: Tensor | None = None) -> Tensor:
        """U_B (S o U_B^T M U_A) U_A^T of a turned matrix M, with both bases completed by their rest.

        With scales S, laid out as second moments, the rests as factors of all of M, and of its leading parts what these
        have beyond them:
        S_rr M + U_B (S_l - S_rr) U_B^T M + M U_A (S_r - S_rr) U_A^T + U_B (S_c - S_l - S_r + S_rr) U_B^T M U_A U_A^T.

        The scales are used up. ``out`` is memory for it, of the matrix's shape, that may be used.
        """
        UA, UB = self.input.vectors, self.output.vectors
        if self.is_complete:
            return torch.bmm(UB, torch.bmm(scales.mul_(turned.core), UA.mT), out=out)
        q, r = UB.shape[-1], UA.shape[-1]
        inner, beside = scales[..., :q, :], scales[..., r:]
        if turned.right is not None:
            inner.sub_(scales[..., q:, :])
        if turned.left is not None:
            scales[..., :r].sub_(beside)
        part = torch.bmm(inner[..., :r] * turned.core, UA.mT)
        if turned.left is not None:
            part.addcmul_(inner[..., r:], turned.left)
        if turned.right is None:
            return torch.bmm(UB, part, out=out)
        # one product of twice the rank reads and writes the matrix once
        pair = torch.cat([UB, scales[..., q:, :r] * turned.right], -1), torch.cat([part, UA.mT], -2)
        if turned.left is None:
            return torch.bmm(*pair, out=out)
        return torch.mul(turned.matrix, beside[..., q:, :], out=out).baddbmm_(*pair)


def _sums_of_squares(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Sums of squares, without their squares in memory."""
    return torch.linalg.vector_norm(matrix, dim=dim, keepdim=True).square()


def eigenbasis(samples: Samples, rank: int, old: Basis | None = None, keep: float = 0.0) -> Basis:
    """Eigenbasis of the factors of some samples, averaged with the factors behind an old basis.

    Args:
        samples: of one layer.
        rank: how many eigenvectors of A to keep at most.
        old: weighs ``keep`` in the average, the samples 1 - keep.
        keep: see ``old``.

    >>> eye = torch.eye(2)[None]
    >>> eigenbasis(Samples(eye * torch.tensor([1.0, 3.0]), eye), rank=2).input.values
    tensor([[0.9000, 0.1000]])
    """
    a, b = samples.inputs.shape[-1], samples.gradients.shape[-1]
    return Basis(
        of_rows(samples.inputs, min(rank, kept(a, b)), old and old.input, keep),
        of_rows(samples.gradients, kept(b, a), old and old.output, keep),
    )


def of_rows(rows: Tensor, rank: int, old: Eigen | None, keep: float) -> Eigen:
    """Leading eigenvectors of rows^T rows, for rows ``(groups, k, d)``, averaged with the factor behind old ones.

    ``rank`` of them are kept at most; 4 to 8 times as many rows are enough where that is a part.
    """
    if rows.shape[-1] > rank:
        rows = rows[:, :: max(1, rows.shape[1] // (4 * rank))]
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)  # or squares of small ones would be zero
    rows = rows / torch.linalg.matrix_norm(rows, keepdim=True).clamp(min=tiny)
    if old is not None:
        kept = (keep * old.values).sqrt()[..., None] * old.vectors.mT
        rows = torch.cat([kept, (1.0 - keep) ** 0.5 * rows], -2)
    if rows.shape[-2] < rows.shape[-1] and rank < rows.shape[-1]:
        # Fewer rows than directions: a small eigenproblem in the span of the rows, by a stable route.
        span, triangle = torch.linalg.qr(rows.mT)
        values, small = eigh(triangle @ triangle.mT)
        vectors = span @ small.flip(-1)[..., :rank]
    else:
        values, vectors = eigh(rows.mT @ rows)
        vectors = vectors.flip(-1)[..., :rank].contiguous()
    return Eigen(vectors, values.flip(-1)[..., :rank].clamp(min=0.0))


def follow(matrix: Tensor, old: Eigen | None, other: Eigen | None, seen: Tensor | None = None) -> Eigen:
    """Leading eigenvectors of M^T M, averaged with the factor behind old ones, for a wide M ``(groups, b, a)``.

    Of M the rows U_B^T M alone are seen, with U_B the ``other`` side's eigenvectors; both sides in turn make that the
    power method. They may be ``seen`` already. Without the other side's they are random mixtures.
    """
    b, a = matrix.shape[1:]
    rank = kept(a, b)
    if other is None:
        generator = torch.Generator().manual_seed(0)  # the same in all processes, and in a run that is resumed
        rows = torch.randn(b, rank, generator=generator).to(matrix).mT @ matrix
    elif seen is None:
        rows = other.leading(rank, other.vectors).mT @ matrix
    else:
        rows = other.leading(rank, seen.mT).mT
    leading = old and Eigen(old.vectors[..., :rank], old.values[..., :rank])
    known = rows.shape[-2] + (0 if leading is None else leading.values.shape[-1])
    if known < rank:  # a row of zeros stands for any other direction
        rows = torch.nn.functional.pad(rows, (0, 0, 0, rank - known))
    return of_rows(rows, rank, leading, KEEP)


def complete(factor: Tensor) -> Eigen:
    """All eigenvectors of a factor ``(groups, d, d)``."""
    values, vectors = eigh(_of_trace_one(factor))
    return Eigen(vectors.flip(-1).contiguous(), values.flip(-1).clamp(min=0.0))


def tracked(factor: Tensor, old: Tensor) -> Eigen:
    """All eigenvectors of a factor ``(groups, d, d)`` that has changed a little, from those of before.

    One step of orthogonal iteration, which takes half the time of :func:`complete`.
    """
    span, triangle = torch.linalg.qr(_of_trace_one(factor) @ old)
    values = triangle.diagonal(dim1=-2, dim2=-1).abs()
    if not bool(values.isfinite().all()):
        return complete(factor)  # which says so
    return Eigen(span.contiguous(), values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny))


def _of_trace_one(factor: Tensor) -> Tensor:
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(factor.dtype).tiny)
    return factor / trace[:, None, None]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of symmetric matrices ``(..., d, d)`` of trace one.

    Raises:
        LinAlgError: there are none in double precision either.
    """
    # entries that are nothing beside rounding let single precision end in NaN; nearly equal eigenvalues, without an end
    matrix = matrix.masked_fill(matrix.abs() <= torch.finfo(matrix.dtype).eps ** 2, 0.0)
    for precise in (matrix, matrix.double()):
        with suppress(torch.linalg.LinAlgError):
            values, vectors = torch.linalg.eigh(precise)
            if bool(vectors.isfinite().all()):
                return values.to(matrix), vectors.to(matrix)
    raise torch.linalg.LinAlgError("the eigenvectors of a factor are NaN, or were not found, in double precision too")


def first_moments(basis: Basis, gradient: Tensor) -> Tensor:
    """Second moments to start from: the spectrum of the curvature, in the units of the squared gradient."""
    squares, spectrum = basis.squares(basis.turn(gradient)), basis.spectrum()
    inside, shape = basis.inside(squares), basis.inside(spectrum)
    tiny = torch.finfo(shape.dtype).tiny
    moments = spectrum * (inside.sum((-2, -1), keepdim=True) / shape.sum((-2, -1), keepdim=True).clamp(min=tiny))
    if basis.input.is_part:
        moments[..., -1] = squares[..., -1]
    if basis.output.is_part:
        moments[..., -1, :] = squares[..., -1, :]
    return moments


def carried_moments(moments: Tensor, old: Basis, new: Basis) -> Tensor:
    """Second moments in a new eigenbasis.

    Entries that are uncorrelated in the old basis, with second moments s, have in the new one the second moments
    (R_B o R_B) s (R_A o R_A)^T with R_A = U_A'^T U_A, R_B = U_B'^T U_B, and means of those over the rests.
    """
    if new.output.vectors is not old.output.vectors:
        moments = _mixing(old.output, new.output) @ moments
    return moments if new.input.vectors is old.input.vectors else moments @ _mixing(old.input, new.input).mT


def _mixing(old: Eigen, new: Eigen) -> Tensor:
    """How much of each old direction is in each new one, ``(groups, r' + 1, r + 1)`` where both have a rest."""
    mixing = (new.vectors.mT @ old.vectors).square()
    if old.is_part:
        mixing = torch.cat([mixing, (1.0 - mixing.sum(-1, keepdim=True)).clamp(min=0.0)], -1)
    if new.is_part:
        left = (old.multiplicities() - mixing.sum(-2, keepdim=True)).clamp(min=0.0)
        mixing = torch.cat([mixing, left / new.rest], -2)
    return mixing
