"""Runs `python ARGUMENTS` with the module at FASTRNN_EMULATED_EXTENSION as fastrnn._C.

`python -m tests.cuda_emulator.start -m pytest tests/ops` or `... -c CODE` or `... script.py`.
"""

import importlib.util
import os
import runpy
import sys
from importlib.machinery import ExtensionFileLoader


def load_extension() -> None:
    path = os.environ["FASTRNN_EMULATED_EXTENSION"]
    loader = ExtensionFileLoader("fastrnn._C", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("fastrnn._C", path, loader=loader))
    loader.exec_module(module)
    sys.modules["fastrnn._C"] = module


def main() -> None:
    load_extension()
    option, *arguments = sys.argv[1:]
    if option == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [option, *arguments]
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    main()
