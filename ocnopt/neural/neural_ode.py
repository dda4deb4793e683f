"""A module whose output is the end of a path: dx/dt = F(t, x) from x(t0) = input to x(T) = output, F any module.

The forward pass walks. While memory lasts it keeps the graph of its steps, as any module does; what follows is one node
of autograd, which keeps what the chosen adjoint needs and runs that in the backward pass. Observers (curvature, the
horizon's policy) see what they need through it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_count, check_number
from ocnopt.differential.discrete import EndObserver, Observer, Observers
from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.integrate import adaptive, fixed, samples, torchdiffeq_bridge
from ocnopt.integrate.events import Watch
from ocnopt.integrate.runge_kutta import closed
from ocnopt.integrate.tableaus import STIFF, WALKING, Tableau
from ocnopt.integrate.walk import Walk
from ocnopt.neural import foreign
from ocnopt.neural.apart import require_apart
from ocnopt.neural.checks import (
    as_tensors,
    check_error_norm,
    check_event_not_transformed,
    check_field,
    check_not_looked_into,
    check_not_mapped,
    check_not_observed,
    check_observer,
    check_one_step_for_all,
    check_options,
    check_real,
    in_forward_mode,
)
from ocnopt.neural.continuous import Continuous
from ocnopt.neural.evaluation import Evaluation, Surroundings
from ocnopt.neural.function_field import FunctionField, as_field
from ocnopt.neural.meeting import meet
from ocnopt.neural.samples import SampleDiscrete, SampleJob, check_samples
from ocnopt.neural.solve import Discrete, Job, solve
from ocnopt.neural.state_layout import State, StateLayout
from ocnopt.neural.statistics import Dearest, Statistics
from ocnopt.neural.times import Times, read_end, read_sample_times, read_times
from ocnopt.neural.trees import mapped
from ocnopt.ocp import FreeHorizon, Horizon, read_horizon

DEFAULT_STEPS = 20


class NeuralODE(nn.Module):
    """The flow of ``dx/dt = field(t, x)`` over a horizon, as a layer.

    Args:
        field: any module or function ``field(t, x) -> dx/dt`` with t a 0-d tensor; x, which it leaves as it is, a
            tensor of any shape or a tuple of tensors; dx/dt a new one.
        horizon: the end time T (from 0), ``Horizon(t0, t1)``, also backwards, or ``FreeHorizon``: then T is the buffer
            ``T``, saved with the module and moved by a horizon policy.
        method: with error control ``"dopri5"``, ``"tsit5"``, ``"dopri8"`` (tight tolerances), ``"bosh3"``,
            ``"adaptive_heun"`` (loose ones); on a grid ``"rk4"``, ``"kutta3"``, ``"heun"``, ``"midpoint"``,
            ``"euler"``; for stiff fields ``"kvaerno5"``, implicit, with error control or on a grid, for states of some
            tens of numbers a sample (leading axis; a vector is one), which must not meet in the field; or any other
            method of torchdiffeq by its name.
        rtol: relative tolerance of an adaptive method.
        atol: absolute tolerance.
        steps: cut the horizon into this many equal steps instead; 20 for a method without an error estimate.
        adjoint: ``"discrete"``: the exact gradient of the steps taken, step sizes held. ``"continuous"``: integrates
            the costate backwards, memory constant in the number of steps. ``"backprop"``: autograd through every step.
        checkpoint_bytes: what "discrete" may keep of a path: the graph of its first steps, up to seven eighths, and the
            states of the others, which are taken again; states that do not fit are thinned to about the square root of
            their number. A watched solve, or one whose times need gradients, keeps states alone.
        adjoint_params: tensors besides the field's parameters that it depends on and that need gradients, or a function
            that returns them at every forward pass.
        max_evaluations: cap on the evaluations of one adaptive walk forwards.
        dense: whether outputs on the way are interpolated (order 4 for "dopri5" and "tsit5", 5 for "dopri8", else the
            cubic of Hermite) instead of ending a step each: that is more exact, but dear where there are many of them.
            The methods of torchdiffeq always interpolate.
        error_norm: ``"batch"``: one step size for all samples, whose error is one norm. ``"sample"``: each sample, the
            leading axis of the state, has its own step sizes and comes out as it would alone; the field is called with
            a time for each, of shape ``(B, 1, ..., 1)`` with as many axes as the state (``(B, 1)`` for a tuple), and
            samples must not meet in it. Its values and gradients at the initial states and a time for each, spread
            over the horizon, are looked at in the 1st, 2nd, 4th, 8th... solve of a shape; what makes samples meet only
            elsewhere or between looks is not seen. For the adjoints "discrete" and "backprop".
        parameters: what a function as field depends on: leaf tensors that require gradients, nn.Parameters, modules; an
            iterable, a dict, or one. They are registered as they are, not copied.

    Raises:
        ProblemError: an argument is wrong, or the field's output does not fit the state.

    Source: Chen et al., arXiv 1806.07366; the discrete adjoint is described in :mod:`ocnopt.differential.discrete`.

    >>> decay = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> _ = nn.init.constant_(decay.weight, -1.0)
    >>> class Field(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.decay = decay
    ...     def forward(self, t, x):
    ...         return self.decay(x)
    >>> ode = NeuralODE(Field(), horizon=2.0, rtol=1e-9, atol=1e-9)
    >>> y = ode(torch.ones(1, 1, dtype=torch.float64))
    >>> y.backward()
    >>> bool(abs(y - math.exp(-2.0)) < 1e-8), bool(abs(decay.weight.grad - 2 * math.exp(-2.0)) < 1e-7)
    (True, True)
    """

    T: Tensor

    def __init__(
        self,
        field: nn.Module | Any,
        horizon: float | Horizon | FreeHorizon = 1.0,
        *,
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        steps: int | None = None,
        adjoint: str = "discrete",
        checkpoint_bytes: int = 256 * 2**20,
        adjoint_params: Iterable[Tensor] | Callable[[], Iterable[Tensor]] | Any | None = None,
        max_evaluations: int | Any | None = 100_000,
        dense: bool = False,
        error_norm: str = "batch",
        parameters: Any = None,
    ) -> None:
        super().__init__()
        field = as_field(field, parameters)
        check_field(field._function if isinstance(field, FunctionField) else field)
        check_options(method, adjoint, steps, checkpoint_bytes)
        check_error_norm(error_norm, method, adjoint, steps=steps, dense=dense)
        check_number("rtol", rtol, "a finite number >= 0")
        check_number("atol", atol, "a finite number >= 0")
        if max_evaluations is not None:
            check_count("max_evaluations", max_evaluations, default=100_000)
        self.field = field
        self.method, self.rtol, self.atol, self.adjoint, self.dense = method, rtol, atol, adjoint, dense
        self.error_norm = error_norm
        self.steps, self.checkpoint_bytes, self.max_evaluations = steps, checkpoint_bytes, max_evaluations
        is_function = callable(adjoint_params) and not isinstance(adjoint_params, nn.Module)
        self.adjoint_params: Any = (
            adjoint_params if is_function else as_tensors(() if adjoint_params is None else adjoint_params)
        )
        self.horizon = horizon
        self.statistics, self._dearest = Statistics(), Dearest()
        self._weights: dict[object, int] = {}
        self._observers: OrderedDict[int, Observer | EndObserver] = OrderedDict()

    @property
    def horizon(self) -> Any:
        """The ``Horizon`` or ``FreeHorizon``; what the argument may be can be assigned, and T is the initial one."""
        return self.__dict__["horizon"]

    @horizon.setter
    def horizon(self, horizon: Any) -> None:
        read = self.__dict__["horizon"] = read_horizon(horizon)
        T = self._buffers.pop("T", torch.zeros((), dtype=torch.float64))
        if isinstance(read, FreeHorizon):
            self.register_buffer("T", T)
            self.T.data.fill_(read.initial)

    def forward(self, x: State, times: Times | None = None) -> State:
        """The state at the end of the horizon, or at ``times`` along a new leading axis.

        Args:
            x: the state at the start: a tensor, or a tuple of tensors.
            times: where to report instead of at the end, in one direction, equal ones side by side; from the start of
                the horizon, or its end where they run against it from there. Their gradients are exact too; a first one
                that is the start moves it. With ``error_norm="sample"`` also ``(K, B)``, one row for one end of each
                sample.

        Raises:
            ProblemError: the state, the times or the field's output do not fit.
            NonFiniteError: the path left the finite numbers.
            ConvergenceError: the step underflowed, or ``max_evaluations`` were spent.
        """
        if torch.is_inference_mode_enabled():  # a field that differentiates inside would find no graph
            with torch.inference_mode(mode=False), torch.no_grad():
                return self.forward(*mapped((x, times), Tensor.clone))
        layout = StateLayout.of(x)
        if self.error_norm == "sample":
            states = self._solve_samples(layout, layout.join(x), times)
            return layout.split(states[-1] if times is None else torch.stack([*states]))
        values, moving, wanted = self._read_times(times)
        path = [layout.join(x)]
        if len(values) > 1:
            path += self._solve(layout, path[0], values, moving)
        return layout.split(path[-1] if times is None else torch.stack([path[i] for i in wanted]))

    def until(self, event: Callable[[Tensor, Any], Any], x: State, *, direction: int = 0) -> tuple[Tensor, State]:
        """The time when an event happens first, and the state then; both are differentiable.

        Their gradients are those of the implicit function theorem, dt = -g_x x_theta / (g_t + g_x F), sizes of steps
        but the last held, and reach what g depends on. Samples share steps and time: reduce, or call once for each.

        Args:
            event: ``g(t, x)``, one number, whose change of sign is the event; t is a 0-d tensor. Each step is looked at
                in eight places: what changes back between two of them is not seen.
            x: the state at the start of the horizon, as in :meth:`forward`; an event there does not count.
            direction: 1 for values that rise through zero, -1 for those that fall, 0 for both.

        Returns:
            The time, 0-d, in the dtype of the state, and the state.

        Raises:
            ConvergenceError: nothing happens within the horizon.
            ProblemError: the event gives no differentiable number, or the method is one of torchdiffeq.

        >>> class Fall(nn.Module):
        ...     def forward(self, t, x):
        ...         return torch.stack([x[1], x.new_tensor(-9.81)])
        >>> start = torch.tensor([10.0, 0.0], dtype=torch.float64, requires_grad=True)
        >>> time, _ = NeuralODE(Fall(), horizon=5.0).until(lambda t, x: x[0], start)
        >>> time.backward()
        >>> bool(abs(time - (20 / 9.81) ** 0.5) < 1e-12), bool(abs(start.grad[0] - (20 * 9.81) ** -0.5) < 1e-12)
        (True, True)
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(mode=False), torch.no_grad():
                return self.until(event, mapped(x, Tensor.clone), direction=direction)
        check_event_not_transformed()
        check_one_step_for_all(self.error_norm, "until()", "one event ends the paths of all samples")
        if self.method not in WALKING:
            raise ProblemError(
                f"until() met method={self.method!r} of torchdiffeq; expected one of {', '.join(WALKING)}, which tell "
                "their steps"
            )
        if direction not in (-1, 0, 1):
            raise ProblemError(f"direction is {direction!r}; expected 1 (rising), -1 (falling) or 0 (both)")
        layout, (values, _, _) = StateLayout.of(x), self._read_times(None)
        watch = Watch(lambda t, x: event(t, layout.split(x)), direction, differentiated=torch.is_grad_enabled())
        (end,) = self._solve(layout, layout.join(x), values, None, watch)
        if watch.met is None:
            raise ConvergenceError(
                f"the event did not happen between t = {values[0]:.6g} and t = {values[1]:.6g}, where it "
                f"is {watch.last:.6g}; expected its sign to change: a longer horizon, direction=0, or shorter steps "
                "(steps=)"
            )
        time, end = meet(watch, watch.met, end)
        return time, layout.split(end)

    def read_most_evaluations(self) -> int:
        """The most evaluations of the field by one solve forwards, of those with gradients since this was last read.

        Until there is another such solve it reads the same again.
        """
        return self._dearest.read()

    @property
    def observers(self) -> list[Any]:
        """Those that watch at present."""
        return [*self._observers.values()]

    def observe(self, observer: Observer | EndObserver) -> RemovableHandle:
        """Let ``observer`` watch the backward pass of every solve from now on, until ``handle.remove()``.

        Raises:
            ProblemError: it is no observer, or the adjoint is not one of ours.
        """
        check_observer(observer, self.method, self.adjoint, self.error_norm)
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def extra_repr(self) -> str:
        """What ``print(module)`` shows of the solve."""
        control = f"steps={self.steps}" if self.steps else f"rtol={self.rtol}, atol={self.atol}"
        norm = ', error_norm="sample"' if self.error_norm == "sample" else ""
        return f"{self.horizon}, method={self.method!r}, {control}, adjoint={self.adjoint!r}{norm}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NeuralODE":
        # T keeps single precision at least, and its value, where the rest is cast to half.
        before = self._buffers.get("T")
        super()._apply(fn, recurse)
        if before is not None and self.T.dtype != before.dtype:
            kept = before.detach().to(self.T.device, torch.promote_types(self.T.dtype, torch.float32))
            self.T = kept.requires_grad_(before.requires_grad)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a new module: whoever observes this one has not asked to observe that one.
        return {**self.__dict__, "_observers": OrderedDict()}

    def _read_times(self, times: Times | None) -> tuple[list[float], Tensor | None, list[int]]:
        """Start and outputs as numbers, as a tensor if they need gradients, and which of them are wanted."""
        start, end, moving = self.horizon.t0, self._end(), None
        if times is None:
            if isinstance(self.horizon, FreeHorizon) and self.T.requires_grad:
                moving = torch.stack([torch.full_like(self.T, start), self.T])
            return [start, end], moving, [1]
        return read_times(times, start, end)

    def _end(self) -> float:
        return read_end(self.T, self.horizon) if isinstance(self.horizon, FreeHorizon) else self.horizon.t1

    def _differentiated(self, own: Sequence[Tensor]) -> list[Tensor]:
        extra = as_tensors(self.adjoint_params()) if callable(self.adjoint_params) else self.adjoint_params
        return [*{id(tensor): tensor for tensor in (*own, *extra) if tensor.requires_grad}.values()]

    def _solve(
        self, layout: StateLayout, x: Tensor, times: list[float], moving: Tensor | None, watch: Watch | None = None
    ) -> Sequence[Tensor]:
        """The states at ``times[1:]``, or at the event."""
        evaluation = self._evaluation(layout, x, moving)
        step_size = abs(self._end() - self.horizon.t0) / (self.steps or DEFAULT_STEPS)
        if self.method not in WALKING:
            cap = None if self.method in torchdiffeq_bridge.GRID else self.max_evaluations
            options = {"method": self.method, "rtol": self.rtol, "atol": self.atol, "step_size": step_size}
            return foreign.solve(
                evaluation, x, times, moving, continuous=self.adjoint == "continuous", cap=cap, **options
            )
        if self.method in STIFF and x.ndim > 1:
            span = (times[0], times[-1])
            require_apart(evaluation, span, x, self._weights, f"method={self.method!r}", each=False)
        at_end = math.isclose(times[-1], self._end(), rel_tol=1e-6, abs_tol=1e-9)
        dense = self.dense and len(times) > 2
        tableau = closed(WALKING[self.method]) if dense or watch is not None else WALKING[self.method]
        integrate = self._integrator(tableau, step_size)
        if watch is not None:
            integrate, at_end = partial(integrate, watch=watch), False
        job = Job(evaluation, tableau, integrate, times, self._observer(), at_end, dense, [*self._observers.values()])
        if self._walks_alone(moving):
            return job.walk(x).states
        adjoint = Discrete(job, self.checkpoint_bytes) if self.adjoint == "discrete" else Continuous(job)
        return solve(adjoint, x, moving)

    def _solve_samples(self, layout: StateLayout, x: Tensor, given: Times | None) -> Sequence[Tensor]:
        """The states at the output times, each sample with steps of its own."""
        check_samples(layout, x)
        times, moving = read_sample_times(given, (self.horizon.t0, self._end()), self._buffers.get("T"), x)
        at_end = [math.isclose(end, self._end(), rel_tol=1e-6, abs_tol=1e-9) for end in times[-1].tolist()]
        job = SampleJob(
            self._evaluation(layout, x, moving),
            self._adaptive(samples.integrate, WALKING[self.method]),
            times,
            torch.tensor(at_end, dtype=torch.bool, device=x.device),
            [*self._observers.values()] if any(at_end) or not at_end else [],
        )
        span = (float(times.min()), float(times.max())) if len(x) else (0.0, 0.0)
        require_apart(job.evaluation, span, x, self._weights, 'error_norm="sample"', each=True)
        walks = self._walks_alone(moving)
        return job.walk(x).states if walks else solve(SampleDiscrete(job, self.checkpoint_bytes), x, moving)

    def _evaluation(self, layout: StateLayout, x: Tensor, moving: Tensor | None) -> Evaluation:
        surroundings = Surroundings(self.field, x.device)
        check_not_mapped((x, *surroundings.parameters))
        check_not_looked_into(self.method)
        parameters = self._differentiated(surroundings.parameters)
        if self.adjoint == "continuous":
            check_real(parameters)
        followed, moves = self.adjoint == "backprop", moving is not None
        evaluation = Evaluation(self.field, layout, parameters, surroundings, moves, self._weights, followed=followed)
        self.statistics = evaluation.statistics
        if torch.is_grad_enabled():
            self._dearest.begin(self.statistics)
        return evaluation

    def _walks_alone(self, moving: Tensor | None) -> bool:
        """Whether nobody differentiates, or autograd by itself."""
        if not torch.is_grad_enabled():
            return True
        if in_forward_mode():
            check_not_observed(self._observers)
        elif self.adjoint != "backprop":
            return False
        if moving is not None:
            raise ProblemError(
                'times that need gradients met adjoint="backprop" or forward mode, whose steps are plain numbers; '
                'expected "discrete" or "continuous" in reverse mode, or detached times'
            )
        return True

    def _integrator(self, tableau: Tableau, step_size: float) -> partial[Walk]:
        if self.steps is not None or tableau.b_error is None:
            return partial(fixed.integrate, tableau=tableau, step_size=step_size)
        return self._adaptive(adaptive.integrate, tableau)

    def _adaptive(self, integrate: Callable[..., Any], tableau: Tableau) -> partial[Any]:
        cap = self.max_evaluations
        return partial(integrate, tableau=tableau, rtol=self.rtol, atol=self.atol, max_evaluations=cap)

    def _observer(self) -> Observer | None:
        observers = [each for each in self._observers.values() if isinstance(each, Observer)]
        return None if not observers else observers[0] if len(observers) == 1 else Observers(observers)
