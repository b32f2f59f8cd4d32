"""How good a compressed mixture still is: loss on held-out text, and questions made of it, whatever compressed it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.puzzlemoe.baselines import apply_method
from jaxlab.puzzlemoe.calibration import collect_expert_stats
from jaxlab.puzzlemoe.cloze import KINDS, accuracy, make_questions
from jaxlab.puzzlemoe.config import PuzzleConfig
from jaxlab.puzzlemoe.statistics import ExpertStats
from jaxlab.puzzlemoe.whole_model import CompressionReport, compress_moe, quantize_moe, unpack_moe

LABELS = {
    "puzzle": "PuzzleMoE",
    "puzzle_unpacked": "PuzzleMoE, not packed",
    "wanda": "Wanda",
    "wanda_2_4": "Wanda 2:4",
    "naee": "NAEE",
    "hc_smoe": "HC-SMoE",
    "m_smoe": "M-SMoE",
    "average": "average of pairs",
    "drop": "random experts dropped",
}
"""Methods as a reader knows them, in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a model is worth.

    Attributes:
        loss: nats a token on held-out text.
        accuracy: kind of question -> share answered rightly.
    """

    loss: float
    accuracy: dict[str, float]


class Study:
    """One trained mixture, and its compressed forms, all judged on the same held-out text and questions.

    Args:
        model: a `Decoder` with experts.
        params: its parameters.
        tokenizer: its tokenizer.
        data: the text it was trained on, as `jaxlab.training.text_batches` takes it.
        length: tokens of a row.
        calibration: rows of training text that calibrate, 8 a batch.
        batches: held-out batches of 16 rows; 0 = all.
        questions: of each kind; 0 = none.
        seed: of the calibration rows and the questions.

    Raises:
        ValueError: no experts, or rows that make no calibration batch.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        data: str,
        *,
        length: int,
        calibration: int = 64,
        batches: int = 32,
        questions: int = 200,
        seed: int = 0,
    ):
        from jaxlab.training import documents, split_documents, text_batches

        if calibration < 8:
            raise ValueError(f"calibration must be at least 8 rows, got {calibration}")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        # Rows that training does not see in this order: another seed.
        rows = text_batches(data, tokenizer, batch_size=8, length=length, seed=seed + 1)
        self.calibration: list[np.ndarray] = [batch.tokens for batch in itertools.islice(rows, calibration // 8)]
        held_out = text_batches(data, tokenizer, batch_size=16, length=length, split="validation")
        self._held_out = list(itertools.islice(held_out, batches or None))
        texts = split_documents(documents(data), "validation")
        self.questions = {kind: make_questions(kind, texts, count=questions, seed=seed) for kind in KINDS if questions}

    @functools.cached_property
    def stats(self) -> ExpertStats:
        """Calibration statistics of the model as it is."""
        return collect_expert_stats(self.model, self.params, self.calibration)

    @functools.cached_property
    def full(self) -> Quality:
        """Of the model as it is."""
        return self.quality(self.model, self.params)

    def loss(self, model: Any, params: Any) -> float:
        """Nats a token on held-out text."""
        from jaxlab.training import perplexity

        return math.log(perplexity(model, params, self._held_out))

    def quality(self, model: Any, params: Any) -> Quality:
        """Loss and answers of a model."""
        asked = {kind: accuracy(model, params, self.tokenizer, found) for kind, found in self.questions.items()}
        return Quality(self.loss(model, params), asked)

    def compressed_by(self, method: str, ratio: float, seed: int = 0) -> tuple[Any, Any] | None:
        """The model after one of `baselines.METHODS`; None where there are too many subsets to enumerate (NAEE)."""
        try:
            return apply_method(method, self.model, self.params, self.calibration, ratio=ratio, seed=seed)
        except ValueError as error:
            if method == "naee" and "subsets" in str(error):
                return None
            raise

    def packed(self, cfg: PuzzleConfig) -> tuple[Any, Any, CompressionReport]:
        """The model in packed words."""
        return compress_moe(self.model, self.params, self.stats, cfg)

    def merged_loss(self, cfg: PuzzleConfig) -> tuple[float, CompressionReport]:
        """Loss of a packed model, run as an ordinary one with the decoded weights (the same program for all)."""
        model, params, report = self.packed(cfg)
        return self.loss(*unpack_moe(model, params)), report

    def stored_loss(self, cfg: PuzzleConfig, bits: int) -> tuple[float, float]:
        """Loss with 16, 8 or 6 bits a position of a pair, and bits a weight of an original expert, scales included."""
        model, params, report = self.packed(cfg)
        if bits != 16:
            model, params = quantize_moe(model, params, bits=bits)
        weights = report.expert_bytes_before // 2
        return self.loss(*unpack_moe(model, params)), 8 * expert_bytes(params) / weights


def expert_bytes(params: Any) -> int:
    """Bytes of the packed experts of all layers, scales and addresses included."""
    blocks = (tree["mlp"] for name, tree in params.items() if name.startswith("blocks_"))
    return sum(leaf.nbytes for mlp in blocks if "experts" in mlp for leaf in jax.tree.leaves(mlp["experts"]))


def by_method(
    study: Study,
    ratios: Sequence[float],
    methods: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
) -> list[tuple[str, float, float | None, float | None]]:
    """(method, ratio, mean loss, standard deviation over seeds) of methods that depend on their pairs or draws.

    Methods without chance take one seed; a loss is None where a method is infeasible.
    """
    found: dict[tuple[str, float], list[float]] = {}
    runs = [
        (method, ratio, seed)
        for ratio in ratios
        for method in methods
        if method != "wanda_2_4" or ratio == max(ratios)  # prunes half, whatever the ratio
        for seed in (seeds if method in RANDOM else seeds[:1])
    ]
    for method, ratio, seed in core.progress(runs, "compressing"):
        made = study.compressed_by(method, ratio, seed)
        losses = found.setdefault((method, ratio), [])
        if made is not None:
            losses.append(study.loss(*made))
    return [
        (method, ratio, float(np.mean(losses)), float(np.std(losses))) if losses else (method, ratio, None, None)
        for (method, ratio), losses in found.items()
    ]


RANDOM = ("puzzle", "puzzle_unpacked", "average", "drop")
"""Methods that draw pairs or experts."""
