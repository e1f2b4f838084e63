"""The reference against torch.nn, against formulas written out again, and its derivatives against differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fastrnn.backends import RecurrenceCall
from fastrnn.backends import reference as backend
from fastrnn.reference import CELLS, layer_norm, recurrence, zoneout_mask

T, B, I, H, P = 6, 4, 3, 5, 2


def weights(cell: str, inputs: int = I, hidden: int = H, projected: int = H) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight_ih, weight_hh, bias_ih, bias_hh in fp64."""
    rows = CELLS[cell].gates * hidden
    shapes = [(rows, inputs), (rows, projected), (rows,), (rows,)]
    return tuple(torch.randn(shape, dtype=torch.float64) / 2 for shape in shapes)  # type: ignore[return-value]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def torch_module(cell: str, proj_size: int = 0) -> torch.nn.RNNBase:
    if cell.startswith("rnn"):
        return torch.nn.RNN(I, H, nonlinearity=cell[4:], bidirectional=True, dtype=torch.float64)
    if cell == "gru":
        return torch.nn.GRU(I, H, bidirectional=True, dtype=torch.float64)
    return torch.nn.LSTM(I, H, bidirectional=True, proj_size=proj_size, dtype=torch.float64)


# Against torch.nn


@pytest.mark.parametrize("states", [True, False], ids=["states", "no_states"])
@pytest.mark.parametrize("cell, proj_size", [*((cell, 0) for cell in CELLS), ("lstm", P)])
def test_both_directions_equal_torch(cell: str, proj_size: int, states: bool) -> None:
    module = torch_module(cell, proj_size)
    x = randn(T, B, I).requires_grad_()
    h0, c0 = randn(2, B, proj_size or H).requires_grad_(), randn(2, B, H).requires_grad_()
    hx = ((h0, c0) if cell == "lstm" else h0) if states else None
    y, finals = module(x, hx)
    h_n, c_n = finals if cell == "lstm" else (finals, None)
    gradient = torch.randn_like(y)
    inputs = [x, *module.parameters(), *((h0, c0) if states and cell == "lstm" else (h0,) if states else ())]

    ours = []
    for direction, suffix in enumerate(("", "_reverse")):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *(["weight_hr"] if proj_size else []))
        weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr = (getattr(module, f"{name}_l0{suffix}") for name in names)
        found = recurrence(
            cell,
            x @ weight_ih.T + bias_ih,
            weight_hh,
            bias_hh,
            h0[direction] if states else None,
            c0[direction] if states and cell == "lstm" else None,
            weight_hr=weight_hr[0] if proj_size else None,
            reverse=direction == 1,
        )
        ours.append(found)
        torch.testing.assert_close(found[1], h_n[direction])
        if cell == "lstm":
            torch.testing.assert_close(found[2], c_n[direction])
    together = torch.cat([found[0] for found in ours], -1)
    torch.testing.assert_close(together, y)
    expected = torch.autograd.grad(y, inputs, gradient)
    for result, wanted in zip(torch.autograd.grad(together, inputs, gradient), expected):
        torch.testing.assert_close(result, wanted)


def test_every_cell_state() -> None:
    _, weight_hh, _, bias_hh = weights("lstm")
    gates_x = randn(T, B, 4 * H)
    y, h_n, c_n, all_c = recurrence("lstm", gates_x, weight_hh, bias_hh)
    for t in range(T):
        found = recurrence("lstm", gates_x[: t + 1], weight_hh, bias_hh)
        torch.testing.assert_close(found[2], all_c[t])
        torch.testing.assert_close(found[1], y[t])
    assert torch.equal(c_n, all_c[-1]) and torch.equal(h_n, y[-1])


# Formulas written out again, in scalars


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gru_by_hand(xs: list[float], w: dict[str, float], reset_after: bool, z_keeps: bool = True) -> float:
    """One unit, one input. z_keeps: h = z * h + (1 - z) * n; otherwise h = (1 - z) * h + z * n."""
    h = 0.7
    for x in xs:
        r = sigmoid(w["ir"] * x + w["br"] + w["hr"] * h + w["cr"])
        z = sigmoid(w["iz"] * x + w["bz"] + w["hz"] * h + w["cz"])
        recurrent = r * (w["hn"] * h + w["cn"]) if reset_after else w["hn"] * (r * h) + w["cn"]
        n = math.tanh(w["in"] * x + w["bn"] + recurrent)
        h = z * h + (1 - z) * n if z_keeps else (1 - z) * h + z * n
    return h


GRU_WEIGHTS = {
    **{"ir": 0.5, "iz": -0.3, "in": 0.8, "br": 0.1, "bz": 0.4, "bn": -0.2},
    **{"hr": -0.6, "hz": 0.9, "hn": 1.1, "cr": 0.05, "cz": -0.15, "cn": 0.25},
}


def gru_one_unit(xs: list[float], w: dict[str, float], reset_after: bool) -> float:
    def column(letter: str) -> Tensor:
        return torch.tensor([[w[f"{letter}{gate}"]] for gate in "rzn"], dtype=torch.float64)

    gates_x = torch.tensor(xs, dtype=torch.float64)[:, None, None] * column("i").T + column("b").T
    h0 = torch.tensor([[0.7]], dtype=torch.float64)
    return recurrence("gru", gates_x, column("h"), column("c")[:, 0], h0, reset_after=reset_after)[1].item()


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_by_hand(reset_after: bool) -> None:
    xs = [1.0, -0.5, 2.0]
    assert gru_one_unit(xs, GRU_WEIGHTS, reset_after) == pytest.approx(
        gru_by_hand(xs, GRU_WEIGHTS, reset_after), rel=1e-14
    )


def test_where_the_reset_acts_matters() -> None:
    xs = [1.0, -0.5, 2.0]
    assert abs(gru_one_unit(xs, GRU_WEIGHTS, True) - gru_one_unit(xs, GRU_WEIGHTS, False)) > 0.01
    # Without a bias inside, and with one unit, r * (w h) and w (r * h) are the same number.
    without = GRU_WEIGHTS | {"cn": 0.0}
    assert gru_one_unit(xs, without, True) == pytest.approx(gru_one_unit(xs, without, False), rel=1e-14)


@pytest.mark.parametrize("reset_after", [True, False])
def test_the_two_interpolations_differ_by_the_sign_of_z(reset_after: bool) -> None:
    """sigma(-a) = 1 - sigma(a): negating z's pre-activation turns one lecture's GRU into the other's."""
    xs = [1.0, -0.5, 2.0]
    negated = GRU_WEIGHTS | {name: -GRU_WEIGHTS[name] for name in ("iz", "hz", "bz", "cz")}
    other = gru_by_hand(xs, GRU_WEIGHTS, reset_after, z_keeps=False)
    assert gru_one_unit(xs, negated, reset_after) == pytest.approx(other, rel=1e-14)
    assert abs(gru_one_unit(xs, GRU_WEIGHTS, reset_after) - other) > 0.1


def test_gru_of_the_lectures() -> None:
    """h~ = tanh(W_h [r * h, x]), h = z * h + (1 - z) * h~, with one matrix on the joined vector for each gate."""
    joined = {gate: randn(H, H + I) / 2 for gate in "rzn"}
    weight_hh = torch.cat([joined[gate][:, :H] for gate in "rzn"])
    weight_ih = torch.cat([joined[gate][:, H:] for gate in "rzn"])
    x, h = randn(T, B, I), randn(B, H)
    y = recurrence("gru", x @ weight_ih.T, weight_hh, None, h, reset_after=False)[0]
    for t in range(T):
        r, z = (torch.sigmoid(torch.cat([h, x[t]], 1) @ joined[gate].T) for gate in "rz")
        candidate = torch.tanh(torch.cat([r * h, x[t]], 1) @ joined["n"].T)
        h = z * h + (1 - z) * candidate
        torch.testing.assert_close(y[t], h)


# Layer norm


@pytest.mark.parametrize("groups", [(1,), (4,), (2, 1), (3, 3)])
def test_layer_norm_equals_torch_group_by_group(groups: tuple[int, ...]) -> None:
    size = 7
    x, weight, bias = randn(T, B, sum(groups) * size), randn(sum(groups) * size), randn(sum(groups) * size)
    sizes = [size * n for n in groups]
    parts = zip(x.split(sizes, -1), weight.split(sizes), bias.split(sizes))
    expected = torch.cat([F.layer_norm(a, a.shape[-1:], w, b) for a, w, b in parts], -1)
    torch.testing.assert_close(layer_norm(x, groups, weight, bias), expected)


Norm = tuple[Tensor, Tensor]


def normed_step(
    cell: str, x: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor, norm: Norm, norm_c: Norm, reset_after: bool
) -> tuple[Tensor, Tensor]:
    """One step with torch's layer_norm, from the equations of Ba et al. 2016 (arXiv 1607.06450, appendix)."""
    a, g = norm
    if cell.startswith("rnn"):
        return getattr(torch, cell[4:])(x + F.layer_norm(h @ w.T, [H], a, g) + b), c
    if cell == "lstm":
        i, f, n, o = (x + F.layer_norm(h @ w.T, [4 * H], a, g) + b).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, [H], *norm_c)), c
    pre = x[:, : 2 * H] + F.layer_norm(h @ w[: 2 * H].T, [2 * H], a[: 2 * H], g[: 2 * H]) + b[: 2 * H]
    r, z = torch.sigmoid(pre).chunk(2, 1)
    if reset_after:
        n = torch.tanh(x[:, 2 * H :] + r * (F.layer_norm(h @ w[2 * H :].T, [H], a[2 * H :], g[2 * H :]) + b[2 * H :]))
    else:
        n = torch.tanh(x[:, 2 * H :] + F.layer_norm((r * h) @ w[2 * H :].T, [H], a[2 * H :], g[2 * H :]) + b[2 * H :])
    return (1 - z) * n + z * h, c


@pytest.mark.parametrize("cell, reset_after", [*((cell, True) for cell in CELLS), ("gru", False)])
def test_layer_norm_inside_the_recurrence(cell: str, reset_after: bool) -> None:
    _, w, _, b = weights(cell)
    rows = len(b)
    norm, norm_c = (randn(rows), randn(rows)), (randn(H), randn(H))
    gates_x, h, c = randn(T, B, rows), randn(B, H), randn(B, H)
    options: dict[str, Any] = {"layer_norm_hh": norm, "reset_after": reset_after}
    if cell == "lstm":
        options["layer_norm_c"] = norm_c
    y, _, c_n, _ = recurrence(cell, gates_x, w, b, h, c if cell == "lstm" else None, **options)
    for t in range(T):
        h, c = normed_step(cell, gates_x[t], h, c, w, b, norm, norm_c, reset_after)
        torch.testing.assert_close(y[t], h)
    if cell == "lstm":
        torch.testing.assert_close(c_n, c)


def test_layer_norm_of_the_input() -> None:
    """Normalised before the bias is added, with the groups of the recurrent product."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights("gru")
    x, norm = randn(T, B, I), (randn(3 * H), randn(3 * H))
    call = RecurrenceCall("gru", x, weight_ih, weight_hh, bias_ih, bias_hh, layer_norm_ih=norm)
    parts = zip(*(v.split([2 * H, H], -1) for v in (x @ weight_ih.T, *norm)))
    parts = [F.layer_norm(part, part.shape[-1:], weight, bias) for part, weight, bias in parts]
    expected = recurrence("gru", torch.cat(parts, -1) + bias_ih, weight_hh, bias_hh)[0]
    torch.testing.assert_close(backend.run(call)[0], expected)


# Peepholes


def sigmoid_of(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("options", ["alone", "layer_norm_and_zoneout"])
def test_peephole_by_hand(options: str) -> None:
    """Gers et al. 2002, equations 4 to 10: o sees the new cell, before zoneout and layer norm change it."""
    _, w, _, b = weights("lstm")
    gates_x, h0, c0, peephole, norm_c = randn(T, B, 4 * H), randn(B, H), randn(B, H), randn(3 * H), (randn(H), randn(H))
    given: dict[str, Any] = {} if options == "alone" else {"zoneout": 0.4, "layer_norm_c": norm_c}
    y, _, c_n, _ = recurrence("lstm", gates_x, w, b, h0, c0, peephole=peephole, **given)

    x, h, c, p = gates_x.numpy(), h0.numpy(), c0.numpy(), peephole.numpy()
    for t in range(T):
        a = x[t] + h @ w.numpy().T + b.numpy()
        i = sigmoid_of(a[:, :H] + p[:H] * c)
        f = sigmoid_of(a[:, H : 2 * H] + p[H : 2 * H] * c)
        new = f * c + i * np.tanh(a[:, 2 * H : 3 * H])
        o = sigmoid_of(a[:, 3 * H :] + p[2 * H :] * new)
        seen = new
        if given:
            deviation = np.sqrt(new.var(1, keepdims=True) + 1e-5)
            seen = (new - new.mean(1, keepdims=True)) / deviation * norm_c[0].numpy() + norm_c[1].numpy()
        out = o * np.tanh(seen)
        kept = given.get("zoneout", 0.0)
        h, c = kept * h + (1 - kept) * out, kept * c + (1 - kept) * new
        np.testing.assert_allclose(y[t].numpy(), h, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(c_n.numpy(), c, rtol=1e-12, atol=1e-14)


# Zoneout


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_zoneout_mask_has_its_probability_and_no_pattern(probability: float) -> None:
    masks = torch.stack([zoneout_mask(probability, 2**40 + 17, 0, t, 64, 96) for t in range(100)]).double()
    count = masks.numel()
    sigma = math.sqrt(probability * (1 - probability))
    assert abs(masks.mean() - probability) < 4 * sigma / math.sqrt(count)
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        line = masks.mean(others)  # each step, row and unit by itself
        deviations = (line - probability) / (sigma / math.sqrt(count / masks.shape[dim]))
        assert deviations.abs().max() < 4.5 and 0.7 < deviations.std() < 1.3
        for lag in (1, 2, 7):
            a, b = masks.narrow(dim, 0, masks.shape[dim] - lag), masks.narrow(dim, lag, masks.shape[dim] - lag)
            covariance = ((a - probability) * (b - probability)).mean()
            assert abs(covariance) < 4 * sigma**2 / math.sqrt(a.numel())


def test_zoneout_mask_depends_on_each_coordinate_alone() -> None:
    mask = zoneout_mask(0.5, 7, 0, 3, 50, 60)
    assert torch.equal(mask, zoneout_mask(0.5, 7, 0, 3, 50, 60))
    assert torch.equal(mask[:9, :11], zoneout_mask(0.5, 7, 0, 3, 9, 11))
    others = [(8, 0, 3), (7 + 2**32, 0, 3), (7 + 2**62, 0, 3), (7, 1, 3), (7, 0, 4)]
    for seed, stream, t in others:
        agreeing = (mask == zoneout_mask(0.5, seed, stream, t, 50, 60)).double().mean()
        assert abs(agreeing - 0.5) < 4 * 0.5 / math.sqrt(mask.numel()), (seed, stream, t)
    larger = zoneout_mask(0.6, 7, 0, 3, 50, 60)
    assert (mask <= larger).all()
    assert not zoneout_mask(0.0, 7, 0, 3, 50, 60).any() and zoneout_mask(1.0, 7, 0, 3, 50, 60).all()


@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_step_by_step(cell: str) -> None:
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x, h, c = randn(T, B, len(bias_hh)), randn(B, H), randn(B, H) if cell == "lstm" else None
    y, _, c_n, _ = recurrence(cell, gates_x, weight_hh, bias_hh, h, c, zoneout=0.4, zoneout_seed=99)
    for t in range(T):
        new_h, _, new_c = recurrence(cell, gates_x[t : t + 1], weight_hh, bias_hh, h, c)[:3]
        h = torch.where(zoneout_mask(0.4, 99, 0, t, B, H), h, new_h[0])
        c = None if c is None else torch.where(zoneout_mask(0.4, 99, 1, t, B, H), c, new_c)
        assert torch.equal(y[t], h)
    assert c is None or torch.equal(c_n, c)


@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_expectation_is_the_mean_of_one_step(cell: str) -> None:
    """Of one step only: over several, the expectation goes through the cell, as Krueger et al. have it."""
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x, h = randn(1, B, len(bias_hh)), randn(B, H)
    c = randn(B, H) if cell == "lstm" else None
    expected = recurrence(cell, gates_x, weight_hh, bias_hh, h, c, zoneout=0.3)
    samples = 2000
    drawn = [recurrence(cell, gates_x, weight_hh, bias_hh, h, c, zoneout=0.3, zoneout_seed=s) for s in range(samples)]
    plain = recurrence(cell, gates_x, weight_hh, bias_hh, h, c)
    for index, old in ((1, h), (2, c)):
        if old is None:
            continue
        mean = torch.stack([results[index] for results in drawn]).mean(0)
        sigma = (old - plain[index]).abs() * math.sqrt(0.3 * 0.7 / samples)
        assert ((mean - expected[index]).abs() < 4.5 * sigma + 1e-12).all()
        torch.testing.assert_close(expected[index], 0.3 * old + 0.7 * plain[index])


@pytest.mark.parametrize("seed", [None, 5])
def test_zoneout_bounds(seed: int | None) -> None:
    _, weight_hh, _, bias_hh = weights("lstm")
    gates_x, h, c = randn(T, B, 4 * H), randn(B, H), randn(B, H)
    y, h_n, c_n, _ = recurrence("lstm", gates_x, weight_hh, bias_hh, h, c, zoneout=1.0, zoneout_seed=seed)
    assert torch.equal(h_n, h) and torch.equal(c_n, c) and torch.equal(y, h.expand(T, B, H))
    plain = recurrence("lstm", gates_x, weight_hh, bias_hh, h, c)[0]
    assert torch.equal(recurrence("lstm", gates_x, weight_hh, bias_hh, h, c, zoneout=0.0, zoneout_seed=seed)[0], plain)


# Lengths, resets, masks


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_equal_each_sequence_alone(cell: str, reverse: bool) -> None:
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x, h, c = randn(T, B, len(bias_hh)), randn(B, H), randn(B, H) if cell == "lstm" else None
    lengths = torch.tensor([3, 0, T, 1])
    y, h_n, c_n, all_c = recurrence(cell, gates_x, weight_hh, bias_hh, h, c, lengths=lengths, reverse=reverse)
    for b, length in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        state = (h[row], None if c is None else c[row])
        alone = recurrence(cell, gates_x[:length, row], weight_hh, bias_hh, *state, reverse=reverse)
        torch.testing.assert_close(y[:length, row], alone[0])
        torch.testing.assert_close(h_n[row], alone[1])
        assert (y[length:, b] == 0).all()
        if cell == "lstm":
            torch.testing.assert_close(c_n[row], alone[2])
            torch.testing.assert_close(all_c[:length, row], alone[3])
            assert (all_c[length:, b] == 0).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_resets_cut_the_sequence(cell: str, reverse: bool) -> None:
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x = randn(T, B, len(bias_hh)).requires_grad_()
    h, c = randn(B, H).requires_grad_(), randn(B, H) if cell == "lstm" else None
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3, 1] = True
    y, h_n, _, _ = recurrence(cell, gates_x, weight_hh, bias_hh, h, c, resets=resets, reverse=reverse)
    plain = recurrence(cell, gates_x, weight_hh, bias_hh, h, c, reverse=reverse)[0]
    others = [0, 2, 3]
    torch.testing.assert_close(y[:, others], plain[:, others])
    before, after = (slice(4, T), slice(0, 4)) if reverse else (slice(0, 3), slice(3, T))
    torch.testing.assert_close(y[before, 1], plain[before, 1])
    fresh = recurrence(cell, gates_x[after, 1:2], weight_hh, bias_hh, reverse=reverse)
    torch.testing.assert_close(y[after, 1:2], fresh[0])
    dx, dh0 = torch.autograd.grad(h_n[1].sum(), (gates_x, h))
    assert (dx[before] == 0).all() and (dh0 == 0).all() and (dx[after, 1] != 0).any()


def test_a_reset_at_the_first_step_drops_the_initial_state() -> None:
    _, weight_hh, _, bias_hh = weights("lstm")
    gates_x, h, c = randn(T, B, 4 * H), randn(B, H), randn(B, H)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0] = True
    y = recurrence("lstm", gates_x, weight_hh, bias_hh, h, c, resets=resets)[0]
    assert torch.equal(y, recurrence("lstm", gates_x, weight_hh, bias_hh)[0])


def test_a_reset_past_the_end_of_a_sequence_is_no_reset() -> None:
    _, weight_hh, _, bias_hh = weights("gru")
    gates_x, lengths = randn(T, B, 3 * H), torch.tensor([2, 2, 2, 2])
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4] = True
    h_n = recurrence("gru", gates_x, weight_hh, bias_hh, lengths=lengths, resets=resets)[1]
    assert torch.equal(h_n, recurrence("gru", gates_x, weight_hh, bias_hh, lengths=lengths)[1])


@pytest.mark.parametrize("cell, reset_after", [*((cell, True) for cell in CELLS), ("gru", False)])
def test_recurrent_mask_acts_where_h_meets_its_weights(cell: str, reset_after: bool) -> None:
    """A unit of one sequence that is masked counts as a column of zeros in weight_hh, and still keeps its state."""
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x, h = randn(T, B, len(bias_hh)), randn(B, H)
    mask = (torch.rand(B, H) < 0.6).double() / 0.6
    options: dict[str, Any] = {"reset_after": reset_after}
    y = recurrence(cell, gates_x, weight_hh, bias_hh, h, recurrent_mask=mask, **options)[0]
    for b in range(B):
        alone = recurrence(cell, gates_x[:, b : b + 1], weight_hh * mask[b], bias_hh, h[b : b + 1], **options)[0]
        torch.testing.assert_close(y[:, b : b + 1], alone)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_equal_torch(cell: str, reverse: bool) -> None:
    module = torch_module(cell)
    lengths = torch.tensor([T, 4, 4, 1])
    packed = pack_padded_sequence(randn(T, B, I), lengths)
    outputs, finals = module(packed)
    h_n = finals[0] if cell == "lstm" else finals
    names = [f"{name}_l0{'_reverse' if reverse else ''}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    arguments = [getattr(module, name) for name in names]
    call = RecurrenceCall(cell, packed.data, *arguments, batch_sizes=packed.batch_sizes, reverse=reverse)
    y, h, _, all_c = backend.run(call)
    torch.testing.assert_close(y, outputs.data.chunk(2, -1)[reverse])
    torch.testing.assert_close(h, h_n[int(reverse)])
    assert all_c is None or all_c.shape == y.shape


# Derivatives

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": torch.tensor([3, 0, 1])},
    "resets": {"resets": torch.tensor([[False, False, True], [True, False, False], [False, True, False]])},
    "zoneout": {"zoneout": 0.4, "zoneout_seed": 3},
    "zoneout_expected": {"zoneout": 0.4},
    "recurrent_mask": {"recurrent_mask": (3, 2)},
    "layer_norm": {"layer_norm_hh": ("rows",), "layer_norm_c": (2,)},
    "peephole": {"peephole": (6,)},
    "reset_before": {"reset_after": False},
    "projection": {"weight_hr": (1, 2)},
}
COMBINATIONS = [
    (cell, option)
    for cell in CELLS
    for option in [*OPTIONS, "all"]
    if not (option == "reset_before" and cell != "gru")
    and not (option in ("projection", "peephole") and cell != "lstm")
]


@pytest.mark.parametrize("cell, option", COMBINATIONS)
def test_first_and_second_derivatives(cell: str, option: str) -> None:
    steps, batch, hidden = 3, 3, 2
    chosen = dict(OPTIONS[option]) if option != "all" else {k: v for o in OPTIONS.values() for k, v in o.items()}
    if option == "all" and cell != "gru":
        chosen.pop("reset_after")
    if cell != "lstm":
        chosen.pop("layer_norm_c", None)
        chosen.pop("peephole", None)
        chosen.pop("weight_hr", None)
    projected = 1 if "weight_hr" in chosen else hidden
    if "recurrent_mask" in chosen:
        chosen["recurrent_mask"] = (batch, projected)
    rows = CELLS[cell].gates * hidden

    # The option's tensors come after the plain ones, norms as pairs.
    inputs = [randn(steps, batch, rows), randn(rows, projected), randn(rows), randn(batch, projected)]
    has_cell_state = CELLS[cell].has_cell_state
    inputs += [randn(batch, hidden)] if has_cell_state else []
    places: dict[str, Any] = {}
    for name, shape in chosen.items():
        if name.startswith("layer_norm"):
            size = rows if shape == ("rows",) else hidden
            places[name] = (len(inputs), len(inputs) + 1)
            inputs += [randn(size), randn(size)]
        elif name in ("recurrent_mask", "peephole", "weight_hr"):
            places[name] = len(inputs)
            inputs.append(randn(*shape))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        options = dict(chosen)
        for name, place in places.items():
            options[name] = (tensors[place[0]], tensors[place[1]]) if isinstance(place, tuple) else tensors[place]
        c0 = tensors[4] if has_cell_state else None
        results = recurrence(cell, *tensors[:4], c0, **options)
        return tuple(result for result in results if result is not None)

    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Types, devices and empty shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_any_floating_dtype(cell: str, dtype: torch.dtype) -> None:
    _, weight_hh, _, bias_hh = weights(cell)
    gates_x = randn(T, B, len(bias_hh))
    results = recurrence(cell, gates_x.to(dtype), weight_hh.to(dtype), bias_hh.to(dtype))
    for result, exact in zip(results, recurrence(cell, gates_x, weight_hh, bias_hh)):
        if exact is not None:
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str) -> None:
    _, weight_hh, _, bias_hh = weights(cell)
    rows, has_cell_state = len(bias_hh), CELLS[cell].has_cell_state
    h = randn(B, H)
    y, h_n, c_n, all_c = recurrence(cell, randn(0, B, rows), weight_hh, bias_hh, h)
    assert y.shape == (0, B, H) and torch.equal(h_n, h)
    assert (c_n.shape, all_c.shape) == ((B, H), (0, B, H)) if has_cell_state else c_n is all_c is None
    y, h_n, *_ = recurrence(cell, randn(T, 0, rows), weight_hh, bias_hh)
    assert y.shape == (T, 0, H) and h_n.shape == (0, H)
