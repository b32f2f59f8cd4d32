"""What a compression is: how many experts go, how pairs are found and merged, how the rest is stored."""

import dataclasses
import math

NORMS = ("sum", "tokens", "calls", "magnitude")
PAIRINGS = ("random", "search")
UNDERFLOWS = ("clamp", "nearest")
UNMERGED = ("bf16", "packed")


@dataclasses.dataclass(frozen=True)
class PuzzleConfig:
    """One compression by PuzzleMoE (arXiv:2511.04805).

    Attributes:
        ratio: fraction of the expert slots that is removed, in (0, 0.5]; 0.5 pairs all experts (paper: 0.25 and 0.5).
        tau: two magnitudes with `|a - b| <= tau (a + b)` share their mean, in [0, 1] (paper: 0.4 for every model).
        norm: how calibration statistics become the norms that experts are compared by: "sum" (paper, read literally),
            "tokens" and "calls" (divided by the root of that count; the latter is Wanda's), "magnitude" (all ones).
        pairing: "random" (paper) or "search" (`search_pairs`, ours).
        seed: of the pairing.
        underflow: what happens to merged magnitudes below 2^-15: "clamp" keeps the mantissa (paper), "nearest" rounds
            to 0 or 2^-15 (ours).
        unmerged: how experts without a partner are kept: "bf16" as they are, "packed" in slots of their own (ours).
        min_tokens: a pair with a member that fewer calibration tokens reached is decided by magnitude (ours).
    """

    ratio: float = 0.5
    tau: float = 0.4
    norm: str = "sum"
    pairing: str = "random"
    seed: int = 0
    underflow: str = "clamp"
    unmerged: str = "bf16"
    min_tokens: int = 1

    def __post_init__(self):
        check_ratio(self.ratio)
        check_tau(self.tau)
        check_name("norm", self.norm, NORMS)
        check_name("pairing", self.pairing, PAIRINGS)
        check_name("underflow", self.underflow, UNDERFLOWS)
        check_name("unmerged", self.unmerged, UNMERGED)
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}")


def check_ratio(ratio: float) -> None:
    """Raises ValueError unless 0 < ratio <= 0.5."""
    if not 0 < ratio <= 0.5:
        raise ValueError(f"ratio must be in (0, 0.5], got {ratio}")


def check_tau(tau: float) -> None:
    """Raises ValueError unless 0 <= tau <= 1."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], got {tau}")


def check_name(what: str, got: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `got` is one of the known options."""
    if got not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {got!r}")


def num_pairs(num_experts: int, ratio: float) -> int:
    """Pairs of a layer: ratio * N rounded half up, at most N // 2.

    Raises:
        ValueError: ratio outside (0, 0.5], or so small that there is no pair.
    """
    check_ratio(ratio)
    pairs = min(math.floor(ratio * num_experts + 0.5), num_experts // 2)
    if pairs < 1:
        raise ValueError(f"ratio {ratio} of {num_experts} experts makes no pair, expected ratio * experts >= 0.5")
    return pairs
