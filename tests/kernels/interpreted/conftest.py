"""Runs this folder's tests with Triton's interpreter.

Triton decides as it is imported whether kernels run in Python, on CPU tensors, or are compiled.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.own_process import OwnProcess

ROOT = Path(__file__).parents[3]


def _start(arguments: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**environment, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


_PROCESS = OwnProcess(
    __file__,
    inside=os.environ.get("TRITON_INTERPRET") == "1",
    start=_start,
    unavailable=None if importlib.util.find_spec("triton") else "triton is not installed",
)
pytest_collection_modifyitems = _PROCESS.add_marks
pytest_pyfunc_call = _PROCESS.report_result
pytest_runtest_logreport = _PROCESS.write_result
