"""The stages, each kept in a folder of its own: a run that was killed goes on, a change redoes what it must."""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import core
from jaxlab.eaglet import clone_executors
from jaxlab.models import load_pretrained, load_tokenizer
from jaxlab.models.decoder import Decoder, init_params
from jaxlab.pipeline.config import PipelineConfig
from jaxlab.pipeline.quest import WORDS, Quest, prompt, useful
from jaxlab.puzzlemoe import compress_checkpoint
from jaxlab.puzzlemoe.baselines import apply_method
from jaxlab.rl import GRPOTrainer, evaluate

_CALIBRATION_LENGTH = 64
_DRAWS = 4  # of a situation, where accuracy is measured
# Mostly with a plan: without one there is little that so few rewards can teach.
_REWARDED = (True, True, True, False)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that is done.

    Attributes:
      folder: what it left; `folder / "model"` is a Hugging Face folder where it made a model.
      digest: of the settings that decide it, and of the stages before it.
      told: numbers that it measured.
      seconds: it took.
    """

    folder: Path
    digest: str
    told: dict[str, Any]
    seconds: float

    @property
    def model(self) -> Path:
        """The model that it made."""
        return self.folder / "model"


class Pipeline:
    """One run of the pipeline; a stage is made when it is first asked for, and only read where it was made before."""

    def __init__(self, config: PipelineConfig, folder: str | os.PathLike):
        """Makes nothing yet."""
        self.config, self.folder = config, Path(folder)
        self.quest = Quest(config.quest, config.seed)

    @functools.cached_property
    def trained(self) -> Stage:
        """X-MoE's: a mixture of experts that does what a teacher did, now and then."""
        config = self.config
        decides = {
            "model": core.to_dict(config.model),
            "quest": core.to_dict(config.quest),
            "train": core.to_dict(config.train),
            "seed": config.seed,
            "temperature": config.agent.temperature,
        }
        return self._stage("trained", decides, None, self._train)

    @functools.cached_property
    def improved(self) -> Stage:
        """SFPO's: the same model, rewarded for commands that bring the task's end nearer."""
        return self._stage("improved", core.to_dict(self.config.improve), self.trained, self._improve)

    @functools.cached_property
    def packed(self) -> Stage:
        """PuzzleMoE's: two experts in the space of one."""
        decides = {"compress": core.to_dict(self.config.compress), "calibration": self.config.calibration}
        return self._stage("packed", decides, self.improved, self._compress)

    @functools.cached_property
    def profiled(self) -> Stage:
        """VoltanaLLM's tables of the packed model: how long its iterations take, by clock, batch and tokens."""
        from jaxlab.pipeline.work import profiled

        decides = {
            name: value
            for name, value in core.to_dict(self.config.server).items()
            if name in ("num_pages", "max_running", "prefill_chunk", "freqs")
        }
        return self._stage(
            "profiled", decides, self.packed, lambda place: profiled(self.config.server, self.packed.model, place)
        )

    @functools.cached_property
    def worked(self) -> Stage:
        """EAGLET's: the agent at work over HTTP, with plans and without, for each controller of the clocks."""
        from jaxlab.pipeline.work import worked

        decides = {"server": core.to_dict(self.config.server), "agent": core.to_dict(self.config.agent)}
        return self._stage(
            "worked",
            decides,
            self.profiled,
            lambda place: worked(self.config, self.quest, self.packed.model, self.profiled.folder),
        )

    def _stage(self, name: str, decides: Any, before: Stage | None, make: Callable[[Path], dict[str, Any]]) -> Stage:
        key = json.dumps([decides, before and before.digest], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        place = self.folder / f"{name}-{digest}"
        done = place / "stage.json"  # the last thing that a stage writes
        if not done.exists():
            started = time.perf_counter()
            told = make(place)
            content = {"told": told, "seconds": time.perf_counter() - started}
            core.replace_file(done, json.dumps(content) + "\n")
        return Stage(place, digest, **json.loads(done.read_text()))

    def _train(self, place: Path) -> dict[str, Any]:
        config, tokenizer = self.config, self.quest.tokenizer
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size: expected at least the world's {tokenizer.vocab_size} words, "
                f"got {config.model.vocab_size}"
            )
        model = Decoder(config.model)
        agents = clone_executors(
            model,
            init_params(model, core.named_key(jax.random.key(config.seed), "params")),
            tokenizer,
            self.quest.shown,
            self.quest.plans,
            {"agent": config.train.steps},
            config.train,
            prompt=prompt,
            max_tokens=WORDS,
            folder=place / "run",
        )
        agents["agent"].save(place / "model")
        return self._measured(place / "model") | {"curve": _curve(place, ("accuracy", "loss", "expert_load_max"))}

    def _improve(self, place: Path) -> dict[str, Any]:
        model, params = load_pretrained(self.trained.model)
        rows = [row for planned in _REWARDED for row in self.quest.rows("train", planned)]
        tokenizer = load_tokenizer(self.trained.model)
        trainer = GRPOTrainer(model, params, [useful], self.config.improve, rows, tokenizer, folder=place / "run")
        trainer.train()
        trainer.export(place / "model")
        return self._measured(place / "model") | {"curve": _curve(place, ("reward", "entropy", "sfpo_active"))}

    def _compress(self, place: Path) -> dict[str, Any]:
        config, before, tokens = self.config, self.improved.model, self._calibration()
        report = compress_checkpoint(before, place / "model", config.compress, calib=tokens)
        sizes = {"expert_bytes_before": report.expert_bytes_before, "expert_bytes_after": report.expert_bytes_after}
        averaged = apply_method(
            "average", *load_pretrained(before), [tokens], ratio=config.compress.ratio, seed=config.compress.seed
        )
        found = self._accuracy(*averaged, load_tokenizer(before))
        return self._accuracy_of(place / "model") | {**sizes, "averaged": found}

    def _calibration(self) -> np.ndarray:
        """[B, 64] tokens of training prompts, one behind the other."""
        tokenizer, wanted = self.quest.tokenizer, self.config.calibration * _CALIBRATION_LENGTH
        rows = [row["prompt"] for planned in (True, False) for row in self.quest.rows("train", planned)]
        order = np.random.default_rng(self.config.seed).permutation(len(rows))
        ids: list[int] = []
        for k in order:
            if len(ids) >= wanted:
                break
            ids += tokenizer.encode(rows[k])
        count = min(wanted, len(ids)) // _CALIBRATION_LENGTH
        return np.array(ids[: count * _CALIBRATION_LENGTH], np.int32).reshape(count, _CALIBRATION_LENGTH)

    def _measured(self, folder: Path) -> dict[str, Any]:
        """Accuracy on held-out situations, and the load of the experts there."""
        return self._accuracy_of(folder) | {"load": self._load(folder)}

    def _accuracy_of(self, folder: Path) -> dict[str, Any]:
        return self._accuracy(*load_pretrained(folder), load_tokenizer(folder))

    def _accuracy(self, model: Any, params: Any, tokenizer: Any) -> dict[str, Any]:
        """How often a command is right, drawn as the agent draws it, with a plan and without: mean and interval."""
        rows = [row for planned in (True, False) for row in self.quest.rows("seen", planned, self.config.quest.rows)]
        got = evaluate(
            model,
            params,
            rows,
            [useful],
            tokenizer,
            n=_DRAWS,
            temperature=self.config.agent.temperature,
            top_p=1.0,
            max_tokens=WORDS,
            batch_size=64,
        )
        halves = np.split(got.rewards.mean(axis=1, dtype=np.float64), 2)
        found = {name: core.statistics.bootstrap_ci(half) for name, half in zip(("planned", "plain"), halves)}
        return {name: dataclasses.astuple(interval) for name, interval in found.items()}

    def _load(self, folder: Path) -> list[list[float]]:
        """[layers, experts] tokens over the mean of the layer."""
        model, params = load_pretrained(folder)
        tokens = self._calibration()
        aux = jax.jit(lambda params: model.apply({"params": params}, tokens).aux)(params)
        counts = np.concatenate(
            [np.asarray(each.tokens_per_expert).reshape(-1, model.config.moe.num_experts) for each in aux.values()]
        )
        return (counts / counts.mean(axis=1, keepdims=True)).tolist()


def _curve(place: Path, names: tuple[str, ...]) -> dict[str, list[float]]:
    rows = [row for row in core.jsonl.read(place / "run" / "metrics.jsonl") if names[0] in row]
    return {"step": [row["step"] for row in rows], **{name: [float(row[name]) for row in rows] for name in names}}
