"""What the engine can be told."""

import dataclasses
from typing import Literal

from jaxlab.superoffload.host_adam import BACKENDS
from jaxlab.superoffload.loss_scale import LossScaleConfig

_CHOICES = {
    "split": ("flat", "param"),
    "speculation": ("auto", "always", "never"),
    "undo": ("copy", "residual", "off"),
    "backend": BACKENDS,
    "compute_dtype": ("bfloat16", "float16", "float32"),
    "nonfinite": ("skip", "raise"),
}


@dataclasses.dataclass(frozen=True)
class SuperOffloadConfig:
    """Settings of `SuperOffload`. Defaults are the paper's where cited, ours otherwise.

    Attributes:
      bucket_bytes: float32 bytes of a bucket; 64 MiB saturate a C2C link (paper).
      split: equal slices ('flat') or whole leaves ('param', DeepSpeed's rule).
      clip_norm: largest global norm of the gradients; None does not clip.
      clip_eps: added to the norm: 1e-6 as in DeepSpeed and torch, 0 as in Optax.
      speculation: step before the norm is known 'always', 'never', or as long as it has paid ('auto').
      undo: 'copy' (12 bytes a parameter), 'residual' (3.2), or 'off', which never speculates.
      backend: of the host step.
      compute_dtype: of the live parameters.
      loss_scale: dynamic loss scaling, for float16.
      steps_per_update: batches whose gradients are averaged for one update.
      offload_ratio: part of the buckets whose state is on the host; the first ones in forward order stay on the
        accelerator and wait for the norm. None: the plan's number, or all on the host.
      nonfinite: 'skip' such a step, or 'raise' a FloatingPointError where there is no loss scaler.
      cpu_cores_share: part of the cores that the host step may use (DeepSpeed's default).
      worker_timeout_s: longest wait for the host, in seconds.
    """

    bucket_bytes: int = 64 << 20
    split: Literal["flat", "param"] = "flat"
    clip_norm: int | float | None = 1.0
    clip_eps: int | float = 1e-6
    speculation: Literal["auto", "always", "never"] = "auto"
    undo: Literal["copy", "residual", "off"] = "copy"
    backend: Literal["auto", "xla", "ffi", "pallas"] = "auto"
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    loss_scale: LossScaleConfig | None = None
    steps_per_update: int = 1
    offload_ratio: int | float | None = None
    nonfinite: Literal["skip", "raise"] = "skip"
    cpu_cores_share: int | float = 0.8
    worker_timeout_s: int | float = 60.0

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if self.bucket_bytes < 4 or self.bucket_bytes % 4:
            raise ValueError(f"bucket_bytes: expected a multiple of 4, at least 4, got {self.bucket_bytes}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a value > 0, or None for no clipping, got {self.clip_norm}")
        if not self.clip_eps >= 0:
            raise ValueError(f"clip_eps: expected a value >= 0, got {self.clip_eps}")
        if self.offload_ratio is not None and not 0 <= self.offload_ratio <= 1:
            raise ValueError(f"offload_ratio: expected a value in [0, 1], got {self.offload_ratio}")
        if not 0 < self.cpu_cores_share <= 1:
            raise ValueError(f"cpu_cores_share: expected a value in (0, 1], got {self.cpu_cores_share}")
        if self.steps_per_update < 1:
            raise ValueError(f"steps_per_update: expected a value >= 1, got {self.steps_per_update}")
        if not self.worker_timeout_s > 0:
            raise ValueError(f"worker_timeout_s: expected a value > 0, got {self.worker_timeout_s}")
