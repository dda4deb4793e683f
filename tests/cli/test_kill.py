"""SIGKILL at random moments: the folder stays whole, at most the steps since the last checkpoint are lost."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch

from ocnopt.cli.main import app
from ocnopt.problems import learning_task
from ocnopt.runs import RunFolder
from ocnopt.training.trainer import TrainConfig, Trainer

CONFIG = TrainConfig("digits", "snopt", lr=0.01, horizon="feedback", iterations=12, batch_size=8, checkpoint_every=2)
OPTIONS = [
    "--optimizer=snopt",
    "--lr=0.01",
    "--horizon=feedback",
    f"--iterations={CONFIG.iterations}",
    "--batch-size=8",
]


@pytest.fixture(scope="module")
def processes():
    """Children of a fresh process that has imported what they need: importing torch is what takes long."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ocnopt.cli.main", "ocnopt.cli.learning", "sklearn.datasets"])
    return processes


def command(arguments, output):
    """The command line with its output in a file: the whole life of a child."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        app(["train", *arguments])


def wait_for_lines(path, count, process):
    """Until the metrics hold a number of lines, or the run has ended."""
    while process.is_alive():
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL does not exist there")
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, processes):
    moments = random.Random(0)
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    arguments = ["digits", *OPTIONS, "--checkpoint-every=2", f"--out={folder}"]
    output, reached = tmp_path / "output", 0

    def start():
        process = processes.Process(target=command, args=(arguments, output))
        process.start()
        return process

    for kill in range(2):
        process = start()
        wait_for_lines(metrics, reached + 4, process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0 and kill > 0:  # a fast machine was done before the second kill
            reached = CONFIG.iterations
            break
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        state = RunFolder.open(folder).load_checkpoint()
        done = len(RunFolder.open(folder).metrics())
        assert state is not None, f"no checkpoint after {done} iterations"
        assert done - state["iteration"] <= 2
        assert state["iteration"] > reached, f"kill {kill} found no progress"
        reached = state["iteration"]
        arguments = ["--resume", str(folder)]
    process = start()
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert f"resumed after iteration {reached} of {CONFIG.iterations}" in output.read_text()
    assert (folder / "report.html").exists()

    unbroken = Trainer(learning_task("digits").build(), CONFIG)
    losses = [unbroken.step()["loss"] for _ in range(CONFIG.iterations)]
    assert [record["loss"] for record in RunFolder.open(folder).metrics()] == losses
    state = RunFolder.open(folder).load_checkpoint()["model"]
    assert all(torch.equal(state[name], value) for name, value in unbroken.model.state_dict().items())
