import pickle

import pytest

from fisher_ray import errors
from fisher_ray.errors import DataError, FisherRayError, StoreError


def subclasses(root: type[FisherRayError]) -> list[type[FisherRayError]]:
    return [root, *(found for child in root.__subclasses__() for found in subclasses(child))]


ALL = subclasses(FisherRayError)
EXIT_CODES = {
    "FisherRayError": 1,
    "RequestError": 2,
    "ConfigError": 2,
    "ModelError": 2,
    "ResumeMismatchError": 2,
    "DataError": 3,
    "StoreError": 3,
    "StoppedError": 4,
    "ClaimedError": 4,
    "StorageError": 4,
    "MemoryExhaustedError": 4,
    "WorkersLostError": 4,
}


def test_every_error_says_whose_move_is_next():
    assert {kind.__name__: kind.exit_code for kind in ALL if kind.__module__ == errors.__name__} == EXIT_CODES


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("what was given, the rule, what to do")))

    assert type(error) is kind
    assert str(error) == "what was given, the rule, what to do"


@pytest.mark.parametrize("kind", [DataError, StoreError])
def test_the_row_to_blame_survives_pickling_and_stays_out_of_the_message(kind):
    error = pickle.loads(pickle.dumps(kind("x.parquet row 12: label 11", row=25012)))

    assert (str(error), error.row) == ("x.parquet row 12: label 11", 25012)
