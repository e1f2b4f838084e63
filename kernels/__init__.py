"""Triton kernels; installed as fastrnn.kernels."""
