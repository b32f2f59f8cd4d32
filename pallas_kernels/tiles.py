"""What the tiles of all Triton kernels must be."""

import dataclasses
from typing import Any


def check_tiles(tiles: Any) -> None:
    """Holds a dataclass of tiles to what Triton takes: sizes, then `warps` and `stages`.

    Raises:
        ValueError: a size that is no power of two or below 16, unusual warps, or no stage.
    """
    for field in dataclasses.fields(tiles):
        name, value = field.name, getattr(tiles, field.name)
        if name == "warps":
            if value not in (1, 2, 4, 8, 16):
                raise ValueError(f"Tiles.warps must be 1, 2, 4, 8 or 16, got {value}")
        elif name == "stages":
            if value < 1:
                raise ValueError(f"Tiles.stages must be at least 1, got {value}")
        elif value < 16 or value & (value - 1):
            raise ValueError(f"Tiles.{name} must be a power of two and at least 16, got {value}")
