"""Settings that all tests share."""

import os
from collections.abc import Iterator

# Read when torch loads OpenMP: on shared cores, threads that spin while they wait made tests over ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    return "+".join(val) or "plain" if argname == "options" and isinstance(val, tuple) else None


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Two threads, a fixed seed, and NaN in what torch.empty gives out: whoever reads it before writing fails."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
