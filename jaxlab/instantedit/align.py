"""Which words of the target prompt are edited: alignment of two prompts, and weights from the blend word."""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.instantedit.config import Compat, check_choice

Ids = Sequence[int] | Int[np.ndarray, " n"]


def align_tokens(source_ids: Ids, target_ids: Ids) -> Int[np.ndarray, " target"]:
    """Global alignment of two prompts with match +1, mismatch -1, gap 0 (Needleman and Wunsch).

    Of alignments with equal scores that one is taken which, going back from the end, first leaves the target token
    unaligned, then the source token, then aligns both. A token is only ever aligned with its equal.

    Returns:
      Position in the source of each target token, -1 where it is not aligned.
    """
    source, target = np.asarray(source_ids, np.int64), np.asarray(target_ids, np.int64)
    match = np.where(source[:, None] == target[None, :], 1, -1)
    score = np.zeros((len(source) + 1, len(target) + 1), np.int64)
    for s in range(1, len(source) + 1):
        for t in range(1, len(target) + 1):
            score[s, t] = max(score[s, t - 1], score[s - 1, t], score[s - 1, t - 1] + match[s - 1, t - 1])
    aligned = np.full(len(target), -1)
    s, t = len(source), len(target)
    while s > 0 and t > 0:
        if score[s, t] == score[s, t - 1]:
            t -= 1
        elif score[s, t] == score[s - 1, t]:
            s -= 1
        else:
            s, t = s - 1, t - 1
            aligned[t] = s
    return aligned


def find_tokens(target_ids: Ids, blend_ids: Ids) -> list[int | None]:
    """Position in the target prompt of each token of the blend word, None of one that is not there.

    They are looked for in order, each from the place of the one before on.

    Args:
      target_ids: with begin and end tokens, which do not count.
      blend_ids: without.
    """
    inner = [int(token) for token in target_ids][1:-1]
    places: list[int | None] = []
    start = 0
    for token in map(int, blend_ids):
        found = token in inner[start:]
        start = inner.index(token, start) if found else start
        places.append(start + 1 if found else None)
    return places


def word_weights(
    source_ids: Ids,
    target_ids: Ids,
    blend_ids: Ids,
    source_states: Float[Array | np.ndarray, "S D"],
    target_states: Float[Array | np.ndarray, "S D"],
    *,
    compat: Compat = "clean",
) -> Float[np.ndarray, " S"]:
    """The weight of each target token in the mask: 1 where it is, or replaces, a token of the blend word.

    A token of the blend word that the target lacks is skipped. In each run of target tokens that align with nothing,
    the one most similar to a token in the source's gap beside it replaces that token.

    Args:
      source_ids: with begin and end tokens, without padding.
      target_ids: the same.
      blend_ids: without begin and end tokens.
      source_states: of the padded source prompt.
      target_states: of the padded target prompt.
      compat: "official" compares the source's state at the target's position with the target's state at the source's,
        as the official code does, and lets a missing token end the search.

    Returns:
      `[S]` float32.

    Raises:
      ValueError: the blend word has tokens and none of them, nor a replacement, is in the target prompt ("official":
        a warning); another compat; prompts longer than their states.
    """
    check_choice("compat", compat, Compat)
    source, target, blend = ([int(token) for token in ids] for ids in (source_ids, target_ids, blend_ids))
    source_states, target_states = (np.asarray(x, np.float64) for x in (source_states, target_states))
    if max(len(source), len(target)) > len(target_states) or source_states.shape != target_states.shape:
        raise ValueError(
            f"states: expected as many rows as padded tokens in both, got {source_states.shape} and "
            f"{target_states.shape} for {len(source)} and {len(target)} tokens"
        )
    weights = np.zeros(len(target_states), np.float32)
    rows, columns = (source_states, target_states) if compat == "official" else (target_states, source_states)
    for place, replaced in _replacements(align_tokens(source, target).tolist(), len(source), rows, columns):
        if source[replaced] in blend:
            weights[place] = 1
    places = find_tokens(target, blend)
    if compat == "official" and None in places:
        places = places[: places.index(None)]
    weights[[place for place in places if place is not None]] = 1
    if blend and not weights.any():
        message = f"blend_ids: the target prompt has none of the tokens {blend}; its tokens are {target}"
        if compat == "clean":
            raise ValueError(message)
        warnings.warn(f"{message}; no mask is made", stacklevel=2)
    return weights


def _replacements(
    aligned: list[int], length: int, rows: Float[np.ndarray, "S D"], columns: Float[np.ndarray, "S D"]
) -> list[tuple[int, int]]:
    """(target position, source position) of the most similar pair of each run and its gap, the first of equals.

    Args:
      aligned: of `align_tokens`.
      length: of the source.
      rows: states compared at target positions.
      columns: states compared at source positions.
    """
    rows, columns = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-8) for x in (rows, columns))
    found, start = [], 0
    while start < len(aligned):
        end = start
        while end < len(aligned) and aligned[end] < 0:
            end += 1
        first = aligned[start - 1] + 1 if start else 0
        last = aligned[end] if end < len(aligned) else length
        if end > start and last > first:
            similar = rows[start:end] @ columns[first:last].T
            place, replaced = np.unravel_index(np.argmax(similar), similar.shape)
            found.append((start + int(place), first + int(replaced)))
        start = end + 1
    return found
