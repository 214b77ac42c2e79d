import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from fisher_ray.errors import DataError, RequestError
from fisher_ray.linear import Columns, GramSum, ridge_path
from fisher_ray.linear.cholesky import factorise
from tests.linear.test_sums import rows, summed
from tests.reference.linear import standardised

PENALTIES = [0.01, 0.3, 5.0]


def oracle(x, labels, num_classes, penalty):
    columns, mean, scale = standardised(x.numpy())
    targets = np.eye(num_classes)[labels.numpy()]
    fitted = Ridge(alpha=penalty * len(x), solver="svd").fit(columns, targets)
    weight = fitted.coef_ / scale
    return weight, fitted.intercept_ - weight @ mean


@pytest.mark.parametrize(("num_rows", "num_columns"), [(400, 30), (40, 60)], ids=["tall", "fewer rows than columns"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_ridge_equals_scikit_learn_on_standardised_columns(num_rows, num_columns, dtype, rtol):
    x, labels = rows(num_rows, num_columns, dtype=dtype)
    x = x * torch.logspace(-2, 2, num_columns) + torch.linspace(-3, 3, num_columns)
    models = ridge_path(summed(x, labels), PENALTIES)
    assert [model.penalty for model in models] == PENALTIES
    for model in models:
        weight, bias = oracle(x.double(), labels, 3, model.penalty)
        scale = x.double().numpy().std(0)
        error = np.linalg.norm((model.weight.numpy() - weight) * scale) / np.linalg.norm(weight * scale)
        assert error <= rtol * max(1, 0.1 / model.penalty)  # the condition number is of the order of 1 / penalty
        np.testing.assert_allclose(model.bias, bias, rtol=rtol, atol=rtol)


def test_scores_are_in_the_raw_columns_units():
    x, labels = rows(200, 10)
    (model,) = ridge_path(summed(5 + 3 * x, labels), [0.1])
    weight, bias = oracle(5 + 3 * x, labels, 3, 0.1)
    expected = (5 + 3 * x).double().numpy() @ weight.T + bias
    np.testing.assert_allclose(model.scores(5 + 3 * x), expected, rtol=1e-4, atol=1e-5)
    assert model.weight.dtype == model.bias.dtype == torch.float32
    assert (model.weight.shape, model.bias.shape) == ((3, 10), (3,))


@pytest.mark.parametrize("num_columns", [40, 400], ids=["space exhausted", "space grown"])
def test_a_path_from_one_factorisation_equals_a_factorisation_for_each_penalty(num_columns, monkeypatch):
    sums = summed(*rows(600, num_columns, dtype=torch.float64))
    penalties = np.geomspace(0.01, 20, 20).tolist()
    factorised = []
    monkeypatch.setattr(
        "fisher_ray.linear.ridge.factorise", lambda *given: factorised.append(given) or factorise(*given)
    )
    path = ridge_path(sums, penalties)
    assert len(factorised) == 1
    for model in path:
        (alone,) = ridge_path(sums, [model.penalty])
        torch.testing.assert_close(model.weight, alone.weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(model.bias, alone.bias, rtol=1e-6, atol=1e-9)


def test_penalties_far_apart_are_factorised_by_themselves():
    sums = summed(*rows(100, 120, dtype=torch.float64))
    penalties = [1e6, 1e-3, 1.0, 1e-5]
    path = ridge_path(sums, penalties)
    assert [model.penalty for model in path] == penalties
    for model in path:
        (alone,) = ridge_path(sums, [model.penalty])
        torch.testing.assert_close(model.weight, alone.weight, rtol=1e-5, atol=1e-9)


def test_chosen_and_scaled_columns_have_the_ridge_of_those_columns():
    x, labels = rows(300, 12, dtype=torch.float64)
    index, scales = np.array([1, 4, 5, 11]), np.array([1.0, 0.1, 3.0, 0.5])
    (model,) = ridge_path(summed(x, labels), [0.3], Columns(index, scales, 12))
    columns, mean, scale = standardised(x[:, index].numpy())
    fitted = Ridge(alpha=0.3 * 300, solver="svd").fit(columns * scales, np.eye(3)[labels.numpy()])
    weight = fitted.coef_ * scales / scale
    np.testing.assert_allclose(model.weight[:, index], weight, rtol=1e-5, atol=1e-7)
    assert not model.weight[:, [0, 2, 3, 6, 7, 8, 9, 10]].any()
    np.testing.assert_allclose(model.bias, fitted.intercept_ - weight @ mean, rtol=1e-5, atol=1e-6)


def test_fitting_leaves_the_sums_as_they_were():
    sums = summed(*rows(50, 8))
    before = {name: array.copy() for name, array in sums.to_arrays().items()}
    ridge_path(sums, PENALTIES)
    for name, array in sums.to_arrays().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 12345.678, -1e-20])
def test_a_constant_column_gets_no_weight_and_changes_no_other(constant):
    x, labels = rows(3000, 12)
    with_constant = torch.cat([x[:, :5], torch.full((3000, 1), constant), x[:, 5:]], 1)
    (model,), (without,) = ridge_path(summed(with_constant, labels), [0.1]), ridge_path(summed(x, labels), [0.1])
    assert not model.weight[:, 5].any()
    others = [i for i in range(13) if i != 5]
    torch.testing.assert_close(model.weight[:, others], without.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bias, without.bias, rtol=1e-4, atol=1e-6)


def test_duplicated_columns_share_the_weight_with_a_sensible_penalty():
    x, labels = rows(200, 6, dtype=torch.float64)
    (model,) = ridge_path(summed(torch.cat([x, x], 1), labels), [1e-6])
    torch.testing.assert_close(model.weight[:, :6], model.weight[:, 6:], rtol=1e-3, atol=1e-5)


def test_a_penalty_lost_in_rounding_is_named():
    x, labels = rows(200, 6)
    with pytest.raises(DataError, match=r"penalty 1e-25 .* 18 columns and 200 rows .* not positive definite"):
        ridge_path(summed(torch.cat([x, x, x], 1), labels), [1e-25])


def test_a_class_without_rows_gets_no_weight():
    x, labels = rows(100, 5)
    (model,) = ridge_path(summed(x, labels, num_classes=5), [0.1])
    assert not model.weight[3:].any()
    assert not model.bias[3:].any()


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_that_are_not_positive_are_refused(penalty):
    with pytest.raises(RequestError, match="not a positive number"):
        ridge_path(summed(*rows(10, 3)), [0.1, penalty])


def test_no_rows_and_overflowing_features_are_refused():
    with pytest.raises(DataError, match="no rows"):
        ridge_path(GramSum.zeros(4, 3), [0.1])
    x, labels = rows(50, 4)
    with pytest.raises(DataError, match="overflow"):
        ridge_path(summed(x * 1e30, labels), [0.1])
