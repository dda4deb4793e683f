r"""Networks whose layers are Runge-Kutta steps: x_{k+1} = x_k + h_k sum_i b_i f(y_i; A_k, b_k), y_i the stages.

The weights u_k = (A_k, b_k) of a layer are its staged control, one value for all its stages; the step sizes h_k are
fixed, learned, or learned on a simplex. With sigma an activation function, the fields are

    standard      f(y) = sigma(A y + b)
    gradient      f(y) = -A^T sigma(A y + b)          downhill on the sum of gamma(A y + b), gamma' = sigma
    hamiltonian   f(y) = J A^T sigma(A y + b)         J = [0 I; -I 0]: along the level sets of that sum

Back-propagation through a step is the symplectic adjoint: with the same b_i and the partner's a_ij, exact for the
discrete network (Benning et al. 2019, section 3). It is run by autograd through the whole graph, or as a sweep over the
layers, each of which is taken again (:func:`ocnopt.differential.discrete.layer_step`).

Sources: Benning, Celledoni, Ehrhardt, Owren and Schoenlieb, "Deep learning as optimal control problems", arXiv
1904.05657; Celledoni et al., "Structure preserving deep learning", arXiv 2006.03364 (fields, contractivity).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from math import sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.functional import linear

from ocnopt.checks import check_choice, is_number, is_whole, shape
from ocnopt.differential.discrete import Layer, layer_step, shortened
from ocnopt.differential.sweep import sweep
from ocnopt.errors import OcnoptError, ProblemError
from ocnopt.integrate.runge_kutta import Size
from ocnopt.integrate.runge_kutta import step as take_step
from ocnopt.integrate.tableaus import HEUN, RK4, TABLEAUS, Tableau
from ocnopt.neural.checks import search
from ocnopt.neural.evaluation import Surroundings
from ocnopt.neural.stability import Activation, Stability, check_entrywise, stability

METHODS: Mapping[str, Tableau] = MappingProxyType({"improved_euler": HEUN, "kutta4": RK4, **TABLEAUS})
STEPS = ("fixed", "free", "simplex")
ADJOINTS = ("backprop", "discrete")


def _standard(sigma: Activation, A: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return sigma(linear(y, A, b) if A.ndim == 2 else y @ A.mT + b[..., None, :])


def _gradient(sigma: Activation, A: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return -(_standard(sigma, A, b, y) @ A)


def _hamiltonian(sigma: Activation, A: Tensor, b: Tensor, y: Tensor) -> Tensor:
    q, p = (_standard(sigma, A, b, y) @ A).chunk(2, dim=-1)
    return torch.cat([p, -q], dim=-1)


FIELDS = MappingProxyType({"standard": _standard, "gradient": _gradient, "hamiltonian": _hamiltonian})


def project_simplex(h: Tensor, total: float = 1.0) -> Tensor:
    """The point nearest to ``h (n,)`` with entries >= 0 that sum to ``total`` > 0.

    >>> project_simplex(torch.tensor([0.5, 1.0, -2.0]))
    tensor([0.2500, 0.7500, 0.0000])
    """
    # the nearest point is the same for h + c, and nothing cancels where the largest entry is 0
    v = (h.to(torch.promote_types(h.dtype, torch.float32)) - h.amax()) / total
    mu, _ = torch.sort(v, descending=True)
    theta = ((mu.cumsum(0) - 1) / torch.arange(1, len(h) + 1, dtype=v.dtype, device=v.device)).amax()
    on_simplex = (v - theta).clamp(min=0.0)
    return (total * (on_simplex / on_simplex.sum())).to(h.dtype)


class RungeKuttaNet(nn.Module):
    """A network of Runge-Kutta steps, ``(*batch, width) -> (*batch, width)``.

    Net, ResNet, ODENet and ODENet+simplex of the source are ``skip=False, horizon=layers``, the default,
    ``step="free"`` and ``step="simplex"``, each with the Euler method.

    Args:
        width: n.
        layers: N.
        tableau: ``"euler"``, ``"improved_euler"``, ``"kutta3"``, ``"kutta4"``, or any explicit method of
            :mod:`ocnopt.integrate.tableaus`.
        step: ``"fixed"``: h = horizon/N. ``"free"``: learned from there, without a sign. ``"simplex"``: learned, h >= 0
            with sum ``horizon``: after any change, such as an optimiser's step, the stored sizes are projected before
            they are read again. Tensors that ``torch.func.functional_call`` puts in their place, and parameters that
            are exported, are projected in a copy; gradients are those at the projected sizes throughout.
        activation: a function or module that acts on each entry alone.
        field: ``"standard"``, ``"gradient"`` or ``"hamiltonian"`` (width even).
        horizon: T > 0, the sum of the step sizes at the start.
        skip: False leaves x_k out of x_{k+1} = x_k + h f(x_k), with the Euler method.
        adjoint: ``"backprop"`` keeps the graph of all stages. ``"discrete"`` keeps the states between layers and takes
            each layer again on the way back: the same gradient, less memory, one more forward pass.

    Attributes:
        weight: A, ``(N, n, n)``, at first normal with variance 2/n (1 in the plane, as published).
        bias: b, ``(N, n)``, at first zero.
        sizes: the learned h ``(N,)``; to be read as ``step_sizes``.

    Raises:
        ProblemError: an argument is wrong.

    >>> net = RungeKuttaNet(2, 15, tableau="kutta4", step="simplex")
    >>> net(torch.zeros(7, 2)).shape, round(float(net.step_sizes.sum()), 5)
    (torch.Size([7, 2]), 1.0)
    """

    def __init__(
        self,
        width: int | Any,
        layers: int | Any,
        *,
        tableau: str = "euler",
        step: str = "fixed",
        activation: Activation | Any = torch.tanh,
        field: str = "standard",
        horizon: float | Any = 1.0,
        skip: bool | Any = True,
        adjoint: str = "backprop",
    ) -> None:
        super().__init__()
        _check(width, layers, tableau, step, activation, field, horizon, skip, adjoint)
        self.tableau, self.step, self.activation, self.field = tableau, step, activation, field
        self.horizon, self.skip, self.adjoint = float(horizon), skip, adjoint
        self.weight = nn.Parameter(torch.empty(layers, width, width))
        self.bias = nn.Parameter(torch.empty(layers, width))
        if step != "fixed":
            self.sizes = nn.Parameter(torch.empty(layers))
        self.reset_parameters()
        check_entrywise(activation, self.weight)

    @property
    def width(self) -> int:
        """The length n of a state."""
        return self.weight.shape[-1]

    @property
    def layers(self) -> int:
        """N, the layers that are left."""
        return len(self.weight)

    @property
    def step_sizes(self) -> Tensor:
        """Step sizes h ``(N,)`` as the next forward pass uses them, a copy without a graph."""
        if self.step == "fixed":
            return torch.full_like(self.weight[:, 0, 0], self.horizon / max(1, self.layers), requires_grad=False)
        return self._learned_sizes().detach().clone()

    def reset_parameters(self) -> None:
        """Draw the weights, and set biases and step sizes to their first values."""
        nn.init.normal_(self.weight, std=sqrt(2 / self.width))
        nn.init.zeros_(self.bias)
        if self.step != "fixed":
            nn.init.constant_(self.sizes, self.horizon / max(1, self.layers))

    def project_(self) -> "RungeKuttaNet":
        """Put the parameter ``sizes`` of ``step="simplex"`` on the simplex; every reader of it does so first."""
        if self.step == "simplex":
            self._learned_sizes()
        return self

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor, size: Size) -> Tensor:
        """One layer with given weights, for problems that vary them.

        Args:
            x: ``(*batch, n)``; with axes in front of the weights ``(*lead, batch, n)``.
            weight: A, ``(*lead, n, n)``.
            bias: b, ``(*lead, n)``.
            size: h, a number, or a tensor that broadcasts against x.

        Returns:
            x_{k+1}, shaped like x.
        """
        field = partial(FIELDS[self.field], self.activation, weight, bias)
        if not self.skip:
            return size * field(x)
        x_next, _ = take_step(shortened(METHODS[self.tableau]), lambda t, y: field(y), 0.0, size, x)
        return x_next

    def states(self, x: Tensor | Any) -> list[Tensor]:
        """The states x_0..x_N that an input runs through, N + 1 tensors ``(*batch, n)``.

        Raises:
            ProblemError: as :meth:`forward`.
        """
        self._check_input(x)
        states = [x]
        for controls in self._controls():
            states.append(self._advance(states[-1], *controls))
        return states

    def forward(self, x: Tensor | Any) -> Tensor:
        """The last state.

        Args:
            x: ``(*batch, n)``.

        Raises:
            ProblemError: x does not fit, or the discrete adjoint cannot take the layers again.
        """
        self._check_input(x)
        if self.adjoint == "backprop" or not torch.is_grad_enabled() or not self.layers:
            for controls in self._controls():
                x = self._advance(x, *controls)
            return x
        surroundings = Surroundings(self, x.device)
        noise = surroundings.noise()
        _check_replayable(self._advance, x, self._controls()[0])
        end: Tensor = _Sweep.apply(self._advance, surroundings, x, *self._stacks())
        if surroundings.moved(noise):
            raise ProblemError(
                "the activation draws random numbers, and the discrete adjoint would meet other ones on its way back; "
                'expected the same function twice: use adjoint="backprop"'
            )
        surroundings.close()
        surroundings.note_buffers()
        return end

    @torch.no_grad()
    def prune(self) -> "RungeKuttaNet":
        """Remove the layers whose step size is zero, in place; the function stays the same.

        The parameters stay the same objects, shorter and without gradients, and what was computed before has none to
        give any more. An optimiser that keeps tensors of their old shapes has to be made anew.

        Returns:
            This network.

        Raises:
            ProblemError: there is no skip, so that a step of size zero forgets its input.

        >>> net = RungeKuttaNet(2, 3, step="free")
        >>> _ = net.sizes.data.copy_(torch.tensor([0.5, 0.0, 0.5]))
        >>> net.prune().layers
        2
        """
        if not self.skip:
            raise ProblemError(
                "prune() came to a network with skip=False, whose layers of size zero put out zeros; expected "
                "skip=True, under which they pass their input on"
            )
        kept = self.step_sizes != 0
        if not bool(kept.all()):
            for parameter in self._stacks():
                increment_version(parameter)  # a graph from before would leave a gradient of the old shape
                parameter.grad, parameter.data = None, parameter.data[kept].clone()
        return self

    def stability(self) -> Stability:
        """One-sided Lipschitz constants of the layers' fields and, for gradient fields, steps that contract.

        Raises:
            ProblemError: the activation is not elementwise, or its slopes leave [0, 1].

        >>> net = RungeKuttaNet(2, 1, field="gradient")
        >>> round(float(net.stability().step_bound * torch.linalg.matrix_norm(net.weight.detach(), 2) ** 2), 5)
        2.0
        """
        constants = stability(self.field, self.weight.detach(), self.activation, METHODS[self.tableau])
        return constants if self.skip else constants._replace(step_bound=None)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        kind = f"tableau={self.tableau!r}, step={self.step!r}, field={self.field!r}, horizon={self.horizon:g}"
        return f"width={self.width}, layers={self.layers}, {kind}, skip={self.skip}, adjoint={self.adjoint!r}"

    def _stacks(self) -> list[Tensor]:
        """What is learned, one entry a layer."""
        return [self.weight, self.bias, *([] if self.step == "fixed" else [self._learned_sizes()])]

    def _learned_sizes(self) -> Tensor:
        """The learned sizes, projected without a look at their values: no synchronisation, no break in a graph."""
        sizes: Tensor = self.sizes
        if self.step != "simplex" or not self.layers:
            return sizes
        with torch.no_grad():
            h, slack = sizes.detach(), 4 * self.layers * torch.finfo(sizes.dtype).eps * self.horizon
            is_on = (h.amin() >= 0) & ((h.sum() - self.horizon).abs() <= slack)
            h = torch.where(is_on, h, project_simplex(h, self.horizon))
        if isinstance(sizes, nn.Parameter) and not torch.compiler.is_exporting():
            # whoever changed the sizes has invalidated earlier graphs; where nobody did, this writes what is there
            sizes.data.copy_(h)
            return sizes
        return h + (sizes - sizes.detach())

    def _controls(self) -> list[tuple[Tensor, ...]]:
        """The same by layers."""
        return list(zip(*(stack.unbind(0) for stack in self._stacks()), strict=True))

    def _advance(self, x: Tensor, weight: Tensor, bias: Tensor, size: Tensor | None = None) -> Tensor:
        return self.layer(x, weight, bias, self.horizon / self.layers if size is None else size)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.project_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _check_input(self, x: Any) -> None:
        weight = self.weight
        is_like = isinstance(x, Tensor) and (
            (x.dtype, x.device) == (weight.dtype, weight.device) or torch.is_autocast_enabled(x.device.type)
        )
        if not is_like or x.shape[-1:] != (self.width,):
            came = f"shape {shape(x)}, {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
            raise ProblemError(
                f"x has {came}; expected a tensor (*batch, {self.width}), {weight.dtype} on {weight.device} as the "
                "weights: use x.to(net.weight), or net.to(x)"
            )


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, advance: Callable[..., Tensor], surroundings: Surroundings, x: Tensor, *stacks: Tensor
    ) -> Any:
        ctx.advance, ctx.surroundings, ctx.count = advance, surroundings, len(stacks)
        states = [x]
        for controls in zip(*(stack.unbind(0) for stack in stacks), strict=True):
            states.append(advance(states[-1], *controls))
        ctx.save_for_backward(*stacks, *states[:-1])
        return states[-1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise OcnoptError(
                "the gradient of a RungeKuttaNet was asked for with create_graph=True; the discrete adjoint gives "
                'first derivatives only: use adjoint="backprop"'
            )
        stacks, states = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        controls = zip(*(stack.unbind(0) for stack in stacks), strict=True)
        layers = list(map(Layer, repeat(ctx.advance), controls, states))
        with ctx.surroundings.restored():
            start, gradients = sweep(layer_step, layers, cotangents[0])
        return None, None, start, *(torch.stack(found) for found in zip(*gradients, strict=True))


def _check(
    width: Any,
    layers: Any,
    tableau: str,
    step: str,
    activation: Any,
    field: str,
    horizon: Any,
    skip: Any,
    adjoint: str,
) -> None:
    for name, count in (("width", width), ("layers", layers)):
        if not is_whole(count) or count < 1:
            raise ProblemError(f"{name} is {count!r}; expected a whole number >= 1")
    options: tuple[tuple[str, str, Sequence[str]], ...] = (
        ("tableau", tableau, (*METHODS,)),
        ("step", step, STEPS),
        ("field", field, (*FIELDS,)),
        ("adjoint", adjoint, ADJOINTS),
    )
    for name, value, known in options:
        check_choice(name, value, known)
    if not callable(activation):
        raise ProblemError(
            f"activation is {activation!r}; expected an elementwise function of a tensor, such as torch.tanh, or a "
            "module, such as torch.nn.ReLU()"
        )
    if not is_number(horizon) or not 0 < horizon < float("inf"):
        raise ProblemError(f"horizon is {horizon!r}; expected a positive number, the sum of all step sizes")
    if not isinstance(skip, bool):
        raise ProblemError(f"skip is {skip!r}; expected True or False: whether a layer adds its input to its output")
    if field == "hamiltonian" and width % 2:
        raise ProblemError(f"width is {width} with field='hamiltonian'; expected an even one: positions and momenta")
    if not skip and METHODS[tableau] is not TABLEAUS["euler"]:
        raise ProblemError(f"skip=False came with tableau={tableau!r}; expected 'euler': x_next = h f(x) has one stage")


def _check_replayable(advance: Callable[..., Tensor], x: Tensor, controls: Sequence[Tensor]) -> None:
    """Refuse a layer that depends on tensors whose gradient a replay would lose."""
    leaf = x.detach().reshape(-1, x.shape[-1])[:1].requires_grad_()
    end = advance(leaf, *(control.detach() for control in controls))
    stray = search(end, (leaf,))[0] if end.requires_grad else None
    if stray is not None:
        raise ProblemError(
            f"the activation uses a tensor of shape {shape(stray)} that requires gradients, which the discrete adjoint "
            'would lose; expected none: use adjoint="backprop", or detach it'
        )
