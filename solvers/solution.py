"""What a solver starts from and what it returns: a record with a status sentence, a policy and a closed-loop rollout.

Shapes: ``...`` is the problem's batch shape; N steps, n states, m controls, q parameters (never counting T). Where
sizes vary from stage to stage, ``states``, ``controls``, ``costates`` and gains are tuples, one tensor a node or step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ocnopt.checks import callable_or_none, clipped, numbers, shape
from ocnopt.errors import ProblemError
from ocnopt.paths import behind, rollout
from ocnopt.solvers.audit import Violation, audit, find_violations, rollout_status
from ocnopt.solvers.files import check_fingerprint, fingerprint, read_file, write_file
from ocnopt.staged import Series, StagedOCP

_FORMAT = 2


class Gains(NamedTuple):
    """Feedforward ``k (..., N, m)`` and feedback ``K (..., N, m, n)`` of the last iteration: du = k + K dx."""

    k: Series
    K: Series


@dataclass(frozen=True, eq=False)
class Guess:
    """Where a solver starts: controls ``(N, *batch, m)``, p ``(*batch, q)`` with T where it is free.

    States ``(N + 1, *batch, n)``, where given, need not satisfy the dynamics. Where sizes vary, both are lists.
    """

    controls: Series
    parameters: Tensor
    states: Series | None = None


class Result(NamedTuple):
    """What a solver hands over: as in :class:`Solution`, but with time in front: states ``(N + 1, *batch, n)``.

    ``parameters (*batch, q)`` still hold T where the horizon is free, ``gains`` are (k, K); of the ``multipliers`` only
    the "terminal_constraint" has no time in front.
    """

    states: Series
    controls: Series
    parameters: Tensor
    cost: Tensor
    converged: Tensor
    iterations: Tensor
    status: str | list[str]
    constraint_violation: Tensor
    wall_time: float
    build_time: float
    history: Mapping[str, Tensor]
    costates: Series | None = None
    gains: tuple[Series, Series] | None = None
    multipliers: Mapping[str, Tensor] | None = None
    minima: Mapping[str, Tensor] | None = None
    saddle: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of one ``solve``.

    Attributes:
        times: ``(..., N + 1)``, in the problem's unit; step numbers where it was discrete from the start.
        states: ``(..., N + 1, n)``.
        controls: ``(..., N, m)``.
        parameters: ``(..., q)``; T is in ``horizon``.
        horizon: end time, ``(...)``.
        cost: of the discrete problem, ``(...)``; of the continuous one from "indirect", as its status says.
        converged: ``(...)`` bool.
        iterations: accepted steps, ``(...)`` int.
        status: one sentence; a list of them in a batch.
        costates: dJ/dx_k where later controls follow the feedback law, at an optimum dJ/dx_k itself:
            ``(..., N + 1, n)``, or None.
        constraint_violation: the largest violated constraint, bound or gap, ``(...)``.
        wall_time: seconds of the solve; build_time: seconds spent on building it (lowering, compiling).
        history: "cost", "step" and "regularisation" (what the solver has of them) per iteration, the start first:
            ``(iterations + 1, ...)``.
        gains: :class:`Gains`, or None where a solver has none.
        control_bounds: two tensors ``(m,)``, ``(N, m)`` or ``(..., N, m)``; None without any or where the number of
            controls varies.
        multipliers: of the constraints, by name: "terminal_constraint" ``(..., e)``, "path_constraint" ``(..., N + 1,
            c)`` and "state_bounds" ``(..., N + 1, n)`` of each node; None without constraints. cost + multiplier *
            constraint is stationary: >= 0 for a path constraint, > 0 at an upper and < 0 at a lower bound. Where the
            number of constraints or states varies from node to node, zeros fill up.
        minima: of DDP's ``restarts=``, the lowest first: "cost" ``(..., K)``, "starts" that led there, "states",
            "controls" ``(..., K, N, m)``, "parameters" with a free T; NaN and no starts where there are fewer.
        saddle: whether DDP ended in one, ``(...)`` bool; None of the other solvers.
        state_names: of the problem, as ``control_names``; None without any.
        problem: the discrete problem. None where the solution was pickled, or loaded from a file without it: functions
            do not travel. ``violations`` and names are kept, ``rollout`` then says what is missing.

    A copy shares the problem; a pickled solution has no gradients.
    """

    times: Tensor
    states: Series
    controls: Series
    parameters: Tensor
    horizon: Tensor
    cost: Tensor
    converged: Tensor
    iterations: Tensor
    status: str | list[str]
    constraint_violation: Tensor
    wall_time: float
    build_time: float
    history: Mapping[str, Tensor]
    costates: Series | None = None
    gains: Gains | None = None
    multipliers: Mapping[str, Tensor] | None = None
    minima: Mapping[str, Tensor] | None = None
    saddle: Tensor | None = None
    control_bounds: tuple[Tensor, Tensor] | None = None
    state_names: tuple[str, ...] | None = None
    control_names: tuple[str, ...] | None = None
    problem: StagedOCP | None = field(default=None, repr=False)
    _violations: tuple[Violation, ...] | None = field(default=None, repr=False)

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Bounds, constraints and steps that are broken by more than 1e-6, the worst first, in the user's names."""
        if self.problem is None:
            if self._violations is None:
                raise ProblemError("this solution has no problem; load it with oc.load_solution(path, problem=...)")
            return self._violations
        path = nodes_of(self.states), nodes_of(self.controls)
        return tuple(find_violations(self.problem, *path, full_parameters(self), 1e-6))

    def policy(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The feedback law u_k + K_k (x - xbar(t)), clipped to the bounds; open loop without gains.

        A node belongs to the step that it begins, the end to the last step. Outside the horizon nothing is
        extrapolated: before it the first control, gains and state hold, after it the last.

        Args:
            t: a time, or one for each problem of the batch.
            x: the states there, ``(..., n)``.

        Returns:
            Controls ``(..., m)``; k is the step that contains t, xbar is linear between the nodes.

        Raises:
            ProblemError: x or t has another shape or is no number, or sizes vary by stage.
        """
        states, controls = self._tensor("states"), self._tensor("controls")
        t, x = self._per_problem(t), self._state(x)
        # k h and the k-th node differ by rounding, and the node must find its own step
        slack = 8 * torch.finfo(t.dtype).eps * self.times.abs().amax(-1)
        passed = torch.searchsorted(self.times.contiguous(), (t + slack)[..., None].contiguous(), right=True)[..., 0]
        k = (passed - 1).clamp(0, controls.shape[-2] - 1)
        start, end = _pick(self.times, k, 0), _pick(self.times, k + 1, 0)
        share = ((t - start) / (end - start)).clamp(0.0, 1.0)[..., None]
        before = _pick(states, k, 1)
        nominal = before + share * (_pick(states, k + 1, 1) - before)
        u = _pick(controls, k, 1)
        if self.gains is not None:
            feedback = _pick(self._tensor("K"), k, 2)
            u = u + (feedback @ (x - nominal)[..., None])[..., 0]
        bounds = self.control_bounds
        if bounds is not None and bounds[0].ndim > 1:
            bounds = tuple(side[k] if side.ndim == 2 else _pick(side, k, 1) for side in bounds)  # type: ignore[assignment]
        return clipped(u, bounds)

    def rollout(
        self, initial_state: Tensor, disturbance: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> "Solution":
        """Run the policy in closed loop on the discrete problem from another initial state; sizes may vary by stage.

        Args:
            initial_state: ``(..., n)``.
            disturbance: ``disturbance(t, x) -> (..., n)``, added to the state after each step, of its size there.

        Returns:
            A Solution with the new states, controls, cost and constraint violation; it keeps gains and parameters
            and makes no claim of convergence.

        Raises:
            ProblemError: the state or what the disturbance returns has another shape, or the solution was loaded from
                a file without its problem.
            NonFiniteError: the path of a single problem leaves the numbers; in a batch its status says so.
        """
        if self.problem is None:
            raise ProblemError("this solution has no problem to run; load it with oc.load_solution(path, problem=...)")
        callable_or_none("disturbance", disturbance)
        x0 = numbers("the initial state of a rollout", initial_state, self.cost.dtype, self.cost.device)
        size = (*self.cost.shape, self.problem.state_dim)
        if tuple(x0.shape) not in (size, size[-1:]):
            came, wanted = tuple(x0.shape), " or ".join(dict.fromkeys((str(size), str(size[-1:]))))
            raise ProblemError(f"rollout got an initial state of shape {came}; expected {wanted}")
        nodes = self.times.movedim(-1, 0)
        p = full_parameters(self)
        after = None if disturbance is None else lambda k, x: x + pushed(disturbance, nodes[k + 1], x)
        with torch.no_grad():
            path = rollout(self.problem, self._by_step(self.problem), x0.expand(size), p, after=after)
            violation = audit(self.problem, path.states, path.controls, p).violation
        return replace(
            self,
            states=behind(path.states),
            controls=behind(path.controls),
            cost=path.cost,
            converged=torch.zeros_like(self.converged),
            iterations=torch.zeros_like(self.iterations),
            status=rollout_status(path.states, path.cost, nodes),
            constraint_violation=violation,
            wall_time=0.0,
            build_time=0.0,
            history={},
            costates=None,
        )

    def _by_step(self, problem: StagedOCP) -> Callable[[int, Tensor], Tensor]:
        """The policy at the nodes, of which no time needs to be looked up: sizes may vary, states be infinite."""
        states, controls = nodes_of(self.states), nodes_of(self.controls)
        bounds = problem.step_bounds
        K = None if self.gains is None else nodes_of(self.gains.K, tail=2)

        def feedback(k: int, x: Tensor) -> Tensor:
            u = controls[k] if K is None else controls[k] + (K[k] @ (x - states[k])[..., None])[..., 0]
            return clipped(u, bounds[k])

        return feedback

    @property
    def is_numbered(self) -> bool:
        """Whether its times are known to be the numbers of steps, as of a problem that was made of stages."""
        return self.problem is not None and self.problem.origin is None and self.problem.nodes is None

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw states, controls, gains and convergence; write the picture to ``path`` if one is given.

        Returns:
            A matplotlib Figure.

        Raises:
            ProblemError: sizes vary from stage to stage.
            DataError: the picture cannot be written there.
        """
        from ocnopt.solvers.plotting import plot_solutions, saved

        for name in ("states", "controls", "K")[: 2 if self.gains is None else 3]:
            self._tensor(name)
        return saved(plot_solutions({"": self}, time="step" if self.is_numbered else "time"), path)

    def save(self, path: str | Path) -> None:
        """Write everything but functions and gradients to one file, read again by ``oc.load_solution``.

        Raises:
            DataError: the file cannot be written there.
        """
        made = None if self.problem is None else _fingerprint(self, self.problem)
        record = {"format": _FORMAT, **self._record(), "fingerprint": made}
        write_file(path, "a file in a folder that you may write to", lambda: torch.save(record, path))

    def _record(self) -> dict[str, Any]:
        """Everything but functions and gradients, in types that any file takes."""
        known = self._violations if self.problem is None else self.violations
        plain = {
            "gains": None if self.gains is None else tuple(self.gains),
            "_violations": None if known is None else [tuple(violation) for violation in known],
        }
        return dict(tree_map_only(Tensor, Tensor.detach, self._fields() | plain))

    def _fields(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "problem"}
        return own | {"history": dict(self.history)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._record(),)

    def __copy__(self) -> "Solution":
        return replace(self)

    def __deepcopy__(self, memo: Any) -> "Solution":
        return replace(self, **tree_map_only(Tensor, Tensor.clone, self._fields()))

    def _per_problem(self, t: Any) -> Tensor:
        batch = tuple(self.cost.shape)
        time = numbers("the time of a policy", t, self.times.dtype, self.times.device)
        if time.shape not in ((), batch):
            raise ProblemError(
                f"policy got times of shape {shape(time)}; expected one number, or one for each problem, shape {batch}"
            )
        if bool(torch.isnan(time).any()):
            raise ProblemError(f"policy got the time {t}; expected numbers: look for what made the clock NaN")
        return time.expand(batch)

    def _state(self, x: Any) -> Tensor:
        """A state for the policy: its last axis is n, the axes before it fit the batch."""
        state = numbers("the state of a policy", x, self.times.dtype, self.times.device)
        n, batch = self._tensor("states").shape[-1], tuple(self.cost.shape)
        pairs = zip(state.shape[-2::-1], reversed(batch), strict=False)
        if state.shape[-1:] != (n,) or not all(came == size or 1 in (came, size) for came, size in pairs):
            fits = f" with axes in front that fit the batch {batch}" if batch else ""
            raise ProblemError(f"policy got a state of shape {shape(state)}; expected (..., {n}){fits}")
        return state

    def _tensor(self, name: str) -> Tensor:
        value = self.gains.K if name == "K" and self.gains is not None else getattr(self, name)
        if not isinstance(value, Tensor):
            raise ProblemError(
                "sizes vary from stage to stage here; expected one state and one control size for a policy in time or "
                "a picture: read states, controls and gains step by step, or run the policy by rollout"
            )
        return value


def pushed(disturbance: Callable[[Tensor, Tensor], Any], t: Tensor, x: Tensor) -> Tensor:
    """What a disturbance adds to the states x ``(..., n)``."""
    push = disturbance(t, x.clone())
    if not isinstance(push, Tensor) or push.shape not in (x.shape, x.shape[-1:]):
        came = f"shape {shape(push)}" if isinstance(push, Tensor) else type(push).__name__
        raise ProblemError(
            f"disturbance(t, x) returned {came}; expected shape {shape(x)}, what is added to the state: "
            "torch.zeros_like(x) where nothing is"
        )
    return push.to(x)


def _pick(values: Tensor, k: Tensor, tail: int) -> Tensor:
    """values[..., k, <tail axes>] with an own k for each problem of the batch."""
    axis = values.ndim - 1 - tail
    index = k[(..., None, *(None,) * tail)].expand(*values.shape[:axis], 1, *values.shape[axis + 1 :])
    return torch.gather(values, axis, index).squeeze(axis)


def full_parameters(solution: Solution) -> Tensor:
    """p as the discrete problem sees it, ``(..., q)``: with T where the horizon is free."""
    origin = None if solution.problem is None else solution.problem.origin
    if origin is None or not origin.free:
        return solution.parameters
    return torch.cat([solution.parameters, solution.horizon[..., None]], dim=-1)


def nodes_of(values: Series, tail: int = 1) -> tuple[Tensor, ...]:
    """One tensor a node or step, of ``tail`` axes behind the batch."""
    return values.unbind(-1 - tail) if isinstance(values, Tensor) else tuple(values)


def _fingerprint(solution: Solution, problem: StagedOCP) -> dict[str, Tensor]:
    path = nodes_of(solution.states), nodes_of(solution.controls)
    return fingerprint(problem, *path, full_parameters(solution))


def _restored(record: dict[str, Any], problem: StagedOCP | None = None) -> Solution:
    """The solution of a record."""
    known = {f.name: record[f.name] for f in fields(Solution) if f.name in record}
    if known["gains"] is not None:
        known["gains"] = Gains(*known["gains"])
    if known.get("_violations") is not None:
        known["_violations"] = tuple(Violation(*row) for row in known["_violations"])
    return Solution(**known, problem=problem)


def load_solution(path: str | Path, problem: StagedOCP | None = None) -> Solution:
    """Read a solution written by :meth:`Solution.save`.

    Args:
        path: the file.
        problem: the discrete problem that was solved (``oc.transcribe(...)``), needed only for ``rollout``.

    Raises:
        ProblemError: the problem is not a discrete one.
        DataError: not a solution, of another format, or of another problem.
    """
    if problem is not None and not isinstance(problem, StagedOCP):
        raise ProblemError(
            f"problem is {type(problem).__name__}; expected the discrete one: oc.transcribe(problem, steps, integrator)"
        )
    solution, saved = read_file(path, _FORMAT, lambda record: (_restored(record, problem), record["fingerprint"]))
    if problem is not None:
        check_fingerprint(path, saved, lambda: _fingerprint(solution, problem))
    return solution
