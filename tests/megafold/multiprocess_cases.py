"""Operations on pairs, and the objective of training, over 8 devices against one: values and every gradient.

The cases are the collectives of each kind and the objective; they run in 2 processes with 4 devices each.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.core import make_mesh
from jaxlab.megafold import ops
from jaxlab.megafold.config import AF3Config, Kernels
from jaxlab.megafold.data import synthetic_batch
from jaxlab.megafold.modules import initial_params
from jaxlab.megafold.objective import LossSettings, objective
from jaxlab.megafold.sharding import pair_sharded
from pallas_kernels.layernorm_linear import layernorm_linear
from pallas_kernels.transition import transition
from pallas_kernels.triangle_multiplication import triangle_multiplication

DEVICES = 8
TOKENS, DEPTH, CHANNELS, HEADS, WIDTH = 16, 5, 8, 2, 4
HIDDEN = 12  # of the triangle multiplication; the devices do not divide it
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}  # a program that runs once

TINY = dataclasses.replace(
    AF3Config.tiny(),
    **dict.fromkeys(("c_s", "c_token", "c_atom"), 16),
    **dict.fromkeys(("c_z", "c_m", "c_atompair", "c_template"), 8),
    **dict.fromkeys(("pair_head_dim", "opm_channels", "msa_head_dim", "max_msa_rows", "diffusion_samples"), 4),
    **dict.fromkeys(("pairformer_blocks", "token_blocks"), 1),
    max_tokens=16,
    max_atoms=64,
    remat=False,
    kernels=Kernels(*["reference"] * 4),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An operation with its arguments; `options` are static."""

    op: Callable[..., Any]
    arrays: Mapping[str, np.ndarray]
    weights: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _problems() -> dict[str, Problem]:
    rng = np.random.default_rng(0)

    def normal(*shape, scale=0.3):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    def norm(size):
        return 1 + normal(size), normal(size)

    def valid(*shape):
        return rng.random(shape) < 0.8

    n, c, heads = TOKENS, CHANNELS, HEADS * WIDTH
    z, tokens = normal(1, n, n, c, scale=1), valid(1, n)
    pairs = {"z": z, "mask": valid(1, n, n)}
    attention = {name: normal(c, heads) for name in ("w_q", "w_k", "w_v", "w_gate")}
    attention |= {"w_bias": normal(c, HEADS, scale=1), "w_out": normal(heads, c), "b_q": normal(heads)}
    triangle = {"ln_in": norm(c), "w_proj": normal(c, 2 * HIDDEN), "w_gate": normal(c, 2 * HIDDEN)}
    triangle |= {"ln_out": norm(HIDDEN), "w_out": normal(HIDDEN, c), "w_out_gate": normal(c, c)}
    outer = {"ln_in": norm(c), "w_a": normal(c, 4), "w_b": normal(c, 4), "w_out": normal(16, c), "b_out": normal(c)}
    averaging = {"ln_m": norm(c), "ln_z": norm(c), "w_bias": normal(c, HEADS, scale=1)}
    averaging |= {"w_v": normal(c, heads), "w_gate": normal(c, heads), "w_out": normal(heads, c)}
    biased = {"ln_s": norm(c), "ln_z": norm(c), **attention}
    alignment = {"m": normal(1, DEPTH, n, c, scale=1), "mask": valid(1, DEPTH, n)}
    swiglu = {"scale": normal(c), "offset": normal(c), "w_in": normal(c, 8), "w_out": normal(4, c)}
    return {
        "starting": Problem(ops.triangle_attention, pairs, {"ln_in": norm(c), **attention}),
        "ending": Problem(ops.triangle_attention, pairs, {"ln_in": norm(c), **attention}, {"node": "ending"}),
        "outgoing": Problem(triangle_multiplication, pairs, triangle),
        "incoming": Problem(triangle_multiplication, {"z": z}, triangle, {"direction": "incoming"}),
        "outer": Problem(ops.outer_product_mean, alignment, outer, {"row_chunk": 1}),
        "averaging": Problem(ops.pair_weighted_averaging, {"m": alignment["m"], "z": z, "mask": tokens}, averaging),
        "tokens": Problem(ops.attention_pair_bias, {"s": normal(1, n, c, scale=1), "z": z, "mask": tokens}, biased),
        "samples": Problem(ops.attention_pair_bias, {"s": normal(1, 8, n, c, scale=1), "z": z}, biased),
        "few_samples": Problem(
            ops.attention_pair_bias, {"s": normal(1, 3, n, c, scale=1), "z": z, "mask": tokens}, biased
        ),
        "transition": Problem(transition, {"x": z}, swiglu),
        "linear": Problem(layernorm_linear, {"x": z}, {"scale": normal(c), "offset": normal(c), "w": normal(c, 3)}),
    }


PROBLEMS = _problems()


def sharded(problem: Problem, mesh: Any) -> Callable[..., Any]:
    """The operation over the devices."""
    return pair_sharded(problem.op.__name__, mesh)


def step(op: Callable[..., Any], problem: Problem) -> Callable[..., Any]:
    """(arrays, weights) -> (gradients of the floating ones, value)."""

    def loss(floating, weights, masks):
        y = op(**floating, **masks, **weights, **problem.options)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    def run(arrays, weights):
        floating = {name: x for name, x in arrays.items() if x.dtype != bool}
        masks = {name: x for name, x in arrays.items() if x.dtype == bool}
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(floating, weights, masks)

    return run


@functools.cache
def program(name: str, devices: int) -> Any:
    """Compiled; inputs and results whole on every device."""
    problem = PROBLEMS[name]
    if devices == 1:
        return jax.jit(step(problem.op, problem), compiler_options=QUICK_TO_COMPILE)
    mesh = make_mesh({"pair": devices})
    everywhere = NamedSharding(mesh, PartitionSpec())
    function = step(sharded(problem, mesh), problem)
    return jax.jit(function, out_shardings=everywhere, compiler_options=QUICK_TO_COMPILE)


def check(name: str) -> None:
    """Over 8 devices as on one: values to 1e-5, gradients to 1e-4, of the largest number of each."""
    problem = PROBLEMS[name]
    (got, got_y), (want, want_y) = (
        jax.tree.map(
            lambda x: np.asarray(x.addressable_data(0)), program(name, devices)(problem.arrays, problem.weights)
        )
        for devices in (DEVICES, 1)
    )
    assert_close(got_y, want_y, 1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        # Of the offset of a bias the gradient is zero, but for rounding.
        assert_close(ours, theirs, 1e-4, floor=1e-2 * largest, where=jax.tree_util.keystr(path))


def assert_close(got: Any, want: Any, bound: float, *, floor: float = 0.0, where: str = "") -> None:
    """Relative to the largest number, which counts for no less than `floor`."""
    error = np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), floor)
    assert error <= bound, (where, error)


def case_ending(folder):
    check("ending")


def case_incoming(folder):
    check("incoming")


def case_tokens(folder):
    check("tokens")


def case_outer(folder):
    check("outer")


def case_training(folder):
    """The loss of a batch, its parts, and every weight's gradient; process 0 compares them."""
    config = dataclasses.replace(TINY, max_atoms=96, template_blocks=0, msa_blocks=0)
    settings, key, rng = LossSettings(confidence=0.0), jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(initial_params, config), key)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)

    def loss(params, batch):
        return objective(params, batch, jax.random.key(1), config=config, settings=settings)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK_TO_COMPILE)

    def run(mesh):
        given = params, synthetic_batch(config, key)
        if mesh is not None:
            given = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), step(*given))

    (got_loss, got_parts), got = run(make_mesh({"pair": DEVICES}))
    if jax.process_index():
        return
    (want_loss, want_parts), want = run(None)
    assert_close(got_loss, want_loss, 1e-5)
    for name, value in want_parts.items():
        assert_close(got_parts[name], value, 1e-5, floor=1e-6, where=name)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, 1e-4, floor=1e-2 * largest, where=jax.tree_util.keystr(path))
