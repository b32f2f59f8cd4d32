"""A small language model trained on real text; `plan` compiles the same training step for many GPUs."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxlab import core
from jaxlab.training import TrainConfig, plan, train

__all__ = ["FoundationConfig", "plan", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundationConfig(TrainConfig):
    """A training run and what it is shown with; every default is ours.

    Attributes:
      prompt: what the model goes on from, before and after training.
      sample_tokens: how much it writes.
      temperature: of that sample.
      folder: keeps metrics, checkpoints and the model; none: a temporary one, so that every run starts anew.
    """

    prompt: str = "class Stack:\n    def "
    sample_tokens: int = 300
    temperature: float = 0.7
    folder: str | None = None


def run(config: FoundationConfig) -> core.Report:
    """Trains the model; tells the loss curve and a sample before and after.

    Needs nothing but a CPU: the text is the Python standard library's own source (`config.data`).
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: FoundationConfig, folder: Path) -> core.Report:
    import jax

    from jaxlab.inference import SamplingParams, generate
    from jaxlab.models import load_pretrained, load_tokenizer
    from jaxlab.models.decoder import Decoder, init_params

    key = jax.random.key(config.seed)
    tokenizer = load_tokenizer(config.tokenizer)
    sampling = SamplingParams(max_tokens=config.sample_tokens, temperature=config.temperature)

    def sample(model: Any, params: Any) -> str:
        rng = core.named_key(key, "sample")
        out = generate(model, params, [config.prompt], sampling, rng=rng, tokenizer=tokenizer)
        return config.prompt + (out.text or ("",))[0]

    untrained = Decoder(config.model)
    before = sample(untrained, init_params(untrained, core.named_key(key, "params")))
    told = train(config, folder)
    after = sample(*load_pretrained(folder / "model"))
    return dataclasses.replace(
        told,
        system="foundation",
        title="A small language model, trained on " + _named(config.data),
        tables=(("A sample at the same seed", ("when", "text"), (("before", before), ("after", after))), *told.tables),
        notes=(*told.notes, f"The samples go on from {config.prompt!r} at temperature {config.temperature}."),
    )


def _named(data: str) -> str:
    """A source of text as a reader knows it."""
    return {
        "python-stdlib": "the Python standard library",
        "package-docs": "the installed packages' documentation",
    }.get(data, data)
