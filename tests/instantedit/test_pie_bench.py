import json

import numpy as np
import pytest

from jaxlab.instantedit.pie_bench import EDIT_TYPES, read_pie_bench

pillow = pytest.importorskip("PIL.Image")

ENTRY = {
    "image_path": "0_random_140/000000000000.jpg",
    "original_prompt": "a slanted mountain bicycle on the road",
    "editing_prompt": "a slanted [rusty] mountain bicycle on the road",
    "editing_instruction": "Make the frame rusty",
    "editing_type_id": "0",
    "blended_word": "bicycle bike",
    "mask": [513, 3, 1024, 2],
}


def _folder(tmp_path, entries, side=512):
    image = tmp_path / "annotation_images" / ENTRY["image_path"]
    image.parent.mkdir(parents=True)
    pillow.new("RGB", (side, side), (10, 20, 30)).save(image)
    (tmp_path / "mapping_file.json").write_text(json.dumps(entries))
    return tmp_path


def test_edits(tmp_path):
    other = ENTRY | {"editing_type_id": "9", "blended_word": "", "mask": [0, 262144]}
    folder = _folder(tmp_path, {"000000000000": ENTRY, "900": other})
    first, second = read_pie_bench(folder)
    assert first.target_prompt == "a slanted rusty mountain bicycle on the road"
    assert (first.id, first.edit_type, first.blend_word) == ("000000000000", 0, "bike")
    assert first.blend_words == ("bicycle", "bike")
    assert (EDIT_TYPES[second.edit_type], second.blend_word) == ("change style", None)
    assert first.image().shape == (512, 512, 3)
    assert np.abs(first.image()[0, 0].astype(int) - [10, 20, 30]).max() <= 2
    inner = first.mask(border=False)
    assert np.flatnonzero(inner).tolist() == [513, 514, 515, 1024, 1025]
    bordered = first.mask()
    assert bordered[1:-1, 1:-1].sum() == 4  # the fifth lies on the border
    assert bordered.sum() == 4 + 4 * 511
    assert second.mask(border=False).all()
    assert [edit.id for edit in read_pie_bench(folder, types={9})] == ["900"]


def test_a_run_over_the_end_is_cut(tmp_path):
    [edit] = read_pie_bench(_folder(tmp_path, {"1": ENTRY | {"mask": [262142, 9]}}))
    assert np.flatnonzero(edit.mask(border=False)).tolist() == [262142, 262143]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_path": "../../secret.png"}, "image_path: expected a path within annotation_images"),
        ({"image_path": "/etc/passwd"}, "image_path: expected a path within"),
        ({"image_path": ""}, "image_path: expected a path within"),
        ({"editing_type_id": "10"}, "editing_type_id: expected '0' to '9', got '10'"),
        ({"editing_type_id": 3}, "editing_type_id: expected text"),
        ({"editing_prompt": None}, "editing_prompt: expected text"),
        ({"original_prompt": "x" * 10_001}, "original_prompt: expected text of at most 10000"),
        ({"blended_word": "one"}, "blended_word: expected a source and a target word"),
        ({"mask": [1]}, r"mask: expected a list of \(start, length\) pairs"),
        ({"mask": "1 2"}, "mask: expected a list"),
        ({"mask": [-1, 2]}, "mask: expected whole numbers from 0 to 262144"),
        ({"mask": [0, 1.5]}, "mask: expected whole numbers"),
        ({"mask": [0, 10**30]}, "mask: expected whole numbers"),
        ({"mask": [True, 1]}, "mask: expected whole numbers"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, change, said):
    with pytest.raises(ValueError, match=rf"mapping_file\.json, edit '7': {said}"):
        read_pie_bench(_folder(tmp_path, {"7": ENTRY | change}))


def test_files_that_do_not_fit(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no PIE-Bench: .*mapping_file\.json does not exist"):
        read_pie_bench(tmp_path)
    folder = _folder(tmp_path, {"../7": ENTRY})
    with pytest.raises(ValueError, match=r"edit '\.\./7': expected a name of letters"):
        read_pie_bench(folder)
    for content, said in (
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected an object of at most"),
        ('{"7": 3}', "expected an object, got int"),
    ):
        (folder / "mapping_file.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_pie_bench(folder)
    (folder / "mapping_file.json").write_text(json.dumps({"7": ENTRY | {"image_path": "absent.jpg"}}))
    with pytest.raises(FileNotFoundError, match=r"1 images do not exist: .*absent\.jpg"):
        read_pie_bench(folder)
    with pytest.raises(ValueError, match=r"types: expected numbers below 10, got \[11\]"):
        read_pie_bench(folder, types={1, 11})
    monkeypatch.setattr("jaxlab.instantedit.pie_bench._MAX_BYTES", 10)
    with pytest.raises(ValueError, match="expected at most 10 bytes"):
        read_pie_bench(folder)


def test_images_of_another_size(tmp_path):
    [edit] = read_pie_bench(_folder(tmp_path, {"7": ENTRY}, side=64))
    with pytest.raises(ValueError, match="expected 512 x 512 pixels, got 64 x 64"):
        edit.image()
