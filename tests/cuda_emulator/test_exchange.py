"""csrc/cuda/exchange_benchmark.cu, every method: under each order of the threads, no bad accesses, no races."""

import pytest

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

SOURCES = [build.HERE / "exchange_main.cpp", build.ROOT / "csrc" / "cuda" / "exchange_benchmark.cu"]


@pytest.mark.parametrize("policy", range(4))
@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_every_block_sees_all_words(sanitizer: str | None, policy: int) -> None:
    done = build.run(build.program(SOURCES, sanitizer=sanitizer), env=build.environment(policy=policy, seed=policy))
    assert done.stdout == "0 wrong\n" and done.returncode == 0, done.stderr


FROM_PYTHON = """
from bench.gpu.exchange import METHODS, Exchange, Prepared, check
for method in METHODS:
    exchange = Exchange(method, 4, 36, rounds=4, cluster=2, threads=64)
    prepared = Prepared(exchange, "cpu")
    for _ in range(2):  # the second over what the first left behind
        check(exchange, prepared.launch())
print("checked", len(METHODS))
"""


@pytest.mark.skipif(build.extension_unavailable() is not None, reason=str(build.extension_unavailable()))
def test_from_python() -> None:
    done = build.python("-c", FROM_PYTHON)
    assert done.stdout == "checked 6\n", done.stderr


@pytest.mark.skipif(build.extension_unavailable() is not None, reason=str(build.extension_unavailable()))
def test_clusters_need_a_device_that_has_them() -> None:
    done = build.python("-c", FROM_PYTHON, env=build.environment(capability=80))
    assert "RuntimeError: clusters need compute capability 9.0" in done.stderr
