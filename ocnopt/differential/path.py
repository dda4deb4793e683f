r"""A path in pieces, and the way back along them.

The control is constant on each of N equal intervals (without staged controls: one interval, m = 0). Backward passes
integrate x backward too. So that it never drifts off the path, the walk forward leaves its state at the ends of
*pieces*, cut where the way back could amplify errors by about e: the growth over a step is |h| rho with
rho = |k_7 - k_6| / |y_7 - y_6| from the last two stages of the method, both at the step's end (Hairer and Wanner,
Solving ODEs II, IV.2). Smooth problems need few pieces, whatever the tolerance.

A *block* is a tensor that is integrated: x ``(*batch, n)`` and what travels with it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ocnopt.differential.flow import Flow
from ocnopt.differential.packing import Packing
from ocnopt.differential.sweep import sweep
from ocnopt.integrate.adaptive import integrate
from ocnopt.integrate.tableaus import DOPRI5
from ocnopt.integrate.walk import Step

Rates = Callable[..., Sequence[Tensor]]
OnStage = Callable[..., None]


class Piece(NamedTuple):
    """Part of the path: the control there, the blocks at its end, and the length of the last step before it."""

    start: float
    end: float
    u: Tensor
    blocks: tuple[Tensor, ...]
    size: float


class Path(NamedTuple):
    """The blocks at the end of the path, and its pieces, by control interval."""

    end: tuple[Tensor, ...]
    intervals: list[list[Piece]]

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in order."""
        return [piece for interval in self.intervals for piece in interval]


class _Cutter:
    """Cuts an interval into pieces while it is walked; ``kept`` blocks are stored."""

    def __init__(self, packing: Packing, kept: int, times: tuple[float, float], u: Tensor) -> None:
        self.packing, self.kept, self.u = packing, kept, u
        self.start, self.stop = times
        self.growth = 0.0
        self.pieces: list[Piece] = []

    def __call__(self, step: Step) -> None:
        points, slopes = step.stages.points, step.stages.slopes
        moved, turned = (self.packing.root_mean_squares(y[-1] - y[-2])[: self.kept] for y in (points, slopes))
        ratios = [torch.where(dy > 0, dk / dy, 0.0).amax() for dy, dk in zip(moved, turned, strict=True)]
        self.growth += abs(step.size) * float(torch.stack(ratios).amax())
        if step.output is None and self.growth < 1.0:
            return
        end = self.stop if step.output is not None else step.time + step.size
        blocks = tuple(block.clone() for block in self.packing.unpack(points[-1])[: self.kept])
        self.pieces.append(Piece(self.start, end, self.u, blocks, abs(step.size)))
        self.start, self.growth = end, 0.0


@torch.no_grad()
def walk(flow: Flow, controls: Tensor, rates: Rates, start: Sequence[Tensor], kept: int) -> Path:
    """Integrate blocks forward, u = ``controls[..., k, :]`` on the k-th of N equal intervals.

    Args:
        flow: the problem.
        controls: ``(*batch, N, m)``.
        rates: ``rates(t, u, *blocks)``, the blocks' derivatives in time.
        start: the blocks at the start.
        kept: how many of them, from the first, the pieces store for the way back.
    """
    N, t0, t1 = controls.shape[-2], flow.lifted.t0, flow.lifted.t1
    packing = Packing.of(start, flow.batch)
    y, size, intervals = packing.pack(start), None, []
    for k, u in enumerate(controls.unbind(-2)):
        times = (t0 + (t1 - t0) * k / N, t0 + (t1 - t0) * (k + 1) / N)
        cutter = _Cutter(packing, kept, times, u)

        def field(t: float | Tensor, y: Tensor, u: Tensor = u) -> Tensor:
            return packing.pack(rates(t, u, *packing.unpack(y)))

        walked = integrate(
            field, y, times, rtol=flow.rtol, atol=flow.atol, norm=packing.norm, first_size=size, on_step=cutter
        )
        y, size = walked.state, walked.next_size
        intervals.append(cutter.pieces)
    return Path(tuple(packing.unpack(y)), intervals)


def trace(flow: Flow, controls: Tensor) -> tuple[Path, Tensor]:
    """Walk the state alone; the path and every sample's cost ``(*batch)``."""

    def rates(t: float, u: Tensor, x: Tensor, *cost: Tensor) -> list[Tensor]:
        X = torch.cat([x, u], dim=-1)
        return [flow.dynamics(t, X, flow.p), *(flow.running_cost(t, X, flow.p) for _ in cost)]

    x = flow.lifted.initial_state
    cost = [x.new_zeros(flow.batch)] if flow.has_running_cost else []
    path = walk(flow, controls, rates, (x, *cost), kept=1)
    with torch.no_grad():
        terminal = flow.lifted.terminal_cost(path.end[0], flow.p)
    return Path(path.end[:1], path.intervals), terminal + sum(path.end[1:])


@torch.no_grad()
def walk_back(
    flow: Flow, piece: Piece, rates: Rates, blocks: Sequence[Tensor], on_stage: OnStage | None = None
) -> list[Tensor]:
    """Integrate the blocks of a piece and further ones from its end to its start.

    Args:
        flow: the problem.
        piece: where.
        rates: ``rates(t, *piece.blocks, *blocks)``, the derivatives in time of all of them.
        blocks: the further blocks at the end.
        on_stage: ``on_stage(weight, t, *piece.blocks, *blocks)`` sees the stages of every accepted step; summed with
            the weights they make an integral over the piece, to the order of the method.

    Returns:
        The further blocks at the start.
    """
    start = (*piece.blocks, *blocks)
    packing = Packing.of(start, flow.batch)

    def see(step: Step) -> None:
        for b, t, y in zip(DOPRI5.b, step.stages.times, step.stages.points, strict=True):
            if on_stage is not None and b != 0.0:
                on_stage(abs(step.size) * b, t, *packing.unpack(y))

    walked = integrate(
        lambda t, y: packing.pack(rates(t, *packing.unpack(y))),
        packing.pack(start),
        (piece.end, piece.start),
        tableau=DOPRI5,
        rtol=flow.rtol,
        atol=flow.atol,
        norm=packing.norm,
        first_size=piece.size,
        on_step=None if on_stage is None else see,
    )
    return packing.unpack(walked.state)[len(piece.blocks) :]


class Readout(NamedTuple):
    """Derivatives in the control of one interval: u ``(..., m)``, uu ``(..., m, m)``, ux ``(..., m, n)``."""

    u: Tensor
    uu: Tensor
    ux: Tensor


V = TypeVar("V")


def backward(
    flow: Flow,
    path: Path,
    terminal: V,
    *,
    widen: Callable[[V, int], V],
    carry: Callable[[Piece, V], V],
    narrow: Callable[[V, int], tuple[V, Readout]],
) -> tuple[V, list[Readout]]:
    """Fold the intervals of a path, and the pieces of each.

    Args:
        flow: the problem.
        path: its path.
        terminal: the value at the end: a local model of Q, the cost from there on, in x.
        widen: ``widen(value, m)`` at the end of an interval: a model in X = (x, u), which does not depend on u yet.
        carry: ``carry(piece, value at its end) -> value at its start``.
        narrow: ``narrow(value, n)`` at the start of an interval: a model in x, and the derivatives in u, read out.
    """

    def over_interval(pieces: list[Piece], value: V) -> tuple[V, Readout]:
        wide = widen(value, pieces[-1].u.shape[-1])
        value, _ = sweep(lambda piece, value: (carry(piece, value), None), pieces, wide)
        return narrow(value, flow.n)

    return sweep(over_interval, path.intervals, terminal)
