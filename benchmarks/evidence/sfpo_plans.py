"""What policy optimisation takes on H100s, with and without slow-fast updates: its two phases compiled, nothing run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "sfpo"

MODELS = {
    "Qwen2.5-Math-1.5B": (),
    "Qwen2.5-Math-7B": (
        "model.hidden_size=3584",
        "model.intermediate_size=18944",
        "model.num_attention_heads=28",
        "model.num_key_value_heads=4",
        "model.vocab_size=152064",
        "model.tie_word_embeddings=false",
    ),
}
TOPOLOGIES = {8: "1x1x8", 64: "1x8x8"}
_OPTIONS = {"xla_backend_optimization_level": 0}  # only buffers are read


def items() -> Iterator[Item]:
    """One row a model and number of devices."""
    from jaxlab import core

    for model, changes in MODELS.items():
        for devices in TOPOLOGIES:
            yield Item(
                name=f"{model}, {devices}",
                table=(
                    "One H100 of 8 or 64 (78.2 of 85.0 GB usable), 256 prompts x 8 completions of 1536 + 2560 tokens, "
                    "float32 parameters and AdamW sharded over all, bfloat16 computation, a reference policy of the "
                    "same size: GB of the compiled phases (nothing ran). Rollouts decode the whole batch at once"
                ),
                settings={"devices": devices, **core.to_dict(_config(changes))},
                run=lambda changes=changes, model=model, devices=devices: _row(model, devices, _config(changes)),
            )


def _config(changes: tuple[str, ...]) -> Any:
    """The paper's config, with a reference policy."""
    from jaxlab import core
    from jaxlab.sfpo.recipe import PlanConfig

    return core.load_config(PlanConfig, core.find_config("configs/sfpo/paper.yaml"), (*changes, "rl.beta=0.001"))


def _row(model: str, devices: int, config: Any) -> dict[str, Any]:
    from jaxlab.core.plan import target
    from jaxlab.rl.compiled import compile_phase

    where = target("h100", TOPOLOGIES[devices], {"fsdp": devices})

    def planned(**changes: Any) -> Any:
        return compile_phase(dataclasses.replace(config, **changes), where, options=_OPTIONS, read_kernels=False)

    slow_fast, plain = planned(), planned(rl=dataclasses.replace(config.rl, sfpo=None))
    rollout = planned(phase="rollout")
    policy = slow_fast.bytes["parameters"] / 2
    return {
        "model": model,
        "devices": devices,
        "policy": policy / 1e9,
        "reference": policy / 1e9,
        "optimiser": slow_fast.bytes["optimizer"] / 1e9,
        "cache": rollout.bytes["cache"] / 1e9,
        "rollout": rollout.bytes["total"] / 1e9,
        "rollout fits": rollout.fits,
        "update": slow_fast.bytes["total"] / 1e9,
        "update fits": slow_fast.fits,
        "update without SFPO": plain.bytes["total"] / 1e9,
        "SFPO's, of the policy": (slow_fast.bytes["total"] - plain.bytes["total"]) / policy,
    }
