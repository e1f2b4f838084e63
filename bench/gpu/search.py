"""Whole searches by a model of GNMT's size: fastrnn's generate, and as it is written with torch's operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.registry import BEAMS, LAYERS, VOCABULARY, GpuSearch
from bench.peers import Contender, Results
from bench.registry import DTYPES
from bench.search import eager_decode
from fastrnn import nn
from fastrnn.search import expand

_BOS, _EOS = 0, 1


class SearchProblem:
    """One case's model, in the case's dtype, and its source."""

    def __init__(self, case: GpuSearch, device: str) -> None:
        batch, steps, embedded, hidden = case.size
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        torch.manual_seed(0)
        with torch.device(device):
            attention = nn.AdditiveAttention(hidden, hidden, hidden, normalize_v=True)
            layers = nn.AttentionDecoder("lstm", embedded, hidden, attention, LAYERS)
            encoder = nn.TokenEncoder(VOCABULARY, embedded, nn.LSTM(embedded, hidden, LAYERS))
            decoder = nn.TokenDecoder(VOCABULARY, embedded, layers, bos=_BOS, eos=_EOS)
            self.source = torch.randint(2, VOCABULARY, (batch, steps))
        with torch.no_grad():
            decoder.projection.weight.mul_(8)  # A model that is sure of something, as trained ones are.
            decoder.projection.bias[_EOS] = -100.0  # No sentence ends before the last step.
        self.model = nn.Seq2Seq(encoder, decoder).to(self.dtype).eval()

    def reference(self) -> Results:
        """What `_named` gives for exact scores."""
        return {"score": torch.ones(self.case.size.batch, dtype=torch.float64, device=self.device)}

    def standard(self, dtype: torch.dtype) -> Contender:
        """torch's operators."""
        model = copy.deepcopy(self.model).to(dtype)
        model.encoder.rnn.backend = "aten"

        @torch.no_grad()
        def call() -> tuple[Tensor, Tensor]:
            memory, hidden = model.encode(self.source)
            scores, tokens = eager_decode(model.decoder, memory, expand(hidden, BEAMS, dim=1), self.case.size.steps)
            return torch.stack(tokens, 1)[::BEAMS], scores[:, 0]

        return Contender(call, self._named)

    def fastrnn(self) -> Contender:
        def call() -> tuple[Tensor, Tensor]:
            found = self.model.generate(self.source, beam_size=BEAMS, max_length=self.case.size.steps)
            return found.tokens[:, 0], found.scores[:, 0]

        return Contender(call, self._named)

    def _named(self, found: tuple[Tensor, Tensor]) -> Results:
        """The score of each sentence's best hypothesis over what the model gives its tokens in fp64: in a narrow dtype
        searches take different ones of nearly equal tokens, so that hypotheses cannot be compared."""
        tokens, scores = found
        exact = copy.deepcopy(self.model).double().score(self.source, None, tokens)
        return {"score": scores.double() / exact}


BUILDERS: dict[str, Callable[[Any], Contender]] = {
    "fastrnn": SearchProblem.fastrnn,
    "torch": lambda problem: problem.standard(problem.dtype),
}
