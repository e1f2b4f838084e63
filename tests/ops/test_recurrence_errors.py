"""What bad arguments get, and what a back end that cannot run says."""

import math
import sys
from typing import Any

import pytest
import torch

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, cpu, native
from fastrnn.ops import recurrence, recurrent_layer
from fastrnn.reference import CELLS

T, B, I, H, P = 4, 3, 5, 6, 2


def arguments(cell: str = "lstm", **changed: Any) -> dict[str, Any]:
    """Valid arguments of recurrent_layer but for those named; None leaves an argument out."""
    rows = (CELLS[cell].gates if cell in CELLS else 4) * H
    given: dict[str, Any] = {
        "cell": cell,
        "x": torch.randn(T, B, I),
        "weight_ih": torch.randn(rows, I),
        "weight_hh": torch.randn(rows, H),
        "bias_ih": torch.randn(rows),
        "bias_hh": torch.randn(rows),
        "h0": torch.randn(B, H),
    }
    return {name: value for name, value in (given | changed).items() if value is not None}


ONE = torch.ones
WRONG_SHAPES = [
    ({"x": ONE(T, B)}, r"x must have 3 dimensions, got shape \(4, 3\)"),
    ({"x": ONE(T, B, I, 1)}, r"x must have 3 dimensions, got shape \(4, 3, 5, 1\)"),
    ({"x": ONE(T, B, I + 1)}, r"weight_ih must have shape \(24, 6\), got \(24, 5\)"),
    ({"weight_ih": ONE(23, I)}, r"weight_ih must have shape \(24, 5\), got \(23, 5\)"),
    ({"weight_hh": ONE(23, H)}, r"weight_hh must have shape \(4 \* hidden_size, hidden_size\), got \(23, 6\)"),
    ({"weight_hh": ONE(24)}, r"weight_hh must have shape \(4 \* hidden_size, hidden_size\), got \(24,\)"),
    ({"weight_hh": ONE(24, H + 1)}, r"weight_hh must have shape \(24, 6\), got \(24, 7\)"),
    ({"bias_ih": ONE(23)}, r"bias_ih must have shape \(24,\), got \(23,\)"),
    ({"bias_hh": ONE(24, 1)}, r"bias_hh must have shape \(24,\), got \(24, 1\)"),
    ({"h0": ONE(1, B, H)}, r"h0 must have shape \(3, 6\), got \(1, 3, 6\)"),
    ({"h0": ONE(B + 1, H)}, r"h0 must have shape \(3, 6\), got \(4, 6\)"),
    ({"c0": ONE(B, H + 1)}, r"c0 must have shape \(3, 6\), got \(3, 7\)"),
    ({"weight_hr": ONE(P, H + 1)}, r"weight_hh must have shape \(24, 2\), got \(24, 6\)"),
    ({"weight_hr": ONE(P, H + 1), "weight_hh": ONE(24, P), "h0": ONE(B, P)}, r"weight_hr must have shape \(2, 6\)"),
    ({"weight_hr": ONE(P, H), "weight_hh": ONE(24, P)}, r"h0 must have shape \(3, 2\), got \(3, 6\)"),
    ({"recurrent_mask": ONE(T, B, H)}, r"recurrent_mask must have shape \(3, 6\), got \(4, 3, 6\)"),
    ({"layer_norm_ih": (ONE(24), ONE(23))}, r"layer_norm_ih\[1\] must have shape \(24,\), got \(23,\)"),
    ({"layer_norm_hh": (ONE(H), ONE(24))}, r"layer_norm_hh\[0\] must have shape \(24,\), got \(6,\)"),
    ({"layer_norm_c": (ONE(24), ONE(24))}, r"layer_norm_c\[0\] must have shape \(6,\), got \(24,\)"),
    ({"peephole": ONE(24)}, r"peephole must have shape \(18,\), got \(24,\)"),
    ({"resets": ONE(B, T, dtype=torch.bool)}, r"resets must be bool of shape \(4, 3\), got torch.bool \(3, 4\)"),
    ({"lengths": ONE(B + 1).long()}, r"lengths must be int64 or int32 of shape \(3,\), got torch.int64 \(4,\)"),
]


@pytest.mark.parametrize("changed, message", WRONG_SHAPES, ids=[message[:30] for _, message in WRONG_SHAPES])
def test_wrong_shape(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recurrent_layer(**arguments(**changed))


WRONG_VALUES = [
    ({"cell": "ltsm"}, "cell must be one of 'rnn_tanh', 'rnn_relu', 'lstm', 'gru', got 'ltsm'"),
    ({"lengths": ONE(B)}, r"lengths must be int64 or int32 of shape \(3,\), got torch.float32 \(3,\)"),
    ({"lengths": torch.tensor([1, -1, 2])}, r"lengths must lie in 0..4, got values in -1..2"),
    ({"lengths": torch.tensor([1, 5, 2])}, r"lengths must lie in 0..4, got values in 1..5"),
    ({"resets": ONE(T, B)}, r"resets must be bool of shape \(4, 3\), got torch.float32 \(4, 3\)"),
    ({"resets": ONE(T, B, dtype=torch.bool, device="meta")}, "resets must be on cpu, got meta"),
    ({"zoneout": 1.5}, r"zoneout must be a probability in \[0, 1\], got 1.5"),
    ({"zoneout": -0.1}, r"zoneout must be a probability in \[0, 1\], got -0.1"),
    ({"zoneout": math.nan}, r"zoneout must be a probability in \[0, 1\], got nan"),
    ({"reset_after": False}, "reset_after=False is for the cell 'gru', got cell 'lstm'"),
    ({"h0": ONE(B, H, device="meta")}, "h0 must be on the device of x, cpu, got meta"),
    ({"weight_hh": ONE(24, H).double()}, "weight_hh must have the dtype of x, torch.float32, got torch.float64"),
    ({"backend": "cudnn"}, "backend must be one of 'cpu', 'cuda', 'triton', 'aten', 'reference', 'auto', got 'cudnn'"),
]


@pytest.mark.parametrize("changed, message", WRONG_VALUES, ids=[message[:30] for _, message in WRONG_VALUES])
def test_wrong_value(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recurrent_layer(**arguments(**changed))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
def test_what_only_the_lstm_has(cell: str) -> None:
    with pytest.raises(ValueError, match=f"c0 is for the cell 'lstm', got cell '{cell}'"):
        recurrent_layer(**arguments(cell, c0=ONE(B, H)))
    with pytest.raises(ValueError, match=f"weight_hr is for the cell 'lstm', got cell '{cell}'"):
        recurrent_layer(**arguments(cell, weight_hr=ONE(P, H)))
    with pytest.raises(ValueError, match=f"layer_norm_c is for the cell 'lstm', got cell '{cell}'"):
        recurrent_layer(**arguments(cell, layer_norm_c=(ONE(H), ONE(H))))
    with pytest.raises(ValueError, match=f"peephole is for the cell 'lstm', got cell '{cell}'"):
        recurrent_layer(**arguments(cell, peephole=ONE(3 * H)))


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"weight_hh must be a torch.Tensor, got list"):
        recurrent_layer(**arguments(weight_hh=[1.0]))
    with pytest.raises(TypeError, match=r"layer_norm_ih\[0\] must be a torch.Tensor, got float"):
        recurrent_layer(**arguments(layer_norm_ih=(1.0, 0.0)))
    with pytest.raises(TypeError, match=r"lengths must be a torch.Tensor, got list"):
        recurrent_layer(**arguments(lengths=[4, 2, 1]))
    with pytest.raises(TypeError, match=r"resets must be a torch.Tensor, got bool"):
        recurrent_layer(**arguments(resets=True))
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64"):
        recurrent_layer(**arguments(x=ONE(T, B, I, dtype=torch.int64)))


PACKED = r"batch_sizes must be a non-empty 1-D int64 tensor on the CPU, got shape "
WRONG_BATCH_SIZES = [
    (ONE(2, 2, dtype=torch.int64), PACKED + r"\(2, 2\) torch.int64 on cpu"),
    (ONE(4), PACKED + r"\(4,\) torch.float32 on cpu"),
    (ONE(4, dtype=torch.int64, device="meta"), PACKED + r"\(4,\) torch.int64 on meta"),
    (ONE(0, dtype=torch.int64), PACKED + r"\(0,\) torch.int64 on cpu"),
    (torch.tensor([2, 3, 2]), r"must add up to the rows of x \(7\), got \[2, 3, 2\]"),
    (torch.tensor([4, 3, 0]), r"must add up to the rows of x \(7\), got \[4, 3, 0\]"),
    (torch.tensor([3, 3]), r"must add up to the rows of x \(7\), got \[3, 3\]"),
    (torch.ones(20, dtype=torch.int64), r"must add up to the rows of x \(7\), got \[1, 1, 1, 1, 1, 1, 1, 1, ...\]"),
]


@pytest.mark.parametrize("sizes, message", WRONG_BATCH_SIZES, ids=range(len(WRONG_BATCH_SIZES)))
def test_wrong_batch_sizes(sizes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recurrent_layer(**arguments(x=ONE(7, I), batch_sizes=sizes, h0=None))


def test_packed_data_have_rows_and_no_lengths() -> None:
    sizes = torch.tensor([3, 3, 1])
    with pytest.raises(ValueError, match=r"x must have 2 dimensions, got shape \(4, 3, 5\)"):
        recurrent_layer(**arguments(batch_sizes=sizes))
    with pytest.raises(ValueError, match="lengths cannot be combined with batch_sizes"):
        recurrent_layer(**arguments(x=ONE(7, I), batch_sizes=sizes, lengths=torch.tensor([3, 2, 2])))
    with pytest.raises(ValueError, match=r"h0 must have shape \(3, 6\), got \(2, 6\)"):
        recurrent_layer(**arguments(x=ONE(7, I), batch_sizes=sizes, h0=ONE(2, H)))
    with pytest.raises(ValueError, match=r"resets must be bool of shape \(3, 3\), got torch.bool \(4, 3\)"):
        recurrent_layer(**arguments(x=ONE(7, I), batch_sizes=sizes, resets=ONE(T, B, dtype=torch.bool)))


def test_recurrence_names_gates_x() -> None:
    weight_hh = ONE(24, H)
    with pytest.raises(ValueError, match=r"gates_x must have shape \(4, 3, 24\), got \(4, 3, 23\)"):
        recurrence("lstm", ONE(T, B, 23), weight_hh)
    with pytest.raises(ValueError, match=r"gates_x must have 3 dimensions, got shape \(4, 24\)"):
        recurrence("lstm", ONE(T, 24), weight_hh)
    with pytest.raises(TypeError, match=r"gates_x must have a floating dtype, got torch.int32"):
        recurrence("lstm", ONE(T, B, 24, dtype=torch.int32), weight_hh)


def test_bad_arguments_are_found_on_every_backend_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*_: Any) -> None:
        raise AssertionError("a back end was called")

    monkeypatch.setattr(sys.modules["fastrnn.ops.recurrence"], "run_on", must_not_run)
    for name in backends.NAMES:
        with pytest.raises(ValueError, match="h0 must have shape"):
            recurrent_layer(**arguments(h0=ONE(B, H + 1), backend=name))


@pytest.mark.skipif(native.load() is None, reason="no compiled extension")
class TestReasons:
    def test_all_reasons_are_given(self) -> None:
        given = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in arguments().items()}
        mask = ONE(B, H, dtype=torch.float64).to_sparse()
        with pytest.raises(NotImplementedError) as caught:
            recurrent_layer(**given, recurrent_mask=mask, backend="cpu")
        assert "backend 'cpu' cannot compute this call: " in str(caught.value)
        assert "recurrent_mask has layout torch.sparse_coo, not torch.strided" in str(caught.value)

    def test_every_option_without_a_kernel_is_named(self) -> None:
        call = RecurrenceCall("lstm", ONE(T, B, I), ONE(24, I), ONE(24, H))
        call.lengths, call.resets = torch.full((B,), T), ONE(T, B, dtype=torch.bool)
        call.zoneout, call.recurrent_mask = 0.1, ONE(B, H)
        call.layer_norm_hh = call.layer_norm_ih = (ONE(24), ONE(24))
        call.layer_norm_c, call.return_cell_states = (ONE(H), ONE(H)), True
        call.peephole = ONE(3 * H)
        missing = [option for option in call.options() if option not in cpu.KERNEL_OPTIONS]
        assert cpu.reasons_against(call) == [f"no kernel for {option} yet" for option in missing]

    def test_other_devices(self) -> None:
        with pytest.raises(NotImplementedError, match="the tensors are on meta, not on the CPU"):
            given = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments().items()}
            recurrent_layer(**given, backend="cpu")

    def test_hidden_size_zero(self) -> None:
        call = {"cell": "gru", "x": ONE(T, B, I), "weight_ih": ONE(0, I), "weight_hh": ONE(0, 0)}
        with pytest.raises(NotImplementedError, match="hidden size 0"):
            recurrent_layer(**call, backend="cpu")
        assert recurrent_layer(**call)[0].shape == (T, B, 0)

    def test_input_size_zero(self) -> None:
        given = arguments("gru", x=ONE(T, B, 0), weight_ih=ONE(18, 0))
        with pytest.raises(NotImplementedError, match="input size 0"):
            recurrent_layer(**given, backend="cpu")
        torch.testing.assert_close(recurrent_layer(**given)[0], recurrent_layer(**given, backend="reference")[0])

    def test_transforms(self) -> None:
        given = arguments("gru")
        x = given.pop("x")
        with pytest.raises(NotImplementedError, match=r"a torch.func transform is active"):
            torch.func.vmap(lambda x: recurrent_layer(x=x, **given, backend="cpu")[0])(x[None])
        with (
            pytest.raises(NotImplementedError, match="forward-mode differentiation is active"),
            torch.autograd.forward_ad.dual_level(),
        ):
            recurrent_layer(x=x, **given, backend="cpu")

    def test_a_remembered_choice_is_for_equal_calls_only(self) -> None:
        given = arguments("gru")
        for _ in range(2):
            recurrent_layer(**given, backend="cpu")
        with pytest.raises(ValueError, match="h0 must have shape"):
            recurrent_layer(**given | {"h0": ONE(B, H + 1)}, backend="cpu")
        with pytest.raises(ValueError, match="lengths must lie in"):
            recurrent_layer(**given, lengths=torch.tensor([9, 1, 1]), backend="cpu")
        with pytest.raises(NotImplementedError, match=r"torch.float64"):
            recurrent_layer(**{n: v.double() if n != "cell" else v for n, v in given.items()}, backend="cpu")
        with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
            recurrent_layer(**given, backend="cpu")

    def test_autocast(self) -> None:
        """Kernels that read torch.float32 only must not compute in it where autocast promises torch.bfloat16."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reasons = cpu.reasons_against(RecurrenceCall("gru", ONE(T, B, I), ONE(18, I), ONE(18, H)))
        assert not reasons or any("autocast" in reason for reason in reasons)

    def test_aten(self) -> None:
        with pytest.raises(NotImplementedError, match="torch has no resets; torch has no zoneout"):
            recurrent_layer(**arguments(resets=ONE(T, B, dtype=torch.bool), zoneout=0.1), backend="aten")
        with pytest.raises(NotImplementedError, match="torch's operator takes both biases or none"):
            recurrent_layer(**arguments(bias_ih=None), backend="aten")
        with pytest.raises(NotImplementedError, match="torch's operator takes x and weight_ih, not gates_x"):
            recurrence("lstm", ONE(T, B, 24), ONE(24, H), backend="aten")

    def test_choices_are_recorded_with_reasons(self) -> None:
        with backends.recorded_choices() as choices:
            recurrent_layer(**arguments())
            recurrent_layer(**{n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments().items()})
            recurrent_layer(**arguments(), backend="reference")
        fp32, fp64, explicit = choices
        assert fp32.picked == "cpu" and not fp32.against["cpu"]
        assert "lstm, input 4x3x5 float32, weight_hh 24x6: cpu (backend='auto')" in str(fp32)
        assert "not aten: 'cpu' comes first" in str(fp32)
        if fp64.picked != "cpu":
            assert "torch.float64" in " ".join(fp64.against["cpu"]) and "not cpu: the tensors are" in str(fp64)
        assert explicit.picked == "reference" and explicit.asked == "reference"

    def test_choices_are_recorded_for_the_innermost_block(self) -> None:
        with backends.recorded_choices() as outer:
            with backends.recorded_choices() as inner:
                recurrent_layer(**arguments())
            recurrent_layer(**arguments())
        assert len(inner) == len(outer) == 1


def test_without_the_extension_everything_runs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LIBRARY", None)
    monkeypatch.setattr(native, "_ERROR", "No module named 'fastrnn._C'")
    monkeypatch.setattr(sys.modules["fastrnn.ops.recurrence"], "_decided", {})
    with backends.recorded_choices() as choices:
        recurrent_layer(**arguments(lengths=torch.tensor([4, 0, 2])))
    assert choices[0].picked == "reference"
    with pytest.raises(NotImplementedError, match=r"the compiled extension is not available .No module named"):
        recurrent_layer(**arguments(), backend="cpu")
