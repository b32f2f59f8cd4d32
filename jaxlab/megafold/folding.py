"""Folding: trunk, sampler and confidence as one program for each size, and what is written of the outcome."""

import bisect
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlab import core
from jaxlab.megafold.config import AF3Config
from jaxlab.megafold.data import Structure, make_batch, with_coords, write_mmcif
from jaxlab.megafold.data.frames import valid_frames
from jaxlab.megafold.data.layout import lay_out
from jaxlab.megafold.diffusion import sample
from jaxlab.megafold.metrics import MAX_ERROR, expected_error, expected_plddt
from jaxlab.megafold.modules import AlphaFold3
from jaxlab.megafold.modules.distogram import BINS
from jaxlab.megafold.ranking import has_clash, predicted_tm, ranking_score, tm_scale

SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120)
"""Tokens, and 1/16 of the atoms, that a structure is padded to (ours): few programs, at most half of each padding."""

_ATOMS_OF_A_SIZE = 16
_FIRST_CENTRE, _LAST_CENTRE = 2.3125 - 0.15625, 21.6875 + 0.15625  # Å, of the distogram's bins


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """One sample of one seed; atoms A and tokens N are those of its features.

    Attributes:
      seed: it was drawn with.
      sample: which of the seed's.
      coords: Å, in a random frame.
      plddt: each atom's, 0 to 100.
      pae: error of token j in the frame of token i, Å.
      pde: error of the distance between two tokens, Å.
      distances: between representative atoms, Å, by the distogram: means of bins up to 22 Å.
      ptm: expected TM-score.
      iptm: of the pairs between chains; None for one chain.
      clash: whether two polymers run into each other.
    """

    seed: int
    sample: int
    coords: Float[np.ndarray, "a 3"]
    plddt: Float[np.ndarray, " a"]
    pae: Float[np.ndarray, "n n"]
    pde: Float[np.ndarray, "n n"]
    distances: Float[np.ndarray, "n n"]
    ptm: float
    iptm: float | None
    clash: bool

    @property
    def score(self) -> float:
        """What predictions are ranked by."""
        return ranking_score(self.ptm, self.iptm, self.clash)


def bucketed(config: AF3Config, features: Mapping[str, np.ndarray]) -> AF3Config:
    """The configuration with room for these features in the next of `SIZES`, and no more.

    Raises:
      ValueError: more tokens or atoms than the largest size has.
    """
    tokens = max(len(features["restype"]), -(-len(features["bonds"]) // 2))
    atoms = -(-len(features["resolved"]) // _ATOMS_OF_A_SIZE)
    for name, value in (("tokens", tokens), ("atoms / 16", atoms)):
        if value > SIZES[-1]:
            raise ValueError(f"features: expected at most {SIZES[-1]} {name}, got {value}")
    rows = min(config.max_msa_rows, 1 << (len(features["msa"]) - 1).bit_length())
    templates = len(features["template_mask"])
    return dataclasses.replace(
        config,
        max_tokens=SIZES[bisect.bisect_left(SIZES, tokens)],
        max_atoms=_ATOMS_OF_A_SIZE * max(SIZES[bisect.bisect_left(SIZES, atoms)], 2),
        max_msa_rows=rows,
        max_templates=config.max_templates if templates else 1,
    )


def fold(
    params: PyTree,
    features: Mapping[str, np.ndarray],
    config: AF3Config,
    *,
    seeds: Sequence[int] = (0,),
    samples: int = 5,
    steps: int = 200,
    recycles: int | None = None,
) -> list[Prediction]:
    """Samples structures; a seed's are the same whatever the other seeds are.

    Args:
      params: weights of `AlphaFold3(config)`, such as a state's `ema_params`.
      features: of one structure, from `featurize` or `crop`.
      config: of the network; its sizes do not matter (`bucketed`).
      seeds: of alignment rows, conformers and noise.
      samples: of each seed, at once.
      steps: of the sampler.
      recycles: passes of the trunk; None: `config.recycles`.

    Returns:
      All samples, the best first.

    Raises:
      ValueError: no seed, or a number below 1.
    """
    recycles = config.recycles if recycles is None else recycles
    for name, value in (("seeds", len(seeds)), ("samples", samples), ("steps", steps), ("recycles", recycles)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    sized = bucketed(config, features)
    found: list[Prediction] = []
    for seed in core.progress(seeds, "folding"):
        key = jax.random.key(seed)
        batch = make_batch([dict(features)], sized, core.named_key(key, "batch"))
        out = _predict(
            params,
            batch,
            core.named_key(key, "sample"),
            tm_scale(len(features["restype"])),
            config=sized,
            samples=samples,
            steps=steps,
            recycles=recycles,
        )
        found += _predictions(seed, features, jax.device_get(out))
    return sorted(found, key=lambda prediction: -prediction.score)


@functools.partial(jax.jit, static_argnames=("config", "samples", "steps", "recycles"))
def _predict(
    params: PyTree,
    batch: Mapping[str, Array],
    key: Array,
    scale: Array | float,
    *,
    config: AF3Config,
    samples: int,
    steps: int,
    recycles: int,
) -> dict[str, Array]:
    model, variables = AlphaFold3(config), {"params": params}
    trunk = model.apply(variables, batch, recycles=recycles, method="trunk")

    def denoise(x: Array, level: Array) -> Any:
        return model.apply(variables, batch, trunk, x, jnp.full(x.shape[:2], level), method="denoise")

    def judge(x: Array) -> dict[str, Array]:
        logits = jax.tree.map(lambda leaf: leaf[0], model.apply(variables, batch, trunk, x[None], method="confidence"))
        return {
            "plddt": expected_plddt(logits["plddt"]),
            "pae": expected_error(logits["pae"]),
            "pde": expected_error(logits["pde"]),
            "tm": _tm_terms(logits["pae"], scale),
        }

    shape = (1, samples, *batch["coords"].shape[1:])
    x = sample(denoise, key, shape, mask=batch["atom_mask"][:, None], num_steps=steps)[0]
    bins = jax.nn.softmax(model.apply(variables, trunk, method="distogram")[0], axis=-1)
    centres = jnp.linspace(_FIRST_CENTRE, _LAST_CENTRE, BINS)
    return {"coords": x, "distances": jnp.sum(bins * centres, axis=-1), **jax.lax.map(judge, x)}


def _tm_terms(logits: Float[Array, "n n bins"], scale: Array | float) -> Float[Array, "n n"]:
    bins = logits.shape[-1]
    error = (jnp.arange(bins) + 0.5) * (MAX_ERROR / bins)
    return jnp.sum(jax.nn.softmax(logits, axis=-1) / (1 + (error / scale) ** 2), axis=-1)


def _predictions(seed: int, features: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray]) -> list[Prediction]:
    """The samples of a seed, without padding."""
    tokens, atoms = len(features["restype"]), len(features["resolved"])
    chain = features["asym_id"]
    between = chain[:, None] != chain
    made = []
    for number in range(len(out["coords"])):
        coords, terms = out["coords"][number, :atoms], out["tm"][number, :tokens, :tokens]
        frames = valid_frames(features["frame_atoms"], coords, np.ones(atoms, np.bool_))
        made.append(
            Prediction(
                seed=seed,
                sample=number,
                coords=coords,
                plddt=out["plddt"][number, :atoms],
                pae=out["pae"][number, :tokens, :tokens],
                pde=out["pde"][number, :tokens, :tokens],
                distances=out["distances"][:tokens, :tokens],
                ptm=predicted_tm(terms, frames),
                iptm=predicted_tm(terms, frames, between) if between.any() else None,
                clash=has_clash(coords, features),
            )
        )
    return made


def placed(
    structure: Structure,
    features: Mapping[str, np.ndarray],
    coords: Float[np.ndarray, "a 3"],
    plddt: Float[np.ndarray, " a"],
) -> Structure:
    """The structure with the atoms of its features, whole or cropped, at these places; B-factors are the pLDDT.

    Raises:
      ValueError: another number of atoms than the features have.
    """
    token = lay_out(structure).token
    there = np.isin(token, features["token_index"])
    if coords.shape != (there.sum(), 3) or plddt.shape != (there.sum(),):
        raise ValueError(f"coords, plddt: expected {there.sum()} atoms, got {coords.shape} and {plddt.shape}")
    places, factors = np.zeros((len(token), 3), np.float32), np.zeros(len(token), np.float32)
    places[there], factors[there] = coords, plddt
    whole = with_coords(structure, places, factors)
    of_atoms = ("coords", "atom_name", "res_name", "chain_id", "element", "b_factor", "occupancy", "residue")
    return dataclasses.replace(whole, **{name: getattr(whole, name)[there] for name in of_atoms})


def save_predictions(
    folder: str | os.PathLike,
    name: str,
    structure: Structure,
    features: Mapping[str, np.ndarray],
    predictions: Sequence[Prediction],
) -> Path:
    """Writes predictions, best first, and `ranking.json`.

    Each gets `<name>_seed-<seed>_sample-<sample>.cif`, B-factors being the pLDDT, and a `.json` beside it with the
    confidence of the whole, of each atom, and of each pair of tokens; the best is `<name>.cif` as well.

    Returns:
      The path of the best one's mmCIF.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    best = folder / f"{name}.cif"
    ranking = []
    for prediction in predictions:
        stem = f"{name}_seed-{prediction.seed}_sample-{prediction.sample}"
        made = placed(structure, features, prediction.coords, prediction.plddt)
        write_mmcif(made, folder / f"{stem}.cif")
        if prediction is predictions[0]:
            write_mmcif(made, best)
        told = _summary(prediction)
        ranking.append({"file": f"{stem}.cif", **told})
        token = features["atom_token"]
        pairs = {
            "token_chain": made.chain_id[np.searchsorted(token, np.arange(len(features["restype"])))].tolist(),
            "token_residue": features["residue_index"].tolist(),
            "atom_plddt": _rounded(prediction.plddt),
            "pae": _rounded(prediction.pae),
            "pde": _rounded(prediction.pde),
        }
        (folder / f"{stem}.json").write_text(json.dumps({**told, **pairs}))
    (folder / "ranking.json").write_text(json.dumps(ranking, indent=1) + "\n")
    return best


def _summary(prediction: Prediction) -> dict[str, Any]:
    return {
        "seed": prediction.seed,
        "sample": prediction.sample,
        "ranking_score": prediction.score,
        "mean_plddt": float(prediction.plddt.mean()),
        "ptm": prediction.ptm,
        "iptm": prediction.iptm,
        "has_clash": prediction.clash,
    }


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values.astype(np.float64), 2).tolist()
