"""What things cost in the simulated world; every figure is an argument of the command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds, bytes, and rates of them.

    Attributes:
        samples_s: samples that one GPU computes in a second.
        input_bytes: of a sample, read.
        feature_bytes: of a sample, written: ten classes, rank 512, float16.
        sum_bytes: of a unit's sum: 2,048 × 2,048 in float64.
        model_bytes: that every worker reads when it starts.
        solo_s: what is made of the whole sum, on one worker: the eigenvectors.
        add_bytes_s: of sums that a worker adds.
        gpus_each: workers of a machine.
        machine_bytes_s: that go in, and as many out, of a machine.
        machine_latency_s: of a message between two.
        storage_bytes_s: of all machines together.
        storage_requests_s: of all machines together.
        storage_latency_s: of a request.
        stream_bytes_s: of one worker's reading or writing.
        part_bytes: of a request.
        start_s: of a worker's process, until it has its model.
        starts_s: workers that the cluster starts in a second.
        call_s: of the driver for each call of a worker's method, answer included.
        get_s: of the driver for each answer that it fetches.
        ref_s: of the driver for each reference that it waits for, whenever it does.
        scan_s: of the driver's own code for each worker, whenever it looks around.
        decide_s: of the driver's own code for each piece of work.
        remove_s: of the driver for each kept sum that its threads are to remove.
        wobble: standard deviation of the logarithm of a unit's duration.
        slow_share: units that take ``slow_ratio`` times as long.
        slow_ratio: see there.
        loss_each_s: machines that are lost, a second and machine: a fifth an hour.
        replace_s: after which there is another.
    """

    samples_s: float = 10_000.0
    input_bytes: float = 3_000.0
    feature_bytes: float = 10 * 512 * 2.0
    sum_bytes: float = 2048 * 2048 * 8.0
    model_bytes: float = 2e6
    solo_s: float = 3.0
    add_bytes_s: float = 2e9
    gpus_each: int = 8
    machine_bytes_s: float = 12.5e9
    machine_latency_s: float = 0.0005
    storage_bytes_s: float = 1e12
    storage_requests_s: float = 50_000.0
    storage_latency_s: float = 0.03
    stream_bytes_s: float = 0.5e9
    part_bytes: float = 16e6
    start_s: float = 15.0
    starts_s: float = 100.0
    call_s: float = 0.0002
    get_s: float = 0.000026
    ref_s: float = 0.0000005
    scan_s: float = 0.000002
    decide_s: float = 0.00005
    remove_s: float = 0.00005
    wobble: float = 0.03
    slow_share: float = 0.001
    slow_ratio: float = 2.0
    loss_each_s: float = 0.2 / 3600
    replace_s: float = 180.0


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        name: for people.
        num_workers: of it.
        num_rows: of its metric pass, and of its feature pass.
        unit_rows: of a unit.
        every_units: as many units' sum is kept; None for none.
        costs: of its world.
        zone_lost_s: when a third of the machines is lost; None for never.
        zone_back_s: after how long they are back.
    """

    name: str
    num_workers: int
    num_rows: int
    unit_rows: int
    every_units: int | None
    costs: Costs
    zone_lost_s: float | None = None
    zone_back_s: float = 120.0

    @property
    def num_units(self) -> int:
        """Of each pass."""
        return -(-self.num_rows // self.unit_rows)

    @property
    def ideal_s(self) -> float:
        """What a pass takes if every worker computes all the time."""
        return self.num_rows / self.costs.samples_s / self.num_workers
