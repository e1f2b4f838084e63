"""Whether a peer computes the case: nothing is timed whose result is not the fp64 result up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from bench.peers import PEERS, Contender, Problem, Results, Unsupported, chosen_peers
from fastrnn.backends import recorded_choices

# torch.nn sets the measure for all others, so it has a bound of its own: this many times eps * max|fp64 result|.
# Seen over all cases: in fp32 24 at most (LSTM d, gradient of the bias), 13 in y; in bf16 3.5 and 1.5.
TORCH_BOUND = 32
# fastrnn keeps its numerics contract; the others may err twice as much (OpenVINO's tanh in RNN d: 3.3 times).
FASTRNN_FACTOR, PEER_FACTOR = 2, 4
# How the reason starts for which a wrong contender is left out.
WRONG = "wrong result"


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


Builder = Callable[[Problem], Contender]


def check(name: str, found: dict[str, float], of_torch: dict[str, float], reference: Results, eps: float) -> None:
    """Raises WrongResult where an error is larger than the peer of this name may have.

    `of_torch` are the errors of torch's own operators in the case's dtype, empty where these are being checked.
    """
    for tensor, error in found.items():
        unit = eps * largest(reference[tensor])
        if not of_torch:
            bound = TORCH_BOUND * unit
        else:
            # What torch may not err, it does not excuse in others either.
            torch_error = min(of_torch[tensor], TORCH_BOUND * unit)
            bound = (FASTRNN_FACTOR if name.startswith("fastrnn") else PEER_FACTOR) * (torch_error + unit)
        if not error <= bound:
            raise WrongResult(f"{tensor} is off by {error:.2e}, allowed {bound:.2e}")


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


class Entries(NamedTuple):
    """Who takes part in a case."""

    contenders: dict[str, Contender]  # in the order of the builders, fastrnn first by default
    errors: dict[str, float]  # the largest of each over max|fp64 result|
    left_out: dict[str, str]  # why
    backend: str  # what fastrnn's back-end choice picked


def enter(problem: Problem, builders: Mapping[str, Builder] | None = None, strict: bool = True) -> Entries:
    """The contenders, by default the chosen peers, built and checked, and fastrnn in the case's baseline.

    Raises WrongResult where fastrnn or torch is wrong; any other wrong peer is left out with that reason, and so are
    these where not `strict`.
    """
    if builders is None:
        builders = {name: PEERS[name] for name in chosen_peers(problem.case)}
    entries = _enter(problem, builders, strict)
    if problem.case.baseline is not None and "fastrnn" in builders:
        name, case = problem.case.baseline
        baseline = _enter(Problem(case, problem.device), {"fastrnn": builders["fastrnn"]}, strict)
        if "fastrnn" in baseline.contenders:
            entries.contenders[name] = baseline.contenders["fastrnn"]
            entries.errors[name] = baseline.errors["fastrnn"]
        else:
            entries.left_out[name] = baseline.left_out["fastrnn"]
    return entries


def _enter(problem: Problem, builders: Mapping[str, Builder], strict: bool) -> Entries:
    reference = problem.reference()
    eps = problem.case.eps
    contenders: dict[str, Contender] = {}
    relative: dict[str, float] = {}
    picked: list[str] = []
    left_out: dict[str, str] = {}
    of_torch = errors(problem.standard(problem.dtype).checked(), reference)
    try:
        check("torch", of_torch, {}, reference, eps)
    except WrongResult as reason:
        if strict:
            raise WrongResult(f"{problem.case.id}: torch is not timed: {reason}") from None
    for name, build in builders.items():
        try:
            contender = build(problem)
            with recorded_choices() as choices:
                found = errors(contender.checked(), reference)
            if name == "fastrnn":
                picked += [choice.picked for choice in choices]
            check(name, found, of_torch, reference, eps)
        except (Unsupported, NotImplementedError) as reason:  # the latter from a back end that was asked for by name
            left_out[name] = str(reason)
        except WrongResult as reason:
            if strict and name in ("fastrnn", "torch"):
                raise WrongResult(f"{problem.case.id}: {name} is not timed: {reason}") from None
            left_out[name] = f"{WRONG}: {reason}"
        else:
            contenders[name] = contender
            relative[name] = max(error / largest(reference[tensor]) for tensor, error in found.items())
    return Entries(contenders, relative, left_out, backend="+".join(dict.fromkeys(picked)))
