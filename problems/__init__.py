"""The problem library: named problems with known answers, and data with models to train."""

if __name__ != "ocnopt.problems":
    raise ImportError(f"imported as {__name__!r}; expected 'ocnopt.problems': write `from ocnopt import problems`")

from ocnopt.problems.drawing import Drawing as Drawing
from ocnopt.problems.record import ControlRecord as ControlRecord
from ocnopt.problems.record import LearningProblem as LearningProblem
from ocnopt.problems.record import LearningRecord as LearningRecord
from ocnopt.problems.record import Picture as Picture
from ocnopt.problems.record import Task as Task
from ocnopt.problems.registry import control as control
from ocnopt.problems.registry import get as get
from ocnopt.problems.registry import learning_task as learning_task
from ocnopt.problems.registry import names as names
