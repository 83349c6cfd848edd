"""Triton kernels of the row operators; a leaf: it imports torch and Triton only, and touches no GPU when imported."""
