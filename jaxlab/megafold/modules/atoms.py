"""Atoms: their features, attention in windows, and the ways to and from tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlab.layers.sharding import constrain
from jaxlab.megafold import ops
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.modules.conditioned import AdaptiveGate, AdaptiveLayerNorm, ConditionedTransition
from jaxlab.megafold.modules.weights import Weights, repeated
from jaxlab.megafold.ops.basic import layer_norm, project, split_heads
from jaxlab.megafold.sharding import ROWS, WHOLE, Names, spread

N_Q, N_K = 32, 128
_ELEMENTS, _CHARACTERS = 128, 64


@struct.dataclass
class AtomConditioning:
    """What is the same for all samples.

    Attributes:
      c: of atoms, [B, A, c_atom].
      p: of pairs of atoms in a window, [B, ceil(A / 32), 32, 128, c_atompair].
    """

    c: Any
    p: Any


def from_tokens(x: Float[Array, "b *t n c"], atom_token: Int[Array, "b a"]) -> Float[Array, "b *t a c"]:
    """To each atom its token's row."""
    index = atom_token.reshape(atom_token.shape[0], *(1,) * (x.ndim - 3), -1, 1)
    return jnp.take_along_axis(x, index, axis=-2, mode="clip")


def to_tokens(
    x: Float[Array, "b *t a c"], atom_token: Int[Array, "b a"], atom_mask: Bool[Array, "b a"], tokens: int
) -> Float[Array, "b *t tokens c"]:
    """Mean over the atoms of each token, summed in float32; 0 for a token without atoms."""

    def one(x: Array, token: Array, mask: Array) -> Array:
        rows = jnp.moveaxis(jnp.where(mask[:, None], x, 0), -2, 0).astype(jnp.float32)
        total = jax.ops.segment_sum(rows, token, tokens)
        count = jax.ops.segment_sum(mask.astype(jnp.float32), token, tokens)
        return (jnp.moveaxis(total, 0, -2) / jnp.maximum(count, 1)[:, None]).astype(x.dtype)

    return jax.vmap(one)(x, atom_token, atom_mask)


def windows(x: Array, config: AF3Config) -> tuple[Array, Array]:
    """What lies along atoms, [B, A, ...], as queries [B, blocks, 32, 1, ...] and keys [B, blocks, 1, 128, ...]."""
    padding = ((0, 0), (0, -x.shape[1] % N_Q), *((0, 0) for _ in x.shape[2:]))
    queries = jnp.pad(x, padding).reshape(x.shape[0], -1, N_Q, 1, *x.shape[2:])
    return queries, ops.atom_windows(x, axis=1, n_q=N_Q, n_k=N_K, edge=config.window_edge)[:, :, None]


class AtomEmbedder(Weights):
    """Features of the reference conformers, and what the trunk knows (AlphaFold3, algorithm 5, lines 1 to 14).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, Array],
        s: Float[Array, "b n c_s"] | None = None,
        z: Float[Array, "b n n c_z"] | None = None,
    ) -> AtomConditioning:
        """Of the conformers alone, or with embeddings of tokens and pairs, both or none."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        c_atom, c_pair, fused = config.c_atom, config.c_atompair, config.kernels.layernorm_linear
        position, space = batch["ref_pos"], batch["ref_space"]
        features = jnp.concatenate(
            [
                position,
                jnp.arcsinh(batch["ref_charge"])[..., None],
                batch["atom_mask"][..., None],
                jax.nn.one_hot(batch["ref_element"], _ELEMENTS),
                jax.nn.one_hot(batch["ref_name"], _CHARACTERS).reshape(*space.shape, -1),
            ],
            axis=-1,
        )
        c = project(features.astype(dtype), self.linear("w_atom", features.shape[-1], c_atom))

        (here, there), (mine, other) = windows(position, config), windows(space, config)
        same = (mine == other)[..., None]
        offset = here - there
        near = 1 / (1 + jnp.sum(jnp.square(offset), axis=-1, keepdims=True))
        geometry = jnp.where(same, jnp.concatenate([offset, near, jnp.ones_like(near)], axis=-1), 0)
        p = project(geometry.astype(dtype), self.linear("w_pair", 5, c_pair))
        if s is not None and z is not None:
            token = batch["atom_token"]
            c_s, c_z, normed = s.shape[-1], z.shape[-1], spread("layernorm_linear")
            known = normed(s, *self.norm("ln_s", c_s), self.linear("w_s", c_s, c_atom), implementation=fused)
            c += from_tokens(known, token)
            known = normed(z, *self.norm("ln_z", c_z), self.linear("w_z", c_z, c_pair), implementation=fused)
            rows, columns = windows(token, config)
            p += known[jnp.arange(z.shape[0])[:, None, None, None], rows, columns]
        ends = project(jax.nn.relu(c), self.linear("w_ends", c_atom, 2 * c_pair))
        p += windows(ends[..., :c_pair], config)[0] + windows(ends[..., c_pair:], config)[1]
        hidden = p
        for name in ("w_mlp_1", "w_mlp_2", "w_mlp_3"):
            hidden = project(jax.nn.relu(hidden), self.linear(name, c_pair, c_pair, relu=True))
        return AtomConditioning(*(constrain(x, WHOLE) for x in (c, p + hidden)))


class AtomTransformer(nn.Module):
    """Blocks of attention in windows and conditioned transition (AlphaFold3, algorithms 7 and 23).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, q: Float[Array, "b *t a c_atom"], conditioning: AtomConditioning, mask: Bool[Array, "b a"]
    ) -> Float[Array, "b *t a c_atom"]:
        """The new q, of one or of T samples."""
        block = AtomBlock(self.config, name="blocks")
        return repeated(block, self.config.atom_blocks, q, conditioning, mask, remat=self.config.remat)


class AtomBlock(Weights):
    """One block of the `AtomTransformer`.

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self, q: Float[Array, "b *t a c_atom"], conditioning: AtomConditioning, mask: Bool[Array, "b a"]
    ) -> Float[Array, "b *t a c_atom"]:
        """The new q."""
        # Samples lie over a mesh, the atoms of one do not: windows reach across.
        lead, condition = (WHOLE, conditioning.c) if q.ndim == 3 else (ROWS, conditioning.c[:, None])
        q += self._attention(q, condition, conditioning.p, mask, lead)
        return q + ConditionedTransition(2, self.config.kernels, lead, name="transition")(q, condition)

    def _attention(self, q: Array, condition: Array, p: Array, mask: Array, lead: Names) -> Array:
        c, c_pair, heads, kernels = q.shape[-1], p.shape[-1], self.config.atom_heads, self.config.kernels
        x = AdaptiveLayerNorm(kernels, lead, name="norm")(q, condition)
        names = ("w_q", "w_k", "w_v")
        packed = jnp.concatenate([*(self.linear(name, c, c) for name in names), self.zeros("w_gate", c, c)], axis=1)
        b_q = jnp.pad(self.zeros("b_q", c), (0, 3 * c))
        *qkv, gate = jnp.split(project(x, packed, b_q), 4, axis=-1)
        q, k, v = (split_heads(x, heads) for x in qkv)
        w_bias = self.linear("w_bias", c_pair, heads)
        normed = spread("layernorm_linear", WHOLE)
        bias = normed(p, *self.norm("ln_z", c_pair), w_bias, implementation=kernels.layernorm_linear)
        out = ops.local_attention(
            q,
            k,
            v,
            jnp.moveaxis(bias, -1, 1),
            mask,
            n_q=N_Q,
            n_k=N_K,
            edge=self.config.window_edge,
        )
        update = project(jax.nn.sigmoid(gate) * out.reshape(gate.shape), self.zeros("w_out", c, c))
        return AdaptiveGate(name="gate")(update, condition)


class AtomEncoder(Weights):
    """Atoms through a transformer, and their mean on each token (AlphaFold3, algorithm 5, lines 15 to 17).

    Attributes:
      config: sizes and kernels.
      outputs: channels of a token.
    """

    config: AF3Config
    outputs: int

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], q: Float[Array, "b *t a c_atom"], conditioning: AtomConditioning
    ) -> tuple[Float[Array, "b *t n outputs"], Float[Array, "b *t a c_atom"]]:
        """Tokens, and the atoms as they come out of the transformer."""
        mask = batch["atom_mask"]
        q = AtomTransformer(self.config, name="transformer")(q, conditioning, mask)
        w_token = self.linear("w_token", self.config.c_atom, self.outputs, relu=True)
        tokens = batch["token_mask"].shape[1]
        return to_tokens(jax.nn.relu(project(q, w_token)), batch["atom_token"], mask, tokens), q


class AtomDecoder(Weights):
    """Tokens to their atoms, a transformer, and a step for each atom (AlphaFold3, algorithm 6).

    Attributes:
      config: sizes and kernels.
    """

    config: AF3Config

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, Array],
        a: Float[Array, "b t n c_token"],
        q: Float[Array, "b t a c_atom"],
        conditioning: AtomConditioning,
    ) -> Float[Array, "b t a 3"]:
        """The network's output, in units of its preconditioning, float32."""
        w_token = self.linear("w_token", a.shape[-1], q.shape[-1])
        q += from_tokens(project(a, w_token), batch["atom_token"])
        q = AtomTransformer(self.config, name="transformer")(q, conditioning, batch["atom_mask"])
        q = layer_norm(q.astype(jnp.float32), self.norm("ln_out", q.shape[-1]))
        return project(q, self.zeros("w_out", q.shape[-1], 3))
