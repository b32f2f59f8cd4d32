"""Sizes of the network and which kernels it uses."""

import dataclasses
from typing import Literal

_IMPLEMENTATIONS = ("reference", "xla", "triton", "interpret")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`implementation=` of each fused op; None picks by platform, "reference" is plain JAX, without fusions of ours."""

    evo_attention: str | None = None
    layernorm_linear: str | None = None
    transition: str | None = None
    triangle_multiplication: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value not in _IMPLEMENTATIONS:
                raise ValueError(f"kernels.{field.name}: expected None or one of {_IMPLEMENTATIONS}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class AF3Config:
    """AlphaFold3's sizes; defaults are the paper's (`af3`), which AF3's and Protenix's released configurations share.

    Attributes:
      c_s: channels of a token.
      c_z: channels of a pair of tokens.
      c_m: channels of an alignment row's token.
      c_token: channels of a token in the diffusion module.
      c_atom: channels of an atom.
      c_atompair: channels of a pair of atoms in a window.
      c_template: channels of a pair in the template embedder.
      pairformer_blocks, msa_blocks, template_blocks, token_blocks, atom_blocks, confidence_blocks: depths; atom blocks
        are counted for the encoder and for the decoder alike.
      pair_heads, pair_head_dim: of triangle attention.
      single_heads: of the pairformer's single attention, c_s // single_heads wide (MegaFold has 16 heads of 64).
      token_heads, atom_heads: of the diffusion module's attentions.
      opm_channels: hidden channels of the outer product mean.
      msa_heads, msa_head_dim: of pair-weighted averaging (8 x 8 in AF3's JAX code, 8 x 32 in MegaFold).
      transition_factor: hidden over outer width in the trunk; 2 in the template embedder and the diffusion module.
      diffusion_samples: noise samples for one pass of the trunk.
      sample_chunk: samples denoised at once; None is all of them.
      max_tokens, max_atoms, max_msa_rows, max_templates: sizes to which a batch is padded; max_atoms a multiple of 32.
      recycles: most passes of the trunk; training draws 1 .. recycles.
      msa_dropout, pair_dropout: rates, dropped by row (by column in the ending node's attention).
      window_edge: where the atom windows at both ends look: "mask" (Protenix) or "shift" (AF3's JAX code).
      dtype: of activations and of the weights when used; weights, softmax, norms and losses are float32.
      remat: recompute a block's activations in the backward pass.
      kernels: implementation of each fused op.
    """

    c_s: int = 384
    c_z: int = 128
    c_m: int = 64
    c_token: int = 768
    c_atom: int = 128
    c_atompair: int = 16
    c_template: int = 64
    pairformer_blocks: int = 48
    msa_blocks: int = 4
    template_blocks: int = 2
    token_blocks: int = 24
    atom_blocks: int = 3
    confidence_blocks: int = 4
    pair_heads: int = 4
    pair_head_dim: int = 32
    single_heads: int = 16
    token_heads: int = 16
    atom_heads: int = 4
    opm_channels: int = 32
    msa_heads: int = 8
    msa_head_dim: int = 8
    transition_factor: int = 4
    diffusion_samples: int = 48
    sample_chunk: int | None = None
    max_tokens: int = 384
    max_atoms: int = 7008
    max_msa_rows: int = 1024
    max_templates: int = 4
    recycles: int = 4
    msa_dropout: float = 0.15
    pair_dropout: float = 0.25
    window_edge: Literal["mask", "shift"] = "mask"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = True
    kernels: Kernels = dataclasses.field(default_factory=Kernels)

    def __post_init__(self):
        for name, choices in (("window_edge", ("mask", "shift")), ("dtype", ("bfloat16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < (0 if field.name.endswith("_blocks") else 1):
                raise ValueError(f"{field.name}: expected a positive number, got {value}")
        if self.max_atoms % 32:
            raise ValueError(f"max_atoms: expected a multiple of 32 (the atom windows), got {self.max_atoms}")
        if self.sample_chunk is not None and (self.sample_chunk < 1 or self.diffusion_samples % self.sample_chunk):
            raise ValueError(f"sample_chunk: expected a divisor of {self.diffusion_samples}, got {self.sample_chunk}")
        for width, heads in (("c_s", "single_heads"), ("c_token", "token_heads"), ("c_atom", "atom_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{heads}: expected a divisor of {width} {getattr(self, width)}, got {getattr(self, heads)}"
                )

    @property
    def c_inputs(self) -> int:
        """Channels of the input embedding: the atoms' summary, residue type, profile, mean deletions (449 in `af3`)."""
        return self.c_s + 65

    @classmethod
    def af3(cls) -> "AF3Config":
        """The paper's network."""
        return cls()

    @classmethod
    def small(cls) -> "AF3Config":
        """A network of a few million weights, for one small GPU or a patient CPU (ours)."""
        return cls(
            c_s=128, c_z=64, c_m=32, c_token=256, c_atom=64, c_atompair=16, c_template=32,
            pairformer_blocks=4, msa_blocks=2, template_blocks=1, token_blocks=4, atom_blocks=2, confidence_blocks=2,
            pair_head_dim=16, single_heads=8, token_heads=8, opm_channels=16, diffusion_samples=8,
            max_tokens=128, max_atoms=1280, max_msa_rows=128, max_templates=2, dtype="float32",
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> "AF3Config":
        """The network of the tests and of the laptop recipe (ours)."""
        return cls(
            c_s=64, c_z=32, c_m=16, c_token=96, c_atom=32, c_atompair=8, c_template=16,
            pairformer_blocks=2, msa_blocks=1, template_blocks=1, token_blocks=2, atom_blocks=1, confidence_blocks=1,
            pair_heads=2, pair_head_dim=16, single_heads=4, token_heads=4, atom_heads=2, opm_channels=8, msa_heads=2,
            diffusion_samples=4, max_tokens=64, max_atoms=640, max_msa_rows=32, max_templates=1, recycles=1,
            dtype="float32",
        )  # fmt: skip
