"""fastrnn.plot: what the picture of an alignment shows, and that nobody pays for matplotlib who draws nothing."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

import fastrnn.plot

SOURCE, TARGET = ["the", "$x$", "<eos>"], ["le", "chat"]


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_the_target_and_columns_the_source(dtype: torch.dtype) -> None:
    weights = torch.tensor([[1, 0, 0], [0, 0.25, 0.75]], dtype=dtype, requires_grad=True)
    ax = fastrnn.plot.alignment(weights, SOURCE, TARGET)
    (image,) = ax.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), weights.detach().float().numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == SOURCE
    assert [label.get_text() for label in ax.get_yticklabels()] == TARGET
    assert list(ax.get_xticks()) == [0, 1, 2] and list(ax.get_yticks()) == [0, 1]
    assert ax.yaxis_inverted()  # the first target token on top
    assert image.get_clim() == (0, 1)
    assert len(ax.figure.axes) == 2 and image.colorbar is not None
    assert not any(label.get_parse_math() for label in (*ax.get_xticklabels(), *ax.get_yticklabels()))
    ax.figure.canvas.draw()


def test_draws_where_it_is_told_to() -> None:
    given = Figure().subplots(2)[1]
    assert fastrnn.plot.alignment(torch.eye(3), "abc", "xyz", ax=given) is given
    assert len(given.figure.axes) == 3 and not pyplot.get_fignums()


def test_weights_of_a_module() -> None:
    _, weights, _ = fastrnn.nn.DotAttention()(torch.randn(1, 2, 4), torch.randn(1, 3, 4))
    fastrnn.plot.alignment(weights[0], SOURCE, TARGET)


def test_shapes_and_types_are_checked() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 3\), \(target, source\), got \(3, 2\)"):
        fastrnn.plot.alignment(torch.zeros(3, 2), SOURCE, TARGET)
    with pytest.raises(ValueError, match=r"weights must have shape \(2, 3\), .* got \(1, 2, 3\)"):
        fastrnn.plot.alignment(torch.zeros(1, 2, 3), SOURCE, TARGET)
    with pytest.raises(TypeError, match=r"weights must be a torch.Tensor, got list"):
        fastrnn.plot.alignment([[0.0]], ["a"], ["b"])  # type: ignore[arg-type]
    assert not pyplot.get_fignums()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: Any = sys.modules
    monkeypatch.setitem(modules, "matplotlib", None)
    monkeypatch.delattr(matplotlib, "pyplot")
    monkeypatch.delitem(modules, "matplotlib.pyplot")
    with pytest.raises(ImportError, match=r"pip install fastrnn\[plot\]"):
        fastrnn.plot.alignment(torch.eye(2), "ab", "ab")


def test_importing_does_not_import_matplotlib() -> None:
    code = "import sys, fastrnn, fastrnn.plot; sys.exit(any(name.startswith('matplotlib') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
