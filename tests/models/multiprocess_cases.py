"""Loading and saving on 8 devices, whether one process has them all or two have four each."""

import jax
import numpy as np

from jaxlab.core import make_mesh
from jaxlab.models import load_pretrained, save_pretrained
from tests.models.checkpoints import write


def case_load_and_save_over_a_mesh(folder):
    source = folder / f"in-{jax.process_index()}"
    write(source, "mixtral")
    whole = load_pretrained(source)[1]
    # `node` goes across the processes: each holds half of the experts and reads no others.
    model, params = load_pretrained(source, mesh=make_mesh({"node": 2, "fsdp": 2, "tensor": 2}))

    def check(array, expected):
        assert array.shape == expected.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])

    jax.tree.map(check, params, whole)
    gate = params["blocks_0"]["mlp"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 2, 8, 8)}
    save_pretrained(folder / "out", model, params, max_shard_bytes=20_000)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(folder / "out")[1], whole)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("in-")) == ["out"]
