"""A recorder for trainings that are measured: it keeps every step and writes nothing."""

from deltakd.train.step import StepRecord
from deltakd.train.validation import Sample, ValidationRecord


class Steps:
    """The steps that were taken, in order."""

    def __init__(self) -> None:
        self.taken: list[StepRecord] = []

    def begins(self, step: int) -> None:
        """Nothing."""

    def write(self, record: StepRecord) -> None:
        self.taken.append(record)

    def validated(self, record: ValidationRecord, samples: list[Sample]) -> None:
        """Nothing: nothing that is measured validates."""
