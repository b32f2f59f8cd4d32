"""Bits of each attribute by what they cost and what they bring (ours; the paper has one set for all scenes)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlab.flexgaussian.cameras import Camera
from jaxlab.flexgaussian.compressed import CODED, dequantize, quantize
from jaxlab.flexgaussian.config import QuantConfig
from jaxlab.flexgaussian.rasteriser import render
from jaxlab.flexgaussian.scene import GaussianScene, checked

BITS = (4, 8, 16)
Sensitivities = Mapping[str, Mapping[int, tuple[float, int]]]
"""Attribute -> bits -> the mean square difference of images when it alone is quantised so, and bytes of its codes."""


def sensitivities(scene: GaussianScene, cameras: Sequence[Camera], quant: QuantConfig | None = None) -> Sensitivities:
    """What each choice of bits does by itself.

    Args:
      scene: N Gaussians.
      cameras: at least one.
      quant: segments and order; None: the default.
    """
    scene, quant = checked(scene), quant or QuantConfig()
    if not cameras:
        raise ValueError("cameras: expected at least one")
    whole: dict[str, Any] = dict.fromkeys(CODED, 16)
    exact = dataclasses.replace(quant, **whole, position="fixed24")
    shown = _renders(dequantize(quantize(scene, exact)), cameras)
    table = {}
    for name in CODED:
        table[name] = {}
        for bits in BITS:
            changed: dict[str, Any] = {name: bits}
            compressed = quantize(scene, dataclasses.replace(exact, **changed))
            images = shown if bits == 16 else _renders(dequantize(compressed), cameras)
            error = float(np.mean([np.mean(np.square(a - b)) for a, b in zip(images, shown)]))
            table[name][bits] = error, compressed.codes[name].packed.nbytes
    return table


def allocate(table: Sensitivities, min_psnr: float, quant: QuantConfig | None = None) -> QuantConfig:
    """The fewest bits whose errors together stay below a target, if errors add up.

    Greedy: from 16 bits on, the step that saves the most bytes for its error is taken as long as the target holds.

    Args:
      table: of `sensitivities`.
      min_psnr: in dB against images in [0, 1].
      quant: what else is set; None: the default.
    """
    most = 10 ** (-min_psnr / 10)
    chosen = dict.fromkeys(table, BITS[-1])

    def error(choice: Mapping[str, int]) -> float:
        return sum(table[name][bits][0] for name, bits in choice.items())

    while True:
        steps = [{**chosen, name: b} for name, bits in chosen.items() for b in BITS if b < bits]
        steps = [step for step in steps if error(step) <= most]
        if not steps:
            found: dict[str, Any] = chosen
            return dataclasses.replace(quant or QuantConfig(), **found)
        chosen = max(steps, key=lambda step: _saved(table, chosen, step) / max(error(step) - error(chosen), 1e-15))


def _saved(table: Sensitivities, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    return sum(table[name][before[name]][1] - table[name][after[name]][1] for name in table)


def _renders(scene: GaussianScene, cameras: Sequence[Camera]) -> list[np.ndarray]:
    scene = jax.device_put(scene)
    return [np.clip(np.asarray(render(scene, camera)), 0, 1) for camera in cameras]
