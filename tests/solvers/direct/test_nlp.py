"""The derivatives of a program of small pieces against CasADi's own derivatives of the whole."""

import casadi
import numpy as np
import pytest

from ocnopt.solvers.direct import nlp
from ocnopt.solvers.direct.nlp import Piece, Program


def program(kind=casadi.SX):
    """Pieces that share unknowns, share rows, stand out of order, and one without constraints."""
    k, y, d = kind.sym("k"), kind.sym("y", 3), kind.sym("d")
    g = casadi.vertcat(casadi.sin(y[0]) * y[1] + k, d * y[2] ** 3)
    first = casadi.Function("first", [k, y, d], [casadi.exp(y[0]) * y[2] ** 2 + k * y[1], g])
    z = kind.sym("z", 2)
    second = casadi.Function("second", [k, z, d], [z[0] ** 2 * z[1] ** 2, kind(0, 1)])
    pieces = [
        Piece(
            first,
            np.array([1.0, 2.0, 3.0]),
            np.array([[0, 1, 2], [2, 3, 1], [4, 0, 3]]),
            np.array([[0, 1], [1, 2], [3, 0]]),
            1,
        ),
        Piece(second, np.zeros(2), np.array([[0, 4], [3, 1]]), np.zeros((2, 0), dtype=np.int64), 0),
    ]
    linear = (np.array([0, 2, 3]), np.array([1, 4, 0]), np.array([2.0, -1.0, 0.5]))
    return Program(pieces, linear, (np.full(5, -9.0), np.full(5, 9.0)), (np.zeros(4), np.zeros(4)), (1, 4))


DATA = np.array([[7.0, 1.0, 2.0, -1.0]])
NOTHING = np.zeros((0, 1))


@pytest.mark.parametrize("kind", [casadi.SX, casadi.MX])
def test_derivatives_of_pieces_are_those_of_the_whole(kind):
    whole = program(kind)
    w, s, m = casadi.MX.sym("w", 5), casadi.MX.sym("s"), casadi.MX.sym("m", 4)
    D = casadi.DM(DATA)
    f, g = nlp._values(whole, w, D)
    lagrangian = s * f + casadi.dot(m, g)
    ours = [nlp._gradient(whole, w, D), nlp._jacobian(whole, w, D), nlp._hessian(whole, w, D, s, m)]
    theirs = [casadi.gradient(f, w), casadi.jacobian(g, w), casadi.triu(casadi.hessian(lagrangian, w)[0])]
    point = [np.array([0.3, -0.7, 1.1, 0.4, -0.2]), 0.8, np.array([0.5, -1.0, 2.0, 0.3])]
    for mine, reference in zip(ours, theirs, strict=True):
        a, b = (casadi.Function("d", [w, s, m], [part])(*point).full() for part in (mine, reference))
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("unused", [0, 3, 4])
def test_the_gradient_is_dense_even_where_the_cost_is_flat(unused):
    k, y, d = casadi.SX.sym("k"), casadi.SX.sym("y", 4), casadi.SX.sym("d", 0)
    columns = np.array([[i for i in range(5) if i != unused]])
    square = Piece(casadi.Function("s", [k, y, d], [casadi.sumsqr(y), y[:1]]), np.zeros(1), columns, np.array([[0]]), 0)
    flat = Piece(
        casadi.Function("e", [k, y, d], [casadi.SX(0), casadi.SX(0, 1)]), np.zeros(1), columns, np.zeros((1, 0), int), 0
    )
    none = np.zeros(0, dtype=np.int64)
    box, limits = (np.full(5, -1.0), np.full(5, 1.0)), (np.zeros(1), np.ones(1))
    whole = Program([square, flat], (none, none, np.zeros(0)), box, limits, (0, 1))
    w, D = casadi.MX.sym("w", 5), casadi.DM(0, 1)
    assert nlp._gradient(whole, w, D).is_dense()
    assert nlp._values(whole, w, D)[1].is_dense()
    for _ in range(20):
        outcome = nlp.run_solver(nlp.make_solver(whole, {}), whole, np.full(5, 0.5), NOTHING)
        assert outcome.succeeded
        assert outcome.cost == pytest.approx(0.0, abs=1e-6)


def test_values_are_written_out_by_hand():
    w = np.array([0.3, -0.7, 1.1, 0.4, -0.2])
    f, g = nlp.evaluate(nlp.make_values(program()), w, DATA)
    cost = sum(np.exp(w[a]) * w[c] ** 2 + k * w[b] for k, (a, b, c) in ((1, (0, 1, 2)), (2, (2, 3, 1)), (3, (4, 0, 3))))
    assert f == pytest.approx(cost + w[0] ** 2 * w[4] ** 2 + w[3] ** 2 * w[1] ** 2, abs=1e-14)
    rows = [
        np.sin(w[0]) * w[1] + 1 - w[3] ** 3 + 2 * w[1],
        w[2] ** 3 + np.sin(w[2]) * w[3] + 2,
        2 * w[1] ** 3 - w[4],
        np.sin(w[4]) * w[0] + 3 + 0.5 * w[0],
    ]
    np.testing.assert_allclose(g, rows, atol=1e-14)


def test_a_program_without_curvature_or_constraints_is_solved():
    k, y, d = casadi.SX.sym("k"), casadi.SX.sym("y", 2), casadi.SX.sym("d", 0)
    linear_cost = casadi.Function("cost", [k, y, d], [y[0] - 2 * y[1], casadi.SX(0, 1)])
    piece = Piece(linear_cost, np.zeros(1), np.array([[0, 1]]), np.zeros((1, 0), dtype=np.int64), 0)
    none = np.zeros(0, dtype=np.int64)
    box = (np.array([-1.0, -1.0]), np.array([1.0, 1.0]))
    whole = Program([piece], (none, none, np.zeros(0)), box, (np.zeros(0), np.zeros(0)), (0, 1))
    outcome = nlp.run_solver(nlp.make_solver(whole, {"tol": 1e-10}), whole, np.zeros(2), NOTHING)
    assert outcome.succeeded
    np.testing.assert_allclose(outcome.unknowns, [-1.0, 1.0], atol=1e-8)
