"""torchrun's program in test_processes.py: several examples one after another, for processes start slowly.

Its argument is a JSON list of command lines, each the name of an example and its options.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
processes = importlib.import_module("_processes")

leave = processes.leave
processes.leave = lambda: None
for program, *options in json.loads(sys.argv[1]):
    sys.argv = [program, *options]
    with contextlib.suppress(SystemExit):  # by which all but the first process end
        assert importlib.import_module(Path(program).stem).main() == 0
leave()
