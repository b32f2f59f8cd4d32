"""A method applied to every sparse layer of a decoder, which stays an ordinary decoder."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlab.puzzlemoe.baselines.methods import METHODS
from jaxlab.puzzlemoe.calibration import check_moe, collect_expert_stats, layer_inputs
from jaxlab.puzzlemoe.config import check_name, num_pairs
from jaxlab.puzzlemoe.layer import MoELayer
from jaxlab.puzzlemoe.pairing import random_pairs

_WEIGHTS = ("gate", "up", "down")


def apply_method(
    name: str,
    model: Any,
    params: Any,
    batches: Iterable[Int[Array | np.ndarray, "b t"]],
    *,
    ratio: float,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Compresses all sparse layers by one of `METHODS`; all see the activations of the model as it was.

    The inputs of all sparse layers are in memory at once, `[L, tokens, d]`. Merged experts are tied as copies, and
    PuzzleMoE's are decoded, so the parameters do not get smaller, except by "drop" and "naee".

    Args:
        name: of the method.
        model: a `Decoder` with experts, its router a softmax.
        params: its parameters.
        batches: calibration tokens, all of one shape; a batch is one of a method's calibration batches.
        ratio: fraction of the experts that goes, as in `PuzzleConfig`; of no consequence to Wanda.
        seed: of pairs and draws; pairs are those of `compress_moe` with this seed.

    Returns:
        An ordinary decoder and its parameters.

    Raises:
        ValueError: an unknown method, no experts, a sigmoid router, no batches or batches of several shapes, a ratio
            that removes nothing.
    """
    check_name("name", name, tuple(METHODS))
    check_moe(model, params)
    spec = model.config.moe
    if spec.scoring != "softmax":
        raise ValueError(f"methods are for softmax routers, got moe.scoring={spec.scoring!r}")
    removed = num_pairs(spec.num_experts, ratio)
    batches = [np.asarray(tokens) for tokens in batches]
    if len({tokens.shape for tokens in batches}) > 1:
        raise ValueError(f"batches must have one shape, got {sorted({tokens.shape for tokens in batches})}")
    stats = collect_expert_stats(model, params, batches)
    inputs = jnp.stack([layer_inputs(model, params, tokens) for tokens in batches], axis=1)

    new, done, experts = dict(params), 0, 0
    for index, run in enumerate(model.config.layer_runs()):
        if not run.sparse:
            continue
        block = f"blocks_{index}"
        mlp = params[block]["mlp"]
        layers = []
        for at in range(run.stop - run.start):
            router, *weights = (leaf[at] for leaf in (mlp["router"]["kernel"], *(mlp[w] for w in _WEIGHTS)))
            layer = MoELayer(router, *weights, top_k=spec.top_k, norm_topk_prob=spec.renormalise, act="silu")
            key = jax.random.fold_in(jax.random.key(seed), done)
            layers.append(
                METHODS[name](
                    layer,
                    inputs[done],
                    stats.layer(done),
                    spec.num_experts - removed,
                    pairs=random_pairs(key, spec.num_experts, ratio),
                    seed=int(jax.random.bits(key) >> 1),
                )
            )
            done += 1
        joined: dict[str, Any] = {
            w: jnp.stack([getattr(layer, w) for layer in layers]).astype(mlp[w].dtype) for w in _WEIGHTS
        }
        joined["router"] = {"kernel": jnp.stack([layer.router for layer in layers])}
        experts = layers[0].num_experts
        new[block] = {**params[block], "mlp": {**mlp, **joined}}
    smaller = dataclasses.replace(spec, num_experts=experts, top_k=min(spec.top_k, experts))
    return model.clone(config=dataclasses.replace(model.config, moe=smaller)), new
