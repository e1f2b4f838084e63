"""Whether a peer computes the case: nothing is timed whose result is not the fp64 result up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.peers import PEERS, Contender, Problem, Results, Unsupported, chosen_peers
from fastrnn.backends import recorded_choices

# torch.nn sets the measure for all others, so it has a bound of its own: this many times eps * max|fp64 result|.
# Seen over all cases: in fp32 24 at most (LSTM d, gradient of the bias), 13 in y; in bf16 3.5 and 1.5.
TORCH_BOUND = 32
# fastrnn keeps its numerics contract; the others may err twice as much (OpenVINO's tanh in RNN d: 3.3 times).
FASTRNN_FACTOR, PEER_FACTOR = 2, 4


class WrongResult(Exception):
    """Which tensor of a peer is no rounding of the fp64 result, and by how much."""


def errors(results: Results, reference: Results) -> dict[str, float]:
    """Largest absolute difference of each tensor from its fp64 value, NaN where either is.

    Raises WrongResult where a tensor is missing, too many, or of another shape.
    """
    if results.keys() != reference.keys():
        raise WrongResult(f"results must be {', '.join(reference)}, got {', '.join(results)}")
    found = {}
    for name, expected in reference.items():
        if results[name].shape != expected.shape:
            raise WrongResult(f"{name} must have shape {tuple(expected.shape)}, got {tuple(results[name].shape)}")
        found[name] = (results[name].double() - expected).abs().max().item()
    return found


def check(name: str, found: dict[str, float], of_torch: dict[str, float], reference: Results, eps: float) -> None:
    """Raises WrongResult where an error is larger than the peer of this name may have.

    `of_torch` are the errors of torch's own operators in the case's dtype, empty where these are being checked.
    """
    for tensor, error in found.items():
        unit = eps * largest(reference[tensor])
        if not of_torch:
            bound = TORCH_BOUND * unit
        else:
            bound = (FASTRNN_FACTOR if name == "fastrnn" else PEER_FACTOR) * (of_torch[tensor] + unit)
        if not error <= bound:
            raise WrongResult(f"{tensor} is off by {error:.2e}, allowed {bound:.2e}")


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


class Entries(NamedTuple):
    """Who takes part in a case."""

    contenders: dict[str, Contender]  # fastrnn first
    errors: dict[str, float]  # the largest of each over max|fp64 result|
    left_out: dict[str, str]  # why
    backend: str  # what fastrnn's back-end choice picked


def enter(problem: Problem) -> Entries:
    """The chosen peers, built and checked, and fastrnn in the case's baseline.

    Raises WrongResult where fastrnn or torch is wrong; any other wrong peer is left out with that reason.
    """
    entries = _enter(problem, chosen_peers(problem.case))
    if problem.case.baseline is not None:
        name, case = problem.case.baseline
        baseline = _enter(Problem(case), ["fastrnn"])
        entries.contenders[name] = baseline.contenders["fastrnn"]
        entries.errors[name] = baseline.errors["fastrnn"]
    return entries


def _enter(problem: Problem, peers: Sequence[str]) -> Entries:
    reference = problem.reference()
    eps = torch.finfo(problem.dtype).eps
    contenders: dict[str, Contender] = {}
    relative: dict[str, float] = {}
    picked: list[str] = []
    left_out: dict[str, str] = {}
    of_torch = errors(problem.standard(problem.dtype).checked(), reference)
    try:
        check("torch", of_torch, {}, reference, eps)
    except WrongResult as reason:
        raise WrongResult(f"{problem.case.id}: torch is not timed: {reason}") from None
    for name in peers:
        try:
            contender = PEERS[name](problem)
            with recorded_choices() as choices:
                found = errors(contender.checked(), reference)
            picked += [choice.picked for choice in choices]
            check(name, found, of_torch, reference, eps)
        except Unsupported as reason:
            left_out[name] = str(reason)
        except WrongResult as reason:
            if name in ("fastrnn", "torch"):
                raise WrongResult(f"{problem.case.id}: {name} is not timed: {reason}") from None
            left_out[name] = f"wrong result: {reason}"
        else:
            contenders[name] = contender
            relative[name] = max(error / largest(reference[tensor]) for tensor, error in found.items())
    return Entries(contenders, relative, left_out, backend="+".join(dict.fromkeys(picked)))
