"""`jaxlab megafold precompute|train|fold|bench`; nothing heavy is imported before they run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlab.terminal import print_table, usage

app = typer.Typer(rich_markup_mode="rich")

_Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=value", help="Values over the YAML file's.")]


@app.callback()
def _group() -> None: ...


@app.command()
def precompute(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="mmCIF files: NAME.cif or NAME.cif.gz.")],
    msas: Annotated[
        Path | None, typer.Option(help="A3M files: NAME<chain>.a3m, NAME_<chain>.a3m, ..._protein.a3m. Default DIR.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Gets the features. Default DIR/features.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_msa_rows: Annotated[int, typer.Option(min=1, help="Rows kept of the alignments of a structure.")] = 16384,
) -> None:
    """Build the features of all structures of a folder that are not in the cache yet."""
    from jaxlab.core import progress
    from jaxlab.megafold.data import FeatureCache
    from jaxlab.megafold.files import paired

    found = paired(folder, folder if msas is None else msas)
    store = FeatureCache(cache or folder / "features")
    items = [{"path": path, "msas": of, "options": {"max_msa_rows": max_msa_rows}} for path, of in found.items()]
    results = store.precompute(progress(items, "features", len(items)), workers=workers)
    failed = [result for result in results if result.error is not None]
    for result in failed:
        typer.echo(f"{result.item}: {str(result.error).strip().splitlines()[-1]}", err=True)
    stats = store.stats
    typer.echo(
        f"{len(results)} structures, {sum(map(len, found.values()))} alignments: {stats.hits} hits, {stats.misses} "
        f"misses, {len(failed)} failed, {stats.bytes / 1e6:.1f} MB, {stats.build_seconds:.1f} s of building"
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A study's config (YAML).")],
    overrides: _Overrides = None,
    folder: Annotated[Path, typer.Option(help="Gets metrics, checkpoints, predictions, report.json.")] = Path(
        "out/megafold/train"
    ),
) -> None:
    """Train on the structures of a config, and sample them; the same command again resumes where it was killed."""
    import dataclasses

    from jaxlab import recipes
    from jaxlab.megafold import recipe

    with usage("CONFIG"):
        settings = recipes.load(recipe.run, config, overrides or ())
    report = recipe.run(dataclasses.replace(settings, folder=str(folder)))
    path = report.save(folder)
    told = report.metrics
    typer.echo(
        f"{report.title}\n{told['steps']} steps: loss {told['first_loss']:.3g} -> {told['final_loss']:.3g}, "
        f"lDDT {told['lddt_before']:.3f} -> {told['lddt']:.3f}, "
        f"RMSD {told['rmsd_before']:.2f} -> {told['rmsd']:.2f} Å\n"
        f"report: {path}"
    )


@app.command()
def fold(
    job: Annotated[Path, typer.Argument(metavar="FASTA_OR_JSON", help="Sequences, or an AlphaFold3 job.")],
    checkpoint: Annotated[Path, typer.Option(metavar="DIR", help="A folder that `train` wrote.")],
    folder: Annotated[Path, typer.Option(help="Gets a folder of the job's name.")] = Path("out/megafold/fold"),
    samples: Annotated[int, typer.Option(min=1, help="Of each seed.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 200,
    recycles: Annotated[int | None, typer.Option(min=1, help="Passes of the trunk; default the network's.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be given again; default the job's.")] = None,
) -> None:
    """Fold sequences: mmCIF files with pLDDT, their confidences as JSON, and a ranking."""
    from jaxlab.megafold import folding
    from jaxlab.megafold.data import featurize, read_job
    from jaxlab.megafold.study import load_weights

    given = read_job(job)
    network, params = load_weights(checkpoint)
    features = featurize(given.structure, msas=given.msas)
    found = folding.fold(
        params, features, network, seeds=tuple(seed or given.seeds), samples=samples, steps=steps, recycles=recycles
    )
    best = folding.save_predictions(folder / given.name, given.name, given.structure, features, found)
    for prediction in found:
        iptm = "" if prediction.iptm is None else f", ipTM {prediction.iptm:.3f}"
        typer.echo(
            f"seed {prediction.seed}, sample {prediction.sample}: score {prediction.score:.3f}, "
            f"pLDDT {prediction.plddt.mean():.1f}, pTM {prediction.ptm:.3f}{iptm}{', clash' * prediction.clash}"
        )
    typer.echo(f"best: {best}")


@app.command()
def bench(
    config: Annotated[str, typer.Argument(help="A study's config (YAML), for its files.")] = (
        "configs/megafold/laptop.yaml"
    ),
    tokens: Annotated[int, typer.Option(min=1, help="Of the kernels' pair representation.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the data pipeline, each way.")] = 5,
    step_s: Annotated[float, typer.Option(min=0.0, help="Seconds of a step, slept.")] = 0.1,
) -> None:
    """Time how a trainer waits for its data, and the kernels' forward and backward passes, on this machine."""
    import tempfile
    import time

    from jaxlab import recipes
    from jaxlab.megafold import recipe, timing
    from jaxlab.megafold.config import AF3Config
    from jaxlab.megafold.study import Study, rates

    with usage("CONFIG"):
        settings = recipes.load(recipe.run, config)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(settings, folder)
        found = rates(study.feed, lambda _: time.sleep(step_s), steps)
    rows: list[tuple[Any, ...]] = [(way, f"{rate:.2f}") for way, rate in found.items()]
    print_table(f"iterations/s, a step of {1e3 * step_s:.0f} ms (slept){', made-up data' * study.synthetic}", (), rows)
    rows = [(name, *(f"{value:.1f}" for value in values)) for name, *values in timing.compared(AF3Config.af3(), tokens)]
    columns = ("", "ms", "MiB", "plain JAX, ms", "MiB")
    print_table(f"forward and backward, {tokens} tokens, f32, AlphaFold3's widths; temporaries", columns, rows)
