import math
import statistics

import pytest
from scipy import stats

from fisher_ray.experiment.figures import shallow_points
from fisher_ray.experiment.page import render_page
from fisher_ray.experiment.tables import Cell, markdown


def run(steps=100, seed=0, views=1, workers=None, fisher=0.7, **more):
    stages = {name: {"seconds": 10.0, "units": [4.0, 4.0]} for name in ("basis", "metric", "features/train", "linear")}
    accuracy = {"base": 0.6, "trained_on": 0.65, "fisher_linear": fisher, "gradnet": None}
    converged = [{"step": 0, "seconds": 0.0, "accuracy": 0.6}, {"step": 50, "seconds": 9.0, "accuracy": 0.66}]
    values = {"steps": steps, "seed": seed, "views": views, "workers": workers, "num_workers": 2, "accuracy": accuracy}
    values |= {"seconds": {}, "num_test": 1000, "validation": 0.69, "converged": converged, "stages": stages}
    return values | more


def drawn(count):
    return [0.5 + 0.01 * math.sin(number) for number in range(count)]


def students_half(values):
    low, high = stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), stats.sem(values))
    return (high - low) / 2


@pytest.mark.parametrize("count", range(2, 32))
def test_intervals_are_students(count):
    cell = Cell.of(drawn(count))
    assert cell.half == pytest.approx(students_half(drawn(count)), rel=1e-4)
    assert (cell.mean, cell.count) == (statistics.fmean(drawn(count)), count)


def test_intervals_of_many_seeds_are_not_too_narrow():
    assert 1 < Cell.of(drawn(60)).half / students_half(drawn(60)) < 1.03


def test_one_seed_has_no_interval():
    assert Cell.of([0.706]).percent() == "70.6"
    assert Cell.of([0.70, 0.71, 0.72]).percent() == "71.0 ± 2.5"


def test_the_table_has_a_column_for_each_snapshot_and_a_row_for_each_model():
    runs = [run(100, 0), run(100, 1, fisher=0.72), run(900, 0), run(100, 0, views=2), run(100, 0, 2, workers=1)]
    one, two = markdown(runs).split("\n\n1,000 test samples, an image and its mirror image")
    assert "| test accuracy, % | 100 steps | 900 steps |" in one
    assert "| base network | 60.0 ± 0.0 | 60.0 |" in one
    assert "| linear model on Fisher features | 71.0 ± 12.7 | 70.0 |" in one
    assert "| seconds of metric, features and linear model | 40 | 40 |" in one
    assert "GradNet" not in one
    assert "seconds of training" not in one
    assert "| test accuracy, % | 100 steps |\n" in two
    assert "one seed" in two


def test_the_table_has_the_seconds_of_every_route_that_was_taken():
    stages = {**run()["stages"], "trained_on": {"seconds": 41.2, "units": []}}
    names = ("gradnet/entries", "gradnet", "gradnet/test", "converged")
    other = {name: {"seconds": 100.0, "units": []} for name in names}
    text = markdown([run(100, stages=stages), run(900, stages={**stages, **other})])
    assert "| seconds of training on | 41 | 41 |" in text
    assert "| seconds of training to convergence | – | 100 |" in text
    assert "| seconds of GradNet's ranges, entries and training | – | 200 |" in text  # test rows aside


def test_seconds_are_measured_where_they_were_and_computed_elsewhere():
    alone = run(workers=1, num_workers=1)
    alone["stages"] = {name: {"seconds": 15.0, "units": [4.0, 4.0]} for name in alone["stages"]}
    first = run()
    points = shallow_points([first, alone], first)
    assert points[1] == (60.0, True)
    assert points[2] == (40.0, True)
    assert points[4] == (40.0, False)  # two units keep two workers busy: 6 s of each stage are no unit's
    assert shallow_points([first], first)[1] == (56.0, False)


def test_the_page_says_which_seconds_are_computed():
    page, _ = render_page([run(100, 0), run(900, 0)])
    assert page.count("<svg") == 3
    assert "8 in 40 s (computed)" in page
    assert "2 in 40 s (measured)" in page
    assert "Fisher features reach 69.0 %" in page
