"""Runs of several methods and seeds from one warm start, measured on held-out problems; each can be resumed."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab import core
from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import DecoderConfig
from jaxlab.rl import GRPOConfig, GRPOTrainer, SFPOConfig, exact_match
from jaxlab.rl.config import check_choice
from jaxlab.sfpo import accuracy
from jaxlab.sfpo.comparison import Costs, Curve
from jaxlab.sfpo.families import FAMILIES, problems
from jaxlab.sfpo.methods import METHODS, settings
from jaxlab.sfpo.warm_start import WarmStart, WarmStartConfig, warm_start

_MEASURED = "evaluations.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compared, and on what; every default is ours.

    Attributes:
      model: the decoder, over bytes.
      family: of `FAMILIES`.
      problems: for training.
      held_out: problems that accuracy is measured on.
      warm: how the decoder is made ready.
      rl: plain GRPO, which the methods change; its `sfpo` stays None.
      sfpo: K, alpha and stop rule, for the methods that have them.
      methods: of `METHODS`; the first is what the others are compared with.
      seeds: of `rl`; the same seed has the same order of problems in every method.
      eval_every: steps between measurements.
      smooth: measurements, the last ones, that a smoothed accuracy is the mean of.
      shares: parts of the first method's gain that the others are to reach.
      folder: keeps warm starts, metrics and checkpoints; none: a temporary one, so that every run starts anew.
    """

    model: DecoderConfig
    family: str = "chain_sum"
    problems: int = 4096
    held_out: int = 512
    warm: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    rl: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    sfpo: SFPOConfig = dataclasses.field(default_factory=SFPOConfig)
    methods: tuple[str, ...] = ("grpo", "sfpo")
    seeds: tuple[int, ...] = (0,)
    eval_every: int = 5
    smooth: int = 3
    shares: tuple[int | float, ...] = (0.9, 1.0)
    folder: str | None = None

    def __post_init__(self):
        check_choice("family", self.family, tuple(FAMILIES))
        for name in ("methods", "seeds", "shares"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: expected at least one, none twice, got {given}")
        for method in self.methods:
            check_choice("methods", method, tuple(METHODS))
        for name in ("problems", "held_out", "eval_every", "smooth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares: expected values in (0, 1], got {self.shares}")
        if self.rl.sfpo is not None:
            raise ValueError("rl.sfpo: expected None, since methods set it from `sfpo`")
        if self.rl.temperature != 1:
            raise ValueError(f"rl.temperature: expected 1, at which accuracy is measured, got {self.rl.temperature}")
        if self.rl.steps < self.eval_every:
            raise ValueError(f"eval_every: expected at most rl.steps = {self.rl.steps}, got {self.eval_every}")


class Study:
    """The problems and the warm start of a study, for runs by several methods and seeds."""

    def __init__(self, config: StudyConfig, folder: str | os.PathLike):
        """Makes the problems, and the warm start where `folder` has none yet."""
        self.config, self.folder = config, Path(folder)
        self.train, test = problems(config.family, config.problems, config.held_out)
        self._tokenizer = ByteTokenizer()
        self._test = accuracy.answers(test, self._tokenizer)
        self.start: WarmStart = warm_start(config.model, config.warm, self.train, self.folder / "warm_starts")
        self.before = accuracy.measure(self.start.model, self.start.params, self._test)

    def runs(self) -> dict[str, list[Curve]]:
        """The curves of all methods, a list over the seeds each; what was run before is only read."""
        pairs = [(method, seed) for method in self.config.methods for seed in self.config.seeds]
        for method, seed in core.progress(pairs, "runs"):
            self.run(method, seed)
        return {method: self.curves(method, self.config.seeds) for method in self.config.methods}

    def curves(self, method: str, seeds: Sequence[int]) -> list[Curve]:
        """The runs of a method by seed, their seconds at the costs that all of them have in common."""
        for seed in seeds:
            self.run(method, seed)
        costs = Costs.of([row for seed in seeds for row in self._steps(method, seed)])
        return [self._curve(method, seed, costs) for seed in seeds]

    def place(self, method: str, seed: int) -> Path:
        """The folder of one run, named after what decides its numbers."""
        config = self.config
        made, _ = settings(method, config.rl, config.sfpo)
        decides = {
            "start": self.start.identity,
            "method": method,
            "rl": {
                name: value for name, value in core.to_dict(made).items() if name not in ("seed", "checkpoint_every")
            },
            "sfpo": core.to_dict(config.sfpo) if METHODS[method].lookahead else None,
            "held_out": config.held_out,
            "eval_every": config.eval_every,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / "runs" / f"{config.family}-{method}-{digest}" / str(seed)

    def done(self, method: str, seed: int) -> bool:
        """Whether a run is finished, and `run` would only read it."""
        return self.config.rl.steps in self._measured(self.place(method, seed))

    def run(self, method: str, seed: int) -> Curve:
        """One run, from its last checkpoint if it was killed; one that is finished is only read."""
        folder = self.place(method, seed)
        made, tx = settings(method, dataclasses.replace(self.config.rl, seed=seed), self.config.sfpo)
        if not self.done(method, seed):
            self._train(made, tx, folder)
        return self._curve(method, seed)

    def export(self, method: str, seed: int, folder: str | os.PathLike) -> Path:
        """Writes the policy of a finished run and its tokenizer as a Hugging Face folder."""
        made, tx = settings(method, dataclasses.replace(self.config.rl, seed=seed), self.config.sfpo)
        trainer = self._trainer(made, tx, self.place(method, seed))
        trainer.train()
        return trainer.export(folder)

    def _trainer(self, made: GRPOConfig, tx: Any, folder: Path, callback: Any = None) -> GRPOTrainer:
        return GRPOTrainer(
            self.start.model,
            self.start.params,
            [exact_match],
            made,
            self.train,
            self._tokenizer,
            tx=tx,
            folder=folder,
            callback=callback,
        )

    def _train(self, made: GRPOConfig, tx: Any, folder: Path) -> None:
        def measure(step: int, params: Any) -> None:
            found = accuracy.measure(self.start.model, params, self._test)
            core.jsonl.append(folder / _MEASURED, {"step": step, **found._asdict()})

        def after(trainer: Any, row: dict[str, float]) -> None:
            if row["step"] % self.config.eval_every == 0 or row["step"] == made.steps:
                measure(int(row["step"]), trainer.params)

        result = self._trainer(made, tx, folder, after).train()
        if made.steps not in self._measured(folder):  # killed between its last checkpoint and its last measurement
            measure(made.steps, result.params)

    def _measured(self, folder: Path) -> dict[int, dict[str, float]]:
        """The measurements of a run by step; a resumed run has made some of them twice, to the same numbers."""
        return {row["step"]: row for row in core.jsonl.read(folder / _MEASURED)}

    def _steps(self, method: str, seed: int) -> list[dict[str, float]]:
        return [row for row in core.jsonl.read(self.place(method, seed) / "metrics.jsonl") if "reward" in row]

    def _curve(self, method: str, seed: int, costs: Costs | None = None) -> Curve:
        found = self._measured(self.place(method, seed))
        evaluations = [found[step] for step in sorted(found)]
        return Curve.of(self._steps(method, seed), evaluations, self.before, self.config.rl.batch_size, costs)
