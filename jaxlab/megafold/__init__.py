"""MegaFold: training of AlphaFold3, faster and in less memory (arXiv:2506.20686)."""
