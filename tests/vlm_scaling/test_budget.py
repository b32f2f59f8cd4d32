"""What a budget is spent on where the right choice is a formula, and what is told of it where nothing is to be won."""

import io
import math

import numpy as np
import pytest

from jaxlab.vlm_scaling import (
    BestOfN,
    Majority,
    Meter,
    Oracle,
    Question,
    RandomOf,
    Study,
    Tokens,
    choose,
    pictures,
    split,
    stats,
)
from jaxlab.vlm_scaling.report import make_report
from jaxlab.vlm_scaling.simulation import Simulation

METER = Meter(prompt=lambda question: 10, image=lambda question: 100, verdict=1)
STRATEGIES = [Majority(1), Majority(8), Majority(21), BestOfN(8), Oracle(8), RandomOf(8)]
BEST_OF_8 = 2 * (110 + 8 * 20) + 8  # samples read twice, and eight verdicts
MAJORITY_21 = 110 + 21 * 20


def studied(model, count=400):
    options = {"n": 21, "verifier": model, "meter": METER, "n_resamples": 200}
    return Study(model.questions(count), model, strategies=STRATEGIES, **options).run()


@pytest.fixture(scope="module")
def useless():
    """A verifier that accepts right and wrong alike."""
    return studied(Simulation(p=0.4, n_wrong=4, tpr=0.5, fpr=0.5))


def within(interval, value, count):
    return abs(interval.mean - value) < 3 * math.sqrt(value * (1 - value) / count)


def test_a_useless_verifier_loses_to_a_majority_at_equal_tokens(useless):
    assert MAJORITY_21 < BEST_OF_8
    choice = choose(useless, BEST_OF_8, n_resamples=500)
    assert (choice.strategy, choice.tokens) == ("majority@21", MAJORITY_21)
    assert within(choice.accuracy, stats.majority_accuracy(0.4, 4, 21), 200)
    assert choice.accuracy.low < choice.accuracy.mean < choice.accuracy.high
    assert [point.strategy for point in choice.runners_up[:1]] == ["majority@8"]
    assert {point.strategy for point in choice.runners_up[1:]} == {"best-of@8", "majority@1"}
    assert choice.distinguishable
    verified = next(point for point in choice.runners_up if point.strategy == "best-of@8")
    assert within(verified.accuracy, 0.4, 200)
    assert verified.difference.low > 0.2
    assert choice.chosen.difference.mean == choice.regret == 0
    assert choice.hindsight is choice.chosen
    assert [point.strategy for point in choice.frontier] == ["majority@1", "majority@8", "majority@21"]
    assert (choice.dev_questions, choice.held_out_questions) == (200, 200)
    told = str(choice)
    assert told.startswith("majority@21, for at most 548 tokens a question\naccuracy 0.")
    assert "before majority@8 by 0." in told
    assert ": distinguishable" in told


def test_less_is_spent_where_less_is_given(useless):
    for budget, strategy in ((MAJORITY_21 - 1, "majority@8"), (269, "majority@1"), (130, "majority@1")):
        choice = choose(useless, budget, n_resamples=200)
        assert choice.strategy == strategy
        assert all(point.tokens <= budget for point in (choice.chosen, *choice.runners_up))
    assert choice.distinguishable is None
    assert "before" not in str(choice)
    assert len(choice.frontier) == 3


def test_a_perfect_verifier_wins_where_votes_agree_on_a_mistake():
    report = studied(Simulation(p=0.35, n_wrong=1, tpr=1.0, fpr=0.0))
    choice = choose(report, BEST_OF_8, n_resamples=500)
    assert (choice.strategy, choice.tokens) == ("best-of@8", BEST_OF_8)
    assert within(choice.accuracy, 1 - 0.65**8, 200)
    assert choice.accuracy.mean == report_on_the_rest(report, "best-of@8")
    # More votes are worse here, so one sample is all that is worth its tokens below.
    assert choose(report, BEST_OF_8 - 1, n_resamples=200).strategy == "majority@1"
    assert [point.strategy for point in choice.frontier] == ["majority@1", "best-of@8"]


def report_on_the_rest(report, strategy, share=0.5):
    """Accuracy on the questions that `split` leaves."""
    rest = split([Question(name, "", "") for name in report.questions], share)[1]
    kept = np.isin(report.questions, [question.id for question in rest])
    return report.outcomes[strategy][kept].mean()


def made_up(outcomes, tokens=None, clusters=None, selectable=None):
    """A report of outcomes [Q] by strategy."""
    count = len(next(iter(outcomes.values())))
    questions = [f"q{index:03}" for index in range(count)]
    taken = {name: [Tokens(generated=(tokens or {}).get(name, 10))] * count for name in outcomes}
    return make_report(
        questions=questions,
        clusters=clusters or [f"question {question}" for question in questions],
        outcomes={name: np.asarray(values).tolist() for name, values in outcomes.items()},
        answers={name: ["0"] * count for name in outcomes},
        tokens=taken,
        selectable={name: (selectable or {}).get(name, True) for name in outcomes},
        baseline=next(iter(outcomes)),
        transitions={},
        verdicts={},
        agreement={},
        n_resamples=2,
        seed=0,
    )


def test_the_luck_of_the_chosen_is_not_told_as_its_accuracy():
    """Twenty coins: the best of them on 100 questions is 1.87 standard errors up, and on 100 others a coin again."""
    rng = np.random.default_rng(0)
    choices = [
        choose(made_up({f"coin{n}": rng.integers(0, 2, 200).astype(float) for n in range(20)}), 10, n_resamples=100)
        for _ in range(20)
    ]
    error = math.sqrt(0.25 / 100 / len(choices))
    assert abs(np.mean([choice.chosen.dev for choice in choices]) - 0.5 - 1.87 * 0.05) < 3 * error
    assert abs(np.mean([choice.accuracy.mean for choice in choices]) - 0.5) < 3 * error
    assert abs(np.mean([choice.optimism for choice in choices]) - 1.87 * 0.05) < 5 * error
    assert sum(choice.accuracy.low <= 0.5 <= choice.accuracy.high for choice in choices) >= 16
    assert sum(not choice.distinguishable for choice in choices) >= 15
    # What is best in hindsight is so by the same luck.
    assert all(choice.regret == choice.hindsight.accuracy.mean - choice.accuracy.mean >= 0 for choice in choices)
    assert np.mean([choice.regret for choice in choices]) > 0.05


def test_questions_of_an_image_stay_together():
    rng = np.random.default_rng(1)
    clusters = [f"image {index // 4}" for index in range(48)]
    by_image = np.repeat(rng.integers(0, 2, 12), 4).astype(float)
    report = made_up({"a@1": by_image, "b@1": np.zeros(48)}, clusters=clusters)
    choice = choose(report, 10, share=0.25, n_resamples=500)
    assert (choice.dev_questions, choice.held_out_questions) == (12, 36)
    alone = choose(made_up({"a@1": by_image, "b@1": np.zeros(48)}), 10, share=0.25, n_resamples=500)
    # Nine images, not 36 questions: an interval twice as wide.
    assert choice.accuracy.high - choice.accuracy.low > 1.5 * (alone.accuracy.high - alone.accuracy.low)
    assert choose(report, 10, share=0.25, n_resamples=500) == choice


def test_of_equals_the_cheapest_is_taken():
    right = np.tile([1.0, 0.0], 10)
    report = made_up(
        {"dear": right, "cheap": right, "answers": np.ones(20)}, {"cheap": 5}, selectable={"answers": False}
    )
    choice = choose(report, 100, n_resamples=100)
    assert choice.strategy == "cheap"
    assert [point.strategy for point in choice.runners_up] == ["dear"]
    assert choice.distinguishable is False
    assert "by 0.000 (0.000 to 0.000): not distinguishable" in str(choice)
    assert [point.strategy for point in choice.frontier] == ["cheap"]


def test_bad_budgets_and_reports():
    outcomes = {"majority@8": np.ones(8), "greedy": np.zeros(8), "oracle@8": np.ones(8)}
    report = made_up(outcomes, {"majority@8": 160, "greedy": 20, "oracle@8": 1}, selectable={"oracle@8": False})
    with pytest.raises(ValueError, match="budget: expected at least the 20 tokens a question of greedy, got 19"):
        choose(report, 19)
    for budget in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="budget: expected a number of tokens above 0"):
            choose(report, budget)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"share: expected a value in \(0, 1\)"):
            choose(report, 200, share=share)
    for share, got in ((0.1, "1 and 7"), (0.9, "7 and 1"), (0.05, "0 and 8")):
        with pytest.raises(ValueError, match=f"2 images or questions to choose on and 2 to tell by, got {got}"):
            choose(report, 200, share=share)
    images = made_up(outcomes, clusters=["one"] * 5 + ["two"] * 3)
    with pytest.raises(ValueError, match="got 1 and 1"):
        choose(images, 200)
    with pytest.raises(ValueError, match=r"expected a strategy that needs no right answer, got oracle@8"):
        choose(made_up({"oracle@8": np.ones(8)}, selectable={"oracle@8": False}), 10)


def test_the_picture_shows_every_strategy(useless):
    drawn = pictures.accuracy_by_tokens(useless, budget=300)
    drawn.savefig(io.BytesIO(), format="png", dpi=40)
    (axes,) = drawn.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"majority", "best-of", "oracle (not to be chosen)", "random (not to be chosen)", "not dominated"} < {
        *labels
    }
    assert [text.get_text() for text in axes.texts] == ["1", "8", "21", "8", "8", "8"]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [130, 270, 530])
