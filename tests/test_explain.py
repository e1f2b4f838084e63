"""explain() names what computed each layer, and why the others did not."""

import pytest
import torch

import fastrnn


def test_the_kernels_and_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    if fastrnn.backends.native.load() is None:
        pytest.skip("the compiled extension is not built")
    model = torch.nn.Sequential(fastrnn.nn.GRU(3, 4, num_layers=2, bidirectional=True))
    before = torch.get_rng_state()
    text = fastrnn.explain(model, torch.randn(5, 2, 3))
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("gru") >= 4 and "cpu (backend='auto')" in text
    assert "not aten: 'cpu' comes first" in text and "not reference" in text
    torch.set_rng_state(before)


def test_why_no_kernel_and_not_torch() -> None:
    text = fastrnn.explain(fastrnn.nn.LSTM(3, 4, zoneout=0.1, dtype=torch.double), torch.randn(5, 2, 3).double())
    assert "reference" in text and "the tensors are torch.float64" in text and "torch has no zoneout" in text


def test_fp64_goes_to_torch() -> None:
    text = fastrnn.explain(fastrnn.nn.LSTM(3, 4, dtype=torch.double), torch.randn(5, 2, 3).double())
    assert "aten (backend='auto')" in text and "torch.float64" in text


def test_a_module_that_was_not_accelerated_is_named() -> None:
    text = fastrnn.explain(torch.nn.Sequential(torch.nn.GRU(3, 4)), torch.randn(5, 2, 3))
    assert "computed by torch.nn" in text and "fastrnn.accelerate was not called" in text


def test_gradients_and_random_numbers_stay_as_they_were() -> None:
    layer = fastrnn.nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    state = torch.get_rng_state()
    fastrnn.explain(layer, torch.randn(5, 2, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in layer.parameters())
