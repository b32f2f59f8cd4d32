"""Where tokens stand: image grids checked, and the three position streams of M-RoPE (arXiv:2409.12191, section 2.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlab.models.qwen2_5_vl.config import Config

ArrayLike = Array | np.ndarray


def host_grid(image_grid_thw: Any, merge: int) -> Int[np.ndarray, "images 3"]:
    """A grid as host integers `[n_images,3]`, checked.

    Raises:
        TypeError: traced, or not integers.
        ValueError: not three positive numbers an image, or patches that do not merge.
    """
    if isinstance(image_grid_thw, jax.core.Tracer):
        raise TypeError("image_grid_thw: expected host integers, static under jit, got a traced array")
    grid = np.asarray(image_grid_thw)
    if not np.issubdtype(grid.dtype, np.integer):
        raise TypeError(f"image_grid_thw: expected integers, got {grid.dtype}")
    if grid.ndim != 2 or grid.shape[1] != 3 or (grid < 1).any():
        raise ValueError(f"image_grid_thw: expected [n_images, 3] positive numbers, got {grid.tolist()}")
    if (grid[:, 1:] % merge).any():
        raise ValueError(f"image_grid_thw: expected heights and widths divisible by {merge}, got {grid.tolist()}")
    return grid.astype(np.int32)


def check_placeholders(input_ids: Any, tokens: int, image_token_id: int) -> None:
    """Compares placeholders with the tokens that images give; traced ids cannot be looked at, and pass.

    Raises:
        ValueError: the numbers differ.
    """
    if isinstance(input_ids, jax.core.Tracer):
        return
    placeholders = int(np.sum(np.asarray(input_ids) == image_token_id))
    if placeholders != tokens:
        raise ValueError(
            f"input_ids: expected a placeholder (id {image_token_id}) for each of the {tokens} tokens of the images, "
            f"got {placeholders}"
        )


def mrope_index(
    input_ids: Int[ArrayLike, "b t"],
    image_grid_thw: Any = None,
    attention_mask: Any = None,
    *,
    config: Config,
) -> tuple[Int[ArrayLike, "3 b t"], Int[ArrayLike, "b 1"]]:
    """Positions in time, height and width.

    Text counts on in all three; an image's tokens stand at their place in its grid, beyond all that came before; what
    follows starts one past the largest. Of host arrays the result is NumPy's.

    Args:
        input_ids: `[B,T]`, images as runs of placeholders.
        image_grid_thw: `[n_images,3]` host integers, the images of all rows in reading order.
        attention_mask: `[B,T]`, 0 where padded, on either side; positions there are unspecified.
        config: names the placeholder and the merge.

    Returns:
        positions `[3,B,T]` int32, and delta `[B,1]` int32 = largest position + 1 - T: what is added to a token's index
        in decoding.

    Raises:
        ValueError: the placeholders are not as many as the tokens of the grids, or a bad grid.
    """
    merge = config.vision.spatial_merge_size
    grid = np.zeros((0, 3), np.int32) if image_grid_thw is None else host_grid(image_grid_thw, merge)
    traced = isinstance(input_ids, jax.core.Tracer) or isinstance(attention_mask, jax.core.Tracer)
    xp: Any = jnp if traced else np
    ids = xp.asarray(input_ids)
    check_placeholders(input_ids, int(np.prod(grid, axis=1).sum()) // merge**2, config.image_token_id)
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {ids.shape}, got {attention_mask.shape}")
    valid = xp.ones(ids.shape, bool) if attention_mask is None else xp.asarray(attention_mask) != 0
    places, advances = _image_tokens(grid, merge)
    is_image = valid & (ids == config.image_token_id)
    # Placeholders are counted through the batch: the n-th is the n-th token of all images.
    token = xp.cumsum(is_image.reshape(-1)).reshape(ids.shape) - 1
    token = xp.where(is_image, xp.clip(token, 0, len(advances) - 2), len(advances) - 1)  # the last one is text's
    advance = xp.where(valid, xp.asarray(advances)[token], 0)
    start = xp.cumsum(advance, axis=1) - advance
    positions = start[None] + xp.moveaxis(xp.asarray(places)[token], -1, 0)
    delta = xp.sum(advance, axis=1, keepdims=True) - ids.shape[1]
    return positions.astype(xp.int32), delta.astype(xp.int32)


def _image_tokens(grid: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every image token, and of text at the end: its place in the grid, and how far it moves what follows.

    An image moves what follows once, by its largest extent, at its last token.
    """
    places, advances = [], []
    for sizes in grid // (1, merge, merge):
        places.append(np.indices(sizes).reshape(3, -1).T)
        advances.append(np.zeros(len(places[-1]), np.int32))
        advances[-1][-1] = sizes.max()
    text = np.zeros((1, 3), np.int32), np.ones(1, np.int32)
    return np.concatenate([*places, text[0]]).astype(np.int32), np.concatenate([*advances, text[1]])
