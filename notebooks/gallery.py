"""Takes the gallery's pictures out of the saved notebooks: `python notebooks/gallery.py` writes docs/gallery/*.png.

`execute.py --save` does so, too. Pictures that the evidence has are not taken from here.
"""

import base64
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "docs" / "gallery"
PICTURES = {
    "foundation_plan": ("00_foundation", 3),
    "xmoe_rows": ("01_xmoe", 3),
    "sfpo_update": ("05_sfpo", 0),
    "eaglet_walks": ("06_eaglet", 0),
    "vlm_scaling_questions": ("07_vlm_scaling", 0),
    "voltanallm_staircase": ("08_voltanallm", 0),
    "instantedit_inversion": ("09_instantedit", 0),
    "instantedit_edits": ("09_instantedit", 2),
    "flexgaussian_compressed": ("10_flexgaussian", 0),
    "pipeline_commands": ("11_pipeline", 1),
    "pipeline_watts": ("11_pipeline", 4),
}
"""Name -> notebook, and which of its pictures, counted from 0."""


def picture(notebook: str, number: int) -> bytes:
    """A picture of a saved notebook.

    Raises:
      ValueError: it has not so many.
    """
    cells = json.loads((HERE / f"{notebook}.ipynb").read_text())["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    found = [data["image/png"] for data in outputs if "image/png" in data]
    if number >= len(found):
        raise ValueError(f"number: expected less than {len(found)}, the pictures of {notebook}.ipynb, got {number}")
    return base64.b64decode("".join(found[number]))


def write() -> None:
    """Writes the pictures that have changed, and removes those that are not listed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (notebook, number) in PICTURES.items():
        content, path = picture(notebook, number), FOLDER / f"{name}.png"
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    for path in FOLDER.glob("*.png"):
        if path.stem not in PICTURES:
            path.unlink()


if __name__ == "__main__":
    write()
