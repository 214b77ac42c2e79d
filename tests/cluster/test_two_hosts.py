from __future__ import annotations

import pytest

from tests.cluster.chaos import OVERRIDES, SLOW
from tests.cluster.two_hosts import exercise
from tests.integration.runs import QUICK


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_run_on_two_hosts_survives_a_cut_link_with_the_same_bytes(tmp_path):
    exercise(tmp_path, "jobs/configs/digits.yaml", (*QUICK, *OVERRIDES), {"slow": SLOW})
