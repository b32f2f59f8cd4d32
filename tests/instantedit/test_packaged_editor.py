import dataclasses

import numpy as np
import pytest

from jaxlab.instantedit import emoji as task
from jaxlab.instantedit import study
from jaxlab.instantedit.small_editor import PACKAGED, load_editor


@pytest.fixture(scope="module")
def cases():
    pairs, sources, targets = task.packaged_pairs()
    return study.cases_of(pairs[:24], dict(zip(pairs, zip(sources, targets))).__getitem__)


def psnr(images, references):
    return -10 * np.log10(np.square((images.astype(float) - references) / 255).mean(axis=(1, 2, 3)))


def test_it_is_small():
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) < 10 * 2**20


@pytest.mark.latest
def test_it_edits_towards_targets_it_never_saw(cases):
    pipeline = load_editor()
    sources = np.stack([case.source_image() for case in cases])
    targets = np.stack([case.target_image() for case in cases])
    same = [
        dataclasses.replace(case, id=f"same {case.id}", target_prompt=case.source_prompt, blend_word=None)
        for case in cases
    ]
    editor = study.Batched(
        pipeline.network, pipeline.tokenizer, [*cases, *same], study.instant_edit(study.BASE), draws=False
    )
    edited = np.stack([editor(case, 0) for case in cases])
    assert (psnr(edited, targets) - psnr(sources, targets)).mean() > 1
    np.testing.assert_array_equal(np.stack([editor(case, 0) for case in same]), sources)
