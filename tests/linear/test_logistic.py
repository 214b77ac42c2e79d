import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fisher_ray.errors import DataError, RequestError
from fisher_ray.linear import (
    GramSum,
    accuracy,
    loss_and_gradient,
    minimise,
    preconditioner,
    ridge_path,
    sum_gradients,
    weigh_classes,
)
from tests.linear.test_sums import rows, summed
from tests.reference.linear import logistic_objective, standardised


@pytest.fixture(scope="module")
def digits():
    data, target = load_digits(return_X_y=True)
    return torch.from_numpy(data).float(), torch.from_numpy(target).long()  # three columns of it are constant


def evaluator(x, labels, coordinates, chunk=700):
    """What the runtime does: chunks' sums, added, then mapped to the preconditioned coordinates once."""

    def evaluate(params):
        weight, bias = coordinates.raw(params)
        loss, weight_gradient, bias_gradient = 0.0, torch.zeros_like(weight), torch.zeros_like(bias)
        for part, chosen in zip(x.split(chunk), labels.split(chunk), strict=True):
            more, dw, db = loss_and_gradient(part, chosen, weight, bias)
            loss, weight_gradient, bias_gradient = loss + more, weight_gradient + dw, bias_gradient + db
        return coordinates.objective(params, loss, weight_gradient, bias_gradient)

    return evaluate


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimum_on_digits_is_scikit_learns_within_1e6(digits, penalty, dtype):
    x, labels = digits[0].to(dtype), digits[1]
    coordinates = preconditioner(summed(x, labels, 10), penalty)
    found = minimise(evaluator(x, labels, coordinates), coordinates.start(), max_steps=400, tolerance=1e-5)
    assert found.converged or dtype == torch.float32  # float32 products' noise in the gradient may stay above 1e-5
    columns, _, _ = standardised(x.numpy())
    oracle = LogisticRegression(C=10 / (penalty * len(x)), tol=1e-10, max_iter=10_000)
    oracle.fit(columns, labels.numpy())
    best = logistic_objective(columns, labels.numpy(), oracle.coef_, oracle.intercept_, penalty)
    model = coordinates.model(found.params)
    reached = logistic_objective(x.numpy(), labels.numpy(), model.weight.numpy(), model.bias.numpy(), penalty)
    assert found.loss == pytest.approx(best, rel=1e-6)
    assert reached == pytest.approx(best, rel=1e-6)


def test_the_gradient_is_that_of_the_objective():
    x, labels = rows(60, 4, dtype=torch.float64)
    x = 10 + x * torch.tensor([1.0, 0.1, 5.0, 2.0])
    coordinates = preconditioner(summed(x, labels), 0.3)
    params = torch.randn(coordinates.start().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    evaluate = evaluator(x, labels, coordinates)
    loss, gradient = evaluate(params)
    weight, bias = coordinates.raw(params)
    assert loss == pytest.approx(logistic_objective(x.numpy(), labels.numpy(), weight.numpy(), bias.numpy(), 0.3))
    expected = torch.zeros_like(params)
    for i in range(params.numel()):
        step = torch.zeros_like(params)
        step.view(-1)[i] = 1e-5
        expected.view(-1)[i] = (evaluate(params + step)[0] - evaluate(params - step)[0]) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def test_at_the_zero_model_the_hessian_is_the_identity_on_class_contrasts():
    x, labels = rows(80, 3, dtype=torch.float64)
    coordinates = preconditioner(summed(x, labels), 0.2)
    evaluate = evaluator(x, labels, coordinates)
    start, direction = coordinates.start(), torch.randn(coordinates.start().shape, dtype=torch.float64)
    direction -= direction.mean(0)
    change = (evaluate(start + 1e-5 * direction)[1] - evaluate(start - 1e-5 * direction)[1]) / 2e-5
    torch.testing.assert_close(change, direction, rtol=1e-6, atol=1e-6)


def test_the_first_newton_step_is_the_ridge_solution_times_the_number_of_classes():
    x, labels = rows(80, 5, dtype=torch.float64)
    sums = summed(x, labels)
    coordinates = preconditioner(sums, 0.2)
    _, gradient = evaluator(x, labels, coordinates)(coordinates.start())
    (ridge,) = ridge_path(sums, [0.2])
    torch.testing.assert_close(coordinates.raw(-gradient)[0].float() / 3, ridge.weight, rtol=1e-5, atol=1e-7)


def test_few_steps_are_enough_and_repeat_bit_for_bit(digits):
    x, labels = digits
    coordinates = preconditioner(summed(x, labels, 10), 0.1)
    runs = [minimise(evaluator(x, labels, coordinates), coordinates.start(), 10, 0.0) for _ in range(2)]
    best = minimise(evaluator(x, labels, coordinates), coordinates.start(), 100, 1e-5)
    assert torch.equal(runs[0].params, runs[1].params)
    assert runs[0].loss == pytest.approx(best.loss, rel=5e-3)
    assert accuracy(coordinates.model(runs[0].params).scores(x), labels) > 0.97


def test_a_constant_column_and_an_absent_class_get_no_weight_of_their_own():
    x, labels = rows(90, 4)
    x[:, 2] = 7.0
    coordinates = preconditioner(summed(x, labels, num_classes=5), 0.1)
    model = coordinates.model(minimise(evaluator(x, labels, coordinates), coordinates.start()).params)
    assert not model.weight[:, 2].any()
    torch.testing.assert_close(model.weight[3], model.weight[4])
    assert not torch.isin(model.scores(x).argmax(1), torch.tensor([3, 4])).any()


def test_the_search_finds_the_minimum_of_a_curved_valley():
    def rosenbrock(params):
        x = params.clone().requires_grad_()
        loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        loss.backward()
        return float(loss.detach()), x.grad

    found = minimise(rosenbrock, torch.tensor([-1.2, 1.0]), max_steps=200, tolerance=1e-8)
    assert found.converged
    torch.testing.assert_close(found.params, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_search_goes_round_what_is_not_finite_and_never_rises():
    losses = []

    def barrier(x):
        loss = float((x - 3 * x.clamp(min=0).log() / 1e3).sum()) if bool((x > 0).all()) else float("inf")
        losses.append(loss)
        return loss, 1 - 3e-3 / x

    found = minimise(barrier, torch.full((3,), 0.5), max_steps=100, tolerance=1e-9)
    torch.testing.assert_close(found.params, torch.full((3,), 3e-3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float("inf") in losses
    assert found.loss == min(losses)


def test_a_gradient_that_lowers_nothing_ends_the_search_unconverged():
    found = minimise(lambda x: (1.0, torch.ones_like(x)), torch.zeros(2), max_steps=5)
    assert not found.converged
    assert (found.num_steps, found.loss) == (0, 1.0)
    assert not found.params.any()


def test_what_cannot_be_started_is_refused():
    with pytest.raises(DataError, match="nan at the start"):
        minimise(lambda x: (float("nan"), x), torch.zeros(2))
    with pytest.raises(RequestError, match="not a positive number"):
        preconditioner(summed(*rows(10, 3)), 0.0)
    with pytest.raises(DataError, match="label 3"):
        loss_and_gradient(torch.zeros(1, 2), torch.tensor([3]), torch.zeros(3, 2), torch.zeros(3))


def test_losses_of_chunks_add_up_to_that_of_all_rows():
    x, labels = rows(50, 6, dtype=torch.float64)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = loss_and_gradient(x, labels, weight, bias)
    first, second = (
        loss_and_gradient(x[:20], labels[:20], weight, bias),
        loss_and_gradient(x[20:], labels[20:], weight, bias),
    )
    for total, a, b in zip(whole, first, second, strict=True):
        np.testing.assert_allclose(total, a + b, rtol=1e-12, atol=1e-12)


def test_balanced_classes_have_the_optimum_of_scikit_learns_balanced_weights(digits):
    x, labels = digits
    keep = torch.cat([torch.arange(len(labels))[labels == c][: 20 + 10 * c] for c in range(10)])
    x, labels = x[keep].double(), labels[keep]
    weights = weigh_classes("balanced", torch.bincount(labels))
    sums = GramSum.zeros(x.shape[1], 10)
    sums.add(x, labels, weights)
    coordinates = preconditioner(sums, 0.1)

    def evaluate(params):
        rows, *found = sum_gradients([(x, labels)], *coordinates.raw(params), weights)
        assert rows == pytest.approx(coordinates.num_rows)
        return coordinates.objective(params, *found)

    model = coordinates.model(minimise(evaluate, coordinates.start(), 400, 1e-6).params)
    centre = np.average(x.numpy(), axis=0, weights=weights[labels].numpy())
    deviation = np.sqrt(np.average((x.numpy() - centre) ** 2, axis=0, weights=weights[labels].numpy()))
    varies = deviation > 0
    columns = (x.numpy()[:, varies] - centre[varies]) / deviation[varies]
    oracle = LogisticRegression(C=10 / (0.1 * len(x)), tol=1e-10, max_iter=10_000, class_weight="balanced")
    oracle.fit(columns, labels.numpy())
    weight = model.weight.numpy()[:, varies] * deviation[varies]
    np.testing.assert_allclose(weight - weight.mean(0), oracle.coef_ - oracle.coef_.mean(0), atol=1e-4)


def test_a_weight_of_no_class_is_refused_naming_it():
    with pytest.raises(RequestError, match=r"class 3 the weight 2\.0\. Classes are 0 to 2"):
        weigh_classes({3: 2.0}, torch.ones(3))
    with pytest.raises(RequestError, match=r"class 1 the weight 0\.0"):
        weigh_classes({1: 0.0}, torch.ones(3))
