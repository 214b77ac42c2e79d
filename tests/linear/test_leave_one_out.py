import numpy as np
import pytest
import torch

from fisher_ray.errors import RequestError
from fisher_ray.linear import Columns, GramSum, RidgeSystem, ridge_path


def rows(num_rows=260, num_columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.1, 4, num_columns, dtype=torch.float64) + 3
    labels = torch.randint(0, 4, (num_rows,), generator=generator)
    x[:, :4] += 1.5 * torch.nn.functional.one_hot(labels, 4)
    return x, labels


def system_of(x, labels, penalty, columns=None, weights=None):
    sums = GramSum.zeros(x.shape[1], 4)
    for start in range(0, len(x), 50):
        sums.add(x[start : start + 50], labels[start : start + 50], weights)
    return RidgeSystem.fit(sums, penalty, columns)


def refitted(system, x, labels, counts, left_out, penalty, at):
    """Predict at a row by a least-squares fit without another: dense, by its bordered normal equations."""
    z = system.standardised(x).numpy()
    keep = np.arange(len(x)) != left_out
    design = np.concatenate([np.ones((len(z), 1)), z], axis=1)
    targets = np.eye(4)[labels.numpy()]
    ridge = np.diag([0.0, *np.full(z.shape[1], penalty * system.num_rows)])
    weighed = design[keep] * counts[keep, None]
    fitted = np.linalg.solve(weighed.T @ design[keep] + ridge, weighed.T @ targets[keep])
    return design[at] @ fitted


@pytest.mark.parametrize("penalty", [1e-4, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_a_row_out_is_fitting_without_it(penalty, weighted):
    x, labels = rows()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64) if weighted else None
    system = system_of(x, labels, penalty, weights=weights)
    counts = np.ones(len(x)) if weights is None else weights.double().numpy()[labels.numpy()]

    found, _ = system.leave_one_out(
        system.standardised(x), labels, None if weights is None else torch.from_numpy(counts)
    )

    expected = np.stack([refitted(system, x, labels, counts, row, penalty, row) for row in range(200)])
    np.testing.assert_allclose(found[:200].numpy(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_row_pulls_the_predictions_at_others_by_what_they_lose_without_it():
    x, labels = rows()
    system = system_of(x, labels, 0.05)
    z, row, at = system.standardised(x), 17, 3

    pulls, _ = system.pulls(z, labels)
    influence = 1 / system.num_rows + z[at] @ system.solved(z[row : row + 1])[0]

    without = refitted(system, x, labels, np.ones(len(x)), row, 0.05, at)
    lost = system.scores(z)[at].numpy() - without
    np.testing.assert_allclose((influence * pulls[row]).numpy(), lost, rtol=0, atol=1e-10)


def test_it_is_the_model_of_the_path():
    x, labels = rows()
    columns = Columns(np.arange(1, 30, 2), np.linspace(0.2, 1, 15), x.shape[1])
    sums = GramSum.zeros(x.shape[1], 4)
    sums.add(x, labels)

    model = ridge_path(sums, [0.3], columns)[0]
    system = RidgeSystem.fit(sums, 0.3, columns)

    scores = system.scores(system.standardised(x))
    torch.testing.assert_close(scores.float(), model.scores(x.float()), rtol=1e-5, atol=1e-5)


def test_it_comes_back_from_its_arrays():
    x, labels = rows()
    system = system_of(x, labels, 0.1)

    again = RidgeSystem.from_arrays({name: value.copy() for name, value in system.to_arrays().items()})

    z = again.standardised(x)
    for found, expected in zip(again.leave_one_out(z, labels), system.leave_one_out(z, labels), strict=True):
        assert torch.equal(found, expected)


def test_a_constant_column_changes_nothing():
    x, labels = rows()
    more = torch.cat([x, torch.full((len(x), 1), 7.0, dtype=torch.float64)], dim=1)

    one, two = system_of(x, labels, 0.1), system_of(more, labels, 0.1)

    torch.testing.assert_close(
        two.leave_one_out(two.standardised(more), labels), one.leave_one_out(one.standardised(x), labels)
    )


def test_a_penalty_that_is_none_is_refused():
    x, labels = rows()
    with pytest.raises(RequestError, match="not a positive number"):
        system_of(x, labels, 0.0)
