"""InstantEdit: text-guided editing of a real image in four steps up and four down (arXiv 2508.06033).

Example:
    import jax, jax.numpy as jnp
    from jaxlab.instantedit import PeRFlowSchedule

    schedule = PeRFlowSchedule()
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    up, _ = schedule.inverse_step(jnp.zeros_like(z), 250, 0, z)

Names are loaded when they are first used, so that importing this package costs nothing. `metrics` and `baselines` are
modules of it.
"""

from typing import TYPE_CHECKING

from jaxlab.core import lazy

if TYPE_CHECKING:
    from jaxlab.instantedit import baselines, metrics
    from jaxlab.instantedit.align import align_tokens, word_weights
    from jaxlab.instantedit.attention_map import blend_mask
    from jaxlab.instantedit.config import EditConfig, InversionConfig
    from jaxlab.instantedit.edges import canny
    from jaxlab.instantedit.evaluation import EditCase, Evaluation, case_of, evaluate
    from jaxlab.instantedit.grid import picture_grid
    from jaxlab.instantedit.guidance import dpg, ili
    from jaxlab.instantedit.inversion import Inversion
    from jaxlab.instantedit.network import EditorNetwork
    from jaxlab.instantedit.pie_bench import PieEdit, read_pie_bench
    from jaxlab.instantedit.pipeline import EditResult, EditTrace, InstantEditPipeline
    from jaxlab.instantedit.rle import rle_to_mask
    from jaxlab.instantedit.scheduler import PeRFlowSchedule, Window

__all__ = [
    "EditCase",
    "EditConfig",
    "EditResult",
    "EditTrace",
    "EditorNetwork",
    "Evaluation",
    "InstantEditPipeline",
    "Inversion",
    "InversionConfig",
    "PeRFlowSchedule",
    "PieEdit",
    "Window",
    "align_tokens",
    "baselines",
    "blend_mask",
    "canny",
    "case_of",
    "dpg",
    "evaluate",
    "ili",
    "metrics",
    "picture_grid",
    "read_pie_bench",
    "rle_to_mask",
    "word_weights",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "align": ("align_tokens", "word_weights"),
        "attention_map": ("blend_mask",),
        "config": ("EditConfig", "InversionConfig"),
        # Not a module `canny`: once imported it would hide the function.
        "edges": ("canny",),
        "evaluation": ("EditCase", "Evaluation", "case_of", "evaluate"),
        "grid": ("picture_grid",),
        "guidance": ("dpg", "ili"),
        "inversion": ("Inversion",),
        "network": ("EditorNetwork",),
        "pie_bench": ("PieEdit", "read_pie_bench"),
        "pipeline": ("EditResult", "EditTrace", "InstantEditPipeline"),
        "rle": ("rle_to_mask",),
        "scheduler": ("PeRFlowSchedule", "Window"),
    },
    modules=("baselines", "metrics"),
)
