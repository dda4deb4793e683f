r"""Single shooting: the cost as a function of the controls and static controls alone, with two derivatives.

The unknowns are v = (v_0, .., v_{N-1}, p) of size d; the states follow from a rollout. The controls are those of a
feedback law around a path (zbar, ubar) with DDP's gains, u_k = v_k + K_k (z_k - zbar_k) cut off at the bounds, so that
v = ubar on that path. Without K, one control early on an unstable path moves its end by orders of magnitude more than
a late one (the Hessian of the pendulum swing-up has a condition of 4e11, with K of 45).

With z = (x, p), the costate lambda and the models f_w, l_w, f_ww, l_ww of the steps in w = (z, v),

    lambda_N = Phi_z + e_z^T nu,   lambda_k = l_z + f_z^T lambda_{k+1}
    (J_v)_k = l_v + f_v^T lambda_{k+1},   J_p = lambda_0
    dz_{k+1} = f_w dw_k,   c_k = (l_ww + lambda_{k+1} . f_ww) dw_k,   eta_k = c_z + f_z^T eta_{k+1}
    (J_vv dv)_k = c_v + f_v^T eta_{k+1}

so a gradient is one sweep backwards and an exact product with the Hessian one sweep forwards and one backwards, of one
vector or of many. The models come for all steps at once from :mod:`ocnopt.linearise`; the sweeps are products in numpy.

Source: Bryson and Ho, Applied Optimal Control, 1975, section 7.3 (gradient by the adjoint); Nocedal and Wright,
Numerical Optimization, 2006, section 8.2 (products with the Hessian).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocnopt.checks import finite_path
from ocnopt.differential.sweep import Direction
from ocnopt.linearise import derivatives, expand_path
from ocnopt.paths import Path, Widened, evaluate
from ocnopt.solvers.kernels import Kernel
from ocnopt.solvers.search import TorchKernel
from ocnopt.solvers.solution import Guess
from ocnopt.staged import StagedOCP

Vector = NDArray[np.float64]

# An unknown counts as being at a bound within this distance.
NEAR = 1e-6
# Curvature and regularisation of the sweep that finds the feedback law: the first that can be solved.
_SWEEPS = ((True, 0.0), (False, 0.0), (False, 1e-3), (False, 1e-1), (False, 1e1))


class Models(NamedTuple):
    """The steps' models in (z, v_k), (dz, du_k) = feedback (dz, dv_k); those of the end: Phi, then each entry of e."""

    fw: Vector
    lw: Vector
    lww: Vector
    curvature: list[Any]
    feedback: Vector
    ends: Vector
    slopes: Vector
    hessians: Vector


class Shot:
    """Cost, end error, gradient and products with second derivatives as functions of v; the last points are kept."""

    def __init__(self, problem: StagedOCP, kernel: Kernel) -> None:
        self.wide, self.problem, self.kernel = Widened(problem), problem, kernel
        self.N, self.m, self.q = self.wide.steps, self.wide.m, self.wide.q
        self.n = self.wide.n
        self.size = self.N * self.m + self.q
        first = self.wide.join([problem.initial_state], problem.start_parameters())
        nothing = first.new_zeros(self.N, self.m)
        self.law = first.expand(self.N + 1, -1), nothing, first.new_zeros(self.N, self.m, self.n)
        self._paths: dict[bytes, Path] = {}
        self._models: dict[bytes, Models] = {}

    def join(self, controls: Any, p: Tensor) -> Vector:
        """v of controls and static controls."""
        U = self.wide.join_controls(controls)
        return torch.cat([U.reshape(-1), p]).to(torch.float64).cpu().numpy()

    def split(self, v: Vector) -> tuple[Tensor, Tensor]:
        """Controls ``(N, m)`` and p ``(q,)`` of v."""
        like = self.problem.initial_state
        values = torch.as_tensor(v, dtype=like.dtype, device=like.device)
        return values[: self.N * self.m].reshape(self.N, self.m), values[self.N * self.m :]

    def stabilise(self, path: Path, direction: Direction) -> None:
        """Let v_k stand for the controls of a feedback law around a path: u_k = v_k + K_k (z_k - zbar_k).

        With a terminal constraint, controls at a bound do not feed back: along the law they would leave it and count
        in the derivatives from which its multipliers come.
        """
        K, bounds = direction.K, self.wide.control_bounds
        if bounds is not None and self.problem.terminal_constraint is not None:
            inside = (path.controls - bounds[0] > NEAR) & (bounds[1] - path.controls > NEAR)
            K = K * inside[..., None]
        self.law = path.states, path.controls, K
        self._paths.clear()
        self._models.clear()

    def box(self) -> tuple[Vector, Vector] | None:
        """Bounds of v, if there are any."""
        u, p = self.wide.control_bounds, self.wide.parameter_bounds
        if u is None and p is None:
            return None
        infinite = self.problem.initial_state.new_tensor(torch.inf)
        sides = []
        for i, sign in enumerate((-1, 1)):
            controls = (sign * infinite).expand(self.N, self.m) if u is None else u[i]
            sides.append(self.join(controls, (sign * infinite).expand(self.q) if p is None else p[i]))
        return sides[0], sides[1]

    def path(self, v: Vector) -> Path:
        """The rollout of v."""

        def roll() -> Path:
            U, p = self.split(v)
            states, controls, K = self.law
            nothing = states.new_zeros(())
            away = Direction(U - controls, K, states, p - states[0, self.n - self.q :], nothing, nothing, nothing == 0)
            with torch.no_grad():
                trial = self.kernel.roll_out(Path(states, controls, nothing), away, states.new_ones(1))
            return Path(trial.states[:, 0], trial.controls[:, 0], trial.cost[0])

        return kept(self._paths, v, roll)

    def _follows(self, v: Vector, path: Path) -> Vector:
        """1 for each control that follows the feedback law, 0 where a bound cuts it off ``(N, m)``."""
        states, _, K = self.law
        asked = self.split(v)[0] + (K @ (path.states - states)[:-1, :, None])[..., 0]
        bounds = self.wide.control_bounds
        if bounds is None:
            return np.ones((self.N, self.m))
        return _array(((asked >= bounds[0]) & (asked <= bounds[1])).to(asked.dtype))

    def cost(self, v: Vector) -> float:
        """J, infinite where it is no number."""
        value = float(self.path(v).cost)
        return value if np.isfinite(value) else np.inf

    def end_error(self, v: Vector) -> Vector:
        """e(x_N, p)."""
        with torch.no_grad():
            return self.wide.end_error(self.path(v).states[-1]).to(torch.float64).cpu().numpy()

    def models(self, v: Vector) -> Models:
        """Models of all steps and of the end along the path of v."""

        def expand() -> Models:
            path, wide = self.path(v), self.wide
            F, L, curvature = expand_path(wide, path, exact=True)

            def end(z: Tensor) -> Tensor:
                return torch.cat([wide.phi(z), wide.end_error(z)], dim=-1)

            values = derivatives(end, path.states[-1], 1 + self.end_error(v).size, hessian=True)
            T = np.tile(np.eye(self.n + self.m), (self.N, 1, 1))
            T[:, self.n :, : self.n] = _array(self.law[2])
            T[:, self.n :] *= self._follows(v, path)[..., None]
            fw, lw, lww = map(_array, (F[:, 1:, 1:], L[:, 0, 1:], L[:, 1:, 1:]))
            lw = (lw[:, None] @ T)[:, 0]
            return Models(fw @ T, lw, T.mT @ lww @ T, curvature or [], T, *map(_array, values))

        return kept(self._models, v, expand)

    def pull(self, v: Vector, weights: Vector) -> tuple[Vector, Vector]:
        """Costates ``(N + 1, n, r)`` and gradient ``(d, r)`` of r combinations ``(1 + e, r)`` of J and e."""
        models = self.models(v)
        costates = np.zeros((self.N + 1, self.n, weights.shape[1]))
        gradient = np.zeros((self.N, self.m, weights.shape[1]))
        costates[-1] = models.slopes.T @ weights
        for k in reversed(range(self.N)):
            both = models.fw[k].T @ costates[k + 1] + models.lw[k][:, None] * weights[0]
            costates[k], gradient[k] = both[: self.n], both[self.n :]
        first = costates[0, self.n - self.q :]
        return costates, np.concatenate([gradient.reshape(self.N * self.m, weights.shape[1]), first])

    def gradient(self, v: Vector, nu: Vector | None = None) -> Vector:
        """The gradient of J, or of J + nu . e."""
        weights = np.concatenate([[1.0], np.zeros(self.models(v).ends.size - 1) if nu is None else nu])
        return self.pull(v, weights[:, None])[1][:, 0]

    def end_jacobian(self, v: Vector) -> Vector:
        """e_v ``(e, d)``."""
        return self.pull(v, np.eye(self.models(v).ends.size)[:, 1:])[1].T

    def curvature(self, v: Vector, weights: Vector) -> Callable[[Vector], Vector]:
        """The product of the Hessian of ``weights . (J, e)`` with a vector ``(d,)`` or with columns ``(d, r)``."""
        models, n, controls = self.models(v), self.n, self.N * self.m
        costates = self.pull(v, weights[:, None])[0][..., 0]
        H, T, like = weights[0] * models.lww, models.feedback, self.problem.initial_state
        for k, curved in enumerate(models.curvature):
            H[k] += T[k].T @ _array(curved.times(torch.as_tensor(costates[k + 1]).to(like))) @ T[k]
        last = np.tensordot(weights, models.hessians, 1)

        def product(dv: Vector) -> Vector:
            columns = np.asarray(dv).reshape(self.size, -1)
            dw = np.zeros((self.N, n + self.m, columns.shape[1]))
            dw[:, n:] = columns[:controls].reshape(self.N, self.m, columns.shape[1])
            dz = np.concatenate([np.zeros((n - self.q, columns.shape[1])), columns[controls:]])
            for k in range(self.N):
                dw[k, :n] = dz
                dz = models.fw[k] @ dw[k]
            result, eta = H @ dw, last @ dz
            for k in reversed(range(self.N)):
                result[k] += models.fw[k].T @ eta
                eta = result[k, :n]
            moved = result[:, n:].reshape(controls, columns.shape[1])
            return np.concatenate([moved, eta[n - self.q :]]).reshape(np.shape(dv))

        return product


def kept(memory: dict[bytes, Any], v: Vector, make: Callable[[], Any]) -> Any:
    """A value made once for each of the last few points."""
    key = v.tobytes()
    if key not in memory:
        while len(memory) >= 3:
            del memory[next(iter(memory))]
        memory[key] = make()
    return memory[key]


def _array(value: Tensor) -> Vector:
    return value.detach().to(torch.float64).cpu().numpy().copy()


def first_point(shot: Shot, guess: Guess) -> Vector:
    """The first v, and the feedback law around it where no bound is in its way."""
    wide, p = shot.wide, guess.parameters
    states, controls = guess.states, wide.join_controls(guess.controls)
    if states is None:
        v = shot.join(controls, p)
        path = shot.path(v)
        finite_path(list(path.states), path.cost, wide.times(path.states[0]))
        direction = find_direction(wide, path)
        if direction is not None:
            shot.stabilise(path, direction)
        return v
    with torch.no_grad():
        path = evaluate(wide, wide.join(states, p), controls)
    direction = find_direction(wide, path)
    with torch.no_grad():
        trial = TorchKernel(wide).roll_out(path, direction, path.cost.new_ones(1)) if direction is not None else None
    if trial is not None and bool(torch.isfinite(trial.cost).all()):
        controls, p = trial.controls[:, 0], trial.states[0, 0, wide.n - wide.q :]
    return first_point(shot, Guess(list(controls), p))


def find_direction(wide: Widened, path: Path) -> Direction | None:
    """The first sweep of DDP along a path that can be solved."""
    kernel = TorchKernel(wide)
    with torch.no_grad():
        for exact, mu in _SWEEPS:
            direction = kernel.direction(path, torch.full_like(path.cost, mu), exact=exact and path.gaps is None)
            if bool(direction.solvable) and bool(torch.isfinite(direction.K).all()):
                return direction
    return None
