"""PIE-Bench (Ju et al. 2024, arXiv:2310.01506): 700 images with two prompts, an edit type and a mask each.

    data/mapping_file.json    data/annotation_images/0_random_140/000000000000.jpg ...

    for edit in read_pie_bench("data", types={1, 8}):
        edit.source_prompt, edit.target_prompt, edit.blend_word, edit.image(), edit.mask()

The benchmark is had from its authors. Its file is read as what a stranger wrote: sizes are bounded, and paths stay
within the folder.
"""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from jaxlab.instantedit.image_io import prepare_image, read_image, to_uint8
from jaxlab.instantedit.rle import rle_to_mask
from jaxlab.instantedit.tokens import strip_brackets

EDIT_TYPES = (
    "random", "change object", "add object", "delete object", "change content", "change pose", "change color",
    "change material", "change background", "change style",
)  # fmt: skip
"""By number, `editing_type_id`."""

SIDE = 512
_MAX_BYTES, _MAX_EDITS, _MAX_TEXT = 256 * 2**20, 100_000, 10_000
_ID = re.compile(r"\w[\w.-]{0,99}")


@dataclasses.dataclass(frozen=True)
class PieEdit:
    """One edit.

    Attributes:
      id: its key in the mapping file.
      path: of the source image.
      source_prompt: describes the image; without brackets.
      target_prompt: describes the edited image; without brackets.
      edit_type: index into `EDIT_TYPES`.
      instruction: the edit as a request.
      blend_words: the object in the source's and in the target's words; None where there is none.
      runs: the mask's, see `rle_to_mask`.
    """

    id: str
    path: Path
    source_prompt: str
    target_prompt: str
    edit_type: int
    instruction: str
    blend_words: tuple[str, str] | None
    runs: tuple[int, ...]

    @property
    def blend_word(self) -> str | None:
        """The target's word."""
        return None if self.blend_words is None else self.blend_words[1]

    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The source image, 512 x 512.

        Raises:
          ValueError: another size, or not an image.
          MissingExtra: Pillow is absent.
        """
        pixels = to_uint8(prepare_image(read_image(self.path)))
        if pixels.shape != (SIDE, SIDE, 3):
            raise ValueError(f"{self.path}: expected {SIDE} x {SIDE} pixels, got {pixels.shape[0]} x {pixels.shape[1]}")
        return pixels

    def mask(self, *, border: bool = True) -> Bool[np.ndarray, "h w"]:
        """True where the image is to be edited.

        Args:
          border: the outermost pixels are True, too, as in the benchmark's evaluator.
        """
        mask = rle_to_mask(self.runs, shape=(SIDE, SIDE))
        if border:
            mask[[0, -1]] = True
            mask[:, [0, -1]] = True
        return mask


def read_pie_bench(folder: str | os.PathLike[str], *, types: Collection[int] | None = None) -> list[PieEdit]:
    """The edits of a copy of the benchmark, in its order.

    Args:
      folder: with `mapping_file.json` and `annotation_images`.
      types: edit types to keep; None: all.

    Raises:
      FileNotFoundError: no mapping file, or an image of it is absent.
      ValueError: a file too large, damaged, or with an entry that does not fit; the message names the entry.
    """
    folder = Path(folder)
    if types is not None and (unknown := sorted(set(types) - set(range(len(EDIT_TYPES))))):
        raise ValueError(f"types: expected numbers below {len(EDIT_TYPES)}, got {unknown}")
    mapping = folder / "mapping_file.json"
    if not mapping.is_file():
        raise FileNotFoundError(f"no PIE-Bench: {mapping} does not exist")
    if (size := mapping.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{mapping}: expected at most {_MAX_BYTES} bytes, got {size}")
    try:
        entries = json.loads(mapping.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{mapping}: expected JSON: {error}") from error
    if not isinstance(entries, dict) or len(entries) > _MAX_EDITS:
        raise ValueError(f"{mapping}: expected an object of at most {_MAX_EDITS} edits")
    images = (folder / "annotation_images").resolve()
    edits = []
    for key, entry in entries.items():
        try:
            edit = _parsed(key, entry, images)
        except ValueError as error:
            raise ValueError(f"{mapping}, edit {key[:100]!r}: {error}") from error
        if types is None or edit.edit_type in types:
            edits.append(edit)
    absent = [str(edit.path) for edit in edits if not edit.path.is_file()]
    if absent:
        raise FileNotFoundError(f"PIE-Bench: {len(absent)} images do not exist: {', '.join(absent[:10])}")
    return edits


def _parsed(key: str, entry: Any, images: Path) -> PieEdit:
    if not _ID.fullmatch(key):
        raise ValueError("expected a name of letters, digits, dots and dashes")
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    number = _text(entry, "editing_type_id")
    if number not in map(str, range(len(EDIT_TYPES))):
        raise ValueError(f"editing_type_id: expected '0' to '{len(EDIT_TYPES) - 1}', got {number[:20]!r}")
    path = (images / _text(entry, "image_path")).resolve()
    if not path.is_relative_to(images) or path == images:
        raise ValueError(f"image_path: expected a path within {images.name}, got {entry['image_path']!r}")
    words = _text(entry, "blended_word").split()
    if len(words) == 1:
        raise ValueError(f"blended_word: expected a source and a target word or nothing, got {words[0]!r}")
    return PieEdit(
        id=key,
        path=path,
        source_prompt=strip_brackets(_text(entry, "original_prompt")),
        target_prompt=strip_brackets(_text(entry, "editing_prompt")),
        edit_type=int(number),
        instruction=_text(entry, "editing_instruction"),
        blend_words=(words[0], words[1]) if words else None,
        runs=_runs(entry.get("mask")),
    )


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"{name}: expected text of at most {_MAX_TEXT} characters, got {type(value).__name__}")
    return value


def _runs(runs: Any) -> tuple[int, ...]:
    """Runs within the image: a last one that reaches over the end is cut, as the benchmark's evaluator does."""
    pixels = SIDE * SIDE
    if not isinstance(runs, list) or len(runs) % 2 or len(runs) > 2 * pixels:
        raise ValueError("mask: expected a list of (start, length) pairs")
    if not all(type(value) is int and 0 <= value <= pixels for value in runs):
        raise ValueError(f"mask: expected whole numbers from 0 to {pixels}")
    return tuple(
        value for start, length in zip(runs[::2], runs[1::2]) for value in (start, min(length, pixels - start))
    )
