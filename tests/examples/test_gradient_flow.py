"""Gradient flow as a user runs it, but tiny: the norms are those of the Jacobians' products, the cures are seen."""

import math
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.accuracy import assert_as_accurate
from tests.examples.conftest import BAD_OPTIONS, Program, loss_curve

TINY = ("--hidden", 16, "--steps", 12, "--delay", 3, "--truncate", 2, 6, "--batch", 16, "--iterations", 150)
TINY += ("--lr", 0.01, "--device", "cpu")


@pytest.mark.parametrize("name", ["small", "orthogonal", "large"])
def test_norms_are_of_the_product_of_jacobians(example: ModuleType, name: str) -> None:
    """Of a tanh RNN: dh_t/dh_{t-1} = diag(1 - h_t^2) W_hh."""
    cell = example.CELLS["RNN"](5, 5)
    example.initialise(cell, example.INITIALISATIONS[name])
    x = torch.randn(9, 3, 5)
    found = example.jacobian_norms(cell, x)
    assert found.shape == (9, 3)
    exact = cell.double()
    for sequence in range(3):
        h = torch.zeros(5, dtype=torch.float64)
        jacobians = []
        for x_t in x[:, sequence].double():
            h = exact(x_t, h).detach()
            jacobians.append((1 - h**2)[:, None] * exact.weight_hh.detach())
        product = torch.eye(5, dtype=torch.float64)
        expected = [torch.linalg.matrix_norm(product, 2)]
        for jacobian in reversed(jacobians[1:]):
            product = product @ jacobian
            expected.append(torch.linalg.matrix_norm(product, 2))
        torch.testing.assert_close(found[:, sequence].double(), torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_norms_of_gated_cells(example: ModuleType, name: str) -> None:
    """Against torch's own Jacobian of running on from h_s, with the LSTM's c_s held fixed."""
    cell = example.CELLS[name](4, 4)
    x = torch.randn(6, 1, 4)
    found = example.jacobian_norms(cell, x)[:, 0]
    exact = getattr(torch.nn, f"{name}Cell")(4, 4).double()
    exact.load_state_dict(cell.state_dict())

    def run_on(h: torch.Tensor, c: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for x_t in steps:
            h, c = exact(x_t, (h, c)) if name == "LSTM" else (exact(x_t, h), c)
        return h, c

    x = x[:, 0].double()
    zeros = torch.zeros(4, dtype=torch.float64)
    for s in range(1, 7):
        h, c = (state.detach() for state in run_on(zeros, zeros, x[:s]))
        jacobian = torch.autograd.functional.jacobian(lambda h, c=c, s=s: run_on(h, c, x[s:])[0], h)
        expected = torch.linalg.matrix_norm(jacobian, 2)
        torch.testing.assert_close(found[6 - s].double(), expected, rtol=1e-4, atol=0)


def test_what_it_shows(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    written = program.run("--steps", 30, "--hidden", 32)
    for name, curves in written["flow"].items():
        assert all(len(curve["norms"]) == 31 and curve["norms"][0] == pytest.approx(1) for curve in curves.values())
        per_step = [curve["per_step"] for curve in curves.values()]
        assert per_step == sorted(per_step), name  # larger weights and a larger forget bias keep more
    assert written["flow"]["RNN"]["small"]["norms"][-1] < 1e-6
    assert 0.95 < written["flow"]["RNN"]["orthogonal"]["per_step"] <= 1
    assert written["flow"]["RNN"]["large"]["per_step"] > 1
    assert written["flow"]["LSTM's forget bias"]["5"]["per_step"] > 0.95
    training = written["training"]
    assert list(training) == ["not clipped", "clipped", "cut every 2", "cut every 6"]
    assert all(len(result["losses"]) == len(result["norms"]) == 15 for result in training.values())
    # Three steps ago is further than the cuts every 2 steps are apart, and half of the time nearer than every 6.
    assert training["cut every 2"]["final_loss"] > 0.6 * math.log(2)
    assert training["cut every 6"]["final_loss"] < 0.3 * math.log(2)
    assert matplotlib.image.imread("out/gradient_flow.png").std() > 0.05
    assert f"| RNN, large | {written['flow']['RNN']['large']['norms'][1]:.1e} |" in capsys.readouterr().out


def test_the_gradient_ends_at_the_cuts(program: Program, example: ModuleType) -> None:
    """And the scores know nothing of cuts."""
    args = program.parse()
    gradients, losses, states = [], [], []
    for truncate in (2, 6):
        torch.manual_seed(0)
        model = example.Repeater(args.hidden, "auto")
        compute_loss = example.RepetitionLoss(truncate, args, torch.device("cpu"))
        start = torch.zeros(1, args.batch, args.hidden, requires_grad=True)
        loss, state = compute_loss(model, 1, start)
        assert not state.requires_grad
        losses.append(loss.item())
        states.append(state)
        gradients.append(torch.autograd.grad(loss, start)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(states[0], states[1])
    assert gradients[0].norm() > 0 and not torch.allclose(gradients[0], gradients[1], rtol=0.1)
    # What is asked for is the sign of three steps ago, also across the border of two stretches.
    signs = torch.cat([compute_loss.signs(0), compute_loss.signs(1)], 1)

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 50 * signs[:, 3:9], state

    assert compute_loss(Oracle(), 1, torch.zeros(1))[0] < 1e-6


def test_clipping_bounds_the_step(program: Program, example: ModuleType) -> None:
    args = program.parse("--clip", 0.01, "--descent-lr", 0.5)
    runs = example.make_runs(args, torch.device("cpu"))
    moved = {}
    for name in ("not clipped", "clipped"):
        before = torch.nn.utils.parameters_to_vector(runs[name].model.parameters()).detach().clone()
        runs[name].step()
        moved[name] = (torch.nn.utils.parameters_to_vector(runs[name].model.parameters()) - before).norm().item()
    norms = {name: runs[name].norms[0] for name in moved}
    assert norms["clipped"] == norms["not clipped"] > 0.02
    assert moved["clipped"] == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved["not clipped"] == pytest.approx(0.5 * norms["not clipped"], rel=1e-3)


def test_divergence_is_a_result(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON without NaN, and a picture."""
    lost = program.run("--iterations", 20, "--descent-lr", 3e38)["training"]["not clipped"]
    assert lost["losses"][-1] is None and lost["final_loss"] is None
    assert "| not clipped | diverged |" in capsys.readouterr().out
    assert Path("out/gradient_flow.png").is_file()


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--iterations", 20)
    program.check_resume("_trainer.Trainer.step", *options, call=31, iteration=7)
    assert "the checkpoint was made with delay 3, not 2" in program.error(*options, "--resume", "--delay", 2)


def test_kernels_agree_with_the_reference(program: Program, example: ModuleType) -> None:
    """Both loss curves are as close to the one in fp64, with the state carried from step to step."""
    args = program.parse()
    curves = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        model = example.Repeater(args.hidden, backend).to(dtype)
        compute_loss = example.RepetitionLoss(2, args, torch.device("cpu"))
        compute_loss.signs = lambda iteration, signs=compute_loss.signs, dtype=dtype: signs(iteration).to(dtype)
        curves.append(torch.tensor(loss_curve(model, compute_loss, 10, 0.01), dtype=dtype))
    assert_as_accurate(*curves)


BAD_INPUT = BAD_OPTIONS | {
    "cuts": (("--truncate", 4, 6), "--truncate: all must divide the last, 6, got 4 6"),
    "delay": (("--delay", 6), "--delay must be below the last of --truncate, 6, got 6"),
    "clip": (("--clip", 0), "--clip must be above 0: without clipping is what it is compared with"),
    "steps": (("--steps", "x"), "argument --steps: must be a positive integer, got 'x'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, options: tuple[object, ...], message: str) -> None:
    assert message in program.error(*options)
