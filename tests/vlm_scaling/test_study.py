"""Studies with samplers whose truth is known, their caches, and what they refuse."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlab.vlm_scaling import (
    BestOfN,
    BudgetForce,
    FilteredVote,
    Greedy,
    Majority,
    Meter,
    Oracle,
    Question,
    RandomOf,
    Refine,
    Sample,
    SelfSelect,
    Study,
    WeightedVote,
    split,
    stats,
)
from jaxlab.vlm_scaling.responses import Responses
from jaxlab.vlm_scaling.simulation import Simulation
from tests.oracles import voting

ROOT = Path(__file__).resolve().parents[2]
COUNT = 800


@pytest.mark.latest
@pytest.mark.parametrize(("p", "n_wrong", "tpr", "fpr", "n"), [(0.4, 3, 0.8, 0.4, 4), (0.6, 2, 0.5, 0.7, 3)])
def test_studies_agree_with_closed_forms(p, n_wrong, tpr, fpr, n, unchecked):
    model = Simulation(p=p, n_wrong=n_wrong, tpr=tpr, fpr=fpr)
    strategies = [
        Majority(n),
        Majority(n, key="raw", tie="expected"),
        BestOfN(n),
        WeightedVote(n),
        Oracle(n),
        RandomOf(n),
    ]
    strategies += [FilteredVote(n), BestOfN(n, by="logprob"), BestOfN(n, fallback="majority", mode="blind+solution")]
    report = Study(model.questions(COUNT), model, strategies=strategies, n=n, verifier=model, n_resamples=200).run()
    want = {
        f"majority@{n}": stats.majority_accuracy(p, n_wrong, n),
        f"majority-raw@{n}": stats.majority_accuracy(p, n_wrong, n),
        f"best-of@{n}": stats.best_of_n_accuracy(p, tpr, fpr, n),
        f"weighted@{n}": voting.weighted_vote_accuracy(p, tpr, fpr, n, n_wrong),
        f"oracle@{n}": 1 - (1 - p) ** n,
        f"random@{n}": p,
        f"best-of-logprob@{n}": p,
    }
    for name, accuracy in want.items():
        error = report.outcomes[name].std(ddof=1) / math.sqrt(COUNT)
        assert abs(report.accuracy[name] - accuracy) < 3 * error, name
        assert report.row(name).accuracy.low < accuracy + error
    metrics = report.verdicts["image+solution"]
    assert 1 - metrics.false_reject == pytest.approx(tpr, abs=0.03)
    assert metrics.false_accept == pytest.approx(fpr, abs=0.03)
    assert metrics.base_rate == pytest.approx(p, abs=0.03)
    assert (report.accuracy[f"best-of@{n}"] > report.accuracy[f"random@{n}"]) == (tpr > fpr)
    assert set(report.agreement) == {("blind+solution", "image+solution")}


def questions(count=6):
    pictures = [np.full((2, 2, 3), number // 2, np.uint8) for number in range(count)]
    return [Question(f"q{number}", f"<image> {number}?", "0", (pictures[number],)) for number in range(count)]


STRATEGIES = [Greedy(), Majority(2), Majority(4), BestOfN(4), BestOfN(4, mode="blind+answer"), Oracle(4), RandomOf(4)]


def study(given, model, **options):
    return Study(given, model, **{"strategies": STRATEGIES, "n": 4, "verifier": model, "n_resamples": 200, **options})


def test_the_order_of_questions_does_not_matter(tmp_path):
    model = Simulation(p=0.5, none=0.2, unread=0.1)
    forwards = study(questions(), model).run()
    backwards = study(questions()[::-1], model, cache=tmp_path / "cache.jsonl").run()
    again = study(questions(), model, cache=tmp_path / "cache.jsonl").run()
    assert str(forwards) == str(backwards) == str(again)
    for report in (backwards, again):
        assert report.accuracy == forwards.accuracy
        assert report.table == forwards.table
        assert report.answers == forwards.answers
        assert report.verdicts == forwards.verdicts
    assert forwards.questions == tuple(sorted(forwards.questions))
    other = study(questions(), model, seed=1).run()
    assert other.answers != forwards.answers


def test_a_table_tells_what_it_took():
    model = Simulation(p=0.5, tokens=20)
    meter = Meter(prompt=lambda question: 10, image=lambda question: 100, instruction=7, verdict=1)
    report = study(questions(), model, meter=meter).run()
    tokens = {row.strategy: dataclasses.astuple(row.tokens) for row in report.table}
    assert tokens["greedy"] == (10, 100, 20, 0, 0)
    assert tokens["majority@4"] == (10, 100, 80, 0, 0)
    assert tokens["best-of@4"] == (10, 100, 80, 110 + 4 * 27, 4)
    assert tokens["best-of[blind+answer]@4"] == (10, 100, 80, 10 + 4 * 7, 4)
    apart = study(questions(), model, meter=dataclasses.replace(meter, prefix_cache=False)).run()
    assert dataclasses.astuple(apart.row("best-of@4").tokens) == (40, 400, 80, 4 * 137, 4)
    assert report.baseline == "majority@2"
    assert report.row("majority@2").difference is None
    assert report.row("random@4").p_value is None
    tested = [row for row in report.table if row.p_value is not None]
    assert len(tested) == 5
    assert [row.adjusted for row in tested] == stats.holm([row.p_value for row in tested]).tolist()
    row = report.row("best-of@4")
    assert row.p_value == stats.mcnemar_exact(report.outcomes["best-of@4"], report.outcomes["majority@2"])
    by_image = stats.bootstrap_ci(report.outcomes["best-of@4"], clusters=[0, 0, 1, 1, 2, 2], n_resamples=200)
    assert row.accuracy == by_image
    columns, cells = report.cells()
    assert all(len(each) == len(columns) for each in cells)
    assert "majority@4" in str(report)
    with pytest.raises(KeyError, match="expected one of greedy"):
        report.row("majority@3")


def test_the_most_accurate_within_a_budget():
    model = Simulation(p=0.55, n_wrong=4, tpr=0.5, fpr=0.5)
    options = {"strategies": [Majority(1), Majority(8), BestOfN(8), Oracle(8), RandomOf(8)], "n": 8}
    dev, rest = split(model.questions(200), 0.5)
    report = study(dev, model, **options).run()
    assert [row.strategy for row in report.frontier()] == ["majority@1", "majority@8"]
    assert report.recommend(1000).strategy == "majority@8"
    assert report.recommend(report.row("majority@8").tokens.total - 1).strategy == "majority@1"
    assert report.recommend(1000).accuracy.mean == report.accuracy["majority@8"]
    with pytest.raises(ValueError, match=r"budget: expected at least .* tokens a question, got 1"):
        report.recommend(1)
    assert len(dev) == len(rest) == 100
    parts = split(questions(), 0.34)
    assert sorted(question.id for part in parts for question in part) == [f"q{number}" for number in range(6)]
    assert len(parts[0]) == 2
    assert parts[0][0].images[0][0, 0, 0] == parts[0][1].images[0][0, 0, 0]
    assert [question.id for question in split(questions()[::-1], 0.34)[0]] == [q.id for q in parts[0][::-1]]
    with pytest.raises(ValueError, match="share"):
        split(questions(), 1.0)


class Picky(Simulation):
    """Writes down what it is asked."""

    asked = ()

    def sample(self, question, indices, *, seed):
        type(self).asked += ((question.id, tuple(indices)),)
        return super().sample(question, indices, seed=seed)


def test_only_what_is_missing_is_asked_for(tmp_path):
    cache, model = tmp_path / "a" / "cache.jsonl", Picky(p=0.5)
    Picky.asked = ()
    first = study(questions(2), model, cache=cache, n=4).run()
    assert Picky.asked == (("q0", (0, 1, 2, 3)), ("q1", (0, 1, 2, 3)))
    more = study(questions(3), model, cache=cache, n=6, strategies=[*STRATEGIES, Majority(6)]).run()
    assert Picky.asked[2:] == (("q0", (4, 5)), ("q1", (4, 5)), ("q2", (0, 1, 2, 3, 4, 5)))
    assert more.answers["best-of@4"][:2] == first.answers["best-of@4"]
    fresh = study(questions(3), Simulation(p=0.5), n=6, strategies=[*STRATEGIES, Majority(6)]).run()
    assert fresh.accuracy == more.accuracy
    with cache.open("a") as file:
        file.write('{"question": "q0", "sam')
    assert study(questions(3), model, cache=cache, n=4).run().accuracy == study(questions(3), model, n=4).run().accuracy
    assert study(questions(1), model, cache=cache).samples()["q0"] == model.sample(
        questions(1)[0], range(4), seed=_seed_of(cache)
    )


def _seed_of(cache):
    return Responses(cache, questions(1), 0).seed_of("q0", "sample")


def test_caches_of_other_studies_are_refused(tmp_path):
    cache, model = tmp_path / "cache.jsonl", Simulation()
    study(questions(2), model, cache=cache).run()
    with pytest.raises(ValueError, match=r"cache: .* was made with seed 0, got 1"):
        study(questions(2), model, cache=cache, seed=1)
    changed = [dataclasses.replace(question, text="Other?") for question in questions(2)]
    with pytest.raises(ValueError, match=r"cache: .* has another question 'q0'"):
        study(changed, model, cache=cache)
    cache.write_text(json.dumps([1]) + "\n")
    with pytest.raises(ValueError, match="cache: expected lines of a study"):
        study(questions(2), model, cache=cache)


def test_a_killed_study_goes_on(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "tests.vlm_scaling.killed", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)

    log, cache = tmp_path / "log", tmp_path / "cache"
    killed = run(cache, log, 22)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = {json.loads(line)["question"] for line in cache.read_text().splitlines()}
    assert finished == {f"q{number:05}" for number in range(5)}
    before = log.read_text().splitlines()
    resumed = run(cache, log)
    assert resumed.returncode == 0, resumed.stderr
    asked = log.read_text().splitlines()[len(before) :]
    assert not [line for line in asked if line.split()[0] in finished]
    assert len(asked) == 7 * 4
    assert resumed.stdout == run(tmp_path / "other", tmp_path / "other_log").stdout
    assert "majority@4" in resumed.stdout


class Talker(Simulation):
    """Talks in a known way, and writes down its prompts."""

    prompts = ()

    def ask(self, question, prompt, *, seed):
        type(self).prompts += (prompt,)
        if "Which of these" in prompt:
            place = prompt.split("\\boxed{0}")[0].count("Solution ") if "\\boxed{0}" in prompt else 99
            return Sample(f"Solution {place}", 3)
        return Sample("\\boxed{0}" if "Critique:" in prompt else "Look {again}.", 5)

    def extend(self, question, prefixes, *, seed, max_tokens=None, stop=""):
        return [Sample(" thought", 4) if stop else Sample("0.", 2) for _ in prefixes]


def test_strategies_that_talk(tmp_path):
    model = Talker(p=0.4)
    strategies = [Refine(2), SelfSelect(3), SelfSelect(3, kind="pairwise"), BudgetForce(10, 14, waits=3), Oracle(3)]
    strategies += [BudgetForce(0, 3), RandomOf(1)]
    Talker.prompts = ()
    meter = Meter(prompt=lambda question: 0, image=lambda question: 50)
    report = study(questions(), model, strategies=strategies, n=3, cache=tmp_path / "cache", meter=meter).run()
    assert report.accuracy["refine@2"] == 1
    wrong = 6 - round(6 * report.accuracy["random@1"])
    table = {"wrong->right": wrong, "right->wrong": 0, "wrong->wrong'": 0, "unchanged": 6 - wrong}
    assert report.transitions == {"refine@2": table}
    assert report.accuracy["select@3"] == report.accuracy["oracle@3"]
    assert report.accuracy["select-pairwise@3"] == report.accuracy["oracle@3"]
    assert report.accuracy["budget@10-14"] == 1
    assert report.row("budget@10-14").tokens.generated == 14  # three pieces, and the answer
    assert report.row("budget@0-3").tokens.generated == 6
    assert report.row("refine@2").tokens.generated == 20 + 4 * 5
    assert dataclasses.astuple(report.row("select@3").tokens) == (0, 50, 60, 0, 3)
    assert report.row("select-pairwise@3").tokens.verify_generated == 6
    assert any("Look {again}." in prompt for prompt in Talker.prompts)
    asked = len(Talker.prompts)
    again = study(questions()[::-1], model, strategies=strategies, n=3, cache=tmp_path / "cache", meter=meter).run()
    assert len(Talker.prompts) == asked
    assert again.table == report.table
    assert {prompt.index("boxed{0}") for prompt in Talker.prompts if "Which" in prompt and "boxed{0}" in prompt} != {0}


def test_one_question_and_one_of_each_kind():
    model = Simulation(p=1.0)
    strategies = [
        Greedy(),
        BestOfN(2, by="short"),
        BestOfN(2, by="long"),
        FilteredVote(2, tau=0.9, mode="grey+solution"),
    ]
    report = study(questions(1), model, strategies=strategies, n=2).run()
    assert set(report.accuracy.values()) == {1.0}
    assert list(report.accuracy) == ["greedy", "best-of-short@2", "best-of-long@2", "filtered>0.9[grey+solution]@2"]
    assert math.isnan(report.table[0].accuracy.low)
    assert report.table[1].difference is None
    for wrong in (Simulation(p=0.2, concentration=9.0), Simulation(p=0.3, n_wrong=1)):
        assert study(questions(2), wrong, strategies=[Greedy()]).run().accuracy == {"greedy": 0.0}


class Short(Simulation):
    """Gives less than it is asked for."""

    def sample(self, question, indices, *, seed):
        return super().sample(question, indices[1:], seed=seed)


class Silent(Simulation):
    """Gives no verdicts."""

    def verify(self, question, samples, *, mode, seed):
        return []


class Bare:
    """Only draws."""

    def sample(self, question, indices, *, seed):
        return [Sample("0")] * len(indices)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: study([], Simulation()), "questions: expected at least one"),
        (lambda: study(questions(), Simulation(), strategies=[]), "strategies: expected at least one"),
        (lambda: study(questions() * 2, Simulation()), "questions: expected different ones, got 'q0' twice"),
        (lambda: study(questions(), Simulation(), strategies=[Majority(2)] * 2), "strategies: expected different"),
        (lambda: study(questions(), Simulation(), n=0), "n: expected at least 1"),
        (lambda: study(questions(), Simulation(), n=3), "n: expected at least 4 samples for majority@4, got 3"),
        (lambda: study(questions(), Simulation(), verifier=None), "verifier: expected one for best-of@4"),
        (lambda: study(questions(), Bare()), "sampler: expected one with `greedy` for greedy"),
        (lambda: study(questions(), Simulation(), baseline="best"), "baseline: expected one of greedy"),
        (lambda: study(questions(), Short()).run(), "sampler: expected 4 samples of 'q0', got 3"),
        (lambda: study(questions(), Silent()).run(), "verifier: expected 4 verdicts on 'q0', got 0"),
        (lambda: Majority(0), "n: expected at least 1, got 0"),
        (lambda: SelfSelect(1), "n: expected at least 2, got 1"),
        (lambda: SelfSelect(2, kind="x"), "kind: expected one of listwise, pairwise"),
        (lambda: BestOfN(2, mode="deaf"), "mode: expected one of image"),
        (lambda: BestOfN(2, by="x"), "by: expected one of verifier"),
        (lambda: Refine(0), "rounds: expected at least 1"),
        (lambda: BudgetForce(5, 4), "minimum and maximum"),
        (lambda: BudgetForce(waits=-1), "waits and closing"),
        (lambda: Simulation(p=2), "p: expected a probability"),
        (lambda: Simulation(n_wrong=0), "n_wrong and concentration"),
    ],
)
def test_bad_inputs(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
