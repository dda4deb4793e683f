"""Training by name: a run that resumes, and studies of methods over seeds and learning rates."""

from ocnopt.training.study import Method as Method
from ocnopt.training.study import Outcome as Outcome
from ocnopt.training.study import Study as Study
from ocnopt.training.study import outcomes as outcomes
from ocnopt.training.study import run_study as run_study
from ocnopt.training.trainer import TrainConfig as TrainConfig
from ocnopt.training.trainer import Trainer as Trainer
from ocnopt.training.trainer import open_trainer as open_trainer
from ocnopt.training.trainer import train as train
