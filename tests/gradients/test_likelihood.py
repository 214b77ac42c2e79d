import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli as BernoulliLaw
from torch.distributions import Categorical, Independent, Normal

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.gradients import Bernoulli, Custom, Gaussian, NextToken, ScoreEngine, Softmax
from fisher_ray.gradients.forming import form_gradients
from tests.gradients.test_zoo import TOLERANCE, oracle
from tests.gradients.zoo import Gpt, build

LAWS = {
    "softmax": (Softmax(), lambda output: Categorical(logits=output), torch.tensor([2, 0, 3])),
    "gaussian": (Gaussian(), lambda output: Independent(Normal(output, 1.0), 1), torch.randn(3, 4).double()),
    "bernoulli": (
        Bernoulli(),
        lambda output: Independent(BernoulliLaw(logits=output), 1),
        torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]),
    ),
    "custom": (
        Custom(lambda output, y: -(output - y).abs().sum(1)),
        lambda output: Absolute(output),
        torch.randn(3, 4).double(),
    ),
}


class Absolute:
    def __init__(self, output):
        self.output = output

    def log_prob(self, y):
        return -(self.output - y).abs().sum(-1)


@pytest.mark.parametrize("name", LAWS)
def test_a_score_is_the_gradient_of_the_log_likelihood(name):
    likelihood, law, targets = LAWS[name]
    model, inputs = build("resnet, group norm", 3)
    engine = ScoreEngine(model, likelihood=likelihood)
    formed = form_gradients(engine.blocks, model, engine.of_labels(inputs, targets))

    for row in range(3):
        expected = oracle(model, inputs, row, lambda output, row=row: law(output).log_prob(targets[row]))
        torch.testing.assert_close({key: value[row, 0] for key, value in formed.items()}, expected, **TOLERANCE)


def test_a_sequences_score_is_the_sum_over_its_next_tokens():
    torch.manual_seed(0)
    model, tokens = Gpt(classes=False).double().eval(), torch.randint(11, (3, 7))
    targets = tokens.clone()
    targets[1, 4:] = -100
    engine = ScoreEngine(model, likelihood=NextToken())
    formed = form_gradients(engine.blocks, model, engine.of_labels(tokens, targets))

    for row in range(3):

        def log_likelihood(output, row=row):
            kept = targets[row, 1:] != -100
            return output[:-1].log_softmax(1)[kept, targets[row, 1:][kept]].sum()

        expected = oracle(model, tokens, row, log_likelihood)
        torch.testing.assert_close({key: value[row, 0] for key, value in formed.items()}, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["softmax", "gaussian", "bernoulli"])
def test_scores_of_all_targets_sum_to_the_expected_negative_hessian(name):
    likelihood, law, _ = LAWS[name]
    output = torch.randn(3, 4, dtype=torch.float64)
    scores = likelihood.all_scores(output, weighted=True)
    sums = torch.einsum("sbi,sbj->bij", scores, scores)

    for row in range(3):  # for these laws the Hessian does not depend on the target
        target = law(output[row]).sample()
        hessian = torch.autograd.functional.hessian(lambda z, y=target: law(z).log_prob(y), output[row])
        torch.testing.assert_close(sums[row], -hessian)


@pytest.mark.parametrize("name", ["softmax", "gaussian", "bernoulli"])
def test_drawn_targets_have_the_outputs_distribution_and_depend_on_seed_and_index_alone(name):
    likelihood, law, _ = LAWS[name]
    index, one = torch.arange(20_000), torch.randn(1, 4, dtype=torch.float64)
    output = one.expand(len(index), -1)
    drawn = likelihood.draw("sampled", output, torch.zeros(len(index)), index, seed=3)

    if name == "softmax":
        shares = torch.bincount(drawn, minlength=4) / len(index)
        torch.testing.assert_close(shares.double(), one[0].softmax(0), rtol=0, atol=0.02)
    else:
        spread = law(one[0]).base_dist.variance
        torch.testing.assert_close(drawn.double().mean(0), law(one[0]).mean, rtol=0, atol=0.03)
        torch.testing.assert_close(drawn.double().var(0), spread, rtol=0, atol=0.04)
        centred = drawn.double() - drawn.double().mean(0)
        correlations = torch.corrcoef(centred.T) - torch.eye(4)
        assert float(correlations.abs().max()) < 0.04
    part = likelihood.draw("sampled", output[5:8], torch.zeros(3), index[5:8], seed=3)
    assert torch.equal(part, drawn[5:8])
    assert not torch.equal(likelihood.draw("sampled", output, torch.zeros(len(index)), index, seed=4), drawn)


def test_drawn_sequences_are_drawn_token_by_token_given_the_true_ones():
    index, logits = torch.arange(20_000), torch.randn(1, 3, 5, dtype=torch.float64)
    targets = torch.tensor([[4, 1, 2]]).repeat(len(index), 1)
    targets[0, 2] = -100
    drawn = NextToken().draw("sampled", logits.expand(len(index), -1, -1), targets, index, seed=0)

    assert bool((drawn[:, 0] == 4).all())
    assert int(drawn[0, 2]) == -100
    for place in (1, 2):
        shares = torch.bincount(drawn[1:, place], minlength=5) / (len(index) - 1)
        torch.testing.assert_close(shares.double(), logits[0, place - 1].softmax(0), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NextToken().all_scores(torch.zeros(1, 2, 3), weighted=True), RequestError, "sampled or true"),
        (lambda: Custom(torch.sub).all_scores(torch.zeros(1, 2), weighted=True), RequestError, "Take true"),
        (lambda: Custom(torch.sub).draw("sampled", *[torch.zeros(1)] * 3, 0), RequestError, "cannot draw"),
        (lambda: Gaussian().draw("uniform", *[torch.zeros(1, 2)] * 2, torch.arange(1), 0), RequestError, "'uniform'"),
        (lambda: Gaussian().score(torch.zeros(2, 3), torch.zeros(2)), DataError, r"targets are \(2,\)"),
        (lambda: NextToken().check_targets(torch.zeros(1, 3, 5), torch.tensor([[0, 7, 1]])), DataError, r"in \[0, 5\)"),
        (lambda: NextToken().score(torch.zeros(1, 3, 5), torch.zeros(1, 2).long()), DataError, r"\(1, 2\) are not"),
        (lambda: Custom(lambda z, y: z.sum()).score(torch.zeros(2, 3), torch.zeros(2)), ModelError, r"returns \(\)"),
        (lambda: NextToken().check(torch.zeros(1, 3)), ModelError, r"logits of shape \(B, T, V\)"),
    ],
)
def test_what_a_likelihood_cannot_do_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_output_of_another_likelihood_is_refused():
    with pytest.raises(ModelError, match="not logits of shape"):
        ScoreEngine(nn.Linear(3, 4), likelihood=NextToken()).of_labels(torch.zeros(2, 3), torch.zeros(2, 1).long())
