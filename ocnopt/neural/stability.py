r"""How far two states can part under the fields of a Runge-Kutta network, and which steps bring them together.

nu is the least number with <f(y) - f(z), y - z> <= nu |y - z|^2: two solutions part at most like exp(nu t). The
Jacobians are D A, -A^T D A and J A^T D A, D the diagonal matrix of the activation's slopes, between 0 and the identity;
nu is the supremum of the largest eigenvalue of their symmetric parts. |A| is the largest singular value of A.

    standard      (a - |A|) / 2 <= nu <= (a + |A|) / 2     a the largest eigenvalue of the symmetric part of A
    gradient      -(least singular value of A)^2 <= nu <= 0
    hamiltonian   0 <= nu <= |A|^2 / 2

A gradient field is also monotone, <f(y) - f(z), y - z> <= -|f(y) - f(z)|^2 / |A|^2, whence steps up to 2 r / |A|^2
contract, r the method's radius of circle contractivity. For Euler, r = 1, that is sharp; the bound that was published
is half of it.

Sources: Celledoni et al., "Structure preserving deep learning", arXiv 2006.03364; Dahlquist and Jeltsch, "Generalized
disks of contractivity for explicit and implicit Runge-Kutta methods", 1979.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.differential.discrete import shortened
from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import Tableau

Activation = Callable[[Tensor], Tensor]


class Stability(NamedTuple):
    """Constants of each layer's field, ``(layers,)``: ``lower <= nu <= upper`` whatever the biases.

    ``step_bound`` is a step size up to which no two outputs of a layer are farther apart than its inputs; None where
    the field promises no such step.
    """

    lower: Tensor
    upper: Tensor
    step_bound: Tensor | None


def stability(field: str, weight: Tensor, activation: Activation, tableau: Tableau) -> Stability:
    """The constants of layers with given weights.

    Args:
        field: "standard", "gradient" or "hamiltonian".
        weight: A, ``(layers, n, n)``.
        activation: with slopes between 0 and 1.
        tableau: the method.

    Raises:
        ProblemError: the activation is not elementwise, or its slopes leave [0, 1].

    >>> from ocnopt.integrate.tableaus import EULER
    >>> stability("gradient", torch.eye(2)[None], torch.tanh, EULER)
    Stability(lower=tensor([-1.]), upper=tensor([0.]), step_bound=tensor([2.]))
    """
    _check_slopes(activation, weight)
    values = torch.linalg.svdvals(weight)
    largest, zero = values[:, 0], torch.zeros_like(values[:, 0])
    if field == "standard":
        along = torch.linalg.eigvalsh((weight + weight.mT) / 2)[:, -1]
        return Stability((along - largest) / 2, (along + largest) / 2, None)
    if field == "hamiltonian":
        return Stability(zero, largest**2 / 2, None)
    return Stability(-(values[:, -1] ** 2), zero, _step_bound(contractivity_radius(tableau), largest))


def contractivity_radius(tableau: Tableau) -> float:
    """The radius r of circle contractivity of a method (Dahlquist and Jeltsch 1979); 0 where some b_i <= 0.

    -1/r is the least eigenvalue of B^(-1/2) (B A + A^T B - b b^T) B^(-1/2), B the diagonal matrix of b.

    >>> from ocnopt.integrate.tableaus import EULER
    >>> contractivity_radius(EULER)
    1.0
    """
    b = torch.tensor(shortened(tableau).b, dtype=torch.float64)
    if bool((b <= 0).any()):
        return 0.0
    A = torch.tensor([[*row, *[0.0] * (len(b) - len(row))] for row in shortened(tableau).a], dtype=torch.float64)
    M = b[:, None] * A + (b[:, None] * A).mT - torch.outer(b, b)
    return float(-1 / torch.linalg.eigvalsh(M / torch.sqrt(torch.outer(b, b)))[0])


def _step_bound(radius: float, largest: Tensor) -> Tensor:
    """2 r / |A|^2; without weights the field is the same everywhere, and any step will do."""
    return torch.where(largest > 0, 2 * radius / largest**2, torch.inf)


def check_entrywise(activation: Activation, like: Tensor) -> None:
    """Refuse an activation that changes shapes or mixes entries, looked at on three states ``(3, n)``.

    Where every entry is on its own, the Jacobian is diagonal: its product with c is c times that with ones.

    Args:
        activation: a function or module.
        like: weights ``(layers, n, n)``.

    Raises:
        ProblemError: it takes more than one tensor, returns another shape, or mixes entries.
    """
    own = next(iter(activation.parameters()), like) if isinstance(activation, nn.Module) else like
    if own.is_meta or type(own) not in (Tensor, nn.Parameter):
        return  # no values to look at: on the meta device, or a tensor class that stands for others
    count = 3 * like.shape[-1]
    # no order and no symmetry among the entries, and powers of two, which round nothing
    z = torch.sin(torch.arange(1.0, count + 1, dtype=torch.float64) ** 2).view(3, -1).to(own.device, own.dtype)
    c = (2.0 ** (torch.arange(count) % 5)).view(3, -1).to(z)
    ones, weighted = (_products(activation, z, cotangent) for cotangent in (torch.ones_like(z), c))
    if not torch.allclose(weighted, c * ones, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise ProblemError(
            "the activation mixes the entries of a state, or the states of a batch; expected a function of each entry "
            "alone, such as torch.tanh: put softmax, normalisations and the like before or behind the network"
        )


def _products(activation: Activation, z: Tensor, cotangent: Tensor) -> Tensor:
    """The transposed Jacobian of an activation times a cotangent, zero where it has none; random numbers stay."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([z.device] if z.is_cuda else []),
    ):
        leaf = z.clone().requires_grad_()
        try:
            y: object = activation(leaf.clone())  # it may work in place
        except TypeError as error:
            raise ProblemError(
                f"the activation refused a tensor {tuple(z.shape)} ({error}); expected a function of one tensor, such "
                "as torch.tanh: bind other arguments by functools.partial"
            ) from error
        if not isinstance(y, Tensor) or y.shape != z.shape:
            came = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"type {type(y).__name__}"
            raise ProblemError(
                f"the activation made {came} of a tensor {tuple(z.shape)}; expected the same shape: a function of each "
                "entry alone, such as torch.tanh"
            )
        if not y.requires_grad:
            return torch.zeros_like(z)
        (product,) = torch.autograd.grad(y, leaf, cotangent, materialize_grads=True)
        return product


def _check_slopes(activation: Activation, like: Tensor) -> None:
    """Refuse an activation that mixes entries, or whose slopes, looked at from -20 to 20, leave [0, 1]."""
    z = torch.linspace(-20, 20, 4001, dtype=like.dtype, device=like.device).requires_grad_()
    with torch.enable_grad():
        values = activation(z.clone())  # it may work in place
        (slopes,) = torch.autograd.grad(values.sum(), z)
    if not torch.allclose(values[::2], activation(z.detach()[::2].clone())):
        raise ProblemError(
            "the activation takes an entry to another value beside other entries; expected an elementwise function, "
            "the same at every call, on which the constants rest: use tanh, relu, sigmoid or softplus"
        )
    low, high = float(slopes.min()), float(slopes.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise ProblemError(
            f"the activation's slopes run from {low:.4g} to {high:.4g}; expected 0 to 1, on which the constants rest: "
            "use tanh, relu, sigmoid or softplus"
        )
