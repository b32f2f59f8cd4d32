"""Settings of a compression."""

import dataclasses

from jaxlab.flexgaussian import quantization

POSITIONS = ("fp16", "fixed24", "auto")
ORDERS = ("input", "morton")
ATTRIBUTE_BITS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How many bits each attribute gets, and over how many rows minimum and maximum are taken.

    Attributes:
      sh0: bits of the colour's constant term: 2, 4, 8, or 16 (a float16); 8 in the paper, section 3.2.
      shN: of the higher harmonics; 4 in the paper.
      opacity: of the logits; 4 in the paper.
      scale: of the logarithms; 8 in the paper.
      rotation: of the normalised quaternions; 8 in the paper.
      position: "fp16" (the paper's; centred on the scene, and scaled, where a float16 would overflow), "fixed24"
        (24-bit fixed point over the scene's box), or "auto" (ours): "fixed24" where a step of float16 is more than a
        quarter of the median Gaussian.
      segments: for each attribute, over the rows that it stores; "auto": about one for 4096 rows, at most 1000 (ours;
        the paper's code always takes 1000, which costs more than the data where the scene is small).
      segment_rule: "balanced", or "official": the bounds of the paper's code.
      order: "input" keeps the order of rows inside of the two groups; "morton" (ours) sorts them along a space-filling
        curve, which makes segments tighter and files smaller.
    """

    sh0: int = 8
    shN: int = 4
    opacity: int = 4
    scale: int = 8
    rotation: int = 8
    position: str = "fp16"
    segments: int | str = "auto"
    segment_rule: str = "balanced"
    order: str = "input"

    def __post_init__(self):
        for name in ("sh0", "shN", "opacity", "scale", "rotation"):
            if getattr(self, name) not in ATTRIBUTE_BITS:
                raise ValueError(f"{name}: expected {ATTRIBUTE_BITS} bits, got {getattr(self, name)!r}")
        choices = {"position": POSITIONS, "segment_rule": quantization.RULES, "order": ORDERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.segments != "auto" and (not isinstance(self.segments, int) or self.segments < 1):
            raise ValueError(f"segments: expected 'auto' or at least 1, got {self.segments!r}")
