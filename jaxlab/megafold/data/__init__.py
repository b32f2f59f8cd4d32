"""The data pipeline: from structure and alignment files to batches."""

from jaxlab.megafold.data.synthetic import synthetic_batch

__all__ = ["synthetic_batch"]
