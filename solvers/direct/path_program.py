r"""The nonlinear program of a path.

Unknowns, stage by stage: x_k, s_k (the inner points of a step, in collocation), u_k for k = 0..N-1; x_N; p. Minimise

    sum_k l_k + Phi     subject to     x_0 given,   f_k - x_{k+1} = 0,   r_k = 0,   c_k <= 0,   e = 0,   c_N <= 0.

A step's function is (k, x, s, u, p, d) -> (f, r, l, c), the end's (x, u, p, d) -> (Phi, e, c), both lowered from
torch; d is what a step is given besides (:mod:`ocnopt.captured`), a column of the program's data. The multiplier of
f_k - x_{k+1} = 0 is the costate dJ/dx_{k+1}, that of x_0 its negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import casadi
import numpy as np

from ocnopt.bounds import each
from ocnopt.solvers.audit import called, placed
from ocnopt.solvers.direct.nlp import Answer, Piece, Positions, Program, Vector, kind_of
from ocnopt.staged import StagedOCP


class Run(NamedTuple):
    """Consecutive steps start..stop-1 that one function (k, x, s, u, p, d) -> (f, r, l, c) serves."""

    function: casadi.Function
    start: int
    stop: int


class Rows(NamedTuple):
    """Constraints of one kind: rows ``(steps, width)``, the first step (-1: the end), whether they are equalities."""

    name: str
    place: Positions
    first: int
    equality: bool


@dataclass(frozen=True, eq=False)
class PathProgram:
    """The program, with the positions of x_k, s_k, u_k and p among the unknowns, and what each constraint is called."""

    program: Program
    states: list[Positions]
    inner: list[Positions]
    controls: list[Positions]
    parameters: Positions
    rows: list[Rows]

    def started_at(self, initial_state: Vector) -> "PathProgram":
        """The same program for another x_0."""
        lower, upper = (np.concatenate([initial_state, side[initial_state.size :]]) for side in self.program.limits)
        return replace(self, program=replace(self.program, limits=(lower, upper)))

    def within(self, problem: StagedOCP) -> "PathProgram":
        """The same program with the bounds of another problem."""
        box = _box(self.program.shape[1], self.states, self.controls, self.parameters, problem)
        return replace(self, program=replace(self.program, box=box))

    def costates(self, multipliers: Vector) -> list[Vector]:
        """dJ/dx_k for k = 0..N."""
        steps = [row for rows in self.rows if rows.name == "dynamics" for row in rows.place]
        return [-multipliers[self.rows[0].place[0]], *(multipliers[row] for row in steps)]

    def multipliers(self, answer: Answer, *, bounded: bool) -> dict[str, Vector]:
        """Of the user's constraints ``(e,)``, ``(N + 1, c)`` and, where ``bounded``, of the states ``(N + 1, n)``.

        Zeros stand where a node has fewer.
        """
        found: dict[str, Vector] = {}
        along: list[tuple[int, Positions]] = []
        for rows in self.rows:
            if rows.name == "terminal_constraint":
                found[rows.name] = answer.multipliers[rows.place[0]]
            if rows.name == "path_constraint":
                # -1, of the end, is the last node
                along += enumerate(rows.place, start=rows.first)
        if along:
            found["path_constraint"] = np.zeros((len(self.states), max(row.size for _, row in along)))
            for node, row in along:
                found["path_constraint"][node, : row.size] = answer.multipliers[row]
        if bounded:
            found["state_bounds"] = np.zeros((len(self.states), max(place.size for place in self.states)))
            for node, place in enumerate(self.states[1:], start=1):
                found["state_bounds"][node, : place.size] = answer.box[place]
        return found

    def violation(self, g: Vector) -> tuple[float, int]:
        """The largest violation, and its row."""
        lower, upper = self.program.limits
        size = np.maximum(np.maximum(lower - g, g - upper), 0.0)
        size[~np.isfinite(g)] = np.inf
        worst = int(size.argmax())
        return float(size[worst]), worst

    def place(self, problem: StagedOCP, row: int) -> str:
        """A constraint in the words of the problem."""
        rows = next(rows for rows in self.rows if row in rows.place)
        step, entry = (int(i[0]) for i in np.nonzero(rows.place == row))
        ahead = next((kind.place.shape[1] for kind in self.rows if kind.name == "path_constraint"), 0)
        # the inner points of a step are states one after another
        entry = entry % self.states[0].size if rows.name == "collocation" else entry
        where = {"initial_state": 0}.get(rows.name, None if rows.first < 0 else rows.first + step)
        return placed(rows.name, called(problem, rows.name, entry, ahead), where)


def assemble(runs: Sequence[Run], end: casadi.Function, problem: StagedOCP) -> PathProgram:
    """Write the program down, for x_0 = 0.

    Args:
        runs: cover the steps 0..N-1 in order.
        end: (x, u, p, d) -> (Phi, e, c).
        problem: whose bounds these are, without a batch.
    """
    sizes = [tuple(int(r.function.numel_in(i)) for i in (1, 2, 3)) for r in runs for _ in range(r.start, r.stop)]
    states, inner, controls, p = _positions(sizes, int(end.numel_in(0)), int(end.numel_in(2)))
    n = sizes[0][0]
    rows = [Rows("initial_state", np.arange(n)[None], -1, equality=True)]
    linear = [(np.arange(n), states[0], np.ones(n))]
    pieces, height = [], n
    for run in runs:
        columns = np.stack([np.concatenate([states[k], inner[k], controls[k], p]) for k in range(run.start, run.stop)])
        piece, kinds = _step_piece(run, columns, sizes[run.start], height)
        following = np.concatenate(states[run.start + 1 : run.stop + 1])
        linear.append((kinds[0].place.reshape(-1), following, -np.ones(following.size)))
        pieces.append(piece)
        rows += kinds
        height += piece.rows.size
    piece, kinds = _end_piece(end, np.concatenate([states[-1], controls[-1], p])[None], height, len(controls))
    pieces.append(piece)
    rows += kinds
    size = int(states[-1][-1]) + 1 + p.size
    box = _box(size, states, controls, p, problem)
    matrix = tuple(np.concatenate(part) for part in zip(*linear, strict=True))
    program = Program(pieces, matrix, box, _limits(rows), (int(end.numel_in(3)), len(states)))  # type: ignore[arg-type]
    return PathProgram(program, states, inner, controls, p, [kind for kind in rows if kind.place.size])


def make_walks(runs: Sequence[Run]) -> list[casadi.Function]:
    """Each run as one function over its steps, for steps without inner points."""
    return [run.function.mapaccum("walk", run.stop - run.start, [1], [0]) for run in runs]


def roll_out(
    runs: Sequence[Run],
    walks: Sequence[casadi.Function],
    x0: Vector,
    controls: Sequence[Vector],
    p: Vector,
    data: Vector,
) -> list[Vector]:
    """The states x_0..x_N under given controls."""
    nodes = [x0]
    for run, walk in zip(runs, walks, strict=True):
        length = run.stop - run.start
        k = casadi.DM(np.arange(run.start, run.stop, dtype=float)).T
        u = casadi.DM(np.stack(controls[run.start : run.stop], axis=1))
        fixed = casadi.repmat(casadi.DM(p), 1, length)
        path = walk(k, nodes[-1], casadi.DM.zeros(0, length), u, fixed, casadi.DM(data[:, run.start : run.stop]))[0]
        nodes += list(path.full().T)
    return nodes


def _positions(
    sizes: Sequence[tuple[int, ...]], last: int, q: int
) -> tuple[list[Positions], list[Positions], list[Positions], Positions]:
    """Where x_k, s_k, u_k and p stand among the unknowns."""
    columns: tuple[list[Positions], list[Positions], list[Positions]] = ([], [], [])
    offset = 0
    for step in sizes:
        for column, size in zip(columns, step, strict=True):
            column.append(np.arange(offset, offset + size))
            offset += size
    columns[0].append(np.arange(offset, offset + last))
    return *columns, np.arange(offset + last, offset + last + q)


def _step_piece(run: Run, columns: Positions, sizes: tuple[int, ...], height: int) -> tuple[Piece, list[Rows]]:
    k, y, d = _symbols(run.function, columns.shape[1], run.function.numel_in(5))
    n, inner, m = sizes
    f, r, cost, c = run.function(k, y[:n], y[n : n + inner], y[n + inner : n + inner + m], y[n + inner + m :], d)
    names = (("dynamics", f, True), ("collocation", r, True), ("path_constraint", c, False))
    rows, kinds = _rows(names, columns.shape[0], height, run.start)
    function = casadi.Function("step", [k, y, d], [cost, casadi.vertcat(f, r, c)])
    return Piece(function, np.arange(run.start, run.stop, dtype=float), columns, rows, run.start), kinds


def _end_piece(end: casadi.Function, columns: Positions, height: int, node: int) -> tuple[Piece, list[Rows]]:
    k, y, d = _symbols(end, columns.shape[1], end.numel_in(3))
    n, m = int(end.numel_in(0)), int(end.numel_in(1))
    cost, e, c = end(y[:n], y[n : n + m], y[n + m :], d)
    rows, kinds = _rows((("terminal_constraint", e, True), ("path_constraint", c, False)), 1, height, -1)
    function = casadi.Function("end", [k, y, d], [cost, casadi.vertcat(e, c)])
    return Piece(function, np.zeros(1), columns, rows, node), kinds


def _symbols(function: casadi.Function, size: int, given: int) -> tuple[Any, Any, Any]:
    kind = kind_of(function)
    return kind.sym("k"), kind.sym("y", size), kind.sym("d", given)


def _rows(names: Sequence[tuple[str, Any, bool]], length: int, height: int, first: int) -> tuple[Positions, list[Rows]]:
    """Number the constraints of each step one after another; say which are which."""
    widths = [int(part.shape[0]) for _, part, _ in names]
    rows = height + np.arange(length * sum(widths)).reshape(length, sum(widths))
    splits = np.split(rows, np.cumsum(widths)[:-1], axis=1)
    return rows, [Rows(name, part, first, equality) for (name, _, equality), part in zip(names, splits, strict=True)]


def _box(
    size: int, states: Sequence[Positions], controls: Sequence[Positions], p: Positions, problem: StagedOCP
) -> tuple[Vector, Vector]:
    """Bounds of the unknowns; the first state is given."""
    box = (np.full(size, -np.inf), np.full(size, np.inf))
    along = each(problem.state_bounds, problem.steps + 1)
    pairs = zip([*controls, *states[1:], p], [*problem.step_bounds, *along[1:], problem.parameter_bounds], strict=True)
    for place, bounds in pairs:
        if bounds is not None:
            for side, limit in zip(box, bounds, strict=True):
                side[place] = limit.double().cpu().numpy()[: place.size]
    return box


def _limits(rows: Sequence[Rows]) -> tuple[Vector, Vector]:
    """Bounds of the constraints, for x_0 = 0."""
    size = sum(kind.place.size for kind in rows)
    lower, upper = np.zeros(size), np.zeros(size)
    for kind in rows:
        if not kind.equality:
            lower[kind.place] = -np.inf
    return lower, upper
