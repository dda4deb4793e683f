"""Which matrices lie in one stack, and where: padded with zeros to one size, some of them transposed."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from ocnopt.optim.bases import is_wide, kept
from ocnopt.optim.blocks import Block

MOST_WIDE = 4  # wide matrices in one stack: where some have no gradient, all the stack is worked on
PADDING = 2**19  # of _work(), what a matrix may do in vain to be in a stack: about what the calls of another one take


class Bin(NamedTuple):
    """Matrices that lie in one stack, with its rows and columns, and whether each is transposed there."""

    rows: int
    columns: int
    members: tuple[tuple[Block, bool], ...]

    def joined(self, block: Block) -> "Bin | None":
        """Also with another matrix; None if too much would be done in vain, or a wide one does not fit."""
        _, b, a = block.shape
        if is_wide(max(self.rows, self.columns, b, a)):
            rows, columns, is_transposed = _lain(block)
            is_equal = (rows, columns) == (self.rows, self.columns)
            # the columns of those that are wide on one side may be padded
            may_join = is_equal or (rows == self.rows and is_wide(self.columns, columns) and not is_wide(rows))
            wider = Bin(rows, max(self.columns, columns), (*self.members, (block, is_transposed)))
            return wider if may_join and len(self.members) < MOST_WIDE and wider.is_good() else None
        for is_transposed in (b > a, b <= a):
            own = (a, b) if is_transposed else (b, a)
            wider = Bin(max(self.rows, own[0]), max(self.columns, own[1]), (*self.members, (block, is_transposed)))
            if wider.is_good():
                return wider
        return None

    def is_good(self) -> bool:
        """Whether each matrix may lie there."""
        own = _work(self.rows, self.columns)
        for (groups, b, a), is_transposed in ((block.shape, is_transposed) for block, is_transposed in self.members):
            # the parts of several groups are views, in which the groups are one behind the other
            if groups * (own - _work(b, a)) > PADDING or (groups > 1 and (is_transposed or b < self.rows)):
                return False
        return True


def arranged(blocks: Iterable[Block]) -> list[Bin]:
    """Matrices in as few stacks as is worth it, each time in the first one that takes them, the largest first."""
    found: list[Bin] = []
    for block in sorted(blocks, key=lambda block: -_work(*block.shape[1:])):
        for i, one in enumerate(found):
            if (wider := one.joined(block)) is not None:
                found[i] = wider
                break
        else:
            rows, columns, is_transposed = _lain(block)
            found.append(Bin(rows, columns, ((block, is_transposed),)))
    return found


def can_be_joined(block: Block) -> bool:
    """Whether a matrix may be in a stack of several: where one side is wide, it lies along the columns."""
    rows, columns, _ = _lain(block)
    return is_wide(rows, columns) or not is_wide(rows)


def _lain(block: Block) -> tuple[int, int, bool]:
    """Rows and columns of a matrix that lies along its longer side if it may, and whether it is transposed for it."""
    groups, b, a = block.shape
    is_transposed = groups == 1 and b > a and not is_wide(a, b)
    return (a, b, True) if is_transposed else (b, a, False)


def _work(rows: int, columns: int) -> int:
    """Of the products with the eigenvectors of both sides."""
    return rows * columns * (kept(rows, columns) + kept(columns, rows))


class Place(NamedTuple):
    """Where a matrix lies in a stack of several: in which slices, and whether transposed."""

    block: Block
    at: slice
    is_transposed: bool

    @property
    def lain(self) -> tuple[int, int]:
        """Its rows and columns there."""
        rows, columns = self.block.shape[1:]
        return (columns, rows) if self.is_transposed else (rows, columns)

    def matrix(self, of: Tensor) -> Tensor:
        """The matrix there."""
        rows, columns = self.lain
        there = of[self.at, :rows, :columns]
        return there.mT if self.is_transposed else there

    def side(self, of: Tensor, width: int) -> Tensor:
        """What belongs to one side, ``(groups, width, ..., width)``, there; less of it where fewer are kept."""
        return of[(self.at, *[slice(width)] * (of.ndim - 1))]


class Member(NamedTuple):
    """A parameter of a stack of several: of which matrix, its number, and where its parts lie."""

    parameter: Tensor
    owner: int
    number: int
    step: Tensor
    momentum: Tensor
    change: Tensor
