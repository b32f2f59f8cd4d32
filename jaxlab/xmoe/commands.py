"""`jaxlab xmoe trainable` and `jaxlab xmoe volume`; nothing heavy is imported before they run."""

from typing import Annotated

import typer

from jaxlab.terminal import usage

app = typer.Typer(rich_markup_mode="rich")


@app.callback()
def _group() -> None: ...


@app.command()
def trainable(
    gpu: Annotated[str, typer.Option(help="A preset of jaxlab plan: mi250x has 64 GB, h100 80.")] = "mi250x",
    devices: Annotated[list[int] | None, typer.Option(help="GPUs; may be given again. Default 1024.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="small, medium, large or super; default all.")] = None,
    dispatch: Annotated[
        list[str] | None,
        typer.Option(help="rbd, pft, pft-dropless, padded, ted, tutel or megablocks; default rbd and padded."),
    ] = None,
    remat: Annotated[str, typer.Option(help="none, as the paper trained, or block: recompute every block.")] = "none",
    most: Annotated[bool, typer.Option("--most", help="Also the most layers of each that fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compile whole training steps of the paper's sizes for GPUs that need not be there; say which of them fit."""
    import json

    from jaxlab.xmoe import trainable as planning

    with usage():
        sizes = [planning.known_size(name) for name in size or planning.SIZES]
        systems = [planning.known_system(name) for name in dispatch or ("rbd", "padded")]
        counts = devices or [1024]
        for count in counts:
            planning.layout(systems[0], 1, count, 1)
        planning.usable(gpu)
    found = []
    for outcome in planning.survey(sizes, systems, counts, gpu=gpu, remat=remat):
        layers = planning.most_layers(outcome, gpu=gpu) if most else None
        found.append((outcome, layers))
        if not as_json:
            typer.echo(planning.line(outcome, gpu, layers, header=len(found) == 1))
    if as_json:
        rows = [{**outcome.to_dict(), "fits": outcome.fits(gpu), "most_layers": layers} for outcome, layers in found]
        typer.echo(json.dumps({"gpu": gpu, "usable_bytes": planning.usable(gpu), "outcomes": rows}, indent=1))
    else:
        typer.echo(planning.verdict([outcome for outcome, _ in found], gpu))


@app.command()
def volume(
    experts: Annotated[int, typer.Option(help="E.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts a token visits.")] = 8,
    hidden: Annotated[int, typer.Option(help="Model width H.")] = 7168,
    tokens: Annotated[int, typer.Option(help="Tokens of one device.")] = 1024,
    devices: Annotated[int, typer.Option(help="Devices the experts lie on.")] = 32,
    node_size: Annotated[int, typer.Option(help="Devices of a node.")] = 8,
    pilot: Annotated[str, typer.Option(help="random, first or rail.")] = "random",
    capacity_factor: Annotated[float, typer.Option(help="Of the padded baseline; it drops what exceeds it.")] = 1.25,
    seed: Annotated[int, typer.Option(help="Of the routing, which is uniform.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Rows and bytes that padded dispatch, PFT and RBD send, one direction, where routing is uniform."""
    import json

    import numpy as np

    from jaxlab.xmoe import MoEConfig, Topology, dispatch_volume, redundancy_rate, uniform_redundancy_rate

    with usage():
        cfg = MoEConfig(
            num_experts=experts,
            top_k=top_k,
            hidden_size=hidden,
            ffn_size=1,
            pilot=pilot,
            capacity_factor=capacity_factor,
            drop_policy="probs",
        )
        topology = Topology(devices, node_size)
        draws = np.random.default_rng(seed).random((devices, tokens, experts), np.float32)
        choices = np.argpartition(draws, top_k - 1, axis=-1)[..., :top_k]
        moved = dispatch_volume(choices, cfg, topology)
    measured = redundancy_rate(choices, num_experts=experts, num_nodes=topology.num_nodes)
    expected = uniform_redundancy_rate(experts, top_k, topology.num_nodes)
    if as_json:
        content = {name: each._asdict() for name, each in moved.items()}
        typer.echo(json.dumps({**content, "redundancy": measured, "closed_form": expected}, indent=1))
        return
    typer.echo(
        f"{devices} devices in nodes of {topology.devices_per_node}, {tokens} tokens each; one direction, all sources"
    )
    typer.echo(f"{'':8}{'rows across':>14}{'rows inside':>14}{'GiB across':>12}{'GiB inside':>12}")
    for name, each in moved.items():
        sizes = f"{each.inter_bytes / 2**30:>12.3f}{each.intra_bytes / 2**30:>12.3f}"
        typer.echo(f"{name:8}{each.inter_rows:>14,}{each.intra_rows:>14,}{sizes}")
    typer.echo(f"redundancy: {measured:.2%} of the slots (closed form {expected:.2%})")
