r"""A nonlinear program made of many small functions, with exact sparse derivatives, and IPOPT.

Minimise over w   sum_j sum_i f_j(k_i, w[C_i], D_i)   subject to   lower <= A w + sum_j sum_i P_i g_j(..) <= upper

A piece j is one function (k, y, d) -> (f, g) applied to many small selections y = w[C_i] of the unknowns; D_i is a
column of data, the program's parameters; P_i writes its g into the rows R_i. The small functions are differentiated
once, mapped over i, and their derivatives summed into place by one product with a constant sparse matrix: half the time
per iteration of differentiating the program as a whole.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import casadi
import numpy as np
from numpy.typing import NDArray

from ocnopt.errors import ProblemError
from ocnopt.solvers.endings import Stopwatch

Vector = NDArray[np.float64]
Positions = NDArray[np.int64]


class Piece(NamedTuple):
    """A function (k, y, d) -> (f, g), its numbers k (L,), unknowns ``columns (L, |y|)`` and ``rows (L, |g|)``.

    Its data are the columns of D from ``first`` on.
    """

    function: casadi.Function
    numbers: Vector
    columns: Positions
    rows: Positions
    first: int

    def arguments(self, w: Any, D: Any) -> tuple[Any, Any, Any]:
        """k (1, L), y (|y|, L) and d (|d|, L)."""
        length, size = self.columns.shape
        y = casadi.reshape(w[self.columns.reshape(-1).tolist()], size, length)
        return casadi.DM(self.numbers).T, y, D[:, self.first : self.first + length]


@dataclass(frozen=True, eq=False)
class Program:
    """Pieces, A as (rows, columns, values), the bounds of unknowns and constraints, and the shape of the data D."""

    pieces: Sequence[Piece]
    linear: tuple[Positions, Positions, Vector]
    box: tuple[Vector, Vector]
    limits: tuple[Vector, Vector]
    data: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Constraints and unknowns."""
        return self.limits[0].size, self.box[0].size


class Answer(NamedTuple):
    """What IPOPT returned: unknowns, cost, constraints, multipliers of these and of the box, and its statistics."""

    unknowns: Vector
    cost: float
    constraints: Vector
    multipliers: Vector
    box: Vector
    statistics: Mapping[str, Any]

    @property
    def succeeded(self) -> bool:
        """Whether IPOPT reached its tolerance or its acceptable level."""
        return bool(self.statistics["success"])


def kind_of(function: casadi.Function) -> Any:
    """The expressions that a function is made of, scalar ones or matrices."""
    return casadi.SX if function.is_a("SXFunction") else casadi.MX


def _symbols(piece: Piece) -> tuple[list[Any], Any, Any]:
    """Symbols k, y, d and the small function's f, g; scalar expressions where it is made of them."""
    kind = kind_of(piece.function)
    inputs = [kind.sym(name, piece.function.numel_in(i)) for i, name in enumerate("kyd")]
    return inputs, *piece.function(*inputs)


def _mapped(piece: Piece, inputs: list[Any], outputs: list[Any], *arguments: Any) -> list[Any]:
    """Evaluate small expressions for all selections at once: each output as (size, L)."""
    function = casadi.Function("small", inputs, [casadi.densify(output) for output in outputs])
    return list(function.map(piece.columns.shape[0]).call(list(arguments)))


def _sum_into(parts: Sequence[tuple[Any, Positions]], size: int) -> Any:
    """A column of ``size`` entries: each part's values (any shape) added at its positions, in the same order."""
    places = np.concatenate([place.reshape(-1) for _, place in parts])
    if not places.size:
        return casadi.MX(casadi.DM.zeros(size, 1))
    values = casadi.vertcat(*(casadi.vec(value) for value, _ in parts))
    adding = casadi.Sparsity.triplet(size, places.size, places.tolist(), list(range(places.size)))
    # CasADi drops entries it knows to be zero, and IPOPT would read a gradient that is not dense beyond its end.
    return casadi.densify(casadi.DM(adding, 1.0) @ values)


def _sparse(parts: Sequence[tuple[Any, Positions, Positions]], shape: tuple[int, int]) -> Any:
    """A sparse matrix: each part's values added at its rows and columns."""
    keys = [columns.reshape(-1) * shape[0] + rows.reshape(-1) for _, rows, columns in parts]
    present, order = np.unique(np.concatenate(keys), return_inverse=True)
    pattern = casadi.Sparsity.triplet(*shape, (present % shape[0]).tolist(), (present // shape[0]).tolist())
    splits = np.split(order, np.cumsum([key.size for key in keys])[:-1])
    values = _sum_into([(value, place) for (value, _, _), place in zip(parts, splits, strict=True)], present.size)
    return casadi.MX(pattern, values)


def _pattern(matrix: Any) -> tuple[Positions, Positions]:
    rows, columns = matrix.sparsity().get_triplet()
    return np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)


def _constraints(program: Program, w: Any, values: Sequence[Any]) -> Any:
    rows, columns, entries = program.linear
    linear = casadi.DM.triplet(rows.tolist(), columns.tolist(), casadi.DM(entries), *program.shape) @ w
    return linear + _sum_into([(g, p.rows) for g, p in zip(values, program.pieces, strict=True)], program.shape[0])


def _gradient(program: Program, w: Any, D: Any) -> Any:
    parts = []
    for piece in program.pieces:
        inputs, f, _ = _symbols(piece)
        (slope,) = _mapped(piece, inputs, [casadi.gradient(f, inputs[1])], *piece.arguments(w, D))
        parts.append((slope, piece.columns))
    return _sum_into(parts, program.shape[1])


def _jacobian(program: Program, w: Any, D: Any) -> Any:
    rows, columns, entries = program.linear
    parts = [(casadi.DM(entries), rows, columns)]
    for piece in program.pieces:
        inputs, _, g = _symbols(piece)
        slope = casadi.jacobian(g, inputs[1])
        row, column = _pattern(slope)
        (values,) = _mapped(piece, inputs, [slope.nz[:]], *piece.arguments(w, D))
        parts.append((values, piece.rows[:, row], piece.columns[:, column]))
    return _sparse(parts, program.shape)


def _hessian(program: Program, w: Any, D: Any, scale: Any, multipliers: Any) -> Any:
    """The upper triangle of the Lagrangian's second derivative."""
    parts = []
    for piece in program.pieces:
        given, f, g = _symbols(piece)
        y = given[1]
        s, m = type(y).sym("s"), type(y).sym("m", g.shape[0])
        curvature: Any = casadi.triu(casadi.hessian(s * f + casadi.dot(m, g), y)[0])
        row, column = _pattern(curvature)
        own = casadi.reshape(multipliers[piece.rows.reshape(-1).tolist()], *piece.rows.shape[::-1])
        length = piece.columns.shape[0]
        inputs = (*piece.arguments(w, D), casadi.repmat(scale, 1, length), own)
        (values,) = _mapped(piece, [*given, s, m], [curvature.nz[:]], *inputs)
        pair = piece.columns[:, row], piece.columns[:, column]
        parts.append((values, np.minimum(*pair), np.maximum(*pair)))
    return _sparse(parts, (program.shape[1], program.shape[1]))


class Watch(casadi.Callback):
    """Asked after each iteration of IPOPT: whether the stopwatch says to stop."""

    def __init__(self, program: Program) -> None:
        casadi.Callback.__init__(self)
        rows, unknowns = program.shape
        data = program.data[0] * program.data[1]
        self._sizes = {"x": unknowns, "f": 1, "g": rows, "lam_x": unknowns, "lam_g": rows, "lam_p": data}
        self.stopwatch: Stopwatch | None = None
        self.construct("watch", {})

    def get_n_in(self) -> int:
        """CasADi asks."""
        return int(casadi.nlpsol_n_out())

    def get_n_out(self) -> int:
        """CasADi asks."""
        return 1

    def get_sparsity_in(self, i: int) -> Any:
        """CasADi asks for the shapes of what a solver returns."""
        return casadi.Sparsity.dense(self._sizes[casadi.nlpsol_out(i)], 1)

    def eval(self, given: Any) -> list[float]:
        """Not zero to stop."""
        return [float(self.stopwatch is not None and self.stopwatch.reason is not None)]


def make_solver(
    program: Program, ipopt: Mapping[str, Any], watch: Watch | None = None, *, progress: bool = False
) -> Any:
    """Hand the program with its derivatives to IPOPT, which stays silent unless ``progress``.

    Args:
        program: the nonlinear program.
        ipopt: IPOPT's options; second derivatives are left out where they ask for an approximation.
        watch: stops it; who calls the solver must keep it.
        progress: show IPOPT's table.

    Raises:
        ProblemError: an option that IPOPT does not know.
    """
    w, given = casadi.MX.sym("w", program.shape[1]), casadi.MX.sym("given", program.data[0] * program.data[1])
    D = casadi.reshape(given, *program.data)
    scale, multipliers = casadi.MX.sym("scale"), casadi.MX.sym("multipliers", program.shape[0])
    f, g = _values(program, w, D)
    derivatives = {
        "grad_f": casadi.Function("nlp_grad_f", [w, given], [f, _gradient(program, w, D)]),
        "jac_g": casadi.Function("nlp_jac_g", [w, given], [g, _jacobian(program, w, D)]),
    }
    if ipopt.get("hessian_approximation", "exact") == "exact":
        second = _hessian(program, w, D, scale, multipliers)
        derivatives["hess_lag"] = casadi.Function("nlp_hess_l", [w, given, scale, multipliers], [second])
    quiet = {} if progress else {"print_level": 0, "sb": "yes"}
    options: dict[str, Any] = {
        **derivatives,
        "ipopt": {**quiet, **ipopt},
        "print_time": False,
        "error_on_fail": False,
        "show_eval_warnings": False,
        **({} if watch is None else {"iteration_callback": watch}),
    }
    try:
        functions: dict[str, Any] = {"x": w, "p": given, "f": f, "g": g}
        return casadi.nlpsol("program", "ipopt", functions, options)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ProblemError(
            f"IPOPT refused its options {dict(ipopt)} ({reason}); expected names and values of IPOPT's option reference"
        ) from error


def _values(program: Program, w: Any, D: Any) -> tuple[Any, Any]:
    """The cost and the constraints at w."""
    pairs = []
    for piece in program.pieces:
        inputs, f, g = _symbols(piece)
        pairs.append(_mapped(piece, inputs, [f, g], *piece.arguments(w, D)))
    cost = sum((casadi.sum2(f) for f, _ in pairs), casadi.MX(0.0))
    return cost, _constraints(program, w, [g for _, g in pairs])


def make_values(program: Program) -> casadi.Function:
    """(w, D) -> cost and constraints, as a function."""
    w, D = casadi.MX.sym("w", program.shape[1]), casadi.MX.sym("D", *program.data)
    return casadi.Function("values", [w, D], list(_values(program, w, D)))


def evaluate(values: casadi.Function, point: Vector, data: Vector) -> tuple[float, Vector]:
    """The cost and the constraints at a point, for data ``(|d|, N + 1)``."""
    f, g = values(point, casadi.DM(data))
    return float(f), np.array(g.full()).reshape(-1)


def run_solver(solver: Any, program: Program, start: Vector, data: Vector) -> Answer:
    """Solve from one start, for data ``(|d|, N + 1)``.

    Raises:
        KeyboardInterrupt: Ctrl-C, which CasADi itself turns into a failed solve.
    """
    (lbx, ubx), (lbg, ubg) = program.box, program.limits
    with _interruptible():
        result = solver(x0=start, p=data.reshape(-1, order="F"), lbx=lbx, ubx=ubx, lbg=lbg, ubg=ubg)
    w, g, multipliers, box = (np.array(result[key].full()).reshape(-1) for key in ("x", "g", "lam_g", "lam_x"))
    return Answer(w, float(result["f"]), g, multipliers, box, solver.stats())


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise again what a signal handler raised inside CasADi, which swallows it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    raised: list[BaseException] = []

    def note(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if raised:
        raise raised[0]
