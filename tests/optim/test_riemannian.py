"""Manifolds of matrices with orthonormal columns, and descent on them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.manifolds import RETRACTIONS, polar, retract, rotate, tangent
from ocnopt.optim.mec import MEC
from ocnopt.optim.riemannian import Riemannian

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(4, 4), (7, 3), (3, 1), (1, 1), (2, 5, 2), (2, 3, 6, 6)]


def point(*shape, seed=0):
    return polar(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def drift(U):
    return float((U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype)).abs().max())


def direction(U, manifold, seed=1):
    G = torch.randn(U.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tangent(U, G, manifold)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_is_the_nearest_tangent_vector(shape):
    """A projection: its image is tangent, it is idempotent, and what it takes away is normal."""
    U, G = point(*shape), torch.randn(shape)
    for manifold in ("stiefel", "grassmann"):
        xi, other = tangent(U, G, manifold), direction(U, manifold)
        S = U.mT @ xi
        torch.testing.assert_close(S, -S.mT if manifold == "stiefel" else 0 * S, rtol=0, atol=1e-13)
        torch.testing.assert_close(tangent(U, xi, manifold), xi, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(((G - xi) * other).sum(), torch.tensor(0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("manifold", ["stiefel", "grassmann"])
@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_retractions_stay_on_the_manifold_and_are_of_first_order(shape, retraction, manifold):
    U = point(*shape)
    xi = direction(U, manifold)
    for size in (0.0, 1e-3, 1.0, 100.0):
        assert drift(retract(U, size * xi, retraction)) < 1e-12
    torch.testing.assert_close(retract(U, 0 * xi, retraction), U, rtol=0, atol=1e-14)
    h = 1e-5
    slope = (retract(U, h * xi, retraction) - retract(U, -h * xi, retraction)) / (2 * h)
    torch.testing.assert_close(slope, xi, rtol=1e-7, atol=1e-8)


def test_polar_and_cayley_are_of_second_order_too():
    """Their curves leave along the geodesic: (R(h) + R(-h) - 2U)/h^2 has no tangent part."""
    U = point(7, 3)
    xi, h = direction(U, "grassmann"), 1e-4
    for retraction in ("polar", "cayley"):
        bend = (retract(U, h * xi, retraction) + retract(U, -h * xi, retraction) - 2 * U) / h**2
        assert float(tangent(U, bend, "stiefel").abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(9, 2), (9, 4), (2, 12, 3)])
def test_cayley_by_the_small_system_is_the_rotation(shape):
    U = point(*shape)
    xi = direction(U, "stiefel")
    half = xi - U @ (U.mT @ xi) / 2
    torch.testing.assert_close(retract(U, xi, "cayley"), rotate(U, half @ U.mT - U @ half.mT), rtol=1e-12, atol=1e-13)


def test_the_cayley_rotation_of_a_plane():
    W = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    angle = 2 * torch.atan(torch.tensor(0.5))
    expected = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    torch.testing.assert_close(rotate(torch.eye(2), W), expected)


def test_qr_has_a_positive_diagonal():
    U = point(5, 3)
    xi = 3 * direction(U, "stiefel")
    Q = retract(U, xi, "qr")
    R = Q.mT @ (U + xi)
    assert float(R.tril(-1).abs().max()) < 1e-12
    assert bool((R.diagonal() > 0).all())


@given(seed=st.integers(0, 1000), n=st.integers(2, 8), p=st.integers(1, 8))
def test_on_grassmann_only_the_span_counts(seed, n, p):
    """f(U) = f(U Q): the gradient turns along, the steps lead to the same spaces."""
    p = min(n, p)
    U, Q = point(n, p, seed=seed), point(p, p, seed=seed + 1)
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)

    def gradient(X):
        X = X.clone().requires_grad_()
        (torch.trace(X.mT @ A @ X) + torch.trace(X.mT @ A @ X @ X.mT @ X) ** 2 / 10).backward()
        return tangent(X.detach(), X.grad, "grassmann")

    torch.testing.assert_close(gradient(U @ Q), gradient(U) @ Q, rtol=1e-10, atol=1e-10)
    for retraction in RETRACTIONS:
        one, two = (retract(X, -0.1 * gradient(X), retraction) for X in (U, U @ Q))
        torch.testing.assert_close(one @ one.mT, two @ two.mT, rtol=1e-9, atol=1e-9)


def run(optimizer, parameter, loss, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()


@pytest.mark.parametrize("manifold", ["stiefel", "grassmann"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_descent_finds_the_space_of_the_lowest_eigenvectors(retraction, momentum, manifold):
    A = torch.diag(torch.arange(1.0, 7.0))
    U = nn.Parameter(torch.randn(2, 6, 2))
    optimizer = Riemannian([U], 0.1, momentum=momentum, manifold=manifold, retraction=retraction)
    run(optimizer, U, lambda U: (U.mT @ A @ U).diagonal(dim1=-2, dim2=-1).sum(), 150)
    P = U.detach() @ U.detach().mT
    torch.testing.assert_close(P, torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])).expand_as(P), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "dtype", "most"),
    [((20, 5), torch.float64, 1e-13), ((2, 6, 6), torch.float64, 1e-13), ((2, 6, 6), torch.float32, 1e-5)],
)
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_thousand_steps_do_not_drift(retraction, shape, dtype, most):
    U, gradients = nn.Parameter(torch.randn(shape, dtype=dtype)), torch.randn(7, *shape, dtype=dtype)
    optimizer = Riemannian([U], 0.05, momentum=0.9, retraction=retraction)
    for k in range(1000):
        U.grad = gradients[k % 7]
        optimizer.step()
    assert drift(U.detach()) < most


def test_the_first_step_is_that_of_the_gradient():
    U = nn.Parameter(point(5, 2))
    start, C = U.detach().clone(), torch.randn(5, 2)
    run(Riemannian([U], 1e-6), U, lambda U: (U * C).sum(), 1)
    torch.testing.assert_close((start - U.detach()) / 1e-6, tangent(start, C, "stiefel"), rtol=1e-5, atol=1e-5)


def test_momentum_is_projected_from_one_tangent_space_to_the_next():
    U = nn.Parameter(point(5, 2))
    optimizer = Riemannian([U], 0.1, momentum=0.5, retraction="polar")
    C, X, v = torch.randn(5, 2), U.detach().clone(), torch.zeros(5, 2)
    for _ in range(5):
        v = 0.5 * tangent(X, v, "stiefel") - 0.1 * tangent(X, C, "stiefel")
        X = polar(X + v)
    run(optimizer, U, lambda U: (U * C).sum(), 5)
    torch.testing.assert_close(U.detach(), X, rtol=1e-12, atol=1e-13)


def test_a_wide_layer_gets_orthonormal_rows():
    layer = nn.Linear(6, 3)
    optimizer = Riemannian([{"params": [layer.weight]}, {"params": [layer.bias], "manifold": "euclidean"}], 0.1)
    x = torch.randn(10, 6)
    run(optimizer, layer, lambda layer: layer(x).square().mean(), 20)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, torch.eye(3), rtol=0, atol=1e-13)


def test_the_rest_of_a_model_moves_as_by_momentum():
    x, y = (torch.ones(3).requires_grad_() for _ in range(2))
    one = Riemannian([x], 0.1, momentum=0.9, manifold="euclidean")
    two = torch.optim.SGD([y], 0.1, momentum=0.9)
    for p, optimizer in ((x, one), (y, two)):
        run(optimizer, p, lambda p: (p**4).sum(), 10)
    torch.testing.assert_close(x, y)


def test_weights_are_put_onto_the_manifold_by_the_nearest_matrix():
    U = nn.Parameter(torch.randn(4, 2))
    start = U.detach().clone()
    Riemannian([U], 0.1)
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    torch.testing.assert_close(U.detach(), left @ right)
    onto = U.detach().clone()
    Riemannian([U], 0.1)
    assert torch.equal(U, onto)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"shape \(3,\) and is torch.float32; expected matrices"),
        (torch.ones(2, 2, dtype=torch.bfloat16), r"is torch.bfloat16; expected matrices"),
        (torch.ones(0, 2), r"shape \(0, 2\)"),
        (torch.ones(3, 2), "has linearly dependent columns.*orthogonal_"),
        (torch.zeros(3, 2), "has linearly dependent columns"),
        (torch.full((3, 2), torch.nan), "holds NaN or infinity; expected finite"),
    ],
)
def test_what_has_no_place_on_the_manifold_is_refused(value, message):
    good = nn.Parameter(torch.randn(3, 2))
    before = good.detach().clone()
    with pytest.raises(ProblemError, match=f"parameter 1 .*{message}"):
        Riemannian([good, nn.Parameter(value)], 0.1)
    assert torch.equal(good, before)


def test_a_matrix_that_somebody_moved_is_refused():
    layer = nn.Linear(3, 3, bias=False)
    optimizer = Riemannian(layer.named_parameters(), 0.1)
    with torch.no_grad():
        layer.weight.mul_(1.1)
    layer(torch.ones(3)).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(ProblemError, match=r"weight is off its manifold: \|U\^T U - I\| = 0.21; expected at most"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("lr", [1e12, 1e200, 1e307])
def test_a_step_beyond_arithmetic_stays_on_the_manifold_or_is_refused(retraction, lr):
    U = nn.Parameter(torch.randn(6, 2))
    optimizer = Riemannian([U], lr, retraction=retraction)
    before, U.grad = U.detach().clone(), 100 * torch.randn(6, 2)
    try:
        optimizer.step()
    except NonFiniteError as error:
        assert "as before it: lower lr" in str(error)  # noqa: PT017
        assert torch.equal(U, before)
    torch.testing.assert_close(U.mT @ U, torch.eye(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [Riemannian, MEC])
def test_frozen_weights_are_not_put_onto_the_manifold(kind):
    frozen, trained = nn.Parameter(torch.randn(3, 2), requires_grad=False), nn.Parameter(torch.randn(3, 2))
    before = frozen.detach().clone()
    optimizer = kind([frozen, trained], 0.1)
    trained.grad = torch.randn(3, 2)
    optimizer.step()
    assert torch.equal(frozen, before)
    frozen.requires_grad_()
    frozen.grad = torch.randn(3, 2)
    with pytest.raises(ProblemError, match="parameter 0 .* off its manifold: .* unfreeze weights before the optimiser"):
        optimizer.step()


@pytest.mark.parametrize(
    ("shape", "manifold", "message"),
    [
        ((3, 3), "grassmann", r"shape \(3, 3\), and a square matrix 3 x 3 spans the whole space.*would never move"),
        ((4, 2, 1, 1), "stiefel", "a square matrix 1 x 1 is 1 or -1 there, so that it would never move; expected room"),
    ],
)
def test_what_could_never_move_is_refused(shape, manifold, message):
    with pytest.raises(ProblemError, match=message):
        Riemannian([nn.Parameter(torch.randn(shape))], 0.1, manifold=manifold)
