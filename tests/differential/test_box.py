"""Box-constrained quadratic problems against every active set there is, and the response K against differences."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.differential.sweep import minimise_box
from tests.oracles.compare import assert_close


def by_enumeration(H, g, lower, upper):
    """The minimiser: the best feasible candidate over all choices of free, lower and upper entries."""
    best, value = None, np.inf
    for choice in itertools.product("flu", repeat=len(g)):
        d = np.where(np.array(choice) == "l", lower, upper)
        free = np.array(choice) == "f"
        if not np.all(np.isfinite(d[~free])):
            continue
        if free.any():
            right = -g[free] - H[np.ix_(free, ~free)] @ d[~free]
            d[free] = np.linalg.solve(H[np.ix_(free, free)], right)
        cost = g @ d + 0.5 * d @ H @ d
        if np.all(d >= lower - 1e-13) and np.all(d <= upper + 1e-13) and cost < value:
            best, value = d.copy(), cost
    return best


def draw(seed, batch, m, n, conditioning=1.0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, m, m, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -np.log10(conditioning) / 2, m, dtype=torch.float64)
    H = scale[:, None] * (root @ root.mT + 0.3 * torch.eye(m)) * scale
    G = torch.randn(*batch, m, 1 + n, generator=generator, dtype=torch.float64)
    lower = -torch.rand(*batch, m, generator=generator, dtype=torch.float64)
    upper = torch.rand(*batch, m, generator=generator, dtype=torch.float64)
    return H, G, lower, upper


@given(
    seed=st.integers(0, 10_000),
    batch=st.sampled_from([(), (4,), (2, 3)]),
    m=st.integers(1, 4),
    conditioning=st.sampled_from([1.0, 1e4]),
)
def test_the_minimiser(seed, batch, m, conditioning):
    H, G, lower, upper = draw(seed, batch, m, 2, conditioning)
    K, fine = minimise_box(H, G, (lower, upper))
    assert bool(fine.all())
    flat = [v.reshape(-1, *v.shape[len(batch) :]).numpy() for v in (H, G[..., 0], lower, upper)]
    expected = np.stack([by_enumeration(*parts) for parts in zip(*flat, strict=True)]).reshape(*batch, m)
    assert_close(K[..., 0], expected, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 10_000), m=st.integers(1, 4))
def test_the_response_is_the_derivative_of_the_minimiser(seed, m):
    H, G, lower, upper = draw(seed, (), m, 3)
    K, _ = minimise_box(H, G, (lower, upper))
    step = 1e-6
    for i in range(3):
        moved = []
        for sign in (step, -step):
            shifted = G.clone()
            shifted[..., 0] += sign * G[..., 1 + i]
            moved.append(minimise_box(H, shifted, (lower, upper))[0][..., 0])
        assert_close((moved[0] - moved[1]) / (2 * step), K[..., 1 + i], rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10_000), m=st.integers(1, 4))
def test_what_is_clamped_does_not_respond(seed, m):
    H, G, lower, upper = draw(seed, (5,), m, 2)
    K, _ = minimise_box(H, 10 * G, (lower, upper))
    clamped = (K[..., 0] == lower) | (K[..., 0] == upper)
    assert bool(clamped.any())
    assert float(K[..., 1:][clamped].abs().max()) == 0.0


@given(seed=st.integers(0, 10_000), batch=st.sampled_from([(), (4,)]), m=st.integers(1, 4), n=st.integers(0, 3))
def test_without_a_box(seed, batch, m, n):
    H, G, _, _ = draw(seed, batch, m, n)
    K, fine = minimise_box(H, G, None)
    assert bool(fine.all())
    assert_close(K, -torch.linalg.solve(H, G), rtol=1e-9, atol=1e-12)
    far = torch.full((m,), np.inf, dtype=torch.float64)
    assert_close(minimise_box(H, G, (-far, far))[0], K)


@pytest.mark.parametrize("m", [1, 2])
def test_a_matrix_that_is_not_positive_definite_is_reported_alone(m):
    H, G, lower, upper = draw(0, (4,), m, 2)
    bad = H.clone()
    bad[1] = -torch.eye(m)
    bad[2] = torch.nan
    for room in (None, (lower, upper)):
        K, fine = minimise_box(bad, G, room)
        assert fine.tolist() == [True, False, False, True]
        assert_close(K[fine], minimise_box(H, G, room)[0][fine], rtol=1e-12)


def test_indefinite_with_positive_diagonal():
    H = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    assert not bool(minimise_box(H, torch.ones(2, 1).double(), None)[1])


@pytest.mark.parametrize("m", [1, 3])
def test_curvature_along_an_entry_held_at_its_bound_does_not_count(m):
    """The first entry sits at its upper bound and its gradient pushes outwards; there the function may be concave."""
    H, G, lower, upper = draw(0, (), m, 2)
    H, G, upper = H.clone(), G.clone(), upper.clone()
    H[0, 0], G[0, 0], upper[0] = -5.0, -1.0, 0.0
    K, fine = minimise_box(H, G, (lower, upper))
    assert bool(fine)
    assert_close(K[0], torch.zeros(3))
    if m > 1:
        others = minimise_box(H[1:, 1:], G[1:], (lower[1:], upper[1:]))[0]
        assert_close(K[1:], others, rtol=1e-10, atol=1e-12)
    G[0, 0] = 1.0
    assert not bool(minimise_box(H, G, (lower, upper))[1])


def test_nothing_to_choose():
    K, fine = minimise_box(torch.zeros(3, 0, 0), torch.zeros(3, 0, 5), None)
    assert K.shape == (3, 0, 5)
    assert fine.tolist() == [True] * 3


@pytest.mark.parametrize("m", [1, 3])
def test_no_room_at_all(m):
    H, G, _, _ = draw(0, (4,), m, 2)
    zero = torch.zeros(m).double()
    K, _ = minimise_box(H, G, (zero, zero))
    assert_close(K, torch.zeros_like(K))


@pytest.mark.parametrize("m", [1, 3])
def test_room_shared_by_a_batch(m):
    H, G, _, _ = draw(0, (4,), m, 2)
    half = torch.full((m,), 0.1).double()
    shared = minimise_box(H, G, (-half, half))[0]
    assert_close(shared, minimise_box(H, G, (-half.expand(4, m), half.expand(4, m)))[0], rtol=1e-12)


@given(seed=st.integers(0, 10_000), m=st.integers(2, 4))
def test_problems_of_a_batch_do_not_touch_each_other(seed, m):
    H, G, lower, upper = draw(seed, (4,), m, 2)
    together = minimise_box(H, G, (lower, upper))[0]
    for i in range(4):
        assert_close(minimise_box(H[i], G[i], (lower[i], upper[i]))[0], together[i], rtol=1e-10, atol=1e-12)
