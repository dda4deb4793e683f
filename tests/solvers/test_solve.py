"""`solve`: names, options, strictness, and the starts that it reads or finds by itself."""

import inspect
import math

import numpy as np
import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.solve import make_solver, solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close
from tests.solvers.cases import pendulum, regulator


class TestSolver:
    def test_a_name_and_an_object_are_the_same(self):
        named = solve(regulator(), "ddp", steps=5, curvature="gauss_newton", tolerance=1e-6, max_iterations=7)
        object_ = solve(regulator(), DDP(curvature="gauss_newton", tolerance=1e-6, max_iterations=7), steps=5)
        assert_close(named.states, object_.states, rtol=0.0)
        assert oc.solvers.DDP is DDP

    def test_options_reach_the_solver(self):
        made = make_solver("ddp", {"curvature": "exact", "regularisation": 0.5})
        assert made == DDP(curvature="exact", regularisation=0.5)

    def test_a_discrete_problem_is_solved_as_it_is(self):
        staged = transcribe(regulator(), 5, "euler")
        assert_close(solve(staged).cost, solve(regulator(), steps=5, integrator="euler").cost, rtol=0.0)

    def test_unknown_solver(self):
        with pytest.raises(
            oc.ProblemError, match=r"solver 'dpp' is unknown; expected one of ddp, .*; did you mean 'ddp'\?"
        ):
            solve(regulator(), "dpp")

    def test_unknown_option(self):
        message = r"solver 'ddp' has no option 'curvture'; expected one of curvature, .*; did you mean 'curvature'\?"
        with pytest.raises(oc.ProblemError, match=message):
            solve(regulator(), "ddp", curvture="exact")

    def test_options_beside_an_object(self):
        with pytest.raises(
            oc.ProblemError, match="options tolerance came beside a solver object; expected them in its con"
        ):
            solve(regulator(), DDP(), tolerance=1e-3)

    def test_neither_a_name_nor_a_solver(self):
        with pytest.raises(
            oc.ProblemError, match=r"solver is int; expected a name \(ddp, .*\) or a solver object such as"
        ):
            inspect.unwrap(make_solver)(3, {})

    def test_a_class_instead_of_an_object(self):
        with pytest.raises(oc.ProblemError, match=r"solver is the class DDP; expected an object: write DDP\(\)"):
            inspect.unwrap(make_solver)(DDP, {})

    def test_what_is_no_problem(self):
        record = oc.problems.get("pendulum_swing_up")
        for given, message in (
            (
                "pendulum_swing_up",
                r"problem is the name 'pendulum_swing_up'; .*oc.problems.get\('pendulum_swing_up'\).bui",
            ),
            (
                record,
                r"problem is the record of 'pendulum_swing_up'; expected .*call its build\(\) and pass what it ret",
            ),
            (3, r"problem is of type int; expected an oc.OCP or oc.StagedOCP: use oc.OCP\("),
        ):
            with pytest.raises(oc.ProblemError, match=message):
                inspect.unwrap(solve)(given)

    def test_unknown_integrator(self):
        with pytest.raises(oc.ProblemError, match=r"integrator 'rk44' is unknown; .*did you mean 'rk4'\?"):
            solve(regulator(), integrator="rk44")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_iterations": 0}, r"max_iterations of DDP is 0; expected max_iterations >= 1, a whole number"),
            ({"tolerance": 0.0}, r"tolerance of DDP is 0.0; expected tolerance > 0 and finite"),
            ({"tolerance": math.nan}, r"tolerance of DDP is nan; expected tolerance > 0 and finite"),
            ({"regularisation": -1.0}, r"regularisation of DDP is -1.0; expected regularisation >= 0 and finite"),
            ({"regularisation": math.inf}, r"regularisation of DDP is inf; expected regularisation >= 0 and finite"),
            ({"solver": "casadi", "tolerance": math.nan}, r"tolerance of CasADi is nan; expected tolerance > 0"),
            ({"solver": "casadi", "restarts": -1}, r"restarts of CasADi is -1; expected restarts >= 0, a whole number"),
            ({"solver": "casadi", "degree": 10}, r"degree of CasADi is 10; expected degree <= 9"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(oc.ProblemError, match=message):
            solve(regulator(), **options)

    @pytest.mark.parametrize("value", [10.0, True, "10"])
    @pytest.mark.parametrize("kind", [DDP, oc.solvers.CasADi])
    def test_counts_are_whole_numbers(self, kind, value):
        made = kind()
        object.__setattr__(made, "max_iterations", value)
        with pytest.raises(
            oc.ProblemError, match=f"max_iterations of {kind.__name__} is {value!r}; expected max_itera"
        ):
            made.__post_init__()
        object.__setattr__(made, "max_iterations", np.int64(3))
        made.__post_init__()

    def test_unknown_curvature(self):
        message = r"curvature is 'exakt'; expected 'exact' or 'gauss_newton' or 'auto'; did you mean 'exact'\?"
        with pytest.raises(oc.ProblemError, match=message):
            inspect.unwrap(DDP.__init__)(object.__new__(DDP), curvature="exakt")

    def test_strict(self):
        with pytest.raises(
            oc.ConvergenceError, match="not converged: stopped after .*the iteration limit .*strict=False"
        ):
            solve(pendulum([0.1, 0.0]), steps=10, max_iterations=1, strict=True)
        assert bool(solve(regulator(), steps=5, strict=True).converged)

    def test_strict_in_a_batch_names_the_problems_and_carries_the_solution(self):
        # two rest at the goal, two hang close to the bottom
        starts = torch.tensor([[[math.pi, 0.0], [0.1, 0.0]], [[0.2, 0.0], [math.pi, 0.0]]])
        options = {"steps": 10, "max_iterations": 1, "strict": True, "initial_guess": torch.zeros(10, 1)}
        message = (
            r"not converged: 2 of 4, problems \(0, 1\), \(1, 0\): stopped after .*or read it from this error's .sol"
        )
        with pytest.raises(oc.ConvergenceError, match=message) as caught:
            solve(pendulum(starts.double()), **options)
        assert caught.value.solution.converged.tolist() == [[True, False], [False, True]]
        with pytest.raises(oc.ConvergenceError, match=r"not converged: 1 of 2, problems 1: stopped after"):
            solve(pendulum(starts[0].double()), **options)

    def test_strict_without_a_batch_carries_the_solution(self):
        with pytest.raises(oc.ConvergenceError) as caught:
            solve(pendulum([0.1, 0.0]), steps=10, max_iterations=1, strict=True)
        assert caught.value.solution.status in str(caught.value)


class TestGuess:
    def test_controls_of_any_kind(self):
        problem = transcribe(regulator(), 3)
        for value in (
            torch.ones(3, 1),
            np.ones((3, 1)),
            [[1.0], [1.0], [1.0]],
            [torch.ones(1)] * 3,
            {"controls": torch.ones(3, 1)},
        ):
            guess = read_guess(problem, value)
            assert_close(guess.controls, torch.ones(3, 1))
            assert guess.controls[0].dtype == torch.float64
            assert guess.states is None

    def test_a_batch_may_share_a_guess_or_have_its_own(self):
        problem = transcribe(regulator(initial_state=torch.rand(2, 2)), 3)
        own = torch.rand(2, 3, 1)
        assert_close(read_guess(problem, own).controls.movedim(0, -2), own)
        shared = read_guess(problem, own[0]).controls
        assert_close(shared.movedim(0, -2), own[:1].expand(2, 3, 1))

    def test_controls_and_parameters_are_clipped_to_their_bounds(self):
        problem = OCP(
            lambda t, x, u, p: p[..., :1] * x + u,
            initial_state=[1.0],
            control_dim=1,
            horizon=FreeHorizon(1.0, 0.5, 2.0),
            parameters=[0.0],
            parameter_bounds=(-1.0, 1.0),
            control_bounds=(-1.0, 1.0),
        )
        guess = read_guess(
            transcribe(problem, 2), {"controls": 5 * torch.ones(2, 1), "parameters": [9.0], "horizon": 9.0}
        )
        assert_close(guess.controls, torch.ones(2, 1))
        assert_close(guess.parameters, [1.0, 2.0])

    def test_parameters_and_horizon(self):
        problem = OCP(
            lambda t, x, u, p: p[..., :1] * x,
            initial_state=torch.ones(2, 1),
            horizon=FreeHorizon(1.0, 0.5, 2.0),
            parameters=[0.1, 0.2],
        )
        staged = transcribe(problem, 2)
        assert_close(read_guess(staged, {"parameters": [3.0, 4.0]}).parameters, [[3.0, 4.0, 1.0]] * 2)
        assert_close(read_guess(staged, {"horizon": [0.6, 0.7]}).parameters, [[0.1, 0.2, 0.6], [0.1, 0.2, 0.7]])
        assert_close(
            read_guess(staged, {"parameters": [[3.0, 4.0], [5.0, 6.0]], "horizon": 1.5}).parameters,
            [[3.0, 4.0, 1.5], [5.0, 6.0, 1.5]],
        )

    def test_states_begin_at_the_initial_state(self):
        problem = transcribe(regulator(), 3)
        guess = read_guess(problem, {"states": torch.full((4, 2), 7.0)})
        assert_close(guess.states, [[1.0, 0.0], [7.0, 7.0], [7.0, 7.0], [7.0, 7.0]])

    def test_a_solution_is_a_guess(self):
        solution = solve(regulator(), steps=5)
        again = solve(regulator(), steps=5, initial_guess=solution)
        assert again.iterations.item() == 0
        assert bool(again.converged)
        assert_close(again.states, solution.states, rtol=1e-12)

    def test_the_problems_own_guess_may_be_a_function_of_the_steps(self):
        problem = regulator(initial_guess=lambda steps: {"controls": torch.full((steps, 1), 2.0)})
        assert_close(read_guess(transcribe(problem, 4), None).controls, torch.full((4, 1), 2.0))
        assert_close(read_guess(transcribe(problem, 4), torch.ones(4, 1)).controls, torch.ones(4, 1))

    def test_sizes_may_vary(self):
        stages = [
            Stage(lambda k, x, u: torch.cat([x, u], dim=-1), control_dim=1),
            Stage(lambda k, x, u: x, control_dim=2),
        ]
        problem = StagedOCP(stages, lambda x: x.sum(-1), initial_state=[1.0])
        guess = read_guess(
            problem,
            {"controls": [torch.ones(1), torch.ones(2)], "states": [torch.ones(1), torch.ones(2), torch.ones(2)]},
        )
        assert [len(u) for u in guess.controls] == [1, 2]
        assert [len(x) for x in guess.states] == [1, 2, 2]
        with pytest.raises(
            oc.ProblemError,
            match=r"controls has 2 rows of sizes \[1\]; expected 2 rows of sizes \[1, 2\]: one row per step",
        ):
            read_guess(problem, [torch.ones(1), torch.ones(1)])

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.ones(4, 1), r"initial_guess controls has shape \(4, 1\); expected \(..., 3, 1\): one row per step"),
            (torch.ones(3, 2), r"initial_guess controls has shape \(3, 2\); expected \(..., 3, 1\)"),
            (torch.ones(3), r"initial_guess controls has shape \(3,\); expected \(..., 3, 1\)"),
            ([torch.ones(1)] * 4, r"initial_guess controls has 4 rows of sizes \[1\]; expected 3 rows of sizes \[1\]"),
            (torch.ones(5, 3, 1), r"initial_guess controls has batch shape \(5,\); expected \(2,\), or none"),
            ("zero", "initial_guess controls is str; expected numbers or a tensor"),
            (
                torch.full((3, 1), torch.nan),
                r"initial_guess controls holds NaN or infinity at \(0, 0\); expected finite",
            ),
            (
                {"states": torch.ones(3, 2)},
                r"initial_guess states has shape \(3, 2\); expected \(..., 4, 2\): one row per node",
            ),
            ({"states": torch.ones(3, 4, 2)}, r"initial_guess states has batch shape \(3,\); expected \(2,\)"),
            (
                {"control": torch.ones(3, 1)},
                r"initial_guess has the key 'control'; expected any of .*did you mean 'controls'\?",
            ),
            ({"parameters": [1.0]}, r"initial_guess parameters has shape \(1,\); expected \(..., 2\)"),
            ({"parameters": torch.ones(3, 2)}, r"initial_guess parameters has batch shape \(3,\); expected \(2,\)"),
            ({"parameters": [1.0, torch.inf]}, r"initial_guess parameters holds NaN or infinity"),
            ({"horizon": "long"}, "initial_guess horizon is str; expected numbers"),
            ({"horizon": [1.0, 1.0, 1.0]}, r"initial_guess horizon has batch shape \(3,\); expected \(2,\)"),
        ],
    )
    def test_wrong(self, value, message):
        problem = OCP(
            lambda t, x, u, p: x + u + p,
            initial_state=torch.ones(2, 2),
            control_dim=1,
            horizon=FreeHorizon(1.0, 0.5, 2.0),
            parameters=[0.1, 0.2],
        )
        with pytest.raises(oc.ProblemError, match=message):
            solve(problem, steps=3, initial_guess=value)
