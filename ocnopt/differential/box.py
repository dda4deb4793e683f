r"""Small quadratic problems in a box, many at once.

Minimise  d^T (g + H_x x) + 1/2 d^T H d  over  lower <= d <= upper  at x = 0 by projected Newton steps (Bertsekas 1982; Tassa et al. 2014,
section III), together with the minimiser's linear response to x: d = k + K x, K = -H_ff^-1 H_x on the free entries, zero on the clamped.

Shapes: H ``(..., m, m)``, G = [g  H_x] ``(..., m, 1 + n)``, the result [k  K] likewise; the leading axes are independent problems.
"""

import torch
from torch import Tensor

from ocnopt.checks import Bounds

_MAX_ITERATIONS = 50
_STEPS = tuple(0.5**i for i in range(8))


def minimise_box(H: Tensor, G: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor]:
    """Return [k  K] and whether H was positive definite (the result is meaningless where it was not)."""
    m = G.shape[-2]
    if m == 0:
        return G, torch.ones(G.shape[:-2], dtype=torch.bool, device=G.device)
    if m == 1:
        fine = (H > 0)[..., 0, 0]
        K = -G / H
    else:
        factor, info = torch.linalg.cholesky_ex(H)
        fine = info == 0
        K = -torch.cholesky_solve(G, factor)
    if room is None:
        return K, fine
    k, (lower, upper) = K[..., 0], room
    inside = (k > lower) & (k < upper)
    if bool(inside.all()):
        return K, fine
    if m == 1:
        return torch.cat([k.clamp(lower, upper)[..., None], K[..., 1:] * inside[..., None]], dim=-1), fine
    return _clamped(H, G, k.clamp(lower, upper), lower, upper), fine


def _clamped(H: Tensor, G: Tensor, k: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """[k  K] with some entries at their bounds."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    k, free = _projected_newton(H, G[..., 0], k, eye, lower, upper)
    K = -_solve(_restrict(H, free, eye), torch.where(free[..., None], G[..., 1:], 0.0))
    return torch.cat([k[..., None], K], dim=-1)


def _projected_newton(
    H: Tensor, g: Tensor, k: Tensor, eye: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimiser and which of its entries are free."""
    alphas = g.new_tensor(_STEPS).reshape((-1, *(1,) * g.ndim))
    size = H.abs().amax((-2, -1))[..., None]
    free = torch.ones_like(k, dtype=torch.bool)
    for _ in range(_MAX_ITERATIONS):
        gradient = g + _times(H, k)
        free = ~(((k <= lower) & (gradient > 0)) | ((k >= upper) & (gradient < 0)))
        downhill = torch.where(free, gradient, 0.0)
        # written so that a NaN (a problem already given up) ends the loop
        if not bool((downhill.abs() > 1e-14 * size * (1 + k.abs())).any()):
            break
        newton = -_solve(_restrict(H, free, eye), downhill[..., None])[..., 0]
        trials = (k + alphas * newton).clamp(lower, upper)
        values = ((g + 0.5 * _times(H, trials)) * trials).sum(-1)
        best = values.argmin(0)[None, ..., None].expand(1, *k.shape)
        k = torch.gather(trials, 0, best)[0]
    return k, free


def _restrict(H: Tensor, free: Tensor, eye: Tensor) -> Tensor:
    """H on the free entries, the identity on the clamped ones."""
    return torch.where(free[..., :, None] & free[..., None, :], H, eye)


def _solve(H: Tensor, right: Tensor) -> Tensor:
    """H^-1 right without an error where one of many problems is singular."""
    return torch.linalg.solve_ex(H, right)[0]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
