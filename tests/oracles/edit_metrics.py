"""Structure distance of two images, in float64, from what a network says of them."""

import numpy as np


def resized(image, side, antialias):
    """Bilinear to a square: the triangle filter at pixel centres, widened by the ratio where it antialiases."""

    def weights(size):
        ratio = size / side
        width = max(ratio, 1.0) if antialias else 1.0
        centres = (np.arange(side) + 0.5) * ratio - 0.5
        if not antialias:
            centres = np.clip(centres, 0, size - 1)
        table = np.maximum(0, 1 - np.abs(np.arange(size)[None] - centres[:, None]) / width)
        return table / table.sum(axis=1, keepdims=True)

    image = np.asarray(image, np.float64)
    return np.einsum("ih,jw,hwc->ijc", weights(image.shape[0]), weights(image.shape[1]), image)


def normalised(image, official):
    """ImageNet's mean and deviation; the official evaluator feeds 0..255."""
    return (image * (255 if official else 1) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def distance(keys, others):
    """Of two images' keys `[T,H,d]`."""

    def similarities(keys):
        flat = np.asarray(keys, np.float64).reshape(len(keys), -1)
        return np.array([[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in flat] for a in flat])

    return np.mean((similarities(keys) - similarities(others)) ** 2)
