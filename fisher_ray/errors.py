"""Every failure a user can meet, by whose move is next: the request (2), the data (3), or time (4)."""

from __future__ import annotations


class FisherRayError(Exception):
    """Root of this package's errors; its exit code is 1.

    Subclasses take one message made of what was given, the rule, and what to do, so that they pickle
    across processes unchanged.
    """

    exit_code = 1


class RequestError(FisherRayError):
    """The request is wrong: configuration, model, checkpoint or arguments."""

    exit_code = 2


class ConfigError(RequestError):
    """A configuration key is unknown, missing or has a wrong value."""


class ModelError(RequestError):
    """The network cannot be used: layer, mode, checkpoint or output."""


class ResumeMismatchError(RequestError):
    """The run folder was made by another configuration, model or data."""


class DataError(FisherRayError):
    """The data is wrong; the message names file and row."""

    exit_code = 3

    def __init__(self, message: str, row: int | None = None) -> None:
        """Keep the message and, where known, the global row index ``row`` that is to blame."""
        super().__init__(message, row)
        self.message, self.row = message, row

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message


class StoreError(DataError):
    """A store is unsealed, incomplete, corrupt or of another schema."""


class StoppedError(FisherRayError):
    """The run stopped before its end; running it again resumes."""

    exit_code = 4


class StorageError(StoppedError):
    """Storage refused, vanished or is full; what was sealed stays readable."""


class MemoryExhaustedError(StoppedError):
    """A worker has not enough memory for one sample."""


class WorkersLostError(StoppedError):
    """No worker could be had for ``runtime.wait_s`` seconds."""


class ClaimedError(StoppedError):
    """Another driver works on the run folder, or has taken it over."""
