"""Run folders: atomic files, metrics that are cut back, checkpoints that hold plain values only."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ocnopt import runs
from ocnopt.cli.demo import run_demo
from ocnopt.errors import DataError, ProblemError
from ocnopt.runs import RunFolder, replace_file, write_atomically
from ocnopt.training.trainer import open_trainer


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def killed(beside):
        beside.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, killed)
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_comes_back(tmp_path):
    made = RunFolder.create(tmp_path / "run", {"command": "train", "number": 0.1})
    opened = RunFolder.open(tmp_path / "run")
    assert opened.config == made.config
    assert opened.config["number"] == 0.1
    assert opened.config["threads"] == torch.get_num_threads()
    with opened.locked():
        assert opened.plots.is_dir()


def test_a_run_is_not_overwritten(tmp_path):
    RunFolder.create(tmp_path, {})
    with pytest.raises(
        ProblemError, match="holds a run already; expected a new folder: continue that run with --resume"
    ):
        RunFolder.create(tmp_path, {})


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ProblemError, match="is a file; expected a folder"):
        RunFolder.create(tmp_path / "run", {})


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"holds no config.json that can be read; expected the folder of a run"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is no JSON"), ("[]", "holds list; expected an object")])
def test_a_damaged_configuration(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=message):
        RunFolder.open(tmp_path)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    for i in range(1, 6):
        folder.log({"iteration": i, "loss": 1 / 3 / i})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lo')  # a kill in the middle of a line
    kept = folder.keep_metrics(3)
    assert [record["iteration"] for record in kept] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]
    folder.log({"iteration": 4, "loss": 0.0})
    assert [record["iteration"] for record in folder.metrics()] == [1, 2, 3, 4]


def test_a_folder_without_metrics(tmp_path):
    assert RunFolder.create(tmp_path, {}).metrics() == []


def test_a_damaged_line_of_metrics(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(DataError, match="line 2 is no JSON"):
        folder.metrics()


def test_a_checkpoint_comes_back(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    assert folder.load_checkpoint() is None
    folder.save_checkpoint({"weights": torch.arange(3.0), "iteration": 7, "names": ["a"]})
    state = folder.load_checkpoint()
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert state["iteration"] == 7


def test_a_truncated_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    folder.save_checkpoint({"weights": torch.arange(300.0)})
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[:500])
    with pytest.raises(DataError, match=r"checkpoint.pt \(500 bytes\) cannot be read"):
        folder.load_checkpoint()


def test_a_pickled_object_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    torch.save({"module": torch.nn.Linear(1, 1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="expected a checkpoint written by this library"):
        folder.load_checkpoint()


def test_default_folders_do_not_clash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Noon(runs.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.setattr(runs, "datetime", Noon)
    first = runs.default_folder("solve", "scalar_lqr")
    assert str(first) == "runs/solve-scalar_lqr-20260102-120000"
    first.mkdir(parents=True)
    assert str(runs.default_folder("solve", "scalar_lqr")) == "runs/solve-scalar_lqr-20260102-120000-2"


def test_metrics_keep_every_digit(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    value = float(torch.rand((), dtype=torch.float64))
    folder.log({"iteration": 1, "loss": value})
    assert folder.keep_metrics(1)[0]["loss"] == value
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value


HOLD = """
import sys, time
from pathlib import Path
from ocnopt.runs import RunFolder
with RunFolder.open(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_into_a_folder_and_a_kill_frees_it(tmp_path):
    folder = RunFolder.create(tmp_path, {})
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        message = rf"another process \(pid {other.pid}\) writes into .*; expected one at a time: wait for its end, or"
        with pytest.raises(ProblemError, match=message), folder.locked():
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with folder.locked():
        pass


@pytest.mark.parametrize("config", [{"seeds": [0, 1]}, {}])
def test_a_demo_of_another_version(tmp_path, config):
    folder = RunFolder.create(tmp_path, config)
    with pytest.raises(DataError, match=r"config.json holds seeds = .*; expected what it writes itself: start a new"):
        run_demo(folder, Console(quiet=True))


def test_a_training_run_of_another_version(tmp_path):
    folder = RunFolder.create(tmp_path, {"train": {"problem": "digits", "optimizer": "adam", "lr": 0.1, "depth": 2}})
    with pytest.raises(DataError, match=r"config.json holds train = .*'depth'\); expected what it writes itself"):
        open_trainer(folder)


def test_a_folder_is_taken_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    folder.log({"iteration": 1})
    with folder.locked():
        folder.discard()
    assert not (tmp_path / "run").exists()


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProblemError, match=r"cannot be written \(Not a directory\); expected a folder that may be"):
        RunFolder.create(tmp_path / "file" / "run", {})
