"""The data pipeline: from structure and alignment files to batches.

Example:
    import jax
    from jaxlab.core import data_path
    from jaxlab.megafold.config import AF3Config
    from jaxlab.megafold.data import FeatureCache, crop, make_batch

    cache, config, key = FeatureCache("out/features"), AF3Config.tiny(), jax.random.key(0)
    msas = {"A": data_path("af3/msa/721p-assembly1A_protein.a3m")}
    features = cache.get(data_path("af3/mmcif/721p-assembly1.cif"), msas=msas)
    batch = make_batch([crop(features, key, max_tokens=64)], config, key)

What is built once (`featurize`, kept by `FeatureCache`) is deterministic; what is drawn (`crop`, `make_batch`) comes
from keys alone: a run with the cache sees the same batches as one without. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.megafold.data.a3m import MSA, A3MError, parse_a3m
    from jaxlab.megafold.data.batch import make_batch
    from jaxlab.megafold.data.cache import CacheCorruptionError, CacheStats, FeatureCache
    from jaxlab.megafold.data.cropping import crop
    from jaxlab.megafold.data.featurization import Options, featurize
    from jaxlab.megafold.data.jobs import Chain, Job, from_sequences, read_job
    from jaxlab.megafold.data.layout import with_coords
    from jaxlab.megafold.data.mmcif import MMCIFError, read_mmcif, write_mmcif
    from jaxlab.megafold.data.prefetch import Prefetch
    from jaxlab.megafold.data.structure import Structure
    from jaxlab.megafold.data.synthetic import synthetic_batch

__all__ = [
    "MSA",
    "A3MError",
    "CacheCorruptionError",
    "CacheStats",
    "Chain",
    "FeatureCache",
    "Job",
    "MMCIFError",
    "Options",
    "Prefetch",
    "Structure",
    "crop",
    "featurize",
    "from_sequences",
    "make_batch",
    "parse_a3m",
    "read_job",
    "read_mmcif",
    "synthetic_batch",
    "with_coords",
    "write_mmcif",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "a3m": ("MSA", "A3MError", "parse_a3m"),
        "batch": ("make_batch",),
        "cache": ("CacheCorruptionError", "CacheStats", "FeatureCache"),
        "cropping": ("crop",),
        "featurization": ("Options", "featurize"),
        "jobs": ("Chain", "Job", "from_sequences", "read_job"),
        "layout": ("with_coords",),
        "mmcif": ("MMCIFError", "read_mmcif", "write_mmcif"),
        "prefetch": ("Prefetch",),
        "structure": ("Structure",),
        "synthetic": ("synthetic_batch",),
    },
)
