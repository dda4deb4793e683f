r"""A path in stretches, and the way back over them.

The control is constant on each of N equal intervals (without staged controls: one interval, m = 0). Backward passes
integrate x backward too. So that it never drifts off the path, the walk forward keeps its state at the ends of
*stretches*, cut where the way back could amplify errors by about e: the growth over a step is |h| rho with
rho = |k_7 - k_6| / |y_7 - y_6| from the last two stages of the method, both at the step's end (Hairer and Wanner,
Solving ODEs II, IV.2). Smooth problems need few stretches, whatever the tolerance.

A *block* is a tensor that is integrated: x ``(*batch, n)`` and what travels with it. A model of the cost-to-go brings
the blocks that its own equation of motion reads; the rest of it (derivatives in p) is a quadrature along the way, for
which every evaluation leaves a *gather* behind, called with the weight of its stage once the step is accepted. Step
control sees such a quadrature through a *witness*: one number, integrated with the blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ocnopt.differential.flow import Flow
from ocnopt.integrate.adaptive import integrate
from ocnopt.integrate.runge_kutta import Field, Stages, Time, step
from ocnopt.integrate.tableaus import DOPRI5, Tableau
from ocnopt.integrate.walk import OnStep, Step, Walk

Rates = Callable[..., Sequence[Tensor]]
Gather = Callable[[float], object]


@dataclass(frozen=True, eq=False)
class Packing:
    """Several tensors, shaped like ``blocks``, as one flat vector; ``rows`` of a block belong to different samples."""

    blocks: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Sequence[Tensor], batch: tuple[int, ...]) -> "Packing":
        """Blocks that start with the batch's axes belong to samples; all samples share the others, rows 1."""
        owned = [bool(batch) and block.shape[: len(batch)] == batch for block in blocks]
        rows = tuple(math.prod(batch) if own else 1 for own in owned)
        return cls(tuple(blocks), tuple(block.numel() for block in blocks), rows)

    def pack(self, blocks: Sequence[Tensor]) -> Tensor:
        """One flat vector."""
        return _flatten_dense_tensors(blocks)

    def unpack(self, y: Tensor, count: int | None = None) -> list[Tensor]:
        """The first blocks, or all of them, as views."""
        return [*map(Tensor.view_as, y.split_with_sizes(self.sizes)[:count], self.blocks)]

    def root_mean_squares(self, y: Tensor) -> list[Tensor]:
        """One number per sample, for each block that is not empty."""
        blocks = [block.reshape(r, -1) for block, r in zip(self.unpack(y), self.rows, strict=True) if block.numel()]
        return [torch.linalg.vector_norm(block, dim=-1) / math.sqrt(block.shape[-1]) for block in blocks]

    def norm(self, y: Tensor) -> Tensor:
        """The worst block of the worst sample: neither a large block nor easy samples hide the error of another."""
        return torch.stack([means.amax() for means in self.root_mean_squares(y)]).amax()


class Stretch(NamedTuple):
    """Part of the path: the control there, the blocks at its end, and the length of the last step before it.

    ``opens`` and ``closes`` say whether its control's interval starts and ends with it.
    """

    start: float
    end: float
    u: Tensor
    blocks: tuple[Tensor, ...]
    size: float
    opens: bool
    closes: bool


class ContinuousPath(NamedTuple):
    """The blocks at the end of the path, and its stretches."""

    end: tuple[Tensor, ...]
    stretches: list[Stretch]


class _Cutter:
    """Cuts an interval into stretches while it is walked; ``kept`` blocks are stored."""

    def __init__(self, packing: Packing, kept: int, times: tuple[float, float], u: Tensor) -> None:
        self.packing, self.kept, self.u = packing, kept, u
        self.start, self.stop = times
        self.growth = 0.0
        self.stretches: list[Stretch] = []

    def __call__(self, step: Step) -> None:
        points, slopes = step.stages.points, step.stages.slopes
        moved, turned = (self.packing.root_mean_squares(y[-1] - y[-2])[: self.kept] for y in (points, slopes))
        ratios = [torch.where(dy > 0, dk / dy, 0.0).amax() for dy, dk in zip(moved, turned, strict=True)]
        self.growth += abs(step.size) * float(torch.stack(ratios).amax())
        closes = step.output is not None
        if not closes and self.growth < 1.0:
            return
        end = self.stop if closes else step.time + step.size
        blocks = tuple(block.clone() for block in self.packing.unpack(points[-1])[: self.kept])
        opens = not self.stretches
        self.stretches.append(Stretch(self.start, end, self.u, blocks, abs(step.size), opens, closes))
        self.start, self.growth = end, 0.0


@torch.no_grad()
def walk(flow: Flow, controls: Tensor, rates: Rates, start: Sequence[Tensor], kept: int) -> ContinuousPath:
    """Integrate blocks forward, u = ``controls[..., k, :]`` on the k-th of N equal intervals.

    Args:
        flow: the problem.
        controls: ``(*batch, N, m)``.
        rates: ``rates(flow with this u, t, *blocks)``, the blocks' derivatives in time.
        start: the blocks at the start.
        kept: how many of them, from the first, the stretches store for the way back.
    """
    N, t0, t1 = controls.shape[-2], flow.lifted.t0, flow.lifted.t1
    packing = Packing.of(start, flow.batch)
    y, size = packing.pack(start), None
    stretches: list[Stretch] = []
    for k, u in enumerate(controls.unbind(-2)):
        times = (t0 + (t1 - t0) * k / N, t0 + (t1 - t0) * (k + 1) / N)
        cutter, here = _Cutter(packing, kept, times, u), flow.at(u)

        def field(t: float | Tensor, y: Tensor, here: Flow = here) -> Tensor:
            return packing.pack(rates(here, t, *packing.unpack(y)))

        walked = integrate(
            field, y, times, rtol=flow.rtol, atol=flow.atol, norm=packing.norm, first_size=size, on_step=cutter
        )
        y, size = walked.states[-1], walked.next_size
        stretches += cutter.stretches
    return ContinuousPath(tuple(packing.unpack(y)), stretches)


def trace(flow: Flow, controls: Tensor) -> tuple[ContinuousPath, Tensor]:
    """Walk the state alone; the path and every sample's cost ``(*batch)``."""
    x = flow.lifted.initial_state
    cost = [x.new_zeros(flow.batch)] if flow.has_running_cost else []
    path = walk(flow, controls, Flow.rates, (x, *cost), kept=1)
    with torch.no_grad():
        terminal = flow.lifted.terminal_cost(path.end[0], flow.p)
    return ContinuousPath(path.end[:1], path.stretches), terminal + sum(path.end[1:])


class Readout(NamedTuple):
    """Derivatives in the control of one interval: u ``(..., m)``, uu ``(..., m, m)``, ux ``(..., m, n)``."""

    u: Tensor
    uu: Tensor
    ux: Tensor


@runtime_checkable
class Model(Protocol):
    """A local model of Q, the cost from a place on, in x and p: a frozen record; some fields are integrated."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    integrated: ClassVar[tuple[str, ...]]

    @property
    def rates(self) -> Callable[..., tuple[Sequence[Tensor], Gather]]:
        """``rates(field, t, *blocks, wanted=)``: derivatives in time of the path's blocks and its own, and a gather.

        The last of the model's blocks is its witness, which no rate reads and which is not handed over. The gather adds
        to what is not integrated; it is never called where nothing is ``wanted``.
        """

    def widen(self, m: int) -> Any:
        """At the end of an interval: Q in X = (x, u), which does not depend on u yet."""

    def narrow(self, n: int) -> tuple[Any, Readout | None]:
        """At its start: Q in x again, and the derivatives in u, read out."""


M = TypeVar("M", bound=Model)


def blocks_of(model: Model) -> list[Tensor]:
    """What is integrated of a model."""
    return [getattr(model, name) for name in model.integrated]


def carry(
    model: M,
    field: Any,
    kept: Sequence[Tensor],
    times: tuple[float, float],
    *,
    packing: Packing,
    tableau: Tableau,
    integrate: Callable[..., Walk],
    on_step: OnStep | None = None,
) -> M:
    """Carry a model over a stretch of continuous time, from its end to its start.

    Args:
        model: the model at the end.
        field: what moves the path; the model's ``rates`` differentiate it.
        kept: the path's own blocks at the end.
        times: end and start.
        packing: of the path's blocks and the model's.
        tableau: the method that ``integrate`` uses.
        integrate: walks over the stretch; it is told the slope at the end and how to take a step.
        on_step: called with every accepted step besides.
    """
    # Of the step being taken, one for each stage evaluated so far; the first may be the last of the step before.
    gathers: list[Gather] = []
    wanted = [b != 0.0 for b in tableau.b]
    wanted[-1] |= tableau.first_same_as_last

    def joint(t: Time, y: Tensor) -> Tensor:
        rates, gather = model.rates(field, t, *packing.unpack(y, -1), wanted=wanted[len(gathers)])
        gathers.append(gather)
        return packing.pack(rates)

    def take(
        method: Tableau, slope: Field, t: Time, h: float, y: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Stages]:
        del gathers[first is not None :]
        return step(method, slope, t, h, y, first)

    def accept(taken: Step) -> None:
        for b, gather in zip(tableau.b, gathers, strict=True):
            if b != 0.0:
                gather(-taken.size * b)
        del gathers[:-1]
        if on_step is not None:
            on_step(taken)

    y = packing.pack((*kept, *blocks_of(model)))
    walked = integrate(joint, y, times, first=joint(times[0], y), on_step=accept, take=take)
    blocks = packing.unpack(walked.states[-1])[len(kept) :]
    return replace(model, **dict(zip(model.integrated, blocks, strict=True)))


@torch.no_grad()
def back(flow: Flow, stretch: Stretch, model: M) -> tuple[M, Readout | None]:
    """The step of the sweep: a model of Q over one stretch of the path."""
    model = model.widen(stretch.u.shape[-1]) if stretch.closes else model
    packing = Packing.of((*stretch.blocks, *blocks_of(model)), flow.batch)
    walks = partial(
        integrate, tableau=DOPRI5, rtol=flow.rtol, atol=flow.atol, norm=packing.norm, first_size=stretch.size
    )
    times = (stretch.end, stretch.start)
    model = carry(model, flow.at(stretch.u), stretch.blocks, times, packing=packing, tableau=DOPRI5, integrate=walks)
    return model.narrow(flow.n) if stretch.opens else (model, None)
