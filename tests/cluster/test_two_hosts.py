from __future__ import annotations

import pytest

from tests.cluster.two_hosts import exercise
from tests.integration.runs import QUICK

UNITS = ("runtime.unit_rows=32", "store.chunk_rows=32", "trained_on=null")
"""Many, so that a host can be lost in the middle."""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_on_two_hosts_survives_a_cut_link_with_the_same_bytes_and_leaves_no_process(tmp_path):
    transform = "fisher_ray.models:digits_transform"
    overrides = [key for key in (*QUICK, *UNITS) if not key.startswith(("runtime.num_workers", "trained_on.seconds"))]
    exercise(tmp_path, "jobs/configs/digits.yaml", transform, 0.01, overrides)
