"""Derivatives at one time: both treatments of p agree with torch.func; ordinary operations survive batched passes."""

import pytest
import torch
from torch.nn import functional

from ocnopt import linearise
from ocnopt.differential.stretches import Packing
from ocnopt.errors import ProblemError
from tests.oracles.compare import assert_close

B, D, N, Q = 4, 3, 2, 5


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def smooth(X, p):
    F = torch.tanh(X[..., :1] * p[..., 0:N]) * X[..., 1:] + p[..., N : 2 * N] ** 2 * p[..., 4:]
    return F * torch.ones_like(X[..., :1])


def scalar(X, p):
    return (smooth(X, p) ** 2).sum(-1)


def per_row(function):
    """The function of one sample, mapped over samples."""
    return torch.vmap(function, in_dims=(0, None))


def jacobian(function, argument):
    return per_row(torch.func.jacrev(function, argnums=argument))(randn(B, D), randn(Q))


def linear(function, X, p, per_sample):
    """F, F_X, F_p and the leaves."""
    inputs = linearise.leaves(X, p, per_sample)
    F = function(*inputs)
    return F, *linearise.linearise(F, inputs), inputs


def second(function, X, p, r, per_sample):
    """Second derivatives in ((w, X), p) of w function(X, p) at w = 1: the first row and column are the gradient."""
    W, p = linearise.leaves(functional.pad(X, (1, 0), value=1.0), p, per_sample)
    return linearise.quadratic(W[..., 0] * function(W[..., 1:], p), (W, p), r)


@pytest.mark.parametrize("per_sample", [True, False])
def test_linearise_and_pull(per_sample):
    X, p, columns = randn(B, D), randn(Q), randn(3, B, N)
    F, FX, Fp, inputs = linear(smooth, X, p, per_sample)
    assert_close(F, smooth(X, p))
    assert_close(FX, jacobian(smooth, 0), atol=1e-14)
    assert_close(Fp, jacobian(smooth, 1), atol=1e-14)
    in_X, in_p = linearise.pull(F, inputs, columns)
    assert_close(in_X, (columns.movedim(0, 1) @ FX).movedim(1, 0), atol=1e-13)
    expected = (columns.movedim(0, 1) @ Fp).movedim(1, 0)
    assert_close(in_p, expected if per_sample else expected.sum(1), atol=1e-13)
    alone = linearise.pull(F, inputs, columns[0])
    assert_close(alone[0], in_X[0], atol=1e-14)
    assert_close(alone[1], in_p[0], atol=1e-14)


@pytest.mark.parametrize("per_sample", [True, False])
def test_quadratic(per_sample):
    X, p, r = randn(B, D), randn(Q), randn(1, Q)[0]
    C, Cp, form = second(scalar, X, p, r, per_sample)
    assert_close(C[:, 1:, 0], jacobian(scalar, 0), atol=1e-13)
    assert_close(C[:, 0, 1:], jacobian(scalar, 0), atol=1e-13)
    assert not C[:, 0, 0].any()
    assert_close(Cp[..., 0], jacobian(scalar, 1), atol=1e-13)
    reverse = torch.func.jacrev
    assert_close(C[:, 1:, 1:], per_row(reverse(reverse(scalar)))(X, p), atol=1e-12)
    assert_close(Cp[..., 1:], per_row(reverse(reverse(scalar, argnums=1), argnums=0))(X, p), atol=1e-12)
    pp = per_row(reverse(reverse(scalar, argnums=1), argnums=1))(X, p).sum(0)
    assert_close(form, r @ pp @ r, rtol=1e-10)
    total, p = torch.ones(Q, Q, dtype=torch.float64), p.requires_grad_()
    linearise.add_curvature_in_p(total, 2.0, scalar(X, p), p)
    assert_close(total, 1 + 2 * pp, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per_sample", [True, False])
def test_functions_that_depend_on_nothing_have_zero_derivatives(per_sample):
    X, p = randn(B, D), randn(Q)
    _, FX, Fp, _ = linear(lambda X, p: torch.ones(B, N, dtype=X.dtype), X, p, per_sample)
    assert FX.shape == (B, N, D)
    assert Fp.shape == (B, N, Q)
    assert not FX.any()
    assert not Fp.any()
    C, Cp, _ = second(lambda X, p: X.sum(-1), X, p, p, per_sample)
    assert_close(C[:, 1:, 0], torch.ones_like(X))
    assert not C[:, 1:, 1:].any()
    assert Cp.shape == (B, Q, 1 + D)


def test_more_cotangents_than_go_at_once(monkeypatch):
    X, p = randn(B, D), randn(Q)
    whole = linear(smooth, X, p, False)[:3], second(scalar, X, p, p, False)
    monkeypatch.setattr(linearise, "_AT_ONCE", 2)
    parts = linear(smooth, X, p, False)[:3], second(scalar, X, p, p, False)
    for one, other in zip((*whole[0], *whole[1]), (*parts[0], *parts[1]), strict=True):
        assert_close(one, other, atol=1e-13)


GRID = torch.linspace(-2, 2, 9, dtype=torch.float64)
EYE = torch.eye(D, dtype=torch.float64)


def interpolate(x):
    i = torch.searchsorted(GRID, x.detach().contiguous()).clamp(1, 8)
    weight = (x - GRID[i - 1]) / (GRID[i] - GRID[i - 1])
    return torch.sin(GRID)[i - 1] * (1 - weight) + torch.sin(GRID)[i] * weight**2


def assign(x):
    y = torch.zeros_like(x)
    y[..., 0] = x[..., 1] ** 2
    y[..., 1] = x[..., 0] * x[..., 2]
    return y


OPERATIONS = {
    "solve": lambda x: torch.linalg.solve(5 * EYE + x[..., :, None] * x[..., None, :], x[..., None])[..., 0],
    "eigenvalues": lambda x: torch.linalg.eigvalsh(
        torch.diag(torch.arange(3.0)).to(x) + x[..., :, None] * x[..., None, :]
    ),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "cross": lambda x: torch.linalg.cross(x, x.roll(1, -1) ** 2, dim=-1),
    "interpolate": interpolate,
    "assign": assign,
    "sort": lambda x: (x**3).sort(-1).values,
    "activations": lambda x: functional.softplus(x) + functional.gelu(x) + functional.silu(x) + functional.elu(x),
    "softmax": lambda x: x.softmax(-1) + x.logsumexp(-1, keepdim=True),
    "normalise": lambda x: functional.layer_norm(x, (3,)),
    "where": lambda x: torch.where(x > 0, x**2, x.abs() ** 1.5) + torch.maximum(x**2, x**3).clamp(-1, 1),
    "fourier": lambda x: torch.fft.irfft(2 * torch.fft.rfft(x**2, dim=-1), n=3, dim=-1),
    "autograd.Function": lambda x: Square.apply(x) * x,
}


class Square(torch.autograd.Function):
    """A user's own operation, without rules for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("name", OPERATIONS)
def test_ordinary_operations(name):
    operation, X, weights = OPERATIONS[name], randn(B, D), randn(D)

    def function(X, p):
        return (operation(X) * weights).sum(-1) * p[..., 0]

    C, _, _ = second(function, X, randn(Q), randn(Q), per_sample=False)
    H = torch.autograd.functional.hessian(lambda X: function(X, randn(Q)).sum(), X)
    assert_close(C[:, 1:, 1:], H[range(B), :, range(B)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", [functional.hardsigmoid, lambda X: torch.cdist(X, torch.ones(2, D).to(X))])
def test_operations_without_a_second_derivative_are_named(op):
    X = randn(B, D).requires_grad_()
    (slope,) = linearise.gradient(op(X).square(), (X,), create_graph=True)
    for derive in (linearise.gradient, linearise.jacobian):
        with pytest.raises(
            ProblemError, match=r"cannot differentiate twice \(.*_backward.*\); expected those that it can"
        ):
            derive(slope, (X,))


def test_packing_there_and_back():
    blocks = [randn(2, 3, 4), randn(2, 3, 0), randn(5)]
    packing = Packing.of(blocks, (2, 3))
    assert packing.rows == (6, 6, 1)
    for block, same in zip(blocks, packing.unpack(packing.pack(blocks)), strict=True):
        assert torch.equal(block, same)


def test_a_norm_sees_one_bad_sample_among_many():
    blocks = [torch.zeros(1000, 4), torch.zeros(10_000)]
    packing = Packing.of(blocks, (1000,))
    blocks[0][7] = 3.0
    assert float(packing.norm(packing.pack(blocks))) == pytest.approx(3.0)
    blocks[1][:] = 4.0
    assert float(packing.norm(packing.pack(blocks))) == pytest.approx(4.0)
