"""The tests' own kernels are CUDA: nvcc compiles them as they are."""

import shutil

import pytest

from tests.cuda_emulator import build


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["functions.cu", "faults.cu"])
def test_nvcc_compiles_for_sm_80_and_sm_90(name: str) -> None:
    assert build.cuda_object(build.HERE / name).exists()
