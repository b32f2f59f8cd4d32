"""The pictures of reports, evidence and notebook: structures, distances, errors, losses, iterations a second."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxlab.core.figures import BLUE, COLOURS, GREY, figure
from jaxlab.megafold.feed import Features
from jaxlab.megafold.study import Outcome

CONFIDENCE = ((90, "#0053d6", "very high"), (70, "#65cbf3", "high"), (50, "#ffdb13", "low"), (0, "#ff7d45", "very low"))
"""AlphaFold's colours: from which pLDDT on, colour, name."""

_SMOOTH = 8  # pieces of the trace between two residues
_TRACE, _STICK, _DOT = 7.0, 2.2, 26.0  # points, points, square points
_OVERLAP = 0.12  # Å
_FADE = 0.55  # how much of the colour the farthest loses
_FARTHEST = 22.0  # Å, of the distogram

Rows = Sequence[Mapping[str, float]]


def structures(before: Outcome, after: Outcome) -> Any:
    """The truth, an untrained network's sample, and the trained one's best, on each other.

    Polymers as a smooth trace of CA or C1' atoms, the rest as atoms and bonds; the truth by chain, predictions by
    pLDDT, all seen from the side where the truth is widest.
    """
    features = after.features
    frame = _frame(features["coords"][features["resolved"]])
    panels = (
        ("truth, by chain", features["coords"], None, features["resolved"]),
        (f"untrained: lDDT {before.lddt[0]:.2f}, RMSD {before.rmsd[0]:.1f} Å", *_shown(before)),
        (
            f"trained: lDDT {after.lddt[0]:.2f}, RMSD {after.rmsd[0]:.1f} Å" + ", mirrored" * after.mirrored[0],
            *_shown(after),
        ),
    )
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    low, high = _limits((features["coords"][features["resolved"]] - frame[0]) @ frame[1])
    wide, tall = (high - low)[:2]
    drawn = Figure(figsize=(12.0, min(4.0 * tall / wide, 6.0) + 0.8), layout="constrained")
    for axes, (title, coords, plddt, there) in zip(drawn.subplots(1, 3), panels):
        _molecule(axes, features, (coords - frame[0]) @ frame[1], plddt, there)
        axes.set_title(title, fontsize=11)
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.set_aspect("equal")
        axes.set_axis_off()
    names = [
        f"{name} (pLDDT over {edge})" if edge else f"{name} (below {CONFIDENCE[-2][0]})" for edge, _, name in CONFIDENCE
    ]
    handles = [Line2D([], [], color=colour, linewidth=5) for _, colour, _ in CONFIDENCE]
    drawn.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return drawn


def distances(outcome: Outcome) -> Any:
    """True distances between representative atoms, and those that the distogram expects, up to 22 Å."""
    features = outcome.features
    places, there = (features[name][features["representative_atom"]] for name in ("coords", "resolved"))
    true = np.linalg.norm(places[:, None] - places[None], axis=-1)
    true[~(there[:, None] & there)] = np.nan
    drawn, pair = _panels(2)
    for axes, title, values in zip(
        pair, ("true", "expected by the distogram"), (true, outcome.predictions[0].distances)
    ):
        image = axes.imshow(
            np.minimum(values, _FARTHEST), cmap="viridis_r", vmin=0, vmax=_FARTHEST, interpolation="none"
        )
        _tokens(axes, features)
        axes.set_title(title, fontsize=11)
    drawn.colorbar(image, ax=pair, label="Å", shrink=0.85)
    return drawn


def aligned_error(outcome: Outcome) -> Any:
    """The error of each token in the frame of each other, as the network expects it and as it is."""
    features, best = outcome.features, outcome.predictions[0]
    centre, frames = features["center_atom"], features["frame_atoms"]
    seen, truly = (_in_frames(x, frames, x[centre]) for x in (best.coords, features["coords"]))
    actual = np.linalg.norm(seen - truly, axis=-1)
    actual[~(features["has_frame"][:, None] & features["resolved"][centre])] = np.nan
    top = max(5.0, float(np.ceil(np.nanmax([np.nanmax(best.pae), np.nanquantile(actual, 0.98)]))))
    drawn, pair = _panels(2)
    for axes, title, values in zip(pair, ("expected (PAE)", "actual"), (best.pae, actual)):
        image = axes.imshow(values, cmap="Greens_r", vmin=0, vmax=top, interpolation="none")
        _tokens(axes, features)
        axes.set_ylabel("frame of token")
        axes.set_title(title, fontsize=11)
    drawn.colorbar(image, ax=pair, label="Å", shrink=0.85, extend="max")
    return drawn


def losses(rows: Rows, names: Sequence[str] = ("loss", "mse", "smooth_lddt", "distogram", "plddt", "pae")) -> Any:
    """Losses of each step, faint, and their running median."""
    drawn, axes = figure(7.0, 3.8)
    steps = [row["step"] for row in rows]
    width = max(1, len(rows) // 25)
    for name, colour in zip(names, COLOURS):
        values = np.array([row.get(name, np.nan) for row in rows])
        if np.isfinite(values).any() and np.nanmax(values) > 0:
            middle = [np.nanmedian(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]
            axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
            axes.plot(steps, middle, color=colour, linewidth=1.6, label=name.replace("_", " "))
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, without its weight but for the sum")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def stall(found: Mapping[str, float]) -> Any:
    """Iterations a second by the way features are read."""
    drawn, axes = figure(6.0, 2.4)
    bars = axes.barh(list(found), list(found.values()), color=[GREY, *[BLUE] * (len(found) - 1)], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("iterations/s")
    axes.grid(visible=False, axis="y")
    return drawn


def _in_frames(*arrays: np.ndarray) -> np.ndarray:
    import jax.numpy as jnp

    from jaxlab.megafold.geometry import in_frames

    return np.asarray(in_frames(*map(jnp.asarray, arrays)))


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.3 * count + 0.8, 4.0), layout="constrained")
    return drawn, drawn.subplots(1, count)


def _tokens(axes: Any, features: Features) -> None:
    """Names the axes, and draws where one chain ends and the next begins."""
    for edge in np.flatnonzero(np.diff(features["asym_id"])):
        for line in (axes.axhline, axes.axvline):
            line(edge + 0.5, color="white", linewidth=1.4)
            line(edge + 0.5, color="black", linewidth=0.5)
    axes.set_xlabel("token")


def _shown(outcome: Outcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    best = outcome.predictions[0]
    return best.coords, best.plddt, np.ones(len(best.plddt), np.bool_)


def _frame(coords: Float[np.ndarray, "a 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Centre and axes: the widest directions first, right-handed."""
    centre = coords.mean(axis=0)
    axes = np.linalg.svd(coords - centre, full_matrices=False)[2].T
    return centre, axes * np.array([1.0, 1.0, np.sign(np.linalg.det(axes))])


def _limits(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.12 * (high - low).max()
    return low - margin, high + margin


def _molecule(axes: Any, features: Features, places: np.ndarray, plddt: np.ndarray | None, there: np.ndarray) -> None:
    """Draws from the back to the front; what is behind is paler."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    chain = features["asym_id"]
    plain = [to_rgb(COLOURS[number % len(COLOURS)]) for number in chain]
    sure = [
        to_rgb(next(colour for edge, colour, _ in CONFIDENCE if value >= edge))
        for value in (() if plddt is None else plddt)
    ]

    def colour(atom: int | np.integer) -> tuple[float, float, float]:
        return sure[atom] if sure else plain[features["atom_token"][atom]]

    pieces: list[tuple[np.ndarray, np.ndarray, float]] = []  # two ends, colour, width
    for atoms in _traces(features, there):
        curve = _smoothed(places[atoms])
        for index, (one, other) in enumerate(itertools.pairwise(curve)):
            nearest = atoms[round(index / _SMOOTH)]
            pieces.append((np.stack([one, other]), np.array(colour(nearest)), _TRACE))
    for one, other in [*features["bonds"], *_bases(features)]:
        if there[one] and there[other]:
            middle = (places[one] + places[other]) / 2
            pieces += [(np.stack([places[end], middle]), np.array(colour(end)), _STICK) for end in (one, other)]
    single = np.flatnonzero(features["is_ligand"][features["atom_token"]] & there)
    depth = np.array([piece[0][:, 2].mean() for piece in pieces] + [places[atom, 2] for atom in single])
    span = max(np.ptp(depth), 1e-6) if len(depth) else 1.0
    fades = _FADE * (depth.max(initial=0.0) - depth) / span

    def faded(rgb: np.ndarray, fade: float) -> np.ndarray:
        return rgb * (1 - fade) + fade

    for number in np.argsort(depth):
        order = 2 + float(depth[number] - depth.min()) / span
        if number < len(pieces):
            ends, rgb, width = pieces[number]
            along = ends - ends[::-1]
            overlap = along * min(0.2, _OVERLAP / max(np.linalg.norm(along[0]), 1e-6))  # no gaps in the outline
            edge = LineCollection(
                [(ends + overlap)[:, :2]], colors=[faded(np.full(3, 0.15), fades[number])], linewidths=width + 1.4
            )
            edge.set(zorder=order - 0.02, capstyle="butt")
            body = LineCollection([ends[:, :2]], colors=[faded(rgb, fades[number])], linewidths=width)
            body.set(zorder=order, capstyle="round")
            axes.add_collection(edge)
            axes.add_collection(body)
        else:
            atom = single[number - len(pieces)]
            face = faded(np.array(colour(atom)), fades[number])
            axes.scatter(
                *places[atom, :2],
                s=_DOT,
                color=[face],
                edgecolors=[faded(np.full(3, 0.15), fades[number])],
                linewidths=0.7,
                zorder=order,
            )


def _traces(features: Features, there: np.ndarray) -> list[Int[np.ndarray, " r"]]:
    """Centre atoms of stretches of neighbouring residues."""
    residue = np.flatnonzero(~features["is_ligand"] & there[features["center_atom"]])
    number, chain = features["residue_index"][residue], features["asym_id"][residue]
    breaks = np.flatnonzero((np.diff(number) != 1) | (np.diff(chain) != 0)) + 1
    return [features["center_atom"][each] for each in np.split(residue, breaks) if len(each) > 1]


def _bases(features: Features) -> list[tuple[int, int]]:
    """From the sugar to the base of each nucleotide."""
    residue = np.flatnonzero(features["is_dna"] | features["is_rna"])
    return list(zip(features["center_atom"][residue].tolist(), features["representative_atom"][residue].tolist()))


def _smoothed(points: Float[np.ndarray, "r 3"]) -> np.ndarray:
    """A Catmull-Rom curve through the points, `_SMOOTH` pieces between two."""
    before, after = (
        np.vstack([2 * points[0] - points[1], points[:-1]]),
        np.vstack([points[1:], 2 * points[-1] - points[-2]]),
    )
    slopes = (after - before) / 2
    t = np.arange(_SMOOTH)[:, None] / _SMOOTH
    curve = [
        (2 * t**3 - 3 * t**2 + 1) * p + (t**3 - 2 * t**2 + t) * m + (3 * t**2 - 2 * t**3) * q + (t**3 - t**2) * n
        for p, q, m, n in zip(points, points[1:], slopes, slopes[1:])
    ]
    return np.vstack([*curve, points[-1:]])
