"""Matrices with orthonormal columns: tangent vectors and retractions.

U ``(..., n, p)`` with n >= p and U^T U = I; leading axes are a batch. A tangent vector xi ``(..., n, p)`` has

    stiefel     U^T xi skew                       the matrices themselves
    grassmann   U^T xi = 0                        U stands for the space that its columns span
    euclidean   any xi, any U                     what is not constrained

and a retraction R_U(xi) = U + xi + O(|xi|^2) leads back onto the manifold. Source: Absil, Mahony, Sepulchre,
"Optimization algorithms on matrix manifolds" (2008); Wen, Yin, "A feasible method for optimization with orthogonality
constraints" (2013) for the Cayley transform.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import ProblemError

MANIFOLDS = ("stiefel", "grassmann", "euclidean")
RETRACTIONS = ("qr", "polar", "cayley")
DRIFT = 1e-4  # largest entry of U^T U - I that a retraction is trusted to repair


def orthonormal(matrix: Tensor) -> Tensor:
    """The view whose columns are orthonormal: a wide matrix has orthonormal rows."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def tangent(U: Tensor, G: Tensor, manifold: str) -> Tensor:
    """The orthogonal projection of G onto the tangent space at U."""
    if manifold == "euclidean":
        return G
    UtG = U.mT @ G
    return G - U @ (UtG if manifold == "grassmann" else (UtG + UtG.mT) / 2)


def retract(U: Tensor, xi: Tensor, retraction: str) -> Tensor:
    """R_U(xi) for a tangent xi: Q of U + xi (R with a positive diagonal), its polar factor, or Cayley's rotation."""
    if retraction == "qr":
        Q, R = torch.linalg.qr(U + xi)
        return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(U).unsqueeze(-2)
    if retraction == "polar":
        return polar(U + xi)
    half = xi - U @ (U.mT @ xi) / 2
    if 2 * U.shape[-1] >= U.shape[-2]:
        return rotate(U, half @ U.mT - U @ half.mT)
    # W = A B^T of rank 2p: by Woodbury's formula a system of size 2p instead of n
    A, B = torch.cat([half, U], -1), torch.cat([U, -half], -1)
    eye = torch.eye(A.shape[-1], dtype=U.dtype, device=U.device)
    return polished(U + A @ torch.linalg.solve(eye - B.mT @ A / 2, B.mT @ U))


def rotate(U: Tensor, W: Tensor) -> Tensor:
    """(I - W/2)^-1 (I + W/2) U for a skew W ``(..., n, n)``, a rotation."""
    eye = torch.eye(W.shape[-1], dtype=U.dtype, device=U.device)
    return polished(torch.linalg.solve(eye - W / 2, U + W @ U / 2))


def polar(A: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns."""
    left, _, right = torch.linalg.svd(A, full_matrices=False)
    return left @ right


def polished(U: Tensor) -> Tensor:
    """One Newton step towards the polar factor: rotations keep U^T U as it is, rounding errors included."""
    return U + U @ (torch.eye(U.shape[-1], dtype=U.dtype, device=U.device) - U.mT @ U) / 2


def put_onto(parameters: Sequence[Tensor], names: Sequence[str], manifold: str) -> None:
    """Replace matrices by the nearest ones with orthonormal columns, or rows where they are wide; frozen ones stay.

    Raises:
        ProblemError: not a matrix, half precision, one that could not move, NaN, or columns that are linearly
            dependent; nothing was replaced.
    """
    nearest = {}
    for parameter, name in zip(parameters, names, strict=True):
        if parameter.ndim < 2 or parameter.numel() == 0 or parameter.dtype not in (torch.float32, torch.float64):
            raise ProblemError(
                f"{name} has shape {tuple(parameter.shape)} and is {parameter.dtype}; expected matrices (..., n, p) of "
                "float32 or float64: put biases and the like into a group with manifold='euclidean', or into an "
                "optimiser of their own"
            )
        n, p = parameter.shape[-2:]
        if n == p and (manifold == "grassmann" or n == 1):
            why = "is 1 or -1 there" if n == 1 else "spans the whole space, the only point of its Grassmann manifold"
            raise ProblemError(
                f"{name} has shape {tuple(parameter.shape)}, and a square matrix {n} x {n} {why}, so that it would "
                "never move; expected room to move: put it into a group with another manifold"
            )
        if not parameter.requires_grad:
            continue
        A = orthonormal(parameter.detach())
        if not bool(A.isfinite().all()):
            raise ProblemError(f"{name} holds NaN or infinity; expected finite numbers: initialise it anew")
        values = torch.linalg.svdvals(A)
        if not bool((values[..., -1] > 100 * torch.finfo(A.dtype).eps * values[..., 0]).all()):
            raise ProblemError(
                f"{name} has linearly dependent columns, so that no matrix with orthonormal ones is nearest; expected "
                "full rank: initialise it, as by torch.nn.init.orthogonal_"
            )
        # what is on the manifold already stays, bit for bit
        nearest[parameter] = A if bool(_drift(A).amax() <= 100 * torch.finfo(A.dtype).eps) else polar(A)
    for parameter, U in nearest.items():
        orthonormal(parameter.detach()).copy_(U)


def check_on_manifold(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse matrices that somebody moved away from the manifold.

    Raises:
        ProblemError: U^T U is not the identity.
    """
    for name, drift in zip(names, drifts(parameters), strict=True):
        if not drift <= DRIFT:
            raise ProblemError(
                f"{name} is off its manifold: |U^T U - I| = {drift:.3g}; expected at most {DRIFT}: load, change or "
                "unfreeze weights before the optimiser is made, which puts them onto it; nothing else may move them"
            )


def drifts(parameters: Sequence[Tensor]) -> list[float]:
    """The largest entry of U^T U - I of each parameter."""
    found = [0.0] * len(parameters)
    for same in alike(parameters):
        each = _drift(torch.stack([orthonormal(parameters[i].detach()) for i in same])).reshape(len(same), -1).amax(1)
        for i, drift in zip(same, each.tolist(), strict=True):
            found[i] = drift
    return found


def alike(parameters: Sequence[Tensor]) -> list[list[int]]:
    """The indices of parameters that can be stacked, so that one operation works on all of them."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, parameter in enumerate(parameters):
        found.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(i)
    return [*found.values()]


def _drift(U: Tensor) -> Tensor:
    return (U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)).abs().amax((-2, -1))
