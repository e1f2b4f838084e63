"""Runs this folder's tests with the emulated module, whose back end `cuda` takes tensors on the CPU."""

import os

from tests.cuda_emulator import build
from tests.own_process import OwnProcess

_PROCESS = OwnProcess(
    __file__,
    inside="FASTRNN_EMULATED_EXTENSION" in os.environ,
    start=lambda arguments, environment: build.python(*arguments, env={**build.environment(), **environment}),
    unavailable=build.extension_unavailable(),
)
pytest_collection_modifyitems = _PROCESS.add_marks
pytest_pyfunc_call = _PROCESS.report_result
pytest_runtest_logreport = _PROCESS.write_result
