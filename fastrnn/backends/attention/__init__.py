"""The back ends of the operator `attention`, under the names that they have everywhere."""

from fastrnn.backends.attention import aten, cpu, reference, triton

__all__ = ["aten", "cpu", "reference", "triton"]
