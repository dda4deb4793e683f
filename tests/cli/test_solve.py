"""What ``ocnopt solve`` shows of one solution, and that a finished run is shown again."""

import json

import pytest


def test_a_solve_with_a_picture_of_the_system_resumes(run, tmp_path):
    assert run("solve", "double_integrator_min_energy", "--steps", "10", "--out", "here")[0] == 0
    film = tmp_path / "here" / "plots" / "system.gif"
    film.unlink()
    assert run("solve", "--resume", "here")[0] == 0
    assert film.exists()


@pytest.mark.parametrize(
    ("options", "is_same"), [([], True), (["--integrator", "euler"], False), (["--solver", "indirect"], False)]
)
def test_the_best_known_cost_is_that_of_the_same_discrete_problem(run, options, is_same):
    name = "double_integrator_min_energy"
    code, output = run("solve", name, "--steps", "100", *options)
    assert code == 0
    assert ("best known, 100 steps" in output) is is_same
    assert "best known, exact" in output
    run("solve", name, "--steps", "100", *options, "--json")
    assert (json.loads(run.stdout)["best_known_cost"] is not None) is is_same
