"""Pictures of a system along a solution: a problem says how one instant looks, all else follows.

A picture overlays a few instants, faint at first; an animation shows them all, at an even pace. Both share one frame
around everything that moves. Matplotlib is imported where it is used; a function that draws calls methods of the axes.

Shapes: state ``(n,)``, control ``(m,)``; over F instants times ``(F,)``, states ``(F, n)``, controls ``(F, m)``.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Axes = Any  # of matplotlib
Point = Sequence[float]

# Okabe and Ito's colours, as in the plots of states and controls
BODY, FORCE, GOAL, FIXED, INK = "#0072b2", "#d55e00", "#009e73", "#6b7480", "#1b1f24"
_PACE, _HELD, _DPI, _WIDTH = 12, 6, 72, 6.4  # frames a second, frames at the end, dots an inch, inches


@dataclass(frozen=True, eq=False)
class Drawing:
    """How a system looks.

    Args:
        frame: ``frame(axes, state, control, time)`` draws one instant.
        backdrop: ``backdrop(axes)`` draws once what does not move.
        trace: ``trace(times, states) -> (F, 2)``, a point whose path is drawn.
        x: label of the horizontal axis; none hides both axes.
        y: label of the vertical axis.
        equal: whether both axes have one scale.
        instants: how many a picture overlays.
    """

    frame: Callable[[Axes, Tensor, Tensor, float], None]
    backdrop: Callable[[Axes], None] | None = None
    trace: Callable[[Tensor, Tensor], Tensor] | None = None
    x: str = ""
    y: str = ""
    equal: bool = True
    instants: int = 7


def picture(drawing: Drawing, solution: Any) -> Any:
    """A matplotlib figure of the system at a few instants.

    Args:
        drawing: of the problem.
        solution: of one problem, no batch.
    """
    times, states, controls = instants(solution, drawing.instants)
    figure, axes = _stage(drawing, solution)
    _path(axes, drawing, solution)
    for i, time in enumerate(times.tolist()):
        before = set(axes.get_children())
        drawing.frame(axes, states[i], controls[i], time)
        share = 0.2 + 0.8 * (i / max(len(times) - 1, 1)) ** 2
        for artist in set(axes.get_children()) - before:
            artist.set_alpha(share * (artist.get_alpha() or 1.0))
    axes.set_title(f"{len(times)} instants, the last one darkest", fontsize="small", color=FIXED, loc="left")
    return figure


def animation(drawing: Drawing, solution: Any, *, frames: int = 40) -> bytes:
    """A GIF of the system from start to end.

    Args:
        drawing: of the problem.
        solution: of one problem, no batch.
        frames: how many; the last one stays for a moment.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    times, states, controls = instants(solution, frames)
    figure, axes = _stage(drawing, solution)
    _path(axes, drawing, solution, alpha=0.35)
    title = axes.set_title("t", fontsize="small", color=FIXED, loc="left", y=1.01)
    unit = "step {:.0f}" if solution.is_numbered else "t = {:.2f}"
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # one layout for all frames: to find it takes longer than to draw one
    fixed = set(axes.get_children())

    def show(i: int) -> list[Any]:
        for artist in set(axes.get_children()) - fixed:
            artist.remove()
        drawing.frame(axes, states[i], controls[i], float(times[i]))
        title.set_text(unit.format(float(times[i])))
        return []

    shown = [*range(frames), *[frames - 1] * _HELD]
    film = FuncAnimation(figure, show, frames=shown, init_func=list)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.gif"
        film.save(path, writer=PillowWriter(fps=_PACE), dpi=_DPI)
        return path.read_bytes()


def instants(solution: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times, states and controls at evenly spaced instants: states on lines between nodes, the control of each step.

    Args:
        solution: of one problem, no batch.
        count: how many, both ends included.
    """
    nodes = solution.times.detach().cpu().double()
    states, controls = solution.states.detach().cpu().double(), solution.controls.detach().cpu().double()
    last = len(nodes) - 2
    place = torch.linspace(0, last + 1, count, dtype=torch.float64)
    step = place.long().clamp(max=last)
    share = (place - step)[:, None]
    between = states[step] + share * (states[step + 1] - states[step])
    return nodes[0] + (nodes[-1] - nodes[0]) * place / (last + 1), between, controls[step]


def _path(axes: Axes, drawing: Drawing, solution: Any, alpha: float = 0.6) -> None:
    if drawing.trace is not None:
        points = drawing.trace(solution.times.detach().cpu(), solution.states.detach().cpu())
        axes.plot(points[:, 0].tolist(), points[:, 1].tolist(), color=FIXED, lw=1.0, alpha=alpha, zorder=1)


def _stage(drawing: Drawing, solution: Any) -> tuple[Any, Axes]:
    """A figure with the backdrop, around everything that the system reaches."""
    from matplotlib.figure import Figure

    scratch = Figure().subplots()
    _path(scratch, drawing, solution)
    for time, state, control in zip(*instants(solution, 24), strict=True):
        drawing.frame(scratch, state, control, float(time))
    if drawing.backdrop is not None:
        drawing.backdrop(scratch)
    reach = scratch.dataLim
    margin_x, margin_y = 0.05 * reach.width, 0.05 * reach.height
    if drawing.equal:
        margin_x = margin_y = max(margin_x, margin_y)
    width, height = reach.width + 2 * margin_x, reach.height + 2 * margin_y
    tall = min(max(_WIDTH * height / width, 1.6), 5.6) if drawing.equal else 4.0
    wide = min(_WIDTH, max(tall * width / height, 3.6)) if drawing.equal else _WIDTH
    figure = Figure(figsize=(wide + 0.4, tall + 0.6), layout="constrained")
    axes = figure.subplots()
    if drawing.equal:
        axes.set_aspect("equal")
    axes.set_xlim(reach.x0 - margin_x, reach.x1 + margin_x)
    axes.set_ylim(reach.y0 - margin_y, reach.y1 + margin_y)
    if drawing.x:
        axes.locator_params(nbins=5)
        axes.set_xlabel(drawing.x)
        axes.set_ylabel(drawing.y)
        axes.spines[["top", "right"]].set_visible(False)
    else:
        axes.set_axis_off()
    if drawing.backdrop is not None:
        drawing.backdrop(axes)
    axes.set_autoscale_on(False)
    return figure, axes


def line(axes: Axes, points: Iterable[Point], colour: str = INK, width: float = 2.0, **look: Any) -> None:
    """A line through points.

    Args:
        axes: of matplotlib.
        points: pairs.
        colour: of the line.
        width: in points.
        **look: of ``plot``.
    """
    x, y = zip(*points, strict=True)
    axes.plot(x, y, **{"color": colour, "lw": width, "solid_capstyle": "round", **look})


def dot(axes: Axes, point: Point, colour: str = BODY, size: float = 9.0, **look: Any) -> None:
    """A round mark whose size does not depend on the scale.

    Args:
        axes: of matplotlib.
        point: a pair.
        colour: of the mark.
        size: in points.
        **look: of ``plot``.
    """
    axes.plot([point[0]], [point[1]], **{"marker": "o", "ls": "", "color": colour, "ms": size, "zorder": 3, **look})


def shape(axes: Axes, corners: Iterable[Point], at: Point, angle: float = 0.0, colour: str = BODY, **look: Any) -> None:
    """A polygon, turned about its origin and moved.

    Args:
        axes: of matplotlib.
        corners: pairs, about the polygon's origin.
        at: where the origin goes.
        angle: counter-clockwise, in rad.
        colour: of the inside.
        **look: of ``fill``.
    """
    c, s = math.cos(angle), math.sin(angle)
    x, y = zip(*((at[0] + c * a - s * b, at[1] + s * a + c * b) for a, b in corners), strict=True)
    axes.fill(x, y, **{"facecolor": colour, "edgecolor": "white", "lw": 0.8, "zorder": 2, **look})


def box(width: float, height: float, offset: Point = (0.0, 0.0)) -> list[Point]:
    """Corners of a rectangle for :func:`shape`.

    Args:
        width: along the polygon's own first axis.
        height: along its second.
        offset: of its centre from the polygon's origin.
    """
    return [(offset[0] + i * width / 2, offset[1] + j * height / 2) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def arrow(axes: Axes, tail: Point, vector: Point, head: float, width: float = 2.0) -> None:
    """A force: a line with a head, left out where it is next to nothing.

    Args:
        axes: of matplotlib.
        tail: where it begins.
        vector: to its tip.
        head: length of the head, shorter on a short arrow.
        width: in points.
    """
    length = math.hypot(*vector)
    if length < 0.1 * head:
        return
    a, b = vector[0] / length, vector[1] / length
    tip, head = (tail[0] + vector[0], tail[1] + vector[1]), min(head, 0.5 * length)
    left, right = ((tip[0] - head * (a - j * 0.5 * b), tip[1] - head * (b + j * 0.5 * a)) for j in (1, -1))
    line(axes, [tail, tip], FORCE, width, zorder=4)
    line(axes, [left, tip, right], FORCE, width, zorder=4)


def mass_on_rail(goal: float = 0.0, wall: float | None = None, *, size: float = 0.06, force: float = 0.1) -> Drawing:
    """A block on a level rail, for problems whose first state is its position.

    Args:
        goal: a position that is marked.
        wall: a position that its centre must not pass.
        size: of the block.
        force: length of the arrow for a force of one.
    """

    def backdrop(axes: Axes) -> None:
        axes.axhline(-size, color=FIXED, lw=1.0)
        line(axes, [(goal, -1.8 * size), (goal, -size)], GOAL, 2.5)
        if wall is not None:
            shape(axes, box(0.4 * size, 4 * size, (0.7 * size, size)), (wall, 0.0), colour=FIXED)

    def frame(axes: Axes, state: Tensor, control: Tensor, time: float) -> None:
        place = float(state[0])
        shape(axes, box(size, 2 * size), (place, 0.0))
        arrow(axes, (place, 1.7 * size), (force * float(control[0]), 0.0), 0.6 * size)

    return Drawing(frame, backdrop)
