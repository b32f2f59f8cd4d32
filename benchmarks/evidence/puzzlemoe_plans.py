"""PuzzleMoE's "one GPU instead of two", by the compiler's word: whole models on one GPU, as they are and packed."""

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence import Item

SYSTEM = "puzzlemoe"

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-moe-16b")
GPUS = {"h100": "80 GB", "a100_40": "40 GB"}
CONTEXT, PROMPT = 1536, 1024  # the paper's run: 1024 tokens of prompt, 512 of answer
SEARCH_CONTEXT = 2048


def items() -> Iterator[Item]:
    """A row for each model, form, GPU and phase."""
    from jaxlab.puzzlemoe import serving

    title = (
        f"One row of {CONTEXT} positions ({PROMPT} of them prompt) on one GPU, GiB by XLA's buffer assignment (72.8 of "
        f"80 GB, 36.3 of 40 GB can be used); what fits beside it was compiled, too, and one step above"
    )
    for model in MODELS:
        for gpu in GPUS:
            for ratio in serving.RATIOS:
                for phase in serving.PHASES:
                    yield Item(
                        name=f"{model}, {ratio:.0%}, {gpu}, {phase}",
                        table=title,
                        settings={
                            "config": serving.hf_config(model),
                            "ratio": ratio,
                            "gpu": gpu,
                            "phase": phase,
                            "context": CONTEXT,
                            "prompt": PROMPT,
                            "search_context": SEARCH_CONTEXT,
                        },
                        run=lambda model=model, ratio=ratio, gpu=gpu, phase=phase: _row(model, ratio, gpu, phase),
                    )


def _row(model: str, ratio: float, gpu: str, phase: str) -> dict[str, Any]:
    from jaxlab.puzzlemoe import serving

    # Servers prefill prompts one by one, so the rows that fit are those of the decode step.
    prompt, searched = (PROMPT, None) if phase == "prefill" else (None, SEARCH_CONTEXT)
    found = serving.fit(model, gpu, ratio=ratio, phase=phase, context=CONTEXT, prompt=prompt, search_context=searched)

    def gib(size: int) -> float:
        return round(size / 2**30, 2)

    return {
        "model": model,
        "experts": f"{ratio:.0%} packed" if ratio else "bf16",
        "GPU": f"{gpu}, {GPUS[gpu]}",
        "phase": phase,
        "parameters": gib(found.bytes["parameters"]),
        "of them experts": gib(found.experts),
        "cache": gib(found.bytes["cache"]),
        "temporaries": gib(found.bytes["temporaries"]),
        "total": gib(found.bytes["total"]),
        "fits one": found.fits,
        "GPUs at least": found.gpus,
        f"rows of {SEARCH_CONTEXT}": found.largest_batch,
        "longest single row": found.longest_context,
    }
