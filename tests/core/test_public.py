import dataclasses
import inspect
import subprocess
import sys

import pytest

from jaxlab import core
from jaxlab.core import errors


def test_every_name_is_there_and_documented():
    for name in core.__all__:
        value = getattr(core, name)
        assert inspect.getdoc(value) or name in ("MESH_AXES", "DEFAULT_RULES")
    assert sorted(core.__all__) == dir(core)
    with pytest.raises(AttributeError, match="no_such_name"):
        core.no_such_name  # noqa: B018


def test_functions_are_not_shadowed_by_their_modules():
    import jaxlab.core.progress

    assert callable(jaxlab.core.progress)


def test_importing_is_light():
    code = (
        "import sys; import jaxlab.core; from jaxlab.core import tasks, errors, jsonl, progress; "
        "heavy = {'jax', 'flax', 'orbax', 'rich', 'omegaconf', 'matplotlib', 'pooch', 'tensorboardX', 'torch'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_missing_extra_is_named():
    with pytest.raises(core.MissingExtra, match=r"pip install 'jaxlab\[splats\]'"):
        errors.require("no_such_module", "splats")
    assert errors.require("json", "x").dumps(1) == "1"
    assert issubclass(core.MissingExtra, ImportError)
    assert issubclass(core.CheckpointError, ValueError)
    assert issubclass(core.DataUnavailable, FileNotFoundError)


def test_compat_is_the_kernels():
    from pallas_kernels import compat

    assert core.compat.compute_on is compat.compute_on


def test_contract():
    """The signatures that ten systems are written against."""
    expected = {
        core.load_config: ["cls", "path", "overrides"],
        core.make_mesh: ["shape", "devices"],
        core.shardings: ["abstract", "mesh", "rules"],
        core.distributed.run_local: ["argv", "processes", "devices"],
        core.Checkpointer: ["folder", "keep"],
        core.Checkpointer.save: ["self", "step", "state", "extra"],
        core.Checkpointer.restore: ["self", "like", "step"],
        core.MetricsLogger: ["folder"],
        core.progress: ["iterable", "label", "total"],
        core.tasks.map: ["fn", "items", "workers", "timeout_s", "retries", "ray", "folder"],
        core.data_path: ["name", "download"],
        core.named_key: ["key", "name"],
        core.image_metrics.psnr: ["a", "b", "data_range", "per_channel"],
        core.Report: ["system", "title", "metrics", "tables", "plots", "notes", "synthetic"],
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(names)] == names
        added = list(parameters.values())[len(names) :]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added)
    assert [field.name for field in dataclasses.fields(core.tasks.TaskResult)] == ["item", "value", "error"]
