"""A network of next to nothing, and a study of it: programs that compile fast."""

from jaxlab import core
from jaxlab.megafold.study import StudyConfig

BLOCKS = ("pairformer_blocks", "msa_blocks", "template_blocks", "confidence_blocks")
CHANGES = {
    **dict.fromkeys(BLOCKS, 0),
    "token_blocks": 1,
    "c_s": 16,
    "c_z": 8,
    "c_m": 8,
    "c_token": 16,
    "c_atom": 16,
    "c_atompair": 4,
    "single_heads": 2,
    "token_heads": 2,
    "diffusion_samples": 2,
    "max_tokens": 16,
    "max_atoms": 128,
    "max_msa_rows": 1,
    "remat": False,
}
YAML = f"""
system: megafold
structures:
  - {{structure: af3/mmcif/721p-assembly1.cif, tokens: [[8, 14], [166, 172]]}}
network: {{preset: tiny, changes: {CHANGES}}}
training:
  learning_rate: 1e-2
  warmup_steps: 1
  ema_decay: 0.5
  loss: {{confidence: 0.1, pae: 1.0, rollout_steps: 2}}
steps: 4
samples: 2
sampling_steps: 2
"""


def config(folder, **changes) -> StudyConfig:
    """The study, with other values."""
    path = folder / "toy.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(YAML.replace("False", "false"))
    return core.load_config(StudyConfig, path, [f"{name}={value}" for name, value in changes.items()])
