"""The command line as a user meets it: help, tables, exit codes, messages, folders, --resume."""

import json
import warnings
from dataclasses import replace
from importlib import metadata

import pytest
import torch

from ocnopt.cli import control as control_module
from ocnopt.cli import demo as demo_module
from ocnopt.cli import main
from ocnopt.cli.control import compare_result
from ocnopt.errors import ProblemError
from ocnopt.problems import control, names
from ocnopt.runs import RunFolder
from ocnopt.solvers.compare import Comparison, Row, compare

COMMANDS = ("problems", "solve", "compare", "train", "study", "demo")
TRAIN = ["--optimizer=adam", "--iterations=3", "--batch-size=16", "--checkpoint-every=2"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(run, command):
    code, output = run(command, "--help")
    assert code == 0
    assert "Examples:" in output
    assert f"ocnopt {command}" in output


def test_no_command_shows_all(run):
    _, output = run()
    assert all(command in output for command in COMMANDS)


def test_the_list_of_problems(run):
    code, output = run("problems")
    assert code == 0
    assert all(name in output for name in names())
    _, output = run("problems", "--kind", "learning")
    assert "digits" in output
    assert "scalar_lqr" not in output
    _, output = run("problems", "--kind", "control")
    assert "digits" not in output


def test_a_mistake_is_one_message(run):
    code, output = run("solve", "pendulum_swingup")
    assert code == main.MISTAKE
    assert "error: ProblemError: no problem is called 'pendulum_swingup'; did you mean 'pendulum_swing_up'?" in output
    assert "Traceback" not in output


def test_no_name(run):
    code, output = run("train")
    assert code == main.MISTAKE
    assert "no problem is named; expected 'ocnopt train NAME'" in output


@pytest.mark.usefixtures("painted")
def test_solve_writes_a_folder_and_resumes_it(run, tmp_path):
    code, output = run("solve", "scalar_lqr", "--steps", "20", "--out", "here")
    assert code == 0
    assert "0.7617172453" in output
    assert "report.html" in output
    folder = tmp_path / "here"
    assert json.loads((folder / "config.json").read_text())["steps"] == 20
    assert [path.name for path in (folder / "plots").iterdir()] == ["solution.png"]
    assert [record["iteration"] for record in RunFolder.open(folder).metrics()] == [0, 1]
    page = (folder / "report.html").read_text()
    assert "plots/solution.png" in page

    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "report.html").unlink()
    code, _ = run("solve", "--resume", "here")
    assert code == 0
    assert (folder / "report.html").exists()
    assert (folder / "checkpoint.pt").read_bytes() == before

    (folder / "checkpoint.pt").unlink()  # killed before it was written: solved again
    assert run("solve", "--resume", "here")[0] == 0
    assert [record["iteration"] for record in RunFolder.open(folder).metrics()] == [0, 1]


def test_a_solve_that_does_not_converge(run):
    code, output = run("solve", "catalyst_mixing_T1", "--steps", "20", "--max-iterations", "1")
    assert code == main.NOT_CONVERGED
    assert "raise --max-iterations" in output


def refuse(*arguments, **options):
    raise ProblemError("this solver cannot; use solver='casadi'")


def test_a_solver_that_cannot(run, monkeypatch):
    monkeypatch.setattr(control_module, "solve", refuse)
    code, output = run("solve", "scalar_lqr")
    assert code == main.MISTAKE
    assert "use --solver casadi" in output


def test_an_existing_folder_is_kept(run):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    code, output = run("solve", "scalar_lqr", "--out", "here")
    assert code == main.MISTAKE
    assert "continue that run with --resume here" in output


def test_the_folder_of_another_command(run):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    code, output = run("train", "--resume", "here")
    assert code == main.MISTAKE
    assert "was made by 'ocnopt solve'" in output


@pytest.mark.usefixtures("painted")
def test_compare(run, tmp_path):
    code, output = run("compare", "scalar_lqr", "--steps", "20", "--out", "here")
    assert code == 0
    assert "ddp" in output
    assert "casadi" in output
    assert (tmp_path / "here" / "ddp.pt").exists()
    assert (tmp_path / "here" / "casadi.pt").exists()
    assert "max |dx|" in (tmp_path / "here" / "report.html").read_text()


def test_compare_prints_and_keeps_its_notes(run, tmp_path, monkeypatch):
    found = compare(control("scalar_lqr").build(), ("ddp",), steps=5)
    rows = (found.rows[0], replace(found.rows[0], solver="other", note="refused: use solver='casadi'", converged=False))
    monkeypatch.setattr(control_module, "compare", lambda *_, **__: Comparison(rows, found.solutions))
    code, output = run("compare", "scalar_lqr", "--steps", "5", "--out", "here")
    assert code == main.NOT_CONVERGED
    assert output.count("other: refused: use --solver casadi") == 1
    assert output.count("ddp: converged after") == 1
    assert "<br>other: refused: use --solver casadi" in (tmp_path / "here" / "report.html").read_text()


def test_compare_one_solver(run):
    code, output = run("compare", "scalar_lqr", "--steps", "5", "--solver", "ddp")
    assert code == 0
    assert "casadi" not in output


@pytest.mark.usefixtures("painted")
def test_train_and_resume(run, tmp_path):
    code, output = run("train", "digits", *TRAIN, "--out", "here")
    assert code == 0
    assert "Adam, learning rate 0.01, seed 0" in output
    folder = RunFolder.open(tmp_path / "here")
    assert len(folder.metrics()) == 3
    assert folder.load_checkpoint()["iteration"] == 3
    drawn = {"loss-time.png", "loss-iteration.png", "accuracy.png", "features.png"}
    assert {path.name for path in folder.plots.iterdir()} == drawn
    lines = (tmp_path / "here" / "metrics.jsonl").read_text()
    code, output = run("train", "--resume", "here")
    assert code == 0
    assert "resumed after iteration 3 of 3" in output
    assert (tmp_path / "here" / "metrics.jsonl").read_text() == lines


def test_epochs_become_iterations(run, tmp_path):
    code, _ = run("train", "digits", "--optimizer=adam", "--epochs=1", "--batch-size=700", "--out=here")
    assert code == 0
    assert RunFolder.open(tmp_path / "here").config["train"]["iterations"] == 2


def test_epochs_and_iterations(run):
    code, output = run("train", "digits", "--epochs", "1", "--iterations", "5")
    assert code == main.MISTAKE
    assert "--epochs 1 came with --iterations 5; expected one of them" in output


@pytest.mark.parametrize("option", ["--horizon-lr", "--horizon-penalty"])
def test_a_rule_for_a_fixed_horizon(run, tmp_path, option):
    for fixed in ((), ("--horizon", "fixed")):
        code, output = run("train", "digits", option, "0.5", *fixed)
        assert code == main.MISTAKE
        assert f"{option} 0.5 came for a fixed T, which no rule moves; expected --horizon feedback or" in output
    assert not (tmp_path / "runs").exists()


def test_an_unknown_optimiser(run):
    code, output = run("train", "digits", "--optimizer", "snop")
    assert code == main.MISTAKE
    assert "ProblemError: --optimizer is 'snop'; expected one of adam, sgd, " in output
    assert "; did you mean 'snopt'" in output


def test_ctrl_c(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ocnopt.cli.learning.train", interrupted)
    code, output = run("train", "digits", *TRAIN, "--out", "here")
    assert code == 130
    assert "stopped; continue with: ocnopt train --resume here" in output


def test_a_run_resumes_with_its_threads(run, tmp_path):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    (tmp_path / "here" / "config.json").write_text(json.dumps({**config, "threads": 2}))
    try:
        assert run("solve", "--resume", "here")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("painted")
def test_the_demo(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module.boat, "STEPS", 15)
    monkeypatch.setattr(demo_module, "STUDY", replace(demo_module.STUDY, batch_size=16, iterations=3))
    code, output = run("demo", "--seeds", "1", "--out", "here")
    assert code == 0, output
    for part in ("pendulum_swing_up", "own problem: a boat crosses a river", "Adam", "SNOpt + feedback T"):
        assert part in output
    page = (tmp_path / "here" / "report.html").read_text()
    images = sorted((tmp_path / "here" / "plots").iterdir())
    assert len(images) == 9
    assert all(f"plots/{path.name}" in page for path in images)
    lines = (tmp_path / "here" / "digits-adam-lr0.01-seed0" / "metrics.jsonl").read_text()
    assert run("demo", "--resume", "here")[0] == 0
    assert (tmp_path / "here" / "digits-adam-lr0.01-seed0" / "metrics.jsonl").read_text() == lines


def test_the_version(run):
    assert run("--version") == (0, f"ocnopt {metadata.version('ocnopt')}\n")


def test_problems_as_json(run):
    assert run("problems", "--json")[0] == 0
    records = {record["name"]: record for record in json.loads(run.stdout)}
    assert tuple(records) == names()
    assert records["scalar_lqr"]["optimal_cost"] == 0.7615941559557649
    assert records["digits"]["learning_rates"]["snopt"] > 0
    run("problems", "--json", "--kind", "learning")
    assert tuple(record["name"] for record in json.loads(run.stdout)) == names("learning")


def test_a_solution_as_json(run):
    assert run("solve", "scalar_lqr", "--steps", "20", "--json", "--out", "here")[0] == 0
    result = json.loads(run.stdout)
    assert result["cost"] == pytest.approx(0.7617172453, abs=1e-10)
    assert (result["solver"], result["steps"], result["converged"], result["folder"]) == ("ddp", 20, True, "here")
    code, _ = run("solve", "catalyst_mixing_T1", "--steps=20", "--max-iterations=1", "--json")
    assert code == main.NOT_CONVERGED
    result = json.loads(run.stdout)
    assert not result["converged"]
    assert "--max-iterations" in result["status"]
    assert run("solve", "nothing", "--json")[0] == main.MISTAKE
    assert run.stdout == ""


def test_a_comparison_as_json(run):
    assert run("compare", "scalar_lqr", "--steps", "20", "--solver", "ddp", "--json")[0] == 0
    (row,) = json.loads(run.stdout)["rows"]
    assert row["solver"] == "ddp"
    assert row["cost"] == pytest.approx(0.7617172453, abs=1e-10)


def test_json_has_no_nan(run, tmp_path, capsys):
    nan = float("nan")
    row = Row("ddp", nan, nan, 0, 0.0, 0.0, nan, converged=False, status="use solver='casadi'")
    folder = RunFolder(tmp_path, {"problem": "scalar_lqr", "steps": 5, "integrator": "rk4"})
    main._print_json(compare_result(folder, Comparison((row,), {})))
    (line,) = json.loads(capsys.readouterr().out)["rows"]
    assert line["cost"] is None
    assert line["status"] == "use --solver casadi"


def test_the_list_of_problems_in_60_columns(narrow):
    _, output = narrow("problems")
    assert all(len(line) <= 60 for line in output.splitlines())
    assert "x' = u, minimise the integral of x^2 + u^2" in " ".join(output.split())


def test_a_comparison_in_60_columns(narrow):
    _, output = narrow("compare", "scalar_lqr", "--steps", "20", "--solver", "ddp", "--out", "here")
    assert all(len(line) <= 60 or line.startswith("report:") for line in output.splitlines())
    for part in ("0.7617172453", "iterations", "time [s]", "build [s]", "converged"):
        assert part in output


def test_an_error_leaves_no_folder(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(control_module, "solve", refuse)
        code, output = run("solve", "double_integrator_min_time", "--out", "here")
    assert code == main.MISTAKE
    assert "this solver cannot" in output
    assert not (tmp_path / "here").exists()
    assert run("solve", "scalar_lqr", "--solver", "ddp", "--steps", "5", "--out", "here")[0] == 0


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("solve", ("--solver", "dpd"), "--solver 'dpd' is unknown"),
        ("solve", ("--tolerance", "-1"), "tolerance of DDP is -1.0; expected tolerance > 0"),
        ("solve", ("--integrator", "rk5"), "--integrator 'rk5' is unknown"),
        ("compare", ("--solver", "ddp", "--solver", "dpd"), "--solver 'dpd' is unknown"),
    ],
)
def test_a_wrong_option_makes_no_folder(run, tmp_path, command, options, message):
    code, output = run(command, "scalar_lqr", *options)
    assert code == main.MISTAKE
    assert f"error: ProblemError: {message}" in output
    assert "run folder" not in output
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_other_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(control_module, "solve", refuse)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").touch()
    assert run("solve", "double_integrator_min_time", "--out", "here")[0] == main.MISTAKE
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("command", [["solve", "scalar_lqr", "--out"], ["solve", "--resume"]])
def test_a_folder_that_cannot_be(run, tmp_path, command):
    (tmp_path / "file").touch()
    code, output = run(*command, "file/below")
    assert code == main.MISTAKE
    assert "Traceback" not in output
    assert "cannot be written" in output or "holds no config.json that can be read" in output


def test_a_full_disk(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "here/metrics.jsonl")

    monkeypatch.setattr("ocnopt.cli.control.solve", lambda *_, **__: full())
    monkeypatch.setattr("ocnopt.cli.data.fetch", lambda *_: full())
    for command, again in [(("solve", "scalar_lqr"), "continue with --resume"), (("data", "fetch", "mnist"), "repeat")]:
        code, output = run(*command)
        assert code == main.MISTAKE
        assert f"'here/metrics.jsonl'; expected files that can be read and written: mend that, then {again}" in output


def test_a_warning_is_a_note(run, monkeypatch):
    def warn(*_, **__):
        warnings.warn("a seeded perturbation is used; pass max_iterations=", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("ocnopt.cli.control.solve", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, output = run("solve", "scalar_lqr")
    assert "note: a seeded perturbation is used; pass --max-iterations\n" in output


def test_options_that_contradict_the_run(run):
    assert run("solve", "scalar_lqr", "--steps", "5", "--out", "here")[0] == 0
    assert run("solve", "scalar_lqr", "--resume", "here", "--steps", "5", "--solver", "ddp", "--out", "here")[0] == 0
    code, output = run("solve", "--resume", "here", "--steps", "6", "--tolerance", "0.1", "--solver", "ddp")
    assert code == main.MISTAKE
    assert "--steps 6 (began with 5), --tolerance 0.1 (began without) came with --resume here; expected" in output
    assert "--solver" not in output
    assert "NAME brachistochrone (began with scalar_lqr)" in run("solve", "brachistochrone", "--resume", "here")[1]


def test_options_that_contradict_a_training_run(run):
    assert run("train", "wine", *TRAIN, "--out", "here")[0] == 0
    assert run("train", "wine", *TRAIN, "--threads", "1", "--resume", "here")[0] == 0
    code, output = run("train", "--resume", "here", "--epochs", "3", "--optimizer", "sgd", "--threads", "2")
    assert code == main.MISTAKE
    for part in ("--epochs 3 (began without)", "--optimizer sgd (began with adam)", "--threads 2 (began with 1)"):
        assert part in output


def test_options_that_contradict_a_comparison(run):
    assert run("compare", "scalar_lqr", "--steps", "5", "--solver", "ddp", "--out", "here")[0] == 0
    assert run("compare", "--resume", "here", "--solver", "ddp")[0] == 0
    assert "--solver ['casadi'] (began with ['ddp'])" in run("compare", "--resume", "here", "--solver", "casadi")[1]


def test_training_takes_one_thread(run, tmp_path):
    torch.set_num_threads(2)
    try:
        assert run("train", "wine", *TRAIN, "--out", "one")[0] == 0
        assert torch.get_num_threads() == 1
        assert RunFolder.open(tmp_path / "one").config["threads"] == 1
        assert run("train", "wine", *TRAIN, "--threads", "2", "--out", "two")[0] == 0
        assert RunFolder.open(tmp_path / "two").config["threads"] == 2
    finally:
        torch.set_num_threads(1)


def test_a_flow_is_drawn_as_it_trains(run, tmp_path):
    """Pictures on the way change no number, and stand in the page of a resumed run too."""
    options = ("train", "spirals", "--optimizer=adam", "--iterations=8", "--batch-size=16", "--checkpoint-every=1")
    assert run(*options, "--out", "here")[0] == 0
    folder = RunFolder.open(tmp_path / "here")
    assert {"2-paths.png", "paths.png"} <= {path.name for path in folder.plots.iterdir()}
    assert run("train", "--resume", "here")[0] == 0
    page = (tmp_path / "here" / "report.html").read_text()
    assert page.index("plots/2-paths.png") < page.index("plots/paths.png")
    assert "After iteration 2." in page
