"""Several processes that train one run: this one is rank 0 and writes, the others step along.

Each takes its part of every batch; gradients are averaged over the processes, and whatever the optimiser decides is
alike on all (:mod:`ocnopt.optim.ranks`). Every process begins at the checkpoint of the run folder, so that a run may go
on with another number of them.
"""

import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ocnopt.errors import ProblemError
from ocnopt.optim.registry import optimizer
from ocnopt.runs import RunFolder
from ocnopt.training.trainer import TrainConfig, read_trainer


def check_processes(config: TrainConfig, count: int) -> None:
    """Refuse a number of processes that cannot train a run.

    Args:
        config: of the run.
        count: k.

    Raises:
        ProblemError: more processes than samples in a batch, or an optimiser that does not live on gradients alone.
    """
    record = optimizer(config.optimizer)
    if count > config.batch_size:
        raise ProblemError(
            f"nproc is {count} for batches of {config.batch_size} samples; expected a sample for each process: take "
            "fewer processes, or a larger batch_size"
        )
    if count > 1 and (record.wants_loss or record.wants_batch):
        raise ProblemError(
            f"nproc is {count} for the optimiser {record.name}, which needs more of a batch than its gradient; "
            f"expected one process: leave out nproc={count}, or take snopt, adam or another that steps by gradients"
        )


@contextmanager
def together(folder: RunFolder, count: int) -> Iterator[None]:
    """Train the run of a folder with ``count`` processes for a while, all in one group of torch.distributed.

    Raises:
        ProblemError: the run cannot be trained so; or what another process has met.
    """
    check_processes(folder.entry("train", lambda options: TrainConfig(**options)), count)
    if count == 1:
        yield
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as meeting:
        pipes: list[Connection] = []
        helpers = []
        try:
            for rank in range(1, count):
                pipe, theirs = context.Pipe(duplex=False)
                arguments = (rank, count, Path(meeting), folder, torch.get_num_threads(), theirs)
                helpers.append(context.Process(target=_help, args=arguments, daemon=True))
                helpers[-1].start()
                theirs.close()
                pipes.append(pipe)
            _meet(0, count, Path(meeting))
            yield
        except RuntimeError as error:  # a connection that broke: whoever broke it says why
            for told in _told(pipes):
                raise told from error
            raise
        finally:
            for helper in helpers:
                helper.terminate()
                helper.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _meet(rank: int, count: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=(meeting / "group").as_uri(), rank=rank, world_size=count)


def _told(pipes: list[Connection]) -> list[Exception]:
    """What the helpers that ended have met."""
    told = []
    for pipe in pipes:
        with suppress(EOFError):
            if pipe.poll(1.0):
                told.append(pipe.recv())
    return told


def _help(rank: int, count: int, meeting: Path, folder: RunFolder, threads: int, pipe: Connection) -> None:
    """The life of a process that is not rank 0, which alone hears of Ctrl-C and warns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        _meet(rank, count, meeting)
        trainer = read_trainer(folder)
        while not trainer.finished:
            trainer.step()
    except Exception as error:
        with suppress(OSError):
            pipe.send(error)
