"""docs/cuda_kernels.md: registers, stack, spills and static shared memory of every CUDA kernel, as ptxas tells them.

python -m bench.cuda_resources            write the page
python -m bench.cuda_resources --check    fail where it is not what the build gives

Both fail where nvcc or ptxas warns of anything. Nothing is compiled here: the build keeps what the compiler says of
each file beside its object (csrc/cuda/nvcc_logged.sh), so build first.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.machine import ROOT, native
from bench.tables import markdown

PAGE = ROOT / "docs" / "cuda_kernels.md"
SOURCES = ROOT / "csrc" / "cuda"


class StaleBuild(Exception):
    """Why the build does not tell what the sources give."""


class Usage(NamedTuple):
    registers: int | None  # None of a function that is not inlined into its kernels: it has no number of its own
    stack: int  # bytes of local memory, those of spills among them
    spills: int  # bytes written and read by spills, as instructions in the code
    shared: int  # bytes of static shared memory


Kernels = dict[str, dict[str, Usage]]  # mangled name -> architecture -> usage

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\w+)'")
_PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\S+)")
_STACK = re.compile(r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def build_folder() -> Path:
    """Where setup.py builds for this interpreter."""
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def logs(build: Path, sources: Path = SOURCES) -> dict[str, str]:
    """What the compiler said of each .cu file, by name; StaleBuild where it was not compiled since it changed."""
    found = {}
    for source in sorted(sources.glob("*.cu")):
        candidates = build.glob(f"CMakeFiles/*.dir/csrc/cuda/{source.name}.o.log")
        log = max(candidates, key=lambda path: path.stat().st_mtime, default=None)
        if log is None or log.stat().st_mtime < source.stat().st_mtime:
            raise StaleBuild(f"{source.name} is not compiled in {build}: build fastrnn with nvcc on PATH")
        found[source.name] = log.read_text()
    return found


def warnings(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]


def parse(log: str) -> Kernels:
    """The functions that ptxas -v tells of; ValueError where its lines do not follow each other as expected."""
    found: Kernels = {}
    entry = arch = name = ""
    for line in log.splitlines():
        if match := _ENTRY.match(line):
            entry, arch = match.groups()
        elif match := _PROPERTIES.match(line):
            name = match[1]
        elif match := _STACK.match(line):
            stack, stores, loads = map(int, match.groups())
            if not name or arch in found.get(name, {}):
                raise ValueError(f"a stack frame without a function of its own: {line!r}")
            found.setdefault(name, {})[arch] = Usage(None, stack, stores + loads, 0)
        elif match := _USED.match(line):
            if arch not in found.get(entry, {}):
                raise ValueError(f"registers without a kernel: {line!r}")
            shared = _SHARED.search(line)
            usage = found[entry][arch]
            found[entry][arch] = usage._replace(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
            entry = name = ""
    return found


def readable(mangled: Sequence[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters, enumerators by name."""
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for name in done.stdout.splitlines():
        name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        name = re.sub(r"\b(?:fastrnn|cuda)::", "", name)
        name = name[: _parameters(name)]
        names.append(re.sub(r"\((\w+)\)(\d+)", _enumerator, name))
    return names


def _enumerator(match: re.Match[str]) -> str:
    """The name for "(Cell)2" where a header of csrc declares it, without the k of constants."""
    enum, value = match[1], int(match[2])
    names = enumerators().get(enum, [])
    return re.sub(r"^k(?=[A-Z])", "", names[value]) if value < len(names) else match[0]


@functools.cache
def enumerators() -> dict[str, list[str]]:
    """The enumerators of each enum class of csrc, which count from 0."""
    found = {}
    for header in sorted((ROOT / "csrc").rglob("*.h")):
        text = re.sub(r"//.*", "", header.read_text())
        for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", text):
            found[name] = [part.strip() for part in body.split(",") if part.strip()]
    return {name: values for name, values in found.items() if not any("=" in value for value in values)}


def _parameters(name: str) -> int:
    """Where the parameters of a demangled function begin: the parenthesis that matches the last one."""
    depth = 0
    for index in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[index], 0)
        if name[index] == "(" and depth == 0:
            return index
    return len(name)


def table(kernels: Kernels) -> str:
    """One line for each kernel; a figure for each architecture, or one where they agree."""
    archs = sorted({arch for usages in kernels.values() for arch in usages})
    header = ["kernel", "architectures", "registers", "stack, bytes", "spills, bytes", "static shared memory, bytes"]
    lines = []
    for name, usages in sorted(zip(readable(list(kernels)), kernels.values(), strict=True)):
        columns = zip(*(usages[arch] for arch in archs if arch in usages), strict=True)
        figures = ["–" if None in column else " / ".join(map(str, column)) for column in columns]
        lines.append([f"`{name}`", " / ".join(arch for arch in archs if arch in usages), *figures])
    return markdown(header, lines)


def page(compiler: str, of_files: dict[str, Kernels]) -> str:
    tables = "\n\n".join(f"## {name}\n\n{table(kernels)}" for name, kernels in of_files.items() if kernels)
    return (
        "# Resources of the CUDA kernels\n\n"
        "Written by `python -m bench.cuda_resources` from what ptxas says in the build. Figures of several\n"
        "architectures are in their order; registers are per thread; what a launcher asks for is not counted.\n\n"
        f"Compiler: {compiler}.\n\n{tables}\n"
    )


def compiler() -> str:
    """The CUDA compiler of the build; StaleBuild without one."""
    module = native()
    lines = [] if module is None else module.build_info().splitlines()
    (found,) = [line.partition(": ")[2] for line in lines if line.startswith("cuda compiler: ")] or ["none"]
    if found == "none":
        raise StaleBuild("fastrnn is built without CUDA: build it with nvcc on PATH")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description="Resources of CUDA kernels.")
    parser.add_argument("--check", action="store_true", help="only tell whether the page is what the build gives")
    options = parser.parse_args(arguments)
    nvcc = compiler()
    found = logs(build_folder())
    warned = [f"{name}: {line}" for name, log in found.items() for line in warnings(log)]
    for line in warned:
        print(line, file=sys.stderr)
    wanted = page(nvcc, {name: parse(log) for name, log in found.items()})
    if not options.check:
        PAGE.write_text(wanted)
        print(f"wrote {PAGE}")
        return int(bool(warned))
    present = PAGE.read_text()
    if f"Compiler: {nvcc}." not in present:
        print(f"{PAGE.name} is of another compiler than {nvcc}: not compared")
    elif present != wanted:
        print(f"{PAGE.name} is not what the build gives: run python -m bench.cuda_resources", file=sys.stderr)
        return 1
    return int(bool(warned))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, StaleBuild, ValueError) as error:
        sys.exit(f"bench.cuda_resources: {error}")
