"""When the back end `triton` is picked, and what it says where it is not."""

import os
from dataclasses import replace

import pytest
import torch

from fastrnn import backends
from fastrnn.backends import attention, cpu, cuda, triton
from tests.ops.attention_case import AttentionCase
from tests.ops.case import Case

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")


def test_reasons_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = Case("lstm", 2, 2, 2, 2).draw()
    monkeypatch.setattr(triton, "_INSTALLED", False)
    message = "backend 'triton' cannot compute this call: triton is not installed; the tensors are on cpu, not on a"
    with pytest.raises(NotImplementedError, match=message):
        backends.choose(call, "triton")


def test_reasons_for_attention_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = AttentionCase("inner", 2, 2, 2, 2).draw()
    monkeypatch.setattr(triton, "_INSTALLED", False)
    message = "backend 'triton' cannot compute this call: triton is not installed; the tensors are on cpu, not on a"
    with pytest.raises(NotImplementedError, match=message):
        backends.choose(call, "triton")


def test_auto_on_a_gpu_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.triton, "reasons_against", lambda call: [])
    monkeypatch.setattr(attention.cpu, "reasons_against", lambda call: ["the tensors are on cuda:0, not on the CPU"])
    call, _ = AttentionCase("inner", 2, 2, 2, 2).draw()
    assert backends.choose(call) == "triton"
    call = replace(call, need_weights=False)
    with backends.recorded_choices() as choices:
        assert backends.choose(call) == "aten"
    assert "not triton: it stores the weights" in str(choices[0])
    assert backends.choose(replace(call, lengths=torch.tensor([1, 2]))) == "triton"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU's tensors were a GPU's."""
    monkeypatch.setattr(triton, "reasons_against", lambda call: [])
    monkeypatch.setattr(cpu, "reasons_against", lambda call: ["the tensors are on cuda:0, not on the CPU"])
    monkeypatch.setattr(cuda, "reasons_against", lambda call: ["hidden size needs more blocks than there are"])


@pytest.mark.parametrize(
    "case, picked",
    [
        (Case("lstm", 9, 4, 20, 64), "triton"),
        (Case("lstm", 1, 4, 20, 512), "triton"),
        (Case("lstm", 9, 4, 20, 512), "aten"),
        (Case("lstm", 9, 4, 20, 512, ("zoneout",)), "triton"),
        (Case("gru", 9, 4, 20, 512, packed=True), "aten"),
    ],
    ids=str,
)
def test_auto_on_a_gpu(case: Case, picked: str, on_a_gpu: None) -> None:
    with backends.recorded_choices() as choices:
        assert backends.choose(case.draw()[0]) == picked
    text = str(choices[0])
    if picked == "aten":
        assert "not triton: each step is a launch of its own with 512 units" in text
    else:
        assert "not cpu: the tensors are on cuda:0" in text and "not reference: 'triton' comes first" in text


@pytest.mark.parametrize("steps, hidden, picked", [(9, 64, "triton"), (1, 512, "triton"), (9, 512, "cuda")])
def test_the_persistent_kernels_come_before_single_steps(
    steps: int, hidden: int, picked: str, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "reasons_against", lambda call: [])
    assert backends.choose(Case("lstm", steps, 4, 20, hidden).draw()[0]) == picked
