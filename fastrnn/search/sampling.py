"""Random choices of a search, from a counter-based generator: the same for a sentence whatever its batch mates are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn.reference.recurrence import mix32


def gumbel_noise(seeds: Tensor, step: int, beams: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [b, K, V], float64, of the seeds [b] int64, the step, beam and token alone."""
    word = mix32(seeds & 0xFFFFFFFF)
    for value in ((seeds >> 32) & 0xFFFFFFFF, step):
        word = mix32(word ^ value)
    word = mix32(word[:, None] ^ torch.arange(beams, device=seeds.device))
    word = mix32(word[:, :, None] ^ mix32(torch.arange(vocabulary, device=seeds.device) + 1))
    return -torch.log(-torch.log((word + 0.5) / 2**32))


def truncated(log_probs: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities [.., V] sharpened by a temperature, -inf but for the `top_k` largest (0: all), and but for the
    fewest that hold `top_p` of what is then left (Holtzman et al. 2019, arXiv 1904.09751); not normalised."""
    scaled = log_probs / temperature
    if 0 < top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, -1).values[..., -1:], -torch.inf)
    if top_p < 1:
        values, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        before = torch.cumsum(torch.softmax(values, -1), -1).roll(1, -1)
        before[..., 0] = 0  # the first stays, however much it holds
        dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, before >= top_p)
        scaled = scaled.masked_fill(dropped, -torch.inf)
    return scaled


def conditioned(sums: Tensor, parent: Tensor) -> Tensor:
    """Perturbed sums [.., V] of the children of a beam, given that their largest is the beam's own, parent [..].

    Kool et al. 2019 (arXiv 1903.06059, algorithm 1 and appendix B.3).
    """
    largest = sums.amax(-1, keepdim=True)
    parent = parent.unsqueeze(-1)
    v = parent - sums + torch.log1p(-torch.exp(sums - largest))
    found = parent - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(sums == -torch.inf, -torch.inf, torch.where(sums == largest, parent, found))
