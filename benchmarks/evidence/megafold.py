"""Real structures, overfitted: `tiny` trained on a crop of each until its samples are the crop; and the data stall."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence import FOLDER, Item

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "evidence" / "megafold"
"""Features, metrics, checkpoints, predictions and reports of the runs; a killed one goes on from here."""

CROPS = {
    "721p": (
        "H-Ras: the strand, loop and helix around GNP and Mg",
        {
            "structures": "[{structure: af3/mmcif/721p-assembly1.cif, tokens: [[0, 31], [166, 199]], "
            "msas: {A: af3/msa/721p-assembly1A_protein.a3m}}]",
            "network.changes.max_atoms": 288,
        },
    ),
    "209d": (
        "two strands of DNA with an actinomycin between their bases, 3600 steps",
        {
            "steps": 3600,
            "structures": "[{structure: af3/mmcif/209d-assembly1.cif, tokens: [[0, 78]]}]",
            "network.changes.max_tokens": 80,
            "network.changes.max_atoms": 416,
        },
    ),
    "7a4d": (
        "half of an immunoglobulin domain",
        {
            "structures": "[{structure: af3/mmcif/7a4d-assembly1.cif, tokens: [[0, 64]], "
            "msas: {A: af3/msa/7a4d-assembly1A_protein.a3m}}]",
            "network.changes.max_atoms": 480,
        },
    ),
}
SHARED = {
    "network.preset": "tiny",
    "network.changes": "{diffusion_samples: 8, pair_dropout: 0.0, msa_dropout: 0.0, remat: false}",
    "training.learning_rate": 3e-3,
    "training.warmup_steps": 100,
    "training.decay_every": 400,
    "training.decay": 0.7,
    "training.ema_decay": 0.99,
    "training.loss": "{confidence: 0.3, pae: 1.0, distogram: 0.1, rollout_steps: 16}",
    "steps": 2400,
    "checkpoint_every": 200,
    "samples": 5,
    "sampling_steps": 100,
}
STALL_STEPS = 20
NOISE = (2, 8, 40, 160, 640)
"""Å; AlphaFold3 trains on 16 exp(-1.2 + 1.5 n) and samples from 2560."""
DRAWS = 32


def items() -> Iterator[Item]:
    """One row a structure, and one for the ways of reading."""
    for name, (what, _) in CROPS.items():
        config = _config(name)
        yield Item(
            name=f"overfit {name}",
            table=(
                f"`tiny` trained on one crop for {SHARED['steps']} steps, then {config.samples} samples of "
                f"{config.sampling_steps} steps, the one the network trusts most held to the truth (measured)"
            ),
            settings=_settings(config),
            run=lambda name=name, what=what: _overfit_row(name, what),
            seeds=(config.seed,),
        )
    for name in CROPS:
        yield Item(
            name=f"hand {name}",
            table=(
                f"Share of {DRAWS} denoised structures that have the hand of what was noised, the truth or its mirror "
                "image, by noise (measured)"
            ),
            settings={**_settings(_config(name)), "noise": NOISE, "draws": DRAWS},
            run=lambda name=name: _hand_row(name),
            seeds=(0,),
        )
    yield Item(
        name="data stall",
        table=(
            "Training steps a second of `tiny` on a crop of 721P with its alignment of 15,953 rows; one CPU trains and "
            f"reads, {STALL_STEPS} steps each (measured)"
        ),
        settings={**_settings(_config("721p")), "stall_steps": STALL_STEPS},
        run=_stall_row,
        seeds=(0,),
    )


def pages() -> None:
    """Draws the pictures of the system's page, from runs made on this machine."""
    from jaxlab import core

    for name in CROPS:
        if (WORK / name / "report.json").exists():
            for title, png in core.Report.load(WORK / name).plots:
                what = title.rpartition(": ")[2].lower().replace(" ", "_")
                (FOLDER / f"megafold_{name}_{what}.png").write_bytes(png)


def _config(name: str, **changes: Any) -> Any:
    """A crop's study; its metrics and checkpoints lie below WORK."""
    from jaxlab import core
    from jaxlab.megafold.study import StudyConfig

    values = {**SHARED, **CROPS[name][1], **changes}
    config = core.load_config(StudyConfig, None, [f"{key}={value}" for key, value in values.items()])
    return dataclasses.replace(config, folder=str(WORK / name))


def _settings(config: Any) -> dict[str, Any]:
    """What of a study decides its outcome: where it lies does not."""
    from jaxlab import core

    return {name: value for name, value in core.to_dict(config).items() if name != "folder"}


def _overfit_row(name: str, what: str, **changes: Any) -> dict[str, Any]:
    from jaxlab.megafold import recipe

    config = _config(name, **changes)
    report = recipe.run(config)
    if report.synthetic:
        raise FileNotFoundError(f"{name}: its files are not here")
    report.save(config.folder)
    (_, columns, (row,)), *_ = report.tables
    told = dict(zip(columns, row))
    return {
        "structure": name,
        "what": what,
        **{column: told[column] for column in columns[1:]},
        "first loss": report.metrics["first_loss"],
        "last loss": report.metrics["final_loss"],
    }


def _hand_row(name: str) -> dict[str, Any]:
    """With the averaged weights that the run ended with."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlab.megafold.geometry import weighted_rigid_align
    from jaxlab.megafold.modules import AlphaFold3
    from jaxlab.megafold.study import Study, load_weights

    config = _config(name)
    network, params = load_weights(config.folder)
    with Study(config, config.folder).feed() as batches:
        batch = next(batches)
    model, variables = AlphaFold3(network), {"params": params}
    weight = jnp.asarray(batch["resolved"][0] & batch["atom_mask"][0], jnp.float32)
    truth = jnp.asarray(batch["coords"][0])
    truth = (truth - weight @ truth / jnp.sum(weight)) * weight[:, None]
    mirror = truth * jnp.array([-1.0, 1.0, 1.0])

    def distance(structure, target):
        return jnp.sum(weight @ (weighted_rigid_align(structure, target, weight) - target) ** 2)

    @jax.jit
    def same_hand(given, other, level, key):
        """The share of structures denoised from `given` that are nearer to it than to `other`."""
        trunk = model.apply(variables, batch, recycles=network.recycles, method="trunk")
        noisy = given + level * jax.random.normal(key, (1, DRAWS, *given.shape))
        levels = jnp.full((1, DRAWS), level)
        denoised = model.apply(variables, batch, trunk, noisy, levels, method="denoise")[0]
        nearer = jax.vmap(lambda x: distance(x, given) < distance(x, other))(denoised)
        return jnp.mean(nearer)

    key = jax.random.key(config.seed)
    row: dict[str, Any] = {"structure": name}
    for what, given, other in (("truth", truth, mirror), ("mirror image", mirror, truth)):
        for level in NOISE:
            row[f"{what}, {level} Å"] = float(np.asarray(same_hand(given, other, jnp.float32(level), key)))
    return row


def _stall_row() -> dict[str, Any]:
    """From the state that the run of 721P ended with."""
    from jaxlab.megafold.study import Study

    config = _config("721p")
    study = Study(config, config.folder)
    found = study.stall(study.train(), STALL_STEPS)
    best = found["cache, read ahead"]
    return {
        **{f"{way}, iterations/s": rate for way, rate in found.items()},
        "read ahead / cold": best / found["cold"],
    }
