"""The fixture `isa`, as the operators' tests have it."""

from tests.ops.conftest import isa

__all__ = ["isa"]
