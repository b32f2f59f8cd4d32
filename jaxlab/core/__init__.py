"""Floor 0: configuration, meshes, checkpoints, metrics, data files, reports, plans.

    from jaxlab.core import load_config, make_mesh, shardings
    mesh = make_mesh({"data": -1, "tensor": 2})
    where = shardings(jax.eval_shape(model.init, key, tokens), mesh)

Names are loaded when they are first used, so that importing this package costs nothing. `distributed`, `tasks`, `plan`,
`jsonl`, `statistics`, `image_metrics`, `deprecation` and `compat` are modules of it.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy
from jaxlab.core.errors import CheckpointError, DataUnavailable, MissingExtra
from jaxlab.core.progress import progress

if TYPE_CHECKING:
    from jaxlab.core import compat, deprecation, distributed, image_metrics, jsonl, plan, statistics, tasks
    from jaxlab.core.checkpoint import Checkpointer
    from jaxlab.core.compilation import count_compilations
    from jaxlab.core.config import load_config, save_config, to_dict
    from jaxlab.core.config_files import find_config
    from jaxlab.core.data import data_path
    from jaxlab.core.folders import kept_or_temporary, replace_file
    from jaxlab.core.keys import named_key
    from jaxlab.core.mesh import DEFAULT_RULES, MESH_AXES, make_mesh, shardings
    from jaxlab.core.metrics import MetricsLogger
    from jaxlab.core.report import Report

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "CheckpointError",
    "Checkpointer",
    "DataUnavailable",
    "MetricsLogger",
    "MissingExtra",
    "Report",
    "compat",
    "count_compilations",
    "data_path",
    "deprecation",
    "distributed",
    "find_config",
    "image_metrics",
    "jsonl",
    "kept_or_temporary",
    "load_config",
    "make_mesh",
    "named_key",
    "plan",
    "progress",
    "replace_file",
    "save_config",
    "shardings",
    "statistics",
    "tasks",
    "to_dict",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "checkpoint": ("Checkpointer",),
        "compilation": ("count_compilations",),
        "config": ("load_config", "save_config", "to_dict"),
        "config_files": ("find_config",),
        "data": ("data_path",),
        "folders": ("kept_or_temporary", "replace_file"),
        "keys": ("named_key",),
        "mesh": ("DEFAULT_RULES", "MESH_AXES", "make_mesh", "shardings"),
        "metrics": ("MetricsLogger",),
        "report": ("Report",),
    },
    modules=("compat", "deprecation", "distributed", "image_metrics", "jsonl", "plan", "statistics", "tasks"),
)
