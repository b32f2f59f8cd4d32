"""Every default of InstantEdit, and where it comes from. Code: the official implementation of arXiv 2508.06033."""

import dataclasses
import math
from typing import Any, Literal, get_args

from jaxlab.instantedit.scheduler import InverseMode, check_num_steps

Compat = Literal["clean", "official"]

NUM_WINDOWS = 4  # code, as its checkpoint was distilled
MASK_TEMPERATURE = 0.15  # code: masks are at least this over sqrt(alpha_bar)
CANNY_LOW, CANNY_HIGH = 100, 200  # code
MAX_TOKENS = 77  # CLIP's text encoder


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """How an image is taken up to noise.

    Attributes:
      num_steps: N; below 4 it is raised to 4 (code).
      mode: "exact", ours: the path's velocity at the time of the latents; "official": as the code has it.
      control_scale: of ControlNet's residuals (code).
      canny_low: edges: weak ones' gradient (code).
      canny_high: edges: strong ones' gradient (code).

    Raises:
      ValueError: a number out of range or another mode.
    """

    num_steps: int = 4
    mode: InverseMode = "exact"
    control_scale: int | float = 0.4
    canny_low: int | float = CANNY_LOW
    canny_high: int | float = CANNY_HIGH

    def __post_init__(self):
        check_num_steps(self.num_steps)
        check_choice("mode", self.mode, InverseMode)
        for name in ("control_scale", "canny_low", "canny_high"):
            check_not_negative(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """How noise is brought down to the edited image. The numbers may change without anything being compiled again.

    Attributes:
      cfg: weight of ordinary guidance (code).
      dpg: weight of disentangled guidance (code; its demo takes 2).
      mask_threshold: attention above this part of its maximum belongs to the edit (code's recommended command line).
      control_scale: of ControlNet's residuals (code).
      compat: "clean", ours: the masked latents are decoded and the right states compared; "official": as the code.

    Raises:
      ValueError: a number out of range or another compat.
    """

    cfg: int | float = 1.1
    dpg: int | float = 3.0
    mask_threshold: int | float = 0.4
    control_scale: int | float = 0.4
    compat: Compat = "clean"

    def __post_init__(self):
        for name in ("cfg", "dpg"):
            if not _is_finite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)!r}")
        for name in ("mask_threshold", "control_scale"):
            check_not_negative(name, getattr(self, name))
        check_choice("compat", self.compat, Compat)


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless a number is finite and not negative."""
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:  # no number
        return False


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises ValueError unless a value is one of a `Literal`'s."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")
