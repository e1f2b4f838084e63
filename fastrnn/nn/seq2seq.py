"""Seq2Seq: from tokens to tokens, by an encoder and a decoder of recurrent layers, with or without attention."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrnn.nn
from fastrnn.backends.decode_step import DecodeStep, Runner
from fastrnn.backends.decoder import DecoderCall
from fastrnn.nn.attention import PreparedMemory
from fastrnn.nn.decoder import AttentionDecoder, DecoderState, cell_of, plain_layers
from fastrnn.nn.options import WithOptions
from fastrnn.nn.rnn import Layers
from fastrnn.ops.linear import linear
from fastrnn.search import BeamResult, Shared, beam_search, expand

_BRIDGES = ("copy", "learned", "none")


class TokenEncoder(torch.nn.Module):
    """Embeds tokens and runs recurrent layers over them.

    Args:
        num_tokens: of the source's vocabulary.
        embedding_dim: size of an embedding.
        rnn: a :class:`fastrnn.nn.RNN`, :class:`fastrnn.nn.LSTM` or :class:`fastrnn.nn.GRU` with that input_size.
        dropout: probability with which an element of the embeddings is dropped.
        reverse: whether the layers read the source from its end (Sutskever et al. 2014, arXiv 1409.3215).

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """

    def __init__(
        self, num_tokens: int, embedding_dim: int, rnn: Layers, *, dropout: float = 0.0, reverse: bool = False
    ) -> None:
        super().__init__()
        _check_layers(rnn, (Layers,), embedding_dim)
        self.num_tokens, self.embedding_dim = num_tokens, embedding_dim
        self.dropout = _probability(dropout)
        self.reverse = reverse
        self.embedding = torch.nn.Embedding(num_tokens, embedding_dim)
        self.rnn = rnn

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, reverse={self.reverse}"

    def forward(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """What the layers make of the source [B, S], integers, of which lengths [B] count (by default all).

        Returns:
            Their outputs [B, S, memory_size], in the order of the source also where they have read it in reverse, and
            their final states as torch.nn's layers return them.
        """
        order = _reversing(source, lengths) if self.reverse else None
        x = F.dropout(self.embedding(source if order is None else source.gather(1, order)), self.dropout, self.training)
        first = x if self.rnn.batch_first else x.transpose(0, 1)
        memory, hidden = self.rnn(first, lengths=lengths)
        memory = memory if self.rnn.batch_first else memory.transpose(0, 1)
        if order is not None:
            memory = memory.gather(1, order.unsqueeze(-1).expand_as(memory))
        return memory, hidden


class RecurrentState(NamedTuple):
    """What a decoder without attention carries from step to step; the first dimension is that of the sequences."""

    hidden: Tensor
    """[N, num_layers, hidden_size]."""
    cell: Tensor | None
    """The same, LSTM."""


class TokenDecoder(torch.nn.Module):
    """Embeds tokens, runs recurrent layers over them, with or without attention, and scores the next token.

    ``logits_t = W o_t + b``, o_t being the layers' output: h_t, or [h_t, c_t] with attention. With ``readout_size``
    ``tanh(R o_t)`` takes its place (Luong et al. 2015, arXiv 1508.04025, equation 5).

    Args:
        num_tokens: of the target's vocabulary, V.
        embedding_dim: size of an embedding.
        rnn: an :class:`AttentionDecoder`, or layers without attention, with that input_size.
        bos: the token that begins every target.
        eos: the token, or tokens, that end one; the first is what training teaches.
        pad: what fills up targets of a batch; by default the end token.
        readout_size: of tanh(R o_t); by default there is none.
        dropout: probability with which an element of the embeddings and of what goes into W is dropped.
        tie_weights: W is the embedding's weight; its inputs must have embedding_dim elements (Press and Wolf 2017,
            arXiv 1608.05859).

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """

    def __init__(
        self,
        num_tokens: int,
        embedding_dim: int,
        rnn: AttentionDecoder | Layers,
        *,
        bos: int,
        eos: int | Sequence[int],
        pad: int | None = None,
        readout_size: int | None = None,
        dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        _check_layers(rnn, (AttentionDecoder, Layers), embedding_dim)
        if isinstance(rnn, Layers) and (rnn.bidirectional or rnn.proj_size):
            raise ValueError("bidirectional and proj_size do not go with a decoder")
        ends = (eos,) if isinstance(eos, int) else tuple(eos)
        for name, tokens in (("bos", (bos,)), ("eos", ends)):
            if not tokens or any(not 0 <= token < num_tokens for token in tokens):
                raise ValueError(f"{name} must be below num_tokens {num_tokens}, got {tokens}")
        self.num_tokens, self.embedding_dim = num_tokens, embedding_dim
        self.bos, self.eos, self.pad = bos, ends, ends[0] if pad is None else pad
        self.readout_size = readout_size
        self.dropout = _probability(dropout)
        self.tie_weights = tie_weights
        self.embedding = torch.nn.Embedding(num_tokens, embedding_dim)
        self.rnn = rnn
        size = self.output_size
        self.readout = None if readout_size is None else torch.nn.Linear(size, readout_size, bias=False)
        self.projection = torch.nn.Linear(size if readout_size is None else readout_size, num_tokens)
        if tie_weights:
            if self.projection.in_features != embedding_dim:
                raise ValueError(
                    f"tie_weights needs embedding_dim {self.projection.in_features}, what W sees, got {embedding_dim}"
                )
            self.projection.weight = self.embedding.weight

    def extra_repr(self) -> str:
        return f"bos={self.bos}, eos={self.eos}, pad={self.pad}, dropout={self.dropout}, tie_weights={self.tie_weights}"

    @property
    def layers(self) -> Layers:
        """The recurrent layers."""
        layers: Layers = self.rnn.rnn if isinstance(self.rnn, AttentionDecoder) else self.rnn
        return layers

    @property
    def output_size(self) -> int:
        """Of o_t."""
        return self.layers.hidden_size + (self.rnn.memory_size if isinstance(self.rnn, AttentionDecoder) else 0)

    def prepare(self, memory: Tensor, lengths: Tensor | None) -> PreparedMemory | None:
        """What attention makes of the memory [B, S, M] alone, of which lengths [B] count; None without attention."""
        return self.rnn.attention.prepare(memory, lengths) if isinstance(self.rnn, AttentionDecoder) else None

    def initial_state(self, hidden: Any, memory: Tensor, beams: int = 1) -> DecoderState | RecurrentState:
        """The state before the first step.

        Args:
            hidden: h_0 [num_layers, B * beams, hidden_size], LSTM: h_0 and c_0; None: zeros.
            memory: [B, S, memory_size].
            beams: sequences that share a memory, neighbours in the batch.
        """
        if isinstance(self.rnn, AttentionDecoder):
            return self.rnn.initial_state(memory, hidden, beams)
        layers = self.layers
        if hidden is None:
            zeros = memory.new_zeros(memory.shape[0] * beams, layers.num_layers, layers.hidden_size)
            return RecurrentState(zeros, zeros if layers.mode == "LSTM" else None)
        h, c = hidden if layers.mode == "LSTM" else (hidden, None)
        return RecurrentState(h.transpose(0, 1), None if c is None else c.transpose(0, 1))

    def forward(
        self, tokens: Tensor, state: DecoderState | RecurrentState, prepared: PreparedMemory | None
    ) -> tuple[Tensor, DecoderState | RecurrentState]:
        """What the layers make of known tokens [N, T]: outputs [N, T, output_size] and the state after them."""
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        if isinstance(self.rnn, AttentionDecoder):
            assert isinstance(state, DecoderState) and prepared is not None
            output, after, _ = self.rnn(x, prepared, state)
            return output, after
        assert isinstance(state, RecurrentState)
        output, after = self._run_layers(x.transpose(0, 1), state)
        return output.transpose(0, 1), after

    def step(
        self,
        tokens: Tensor,
        state: DecoderState | RecurrentState,
        prepared: PreparedMemory | None,
        need_weights: bool = False,
    ) -> tuple[Tensor, DecoderState | RecurrentState, Tensor | None]:
        """One step from tokens [N]: logits [N, V], the state after it, and attention's weights [N, S] or None."""
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        weights = None
        if isinstance(self.rnn, AttentionDecoder):
            assert isinstance(state, DecoderState) and prepared is not None
            output, after, weights = self.rnn.step(x, state, prepared, need_weights=need_weights)
            return self.logits(output), after, weights
        assert isinstance(state, RecurrentState)
        output, recurrent = self._run_layers(x.unsqueeze(0), state)
        return self.logits(output.squeeze(0)), recurrent, None

    def fused(self, state: DecoderState | RecurrentState, prepared: PreparedMemory | None) -> Runner | None:
        """What computes a step from this state on, and what a search selects, in one call; None where nothing can."""
        rnn, layers = self.rnn, self.layers
        if self.training and (self.dropout or layers.dropout):
            return None
        x, seen = self.embedding.weight.new_empty(len(state.hidden), 1, self.embedding_dim), None
        if isinstance(rnn, AttentionDecoder):
            assert isinstance(state, DecoderState) and prepared is not None
            call = rnn._loop_call(x, prepared, state, None) if rnn.input_feeding else None
            if call is None:
                return None
            if rnn.attend == "before":
                call.context0, seen, _ = rnn._ask(state.hidden[:, -1], prepared, None, None, True)
        else:
            weights, hidden = plain_layers(layers), state.hidden.transpose(0, 1)
            if weights is None or layers.backend not in ("auto", "cpu"):
                return None
            cell, nothing = None if state.cell is None else state.cell.transpose(0, 1), x.new_empty(0, 0, 0)
            call = DecoderCall(
                cell_of(layers), x.transpose(0, 1), weights, hidden, cell, hidden[0, :, :0], None, nothing
            )
        step = DecodeStep(
            call,
            isinstance(rnn, AttentionDecoder) and rnn.attend == "before",
            self.embedding.weight.contiguous(),
            None if self.readout is None else self.readout.weight,
            self.projection.weight,
            self.projection.bias,
            seen,
        )
        return Runner(step) if step.is_possible() else None

    def logits(self, output: Tensor) -> Tensor:
        """Of the next token [.., V], from an output of the layers [.., output_size]."""
        if self.readout is not None:
            output = torch.tanh(linear(output, self.readout.weight))
        output = F.dropout(output, self.dropout, self.training)
        return linear(output, self.projection.weight) + self.projection.bias

    def _run_layers(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """x [T, N, I]."""
        hidden = state.hidden.transpose(0, 1).contiguous()
        x = x.transpose(0, 1) if self.layers.batch_first else x
        if state.cell is None:
            output, hidden = self.layers(x, hidden)
            cell = None
        else:
            output, (hidden, cell) = self.layers(x, (hidden, state.cell.transpose(0, 1).contiguous()))
        output = output.transpose(0, 1) if self.layers.batch_first else output
        return output, RecurrentState(hidden.transpose(0, 1), None if cell is None else cell.transpose(0, 1))


class Seq2Seq(torch.nn.Module):
    """An encoder and a decoder in one: the loss, search and scores.

    Targets are token sequences without the begin token, with the end token that ends them, as search returns them.

    Args:
        encoder: a :class:`TokenEncoder`, or any module that takes (source, lengths), the source being whatever it
            reads, such as pictures or frames of speech, and returns a memory [B, S, M] and final states as a
            :class:`TokenEncoder` does.
        decoder: a :class:`TokenDecoder`.
        bridge: what the decoder starts from. ``"copy"``: the encoder's final states, the two directions of a layer
            side by side; ``"learned"``: h_0 = tanh(W h_n) and c_0 = V c_n of all layers together (Bahdanau et al. 2015,
            arXiv 1409.0473); ``"none"``: zeros.
        encoder_states: with a learned bridge and an encoder of your own, how many elements h_n has for a sequence.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        decoder: TokenDecoder,
        *,
        bridge: str = "copy",
        encoder_states: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(decoder, TokenDecoder):
            raise TypeError(f"decoder must be a TokenDecoder, got {type(decoder).__name__}")
        if bridge not in _BRIDGES:
            raise ValueError(f"bridge must be one of {', '.join(map(repr, _BRIDGES))}, got {bridge!r}")
        self.encoder, self.decoder, self.bridge, self.encoder_states = encoder, decoder, bridge, encoder_states
        layers = decoder.layers
        encoding = encoder.rnn if isinstance(encoder, TokenEncoder) else None
        if encoding is not None:
            directions = 2 if encoding.bidirectional else 1
            output = encoding.proj_size or encoding.hidden_size
            given, taken = (encoding.num_layers, directions * output), (layers.num_layers, layers.hidden_size)
            if bridge == "copy" and (given != taken or encoding.proj_size):
                raise ValueError(
                    f"bridge='copy' needs an encoder whose layers and sizes {given} are the decoder's {taken}, got "
                    "others; bridge='learned' takes any"
                )
            memory_size = getattr(decoder.rnn, "memory_size", directions * output)
            if memory_size != directions * output:
                raise ValueError(f"decoder must have memory_size {directions * output}, got {memory_size}")
            encoder_states = encoding.num_layers * directions * output
        if bridge == "learned":
            if encoder_states is None:
                raise ValueError("bridge='learned' needs encoder_states with an encoder of your own")
            size = layers.num_layers * layers.hidden_size
            self.bridge_hidden = torch.nn.Linear(encoder_states, size)
            if layers.mode == "LSTM" and (encoding is None or encoding.mode == "LSTM"):
                cells = encoder_states
                if encoding is not None:
                    cells = encoding.num_layers * (2 if encoding.bidirectional else 1) * encoding.hidden_size
                self.bridge_cell = torch.nn.Linear(cells, size)

    def extra_repr(self) -> str:
        return f"bridge={self.bridge!r}"

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """The memory [B, S, M] of a source [B, S], of which source_lengths [B] count, and the decoder's initial hidden
        states, or None for zeros."""
        self._check_source(source)
        _check_lengths("source_lengths", source_lengths, source.shape[:2])
        memory, hidden = self.encoder(source, source_lengths)
        return memory, self._initial_hidden(hidden)

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor | None,
        target: Tensor,
        target_lengths: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy of the targets, each token from those before it (teacher forcing).

        Args:
            source: [B, S] integers, or [B, S, ...] as an encoder of your own takes it.
            source_lengths: [B]: how many count; by default all.
            target: [B, T] integers, without the begin token and with the end token.
            target_lengths: [B]: how many count, the end token among them; by default all.
            label_smoothing: share of every target token's probability that goes to all tokens alike.
            reduction: ``"mean"`` over the tokens that count, ``"sum"`` over them, or ``"none"``: [B, T], 0 elsewhere.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
        """
        self._check_source(source)
        _check_tokens("target", target, 2)
        _check_lengths("target_lengths", target_lengths, target.shape)
        if target.shape[0] != source.shape[0]:
            raise ValueError(f"target must have the source's batch {source.shape[0]}, got {target.shape[0]}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        logits = self._teacher_forced(source, source_lengths, target.unsqueeze(1), target_lengths)
        counted = _counted(target, target_lengths)
        labels = target.long().masked_fill(~counted, -100)
        loss: Tensor = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing, reduction=reduction
        )
        return loss.view(target.shape) if reduction == "none" else loss

    @torch.no_grad()
    def score(
        self,
        source: Tensor,
        source_lengths: Tensor | None,
        target: Tensor,
        target_lengths: Tensor | None = None,
        *,
        reduction: str = "sum",
    ) -> Tensor:
        """Log-probabilities of given targets, one or several for each source.

        Args:
            source: [B, S] integers, or [B, S, ...] as an encoder of your own takes it.
            source_lengths: [B]: how many count; by default all.
            target: [B, T], or [B, n, T] as search returns it.
            target_lengths: [B], or [B, n]: how many count; by default all.
            reduction: ``"sum"`` over the tokens, or ``"none"``.

        Returns:
            [B] or [B, n]; with ``reduction="none"`` shaped as the target is, 0 behind its length.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
        """
        self._check_source(source)
        _check_tokens("target", target, 2, 3)
        _check_lengths("target_lengths", target_lengths, target.shape)
        if target.shape[0] != source.shape[0]:
            raise ValueError(f"target must have the source's batch {source.shape[0]}, got {target.shape[0]}")
        if reduction not in ("sum", "none"):
            raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
        several = target if target.dim() == 3 else target.unsqueeze(1)
        logits = self._teacher_forced(source, source_lengths, several, target_lengths)
        counted = _counted(target, target_lengths)
        chosen = torch.where(counted, target, 0).view(*logits.shape[:2], 1).long()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = logits.gather(-1, chosen).squeeze(-1) - logits.logsumexp(-1)
        found = torch.where(counted, found.view(target.shape), 0)
        return found.sum(-1) if reduction == "sum" else found

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        source_lengths: Tensor | None = None,
        *,
        beam_size: int = 1,
        max_length: int | Tensor | tuple[float, float] = (2, 10),
        min_length: int | Tensor | tuple[float, float] = 0,
        need_alignments: bool = False,
        **options: Any,
    ) -> BeamResult:
        """Targets for a source: greedily, by beam search, or drawn; see :func:`fastrnn.search.beam_search`.

        Args:
            source: [B, S] integers, or [B, S, ...] as an encoder of your own takes it.
            source_lengths: [B]: how many count; by default all.
            beam_size: 1 is greedy search.
            max_length, min_length: of a target, the end token counted; (a, b) means a * source length + b.
            need_alignments: whether attention's weights are returned.
            options: those of :func:`fastrnn.search.beam_search`, such as n_best, length_penalty, sample, prefix.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
        """
        if isinstance(beam_size, bool) or not isinstance(beam_size, int):
            raise TypeError(f"beam_size must be an int, got {type(beam_size).__name__}")
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        memory, hidden = self.encode(source, source_lengths)
        decoder = self.decoder
        prepared = decoder.prepare(memory, source_lengths)
        if prepared is None and (need_alignments or options.get("coverage_penalty")):
            raise ValueError("need_alignments and coverage_penalty need a decoder with attention")
        weighted = need_alignments or options.get("coverage_penalty") is not None
        lengths = torch.full((len(source),), memory.shape[1]) if source_lengths is None else source_lengths
        if source_lengths is not None:
            options.setdefault("source_lengths", source_lengths)
        options.setdefault("bos", decoder.bos)
        options.setdefault("eos", decoder.eos)
        options.setdefault("pad", decoder.pad)

        state = decoder.initial_state(expand(hidden, beam_size, dim=1), memory, beam_size)
        return beam_search(
            DecoderStep(decoder, weighted),
            (state, Shared(prepared)),
            batch_size=len(source),
            beam_size=beam_size,
            max_length=_of_source(max_length, lengths),
            min_length=_of_source(min_length, lengths),
            need_alignments=need_alignments,
            **options,
        )

    def _check_source(self, source: Any) -> None:
        if isinstance(self.encoder, TokenEncoder):
            _check_tokens("source", source, 2)
        elif not isinstance(source, Tensor):
            raise TypeError(f"source must be a torch.Tensor, got {type(source).__name__}")
        elif source.dim() < 2:
            raise ValueError(f"source must have at least 2 dimensions, got shape {tuple(source.shape)}")

    def _teacher_forced(
        self, source: Tensor, source_lengths: Tensor | None, target: Tensor, target_lengths: Tensor | None
    ) -> Tensor:
        """Logits [B * n, T, V] of targets [B, n, T]."""
        memory, hidden = self.encode(source, source_lengths)
        batch, beams, steps = target.shape
        target_lengths = None if target_lengths is None else target_lengths.reshape(batch, beams)
        decoder = self.decoder
        hidden = expand(hidden, beams, dim=1)
        state = decoder.initial_state(hidden, memory, beams)
        tokens = torch.where(_counted(target, target_lengths), target, decoder.eos[0]).flatten(0, 1)
        begin = tokens.new_full((batch * beams, 1), decoder.bos)
        inputs = torch.cat([begin, tokens[:, :-1]], 1)[:, :steps]
        output, _ = decoder(inputs, state, decoder.prepare(memory, source_lengths))
        return decoder.logits(output)

    def _initial_hidden(self, hidden: Any) -> Any:
        """The decoder's h_0 (LSTM: h_0 and c_0) [num_layers, B, hidden_size] from the encoder's final states."""
        layers = self.decoder.layers
        if self.bridge == "none":
            return None
        h, c = hidden if isinstance(hidden, (tuple, list)) else (hidden, None)
        if self.bridge == "learned":
            flat = h.transpose(0, 1).flatten(1)
            flat_h = torch.tanh(linear(flat, self.bridge_hidden.weight) + self.bridge_hidden.bias)
            if hasattr(self, "bridge_cell"):
                flat_c = linear(c.transpose(0, 1).flatten(1), self.bridge_cell.weight) + self.bridge_cell.bias
            else:
                flat_c = torch.zeros_like(flat_h)
            h, c = (s.view(len(flat), layers.num_layers, -1).transpose(0, 1).contiguous() for s in (flat_h, flat_c))
        else:
            bidirectional = isinstance(self.encoder, TokenEncoder) and self.encoder.rnn.bidirectional
            if bidirectional:
                h, c = (None if s is None else torch.cat([s[::2], s[1::2]], -1) for s in (h, c))
            c = torch.zeros_like(h) if c is None else c
        return (h, c) if layers.mode == "LSTM" else h

    def save(self, path: str | Path) -> None:
        """Writes parameters and how the model is built, for :meth:`load`.

        Raises:
            TypeError: a module of the model is not one of fastrnn.nn; ``state_dict`` saves any.
        """
        torch.save({"model": _description(self), "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None) -> Seq2Seq:
        """A model that :meth:`save` has written; nothing in the file is run as code.

        Raises:
            ValueError: the file holds no such model.
        """
        wrong = f"{path} must be a file that Seq2Seq.save has written"
        try:
            saved = torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, ValueError) as error:
            raise ValueError(wrong) from error
        described = saved.get("model") if isinstance(saved, dict) else None
        if not isinstance(described, dict) or described.get("class") != "Seq2Seq":
            raise ValueError(wrong)
        model: Seq2Seq = _built(described)
        if map_location is not None:
            model.to(map_location)
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(saved["state"][name].dtype)
        model.load_state_dict(saved["state"])
        return model


class DecoderStep:
    """The step of a search by a decoder. Where it is the only one, the search has it fused."""

    def __init__(self, decoder: TokenDecoder, need_weights: bool) -> None:
        self.decoder, self.need_weights = decoder, need_weights

    def __call__(self, tokens: Tensor, state: Any) -> tuple[Any, ...]:
        of_decoder, shared = state
        logits, after, weights = self.decoder.step(tokens, of_decoder, shared.value, self.need_weights)
        return logits, (after, shared), weights

    def fastrnn_fused(self, state: Any) -> Runner | None:
        return self.decoder.fused(state[0], state[1].value)


def _description(module: torch.nn.Module) -> dict[str, Any]:
    """The class and its constructor's arguments, as :func:`_built` takes them."""
    name = type(module).__name__
    if getattr(fastrnn.nn, name, None) is not type(module):
        raise TypeError(f"save takes modules of fastrnn.nn alone, got {type(module).__name__}; use state_dict")
    if isinstance(module, AttentionDecoder):
        arguments = _arguments_of_layers(module.rnn)
        for argument in ("batch_first", "bidirectional", "proj_size", "return_cell_states"):
            arguments.pop(argument, None)
        arguments |= {argument: getattr(module, argument) for argument in _DECODER_ARGUMENTS}
        arguments["cell"] = {fastrnn.nn.LSTM: "lstm", fastrnn.nn.GRU: "gru", fastrnn.nn.RNN: "rnn"}[type(module.rnn)]
    elif isinstance(module, Layers):
        arguments = _arguments_of_layers(module)
    else:
        names = list(inspect.signature(type(module)).parameters)
        arguments = {argument: getattr(module, argument) for argument in names if argument not in ("device", "dtype")}
    described = {
        argument: _description(value) if isinstance(value, torch.nn.Module) else value
        for argument, value in arguments.items()
    }
    return {"class": name, "arguments": described}


_DECODER_ARGUMENTS = ("input_size", "attention", "input_feeding", "attend", "memory_size")


def _arguments_of_layers(layers: Layers) -> dict[str, Any]:
    names = list(inspect.signature(torch.nn.RNNBase).parameters)[1:-2]  # without the mode, device and dtype
    names += ["nonlinearity"] if layers.mode.startswith("RNN") else []
    options = [name for name in WithOptions.__annotations__ if name != "_cell"]
    # torch takes a proj_size, even 0, for an LSTM alone.
    arguments = {name: getattr(layers, name) for name in names if name != "proj_size" or layers.proj_size}
    # Those that are as they are by default may be another class's, which this one's constructor does not take.
    return arguments | {name: getattr(layers, name) for name in options if name in vars(layers)}


def _built(description: dict[str, Any]) -> Any:
    arguments = {
        name: _built(value) if isinstance(value, dict) else value for name, value in description["arguments"].items()
    }
    return getattr(fastrnn.nn, description["class"])(**arguments)


def _of_source(limit: int | Tensor | tuple[float, float], lengths: Tensor) -> int | Tensor:
    """[B] where a limit is relative to the source's lengths."""
    if not isinstance(limit, tuple):
        return limit
    factor, more = limit
    return (factor * lengths.double() + more).long()


def _reversing(source: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, S]: where each place of the reversed sequences is in these, and the other way round."""
    places = torch.arange(source.shape[1], device=source.device).expand(source.shape)
    if lengths is None:
        return places.flip(1)
    last = lengths.to(source.device).unsqueeze(1) - 1
    return torch.where(places <= last, last - places, places)


def _counted(target: Tensor, lengths: Tensor | None) -> Tensor:
    """[.., T] bool."""
    if lengths is None:
        return torch.ones_like(target, dtype=torch.bool)
    return torch.arange(target.shape[-1], device=target.device) < lengths.to(target.device).unsqueeze(-1)


def _check_layers(rnn: Any, kinds: tuple[Any, ...], embedding_dim: int) -> None:
    if not isinstance(rnn, kinds):
        names = "an AttentionDecoder, RNN, LSTM or GRU" if AttentionDecoder in kinds else "an RNN, LSTM or GRU"
        raise TypeError(f"rnn must be {names} of fastrnn.nn, got {type(rnn).__name__}")
    if rnn.input_size != embedding_dim:
        raise ValueError(f"rnn must have input_size {embedding_dim}, the embeddings' size, got {rnn.input_size}")


def _probability(dropout: float) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {dropout!r}")
    return dropout


def _check_tokens(name: str, tokens: Any, *dimensions: int) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tokens).__name__}")
    if tokens.dim() not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32, got {tokens.dtype}")


def _check_lengths(name: str, lengths: Any, shape: Sequence[int]) -> None:
    """`shape`: of the sequences."""
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise TypeError(f"{name} must hold integers, got {lengths.dtype}")
    if lengths.shape != shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(shape[:-1])}, got {tuple(lengths.shape)}")
    # On a GPU the values stay where they are: looking at them would wait for it.
    if lengths.is_cpu and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= shape[-1]:
        raise ValueError(f"{name} must be from 0 to {shape[-1]}, got {int(lengths.min())} to {int(lengths.max())}")
