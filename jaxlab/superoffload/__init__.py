"""SuperOffload: optimizer, weight and activation offload for CPU-GPU superchips (arXiv:2509.21271)."""
