"""The emoji task: small pictures with captions, and pairs of which one is the true edit of the other.

Noto Color Emoji draws a person in five skin tones and as a man and as a woman, and hearts, circles and squares in many
colours: "man cook light skin tone" -> "man cook dark skin tone", "man cook" -> "woman cook", "red heart" -> "blue
heart". A part of the concepts is held out, so that the true target of an edit can be measured and was never trained on.

Needs the extra `images`, and the font for all but `packaged_pairs`, a sheet of held-out pairs that comes with the
package (rendered from Noto Color Emoji, Copyright 2013 Google LLC, SIL Open Font License 1.1).
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxlab.core import DataUnavailable
from jaxlab.core.errors import require

SIZE = 32
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink")
FAMILIES = ("tone", "gender", "colour")
SHEET = Path(__file__).with_name("packaged") / "held_out.png"
"""The sheet of `packaged_pairs`; captions are in the JSON file beside it."""

_POINTS = 109  # the one size that the font has bitmaps for: 136 x 128 pixels
_BITMAP = (136, 128)
_FULLY_QUALIFIED = 2
_TONE = re.compile(rf"\b({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone\b")
_GENDERED = {"man", "men", "woman", "women"}
_PEOPLE = _GENDERED | {"person", "people", "and"}
# One concept each, whatever the caption: mirrored, or named by age or gender.
_SAME = {
    " facing right": "",
    "older": "old",
    "mermaid": "merperson",
    "merman": "merperson",
    "princess": "with crown",
    "prince": "with crown",
    "Mrs. Claus": "Claus",
    "Mx Claus": "Claus",
    "Santa Claus": "Claus",
}
_MANY_COLOURS = 4
_LIKE = 1e-3  # mean squared difference, 30 dB, below which two pictures count as one
_PLACES = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
_FONT = "NotoColorEmoji.ttf"


@dataclasses.dataclass(frozen=True)
class Pair:
    """An edit whose outcome is known.

    Attributes:
      family: one of `FAMILIES`.
      source: caption of the picture that is edited.
      target: caption of what it is to become.
      word: of the target, which says what changes: the blend word.
    """

    family: str
    source: str
    target: str
    word: str


@dataclasses.dataclass(frozen=True)
class Emoji:
    """Captioned pictures, and what of them is held out.

    Attributes:
      captions: one each, no two the same.
      images: `[N, 32, 32, 3]` uint8 on white.
      train: numbers of those that may be trained on.
      held_out: pairs for testing, their targets and everything like them not in `train`.
    """

    captions: tuple[str, ...]
    images: UInt8[np.ndarray, "n 32 32 3"]
    train: tuple[int, ...]
    held_out: tuple[Pair, ...]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {caption: index for index, caption in enumerate(self.captions)}

    def image(self, caption: str) -> UInt8[np.ndarray, "32 32 3"]:
        """The picture of a caption.

        Raises:
          KeyError: there is none.
        """
        return self.images[self._index[caption]]

    def weights(self, shares: dict[str, float]) -> np.ndarray:
        """`[len(train)]` probabilities for training: each family's share, spread evenly over its pictures.

        Args:
          shares: of "people" (one skin tone at most, or a gender), "colour" and "rest".
        """
        kinds = [_kind(self.captions[index], self._colours) for index in self.train]
        counts = collections.Counter(kinds)
        weights = np.array([shares[kind] / counts[kind] for kind in kinds])
        return weights / weights.sum()

    @functools.cached_property
    def _colours(self) -> set[str]:
        return {caption for group in _coloured(self.captions).values() for caption in group.values()}


def find_font(path: str | os.PathLike | None = None) -> Path:
    """Noto Color Emoji on this machine: the path given, else what fontconfig knows, else the usual folders.

    Raises:
      DataUnavailable: it is nowhere; the message says which package brings it.
    """
    if path is not None:
        if Path(path).is_file():
            return Path(path)
        raise DataUnavailable(f"font: expected the file of Noto Color Emoji, there is no {path}")
    searched = []
    if shutil.which("fc-list"):
        told = subprocess.run(["fc-list", ":family=Noto Color Emoji", "file"], capture_output=True, text=True).stdout
        found = [name for line in told.splitlines() if (name := line.strip().rstrip(":")).endswith(_FONT)]
        if found:
            return Path(sorted(found)[0])
        searched.append("fontconfig")
    for folder in (Path(place).expanduser() for place in _PLACES):
        if found := sorted(folder.rglob(_FONT)) if folder.is_dir() else []:
            return found[0]
        searched.append(str(folder))
    raise DataUnavailable(
        f"font: {_FONT} is not on this machine; looked in {', '.join(searched)}. Debian and Ubuntu have it in the "
        "package fonts-noto-color-emoji"
    )


@functools.lru_cache(maxsize=2)
def load(font: str | os.PathLike | None = None, *, fraction: float = 0.28, seed: int = 0) -> Emoji:
    """All emoji that the font draws as one picture, in the order of their captions, with the split.

    Sequences that the font does not join into one glyph, that it leaves blank, and unqualified spellings are left out.

    A concept is what a caption says beside skin tone and gender ("cook"); mirrored people and ages count as the same.
    Of the concepts with skin tones or genders a part is held out: of those nothing is trained on but the untoned
    picture of no gender ("cook", which is yellow). Of shapes in many colours, some of those colours are held out that
    another shape is trained in. Nothing pixel-like a held-out target is trained on.

    Args:
      font: path of NotoColorEmoji.ttf; None: as `find_font` finds it.
      fraction: of concepts, and of the colours of a shape, that is held out.
      seed: of that choice.

    Raises:
      MissingExtra: Pillow or `emoji` are not installed.
      DataUnavailable: no font, or a Pillow that cannot lay out sequences.
    """
    captions, images = render(find_font(font))
    index = {caption: number for number, caption in enumerate(captions)}
    concepts = sorted({concept(caption) for caption in captions if _edits(caption, index)})
    held_concepts = _chosen(concepts, fraction, seed)
    groups = _coloured(captions)
    held_colours = {name: _held_colours(name, groups, fraction, seed) for name in groups}
    held_captions = {groups[name][colour] for name, chosen in held_colours.items() for colour in chosen}

    pairs = [
        pair
        for caption in captions
        if concept(caption) in held_concepts
        for pair in _edits(caption, index)
        # The font draws some nearly the same.
        if not _alike(images[index[pair.source]], images[index[pair.target]][None]).any()
    ]
    for name, group in groups.items():
        for colour, target in sorted(group.items()):
            if colour in held_colours[name]:
                pairs += [
                    Pair("colour", source, target, colour) for source in group.values() if source not in held_captions
                ]
    targets = images[sorted({index[pair.target] for pair in pairs})]
    train = []
    for number, caption in enumerate(captions):
        if caption in held_captions:
            continue
        if concept(caption) in held_concepts and (_TONE.search(caption) or _GENDERED & set(caption.split())):
            continue
        if not _alike(images[number], targets).any():
            train.append(number)
    return Emoji(captions, images, tuple(train), tuple(pairs))


@functools.lru_cache(maxsize=2)
def render(font: Path, size: int = SIZE) -> tuple[tuple[str, ...], UInt8[np.ndarray, "n s s 3"]]:
    """Captions, sorted, and pictures on white of every emoji that the font draws as one glyph.

    Raises:
      MissingExtra: Pillow or `emoji` are not installed.
      DataUnavailable: Pillow was built without RAQM, which joins sequences into one glyph.
    """
    emoji, image, draw, imagefont, features = (
        require(name, "images") for name in ("emoji", "PIL.Image", "PIL.ImageDraw", "PIL.ImageFont", "PIL.features")
    )
    if not features.check("raqm"):
        raise DataUnavailable("Pillow: expected one built with RAQM, which joins sequences; its wheels from PyPI are")
    face = imagefont.truetype(str(font), _POINTS, layout_engine=imagefont.Layout.RAQM)
    side = max(_BITMAP)
    found = {}
    for text, told in emoji.EMOJI_DATA.items():
        if told["status"] != _FULLY_QUALIFIED or face.getlength(text) > side + 1:
            continue
        canvas = image.new("RGB", (side, side), "white")
        place = ((side - _BITMAP[0]) // 2, (side - _BITMAP[1]) // 2)
        draw.Draw(canvas).text(place, text, font=face, embedded_color=True)
        if np.asarray(canvas).min() < 255:
            found[told["en"].strip(":").replace("_", " ")] = canvas.resize((size, size), image.Resampling.LANCZOS)
    captions = tuple(sorted(found))
    return captions, np.stack([np.asarray(found[caption]) for caption in captions])


def concept(caption: str) -> str:
    """What a caption says beside skin tone, gender and number of people."""
    text = _TONE.sub("", caption)
    for name, same in _SAME.items():
        text = text.replace(name, same)
    return " ".join(word for word in text.split() if word not in _PEOPLE)


def _alike(image: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`[N]`: whether a picture is nearly one of others, `[N, 32, 32, 3]`."""
    difference = (others.astype(np.float32) - image) / 255
    return np.square(difference).mean(axis=(-3, -2, -1)) < _LIKE


def _edits(caption: str, known: Collection[str]) -> list[Pair]:
    """The edits of a person: to the other end of the skin tones, and from man to woman."""
    pairs = []
    if _TONE.findall(caption) == ["light"]:
        target = caption.replace("light skin tone", "dark skin tone")
        pairs.append(Pair("tone", caption, target, "dark"))
    words = caption.split()
    if words[0] == "man":
        pairs.append(Pair("gender", caption, " ".join(["woman", *words[1:]]), "woman"))
    return [pair for pair in pairs if pair.target in known]


def _coloured(captions: Iterable[str]) -> dict[str, dict[str, str]]:
    """Shape -> colour -> caption, of shapes in at least four colours."""
    groups: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for caption in captions:
        colours = [word for word in caption.split() if word in COLOURS]
        if len(colours) == 1:
            groups[" ".join(word for word in caption.split() if word not in COLOURS)][colours[0]] = caption
    return {name: group for name, group in sorted(groups.items()) if len(group) >= _MANY_COLOURS}


def _held_colours(name: str, groups: dict[str, dict[str, str]], fraction: float, seed: int) -> set[str]:
    """Colours that a shape is not trained in: every colour is trained with the shape that is first in its order."""
    elsewhere = set()
    for colour in groups[name]:
        shapes = [shape for shape in groups if colour in groups[shape]]
        if min(shapes, key=lambda shape: _place(f"{colour}/{shape}")) != name:
            elsewhere.add(colour)
    return _chosen(sorted(elsewhere), fraction * len(groups[name]) / max(1, len(elsewhere)), seed, name)


def _kind(caption: str, coloured: set[str]) -> str:
    """Which share of the training a picture belongs to; two people of two tones are not of "people"."""
    if caption in coloured:
        return "colour"
    tones = len(_TONE.findall(caption))
    return "people" if tones == 1 or (tones == 0 and caption.split()[0] in {"man", "woman", "person"}) else "rest"


def _chosen(names: Sequence[str], fraction: float, seed: int, purpose: str = "") -> set[str]:
    """A part of some names, those first in an order that depends on each name alone."""
    return set(sorted(names, key=lambda name: _place(f"{seed}/{purpose}/{name}"))[: round(fraction * len(names))])


def _place(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def balanced(pairs: Sequence[Pair], count: int, *, seed: int = 0) -> tuple[Pair, ...]:
    """So many pairs, as evenly from the families as they have them, in an order that the seed decides.

    Raises:
      ValueError: there are fewer.
    """
    if count > len(pairs):
        raise ValueError(f"count: expected at most the {len(pairs)} pairs there are, got {count}")
    random = np.random.default_rng(seed)
    queues = [[pair for pair in pairs if pair.family == family] for family in FAMILIES]
    queues = [[queue[int(place)] for place in random.permutation(len(queue))] for queue in queues]
    taken: list[Pair] = []
    while len(taken) < count:
        for queue in queues:
            if queue and len(taken) < count:
                taken.append(queue.pop())
    return tuple(taken)


def packaged_pairs() -> tuple[tuple[Pair, ...], UInt8[np.ndarray, "n 32 32 3"], UInt8[np.ndarray, "n 32 32 3"]]:
    """Held-out pairs that come with the package, with their source and target pictures; needs no font."""
    image = require("PIL.Image", "images")
    pairs = tuple(Pair(**told) for told in json.loads(SHEET.with_suffix(".json").read_text()))
    sheet = np.asarray(image.open(SHEET).convert("RGB"))
    rows = sheet.reshape(sheet.shape[0] // SIZE, SIZE, sheet.shape[1] // SIZE, SIZE, 3).swapaxes(1, 2)
    tiles = rows.reshape(-1, 2, SIZE, SIZE, 3)[: len(pairs)]
    return pairs, tiles[:, 0], tiles[:, 1]


def save_sheet(emoji: Emoji, pairs: Sequence[Pair], path: Path, *, columns: int = 8) -> None:
    """Writes pairs as `packaged_pairs` reads them: source and target side by side, `columns` pairs in a row."""
    from jaxlab import core

    image = require("PIL.Image", "images")
    rows = -(-len(pairs) // columns)
    sheet = np.full((rows, columns, 2, SIZE, SIZE, 3), 255, np.uint8)
    for number, pair in enumerate(pairs):
        sheet[number // columns, number % columns] = emoji.image(pair.source), emoji.image(pair.target)
    pixels = sheet.transpose(0, 3, 1, 2, 4, 5).reshape(rows * SIZE, columns * 2 * SIZE, 3)
    file: Any = io.BytesIO()
    image.fromarray(pixels).save(file, "PNG", optimize=True)
    core.replace_file(path, file.getvalue())
    core.replace_file(path.with_suffix(".json"), json.dumps([dataclasses.asdict(pair) for pair in pairs], indent=0))
