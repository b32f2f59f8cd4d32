"""The decoder: one network for the Llama, Qwen, Mixtral, OLMoE and DeepSeek-MoE families."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.layers import Linear, RMSNorm, SelfAttention, rope_frequencies, rope_tables
from jaxlab.layers.sharding import constrain, named, split_attention
from jaxlab.models.decoder.cache import Cache
from jaxlab.models.decoder.config import DecoderConfig, LayerRun
from jaxlab.models.decoder.mlp import default_mlp, out_init_scale
from pallas_kernels.flash_attention import flash_attention

ArrayLike = Array | np.ndarray


@struct.dataclass
class DecoderOutput:
    """What one forward pass gives.

    Attributes:
        logits: `[B,T,V]` float32.
        hidden: `[B,T,D]` after the final norm, in the compute dtype.
        cache: the cache after this call, None without one.
        aux: "blocks_i" -> what the MLPs reported, stacked over the layers of the run; empty if none did.
    """

    logits: Any
    hidden: Any
    cache: Any
    aux: dict[str, Any]


def _head_dim(config: DecoderConfig) -> int:
    assert config.head_dim is not None  # the configuration fills it in
    return config.head_dim


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    Attributes:
        config: of the decoder.
        sparse: whether this layer has experts.
        make_mlp: the MLP protocol, see `default_mlp`.
    """

    config: DecoderConfig
    sparse: bool
    make_mlp: Callable[[DecoderConfig, bool], nn.Module]

    def setup(self):
        """Makes the submodules."""
        config = self.config
        self.attn_norm = RMSNorm(config.rms_norm_eps, "embed", config.param_dtype)
        self.mlp_norm = RMSNorm(config.rms_norm_eps, "embed", config.param_dtype)
        self.attn = SelfAttention(
            config.num_attention_heads,
            config.num_key_value_heads,
            _head_dim(config),
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_epsilon=config.rms_norm_eps,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            out_init_scale=out_init_scale(config),
        )
        self.mlp = self.make_mlp(config, self.sparse)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        cos: Float[Array, "_ t half"],
        sin: Float[Array, "_ t half"],
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Any, Any]:
        """Returns the new x, what `attend` gave beside its output, and the MLP's aux (None if it has none)."""
        y, extra = self.attn(self.attn_norm(x), cos, sin, attend)
        x = constrain(x + y, ("batch", "sequence", None))
        y = self.mlp(self.mlp_norm(x), train=train)
        y, aux = y if isinstance(y, tuple) else (y, None)
        return constrain(x + y, ("batch", "sequence", None)), extra, aux


class Stack(nn.Module):
    """A run of equal layers over one stacked set of parameters.

    The block is applied as a pure function, so scanned, unrolled and rematerialised forms share the tree.

    Attributes:
        config: of the decoder.
        run: the layers.
        make_mlp: the MLP protocol.
        repeat: of `Decoder`.
    """

    config: DecoderConfig
    run: LayerRun
    make_mlp: Callable[[DecoderConfig, bool], nn.Module]
    repeat: Callable[..., Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Any,
        cos: Float[Array, "_ t half"],
        sin: Float[Array, "_ t half"],
        attend: Callable[..., tuple[Array, Any]],
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Any, Any]:
        """Applies the layers in order.

        Args:
            x: residual stream.
            cache: carried from layer to layer (None without one).
            cos: of `rope_tables`.
            sin: of `rope_tables`.
            attend: (cache, layer, q, k, v) -> (out, cache); `layer` may be traced.
            train: handed to the MLPs.

        Returns:
            x, cache, and the aux of the layers stacked (None if there is none).
        """
        block = Block(self.config, self.run.sparse, self.make_mlp, parent=None)
        layers = self.run.stop - self.run.start
        params = self._parameters(block, layers, x, cos, sin)
        if self.is_initializing():
            return (
                x,
                cache,
                None,
            )  # the parameters are all that is wanted; experts may lie on axes that are not bound yet
        if self.repeat is not None and cache is None:
            return self._repeated(self.repeat, block, params, x, cos, sin, attend, train), None, None
        separate = "layer_0" in params  # one tree a layer, made by `inference.decode_params`
        rng = self.make_rng("mlp") if self.has_rng("mlp") else None

        def layer_step(carry, per_layer):
            x, cache = carry
            layer_params, layer = per_layer
            rngs = None if rng is None else {"mlp": jax.random.fold_in(rng, layer)}
            result: Any = block.apply(
                {"params": layer_params}, x, cos, sin, lambda *qkv: attend(cache, layer, *qkv), train=train, rngs=rngs
            )
            x, cache, aux = result
            return (x, cache), aux

        if self.config.remat == "block" and cache is None:
            # Inside a scan nothing can be merged across iterations, so the barrier against it is not needed.
            layer_step = jax.checkpoint(layer_step, prevent_cse=not self.config.scan)
        if self.config.scan and layers > 1 and not separate:
            indices = jnp.arange(self.run.start, self.run.stop, dtype=jnp.int32)
            cut, joined = _over_layers(params)

            def scanned_step(carry, per_layer):
                return layer_step(carry, (joined(per_layer[0]), per_layer[1]))

            (x, cache), aux = jax.lax.scan(scanned_step, (x, cache), (cut, indices))
            return x, cache, aux
        reports = []
        for index in range(layers):
            stacked = None if separate else jax.tree.map(lambda leaf: leaf[index], params)  # noqa: B023
            layer_params = params[f"layer_{index}"] if separate else stacked
            (x, cache), aux = layer_step((x, cache), (layer_params, self.run.start + index))
            reports.append(aux)
        return x, cache, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)

    def _repeated(self, repeat, block, params, x, cos, sin, attend, train):
        if self.run.sparse:
            raise NotImplementedError("repeat: layers with experts report about themselves, which only a scan collects")

        def apply(layer_params, x, cos, sin):
            out: Any = block.apply(
                {"params": layer_params}, x, cos, sin, lambda *qkv: attend(None, 0, *qkv), train=train
            )
            return out[0]

        return repeat(apply, params, x, cos, sin)

    def _parameters(self, block: Block, layers: int, x: Array, cos: Array, sin: Array) -> Any:
        if self.is_initializing():

            def init(key):
                return block.init(key, x, cos, sin, lambda q, k, v: (q, None))["params"]

            stacked = jax.vmap(init)(jax.random.split(self.make_rng("params"), layers))
            stacked = nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})
            for name, tree in stacked.items():
                self.param(name, lambda _, tree=tree: tree)
        return nn.meta.unbox(self.variables["params"])


def _over_layers(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a scan cuts out of stacked layers, and how a layer's parameters come from its cut.

    A scan copies what it cuts, as kernels take whole arrays: all experts of a layer for the few that a step reads. A
    node of the tree with a method `over_layers()` says itself what is cut, and keeps the rest whole. Not over a mesh,
    where the layers' parts lie on different devices.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return params, lambda cut: cut
    nodes, tree = jax.tree.flatten(params, is_leaf=lambda node: hasattr(node, "over_layers"))
    pieces = [node.over_layers() if hasattr(node, "over_layers") else (node, lambda cut: cut) for node in nodes]
    cuts = [cut for cut, _ in pieces]
    return cuts, lambda cuts: tree.unflatten([join(cut) for cut, (_, join) in zip(cuts, pieces)])


class Decoder(nn.Module):
    """A decoder-only language model.

    Example:
        model = Decoder(config)
        params = init_params(model, jax.random.key(0))
        out = model.apply({"params": params}, tokens)

    Attributes:
        config: sizes and family traits.
        mlp: makes the MLP of a layer, see `default_mlp`.
        attention: replaces the attention used without a cache:
            `attention(q, k, v, *, positions, segment_ids, scale, window) -> out`.
        repeat: runs equal dense layers in place of a scan, without a cache: `repeat(apply, params, x, *shared) -> x`,
            where params are stacked, and apply(params of one layer, x, *shared) is the layer.
    """

    config: DecoderConfig
    mlp: Callable[[DecoderConfig, bool], nn.Module] = default_mlp
    attention: Callable[..., Array] | None = None
    repeat: Callable[..., Array] | None = None

    def setup(self):
        """Makes the submodules."""
        config = self.config
        self.embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=named(nn.initializers.normal(0.02), ("vocab", "embed")),
        )
        self.blocks = [Stack(config, run, self.mlp, self.repeat) for run in config.layer_runs()]
        self.final_norm = RMSNorm(config.rms_norm_eps, "embed", config.param_dtype)
        self.head = Linear(
            (config.vocab_size,),
            ("embed", "vocab"),
            dtype=config.dtype,
            out_dtype="float32",
            param_dtype=config.param_dtype,
            init_scale=0.02 * config.hidden_size**0.5,
        )

    def __call__(
        self,
        tokens: Int[ArrayLike, "b t"] | None,
        positions: Int[ArrayLike, "b t"] | None = None,
        segment_ids: Int[ArrayLike, "b t"] | None = None,
        cache: Cache | None = None,
        *,
        embeddings: Float[ArrayLike, "b t d"] | None = None,
        rope_positions: Int[ArrayLike, "3 b t"] | None = None,
        train: bool = False,
    ) -> DecoderOutput:
        """One pass over tokens, or over embeddings.

        Without a cache attention is causal, by index, inside each segment. With one, keys are written at `positions`
        and a query sees slots 0..position; -1 marks padding.

        Args:
            tokens: `[B,T]` ids; None with `embeddings`.
            positions: `[B,T]`; None counts from 0, anew in each segment.
            segment_ids: `[B,T]`, 0 = padding; only without a cache.
            cache: any `Cache`.
            embeddings: `[B,T,D]` in place of `tokens`.
            rope_positions: `[3,B,T]` M-RoPE positions; None uses `positions`.
            train: handed to the MLPs.

        Raises:
            ValueError: both or neither of tokens and embeddings, segment_ids with a cache, or shapes that differ.
        """
        config = self.config
        if (tokens is None) == (embeddings is None):
            raise ValueError("expected either tokens or embeddings, got " + ("neither" if tokens is None else "both"))
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids cannot be used with a cache: expected None; a cache's rows are one segment")
        given: Any = tokens if embeddings is None else embeddings
        batch, length = given.shape[:2]
        for name, value in (("positions", positions), ("segment_ids", segment_ids)):
            if value is not None and value.shape != (batch, length):
                raise ValueError(f"{name}: expected shape {(batch, length)}, got {value.shape}")
        if rope_positions is not None and rope_positions.shape != (3, batch, length):
            raise ValueError(f"rope_positions: expected shape {(3, batch, length)}, got {rope_positions.shape}")

        tokens, positions, segment_ids, embeddings, rope_positions = jax.tree.map(
            jnp.asarray, (tokens, positions, segment_ids, embeddings, rope_positions)
        )
        if positions is None:
            positions = _count(batch, length, segment_ids)
        x = self.embed(tokens) if embeddings is None else embeddings.astype(jnp.dtype(config.dtype))
        x = constrain(x, ("batch", "sequence", None))
        rope_positions = positions if rope_positions is None else rope_positions
        x, cache, aux = self.layers(x, positions, segment_ids, cache, rope_positions=rope_positions, train=train)
        hidden = self.final_norm(x)
        return DecoderOutput(self.unembed(hidden), hidden, cache, aux)

    def layers(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        cache: Cache | None = None,
        *,
        rope_positions: Int[Array, "b t"] | Int[Array, "3 b t"],
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Cache | None, dict[str, Any]]:
        """What lies between the embedding and the last norm: the residual stream after all layers, the cache, `aux`."""
        cos, sin = self._rope(rope_positions)
        aux = {}
        for index, (stack, run) in enumerate(zip(self.blocks, self.config.layer_runs())):
            attend = self._attend(positions, segment_ids, run.window)
            x, cache, report = stack(x, cache, cos, sin, attend, train=train)
            if report is not None:
                aux[f"blocks_{index}"] = report
        return x, cache, aux

    def unembed(self, hidden: Float[ArrayLike, "*batch d"]) -> Float[Array, "*batch v"]:
        """Logits, float32, of final hidden states."""
        hidden = jnp.asarray(hidden)
        # `inference.decode_params` gives tied models a head, too: the embedding, in the form of the other kernels.
        if not self.config.tie_word_embeddings or self.has_variable("params", "head"):
            return self.head(hidden)
        dtype = jnp.dtype(self.config.dtype)
        weight = self.embed.embedding.astype(dtype)
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden.astype(dtype), weight, contract, preferred_element_type=jnp.float32)

    def _rope(self, positions: Array) -> tuple[Array, Array]:
        rope = self.config.rope
        frequencies, magnitude = rope_frequencies(
            _head_dim(self.config),
            rope.rope_theta,
            rope.rope_type,
            factor=rope.factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            attention_factor=rope.attention_factor,
            mscale=rope.mscale,
            mscale_all_dim=rope.mscale_all_dim,
            truncate=rope.truncate,
        )
        return rope_tables(positions, frequencies, magnitude, rope.mrope_section)

    def _attend(self, positions: Array, segment_ids: Array | None, window: int | None) -> Callable:
        scale = _head_dim(self.config) ** -0.5

        def attend(cache, layer, q, k, v):
            if cache is not None:
                return cache.attend(layer, q, k, v, positions, scale=scale, window=window)
            if self.attention is not None:
                out = self.attention(q, k, v, positions=positions, segment_ids=segment_ids, scale=scale, window=window)
            else:
                out = split_attention(whole, q, k, v, segment_ids)
            return out, None

        def whole(q, k, v, segment_ids):
            return flash_attention(q, k, v, segment_ids=segment_ids, scale=scale, window=window)

        return attend


def _count(batch: int, length: int, segment_ids: Array | None) -> Int[Array, "b t"]:
    """Positions 0, 1, ... that start again wherever the segment changes."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def abstract_params(model: Decoder) -> Any:
    """The parameter tree as shapes, boxed with logical axis names: what `jaxlab.core.shardings` takes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)["params"]


def init_params(model: Decoder, key: Array) -> Any:
    """Fresh parameters: truncated normal by fan-in, 0.02 for the embedding and the head, residual outputs / sqrt(2L).

    Args:
        model: the decoder.
        key: a JAX PRNG key.

    Returns:
        The tree of the specification, plain arrays in `param_dtype`. Jit with `out_shardings` to make it sharded.
    """
    return _init(model, key)


@jax.jit(static_argnums=0)
def _init(model, key):
    return nn.meta.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32))["params"])


def head_weight(params: Any) -> Float[Array, "d v"]:
    """The head's matrix `[D,V]`, tied to the embedding or not."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
