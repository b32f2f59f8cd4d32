"""AlphaFold3's losses and measures in float64 loops and sums; the alignment is Horn's (1987), by quaternions."""

import numpy as np

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)


def align(x, target, weight):
    """x moved onto target: the rotation is the largest eigenvector of Horn's 4 x 4 matrix, so never a reflection."""
    x, target, weight = (np.asarray(value, np.float64) for value in (x, target, weight))
    if weight.sum() == 0:
        return x
    weight = weight / weight.sum()
    from_, to = weight @ x, weight @ target
    if np.count_nonzero(weight) < 3:
        return x - from_ + to
    m = np.einsum("a,ai,aj->ij", weight, x - from_, target - to)
    skew = np.array([m[1, 2] - m[2, 1], m[2, 0] - m[0, 2], m[0, 1] - m[1, 0]])
    horn = np.zeros((4, 4))
    horn[0, 0] = np.trace(m)
    horn[0, 1:] = horn[1:, 0] = skew
    horn[1:, 1:] = m + m.T - np.trace(m) * np.eye(3)
    w, *v = np.linalg.eigh(horn)[1][:, -1]
    v = np.array(v)
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    rotation = (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * cross
    return (x - from_) @ rotation.T + to


def distances(x):
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))


def diffusion_mse(pred, target, mask, is_dna, is_rna, is_ligand, sample_weight):
    weight = (1 + 5 * is_dna + 5 * is_rna + 10 * is_ligand) * mask
    losses = []
    for x in np.asarray(pred, np.float64):
        error = x - align(target, x, weight)
        losses.append((weight * (error**2).sum(-1)).sum() / mask.sum() / 3)
    return np.mean(sample_weight * np.array(losses))


def smooth_lddt(pred, target, mask, is_nucleotide):
    true, losses = distances(np.asarray(target, np.float64)), []
    for x in np.asarray(pred, np.float64):
        error, scores = np.abs(distances(x) - true), []
        for i in range(len(mask)):
            for j in range(len(mask)):
                if i != j and mask[i] and mask[j] and true[i, j] < (30 if is_nucleotide[i] else 15):
                    scores.append(np.mean([1 / (1 + np.exp(error[i, j] - t)) for t in THRESHOLDS]))
        losses.append(1 - np.mean(scores))
    return np.mean(losses)


def bond(pred, target, mask, bond_mask, sample_weight):
    true, losses = distances(np.asarray(target, np.float64)), []
    pairs = np.argwhere(bond_mask & mask[:, None] & mask[None])
    for x in np.asarray(pred, np.float64):
        error = distances(x) - true
        losses.append(sum(error[i, j] ** 2 for i, j in pairs) / max(len(pairs), 1))
    return np.mean(sample_weight * np.array(losses))


def cross_entropy(logits, index):
    """Of one row of logits."""
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[index]


def distogram(logits, coords, mask):
    true = distances(np.asarray(coords, np.float64))
    breaks = np.linspace(2.3125, 21.6875, 63)
    kept = [(i, j) for i in range(len(mask)) for j in range(len(mask)) if mask[i] and mask[j]]
    return np.mean([cross_entropy(logits[i, j], (true[i, j] > breaks).sum()) for i, j in kept])


def lddt(pred, target, mask, radius, group):
    """(scores of the atoms, numbers of their pairs); pairs inside a group do not count."""
    true, moved = distances(np.asarray(target, np.float64)), distances(np.asarray(pred, np.float64))
    scores, pairs = np.zeros(len(mask)), np.zeros(len(mask), int)
    for i in range(len(mask)):
        near = [j for j in range(len(mask)) if mask[i] and mask[j] and group[i] != group[j] and true[i, j] < radius[i]]
        pairs[i] = len(near)
        hits = [np.mean([abs(true[i, j] - moved[i, j]) < t for t in THRESHOLDS]) for j in near]
        scores[i] = np.mean(hits) if near else 0
    return scores, pairs


def frame(a, b, c):
    """(rows of the axes, origin) of algorithm 29: the middle atom; the bisector of its two bonds; the plane's rest."""
    u, v = (a - b) / np.linalg.norm(a - b), (c - b) / np.linalg.norm(c - b)
    first, second = (u + v) / np.linalg.norm(u + v), (v - u) / np.linalg.norm(v - u)
    return np.stack([first, second, np.cross(first, second)]), b


def confidence(logits, pred, features):
    """The four losses, atom by atom and pair by pair."""
    pred, true = np.asarray(pred, np.float64), np.asarray(features["coords"], np.float64)
    tokens, atoms = len(features["token_mask"]), len(true)
    resolved, centre, representative = features["resolved"], features["center_atom"], features["representative_atom"]
    nucleotide = features["is_dna"] | features["is_rna"]
    polymer = features["is_protein"] | nucleotide
    losses = {"plddt": [], "pae": [], "pde": [], "resolved": []}
    for a in range(atoms):
        if features["atom_mask"][a]:
            losses["resolved"].append(cross_entropy(logits["resolved"][a], int(resolved[a])))
        hits = []
        for n in range(tokens):
            m = centre[n]
            true_distance = np.linalg.norm(true[a] - true[m])
            if not (features["token_mask"][n] and polymer[n] and resolved[a] and resolved[m] and a != m):
                continue
            if true_distance < (30 if nucleotide[n] else 15):
                error = abs(np.linalg.norm(pred[a] - pred[m]) - true_distance)
                hits.append(np.mean([error < t for t in THRESHOLDS]))
        if hits:
            losses["plddt"].append(cross_entropy(logits["plddt"][a], min(int(np.mean(hits) * 50 + 1e-9), 49)))
    for i in range(tokens):
        for j in range(tokens):
            if not (features["token_mask"][i] and features["token_mask"][j]):
                continue
            if features["has_frame"][i] and resolved[centre[j]]:
                seen = []
                for x in (pred, true):
                    axes, origin = frame(*x[features["frame_atoms"][i]])
                    seen.append(axes @ (x[centre[j]] - origin))
                error = np.linalg.norm(seen[0] - seen[1])
                losses["pae"].append(cross_entropy(logits["pae"][i, j], min(int(error * 2), 63)))
            k, l = representative[i], representative[j]
            if resolved[k] and resolved[l]:
                error = abs(np.linalg.norm(pred[k] - pred[l]) - np.linalg.norm(true[k] - true[l]))
                losses["pde"].append(cross_entropy(logits["pde"][i, j], min(int(error * 2), 63)))
    return {name: np.mean(values) for name, values in losses.items()}
