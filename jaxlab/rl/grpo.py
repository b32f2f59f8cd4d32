"""Group-relative policy optimisation of a language model on prompts with checkable answers."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxlab.models import save_pretrained
from jaxlab.models.decoder import abstract_params
from jaxlab.rl.config import GRPOConfig
from jaxlab.rl.logps import text_logps
from jaxlab.rl.loop import PolicyTrainer, TrainResult
from jaxlab.rl.rollout import TextRollouts

__all__ = ["GRPOTrainer", "TrainResult"]


class GRPOTrainer(PolicyTrainer):
    """GRPO, Dr.GRPO, DAPO or RLOO with plain or slow-fast updates (arXiv 2402.03300, 2510.04072).

    Example:
        trainer = GRPOTrainer(model, params, [math_reward], GRPOConfig(sfpo=SFPOConfig()), data, tokenizer)
        params, history = trainer.train()

    In the first pass over a batch the loss is about 0 whatever the rewards, since advantages are centred; progress
    shows in `reward`, and whether there is a gradient in `grad_norm` and `zero_variance_fraction`.
    """

    def __init__(
        self,
        model: Any,
        params: PyTree,
        reward_fns: Sequence[Callable[..., Any]],
        config: GRPOConfig,
        train_data: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        mesh: Mesh | None = None,
        ref_params: PyTree | None = None,
        folder: str | os.PathLike | None = None,
        reward_weights: Sequence[float] | None = None,
        tx: optax.GradientTransformation | None = None,
        callback: Callable[[Any, dict[str, float]], None] | None = None,
        allow_changes: bool = False,
    ):
        """Checks everything and lays out the state; the step is compiled when it is first made.

        Args:
            model: a `Decoder`.
            params: its parameters, f32 masters for small learning rates. They are copied.
            reward_fns: `fn(prompts, completions, **columns) -> list[float | None]`, as in `combine_rewards`.
            config: of the run.
            train_data: dicts with "prompt", a text or a list of chat messages, and the columns that rewards read.
            tokenizer: of `load_tokenizer`.
            mesh: axes `data` and `fsdp` share the sequences, `fsdp` and `tensor` the parameters; every process of it
                makes the same call.
            ref_params: of the reference policy; None: `params`, where `config.beta` > 0, else none.
            folder: for `metrics.jsonl`, TensorBoard events and checkpoints; a run found there goes on.
            reward_weights: a factor for each reward function; None: 1 each.
            tx: the optimiser; None: AdamW from `config`.
            callback: called after each step with the trainer and the step's numbers, in every process.
            allow_changes: go on from a checkpoint of another config; the stop rule's window must be the same.

        Raises:
            ValueError: an argument that cannot work; it is named.
        """
        self._model, self._tokenizer = model, tokenizer
        rollouts = TextRollouts(
            model, tokenizer, reward_fns, config, train_data, reward_weights=reward_weights, mesh=mesh
        )
        logps = functools.partial(
            text_logps, model, length=config.max_completion_length, temperature=config.temperature
        )
        if config.beta > 0 and ref_params is None:
            ref_params = params
        super().__init__(
            params,
            rollouts,
            logps,
            config,
            mesh=mesh,
            names=None if mesh is None else abstract_params(model),
            ref_params=ref_params,
            tx=tx,
            folder=folder,
            callback=callback,
            allow_changes=allow_changes,
        )

    def export(self, folder: str | os.PathLike) -> Path:
        """Writes the policy as it is now, and its tokenizer, as a Hugging Face folder; the run goes on.

        Every process calls it, the first one writes.
        """
        save_pretrained(folder, self._model, self.params, tokenizer=self._tokenizer)
        return Path(folder)
