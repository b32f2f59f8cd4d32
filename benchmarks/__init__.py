"""Ratios against named peers, the evidence that the documentation shows, and its generated pages."""

NAMES = {
    "foundation": "Foundation",
    "xmoe": "X-MoE",
    "puzzlemoe": "PuzzleMoE",
    "superoffload": "SuperOffload",
    "megafold": "MegaFold",
    "sfpo": "SFPO",
    "eaglet": "EAGLET",
    "vlm-scaling": "VLM scaling",
    "voltanallm": "VoltanaLLM",
    "instantedit": "InstantEdit",
    "flexgaussian": "FlexGaussian",
}
"""What the pages call each system, in their order."""
