"""The exchange between blocks, by every method: each block sees all words of all rounds."""

import pytest
import torch

from bench.gpu.exchange import METHODS, Exchange, Prepared, check
from fastrnn.backends import native


def run(exchange: Exchange) -> None:
    prepared = Prepared(exchange)
    check(exchange, prepared.launch())
    check(exchange, prepared.launch())  # over what the first launch left behind


def test_the_library_sees_the_device_that_torch_sees():
    assert native.load() is not None, native.load_error()
    assert native.load().cuda_status() == "ok"
    assert native.load().cuda_device_count() == torch.cuda.device_count()


@pytest.mark.parametrize("slice_", [4, 36, 2048])
@pytest.mark.parametrize("blocks", [1, 7, "all"])
@pytest.mark.parametrize("method", METHODS[:-1])
def test_grid(method, blocks, slice_):
    blocks = torch.cuda.get_device_properties(0).multi_processor_count if blocks == "all" else blocks
    run(Exchange(method, blocks, slice_, rounds=300))


@pytest.mark.parametrize("slice_", [4, 36, 1024])
@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_cluster(cluster, slice_):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    run(Exchange("cluster", 3 * cluster, slice_, rounds=300, cluster=cluster))


def test_more_blocks_than_fit_are_refused():
    with pytest.raises(RuntimeError, match="cooperative"):
        Prepared(Exchange("flags", 100_000, 4, rounds=1)).launch()
