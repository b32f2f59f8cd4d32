"""What goes through the pipeline, and how each stage treats it; every default is ours."""

import dataclasses

from jaxlab.models.decoder import DecoderConfig
from jaxlab.puzzlemoe import PuzzleConfig
from jaxlab.rl import GRPOConfig, SFPOConfig
from jaxlab.training import SFTConfig

CONTROLLERS = ("static", "ecofreq")


def _at_least(config: object, **least: float) -> None:
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise ValueError(f"{name}: expected at least {bound}, got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class QuestConfig:
    """The agent's world: EAGLET's grid of seed 0, for which a planner comes with the package.

    Attributes:
      size: cells along each side.
      tasks: to learn from.
      detours: how often the teacher is led astray, so that its way back is shown.
      rows: held-out situations that a model's commands are judged on, with a plan and as many without.
    """

    size: int = 4
    tasks: int = 256
    detours: int | float = 0.3
    rows: int = 128

    def __post_init__(self):
        _at_least(self, size=3, tasks=1, rows=1)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Who serves the packed model.

    Attributes:
      num_prefill: workers that read prompts.
      num_decode: workers that draw tokens.
      processes: each worker in a process of its own.
      num_pages: of keys and values, of each worker.
      max_running: requests decoded together, at most.
      prefill_chunk: prompt tokens read in one step.
      freqs: MHz of the simulated GPUs.
      controllers: who sets the clocks, one run of the agent each: "static" stays at the highest.
      prefill_slo_ms: what ecofreq keeps an iteration within that reads prompts; None: four times what a full chunk
        takes at the lowest clock.
      decode_slo_ms: the same for decoding; None: twice what a full batch takes at the lowest clock.
    """

    num_prefill: int = 1
    num_decode: int = 1
    processes: bool = False
    num_pages: int = 129
    max_running: int = 8
    prefill_chunk: int = 64
    freqs: tuple[int, ...] = (1005, 1410)
    controllers: tuple[str, ...] = CONTROLLERS
    prefill_slo_ms: int | float | None = None
    decode_slo_ms: int | float | None = None

    def __post_init__(self):
        _at_least(self, num_prefill=1, num_decode=1)
        if not self.controllers or len(set(self.controllers)) < len(self.controllers):
            raise ValueError(f"controllers: expected at least one, none twice, got {self.controllers}")
        for name in self.controllers:
            if name not in CONTROLLERS:
                raise ValueError(f"controllers: expected some of {', '.join(CONTROLLERS)}, got {name!r}")


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The agent at work.

    Attributes:
      tasks: held-out ones, half of kinds that training had, half of new ones.
      temperature: of its commands; a little chance ends the loops that small decoders run into. Accuracy is measured
        at it, too.
      seeds: an episode each of every task.
    """

    tasks: int = 24
    temperature: int | float = 0.5
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        _at_least(self, tasks=2, temperature=0)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected at least one, none twice, got {self.seeds}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The whole way of one model.

    Attributes:
      model: a decoder with experts; its vocabulary has room for the world's words.
      quest: the world.
      train: X-MoE's stage, supervised: what a teacher does.
      improve: SFPO's stage; its `sfpo` must be there.
      compress: PuzzleMoE's stage.
      calibration: rows of 64 tokens that it is calibrated with.
      server: VoltanaLLM's stage.
      agent: EAGLET's.
      seed: of parameters and detours.
      folder: keeps every stage; none: a temporary one, so that every run starts anew.
    """

    model: DecoderConfig
    quest: QuestConfig = dataclasses.field(default_factory=QuestConfig)
    train: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    improve: GRPOConfig = dataclasses.field(default_factory=lambda: GRPOConfig(sfpo=SFPOConfig()))
    compress: PuzzleConfig = dataclasses.field(default_factory=PuzzleConfig)
    calibration: int = 64
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    agent: AgentConfig = dataclasses.field(default_factory=AgentConfig)
    seed: int = 0
    folder: str | None = None

    def __post_init__(self):
        _at_least(self, calibration=1)
        if self.model.moe is None:
            raise ValueError("model.moe: expected experts, which are trained and compressed here, got none")
        if self.improve.sfpo is None:
            raise ValueError("improve.sfpo: expected slow-fast updates, got none")
