"""Learning problems: data, model and loss, for Neural ODEs and Runge-Kutta networks."""

from ocnopt.problems.learning import digits, plane
from ocnopt.problems.record import LearningRecord

LEARNING_RECORDS: tuple[LearningRecord, ...] = (digits.RECORD, *plane.RECORDS)
