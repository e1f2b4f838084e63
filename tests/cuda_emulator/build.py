"""Compiles CUDA sources for the emulator: into a shared library, a program, or the module fastrnn._C as a whole."""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_emulator"
CSRC = ROOT / "csrc"
EXTENSION_BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"  # as in setup.py

COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-fno-omit-frame-pointer"),
    "-fstack-clash-protection",  # a large frame touches every page: it cannot step over the guard of a stack
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DFASTRNN_CUDA_EMULATED", f"-I{HERE}"),
]
# With -O1, or with all of "undefined", the address sanitizer takes seven times as long to compile.
SANITIZERS = {
    None: [],
    "address": [
        "-O0",
        "-fsanitize=address,alignment,bounds,shift",
        "-fno-sanitize-recover=all",
        "-Wno-maybe-uninitialized",
    ],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_thread_leaks=0:atexit_sleep_ms=0"}


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    if platform.machine() != "x86_64":
        return "the emulator is for x86-64"
    return None if shutil.which(COMPILER) else f"no {COMPILER}"


def shared_library(sources: Sequence[Path], *, sanitizer: str | None = None, defines: Sequence[str] = ()) -> Path:
    """A library with the sources and the emulator; functions to be found in it need default visibility."""
    return _link("lib", ".so", ["-shared"], sources, sanitizer, defines, CSRC)


def program(
    sources: Sequence[Path], *, sanitizer: str | None = None, defines: Sequence[str] = (), csrc: Path = CSRC
) -> Path:
    """A program with the sources, one of which has main(), and the emulator. csrc: the folder of their headers.

    Sanitizer "address" also reports misaligned addresses, indices outside of arrays and shifts that are too wide;
    "thread" reports races. Python inside of the process would be in the way of both.
    """
    return _link("", "", ["-pie"], sources, sanitizer, defines, csrc)


def cuda_object(source: Path) -> Path:
    """The source compiled by nvcc, for sm_80 and sm_90."""
    flags = ["-std=c++17", "-Werror", "all-warnings", "--expt-relaxed-constexpr", "--threads=2"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    return _compile(source, "nvcc", flags, CSRC)


def environment(
    *, policy: int | None = None, seed: int | None = None, copy: str | None = None, **limits: int
) -> dict[str, str]:
    """The environment for a process with the emulator; limits: multiprocessors, shared_bytes, capability."""
    settings = {"policy": policy, "seed": seed, "copy": copy, **limits}
    given = {f"FASTRNN_EMULATOR_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
    return {**os.environ, **SANITIZER_OPTIONS, **given}


def run(program: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of this module."""
    command = [*_without_randomised_addresses(), str(program), *arguments]
    return subprocess.run(command, env=env or environment(), capture_output=True, text=True)


def extension_unavailable() -> str | None:
    """Why the module cannot be built, or None."""
    if not (EXTENSION_BUILD / "CMakeCache.txt").exists():
        return f"no build folder {EXTENSION_BUILD.relative_to(ROOT)}: fastrnn was installed from elsewhere"
    return unavailable()


@functools.cache
def extension() -> Path:
    """The module fastrnn._C with csrc/cuda emulated, up to date. For a process of its own: see python()."""
    with _locked(EXTENSION_BUILD / "lock"):
        _run_quietly(_cmake(), "--build", EXTENSION_BUILD, "--target", "_C_emulated")
    return EXTENSION_BUILD / f"_C_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"


def python(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python, in the root of the sources, with the emulated module as fastrnn._C.

    For example python("-m", "pytest", "tests/ops", env=environment(policy=1)) or python("-c", code).
    """
    env = {**(env or environment()), "FASTRNN_EMULATED_EXTENSION": str(extension())}
    start = [sys.executable, "-m", "tests.cuda_emulator.start"]
    return subprocess.run([*start, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def _link(
    prefix: str,
    suffix: str,
    flags: list[str],
    sources: Sequence[Path],
    sanitizer: str | None,
    defines: Sequence[str],
    csrc: Path,
) -> Path:
    defined = [f"-D{define}" for define in defines]
    jobs = [(HERE / "emulator.cpp", ["-O3"], CSRC)]  # never with a sanitizer: see there
    jobs += [(source, ["-x", "c++", *SANITIZERS[sanitizer], *defined], csrc) for source in sources]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda job: _compile(job[0], COMPILER, [*FLAGS, *job[1]], job[2]), jobs))
    flags = [*flags, *SANITIZERS[sanitizer]]
    name = _hash([" ".join(flags), *(o.name for o in objects)])
    output = CACHE / f"{prefix}{sources[0].stem}-{name}{suffix}"
    return _make(output, lambda path: [COMPILER, *flags, *map(str, objects), "-o", path])


def _compile(source: Path, compiler: str, flags: list[str], csrc: Path) -> Path:
    flags = [*flags, f"-I{csrc}"]
    headers = [*HERE.glob("*.h"), *csrc.glob("*.h"), *(csrc / "cuda").glob("*.h")]
    headers += source.parent.glob("*.h")
    contents = [p.read_text() for p in (source, *sorted(set(headers)))]
    name = _hash([_version(compiler), " ".join(flags), *contents])
    output = CACHE / f"{source.stem}-{name}.o"
    return _make(output, lambda path: [compiler, *flags, "-c", str(source), "-o", path])


def _make(output: Path, command: Callable[[str], list[str]]) -> Path:
    if not output.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with _locked(CACHE / f"{output.name}.lock"):
            if not output.exists():
                unfinished = output.with_name(f"unfinished-{output.name}")
                _run_quietly(*command(str(unfinished)))
                unfinished.replace(output)
    return output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_quietly(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _without_randomised_addresses() -> list[str]:
    """The start of a command, where allowed: the thread sanitizer of gcc 12 has room for 28 bits of random address."""
    command = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


@functools.cache
def _version(compiler: str) -> str:
    return _run_quietly(compiler, "--version")


def _cmake() -> str:
    """The program that made the build folder, or where that is gone (an isolated build) another one."""
    for line in (EXTENSION_BUILD / "CMakeCache.txt").read_text().splitlines():
        if line.startswith("CMAKE_COMMAND:INTERNAL=") and Path(found := line.split("=", 1)[1]).exists():
            return found
    try:
        return str(Path(importlib.import_module("cmake").CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        return "cmake"
