"""The simulated machines."""

import dataclasses

from jaxlab.voltanallm.sim.latency import KV_BYTES_PER_TOKEN


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Workers of one GPU each, and what lies between them.

    Attributes:
      num_prefill: workers that compute prompts; 0: there is one pool, whose workers do both, prompts first.
      num_decode: workers that generate.
      max_prefill_requests: prompts in a batch; None: no such limit.
      max_prefill_tokens: in a batch; a longer prompt is a batch of its own.
      kv_tokens: room of a decode worker's KV pool (that of Llama-3.1-8B in the paper's profile).
      kv_bytes_per_token: moved from prefill to decode (Llama-3.1-8B's, bf16).
      link_gb_s: speed of moving them (ours: a third of an A100's NVLink).
      link_ms: time until they begin to move (ours).
      switch_ms: from asking for a clock until it is in force (the specification's; 1 to 50 are plausible).
      poll_ms: age up to which the front's view of clocks and loads may grow (official default).

    Raises:
      ValueError: a number out of range.
    """

    num_prefill: int = 2
    num_decode: int = 2
    _: dataclasses.KW_ONLY
    max_prefill_requests: int | None = None
    max_prefill_tokens: int = 16384
    kv_tokens: int = 457_600
    kv_bytes_per_token: int = KV_BYTES_PER_TOKEN
    link_gb_s: float = 100.0
    link_ms: float = 1.0
    switch_ms: float = 10.0
    poll_ms: float = 50.0

    def __post_init__(self) -> None:
        for name, least in (("num_prefill", 0), ("num_decode", 1), ("max_prefill_tokens", 1), ("kv_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.max_prefill_requests is not None and self.max_prefill_requests < 1:
            raise ValueError(f"max_prefill_requests: expected at least 1 or None, got {self.max_prefill_requests}")
        for name in ("kv_bytes_per_token", "link_ms", "switch_ms", "poll_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not self.link_gb_s > 0:
            raise ValueError(f"link_gb_s: expected a positive number, got {self.link_gb_s}")

    def transfer_s(self, tokens: int) -> float:
        """Seconds until the KV cache of so many tokens is there."""
        return self.link_ms / 1000 + tokens * self.kv_bytes_per_token / (self.link_gb_s * 1e9)
