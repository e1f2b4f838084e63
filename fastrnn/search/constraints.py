"""What may not come next: masks over the vocabulary, made on the device from what the beams hold so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def ngram_mask(history: Tensor, size: int, vocabulary: int) -> Tensor:
    """True for tokens that would repeat an n-gram of that size: bool [.., V] for histories [.., t].

    Paulus et al. 2017 (arXiv 1705.04304, section 2.5).
    """
    length = history.shape[-1]
    if length < size:
        return torch.zeros(*history.shape[:-1], vocabulary, dtype=torch.bool, device=history.device)
    windows = history.unfold(-1, size, 1)  # [.., t - n + 1, n]
    same = (windows[..., :-1] == history[..., None, length - size + 1 :]).all(-1)
    return _mask_of(windows[..., -1], same, vocabulary)


def _mask_of(tokens: Tensor, chosen: Tensor, vocabulary: int) -> Tensor:
    """True for tokens [.., n] that are chosen, bool [.., n], at one of their places at least: bool [.., V]."""
    # The others are sent to a column behind: on CUDA torch reduces no bool, so that "amax" would not do.
    mask = torch.zeros(*tokens.shape[:-1], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return mask.scatter_(-1, torch.where(chosen, tokens, vocabulary), True)[..., :vocabulary]


class Phrases:
    """Phrases that must not appear, as tokens; those of one token are banned everywhere."""

    def __init__(self, phrases: Iterable[Sequence[int]], device: torch.device) -> None:
        by_size: dict[int, list[list[int]]] = {}
        for phrase in phrases:
            by_size.setdefault(len(phrase), []).append(list(phrase))
        self._by_size = [torch.tensor(group, device=device) for group in by_size.values()]

    def __bool__(self) -> bool:
        return bool(self._by_size)

    def mask(self, history: Tensor, vocabulary: int) -> Tensor:
        """True for tokens that would complete a phrase: bool [.., V] for histories [.., t]."""
        mask = torch.zeros(*history.shape[:-1], vocabulary, dtype=torch.bool, device=history.device)
        for phrases in self._by_size:  # [P, n]
            begun = phrases.shape[1] - 1
            if history.shape[-1] < begun:
                continue
            last = history[..., None, history.shape[-1] - begun :]
            same = (last == phrases[:, :-1]).all(-1)  # [.., P]
            mask |= _mask_of(phrases[:, -1].expand(same.shape), same, vocabulary)
        return mask


def allowed_mask(
    allowed: Callable[[int, Tensor], Iterable[int]],
    history: Tensor,
    alive: Tensor,
    sentences: Sequence[int],
    vocabulary: int,
) -> Tensor:
    """True for tokens that `allowed` does not name: bool [b, K, V] for histories [b, K, t], of beams that live [b, K].
    Runs on the host."""
    mask = torch.ones(*history.shape[:-1], vocabulary, dtype=torch.bool)
    for row, beam in alive.nonzero().tolist():
        tokens = [int(token) for token in allowed(sentences[row], history[row, beam])]
        if any(not 0 <= token < vocabulary for token in tokens):
            raise ValueError(f"allowed_tokens must name tokens from 0 to {vocabulary - 1}, got {tokens}")
        mask[row, beam, tokens] = False
    return mask.to(history.device)


def repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that were there before divided by the penalty, multiplied where negative: [.., V].

    Keskar et al. 2019 (arXiv 1909.05858, section 4.1).
    """
    old = logits.gather(-1, history)
    return logits.scatter(-1, history, torch.where(old > 0, old / penalty, old * penalty))


def coverage(total: Tensor, kind: str, beta: float, seen: Tensor | None) -> Tensor:
    """The coverage penalty [b, K] of attention summed over the steps [b, K, S]; `seen` [b, S]: what the source has.

    ``"wu"``: beta * sum log min(total, 1) (Wu et al. 2016, arXiv 1609.08144, equation 14); ``"summary"``:
    beta * (S - sum max(total, 1)) (Gehrmann et al. 2018, arXiv 1808.10792, equation 9).
    """
    if kind == "wu":
        terms = total.clamp(torch.finfo(total.dtype).tiny, 1).log()
    else:
        terms = 1 - total.clamp(min=1)
    return beta * (terms if seen is None else terms * seen.unsqueeze(1)).sum(-1)
