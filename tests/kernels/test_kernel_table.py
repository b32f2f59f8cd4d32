import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import kernel_table
from tests.oracles import grouped_matmul as oracle


def test_every_kernel_is_in_the_table():
    folder = Path(pallas_kernels.__file__).parent
    assert {op.name.partition(",")[0] for op in kernel_table.OPS} == {
        api.parent.name for api in folder.glob("*/api.py")
    }


def test_page_of_one_small_op(monkeypatch):
    monkeypatch.setattr(kernel_table, "GPUS", ())
    sizes = jnp.array([2, 1], jnp.int32)
    arrays = (jnp.ones((4, 3)), jnp.ones((2, 3, 2)), sizes)
    op = dataclasses.replace(
        kernel_table.OPS[0], arrays=lambda: arrays, implementations=("xla", "reference"), peer="reference"
    )
    page = "\n".join(kernel_table.lines([op]))
    assert jax.__version__ in page
    assert "## grouped_matmul" in page
    row = next(line for line in page.splitlines() if line.startswith("| `xla`"))
    value, gradients = (float(cell) for cell in row.split("|")[2:4])
    assert value == 0 and gradients < 1e-6  # noqa: PT018
    again = "\n".join(kernel_table.lines([op], kernel_table.sections(page)))
    assert again == page  # times would differ
    np.testing.assert_array_equal(oracle.grouped_matmul(*map(np.asarray, arrays))[:, 0], [3, 3, 3, 0])
