"""Learning problems: data, model and loss."""

from ocnopt.problems.learning import digits, plane, tables
from ocnopt.problems.record import LearningRecord

LEARNING_RECORDS: tuple[LearningRecord, ...] = (*digits.RECORDS, *tables.RECORDS, *plane.RECORDS)
