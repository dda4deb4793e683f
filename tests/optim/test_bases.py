"""Eigenbases and the preconditioned step against dense linear algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ocnopt.differential.kronecker import Samples, as_matrix
from ocnopt.optim.bases import Basis, Eigen, carried_moments, complete, eigenbasis, first_moments, follow, tracked
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
    step = basis.scaled(basis.turn(G), 1.0 / spectrum)
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
    W = as_matrix(layer.weight, layer.bias, 1).detach() - basis.scaled(basis.turn(G), 1.0 / moments)
    solution = torch.linalg.lstsq(functional.pad(z, (0, 1), value=1.0), y).solution
    torch.testing.assert_close(W[0], solution.mT)


def cut(vectors, rank):
    """The first of some orthonormal vectors, with eigenvalues whose sum is below 1 where vectors are missing."""
    values = torch.rand(len(vectors), rank).sort(descending=True).values
    missing = 0.5 if rank < vectors.shape[-1] else 0.0
    return Eigen(vectors[..., :rank], values / values.sum(-1, keepdim=True) * (1 - missing))


class Dense:
    """A basis completed to orthonormal vectors of the whole space, each direction of a rest with its mean moment."""

    def __init__(self, groups, b, a, q, r):
        self.UA, self.UB = (torch.linalg.qr(torch.randn(groups, d, d)).Q for d in (a, b))
        self.basis = Basis(cut(self.UA, r), cut(self.UB, q))
        self.sizes = groups, b, a, q, r

    def spread(self, moments):
        _, b, a, q, r = self.sizes
        rows = [*range(q), *[q] * (b - q)]
        return moments[:, rows][:, :, [*range(r), *[r] * (a - r)]]

    def gathered(self, full):
        _, b, a, q, r = self.sizes
        for d, k, dim in ((b, q, 1), (a, r, 2)):
            if k < d:
                inside, outside = full.split([k, d - k], dim)
                full = torch.cat([inside, outside.mean(dim, keepdim=True)], dim)
        return full

    def moments(self):
        groups, b, a, q, r = self.sizes
        return torch.rand(groups, q + (q < b), r + (r < a))


@st.composite
def dense_bases(draw):
    groups, b, a = (draw(st.integers(1, most)) for most in (3, 6, 6))
    q, r = draw(st.integers(1, b)), draw(st.integers(1, a))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Dense(groups, b, a, q, r)


EXACT = {"rtol": 1e-10, "atol": 1e-10}


@given(dense_bases(), st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.booleans())
def test_precondition_against_dense_matrices(dense, power, has_memory):
    groups, b, a, *_ = dense.sizes
    M, moments, basis = torch.randn(groups, b, a), dense.moments(), dense.basis
    full = dense.spread(moments)
    floor = 0.1 * basis.totals(moments).sum() / M.numel()
    scaled = dense.UB.mT @ M @ dense.UA / (full + 0.1 * full.mean()) ** power
    out = torch.full_like(M, torch.nan) if has_memory else None
    turned, scales = basis.turn(M), (moments + floor) ** -power
    expected = dense.UB @ scaled @ dense.UA.mT
    torch.testing.assert_close(basis.scaled(turned, scales, out), expected, **EXACT)


@given(dense_bases())
def test_moments_against_dense_matrices(dense):
    groups, b, a, *_ = dense.sizes
    G, basis = torch.randn(groups, b, a), dense.basis
    turned = (dense.UB.mT @ G @ dense.UA).square()
    squares = basis.squares(basis.turn(G))
    torch.testing.assert_close(squares, dense.gathered(turned), **EXACT)
    torch.testing.assert_close(basis.totals(squares)[:, 0, 0], turned.sum((1, 2)), **EXACT)
    assert bool((squares >= 0).all())
    torch.testing.assert_close(dense.spread(basis.spectrum()).sum((1, 2)), torch.ones(groups), **EXACT)
    torch.testing.assert_close(dense.spread(first_moments(basis, G)).sum((1, 2)), turned.sum((1, 2)), **EXACT)


@given(dense_bases(), st.data())
def test_moments_move_with_the_basis(old, data):
    groups, b, a, *_ = old.sizes
    new = Dense(groups, b, a, data.draw(st.integers(1, b)), data.draw(st.integers(1, a)))
    moments = old.moments()
    moved = carried_moments(moments, old.basis, new.basis)
    RA, RB = new.UA.mT @ old.UA, new.UB.mT @ old.UB
    dense = RB.square() @ old.spread(moments) @ RA.square().mT
    torch.testing.assert_close(moved, new.gathered(dense), **EXACT)
    alone = new.basis._replace(output=old.basis.output)
    whole = carried_moments(moments, old.basis, Basis(alone.input, Eigen(*(part.clone() for part in alone.output[:2]))))
    torch.testing.assert_close(carried_moments(moments, old.basis, alone), whole, **EXACT)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 2), st.sampled_from([1e-200, 1.0, 1e100]))
def test_steps_of_orthogonal_iteration_lead_to_all_eigenvectors(groups, width, missing, size):
    exact = torch.linalg.qr(torch.randn(groups, width, width)).Q
    values = 3.0 ** -torch.arange(width)
    values[width - min(missing, width - 1) :] = 0.0  # in whose directions any vectors will do
    factor = size * (exact * values) @ exact.mT
    found = Eigen(torch.linalg.qr(torch.randn(groups, width, width)).Q, values)
    for _ in range(30):
        found = tracked(factor, found.vectors)
        torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(width).expand(groups, -1, -1), **EXACT)
    torch.testing.assert_close(found.values, complete(factor).values, rtol=0, atol=1e-7)
    rank = int((values > 0).sum())
    overlaps = (found.vectors[..., :rank].mT @ exact[..., :rank]).square()
    torch.testing.assert_close(overlaps, torch.eye(rank).expand(groups, -1, -1), rtol=0, atol=1e-7)


def test_a_factor_with_nan_has_no_eigenvectors():
    with pytest.raises(torch.linalg.LinAlgError):
        tracked(torch.full((1, 3, 3), torch.nan), torch.eye(3)[None])


def test_wide_sides_follow_the_leading_singular_vectors(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 6)
    monkeypatch.setattr("ocnopt.optim.bases.LEADING", 3)
    left, right = (torch.linalg.qr(torch.randn(2, d, d)).Q[..., :5] for d in (8, 9))
    M = 1e-6 * left @ torch.diag(torch.tensor([3.0, 2.0, 1.5, 0.5, 0.1])) @ right.mT  # of any size
    UA = follow(M, None, None)
    UB = follow(M.mT, None, UA)
    for _ in range(40):
        UA = follow(M, UA, UB)
        UB = follow(M.mT, UB, UA)
    for found, exact in ((UA, right), (UB, left)):
        assert found.vectors.shape[-1] == 3
        torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(3).expand(2, 3, 3))
        overlaps = (found.vectors.mT @ exact[..., :3]).square()
        torch.testing.assert_close(overlaps, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-6)
        expected = torch.tensor([9.0, 4.0, 2.25]) / 15.25
        torch.testing.assert_close(found.values, expected.expand(2, 3), rtol=0, atol=1e-6)


def test_rows_that_were_seen_need_no_product(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 6)
    monkeypatch.setattr("ocnopt.optim.bases.BESIDE_SHORT", 3)
    M, UB = torch.randn(2, 5, 9), Eigen(torch.linalg.qr(torch.randn(2, 5, 5)).Q, torch.rand(2, 5))
    for old in (None, Eigen(torch.linalg.qr(torch.randn(2, 9, 3)).Q, torch.rand(2, 3))):
        found, expected = follow(M, old, UB, seen=UB.vectors.mT @ M), follow(M, old, UB)
        torch.testing.assert_close(found.values, expected.values)
        torch.testing.assert_close(found.vectors @ found.vectors.mT, expected.vectors @ expected.vectors.mT)


def test_a_wide_side_without_gradients_has_a_basis():
    basis = follow(torch.zeros(1, 5, 200), None, None)
    torch.testing.assert_close(basis.vectors.mT @ basis.vectors, torch.eye(32)[None])
    assert not basis.values.any()


def test_samples_of_wide_sides_give_leading_vectors(monkeypatch):
    monkeypatch.setattr("ocnopt.optim.bases.WIDEST", 6)
    monkeypatch.setattr("ocnopt.optim.bases.LEADING", 3)
    samples = Samples(torch.randn(2, 12, 9), torch.randn(2, 12, 8))
    basis = eigenbasis(samples, 128)
    A, B = factors(samples)
    for eigen, factor in zip(basis, (A, B), strict=True):
        values, vectors = torch.linalg.eigh(factor / _trace(factor))
        torch.testing.assert_close(eigen.values, values.flip(-1)[..., :3])
        overlaps = (eigen.vectors.mT @ vectors.flip(-1)[..., :3]).square()
        torch.testing.assert_close(overlaps, torch.eye(3).expand(2, 3, 3))


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
    step = basis.scaled(basis.turn(torch.zeros(1, 2, 3)), (moments + tiny) ** -0.5)
    torch.testing.assert_close(step, torch.zeros(1, 2, 3))


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


@pytest.mark.parametrize("lost", ["an error", "NaN"])
def test_no_eigenvectors_at_all_are_an_error(lost, monkeypatch):
    def hopeless(matrix):
        if lost == "NaN":
            return matrix[..., 0], matrix * torch.nan
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", hopeless)
    with pytest.raises(torch.linalg.LinAlgError, match="in double precision too"):
        complete(torch.eye(3)[None])


@pytest.mark.parametrize("exponent", range(4, 46, 2))
def test_rows_of_any_size_leave_eigenvectors_orthonormal(exponent):
    for width in (8, 16, 32):
        torch.manual_seed(exponent)
        rows = torch.randn(20, width, width, dtype=torch.float32)
        rows[:, width // 2 :] *= 10.0**-exponent
        factor = rows @ rows.mT
        vectors, values, _ = complete(factor)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(width).expand_as(factor).float(), rtol=0, atol=1e-5)
        factor /= factor.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, factor, rtol=0, atol=1e-6)


def test_records_know_their_rest():
    assert Eigen(torch.zeros(1, 5, 2), torch.zeros(1, 2)).rest == 3
    assert (
        Basis(Eigen(torch.zeros(1, 5, 5), torch.zeros(1, 5)), Eigen(torch.eye(2)[None], torch.ones(1, 2))).input.rest
        == 0
    )
