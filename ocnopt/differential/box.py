r"""Small quadratic problems in a box, many at once.

Minimise  g^T d + 1/2 d^T H d  over  lower <= d <= upper  by projected Newton steps (Bertsekas 1982; Tassa et al. 2014, section III), with the
linear response of the minimiser to x where the gradient is g + H_x x: K = -H_ff^-1 H_x,f on the free entries, zero on the clamped ones.

Shapes: H ``(..., m, m)``, g ``(..., m)``, H_x ``(..., m, n)``; the leading axes are independent problems.
"""

import torch
from torch import Tensor

from ocnopt.checks import Bounds

_MAX_ITERATIONS = 50
_STEPS = tuple(0.5**i for i in range(8))


def minimise_box(H: Tensor, g: Tensor, Hx: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the minimiser k, its response K and whether H was positive definite (k, K are meaningless where it was not)."""
    if g.shape[-1] == 0:
        return g, Hx, torch.ones(g.shape[:-1], dtype=torch.bool, device=g.device)
    if g.shape[-1] == 1:
        return _scalar(H, g, Hx, room)
    factor, info = torch.linalg.cholesky_ex(H)
    fine = (info == 0) & torch.isfinite(g).all(-1)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    if not bool(fine.all()):
        H = torch.where(fine[..., None, None], H, eye)
        factor = torch.where(fine[..., None, None], factor, eye)
    if room is None:
        both = -torch.cholesky_solve(torch.cat([g[..., None], Hx], dim=-1), factor)
        return both[..., 0], both[..., 1:], fine
    k, free = _projected_newton(H, g, eye, *room)
    K = -torch.linalg.solve(_restrict(H, free, eye), torch.where(free[..., None], Hx, 0.0))
    return k, K, fine


def _scalar(H: Tensor, g: Tensor, Hx: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor, Tensor]:
    """One control: clamp the Newton step."""
    h = H[..., 0]
    fine = h > 0
    h = torch.where(fine, h, 1.0)
    k, K = -g / h, -Hx / h[..., None]
    if room is not None:
        free = (k > room[0]) & (k < room[1])
        k, K = k.clamp(*room), torch.where(free[..., None], K, 0.0)
    return k, K, fine[..., 0]


def _projected_newton(H: Tensor, g: Tensor, eye: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The minimiser and which of its entries are free."""
    lower, upper = lower.expand(g.shape), upper.expand(g.shape)
    k = torch.zeros_like(g).clamp(lower, upper)
    alphas = g.new_tensor(_STEPS).reshape(-1, *(1,) * g.ndim)
    for _ in range(_MAX_ITERATIONS):
        gradient = g + _times(H, k)
        free = ~(((k <= lower) & (gradient > 0)) | ((k >= upper) & (gradient < 0)))
        downhill = torch.where(free, gradient, 0.0)
        newton = -torch.linalg.solve(_restrict(H, free, eye), downhill[..., None])[..., 0]
        trials = torch.maximum(torch.minimum(k + alphas * newton, upper), lower)
        values = ((g + 0.5 * _times(H, trials)) * trials).sum(-1)
        best = values.argmin(0)
        moved = torch.gather(trials, 0, best[None, ..., None].expand(1, *k.shape))[0]
        done = (moved - k).abs() <= 1e-14 * (1 + k.abs())
        k = moved
        if bool(done.all()):
            break
    return k, free


def _restrict(H: Tensor, free: Tensor, eye: Tensor) -> Tensor:
    """H on the free entries, the identity on the clamped ones."""
    return torch.where(free[..., :, None] & free[..., None, :], H, eye)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
