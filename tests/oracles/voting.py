"""Votes counted one by one, and accuracies of selection by adding up every possible outcome."""

import itertools
import math
from collections import Counter


def majority_share(answers, gold):
    """Share of the tied largest groups that is right; answers that are None do not vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (gold in tied) / len(tied)


def majority_over_subsets(answers, gold, k):
    shares = [majority_share(subset, gold) for subset in itertools.combinations(answers, k)]
    return sum(shares) / len(shares)


def majority_accuracy(p, n_wrong, n):
    """Over all sequences of answers; 0 is right."""
    total = 0.0
    for sequence in itertools.product(range(n_wrong + 1), repeat=n):
        weight = math.prod(p if answer == 0 else (1 - p) / n_wrong for answer in sequence)
        total += weight * majority_share(sequence, 0)
    return total


def _outcomes(p, tpr, fpr, n):
    """(probability, right or not, accepted or not) of n samples."""
    kinds = [(True, True, p * tpr), (True, False, p * (1 - tpr)), (False, True, (1 - p) * fpr)]
    kinds.append((False, False, (1 - p) * (1 - fpr)))
    for sequence in itertools.product(kinds, repeat=n):
        yield math.prod(kind[2] for kind in sequence), sequence


def best_of_n_accuracy(p, tpr, fpr, n):
    total = 0.0
    for weight, sequence in _outcomes(p, tpr, fpr, n):
        pool = [right for right, accepted, _ in sequence if accepted] or [right for right, _, _ in sequence]
        total += weight * sum(pool) / len(pool)
    return total


def weighted_vote_accuracy(p, tpr, fpr, n, n_wrong):
    """Sum of verdicts an answer; of several largest the answer that occurs first."""
    total = 0.0
    kinds = [(0, True, p * tpr), (0, False, p * (1 - tpr))]
    for wrong in range(1, n_wrong + 1):
        kinds += [(wrong, True, (1 - p) * fpr / n_wrong), (wrong, False, (1 - p) * (1 - fpr) / n_wrong)]
    for sequence in itertools.product(kinds, repeat=n):
        sums = Counter()
        for answer, accepted, _ in sequence:
            sums[answer] += accepted
        won = next(answer for answer, value in sums.items() if value == max(sums.values()))
        total += math.prod(kind[2] for kind in sequence) * (won == 0)
    return total


def pass_at_k(n, c, k):
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
