"""First light: the foundation's own recipes, which the tour runs before any paper's.

- `jaxlab.foundation.recipe`: a small language model trained on real text; `plan` compiles the same at 8B scale.
- `jaxlab.foundation.answer`: SmolLM2-135M from its GGUF file, answering a prompt.
- `jaxlab.foundation.kernel`: the grouped matmul beside its alternatives.
- `jaxlab.foundation.layouts`: the plan of an 8B-class training step on 64 H100s.

    jaxlab foundation run steps=100
    jaxlab plan configs/foundation/plan_8b.yaml --gpu h100 --topology 1x8x8
"""

__all__: list[str] = []
