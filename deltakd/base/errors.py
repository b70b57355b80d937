"""The errors a user can cause or meet: one sentence that says where, what with its values, and what to do.

Everything that derives from DeltaKDError ends a command with that sentence and exit code 2, without a stack trace.
Any other exception is a bug of ours and keeps its trace.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # sysexits' "try again": the run was asked to stop and continues when it is started again
EXIT_LOST = 76  # another rank has gone; what is wrong, if anything, is that one's to say


class DeltaKDError(Exception):
    """A fault that its reader can act on; the message is complete and ends with what to do."""

    exit_code = EXIT_USER_ERROR


class RecipeError(DeltaKDError, ValueError):
    """A recipe or an override that cannot hold."""


class LossError(DeltaKDError, ValueError):
    """Logits, labels or payloads that an objective cannot be taken of."""


class DataError(DeltaKDError):
    """Rows that cannot become training examples."""


class ModelError(DeltaKDError):
    """Weights, tokenizers or vocabularies that are missing or do not fit together."""


class TeacherError(DeltaKDError):
    """A frozen model that cannot answer, or that answered something unusable."""


class RunError(DeltaKDError):
    """A run directory, a process or a machine that cannot carry the run."""


class PeerLost(RunError):
    """Another rank that has ended, with a sentence of its own or with its node."""

    exit_code = EXIT_LOST


class Stopped(DeltaKDError):
    """A run that was asked to stop, and has: no fault, but no success either."""

    exit_code = EXIT_STOPPED
