# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # VoltanaLLM
#
# A GPU that serves a language model runs at its highest clock, although most of the time a lower one would do.
# [VoltanaLLM](https://arxiv.org/abs/2509.04827) reads prompts on some GPUs and draws tokens on others, and chooses the
# clock of each before every iteration: the lowest one that a small linear model says is fast enough. Here: why that
# pays, a cluster in simulation, and our own engine, serving over HTTP.

# %%
# %matplotlib inline
import jax
import numpy as np

from jaxlab.core.figures import COLOURS, figure
from jaxlab.inference import (
    Client,
    DisaggregatedEngine,
    Engine,
    EngineConfig,
    IterationMetrics,
    SamplingParams,
    generate,
)
from jaxlab.models import ByteTokenizer
from jaxlab.models.decoder import Decoder, DecoderConfig, init_params
from jaxlab.voltanallm import EcoFreq, PowerModel, SimulatedGPU, create_app, served, sweet_spot
from jaxlab.voltanallm import pictures as measured_pictures
from jaxlab.voltanallm.profiling import profile_decode
from jaxlab.voltanallm.sim import ClusterConfig, SimModels, Simulator, Trace, pictures, sharegpt
from jaxlab.voltanallm.study import SimulationConfig, Way, study

# %% [markdown]
# ## The staircase
#
# How long Llama-3-8B's iteration takes on an A100, from a measured profile of its layers. Each step of 128 requests
# opens another row of tiles. Lower clocks are modelled: reading weights and caches takes what it takes, products go
# with the clock.

# %%
models = SimModels.preset("llama-3.1-8b-a100")
batch = np.arange(1, 520)
drawn, axes = figure()
for clock, colour in zip((1410, 1200, 1005), COLOURS):
    axes.plot(batch, models.decode.predict(clock, batch, 400 * batch), color=colour, label=f"{clock} MHz")
    axes.plot(
        batch, models.decode_table.predict(clock, batch, 400 * batch), color=colour, linewidth=0.8, linestyle="--"
    )
axes.axhline(50, color="#222222", linewidth=0.8)
axes.text(4, 51, "objective", fontsize=8)
axes.set_xlabel("requests decoded together (400 tokens each)")
axes.set_ylabel("ms an iteration")
axes.legend(frameon=False, title="dashed: as predicted")
drawn

# %% [markdown]
# ## The U
#
# Power falls faster than speed as long as the voltage falls with the clock; below that knee, time only gets longer.

# %%
power = PowerModel()
drawn, axes = figure(7.0, 3.2)
clocks = np.arange(600, 1411, 15)
truth = models.prefill.predict(clocks, 16, np.full(len(clocks), 4000))
axes.plot(clocks, power.power_w(clocks, "prefill", 1.0) * truth / 1000, color=COLOURS[0])
axes.set_xlabel("MHz")
axes.set_ylabel("J to read 4000 tokens")
energy = power.energy_table(models.decode_table)
print("cheapest of the paper's clocks to decode 64 requests:", sweet_spot(energy, batch=64, tokens=64 * 400), "MHz")
drawn

# %% [markdown]
# ## A decision
#
# The controller sees the batch and its tokens, and takes the lowest clock predicted to be fast enough. Beyond its
# table, or where requests wait, it takes the highest.

# %%
controller = EcoFreq(models.decode_table, (1005, 1095, 1200, 1305, 1410), slo_ms=50.0, margin=0.0)
for running in (20, 120, 140, 250, 280, 400, 5000):
    seen = IterationMetrics(0.0, running=running, total=running, tokens=600 * running, waiting=0)
    print(f"{running:5} requests: {controller.decide([seen], now=0.0)} MHz")

# %% [markdown]
# ## A cluster, simulated
#
# Two GPUs read, two draw; arrivals with the lengths of ShareGPT. What low clocks save they pay for with time: requests
# stay longer, and batches grow.

# %%
lengths = sharegpt()
trace = Trace.from_lengths(lengths.prompt, lengths.output, rate=90, num_requests=2700)
config = SimulationConfig(ways=("ecofreq/state_space",), margin=0.0)
chosen = config.controller(Way.read(config.ways[0]))
run = Simulator(ClusterConfig(2, 2), trace, "state_space", chosen, models).run(record=True)
print(
    f"{run.energy_j / 1000:.1f} kJ, {run.clock_switches} switches, "
    f"{run.ttft_attainment:.1%} of first tokens and {run.itl_token_attainment:.1%} of tokens in time"
)
pictures.clocks(trace, run, start=12.0, stop=30.0, tile=128)

# %% [markdown]
# What ways of choosing save, by load, and what becomes of the objectives. The last one is ours: it plans over the queue
# and looks for the batch that a clock leads to.

# %%
compared = SimulationConfig(
    rates=(20, 40, 60, 80, 100),
    seconds=30,
    margin=0.0,
    ways=("1410", "1005", "ecofreq/state_space", "model_predictive/min_delta_energy"),
)
outcomes, made_up = study(compared)
measured_pictures.savings(outcomes)

# %%
measured_pictures.attainment(outcomes)

# %% [markdown]
# ## Our own engine
#
# Requests come and go at every step; keys and values lie in pages. What a request gets does not depend on its mates:

# %%
tokenizer = ByteTokenizer()
small = Decoder(
    DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
)
params = init_params(small, jax.random.key(0))
sizes = EngineConfig(129, max_running=8, prefill_chunk=64, kv_dtype="float32")
engine = Engine(small, params, sizes)
prompts = [list(range(1, 5 + 9 * row)) for row in range(6)]
greedy = SamplingParams(max_tokens=20, temperature=0.0)
mine = [output.token_ids for output in engine.generate(prompts, greedy)]
plain = np.asarray(generate(small, params, prompts, greedy).tokens).tolist()
print("the tokens of generate:", mine == plain, "| pages free again:", engine.free_pages == sizes.num_pages - 1)

# %% [markdown]
# It has a staircase of its own, at the sizes that batches are padded to. The clocks are simulated: times were measured
# at one, and stretched by a model for the other.

# %%
engine.warmup()
samples = profile_decode(engine, freqs=(1005, 1410), steps=24)
table = samples.fit(boundaries=sizes.batch_buckets)
measured_pictures.staircase(samples, table)

# %% [markdown]
# ## Served
#
# A prefill and a decode worker behind OpenAI's API, each with a simulated GPU. A controller sets the decode worker's
# clock.

# %%
with DisaggregatedEngine.local(small, params, sizes, num_prefill=1, num_decode=1) as workers:
    gpus = {worker.id: SimulatedGPU((1005, 1410)) for worker in workers.workers()}
    decoding = next(worker.id for worker in workers.workers() if worker.mode == "decode")
    chooser = EcoFreq(table, (1005, 1410), slo_ms=50.0)
    app = create_app(
        workers, model_name="small", tokenizer=tokenizer, gpu=gpus, controller={decoding: chooser}, warm=False
    )
    with served(app) as url, Client(f"{url}/v1", model="small") as client:
        answer = client.complete("Twelve volts", max_tokens=24, temperature=0.0)
        pieces = [piece.text for piece in client.stream_complete("Twelve volts", max_tokens=24, temperature=0.0)]
        print("clocks:", {worker: gpu.clock() for worker, gpu in gpus.items()})
    print("a stream is the whole:", "".join(pieces) == answer.text, "|", answer.usage)
    print("keys and values moved from worker to worker:", workers.kv_bytes_moved, "bytes")
assert "".join(pieces) == answer.text
