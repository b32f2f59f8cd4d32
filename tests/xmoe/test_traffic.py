"""What compiled layers send across and inside nodes, against counts made from routing, and what overlaps."""

import numpy as np

from jaxlab.xmoe import MoEConfig, Topology, dispatch_volume
from jaxlab.xmoe.traffic import bound, layer_plan, windows
from tests.aot import needs_aot

MESH = {"node": 2, "expert": 4}
TOKENS = 64


def layer(**fields):
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 128, "ffn_size": 64, "activation": "silu"}
    return MoEConfig(**sizes, expert_axes=tuple(MESH), **fields)


@needs_aot
def test_a_padded_exchange_sends_what_is_counted():
    cfg = layer(dispatch="padded", drop_policy="probs")
    made = bound(layer_plan(cfg, TOKENS, MESH))
    moved = dispatch_volume(np.zeros((8, TOKENS, 4), np.int32), cfg, Topology(8, 4))["padded"]
    # Both directions, and the eighth that stays on its device.
    assert made.across == 2 * (moved.inter_bytes + moved.intra_bytes) // 8 * 8 // 7
    assert made.inside == 0


@needs_aot
def test_shared_expert_runs_during_the_exchange_and_rows_have_room():
    cfg = layer(dispatch="rbd", pilot="rail", num_shared_experts=2, recv_buffer_factor=1.5)
    made = layer_plan(cfg, TOKENS, MESH, options={"xla_gpu_enable_latency_hiding_scheduler": True})
    found = windows(made.hlo)
    assert len(found) >= 4  # pilots, their copies, and both back
    during = [name for window in found if not window.synchronous for name in window.meanwhile]
    assert any("GatedMLP" in name and "dot_general" in name for name in during)
    # A token crosses to each of two nodes at most once, in either direction.
    row = 128 * 2
    rows = 2 * TOKENS * 2 * row
    assert rows <= bound(made).across <= 1.2 * rows
    choices = np.argsort(np.random.default_rng(0).random((8, TOKENS, 16)), axis=-1)[..., :4]
    assert dispatch_volume(choices, cfg, Topology(8, 4))["rbd"].inter_bytes / 8 <= bound(made).across / 2
