"""Learning problems: data, model and loss for Neural ODEs."""

from ocnopt.problems.learning import digits
from ocnopt.problems.record import LearningRecord

LEARNING_RECORDS: tuple[LearningRecord, ...] = (digits.RECORD,)
