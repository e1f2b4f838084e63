"""docs/cuda_kernels.md is what the build's compiler says of the kernels, and it warns of nothing."""

import os
import shutil

import pytest

from bench import cuda_resources

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastrnn4cuda12_GLOBAL__N_14stepI5BlockLi8EEEvPKf' for 'sm_80'
ptxas info    : Function properties for _ZN7fastrnn4cuda12_GLOBAL__N_14stepI5BlockLi8EEEvPKf
    48 bytes stack frame, 40 bytes spill stores, 60 bytes spill loads
ptxas info    : Function properties for _ZN7fastrnn4cuda5outerEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 12.0 ms
ptxas info    : Compiling entry function '_ZN7fastrnn4cuda12_GLOBAL__N_14stepI5BlockLi8EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN7fastrnn4cuda12_GLOBAL__N_14stepI5BlockLi8EEEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers
"""


def test_page_is_what_the_build_gives(capsys):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    assert cuda_resources.main(["--check"]) == 0, capsys.readouterr().err


def test_no_kernel_spills_much():
    """Bytes written and read by instructions that a step may pass; 255 registers are all that a thread can have."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    found = cuda_resources.logs(cuda_resources.build_folder())
    kernels = [usages for log in found.values() for usages in cuda_resources.parse(log).values()]
    spills = [usage.spills for usages in kernels for usage in usages.values()]
    assert len(spills) >= 160 and max(spills) <= 256


def test_figures_of_every_function():
    table = cuda_resources.table(cuda_resources.parse(LOG))
    assert "| `step<Block, 8>` | sm_80 / sm_90 | 128 / 96 | 48 / 0 | 100 / 0 | 1024 / 0 |" in table
    assert "| `outer` | sm_80 | – | 0 | 0 | 0 |" in table


@pytest.mark.parametrize(
    "lines",
    [slice(3, None), slice(0, 1), slice(1, 2)],
    ids=["stack frame of no function", "nothing", "no figures"],
)
def test_logs_that_tell_less(lines):
    log = "\n".join(LOG.splitlines()[lines])
    if lines.start == 3:
        with pytest.raises(ValueError, match="a stack frame without a function of its own"):
            cuda_resources.parse(log)
    else:
        assert cuda_resources.parse(log) == {}


def test_registers_without_a_kernel():
    log = "\n".join(line for line in LOG.splitlines() if "stack frame" not in line)
    with pytest.raises(ValueError, match="registers without a kernel"):
        cuda_resources.parse(log)


def test_parameters_are_cut_off_a_name():
    mangled = ["_ZN7fastrnn4cuda5applyILNS_8ExchangeE5EEEvPFvifEf", "not_mangled"]
    assert cuda_resources.readable(mangled) == ["apply<Cluster>", "not_mangled"]


def test_an_unknown_enumerator_stays_a_number():
    assert cuda_resources.readable(["_ZN7fastrnn5applyILNS_8ExchangeE9EEEvv", "_Z1fIL1X0EEvv"]) == [
        "apply<(Exchange)9>",
        "f<(X)0>",
    ]


def test_warnings():
    log = 'x.cu(3): warning #177-D: variable "a" was declared but never referenced\nptxas warning : Unresolved\n' + LOG
    assert [line.split(":")[0] for line in cuda_resources.warnings(log)] == ["x.cu(3)", "ptxas warning "]
    assert cuda_resources.warnings(LOG) == []


def test_a_build_older_than_its_source_is_stale(tmp_path):
    sources, objects = tmp_path / "sources", tmp_path / "CMakeFiles" / "fastrnn_kernels.dir" / "csrc" / "cuda"
    sources.mkdir()
    objects.mkdir(parents=True)
    source, log = sources / "a.cu", objects / "a.cu.o.log"
    source.touch()
    with pytest.raises(cuda_resources.StaleBuild, match=r"a\.cu is not compiled in .*: build fastrnn with nvcc"):
        cuda_resources.logs(tmp_path, sources)
    log.write_text(LOG)
    assert cuda_resources.logs(tmp_path, sources) == {"a.cu": LOG}
    os.utime(source, (log.stat().st_mtime + 1,) * 2)
    with pytest.raises(cuda_resources.StaleBuild):
        cuda_resources.logs(tmp_path, sources)


def test_a_table_of_another_compiler_is_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda_resources, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(cuda_resources, "compiler", lambda: "nvcc 13.0.88")
    found = {"a.cu": LOG}
    monkeypatch.setattr(cuda_resources, "logs", lambda build: found)
    assert cuda_resources.main([]) == 0
    assert cuda_resources.main(["--check"]) == 0
    found["a.cu"] = LOG.replace("128 registers", "255 registers")
    assert cuda_resources.main(["--check"]) == 1
    assert "page.md is not what the build gives" in capsys.readouterr().err
    monkeypatch.setattr(cuda_resources, "compiler", lambda: "nvcc 13.1.0")
    assert cuda_resources.main(["--check"]) == 0
    assert "page.md is of another compiler than nvcc 13.1.0" in capsys.readouterr().out
    found["a.cu"] = "a.cu(1): warning #1-D: last line\n" + LOG
    assert cuda_resources.main(["--check"]) == 1
    assert capsys.readouterr().err == "a.cu: a.cu(1): warning #1-D: last line\n"
