"""Letters to phonemes as a user runs it, but tiny, on an invented language: a letter is a phoneme, or two."""

import itertools
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.examples.conftest import BAD_OPTIONS, Program

TINY = ("--data", "dictionary", "--hidden", 32, "--embedding", 16, "--batch", 64, "--dropout", 0, "--lr", 0.01)
PHONEMES = {"a": "AA1", "b": "B", "k": "K", "n": "N", "x": "K S"}


@pytest.fixture(autouse=True)
def dictionary(folder: Path) -> None:
    words = ("".join(letters) for length in (2, 3, 4) for letters in itertools.product(PHONEMES, repeat=length))
    lines = [f"{word} {' '.join(PHONEMES[letter] for letter in word)}" for word in words]
    (folder / "dictionary").write_text("\n".join(lines))


def test_every_attention_learns(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["none", "mean", "positional", "length", "softmax", "additive/reversed"]
    metrics = program.run("--iterations", 150, "--models", *models)
    assert list(metrics["models"]) == models
    assert [row["iteration"] for row in metrics["history"]] == [*range(7, 150, 7), 150]
    for name, result in metrics["models"].items():
        assert list(result["beams"]) == ["1", "5"]
        assert max(rates["phoneme_error_rate"] for rates in result["beams"].values()) < 0.35, name  # untrained: 0.8
        assert ("largest_weight" in result) == (name != "none")
    assert metrics["models"]["softmax"]["largest_weight"] <= 1 + 1e-5 < metrics["models"]["length"]["largest_weight"]
    for picture in ("curves", "alignments"):
        assert matplotlib.image.imread(f"out/{picture}.png").std() > 0.05
    table = Path("out/table.md").read_text()
    assert len(table.splitlines()) == 2 + len(models)
    assert table in capsys.readouterr().out


def test_resume_after_interrupt_is_the_same_run(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--models", "softmax", "--iterations", 20, "--dropout", 0.3, "--layers", 2, "--bidirectional")
    options += ("--decoder-layers", 1, "--beams", 2, "--device", "cpu")
    program.check_resume("g2p.validation_loss", *options, call=7, iteration=7)
    # A run that is done is evaluated again.
    capsys.readouterr()
    program.run(*options, "--resume")
    assert Path("out/table.md").read_text() in capsys.readouterr().out
    assert "the checkpoint was made with seed 0, not 1" in program.error(*options, "--resume", "--seed", 1)


def test_dictionary(example: ModuleType, folder: Path) -> None:
    """Stress, comments and lines of something else are dropped; the parts never change."""
    (folder / "some").write_text(
        ";;; comment\nRECORD  R AH0 K AO1 R D\nrecord(2) R EH1 K ER0 D # noun\nrecord(3) R AH1 K AO0 R D\n"
        "a.m. EY2 EH1 M\nhouse's HH AW1 S IH0 Z\nbridge B R IH1 JH\norange AO1 R AH0 N JH\nthe cat sat\n"
    )
    corpus = example.make_corpus(Path("some"))
    found = {word: (part, known) for part, words in corpus.words.items() for word, known in words.items()}
    record = [("R", "AH", "K", "AO", "R", "D"), ("R", "EH", "K", "ER", "D")]
    assert found == {
        "record": ("train", record),
        "house's": ("train", [("HH", "AW", "S", "IH", "Z")]),
        "bridge": ("test", [("B", "R", "IH", "JH")]),
        "orange": ("validation", [("AO", "R", "AH", "N", "JH")]),
    }
    assert (corpus.longest_source, corpus.longest_target) == (7, 7)
    pairs = corpus.pairs("train")
    assert pairs.source_lengths.tolist() == [6, 6, 7] and pairs.target_lengths.tolist() == [7, 6, 6]
    second = [corpus.phonemes[token] for token in pairs.target[1, :5]]
    assert tuple(second) == record[1] and pairs.target[1, 5:].tolist() == [corpus.eos] * 2


def test_error_rates_take_the_closest_pronunciation(example: ModuleType) -> None:
    references = [[("A", "B", "C", "D"), ("A", "B")], [("A",)], [("B", "C")]]
    rates = example.error_rates([["A", "B", "D"], [], ["B", "C"]], references)
    # One phoneme too much of 2, or one missing of 4: both are one away, and the shorter counts; then 1 of 1; then none.
    assert rates == {"phoneme_error_rate": pytest.approx(2 / 5), "word_error_rate": pytest.approx(2 / 3)}


def test_an_epoch_has_every_pair_once(example: ModuleType) -> None:
    pairs = example.make_corpus(Path("dictionary")).pairs("train")
    loss = example.PairLoss(pairs, 32, 0.0, 0, torch.device("cpu"))
    orders = []
    for epoch in (0, 1, 0):
        loss.start(epoch)
        assert sorted(torch.cat(loss.order).tolist()) == list(range(len(pairs.source)))
        spread = [int(pairs.source_lengths[batch].max() - pairs.source_lengths[batch].min()) for batch in loss.order]
        assert max(spread) <= 1
        orders.append([batch.tolist() for batch in loss.order])
    assert orders[0] == orders[2] != orders[1]


def test_preset_sets_defaults_alone(program: Program) -> None:
    args = program.parse("--preset", "long", "--hidden", 64, "--no-bidirectional")
    assert (args.hidden, args.layers, args.bidirectional, args.models) == (64, 2, False, ["additive"])


BAD_INPUT = BAD_OPTIONS | {
    "missing": (("--data", "missing"), "--data missing cannot be read: No such file or directory"),
    "no dictionary": (("--data", "text"), "--data text has no words of letters for the train part"),
    "one word": (("--data", "one"), "--data one has no words of letters for the validation part"),
    "model": (("--models", "mean", "best"), "argument --models: invalid choice: 'best'"),
    "odd": (("--bidirectional", "--hidden", 33), "--hidden must be even with --bidirectional, got 33"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, folder: Path, options: tuple[object, ...], message: str) -> None:
    (folder / "text").write_text("No dictionary.\n")
    (folder / "one").write_text("record R AH0 K AO1 R D\n")
    assert message in program.error(*options)
