"""A few steps of a real language model on grade-school problems: what of a step is rollouts, and what updates."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "sfpo"


def items() -> Iterator[Item]:
    """One row a method."""
    from jaxlab import core
    from jaxlab.sfpo.language_model import LanguageModelConfig

    config = core.load_config(LanguageModelConfig, core.find_config("configs/sfpo/gsm8k.yaml"))
    rl = config.rl
    for method in ("grpo", "sfpo"):
        yield Item(
            name=f"SmolLM2-135M, {method}",
            table=(
                f"SmolLM2-135M on GSM8K, {rl.steps} steps of {rl.prompts_per_step} x {rl.num_generations} completions, "
                f"{rl.max_completion_length} tokens at most: 1 for the right answer, 0.2 more where the last word is a "
                "number; seconds of the median step (measured)"
            ),
            settings={"method": method, **core.to_dict(config)},
            run=lambda method=method: _row(method, config),
        )


def _row(method: str, config: Any) -> dict[str, Any]:
    from jaxlab.sfpo.comparison import Costs
    from jaxlab.sfpo.language_model import trainer
    from jaxlab.sfpo.methods import METHODS

    _, history = trainer(config, method).train()
    costs = Costs.of(history)
    rollout, update = costs.sampling, costs.slow_fast or costs.plain
    return {
        "method": METHODS[method].label,
        "rollout, s a step": rollout,
        "update, s a step": update,
        "rollouts' share": rollout / (rollout + update),
        "tokens a completion": sum(row["completion_length"] for row in history) / len(history),
        "rewards": ", ".join(f"{row['reward']:.2f}" for row in history),
        "groups without a signal": sum(row["zero_variance_fraction"] for row in history) / len(history),
        "programs compiled after the first step": sum(row["compilations"] for row in history[1:]),
    }
