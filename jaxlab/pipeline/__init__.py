"""One model through five systems: trained, improved, compressed, served under energy control, and put to work.

It stands above the systems, and joins them by their public names and by Hugging Face folders alone. The recipe is
`jaxlab pipeline run`; this is one stage by hand:

    from jaxlab.core import find_config, load_config
    from jaxlab.pipeline import Pipeline, PipelineConfig

    config = load_config(PipelineConfig, find_config("configs/pipeline/laptop.yaml"))
    packed = Pipeline(config, "out/pipeline").packed  # makes the stages before it, where they are not there
    print(packed.model, packed.told["planned"])

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.pipeline.config import AgentConfig, PipelineConfig, QuestConfig, ServerConfig
    from jaxlab.pipeline.quest import Quest, useful
    from jaxlab.pipeline.stages import Pipeline, Stage

__all__ = [
    "AgentConfig",
    "Pipeline",
    "PipelineConfig",
    "Quest",
    "QuestConfig",
    "ServerConfig",
    "Stage",
    "useful",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "config": ("AgentConfig", "PipelineConfig", "QuestConfig", "ServerConfig"),
        "quest": ("Quest", "useful"),
        "stages": ("Pipeline", "Stage"),
    },
)
