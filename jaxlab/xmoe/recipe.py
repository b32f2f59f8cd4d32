"""A fine-grained mixture of experts trained on real text, and what its routing means for memory and network."""

import dataclasses
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlab import core
from jaxlab.training import TrainConfig, plan, train

if TYPE_CHECKING:
    import numpy as np

    from jaxlab.xmoe import MoEConfig

__all__ = ["XMoEConfig", "plan", "run"]

_GB = 1e9
_DROPLESS = "none dropped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class XMoEConfig(TrainConfig):
    """A training run and what it is shown with; every default is ours.

    Attributes:
      devices: expert-parallel ranks that the trained routing is counted for.
      node_size: of them inside a node.
      nodes: node counts for which the redundancy of the routing is told.
      rows: held-out rows that are routed; a multiple of `devices`.
      folder: keeps metrics, checkpoints and the model; none: a temporary one, so that every run starts anew.
    """

    devices: int = 8
    node_size: int = 4
    nodes: tuple[int, ...] = (2, 4, 8)
    rows: int = 16
    folder: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("devices", "node_size", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a value >= 1, got {getattr(self, name)}")
        if self.devices % min(self.node_size, self.devices):
            raise ValueError(f"devices: expected a multiple of node_size = {self.node_size}, got {self.devices}")
        if self.model.moe is not None and self.model.moe.num_experts % self.devices:
            raise ValueError(
                f"devices: expected a divisor of num_experts = {self.model.moe.num_experts}, got {self.devices}"
            )
        if self.rows % self.devices:
            raise ValueError(f"rows: expected a multiple of devices = {self.devices}, got {self.rows}")


def run(config: XMoEConfig) -> core.Report:
    """Trains the model; tells its loss, the load of its experts, and what dispatching its tokens moves and keeps.

    Needs nothing but a CPU. A model without experts is trained, and that is all. With eight devices or more (forced CPU
    devices will do) the layer runs expert-parallel, too; with fewer its exchanges are counted from their plans.
    """
    with core.kept_or_temporary(config.folder) as folder:
        return _run(config, folder)


def _run(config: XMoEConfig, folder: Path) -> core.Report:
    from jaxlab.models import cost

    told = dataclasses.replace(train(config, folder), system="xmoe")
    spec = config.model.moe
    if spec is None:
        return told
    count = cost.parameter_count(config.model)
    layers = _Layers(config, folder)
    load, redundancy = layers.load(), layers.redundancy()
    moved, alike = layers.volumes(), layers.alike()
    kept = _paper_memory()
    rows = {(mode, capacity): volume for mode, capacity, volume in moved}
    saved = 1 - rows["rbd", _DROPLESS].inter_rows / rows["pft", _DROPLESS].inter_rows
    return dataclasses.replace(
        told,
        title=f"{spec.num_experts} experts, {spec.top_k} a token: {count.total / 1e6:.1f} M parameters on real text",
        metrics={
            **told.metrics,
            "active_parameters": count.active,
            "idle_experts": int((load == 0).sum()),
            "busiest_over_mean": float(load.max()),
            "network_rows_saved_by_rbd": saved,
            "largest_difference": max(difference for _, difference, *_ in alike if difference is not None),
        },
        tables=(
            *told.tables,
            (
                "Redundancy of the trained routing: slots whose token visits their node for another slot already",
                ("nodes", "measured", "uniform routing"),
                redundancy,
            ),
            (
                f"Dispatching {layers.tokens} tokens from {config.devices} devices in nodes of {config.node_size}, "
                "one direction, mean layer",
                ("mode", "capacity", "rows between nodes", "rows inside nodes", "MB between nodes", "MB inside nodes"),
                [
                    (mode, capacity, v.inter_rows, v.intra_rows, v.inter_bytes / 1e6, v.intra_bytes / 1e6)
                    for mode, capacity, v in moved
                ],
            ),
            (
                "The first sparse layer on real inputs, in several ways, against every expert on every token",
                ("mode", "relative difference", "devices", "rows between nodes", "counted from the choices"),
                alike,
            ),
            (
                "Memory of one layer of the paper's Large between forward and backward, GB on one device (modelled)",
                ("mode", "dispatch", "combine", "intermediate", "mask", "total"),
                [(mode, *(parts[kind] / _GB for kind in parts)) for mode, parts in kept.items()],
            ),
        ),
        plots=(
            *told.plots,
            ("Load of the experts on held-out text, over the mean", _heat(load)),
            ("What RBD can save: redundancy of the routing", _redundancy_bars(redundancy)),
            (f"Rows that {config.devices} devices send, one layer", _volume_bars(moved)),
            ("Activations of one layer of the paper's Large (modelled)", _memory_bars(kept)),
        ),
        notes=(
            *told.notes,
            f"Routing was counted on {layers.tokens} tokens of held-out text. Rows and redundancy are exact counts for "
            "this model; 'padded' moves the experts' whole capacity, used or not.",
            "Memory follows the closed form of jaxlab.xmoe.activation_memory at the paper's sizes; nothing of it ran.",
        ),
    )


class _Layers:
    """The trained sparse layers, and what held-out tokens look like when they enter them."""

    def __init__(self, config: XMoEConfig, folder: Path):
        import jax
        import numpy as np

        from jaxlab.models import load_pretrained, load_tokenizer
        from jaxlab.models.decoder import MoEPolicy
        from jaxlab.training import text_batches
        from jaxlab.xmoe import Topology

        self.config, self.topology = config, Topology(config.devices, config.node_size)
        self.layer = MoEPolicy().layer_config(config.model)
        model, params = load_pretrained(folder / "model", mlp=_tapped)
        batch = next(
            text_batches(
                config.data,
                load_tokenizer(config.tokenizer),
                batch_size=config.rows,
                length=config.length,
                seed=config.seed,
                split="validation",
            )
        )
        self.tokens = batch.tokens.size
        apply = jax.jit(lambda params, tokens, *rest: model.apply({"params": params}, tokens, *rest).aux)
        aux = apply(params, batch.tokens, batch.positions, batch.segment_ids)
        runs = [(params[name]["mlp"], seen) for name, seen in aux.items() if "input" in seen]
        self.params = [
            jax.tree.map(operator.itemgetter(i), mlp) for mlp, seen in runs for i in range(len(seen["input"]))
        ]
        self.inputs = np.concatenate(
            [seen["input"].reshape(-1, self.tokens, self.layer.hidden_size) for _, seen in runs]
        )
        self.routers = np.stack([mlp["router"]["kernel"] for mlp in self.params])
        self.choices = np.asarray(_choices(self.inputs, self.routers, self.layer))

    def load(self) -> "np.ndarray":
        """[layers, E] slots of each expert over the mean."""
        import numpy as np

        counts = np.stack([np.bincount(ids.reshape(-1), minlength=self.layer.num_experts) for ids in self.choices])
        return counts / counts.mean(axis=1, keepdims=True)

    def redundancy(self) -> list[tuple[int, float, float]]:
        """For each number of nodes: measured, and expected of uniform routing."""
        from jaxlab.xmoe import redundancy_rate, uniform_redundancy_rate

        experts, k = self.layer.num_experts, self.layer.top_k
        return [
            (
                nodes,
                redundancy_rate(self.choices, num_experts=experts, num_nodes=nodes),
                uniform_redundancy_rate(experts, k, nodes),
            )
            for nodes in self.config.nodes
            if experts % nodes == 0
        ]

    def volumes(self) -> list[tuple[str, str, Any]]:
        """(mode, capacity, volume of the mean layer)."""
        dropping = dataclasses.replace(self.layer, drop_policy="probs")
        plain = self._volume(self.layer)
        return [
            ("padded", _DROPLESS, plain["padded"]),
            ("padded", f"{dropping.capacity_factor:g}", self._volume(dropping)["padded"]),
            ("pft", _DROPLESS, plain["pft"]),
            ("rbd", _DROPLESS, plain["rbd"]),
        ]

    def _volume(self, layer: "MoEConfig") -> dict[str, Any]:
        from jaxlab.xmoe import dispatch_volume

        each = [dispatch_volume(self._by_device(ids), layer, self.topology, itemsize=4) for ids in self.choices]
        means = {
            mode: [
                round(sum(getattr(volume[mode], name) for volume in each) / len(each)) for name in each[0][mode]._fields
            ]
            for mode in each[0]
        }
        return {mode: type(each[0][mode])(*values) for mode, values in means.items()}

    def _by_device(self, rows: "np.ndarray") -> "np.ndarray":
        return rows.reshape(self.config.devices, -1, rows.shape[-1])

    def alike(self) -> list[tuple[str, float | None, int, int | None, int | None]]:
        """The first sparse layer on its real inputs: (mode, difference, devices, rows across nodes, as planned)."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from jaxlab.xmoe import MoE, dispatch_volume

        devices, params = self.config.devices, self.params[0]
        x = jnp.asarray(self._compared(self.inputs[0]))
        key = core.named_key(jax.random.key(self.config.seed), "pilots")

        def outcome(mode: str, mesh: Any) -> tuple[Any, Any]:
            axes = () if mesh is None else tuple(mesh.axis_names)
            layer = MoE(dataclasses.replace(self.layer, dispatch=mode, expert_axes=axes), mesh=mesh)
            return jax.jit(lambda params, x: layer.apply({"params": params}, x, rng=key))(params, x)

        want = outcome("dense", None)[0]
        scale = float(jnp.max(jnp.abs(want)))

        def difference(y: Any) -> float:
            return float(np.max(np.abs(np.asarray(y) - np.asarray(want)))) / scale

        rows: list[tuple[str, float | None, int, int | None, int | None]] = [
            (mode, difference(outcome(mode, None)[0]), 1, None, None) for mode in ("local", "padded")
        ]
        counted = dispatch_volume(self._by_device(self._compared(self.choices[0])), self.layer, self.topology)
        if len(jax.devices()) < devices:
            sent = self._planned(key)
            rows += [(f"{mode}, planned only", None, devices, sent[mode], counted[mode].inter_rows) for mode in sent]
            return rows
        sizes = {"node": self.topology.num_nodes, "expert": self.topology.devices_per_node}
        mesh = core.make_mesh(sizes, jax.devices()[:devices])
        for mode in ("pft", "rbd"):
            y, metrics = outcome(mode, mesh)
            rows.append((mode, difference(y), devices, int(metrics.inter_node_rows), counted[mode].inter_rows))
        return rows

    def _compared(self, rows: "np.ndarray") -> "np.ndarray":
        """The first tokens: padding without dropping keeps masks of S * E * S numbers."""
        devices = self.config.devices
        return rows[: min(self.tokens, max(512 // devices, 1) * devices)]

    def _planned(self, key: Any) -> dict[str, int]:
        """Rows between nodes that the first sparse layer's buffers and pilot plans hold, over all source devices."""
        import jax
        import jax.numpy as jnp

        from jaxlab.xmoe import build_pft, rbd_plan, top_k_gating

        def rows_of(x: Any, key: Any) -> tuple[Any, Any]:
            logits = _logits(x, self.routers[0])
            pft = build_pft(top_k_gating(logits, self.layer, train=False), self.layer)
            plan = rbd_plan(pft, self.layer, self.topology, key)
            return pft.tokens_per_expert.reshape(self.config.devices, -1).sum(1), plan.pilot_sizes

        shards = self._by_device(self._compared(self.inputs[0]))
        sent = jax.jit(jax.vmap(rows_of))(jnp.asarray(shards), jax.random.split(key, len(shards)))
        node = jnp.arange(self.config.devices) // self.topology.devices_per_node
        abroad = node[:, None] != node
        return {mode: int(jnp.sum(sizes * abroad)) for mode, sizes in zip(("pft", "rbd"), sent)}


def _tapped(config: Any, layer_is_sparse: bool) -> Any:
    """The MLP protocol: the default MLP, which reports its input where it is sparse."""
    from flax import linen as nn

    from jaxlab.models.decoder import default_mlp

    if not layer_is_sparse:
        return default_mlp(config, layer_is_sparse)

    class Tapped(nn.Module):
        inner: nn.Module

        def setup(self):
            nn.share_scope(self, self.inner)

        def __call__(self, x, *, train: bool = False):
            y, _ = self.inner(x, train=train)
            return y, {"input": x}

    return Tapped(default_mlp(config, layer_is_sparse))


def _choices(inputs: Any, routers: Any, layer: "MoEConfig") -> Any:
    """[layers, S, k] expert ids."""
    import jax

    from jaxlab.xmoe import top_k_gating

    def choose(x: Any, kernel: Any) -> Any:
        return top_k_gating(_logits(x, kernel), layer, train=False).expert_ids

    return jax.jit(jax.vmap(choose))(inputs, routers)


def _logits(x: Any, kernel: Any) -> Any:
    import jax.numpy as jnp

    return jnp.matmul(x.astype(jnp.float32), kernel)


def _paper_memory() -> dict[str, dict[str, int]]:
    """`activation_memory` of the paper's Large for one sequence of 4096 tokens; sizes are its script's."""
    from jaxlab.xmoe import MoEConfig, activation_memory

    large = MoEConfig(num_experts=256, top_k=8, hidden_size=7168, ffn_size=2048, activation="silu", drop_policy="probs")
    sizes = {"batch": 1, "seq": 4096, "ep": 64, "dtype": "bfloat16"}
    kept = {
        title: activation_memory(large, tp=tp, mode=mode, ssmb=ssmb, **sizes)
        for title, mode, tp, ssmb in (
            ("DeepSpeed-MoE (padded)", "padded", 1, False),
            ("DeepSpeed-TED, TP 2", "ted", 2, False),
            ("Tutel", "tutel", 1, False),
            ("X-MoE: PFT, RBD", "pft", 1, False),
            ("X-MoE with SSMB, TP 2", "pft", 2, True),
        )
    }
    return {
        title: {kind: parts[kind] for kind in ("dispatch", "combine", "intermediate", "mask", "total")}
        for title, parts in kept.items()
    }


def _heat(load: "np.ndarray") -> Any:
    from jaxlab.core.figures import figure

    layers, experts = load.shape
    drawn, axes = figure(7.6, 1.3 + 0.32 * layers)
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_yticks(range(layers), [f"layer {index}" for index in range(layers)])
    axes.set_xlabel(f"expert (of {experts})")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = drawn.colorbar(image, ax=axes, extend="max", pad=0.02)
    bar.set_label("tokens / mean")
    return drawn


def _redundancy_bars(rows: list[tuple[int, float, float]]) -> Any:
    from jaxlab.core.figures import BLUE, GREY, figure

    drawn, axes = figure(6.0, 3.2)
    for shift, column, colour, label in ((-0.2, 1, BLUE, "trained router"), (0.2, 2, GREY, "uniform routing")):
        heights = [100 * row[column] for row in rows]
        bars = axes.bar([index + shift for index in range(len(rows))], heights, 0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=9, padding=2)
    axes.set_xticks(range(len(rows)), [f"{nodes} nodes" for nodes, *_ in rows])
    axes.set_ylabel("redundant slots, %")
    axes.set_ylim(0, 100)
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False)
    return drawn


def _volume_bars(rows: list[tuple[str, str, Any]]) -> Any:
    """What padding without dropping moves is left to the table: it would dwarf the others."""
    from jaxlab.core.figures import BLUE, ORANGE, figure

    drawn, axes = figure(7.0, 2.6)
    shown = [(mode, capacity, volume) for mode, capacity, volume in rows if (mode, capacity) != ("padded", _DROPLESS)]
    names = [
        f"{mode}, {'dropless' if capacity == _DROPLESS else 'capacity ' + capacity}" for mode, capacity, _ in shown
    ]
    for shift, field, colour, label in (
        (-0.2, "inter_rows", ORANGE, "between nodes"),
        (0.2, "intra_rows", BLUE, "inside nodes"),
    ):
        values = [getattr(volume, field) for *_, volume in shown]
        bars = axes.barh([index + shift for index in range(len(shown))], values, 0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{value:,}" for value in values], fontsize=9, padding=3)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("rows")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.25))
    return drawn


def _memory_bars(kept: dict[str, dict[str, int]]) -> Any:
    from jaxlab.core.figures import COLOURS, figure

    drawn, axes = figure(7.6, 3.0)
    names = list(kept)
    left = [0.0] * len(names)
    for kind, colour in zip(("dispatch", "combine", "intermediate", "mask"), COLOURS):
        sizes = [kept[name][kind] / _GB for name in names]
        axes.barh(names, sizes, left=left, color=colour, height=0.6, label=kind)
        left = [start + size for start, size in zip(left, sizes)]
    for index, total in enumerate(left):
        axes.text(total, index, f" {total:.2f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("GB on one device")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.2))
    return drawn
