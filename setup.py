"""Builds fastrnn._C with CMake and Ninja; all else about the package is in pyproject.toml.

Environment: FASTRNN_CUDA=AUTO|ON|OFF (AUTO: CUDA is built when nvcc is found), FASTRNN_NO_EXT=1 (pure Python package
that runs on the reference), CMAKE_ARGS (passed on).
"""

import fcntl
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STAGE = tempfile.TemporaryDirectory()  # a staging folder that survives would put deleted modules into later wheels


def tool(name: str, bin_dir: str) -> str:
    """The program of the Python package (a venv that is not activated has no PATH to it), else the one on PATH."""
    try:
        return str(Path(getattr(importlib.import_module(name), bin_dir)) / name)
    except ImportError:
        return shutil.which(name) or name


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # Kept between builds, isolated ones too, so that the next one compiles only what changed.
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTRNN_CUDA={os.environ.get('FASTRNN_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "lock", "w") as lock:  # tests that run side by side build here
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # written over in place, it would crash the processes that have it loaded
        self.copy_file(str(build_dir / target.name), str(target))


setup(
    packages=[*find_packages(include=["fastrnn", "fastrnn.*"]), "fastrnn.kernels"],
    ext_modules=[] if os.environ.get("FASTRNN_NO_EXT") == "1" else [Extension("fastrnn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    options={"build": {"build_base": STAGE.name}},
)
