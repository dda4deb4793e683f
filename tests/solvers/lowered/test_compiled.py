"""The folds in C against CasADi's virtual machine and numpy; the cache of libraries; life without a compiler."""

import inspect
import itertools
import os
import subprocess
import sys

import casadi
import numpy as np
import pytest
import torch

from ocnopt import problems
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.kernels import Merit
from ocnopt.solvers.lowered import arrays, compiled, kernel
from ocnopt.solvers.lowered.arrays import Arrays
from ocnopt.solvers.lowered.compiled import Compiled, build, find, find_compiler
from ocnopt.solvers.lowered.kernel import InTurn, LoweredKernel, Machine
from ocnopt.solvers.lowered.source import Line
from ocnopt.solvers.lowered.steps import Fold
from ocnopt.solvers.search import aim_along, begin, line_search
from ocnopt.solvers.solve import solve
from ocnopt.staged import transcribe
from tests.layout.tree import ROOT
from tests.solvers.cases import swing
from tests.solvers.lowered.test_kernel import BATCHES, CASES, STEPS, some_guess, some_path

# the fixture of these tests puts another one in its place
folder = compiled._folder

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="this machine has no C compiler")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder of its own for a test."""
    folder = tmp_path / "ocnopt" / "kernels"
    monkeypatch.setattr(compiled, "_folder", lambda: folder)
    return folder


def arguments(fold, length, lanes, seed=0):
    """Random numbers for what is carried and what is given, some of it one lane for all."""
    random, function = np.random.default_rng(seed), fold.function
    carried = [random.standard_normal((lanes, function.nnz_in(i))) for i in range(fold.carried)]
    given = [
        0.1 * random.standard_normal((length, 1 if i % 3 == 0 else lanes, function.nnz_in(i)))
        for i in range(fold.carried, function.n_in())
    ]
    return carried, given


def assert_same(ours, right, tolerance=1e-12):
    """Relative to the largest entry; infinities and NaN where they are."""
    for actual, expected in zip(itertools.chain(*ours), itertools.chain(*right), strict=True):
        assert actual.shape == expected.shape
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite])
        scale = 1 + np.abs(expected[finite]).max(initial=0.0)
        assert np.abs(actual[finite] - expected[finite]).max(initial=0.0) <= tolerance * scale


def one_fold(symbols, results, carried=0, kept=None):
    function = casadi.Function("one", symbols, results)
    return Fold("one", function, carried, tuple(range(len(results))) if kept is None else kept)


NOTHING = Fold("end", casadi.Function("end", [casadi.SX.sym("z")], [casadi.SX(0.0)]), 0, (0,))


def built(fold, how=build):
    """A library with this fold alone."""
    z, cost, alpha = (casadi.SX.sym(name) for name in ("z", "cost", "alpha"))
    walk = Fold("walk", casadi.Function("walk", [z, cost, alpha], [z, cost, alpha]), 2, (0, 2))
    return how((fold,), Line(walk, NOTHING, alpha=2))


class TestFolds:
    @pytest.mark.parametrize("name", CASES)
    def test_every_fold_of_a_problem(self, name):
        """A few steps, so that nothing grows until rounding shows."""
        problem = CASES[name]()
        ours = LoweredKernel(problem, some_guess(problem), compile=True)
        assert ours.name == "compiled"
        for fold, lanes, backwards in itertools.product(ours._steps, (1, 5), (False, True)):
            length = 3 if fold.carried else 1
            runner = Compiled(fold, length, ours._library, backwards=backwards)
            found = runner(*arguments(fold, length, lanes))
            for other in (Machine, Arrays):
                right = InTurn(other(fold, length), backwards=backwards)(*arguments(fold, length, lanes))
                assert_same(found, right)

    @pytest.mark.parametrize("lanes", [1, 2, 3, 7, 8, 9, 4097])
    def test_any_number_of_problems(self, lanes):
        x, y, u = (casadi.SX.sym(*shape) for shape in (("x", 2), ("y", 3), ("u", 1)))
        fold = one_fold([x, y, u], [casadi.vertcat(x[1] + u, x[0] * y[2]), casadi.vertcat(x, u * y[0])], 1, (0, 1))
        runner, (carried, given) = Compiled(fold, 4, built(fold)), arguments(fold, 4, lanes)
        assert_same(runner(carried, given), InTurn(Arrays(fold, 4), backwards=False)(carried, given), 1e-15)
        halves = [x[:, : x.shape[1] // 2] if x.shape[1] > 1 and lanes % 2 == 0 else x for x in given]
        assert_same(runner(carried, halves), InTurn(Machine(fold, 4), backwards=False)(carried, halves), 1e-15)

    def test_arrays_as_they_lie(self):
        """Every other lane, time backwards, a transposed array, and results into a part of another array."""
        x, y = casadi.SX.sym("x", 2), casadi.SX.sym("y", 2)
        fold = one_fold([x, y], [x + y, x * y], 1)
        random = np.random.default_rng(0)
        start, feed, target = random.random((2, 3)).T, random.random((2, 6, 5)).T[::-1, ::2], np.zeros((7, 3, 2))
        last, kept = Compiled(fold, 5, built(fold))([start], [feed], {1: target[1:6]})
        assert_same((last, kept), InTurn(Machine(fold, 5), backwards=False)([start], [feed]), 1e-15)
        assert np.shares_memory(kept[1], target)
        assert not target[[0, 6]].any()

    def test_every_operation_means_what_numpy_means(self):
        x, y = casadi.SX.sym("x"), casadi.SX.sym("y")
        results = []
        for operation, call in arrays._CALLS.items():
            count = call.nin if isinstance(call, np.ufunc) else len(inspect.signature(call).parameters) - 1
            results.append(casadi.SX.unary(operation, x) if count == 1 else casadi.SX.binary(operation, x, y))
        fold = one_fold([x, y], results)
        values = [-np.inf, -5.0, -2.3, -1.0, -0.7, -1e-9, 0.0, 1e-300, 0.4, 1.0, 2.5, 3.0, 700.0, np.inf, np.nan]
        points = [grid.reshape(1, -1, 1) for grid in np.meshgrid(values, values)]
        _, found = Compiled(fold, 1, built(fold))([], points)
        _, right = Arrays(fold, 1)([], points)
        for operation, actual, expected in zip(arrays._CALLS, found, right, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-14, atol=1e-300, err_msg=f"operation {operation}")

    def test_a_choice_leaves_out_what_is_not_finite(self):
        x, y = casadi.SX.sym("x"), casadi.SX.sym("y")
        fold = one_fold([x, y], [casadi.if_else(x > 0, y, 1.0)])
        points = [np.array([[[-1.0], [1.0], [-1.0], [1.0]]]), np.array([[[np.nan], [np.nan], [np.inf], [2.0]]])]
        _, (found,) = Compiled(fold, 1, built(fold))([], points)
        np.testing.assert_array_equal(found[0, :, 0], [1.0, np.nan, 1.0, 2.0])

    def test_sine_and_cosine_are_within_two_units_in_the_last_place(self):
        x = casadi.SX.sym("x")
        fold = one_fold([x], [casadi.sin(x), casadi.cos(x)])
        near = np.arange(-700, 700) * (np.pi / 2)
        values = np.concatenate(
            [
                np.linspace(-1100, 1100, 20001),
                near,
                np.nextafter(near, 1e9),
                10.0 ** np.linspace(-300, 300, 601),
                [-0.0],
            ]
        )
        _, (sine, cosine) = Compiled(fold, 1, built(fold))([], [values.reshape(1, -1, 1)])
        for found, right in ((sine, np.sin), (cosine, np.cos)):
            exact = right(values.astype(np.longdouble))
            # numpy's long double has 11 more bits where it is longer at all
            assert np.max(np.abs(found[0, :, 0] - exact) / np.spacing(np.abs(exact.astype(float)))) <= 2
        assert np.signbit(sine[0, -1, 0])

    @pytest.mark.parametrize("width", [1, 2, 8])
    def test_any_width_of_a_register(self, width, monkeypatch, empty_cache):
        monkeypatch.setattr(compiled, "_FLAGS", (*compiled._FLAGS, f"-DW={width}"))
        x, y = casadi.SX.sym("x"), casadi.SX.sym("y")
        fold = one_fold([x, y], [casadi.if_else(x < y, casadi.sin(x), casadi.exp(y)), casadi.fmax(x, y)], 1)
        carried, given = arguments(fold, 3, 5)
        right = InTurn(Machine(fold, 3), backwards=False)(carried, given)
        assert_same(Compiled(fold, 3, built(fold))(carried, given), right, 1e-15)


class TestSearch:
    @pytest.mark.parametrize("infeasible", [False, True])
    @pytest.mark.parametrize("name", BATCHES)
    def test_takes_the_steps_that_rolling_out_one_by_one_takes(self, name, infeasible, monkeypatch):
        """Some problems may not move, some find no step, the others steps of several sizes."""
        problem = BATCHES[name](torch.randn(11, 2, dtype=torch.float64))
        guess = some_guess(problem, spread=1.0)
        ours, plain = (LoweredKernel(problem, guess, compile=choice) for choice in (True, False))
        path = some_path(problem, guess, infeasible=infeasible)
        direction = plain.direction(path, torch.zeros(11).double(), exact=False)
        # gains too large for some, and a direction uphill for one
        size = torch.tensor([1.0, 1, 4, 30, 1, 0.1, 1, 3, 1, 1e4, 1]).double()
        direction = direction._replace(
            k=direction.k * size[:, None], linear=direction.linear * (size.roll(4) < 20) * size
        )
        active = np.array([True] * 4 + [False] + [True] * 6)
        iterate, aim = begin(path), aim_along(direction)
        (found, step), (right, wanted) = (line_search(each, iterate, aim, active) for each in (ours, plain))
        assert step.tolist() == wanted.tolist()
        assert float(step[4]) == 0.0
        assert len(set(step.tolist())) > 2
        for actual, expected in zip([*found.path, *found[1:]], [*right.path, *right[1:]], strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    def test_a_path_that_runs_away_is_not_taken(self):
        problem = transcribe(swing(), 4)
        ours = LoweredKernel(problem, some_guess(problem), compile=True)
        path = some_path(problem, some_guess(problem), infeasible=False)
        direction = ours.direction(path, torch.zeros(()).double(), exact=False)
        wild = direction._replace(k=torch.full_like(direction.k, torch.inf))
        moved, step = ours.search(path, wild, Merit(0.0, 0.0, 0.0, np.inf), True, (1.0, 0.5))
        assert float(step) == 0.0
        assert torch.equal(moved.states, path.states)
        assert torch.equal(moved.cost, path.cost)


class TestCache:
    def test_is_in_the_users_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert folder() == tmp_path / "ocnopt" / "kernels"

    def fold(self, factor=2.0):
        x = casadi.SX.sym("x")
        return one_fold([x], [factor * x])

    def value(self, library):
        return Compiled(self.fold(), 1, library)([], [np.ones((1, 1, 1))])[1][0].item()

    def test_what_was_compiled_is_found_again(self, empty_cache, monkeypatch):
        assert built(self.fold(), find) is None
        assert self.value(built(self.fold())) == 2.0
        assert self.value(built(self.fold(), find)) == 2.0
        monkeypatch.setattr(compiled, "_compile", lambda *arguments: None)
        assert self.value(built(self.fold())) == 2.0
        assert built(self.fold(3.0)) is None

    def test_everything_that_matters_has_its_own_library(self, empty_cache, monkeypatch):
        built(self.fold())
        built(self.fold(3.0))
        for name, value in (("_FLAGS", (*compiled._FLAGS, "-DOTHER")), ("_machine", lambda: "another")):
            with monkeypatch.context() as patch:
                patch.setattr(compiled, name, value)
                built(self.fold())
        assert len(list(empty_cache.iterdir())) == 4

    @pytest.mark.parametrize(
        "harm", [lambda b: b[: len(b) // 2], lambda b: b"nonsense", lambda b: b"", lambda b: b + b"x"]
    )
    def test_a_broken_library_is_built_again(self, empty_cache, harm):
        built(self.fold())
        (path,) = empty_cache.iterdir()
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(harm(whole))
        assert self.value(built(self.fold())) == 2.0
        assert len(list(empty_cache.iterdir())) == 1

    def test_a_library_under_a_right_name_that_is_none(self, empty_cache):
        built(self.fold())
        (path,) = empty_cache.iterdir()
        path.unlink()
        path.write_bytes(b"none")
        path.rename(empty_cache / compiled._name(path.name.split("-")[0], path))
        assert self.value(built(self.fold())) == 2.0

    def test_old_libraries_are_forgotten(self, empty_cache, monkeypatch):
        monkeypatch.setattr(compiled, "_KEPT", 2)
        for factor in (2.0, 3.0, 4.0):
            built(self.fold(factor))
        assert len(list(empty_cache.iterdir())) == 2
        assert self.value(built(self.fold())) == 2.0

    def test_two_processes_at_once(self, empty_cache):
        """This one and another, which waits for the word to begin."""
        code = (
            "from ocnopt.solvers.solve import solve\nfrom tests.solvers.cases import swing\n"
            "input('ready\\n')\nprint(solve(swing(), steps=5, compile=True).status)"
        )
        environment = {**os.environ, "XDG_CACHE_HOME": str(empty_cache.parent.parent)}
        command, pipes = [sys.executable, "-u", "-c", code], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as other:
            assert other.stdout.readline() == "ready\n"
            other.stdin.write("go\n")
            other.stdin.flush()
            assert solve(swing(), steps=5, compile=True).status.endswith("(compiled kernel)")
            assert other.communicate()[0].strip().endswith("(compiled kernel)")
        assert {path.suffix for path in empty_cache.iterdir()} == {".so"}


class TestWithout:
    """No compiler, or none that works: solved as without this file, and said."""

    def assert_lowered(self):
        assert solve(swing(), steps=5, compile=True).status.endswith("(lowered kernel)")

    def test_no_compiler(self, empty_cache, monkeypatch):
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
        self.assert_lowered()

    def test_a_compiler_that_fails(self, empty_cache, monkeypatch):
        monkeypatch.setenv("CC", "false")
        self.assert_lowered()
        assert list(empty_cache.iterdir()) == []

    def test_a_compiler_that_writes_something_else(self, empty_cache, tmp_path, monkeypatch):
        fake = tmp_path / "cc"
        fake.write_text("#!/bin/sh\necho nothing > folds.so\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        self.assert_lowered()

    def test_a_compiler_that_hangs(self, empty_cache, tmp_path, monkeypatch):
        fake = tmp_path / "cc"
        fake.write_text("#!/bin/sh\nexec sleep 60\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        monkeypatch.setattr(compiled, "_PATIENCE", 0.1)
        self.assert_lowered()

    def test_a_folder_that_cannot_be_made(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "file" / "kernels")
        self.assert_lowered()

    def test_a_compiler_that_does_not_know_the_machine(self, empty_cache, monkeypatch):
        monkeypatch.setattr(compiled, "_MACHINES", (("-march=nonsense",), ()))
        assert solve(swing(), steps=5, compile=True).status.endswith("(compiled kernel)")

    def test_an_operation_without_a_form(self, empty_cache, monkeypatch):
        monkeypatch.setattr("ocnopt.solvers.lowered.source._OPERATORS", {})
        self.assert_lowered()


class TestWhenToCompile:
    def test_one_problem_only_where_it_was_compiled_before(self, empty_cache):
        assert solve(swing(), steps=5).status.endswith("(lowered kernel)")
        assert solve(swing(), steps=5, compile=True).status.endswith("(compiled kernel)")
        assert solve(swing(), steps=5).status.endswith("(compiled kernel)")
        assert solve(swing(), steps=5, compile=False).status.endswith("(lowered kernel)")

    def test_a_batch_that_takes_longer_without(self, empty_cache, monkeypatch):
        starts = torch.randn(3, 2).double()
        assert solve(swing(starts), steps=5).status[0].endswith("(lowered kernel)")
        monkeypatch.setattr(kernel, "_COMPILED", 0.0)
        assert solve(swing(starts), steps=5).status[0].endswith("(compiled kernel)")


def test_the_steps_of_a_whole_solve_are_those_of_the_other_kernels():
    """Bit for bit but for sine and cosine: the same iterations, far from any minimum too."""
    problem = problems.control("pendulum_swing_up_u5").build()
    ours, plain = (DDP(kernel="lowered", compile=choice) for choice in (True, False))
    found, right = (solve(problem, solver, steps=STEPS * 5) for solver in (ours, plain))
    assert found.status == right.status.replace("lowered", "compiled")
    torch.testing.assert_close(found.history["cost"], right.history["cost"], rtol=1e-9, atol=1e-9)
    assert torch.equal(found.history["step"], right.history["step"])
