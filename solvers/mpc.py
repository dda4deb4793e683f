"""Model predictive control: a prepared problem solved again and again along a closed loop.

At the time of a measurement the problem is solved from the measured state, started from the last plan moved on by the
steps that have passed. The plan's own time runs from the problem's t0: what depends on the clock (a moving reference)
belongs into the problem's ``data``, which ``update(t)`` writes before each solve. Between two solves the plan's
feedback law answers what the model did not foresee.

Shapes: x ``(*batch, n)``, u ``(*batch, m)``; the problems of a batch run side by side, in step.

Source: Rawlings, Mayne and Diehl, Model Predictive Control, 2017, chapters 1 and 8 (shifted warm start, delay).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ocnopt.checks import callable_or_none, can_differentiate, is_number, numbers, shape, whole
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.paths import step_number
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.files import stays_here
from ocnopt.solvers.solution import Gains, Solution, full_parameters, pushed
from ocnopt.solvers.solve import Prepared

# A plan whose gaps or constraints are further open than this is no path to follow.
_OPEN = 1e-4
# Times are told apart to this share of a step.
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class ClosedLoop:
    """What happened in a closed loop of M steps.

    Attributes:
        times: ``(M + 1,)``.
        states: of the plant, ``(*batch, M + 1, n)``.
        controls: applied, ``(*batch, M, m)``.
        costs: of the plan that each step followed, ``(*batch, M)``.
        converged: whether that plan's solve had converged, ``(*batch, M)``.
        solve_times: seconds of the solve at each step, NaN where there was none, ``(M,)``.
        status: one sentence: how the loop ended, and how many solves did not converge.
        state_names: of the problem.
        control_names: of the problem.
    """

    times: Tensor
    states: Tensor
    controls: Tensor
    costs: Tensor
    converged: Tensor
    solve_times: Tensor
    status: str
    state_names: tuple[str, ...] | None = None
    control_names: tuple[str, ...] | None = None

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw states, controls and the time of each solve; write the picture to ``path`` if one is given.

        Returns:
            A matplotlib Figure.

        Raises:
            DataError: the picture cannot be written there.
        """
        from ocnopt.solvers.plotting import plot_closed_loop, saved

        return saved(plot_closed_loop(self), path)


class MPC:
    """A controller ``u = mpc(t, x)`` that solves a prepared problem from each measured state.

    Args:
        prepared: of ``oc.prepare``; its horizon is how far each plan looks ahead. The solver's ``time_limit`` bounds
            the time of a solve; the best plan so far is then used where it obeys dynamics and constraints.
        every: steps of the plan from one solve to the next; in between its feedback law acts.
        delay: steps that pass before a new plan takes effect. The plan is then made for the state that the model
            predicts for that time under the old plan.
        feedback: whether the feedback gains act between solves; False follows the plan's controls alone.
        update: ``update(t)``, called before each solve with the time at which the plan begins: the place to write into
            the tensors of the problem's ``data``.

    Attributes:
        plan: the last plan, a Solution, with its time running from the problem's t0; None before the first call.
        begins: the time at which the plan begins.

    Raises:
        ProblemError: no prepared problem, one whose sizes vary by stage, a free end time in a batch, or an option out
            of range.

    Example:
        >>> from ocnopt.ocp import OCP
        >>> from ocnopt.solvers.solve import prepare
        >>> cost = lambda t, x, u: (x**2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: x + u, cost, initial_state=[1.0], control_dim=1, horizon=2.0)
        >>> loop = MPC(prepare(problem, steps=20)).simulate([1.0], steps=50)
        >>> float(loop.states[-1].abs()) < 0.01
        True
    """

    def __init__(
        self,
        prepared: Any,
        *,
        every: int = 1,
        delay: int = 0,
        feedback: Any = True,
        update: Any = None,
    ) -> None:
        if not isinstance(prepared, Prepared):
            raise ProblemError(
                f"MPC got {type(prepared).__name__}; expected a prepared problem: oc.MPC(oc.prepare(problem, ..))"
            )
        problem = prepared.problem
        if len(set(problem.state_sizes)) > 1 or len({group.stage.control_dim for group in problem.groups}) > 1:
            raise ProblemError("MPC got a problem whose sizes vary by stage; expected one state and one control size")
        if problem.nodes is not None:
            raise ProblemError("MPC got steps that are given as times; expected equal ones: prepare with steps=N")
        self._free = problem.origin is not None and problem.origin.free
        if self._free and problem.batch_shape:
            raise ProblemError(
                "MPC got a batch with free end times; expected one problem, or a fixed horizon: the steps of a batch "
                "go together"
            )
        callable_or_none("update", update)
        if not isinstance(feedback, bool):
            raise ProblemError(f"feedback is {feedback!r}; expected True or False")
        self.every, self.delay = whole("every", every, 1), whole("delay", delay, 0)
        if self.every > problem.steps or self.delay >= problem.steps:
            raise ProblemError(
                f"every={every}, delay={delay} reach beyond the plan's {problem.steps} steps; expected every <= N and "
                "delay < N: prepare with more steps"
            )
        self.prepared: Prepared = prepared
        self.feedback, self._update = feedback, update
        self.reset()

    def __reduce__(self) -> NoReturn:
        raise stays_here("an MPC", "make another with oc.MPC(oc.prepare(..)); for a loop of its own MPC(mpc.prepared)")

    def reset(self) -> None:
        """Forget the plan: the next call solves from the problem's own start."""
        self.plan: Solution | None = None
        self.begins = 0.0
        self.solve_time = math.nan
        # what is to come, the plan in effect first: each with the time at which it begins
        self._plans: list[tuple[Solution, float]] = []

    @property
    def step(self) -> float:
        """Length of a step of the plan."""
        problem = self.prepared.problem
        times = problem.times(problem.start_parameters()) if self.plan is None else self.plan.times
        ends = times.reshape(-1, times.shape[-1])[0]
        return float(ends[1] - ends[0])

    def __call__(self, t: float, x: Any) -> Tensor:
        """The control at time t in state x ``(*batch, n)``; solves where a new plan is due.

        Raises:
            ProblemError: x has another shape or is not finite, or t runs backwards.
            NonFiniteError: there is no finite plan to begin with.
        """
        can_differentiate()
        problem = self.prepared.problem
        x = numbers("the state of an MPC", x, problem.dtype, problem.device)
        wanted = (*problem.batch_shape, problem.state_dim)
        if tuple(x.shape) != wanted or not bool(torch.isfinite(x).all()):
            raise ProblemError(f"MPC got a state of shape {shape(x)}; expected finite numbers of shape {wanted}")
        t, h = _time("the time of an MPC", t), self.step
        slack = _SLACK * h
        if self.plan is not None and t < self.begins - slack:
            raise ProblemError(f"MPC got t = {t} after a plan from t = {self.begins}; expected time to run on: reset()")
        self.solve_time = math.nan
        if not self._plans or t + self.delay * h >= self._plans[-1][1] + self.every * h - slack:
            self._solve(t, x)
        self._plans = self._plans[self._place(t) :]
        self.plan, self.begins = self._plans[0]
        return self._control(t, x)

    def simulate(
        self,
        initial_state: Any,
        steps: int,
        plant: Callable[[float, Tensor, Tensor], Any] | None = None,
        disturbance: Callable[[Tensor, Tensor], Any] | None = None,
        *,
        t0: Any = 0.0,
    ) -> ClosedLoop:
        """Run the closed loop from a state, with a new plan to begin with.

        Args:
            initial_state: ``(*batch, n)``, or ``(n,)`` for all.
            steps: M, each as long as a step of the plan.
            plant: ``plant(t, x, u) -> x_next``, what the state becomes one step later; the problem's own step if None.
            disturbance: ``disturbance(t, x) -> (..., n)``, added to the state after each step.
            t0: the time to begin at.

        Returns:
            The record; after Ctrl-C, or where the plant leaves the finite numbers, of the steps until then.

        Raises:
            ProblemError: the state, or what plant or disturbance return, has another shape.
            NonFiniteError: there is no finite plan to begin with.
        """
        callable_or_none("plant", plant)
        callable_or_none("disturbance", disturbance)
        steps, problem = whole("steps", steps, 1), self.prepared.problem
        self.reset()
        x = numbers("initial_state", initial_state, problem.dtype, problem.device)
        x = x.expand(*problem.batch_shape, problem.state_dim) if x.shape == (problem.state_dim,) else x
        times, states, rows, ended = [_time("t0", t0)], [x], [], f"ran all of {steps} steps"
        try:
            with Stopwatch(None) as stopwatch:
                for _ in range(steps):
                    t = times[-1]
                    u = self(t, x)
                    if stopwatch.reason is not None:
                        raise KeyboardInterrupt
                    # under a free end time each plan has steps of its own length
                    after = t + self.step
                    x = self._model(t, x, u) if plant is None else _read("plant", plant(t, x.clone(), u.clone()), x)
                    if disturbance is not None:
                        x = x + pushed(disturbance, x.new_tensor(after), x)
                    if not bool(torch.isfinite(x).all()):
                        ended = f"the plant{_of_problems(x)} left the finite numbers after t = {t:.6g}"
                        break
                    times.append(after)
                    states.append(x)
                    plan = self._plans[0][0]
                    rows.append((u, plan.cost, plan.converged, self.solve_time))
        except KeyboardInterrupt:
            ended = f"interrupted at t = {times[-1]:.6g}"
        return self._record(torch.tensor(times, dtype=problem.dtype), states, rows, ended)

    def _solve(self, t: float, x: Tensor) -> None:
        """Make the next plan, for the state in which it takes effect."""
        first, h = not self._plans, self.step
        delay = 0 if first else self.delay
        begins = t + delay * h
        for i in range(delay):
            x = self._model(t + i * h, x, self._control(t + i * h, x))
        if self._update is not None:
            self._update(begins)
        guess = None if first else self._shifted(x, begins)
        began = time.perf_counter()
        try:
            new = self.prepared.solve(x, initial_guess=guess)
        except NonFiniteError:
            if first:
                raise
            old = self._plans[-1][0]
            new = replace(old, converged=torch.zeros_like(old.converged), cost=torch.full_like(old.cost, torch.nan))
        self.solve_time = time.perf_counter() - began
        usable = torch.isfinite(new.cost) & (new.constraint_violation <= _OPEN)
        if guess is not None and not bool(usable.all()):
            new = _kept(usable, new, guess)
        self._plans.append((new, begins))

    def _place(self, t: float) -> int:
        """Which plan is in effect at time t."""
        begun = [i for i, (_, begins) in enumerate(self._plans) if t >= begins - _SLACK * self.step]
        return begun[-1] if begun else 0

    def _control(self, t: float, x: Tensor) -> Tensor:
        """What the plan in effect does at time t in state x."""
        plan, begins = self._plans[self._place(t)]
        start = float(plan.times.reshape(-1)[0])
        followed = plan if self.feedback else replace(plan, gains=None)
        return followed.policy(start + t - begins, x)

    def _shifted(self, x: Tensor, begins: float) -> dict[str, Tensor]:
        """The last plan moved on to a later begin; its last control and state stay for the steps that are missing."""
        plan, began = self._plans[-1]
        states, controls = torch.as_tensor(plan.states), torch.as_tensor(plan.controls)
        passed = min(max(round((begins - began) / self.step), 0), controls.shape[-2])
        at = (torch.arange(states.shape[-2], device=x.device) + passed).clamp(max=states.shape[-2] - 1)
        states = states.index_select(-2, at)
        states[..., 0, :] = x
        guess = {"states": states, "controls": controls.index_select(-2, at[:-1].clamp(max=controls.shape[-2] - 1))}
        if plan.parameters.shape[-1]:
            guess["parameters"] = plan.parameters
        if self._free:
            guess["horizon"] = plan.horizon - (begins - began)
        return guess

    def _model(self, t: float, x: Tensor, u: Tensor) -> Tensor:
        """The problem's own step from the place in the plan that t is at."""
        problem, (plan, begins) = self.prepared.problem, self._plans[self._place(t)]
        k = min(max(math.floor((t - begins) / self.step + _SLACK), 0), problem.steps - 1)
        (group,) = (group for group in problem.groups if group.start <= k < group.stop)
        with torch.no_grad():
            return problem.advance(group.stage, step_number(group, k, x), x, u, full_parameters(plan))[0]

    def _record(self, times: Tensor, states: list[Tensor], rows: list[Any], ended: str) -> ClosedLoop:
        problem = self.prepared.problem
        m, batch = problem.groups[0].stage.control_dim, problem.batch_shape
        columns: list[Any] = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
        x = states[0]
        controls = torch.stack(list(columns[0]), dim=-2) if rows else x.new_zeros((*batch, 0, m))
        costs = torch.stack(list(columns[1]), dim=-1) if rows else x.new_zeros((*batch, 0))
        converged = torch.stack(list(columns[2]), dim=-1) if rows else torch.zeros((*batch, 0), dtype=torch.bool)
        solve_times = torch.tensor(columns[3], dtype=torch.float64)
        solved = ~torch.isnan(solve_times)
        failed = int((~converged[..., solved]).sum())
        many = f"{failed} of {converged[..., solved].numel()} solves did not converge"
        return ClosedLoop(
            times=times,
            states=torch.stack(states, dim=-2),
            controls=controls,
            costs=costs,
            converged=converged,
            solve_times=solve_times,
            status=f"{ended}; {many if failed else 'every solve converged'}",
            state_names=problem.state_names,
            control_names=problem.control_names,
        )


def _kept(usable: Tensor, new: Solution, guess: dict[str, Tensor]) -> Solution:
    """The new plan where it is one, the old one moved on, without feedback, where it is not."""

    def chosen(fresh: Any, old: Tensor) -> Tensor:
        return torch.where(usable.reshape(*usable.shape, *(1,) * (old.ndim - usable.ndim)), fresh, old)

    gains = new.gains
    if gains is not None:
        gains = Gains(*(chosen(part, torch.zeros_like(torch.as_tensor(part))) for part in gains))
    states, controls = chosen(new.states, guess["states"]), chosen(new.controls, guess["controls"])
    return replace(new, states=states, controls=controls, gains=gains, converged=new.converged & usable)


def _read(name: str, value: Any, like: Tensor) -> Tensor:
    """What a plant returned."""
    read = numbers(f"what {name}(t, x, u) returned", value, like.dtype, like.device)
    if read.shape != like.shape:
        raise ProblemError(
            f"{name}(t, x, u) returned shape {shape(read)}; expected the next state, shape {shape(like)}"
        )
    # a simulator may hand out the same buffer at each step
    return read.detach().clone()


def _time(name: str, t: Any) -> float:
    if (not is_number(t) and not (isinstance(t, Tensor) and t.numel() == 1)) or not math.isfinite(t):
        raise ProblemError(f"{name} is {t!r}; expected a finite number")
    return float(t)


def _of_problems(x: Tensor) -> str:
    """Which problems of a batch are not finite."""
    lost = (~torch.isfinite(x).all(dim=-1)).nonzero().tolist()
    return f" of problem {', '.join(str(tuple(row)) for row in lost[:5])}" if x.ndim > 1 else ""
