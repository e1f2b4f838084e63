"""How long blocks take to hand each other a vector: the floor under every step of a recurrence spread over the GPU.

python -m bench.gpu.exchange    measure, print the table and add it to the results
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import machine
from bench.gpu import results
from bench.gpu.report import exchange_table
from bench.gpu.timing import EventTimer
from bench.timing import summary

# In the order of csrc/cuda/exchange_benchmark.h.
METHODS = ("grid barrier", "flags", "flags, 128 bytes apart", "tagged words", "prefilled words", "cluster")
CLUSTERS = (8, 16)
# B, H of the h that a step hands over, in 16-bit elements.
SIZES = ((1, 256), (16, 768), (64, 1024), (128, 1024), (128, 2048))
ROUNDS = 1000
LAUNCHES = 7


@dataclass(frozen=True)
class Exchange:
    """A launch of the kernel: how often how many blocks exchange how many words in which way."""

    method: str
    blocks: int
    slice: int  # 32-bit words of each block, a multiple of 4
    rounds: int = ROUNDS
    cluster: int = 1  # blocks that exchange with each other in method "cluster"
    threads: int = 256

    @property
    def words(self) -> int:
        """Words of the vector that each block reads in each round."""
        return self.slice * (self.cluster if self.method == "cluster" else self.blocks)

    def arguments(self) -> tuple[int, ...]:
        return METHODS.index(self.method), self.blocks, self.threads, self.cluster, self.slice, self.rounds


class Prepared:
    """An exchange with its memory; `launch` starts it on the current stream, and raises what CUDA says against it.

    On device "cpu" this is for a module fastrnn._C whose kernels are emulated.
    """

    def __init__(self, exchange: Exchange, device: str = "cuda") -> None:
        self._native: Any = machine.native()
        self._arguments = exchange.arguments()
        self._memory = torch.empty(self._native.cuda_exchange_bytes(*self._arguments), dtype=torch.uint8, device=device)
        self.sums = torch.zeros(exchange.blocks, dtype=torch.int32, device=device)

    def launch(self) -> Tensor:
        """The last round's sum of each block, [blocks] int32."""
        stream = torch.cuda.current_stream().cuda_stream if self.sums.is_cuda else 0
        self._native.cuda_exchange_benchmark(*self._arguments, self._memory.data_ptr(), self.sums.data_ptr(), stream)
        return self.sums


@cache
def expected_sum(words: int, rounds: int) -> int:
    """What every block must find in the last round, as a signed 32-bit number."""
    hashed = np.arange(words, dtype=np.uint32) * np.uint32(2654435761)
    total = 0
    for t in range(1, rounds + 1):
        seed = np.uint32((total + t) % 2**32)
        total = int(((hashed + seed) & np.uint32(2**31 - 1)).sum(dtype=np.uint64)) % 2**32
    return total - 2**32 if total >= 2**31 else total


def check(exchange: Exchange, sums: Tensor) -> None:
    """Raises ValueError where a block did not see all words of all rounds."""
    wrong = (sums != expected_sum(exchange.words, exchange.rounds)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{exchange}: wrong sum in blocks {wrong}")


def exchanges(multiprocessors: int, rounds: int = ROUNDS) -> dict[tuple[int, int], list[Exchange]]:
    """By B, H: each method with a block on every multiprocessor, on about half and on about an eighth of them."""
    grids = [multiprocessors, multiprocessors // 2, multiprocessors // 8]
    found = {}
    for batch, hidden in SIZES:
        words = batch * hidden // 2

        def slice_of(blocks: int, words: int = words) -> int:
            return 4 * -(-words // (4 * blocks))

        of_size = [Exchange(method, n, slice_of(n), rounds) for method in METHODS[:-1] for n in grids]
        # Clusters exchange among themselves only; four run side by side, which leaves room to place each in a GPC.
        of_size += [Exchange("cluster", 4 * n, slice_of(n), rounds, n) for n in CLUSTERS]
        found[batch, hidden] = of_size
    return found


def measure(multiprocessors: int) -> list[dict[str, Any]]:
    """A row for each exchange: microseconds of a round with its spread, why it does not run here, or how it failed."""
    rows = []
    timer = EventTimer()
    for (batch, hidden), of_size in exchanges(multiprocessors).items():
        prepared: dict[Exchange, Prepared] = {}
        row_of = {e: {"batch": batch, "hidden": hidden, "words": e.words, **asdict(e)} for e in of_size}
        for exchange in of_size:
            candidate = Prepared(exchange)
            try:
                candidate.launch()
            except RuntimeError as reason:
                row_of[exchange]["left_out"] = str(reason)
                continue
            try:
                check(exchange, candidate.sums)
            except ValueError as reason:
                row_of[exchange]["failed"] = str(reason)
            else:
                prepared[exchange] = candidate
        times: dict[Exchange, list[float]] = {exchange: [] for exchange in prepared}
        for _ in range(LAUNCHES):
            for exchange, candidate in prepared.items():
                times[exchange].append(timer.time(candidate.launch, 1) / exchange.rounds)
        for exchange, samples in times.items():
            row_of[exchange] |= {key: float(f"{1e6 * value:.4g}") for key, value in summary(samples).items()}
        rows += row_of.values()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = results.parser("python -m bench.gpu.exchange", "Exchange between blocks.").parse_args(arguments)
    session = results.Session.start(options.out)
    rows = measure(torch.cuda.get_device_properties(0).multi_processor_count)
    session.add_exchange(rows)
    print(exchange_table(rows))
    print(f"wrote {session.path}")
    failures = [row["failed"] for row in rows if "failed" in row]
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"bench.gpu.exchange: {error}")
