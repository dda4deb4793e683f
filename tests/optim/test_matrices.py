"""Eigenbases and the preconditioned step against dense linear algebra."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ocnopt.differential.kronecker import Samples, as_matrix
from ocnopt.optim.matrices import Basis, Eigen, carried_moments, eigenbasis, first_moments
from tests.optim.cases import factors, gather

pytestmark = pytest.mark.usefixtures("float64")


def random_basis(a=4, b=3, n=6, rank=4, groups=2):
    """Samples and the basis of their factors."""
    samples = Samples(torch.randn(groups, n, a), torch.randn(groups, n, b))
    return samples, eigenbasis(samples, rank)


def test_power_one_in_the_exact_basis_is_kfac():
    samples, basis = random_basis()
    A, B = factors(samples)
    G = torch.randn(2, 3, 4)
    spectrum = basis.spectrum() * _trace(A) * _trace(B)
    step = basis.precondition(*basis.turn(G), spectrum, torch.tensor(0.0), power=1.0)
    torch.testing.assert_close(step, torch.linalg.solve(B, G) @ torch.linalg.inv(A))
    for group in range(2):
        vec = G[group].mT.reshape(-1)  # columns stacked
        solved = torch.linalg.solve(torch.kron(A[group].contiguous(), B[group].contiguous()), vec)
        torch.testing.assert_close(step[group].mT.reshape(-1), solved)


def _trace(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def test_least_squares_in_one_step():
    layer, z, y = nn.Linear(3, 2), torch.randn(9, 3), torch.randn(9, 2)
    (samples,) = gather(layer, lambda: ((layer(z) - y).square().sum(1) / 2).mean().backward()).values()
    A, _ = factors(samples)  # the exact Hessian is A (X) I
    basis = eigenbasis(Samples(samples.inputs, torch.eye(2)[None]), rank=4)
    G = as_matrix(layer.weight.grad, layer.bias.grad, 1)
    moments = basis.spectrum() * _trace(A) * 2
    W = as_matrix(layer.weight, layer.bias, 1).detach() - basis.precondition(
        *basis.turn(G), moments, torch.tensor(0.0), 1.0
    )
    solution = torch.linalg.lstsq(functional.pad(z, (0, 1), value=1.0), y).solution
    torch.testing.assert_close(W[0], solution.mT)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_precondition_against_dense_matrices(rank, power):
    _, basis = random_basis(rank=rank)
    M, moments = torch.randn(2, 3, 4), torch.rand(2, 3, min(rank + 1, 4))
    step = basis.precondition(*basis.turn(M), moments, 0.1 * basis.mean(moments), power)
    full = _spread(moments, rank)
    UA = _completed(basis.input.vectors)
    scaled = (basis.output.vectors.mT @ M @ UA) / (full + 0.1 * full.mean()) ** power
    torch.testing.assert_close(step, basis.output.vectors @ scaled @ UA.mT)


def _spread(moments, rank):
    """Second moments of each of the four directions."""
    return torch.cat([moments[..., :rank], *[moments[..., rank:]] * (4 - rank)], -1)


def _completed(vectors):
    """Orthonormal columns completed to a basis of the whole space."""
    rest = torch.linalg.eigh(vectors @ vectors.mT)[1][..., : vectors.shape[-2] - vectors.shape[-1]]
    return torch.cat([vectors, rest], -1)


def test_squares_and_spectrum_keep_their_sums():
    samples, basis = random_basis(rank=2)
    G = torch.randn(2, 3, 4)
    weights = torch.tensor([1.0, 1.0, 2.0])  # the rest has two directions
    torch.testing.assert_close((basis.squares(*basis.turn(G)) * weights).sum((1, 2)), G.square().sum((1, 2)))
    torch.testing.assert_close((basis.spectrum() * weights).sum((1, 2)), torch.ones(2))
    torch.testing.assert_close((first_moments(basis, G) * weights).sum((1, 2)), G.square().sum((1, 2)))
    torch.testing.assert_close(basis.mean(basis.spectrum()), torch.tensor(1 / 12))
    assert len(samples) == 2


@pytest.mark.parametrize(("n", "rank"), [(2, 3), (6, 4), (6, 3), (1, 2)])
def test_leading_eigenvectors_of_averaged_factors(n, rank):
    first, old = random_basis(a=5, rank=5)
    samples = Samples(torch.randn(2, n, 5), torch.randn(2, n, 3))
    new = eigenbasis(samples, rank, old, keep=0.3)
    (A0, B0), (A1, B1) = factors(first), factors(samples)
    for eigen, before, after in ((new.input, A0, A1), (new.output, B0, B1)):
        average = 0.3 * before / _trace(before) + 0.7 * after / _trace(after)
        values = torch.linalg.eigvalsh(average).flip(-1)[..., : eigen.values.shape[-1]]
        torch.testing.assert_close(eigen.values, values)
        torch.testing.assert_close(average @ eigen.vectors, eigen.vectors * eigen.values[..., None, :])
    assert new.input.vectors.shape == (2, 5, rank)


def test_few_samples_give_an_orthonormal_basis_of_their_span():
    samples = Samples(torch.randn(1, 2, 6), torch.randn(1, 2, 3))
    basis = eigenbasis(samples, rank=4)
    U = basis.input.vectors
    assert U.shape == (1, 6, 2)
    torch.testing.assert_close(U.mT @ U, torch.eye(2)[None])
    torch.testing.assert_close(samples.inputs @ U @ U.mT, samples.inputs)
    torch.testing.assert_close(basis.output.vectors.mT @ basis.output.vectors, torch.eye(3)[None])


def test_many_samples_are_thinned_for_a_leading_basis():
    inputs, gradients = torch.randn(1, 20, 4), torch.randn(1, 20, 2)
    thinned = eigenbasis(Samples(inputs, gradients), rank=2).input
    torch.testing.assert_close(thinned, eigenbasis(Samples(inputs[:, ::2], gradients), rank=2).input)
    whole = eigenbasis(Samples(inputs, gradients), rank=4).input
    torch.testing.assert_close(whole.values.sum(), torch.tensor(1.0))


def test_a_dead_layer_has_a_basis():
    basis = eigenbasis(Samples(torch.zeros(1, 4, 3), torch.zeros(1, 4, 2)), rank=8)
    moments = first_moments(basis, torch.zeros(1, 2, 3))
    tiny = torch.tensor(torch.finfo(moments.dtype).tiny)
    step = basis.precondition(*basis.turn(torch.zeros(1, 2, 3)), moments, tiny, 0.5)
    torch.testing.assert_close(step, torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("before", "after"), [(4, 4), (2, 3), (3, 2), (4, 2), (2, 4)])
def test_moments_move_with_the_basis(before, after):
    _, old = random_basis(rank=before)
    _, new = random_basis(rank=after)
    moments = torch.rand(2, 3, min(before + 1, 4))
    moved = carried_moments(moments, old, new)
    full = _spread(moments, before)
    RA = new.input.vectors.mT @ _completed(old.input.vectors)
    RB = new.output.vectors.mT @ old.output.vectors
    expected = RB.square() @ full @ RA.square().mT
    torch.testing.assert_close(moved[..., :after], expected)
    total = moved[..., :after].sum((1, 2)) + (4 - after) * moved[..., after:].sum((1, 2))
    torch.testing.assert_close(total, full.sum((1, 2)))


def test_eigenvectors_are_found_again_in_double_precision(monkeypatch):
    eigh, calls = torch.linalg.eigh, []

    def stubborn(matrix):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    samples = Samples(torch.randn(1, 4, 3, dtype=torch.float32), torch.randn(1, 4, 2, dtype=torch.float32))
    basis = eigenbasis(samples, rank=3)
    assert basis.input.vectors.dtype == torch.float32
    assert torch.float64 in calls


def test_records_know_their_rest():
    assert Eigen(torch.zeros(1, 5, 2), torch.zeros(1, 2)).rest == 3
    assert (
        Basis(Eigen(torch.zeros(1, 5, 5), torch.zeros(1, 5)), Eigen(torch.eye(2)[None], torch.ones(1, 2))).input.rest
        == 0
    )
