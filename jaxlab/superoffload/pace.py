"""Whether to speculate: an undone step costs time, one that stands hides it."""

import math


class Pace:
    """Whether speculation has paid: what rolled-back steps cost against what the others hid."""

    def __init__(self):
        self._often, self._adam_s, self._hidden_s = 0.0, 0.0, math.inf

    def learn(self, undone: bool, adam_s: float, waited_s: float) -> None:
        """One update: whether a speculation was, or would have been, undone; seconds of Adam, and until the verdict."""
        self._often += 0.1 * (undone - self._often)
        if waited_s:
            self._adam_s, self._hidden_s = adam_s, min(adam_s, waited_s)

    def pays(self) -> bool:
        """An undone step costs its undoing, about as long as itself, and another step."""
        return self._often * 2 * self._adam_s < self._hidden_s
