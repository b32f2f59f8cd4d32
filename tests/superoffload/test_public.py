import inspect
import textwrap
from pathlib import Path

import pytest

from jaxlab import superoffload


def test_names():
    assert sorted(superoffload.__all__) == dir(superoffload)
    for name in superoffload.__all__:
        assert inspect.getdoc(getattr(superoffload, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        superoffload.no_such_name  # noqa: B018


def test_the_example_runs():
    example = superoffload.__doc__.partition("Example:\n")[2].partition("Names are loaded")[0]
    names = {}
    exec(textwrap.dedent(example), names)
    assert int(names["state"].count) == 1
    assert float(names["params"]["b"][0]) < 0


def test_contract():
    """Positional parameters, then keyword-only ones behind the star, as section 10 of the spec has them."""
    expected = {
        superoffload.make_buckets: "params * bucket_bytes split pad_to trainable order apart",
        superoffload.flatten: "tree spec",
        superoffload.unflatten: "buckets spec like",
        superoffload.cast_bucket: "x dtype * where",
        superoffload.fused_adamw: (
            "p m v g * count lr b1 b2 eps weight_decay scale mode bias_correction emit_dtype backend"
        ),
        superoffload.scale_by_host_adam: "b1 b2 eps * backend",
        superoffload.host_adamw: "lr b1 b2 eps weight_decay mask * backend",
        superoffload.AdamHyper: "lr b1 b2 eps weight_decay mode bias_correction",
        superoffload.init_state: "params spec",
        superoffload.speculate: "state grads hyper * scale undo backend capacity donate reuse",
        superoffload.validate: "grads * scale clip_norm clip_eps axis_name",
        superoffload.commit: "state",
        superoffload.rollback: "state log * donate",
        superoffload.replay: "state grads hyper * scale coef backend donate",
        superoffload.LossScaleConfig: "init_scale window hysteresis consecutive_hysteresis min_scale raise_at_min",
        superoffload.init_loss_scale: "config",
        superoffload.update_loss_scale: "state overflow config",
        superoffload.SuperOffloadConfig: (
            "bucket_bytes split clip_norm clip_eps speculation undo backend compute_dtype loss_scale steps_per_update "
            "offload_ratio nonfinite cpu_cores_share worker_timeout_s"
        ),
        superoffload.SuperOffload: "loss optimizer config * plan mesh decay_mask",
        superoffload.SuperOffload.init: "self params",
        superoffload.SuperOffload.train_step: "self state batch",
        superoffload.SuperOffload.apply_gradients: "self state grads",
        superoffload.SuperOffload.master: "self state",
        superoffload.SuperOffload.moments: "self state",
        superoffload.Segmented: "fns head",
    }
    for function, words in expected.items():
        positional, _, keyword = words.partition(" * ")
        parameters = inspect.signature(function).parameters.values()
        kinds = {name: kind is inspect.Parameter.KEYWORD_ONLY for name, kind in ((p.name, p.kind) for p in parameters)}
        assert [name for name, alone in kinds.items() if not alone] == positional.split(), function
        assert [name for name, alone in kinds.items() if alone] == keyword.split(), function
    assert superoffload.Verdict._fields == ("norm", "finite", "coef")


def test_no_public_name_is_a_module():
    """A module of the same name would take its place as soon as someone imports it."""
    folder = Path(superoffload.__file__).parent
    assert not {file.stem for file in folder.glob("*.py")} & set(superoffload.__all__)
