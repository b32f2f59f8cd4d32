"""Gaussians in float64, one at a time: projection, colour, per-segment codes. Written from the specification alone."""

import itertools
import math

import numpy as np


def rotation(quat):
    w, x, y, z = np.asarray(quat, float) / np.linalg.norm(quat)
    return np.array(
        [
            [1 - 2 * y * y - 2 * z * z, 2 * x * y - 2 * w * z, 2 * x * z + 2 * w * y],
            [2 * x * y + 2 * w * z, 1 - 2 * x * x - 2 * z * z, 2 * y * z - 2 * w * x],
            [2 * x * z - 2 * w * y, 2 * y * z + 2 * w * x, 1 - 2 * x * x - 2 * y * y],
        ]
    )


def basis(direction):
    x, y, z = direction
    terms = [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    terms += [
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * z * z - x * x - y * y),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (x * x - y * y),
    ]
    terms += [
        -0.5900435899266435 * y * (3 * x * x - y * y),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
        0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
        -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
        1.445305721320277 * z * (x * x - y * y),
        -0.5900435899266435 * x * (x * x - 3 * y * y),
    ]
    return np.array(terms)


def project(scene, camera):
    """Rows of (u, v, depth, conic a, b, c, red, green, blue, radius); radius 0 where culled."""
    view = np.asarray(camera.viewmat, float)
    centre = -view[:3, :3].T @ view[:3, 3]
    rows = []
    for mean, log_scale, quat, sh0, shN in zip(scene.means, scene.log_scales, scene.quats, scene.sh0, scene.shN):
        mean = np.asarray(mean, float)
        p = view[:3, :3] @ mean + view[:3, 3]
        if p[2] <= 0.2:
            rows.append(np.zeros(10))
            continue
        axes = rotation(quat) @ np.diag(np.exp(np.asarray(log_scale, float)))
        sigma = axes @ axes.T
        tx = np.clip(p[0] / p[2], -1.3 * camera.width / 2 / camera.fx, 1.3 * camera.width / 2 / camera.fx) * p[2]
        ty = np.clip(p[1] / p[2], -1.3 * camera.height / 2 / camera.fy, 1.3 * camera.height / 2 / camera.fy) * p[2]
        jacobian = np.array(
            [[camera.fx / p[2], 0, -camera.fx * tx / p[2] ** 2], [0, camera.fy / p[2], -camera.fy * ty / p[2] ** 2]]
        )
        flat = jacobian @ view[:3, :3]
        flat = flat @ sigma @ flat.T + 0.3 * np.eye(2)
        inverse = np.linalg.inv(flat)
        u, v = camera.fx * p[0] / p[2] + camera.cx, camera.fy * p[1] / p[2] + camera.cy
        middle = np.trace(flat) / 2
        radius = math.ceil(3 * math.sqrt(middle + math.sqrt(max(0.1, middle**2 - np.linalg.det(flat)))))
        if u + radius <= 0 or u - radius >= camera.width or v + radius <= 0 or v - radius >= camera.height:
            radius = 0
        direction = (mean - centre) / np.linalg.norm(mean - centre)
        color = (
            0.5 + 0.28209479177387814 * np.asarray(sh0, float) + basis(direction)[: len(shN)] @ np.asarray(shN, float)
        )
        rows.append(np.array([u, v, p[2], inverse[0, 0], inverse[0, 1], inverse[1, 1], *np.maximum(color, 0), radius]))
    return np.array(rows)


def codes(x, bounds, bits):
    """Codes, minima and scales in float32 arithmetic, one number at a time."""
    out, minima, scales = np.zeros(x.shape, np.uint8), [], []
    for start, end in itertools.pairwise(bounds):
        for channel in range(x.shape[1]):
            low, high = x[start:end, channel].min(), x[start:end, channel].max()
            scale = np.float32(high - low) / np.float32(2**bits - 1)
            scale = np.float32(1) if scale == 0 else scale
            minima.append(low)
            scales.append(scale)
            for row in range(start, end):
                value = np.rint(np.float32(x[row, channel] - low) / scale)
                out[row, channel] = min(max(int(value), 0), 2**bits - 1)
    shape = (len(bounds) - 1, x.shape[1])
    return out, np.reshape(minima, shape), np.reshape(scales, shape)
