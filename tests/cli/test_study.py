"""`ocnopt study` as a user meets it: lists, tables, folders, --resume, --json; and `ocnopt train` beyond the digits."""

import json
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from ocnopt.cli import main
from ocnopt.errors import NonFiniteError
from ocnopt.optim.registry import OPTIMIZERS
from ocnopt.problems import Picture, Task, learning_task
from ocnopt.runs import RunFolder
from ocnopt.training import Method, memory_depth
from ocnopt.training.studies import MEASUREMENTS, STUDIES

STUDY = ["study", "tables-feedback", "--quick", "--epochs=2", "--optimizer=adam", "--optimizer=sgd-plain"]


def test_without_a_name_all_are_listed(narrow):
    code, output = narrow("study")
    assert code == 0
    assert all(name in output for name in (*STUDIES, *MEASUREMENTS, *OPTIMIZERS))
    assert all(len(line) <= 60 for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "digit"], "no study is called 'digit'; did you mean 'digits-feedback'"),
        ([*STUDY, "--optimizer=adm"], "--optimizer is 'adm'; expected one of adam"),
    ],
)
def test_a_mistake_leaves_no_folder(run, tmp_path, arguments, message):
    code, output = run(*arguments)
    assert code == main.MISTAKE
    assert message in output
    assert not (tmp_path / "runs").exists()


def test_a_study_and_its_folder(narrow, tmp_path):
    code, output = narrow(*STUDY, "--out", "here")
    assert code == 0
    assert all(len(line) <= 60 or line.startswith("report:") for line in output.splitlines())
    for part in (
        "breast_cancer, what it took",
        "wine, loss by learning rate",
        "by learning rate",
        "spread",
        "test accuracy %",
        "Adam",
        "± ",
    ):
        assert part in output
    folder = tmp_path / "here"
    page = (folder / "report.html").read_text()
    drawn = {path.name for path in (folder / "plots").iterdir()}
    curves = {"loss-time.png", "loss-iteration.png", "accuracy.png", "rates.png"}
    assert drawn == {f"{name}-{curve}" for name in ("wine", "breast_cancer") for curve in curves}
    assert all(f"plots/{name}" in page for name in drawn)
    lines = RunFolder.open(folder).metrics()
    assert len(lines) == 2 * 2 * 2 * 2
    assert len(RunFolder.open(folder / "wine-adam-lr0.01-seed1").metrics()) == 8

    before = (folder / "wine-adam-lr0.01-seed1" / "metrics.jsonl").read_bytes()
    (folder / "report.html").unlink()
    assert narrow("study", "--resume", "here", "--optimizer=adam", "--optimizer=sgd-plain", "--quick")[0] == 0
    assert (folder / "report.html").exists()
    assert (folder / "wine-adam-lr0.01-seed1" / "metrics.jsonl").read_bytes() == before

    code, output = narrow("study", "--resume", "here", "--seeds=3")
    assert code == main.MISTAKE
    assert "--seeds 3 (began without)" in output


def test_a_study_as_json(run):
    assert run(*STUDY, "--seeds=1", "--epochs=1", "--json", "--out=here")[0] == 0
    result = json.loads(run.stdout)
    assert (result["study"], result["folder"]) == ("tables-feedback", "here")
    assert len(result["runs"]) == 8
    assert [(best["problem"], best["method"]) for best in result["best"]] == [
        ("breast_cancer", "adam"),
        ("breast_cancer", "sgd-plain"),
        ("wine", "adam"),
        ("wine", "sgd-plain"),
    ]


def test_a_study_in_which_all_diverge(run, monkeypatch):
    small = replace(STUDIES["vanishing-gradients"], methods=(Method("sgd-plain", lr=3e38),), factors=(1.0,))
    monkeypatch.setitem(STUDIES, "vanishing-gradients", small)
    code, output = run("study", "vanishing-gradients", "--quick", "--out=here")
    assert code == 0
    assert "2 of 2 diverged" in output


@pytest.mark.usefixtures("painted")
def test_a_study_draws_the_pictures_of_its_task(run, tmp_path, monkeypatch):
    whole = STUDIES["learned-steps"]
    small = replace(whole, problems=("spiral",), methods=whole.methods[:2], seeds=1, epochs=2)
    monkeypatch.setitem(STUDIES, "learned-steps", small)
    code, output = run("study", "learned-steps", "--out=here")
    assert code == 0
    assert "Euler, learned" in output
    drawn = {path.stem for path in (tmp_path / "here" / "plots").iterdir()}
    assert {f"backtracking-euler-free-{name}" for name in ("prediction", "layers", "steps")} < drawn
    assert "backtracking-euler-fixed-layers" in drawn
    assert "backtracking-euler-fixed-steps" not in drawn  # nothing to see


def test_a_study_of_other_learning_rates(run, tmp_path):
    assert run(*STUDY, "--seeds=1", "--epochs=1", "--out=here")[0] == 0
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    config["rates"]["wine"]["adam"] = 0.5
    (tmp_path / "here" / "config.json").write_text(json.dumps(config))
    code, output = run("study", "--resume", "here")
    assert code == main.MISTAKE
    assert "was begun with the learning rates" in output


def test_an_error_keeps_what_was_computed(run, tmp_path, monkeypatch):
    def fails(*_):
        raise NonFiniteError("no figure; expected one: draw again")

    with monkeypatch.context() as patch:
        patch.setattr("ocnopt.cli.study.peak_bytes", fails)
        assert run(*STUDY, "--seeds=1", "--epochs=1", "--out=here")[0] == main.MISTAKE
    assert run("study", "--resume", "here")[0] == 0


def test_training_without_a_neural_ode(run, tmp_path, monkeypatch):
    real = learning_task("wine")

    def build() -> Task:
        return replace(real.build(), pictures=(Picture("nothing", "an empty picture", lambda model, task: Figure()),))

    monkeypatch.setattr("ocnopt.training.trainer.learning_task", lambda name: replace(real, build=build))
    code, output = run("train", "wine", "--optimizer=rmsprop", "--epochs=2", "--out=here")
    assert code == 0
    assert "RMSprop, learning rate 0.003, seed 0" in output
    assert "test accuracy %" in output
    assert "field evaluations" not in output
    drawn = {path.name for path in (tmp_path / "here" / "plots").iterdir()}
    assert drawn == {"loss-time.png", "loss-iteration.png", "accuracy.png", "nothing.png"}
    assert "an empty picture" in (tmp_path / "here" / "report.html").read_text()


@pytest.mark.parametrize(
    ("problem", "optimizer", "message"),
    [
        ("digits", "itoh-abe", "itoh-abe met 36074 trained numbers in ImageClassifier"),
        ("spiral", "riemannian", "met a PlaneClassifier without a linear layer of as many outputs as inputs"),
        ("spiral", "msa", "chain is PlaneClassifier; expected an nn.Sequential"),
    ],
)
def test_an_optimiser_that_does_not_fit(run, tmp_path, problem, optimizer, message):
    code, output = run("train", problem, f"--optimizer={optimizer}", "--out=here")
    assert code == main.MISTAKE
    assert message in " ".join(output.split())
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("problem", "optimizer"), [("donut1d", "itoh-abe"), ("wine", "riemannian"), ("wine", "mec"), ("wine", "msa")]
)
def test_structured_descent_by_name(run, problem, optimizer):
    code, output = run("train", problem, f"--optimizer={optimizer}", "--iterations=1", "--out=here")
    assert code == 0
    assert "test accuracy %" in output


@pytest.mark.parametrize("problem", ["wine", "digits_mlp"])
def test_a_rule_for_no_horizon(run, tmp_path, problem):
    code, output = run("train", problem, "--horizon=feedback", "--out=here")
    assert code == main.MISTAKE
    words = " ".join(output.split())
    assert f"T came for the model of {problem}, which has 0 Neural ODEs; expected one at least: use --horizon" in words
    assert "run folder" not in words
    assert "unexpected keyword" not in words
    assert not (tmp_path / "here").exists()


CANNED = {
    "adjoints": [
        {"method": method, "quantity": quantity, "way": way, "to_solve": off, "to_flow": 1e-4, "ms": 12.3456}
        for method in ("rk4", "implicit_adams", "dopri5")
        for quantity, way, off in (
            ("gradient", "torchdiffeq odeint_adjoint", 2e-5),
            ("gradient", "discrete", 0.0),
            ("Hessian times v", "recursive", 0.1),
            ("Hessian times v", "discrete", 0.0),
            ("Hessian times v", "single", None),
            ("Kronecker factors", "single", None),
        )
    ],
    "memory": [
        {"steps": steps, "way": way, "bytes": 1_000_000 * steps, "ms": 1.0}
        for steps in (10, 160)
        for way in memory_depth.WAYS
    ],
    "regularity": [
        {"method": method, "iteration": i, "evaluations": 14, "tight": 50 + i, "kinetic": 0.5 * i, "jacobian": 0.25}
        | {"loss": i or None, "accuracy": 0.5}
        for i in (0, 11, 22)
        for method in ("Adam", "SNOpt")
    ],
}
SAID = {
    "adjoints": "off by 1.0e-04 in second derivatives, 1 times its error in the gradient",
    "memory": "From 10 to 160 steps the memory of back-propagation grows 16 times",
    "regularity": "a solve at 1e-06 takes Adam 72, SNOpt 72 evaluations; kinetic energy: Adam 11",
}


@pytest.mark.parametrize("name", CANNED)
def test_a_study_that_measures(narrow, monkeypatch, tmp_path, name):
    asked = replace(MEASUREMENTS[name], measure=lambda seed, quick: iter(CANNED[name]))
    monkeypatch.setitem(MEASUREMENTS, name, asked)
    code, output = narrow("study", name, "--quick", "--out=here")
    assert code == 0
    assert SAID[name] in " ".join(output.split())
    assert all(len(line) <= 80 or line.startswith("report:") for line in output.splitlines())
    drawn = [f"plots/{path.name}" for path in (tmp_path / "here" / "plots").iterdir()]
    assert len(drawn) == 1
    assert drawn[0] in (tmp_path / "here" / "report.html").read_text()
    written = (tmp_path / "here" / "tables.md").read_text()
    assert all(f"**{sheet.title}**" in written for sheet in asked.sheets(CANNED[name]))

    assert narrow("study", "--resume=here", "--json")[0] == 0
    result = json.loads(narrow.stdout)
    assert result["lines"] == [{"seed": 0, **line} for line in CANNED[name]]
    assert SAID[name] in result["says"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--optimizer=adam", "--optimizer came with the study adjoints, which measures what it names; expected none"),
        ("--epochs=2", "--epochs came with the study adjoints"),
        ("--jobs=2", "--jobs 2 came with the study adjoints, whose times would disturb one another; expected one"),
    ],
)
def test_what_a_study_that_measures_does_not_take(run, tmp_path, option, message):
    code, output = run("study", "adjoints", option, "--out=here")
    assert code == main.MISTAKE
    assert message in " ".join(output.split())
    assert not (tmp_path / "here").exists()
    assert "run folder" not in output


def test_methods_that_are_left_out_are_named_on_the_terminal_and_the_page(run, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "tables-feedback", replace(STUDIES["tables-feedback"], left_out="Left out: soap."))
    monkeypatch.setattr("ocnopt.cli.study.report", lambda asked, folder, console, jobs: ([], []))
    code, output = run("study")
    assert code == 0
    assert "Left out: soap" in output
    assert run("study", "tables-feedback", "--out=here")[0] == 0
    assert "Left out: soap." in (tmp_path / "here" / "report.html").read_text()
    assert run("study", "tables-feedback", "--optimizer=adam", "--out=there")[0] == 0
    assert "Left out" not in (tmp_path / "there" / "report.html").read_text()
