"""A step of a search by a decoder of ours on the back end `cpu`: launchers of csrc/cpu/decode_step.cpp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import native, transform_reasons
from fastrnn.backends.attention.cpu import Inputs
from fastrnn.backends.call import is_plain
from fastrnn.backends.cpu import packed_weight
from fastrnn.backends.decoder import DecoderCall, Loop


@dataclass
class DecodeStep:
    """What a step consists of, for N sequences: the weights, and the state before it.

    `call`: of one step. Its x [1, N, E] is not read; without attention its keys, of no elements, are not either.
    """

    call: DecoderCall
    before: bool  # attention is asked before the layers' step; context0 is then what h0 has asked for
    embedding: Tensor  # [V, E]
    readout: Tensor | None  # [R, H + Dv]
    weight: Tensor  # [V, H + Dv], or [V, R]
    bias: Tensor  # [V]
    seen: Tensor | None  # [N, Tk]: the weights of context0, where attention is asked before

    @property
    def attends(self) -> bool:
        return self.call.context0.shape[1] > 0

    def is_possible(self) -> bool:
        """Whether the kernels can compute the step."""
        if (
            native.load() is None
            or torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
            or torch.is_autocast_enabled("cpu")
            or transform_reasons()
        ):
            return False
        weights = [self.embedding, self.readout, self.weight, self.bias]
        tensors = [tensor for tensor in (*weights, *self.call.inputs()) if tensor is not None]
        return (
            all(t.is_cpu and t.dtype is torch.float32 and is_plain(type(t)) for t in tensors)
            and self.call.h0.numel() > 0
            and (not self.attends or self.call.keys.numel() > 0)
        )


class Runner:
    """Steps of a search, one after the other; the state of the last one stays here."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        call = step.call
        library: Any = native.load()
        attends = step.attends
        (layers, batch, hidden), context = call.h0.shape, call.context0.shape[1]
        self.batch = batch
        attention, embedded = None, call.x.shape[2]
        if attends:
            query = call.keys.new_empty(call.keys.shape[0], batch // call.keys.shape[0], call.keys.shape[2])
            arguments = (query, call.keys, call.values, call.v, None, None, call.factors, call.lengths, call.mask)
            attention = Inputs(True, *arguments, False, call.scale, call.normalize)
        loop = self.loop = Loop(call.cell, call.x, call.h0, call.keys, attention, None)
        self.h = call.h0.new_empty(layers, 2, batch, hidden)
        self.c = call.h0.new_empty((layers, 2, batch, hidden) if call.c0 is not None else 0)
        self.context = call.h0.new_empty(batch, context)
        self.h[:, 1] = call.h0
        if call.c0 is not None:
            self.c[:, 1] = call.c0
        self.context.copy_(call.context0)
        sizes = [embedded + context, *[hidden] * (layers - 1)]
        inputs = [call.h0.new_empty(1, batch, size) for size in sizes]
        weights = [tensor for layer in call.layers for tensor in layer]
        loop.native.layers = [
            loop.layer(index, weights, inputs, self.h, self.c, call.h0.new_empty(0), False, True)
            for index in range(layers)
        ]
        loop.pack_query(call.query_weight, False, True)
        self.weights = call.h0.new_zeros(batch, call.keys.shape[1])
        if step.seen is not None:
            self.weights.copy_(step.seen)
        self.seen = self.weights
        depth = hidden + context if step.readout is None else len(step.readout)
        queries = call.h0.new_empty(batch, call.keys.shape[2])
        output, read = call.h0.new_empty(batch, hidden + context), call.h0.new_empty(batch, depth)
        self.kept = (inputs, queries, output, read, step)
        loop.native.query, loop.native.context = queries.data_ptr(), self.context.data_ptr()
        loop.native.weights = self.weights.data_ptr()
        found = self.native = library.DecodeStep()
        found.decoder = loop.native
        found.before = step.before
        found.embedding, found.embedding_size = step.embedding.data_ptr(), embedded
        found.output, found.read = output.data_ptr(), read.data_ptr()
        projection = packed_weight(step.weight, torch.float32, "rnn_tanh", 1, False, False, True)
        if step.readout is not None:
            readout = packed_weight(step.readout, torch.float32, "rnn_tanh", 1, False, False, True)
            found.readout, found.readout_size = readout.address(False), depth
            loop.kept.append(readout)
        loop.kept.append(projection)
        found.panels, found.bias = projection.address(False), step.bias.data_ptr()
        found.vocabulary = self.vocabulary = step.weight.shape[0]

    def keep(self, rows: Tensor, sentences: Tensor) -> Runner:
        """One for fewer sequences, which are those rows now, and for those memories."""
        call, step = self.step.call, self.step
        values, factors, lengths = (
            None if tensor is None else tensor.index_select(0, sentences)
            for tensor in (call.values, call.factors, call.lengths)
        )
        fewer = replace(
            call,
            x=call.x[:, : len(rows)],
            h0=self.h[:, 1].index_select(1, rows),
            c0=None if call.c0 is None else self.c[:, 1].index_select(1, rows),
            context0=self.context.index_select(0, rows),
            keys=call.keys.index_select(0, sentences) if step.attends else call.keys,
            values=values,
            factors=factors,
            lengths=lengths,
        )
        return Runner(replace(step, call=fewer, seen=self.weights.index_select(0, rows)))

    def _follow(self, rows: Tensor) -> None:
        # What the output's context was made by: asked before the layers, it is that of the step before.
        if self.step.before:
            self.seen = self.weights.index_select(0, rows)

    def logits(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """All logits [N, V] after tokens [N], of sequences that were those rows [N] before."""
        self._follow(rows)
        found = self.h.new_empty(self.batch, self.vocabulary)
        native.load().decode_logits(  # type: ignore[union-attr]
            self.native, tokens.data_ptr(), rows.data_ptr(), found.data_ptr(), torch.get_num_threads()
        )
        return found

    def select(
        self, tokens: Tensor, rows: Tensor, k: int, scores: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`fastrnn.ops.top_k.select` of these logits, which are never in memory as a whole."""
        self._follow(rows)
        groups = self.batch // group_size
        values, normalizers = self.h.new_empty(groups, k), self.h.new_empty(self.batch)
        indices = torch.empty(groups, k, dtype=torch.int64)
        native.load().decode_best(  # type: ignore[union-attr]
            self.native,
            tokens.data_ptr(),
            rows.data_ptr(),
            group_size,
            k,
            scores.data_ptr(),
            values.data_ptr(),
            indices.data_ptr(),
            normalizers.data_ptr(),
            torch.get_num_threads(),
        )
        return values, indices, normalizers
