"""Ids to text while they are still coming: stop strings, and characters of several bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_INCOMPLETE = "\ufffd"  # what decoders give for the bytes of an unfinished character


class RowText:
    """The text of growing rows.

    Args:
        tokenizer: with `decode(ids) -> str`.
        stop: strings that end a row.
        stop_ids: ids that end a row; they are no text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = frozenset(stop_ids)

    def completed(self, ids: np.ndarray, start: int) -> int | None:
        """How many of `ids` complete the first stop string, None if none occurs; `start` ids are known to hold none."""
        if not self._stop or self._found(self._decode(ids)) is None:
            return None
        return next(
            count for count in range(start + 1, len(ids) + 1) if self._found(self._decode(ids[:count])) is not None
        )

    def final(self, ids: np.ndarray) -> str:
        """The text of a finished row, before its stop string."""
        text = self._decode(ids)
        return text[: self._found(text)]

    def settled(self, ids: np.ndarray) -> str:
        """What of an unfinished row's text later tokens cannot change: no split character, no beginning of a stop."""
        text = self._decode(ids).rstrip(_INCOMPLETE)
        held = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return text[: len(text) - held]

    def _decode(self, ids: np.ndarray) -> str:
        ends = len(ids) > 0 and int(ids[-1]) in self._stop_ids
        return self._tokenizer.decode((ids[:-1] if ends else ids).tolist())

    def _found(self, text: str) -> int | None:
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        return min(places, default=None)
