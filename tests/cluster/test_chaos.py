import pytest

from tests.cluster.chaos import FAULTS, survive


@pytest.mark.slow
def test_a_fault_of_every_kind_changes_no_byte(tmp_path):
    lines: list[str] = []
    tally = survive(tmp_path, len(FAULTS), seed=1, stop_s=5.0, say=lines.append)
    assert dict(tally.faults) == dict.fromkeys(FAULTS, 1), lines
