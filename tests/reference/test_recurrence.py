"""The reference against torch.nn, hand-written formulas and finite differences, in fp64."""

import pytest
import torch
from torch.nn import functional

from fastrnn.reference import CELLS, layer_norm, recurrence, zoneout_mask

T, B, H = 5, 3, 4
ALL = list(CELLS)


def draw(cell: str, steps: int = T) -> dict[str, torch.Tensor]:
    gates = CELLS[cell].gates
    shapes = {"gates_x": (steps, B, gates * H), "weight_hh": (gates * H, H), "bias_hh": (gates * H,), "h0": (B, H)}
    if cell == "lstm":
        shapes["c0"] = (B, H)
    return {name: torch.randn(shape, dtype=torch.double) for name, shape in shapes.items()}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ALL)
def test_equals_torch(cell: str, reverse: bool) -> None:
    module_class = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    options = {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn") else {}
    module = module_class(6, H, dtype=torch.double, **options)
    x, h0, c0 = torch.randn(T, B, 6).double(), torch.randn(B, H).double(), torch.randn(B, H).double()
    expected, states = module(x.flip(0) if reverse else x, (h0[None], c0[None]) if cell == "lstm" else h0[None])
    gates_x = x @ module.weight_ih_l0.T + module.bias_ih_l0
    y, h_n, c_n, _ = recurrence(
        cell, gates_x, module.weight_hh_l0, module.bias_hh_l0, h0, c0 if cell == "lstm" else None, reverse=reverse
    )
    torch.testing.assert_close(y, expected.flip(0) if reverse else expected)
    torch.testing.assert_close(h_n, states[0][0] if cell == "lstm" else states[0])
    if cell == "lstm":
        torch.testing.assert_close(c_n, states[1][0])


def test_projection_equals_torch() -> None:
    module = torch.nn.LSTM(6, H, proj_size=2, dtype=torch.double)
    x = torch.randn(T, B, 6).double()
    gates_x = x @ module.weight_ih_l0.T + module.bias_ih_l0
    y, _, c_n, _ = recurrence("lstm", gates_x, module.weight_hh_l0, module.bias_hh_l0, weight_hr=module.weight_hr_l0)
    expected, (_, c_expected) = module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(c_n, c_expected[0])


def test_gru_with_the_reset_before_the_product() -> None:
    case = draw("gru", 1)
    x, w, b, h = case["gates_x"][0], case["weight_hh"], case["bias_hh"], case["h0"]
    r = torch.sigmoid(x[:, :H] + h @ w[:H].T + b[:H])
    z = torch.sigmoid(x[:, H : 2 * H] + h @ w[H : 2 * H].T + b[H : 2 * H])
    n = torch.tanh(x[:, 2 * H :] + (r * h) @ w[2 * H :].T + b[2 * H :])
    y = recurrence("gru", **case, reset_after=False)[0]
    torch.testing.assert_close(y[0], (1 - z) * n + z * h)
    assert not torch.allclose(y, recurrence("gru", **case)[0])


@pytest.mark.parametrize("reset_after", [False, True])
def test_the_two_interpolations_of_the_gru_differ_by_the_sign_of_z(reset_after: bool) -> None:
    """h = z h + (1 - z) n and h = (1 - z) h + z n are one model: 1 - sigmoid(a) = sigmoid(-a)."""
    case = draw("gru", 1)
    negated = {name: tensor.clone() for name, tensor in case.items()}
    negated["gates_x"][..., H : 2 * H] *= -1
    negated["weight_hh"][H : 2 * H] *= -1
    negated["bias_hh"][H : 2 * H] *= -1
    y = recurrence("gru", **case, reset_after=reset_after)[0][0]
    other = recurrence("gru", **negated, reset_after=reset_after)[0][0]
    z = torch.sigmoid((case["gates_x"][0] + case["h0"] @ case["weight_hh"].T + case["bias_hh"])[:, H : 2 * H])
    n = (y - z * case["h0"]) / (1 - z)
    torch.testing.assert_close(other, z * n + (1 - z) * case["h0"])


def test_layer_norm_equals_torch() -> None:
    x, weight, bias = torch.randn(B, 3 * H).double(), torch.randn(3 * H).double(), torch.randn(3 * H).double()
    first = functional.layer_norm(x[:, : 2 * H], (2 * H,), weight[: 2 * H], bias[: 2 * H])
    second = functional.layer_norm(x[:, 2 * H :], (H,), weight[2 * H :], bias[2 * H :])
    torch.testing.assert_close(layer_norm(x, (2, 1), weight, bias), torch.cat([first, second], 1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ALL)
def test_lengths_equal_each_sequence_alone(cell: str, reverse: bool) -> None:
    case, lengths = draw(cell), torch.tensor([2, 0, T])
    y, h_n, _, _ = recurrence(cell, **case, lengths=lengths, reverse=reverse)
    for b, length in enumerate(lengths.tolist()):
        alone = {name: tensor[b : b + 1] if name in ("h0", "c0") else tensor for name, tensor in case.items()}
        alone["gates_x"] = case["gates_x"][:length, b : b + 1]
        y_alone, h_alone, _, _ = recurrence(cell, **alone, reverse=reverse)
        torch.testing.assert_close(y[:length, b], y_alone[:, 0])
        torch.testing.assert_close(h_n[b], h_alone[0])
        assert not y[length:, b].any()


@pytest.mark.parametrize("cell", ALL)
def test_resets_equal_sequences_cut_in_two(cell: str) -> None:
    case = draw(cell)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    y = recurrence(cell, **case, resets=resets)[0]
    first = recurrence(cell, **{**case, "gates_x": case["gates_x"][:2]})[0]
    second = recurrence(cell, case["gates_x"][2:], case["weight_hh"], case["bias_hh"])[0]
    torch.testing.assert_close(y, torch.cat([first, second]))


def test_zoneout_mask_is_drawn_with_its_probability_and_without_correlation() -> None:
    masks = torch.stack([zoneout_mask(0.3, 2**40 + 7, stream, t, 100, 64) for stream in (0, 1) for t in range(8)])
    count = masks.numel()
    assert abs(masks.double().mean() - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    centred = masks.double() - 0.3
    for axis in range(3):  # neighbours in time, row and unit; also streams, at the middle of axis 0
        pairs = centred.unfold(axis, 2, 1)
        product = (pairs[..., 0] * pairs[..., 1]).mean()
        assert abs(product) < 4 * 0.21 / count**0.5
    assert torch.equal(masks[0], zoneout_mask(0.3, 2**40 + 7, 0, 0, 100, 64))
    assert not torch.equal(masks[0], zoneout_mask(0.3, 2**41 + 7, 0, 0, 100, 64))


@pytest.mark.parametrize("cell", ALL)
def test_zoneout_keeps_or_takes_each_unit_and_its_expectation_is_the_mean(cell: str) -> None:
    case = draw(cell, 1)
    fresh = recurrence(cell, **case)[0][0]
    draws = torch.stack([recurrence(cell, **case, zoneout=0.4, zoneout_seed=seed)[0][0] for seed in range(400)])
    assert ((draws == fresh) | (draws == case["h0"])).all()
    expected = recurrence(cell, **case, zoneout=0.4)[0][0]
    spread = (fresh - case["h0"]).abs() * (0.24 / 400) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * spread + 1e-12).all()


OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": torch.tensor([2, 0, 3])},
    "resets": {"resets": torch.tensor([[False, True, False], [True, False, False], [False, False, True]])},
    "zoneout": {"zoneout": 0.3, "zoneout_seed": 5},
    "zoneout's expectation": {"zoneout": 0.3},
    "recurrent_mask": {"recurrent_mask": torch.tensor([[2.0, 0, 2, 0], [0, 2, 2, 0], [2, 2, 2, 2]]).double()},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*ALL, "gru reset before"])
def test_gradients_by_finite_differences(cell: str, option: str) -> None:
    name = cell.removesuffix(" reset before")
    case = draw(name, 3)
    if name == "rnn_relu":  # away from the kink
        case["gates_x"] += torch.sign(case["gates_x"])
    for tensor in case.values():
        tensor.requires_grad_()

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(case, tensors, strict=True))
        results = recurrence(name, **given, **OPTIONS[option], reset_after=cell == name)
        return tuple(result for result in results if result is not None)

    assert torch.autograd.gradcheck(run, tuple(case.values()))
    assert torch.autograd.gradgradcheck(run, tuple(case.values()))


@pytest.mark.parametrize("cell", ALL)
def test_gradients_of_layer_norm_by_finite_differences(cell: str) -> None:
    case = draw(cell, 2)
    size = CELLS[cell].gates * H
    norms = [torch.rand(size).double() + 0.5, torch.randn(size).double()]
    if cell == "lstm":
        norms += [torch.rand(H).double() + 0.5, torch.randn(H).double()]
    inputs = [tensor.requires_grad_() for tensor in (*case.values(), *norms)]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(case, tensors, strict=False))
        weights = tensors[len(case) :]
        norm_c = (weights[2], weights[3]) if cell == "lstm" else None
        return recurrence(cell, **given, layer_norm_hh=(weights[0], weights[1]), layer_norm_c=norm_c)[0]

    assert torch.autograd.gradcheck(run, inputs)
