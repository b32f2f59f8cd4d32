"""Votes and best-of-N against votes counted by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.vlm_scaling import select

answer = st.sampled_from(["1", "1.0", "2", "x", None])
score = st.sampled_from([True, False, None, 0.25, 0.75, math.nan])


@settings(max_examples=150, deadline=None)
@given(st.lists(answer, min_size=1, max_size=9))
def test_majority_is_the_counter_s(answers):
    for key, keys in (("raw", answers), ("equivalence", ["1" if a == "1.0" else a for a in answers])):
        votes = [k for k in keys if k is not None] or keys
        best, size = Counter(votes).most_common(1)[0]
        got = select.majority(answers, key=key)
        assert got.index == keys.index(best)
        assert got.answer == answers[got.index]
        assert got.groups[0] == tuple(index for index, k in enumerate(keys) if k == best)
        assert {len(group) for group in got.groups} == {size}
        assert len(got.groups) == sum(count == size for count in Counter(votes).values())


def test_ties_and_none():
    assert select.majority(["2", "1", "1.0", "2"]).groups == ((0, 3), (1, 2))
    winners = {select.majority(["2", "1"], tie="random", seed=seed).index for seed in range(20)}
    assert winners == {0, 1}
    assert select.majority([None, None, "7"]) == select.Selection(2, "7", ((2,),))
    assert select.majority([None, None]) == select.Selection(0, None, ((0, 1),))
    assert select.majority(["", "", "7"]).answer == ""
    assert select.majority(["red", "B", "b"], choices={"A": "red", "B": "blue"}).index == 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(answer, score, st.sampled_from([-1.0, -2.0])), min_size=1, max_size=6))
def test_best_of_n_ranks(rows):
    answers, scores, logprobs = map(list, zip(*rows))
    got = select.best_of_n(answers, scores, logprobs=logprobs)
    if all(value is None or value is False for value in scores):
        assert got == select.Selection(0, answers[0], ((0,),))
        return
    rank = [
        (-1 if value is None or value != value else value, logprob, -index)
        for index, (value, logprob) in enumerate(zip(scores, logprobs))
    ]
    assert got.index == -max(rank)[2]
    assert got.groups[0] == (got.index,)


def test_best_of_n_falls_back(unchecked):
    answers, scores = ["1", "2", "2"], [False, None, False]
    assert select.best_of_n(answers, scores).index == 0
    assert select.best_of_n(answers, scores, fallback="majority").index == 1
    assert select.best_of_n(answers, scores, probs=[0.1, None, 0.3], fallback="argmax_prob").index == 2
    assert select.best_of_n(answers, [False, None, True], fallback="majority").index == 2
    assert select.best_of_n(answers, [None, 0.0, None]).index == 1
    assert select.best_of_n(answers, [np.False_, np.False_, np.False_], fallback="majority").index == 1
    with pytest.raises(ValueError, match="probs: expected the yes-probabilities"):
        select.best_of_n(answers, scores, fallback="argmax_prob")


def test_votes_with_scores():
    answers = ["1", "2", "1.0", None]
    assert select.weighted_vote(answers, [0.3, 0.7, 0.5, 9.0]).groups == ((0, 2),)
    assert select.weighted_vote(answers, [0.3, 0.9, 0.5, None]).index == 1
    assert select.weighted_vote(answers, [None, True, True, None]).groups == ((0, 2), (1,))
    assert select.filtered_vote(answers, [0.3, 0.7, 0.5, 9.0], tau=0.5).index == 1
    assert select.filtered_vote(answers, [0.6, 0.7, 0.6, None], tau=0.5).groups == ((0, 2),)
    assert select.filtered_vote(answers, [None, True, False, None], tau=0.5).index == 1
    assert select.filtered_vote(answers, [0.1] * 4, tau=0.5) == select.majority(answers)
    assert select.filtered_vote(["7", None], [0.1, 0.9], tau=0.5) == select.Selection(1, None, ((1,),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select.majority([]), "answers: expected at least one sample"),
        (lambda: select.majority(["1"], tie="last"), "tie: expected one of first, random, expected, got 'last'"),
        (lambda: select.majority(["1"], key="text"), "key: expected one of equivalence, raw, got 'text'"),
        (lambda: select.best_of_n([], []), "answers: expected at least one sample"),
        (lambda: select.best_of_n(["1"], [True, True]), "scores: expected one for each of 1 answers, got 2"),
        (lambda: select.best_of_n(["1"], [True], logprobs=[]), "logprobs: expected one for each of 1"),
        (lambda: select.best_of_n(["1"], [True], fallback="last"), "fallback: expected one of"),
        (lambda: select.weighted_vote([], []), "answers: expected at least one sample"),
        (lambda: select.filtered_vote(["1"], [], tau=0.5), "scores: expected one for each of 1"),
    ],
)
def test_bad_inputs(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
