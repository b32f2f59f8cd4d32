import numpy as np
import pytest

from jaxlab.instantedit import align_tokens, word_weights
from jaxlab.instantedit.align import find_tokens
from tests.oracles import instantedit_parts as oracle

BEGIN, END = 100, 101


def states(rows):
    """`[S, D]` states that are unit vectors: token -> direction."""
    return np.eye(8, dtype=np.float32)[rows]


@pytest.mark.latest
def test_alignment_is_the_best_in_the_stated_order():
    rng = np.random.default_rng(0)
    for _ in range(60):
        source, target = (rng.integers(0, 3, rng.integers(0, 5)).tolist() for _ in range(2))
        assert align_tokens(source, target).tolist() == oracle.align(source, target), (source, target)


def test_known_alignments():
    assert align_tokens([BEGIN, 1, 2, 3, END], [BEGIN, 1, 7, 3, END]).tolist() == [0, 1, -1, 3, 4]
    # "a a" onto "a": the last of the target stays unaligned first, then the last of the source.
    assert align_tokens([5], [5, 5]).tolist() == [0, -1]
    assert align_tokens([5, 5], [5]).tolist() == [0]


def test_weights_of_words_that_are_there_and_of_what_replaces_them():
    # "a 1 2 b" -> "a 3 4 b": tokens 3 and 4 stand where 1 and 2 stood.
    source, target = [BEGIN, 9, 1, 2, 8, END], [BEGIN, 9, 3, 4, 8, END]
    source_states = states([0, 1, 2, 3, 4, 5, 5])
    target_states = states([0, 1, 6, 2, 4, 5, 5])  # target position 3 is like source position 2
    assert np.flatnonzero(word_weights(source, target, [3], source_states, target_states)).tolist() == [2]
    assert np.flatnonzero(word_weights(source, target, [4, 1], source_states, target_states)).tolist() == [3]
    both = word_weights(source, target, [8, 1], source_states, target_states)
    assert both.dtype == np.float32
    assert both.tolist() == [0, 0, 0, 1, 1, 0, 0]
    # The source's 2 is not the most similar of its gap, so nothing replaces it.
    with pytest.raises(ValueError, match="2"):
        word_weights(source, target, [2], source_states, target_states)


def test_official_compares_states_the_other_way():
    source, target = [BEGIN, 1, 2, END], [BEGIN, 3, END]
    # clean: the target's state 1 is like the source's 2. official: the source's 1 is less unlike the target's 1 than 2.
    source_states = states([0, 1, 2, 3])
    target_states = states([0, 2, 1, 3]) * np.float32([[1], [1], [-1], [1]])
    for compat, replaced, other in (("clean", 2, 1), ("official", 1, 2)):
        weights = word_weights(source, target, [replaced], source_states, target_states, compat=compat)
        assert weights.tolist() == [0, 1, 0, 0]
        weights = word_weights(source, target, [replaced, other], source_states, target_states, compat=compat)
        assert weights.tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="1"):
        word_weights(source, target, [1], source_states, target_states)
    with pytest.warns(UserWarning, match="no mask"):
        word_weights(source, target, [2], source_states, target_states, compat="official")


def test_a_missing_word_is_skipped_but_ends_the_official_search():
    source = target = [BEGIN, 1, 2, END]
    same = states([0, 1, 2, 3])
    assert find_tokens(target, [1, 7, 2]) == [1, None, 2]
    assert find_tokens(target, [2, 1]) == [2, None]  # in order
    assert find_tokens(target, [BEGIN, END]) == [None, None]
    assert word_weights(source, target, [1, 7, 2], same, same).tolist() == [0, 1, 1, 0]
    assert word_weights(source, target, [1, 7, 2], same, same, compat="official").tolist() == [0, 1, 0, 0]


def test_bad_input(unchecked):
    source = target = [BEGIN, 1, 2, END]
    same = states([0, 1, 2, 3])
    assert not word_weights(source, target, [], same, same).any()
    with pytest.raises(ValueError, match=r"\[7\].*\[100, 1, 2, 101\]"):
        word_weights(source, target, [7], same, same)
    with pytest.warns(UserWarning, match="no mask"):
        assert not word_weights(source, target, [7], same, same, compat="official").any()
    with pytest.raises(ValueError, match="newest"):
        word_weights(source, target, [1], same, same, compat="newest")
    with pytest.raises(ValueError, match="states"):
        word_weights(source, target, [1], same[:3], same[:3])
