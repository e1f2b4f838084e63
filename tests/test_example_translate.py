"""Translation as a user runs it, but tiny, between invented languages: a syllable of the one is a word of the other."""

import importlib
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--data", "pairs.tsv", "--hidden", 32, "--embedding", 16, "--batch", 32, "--dropout", 0, "--lr", 0.01)
TINY += ("--vocabulary", 24, "--device", "cpu")
WORDS = {"ba": "u", "dé": "vu", "ki": "w", "lo": "xa"}
SENTENCES = ["".join(syllables) for length in (2, 3, 4) for syllables in itertools.product(WORDS, repeat=length)]


def translation(sentence: str) -> str:
    return " ".join(WORDS[sentence[i : i + 2]] for i in range(0, len(sentence), 2))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("translate")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs run, one thread each: with more, tiny steps wait for other programs on the same cores."""
    lines = [f"{sentence}\t{translation(sentence)}\n" for sentence in SENTENCES]
    (tmp_path / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["translate.py", *map(str, (*TINY, *options))])
    return example.main()


def metrics_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))


def test_both_kinds_of_tokens_learn(
    example: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(example, monkeypatch, "--iterations", 120, "--output", "both") == 0
    metrics = metrics_of(folder, "both")
    assert [row["iteration"] for row in metrics["history"]] == list(range(6, 121, 6))
    assert list(metrics["models"]) == ["bpe", "characters"]
    for name, result in metrics["models"].items():
        assert list(result["beams"]) == ["1", "5"]
        assert min(scores["sentence_accuracy"] for scores in result["beams"].values()) > 0.7, name

    tests = [sentence for sentence in SENTENCES if example.part_of(sentence.encode(), 0.10, 0.04) == "test"]
    assert metrics["test_sentences"] == len(tests)
    characters, subwords = metrics["models"]["characters"], metrics["models"]["bpe"]
    assert characters["source_tokens_per_sentence"] == pytest.approx(sum(map(len, tests)) / len(tests))
    written = [len(translation(sentence)) for sentence in tests]
    assert characters["target_tokens_per_sentence"] == pytest.approx(sum(written) / len(tests))
    for side in ("source", "target"):
        assert subwords[f"{side}_tokens_per_sentence"] < 0.8 * characters[f"{side}_tokens_per_sentence"]

    assert matplotlib.image.imread(folder / "both" / "alignments.png").std() > 0.05
    printed = capsys.readouterr().out
    assert (folder / "both" / "table.md").read_text() in printed
    sample = metrics["samples"][0]
    assert f"{'characters':12}{sample['found']['characters']}" in printed


def test_resume_after_interrupt_is_the_same_run(
    example: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokens", "characters", "--iterations", 20, "--dropout", 0.3, "--beams", 2, "--output")
    assert run(example, monkeypatch, *options, "whole") == 0

    validation_loss = example.validation_loss
    calls = itertools.count()

    def interrupted(*arguments: object) -> float:
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return validation_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(example, "validation_loss", interrupted)
        assert run(example, patch, *options, "parts") == 130
    assert "Stopped at iteration 7; go on with: python translate.py" in capsys.readouterr().out
    assert not (folder / "parts" / "metrics.json").exists()
    assert run(example, monkeypatch, *options, "parts", "--resume") == 0
    whole, parts = (metrics_of(folder, name) for name in ("whole", "parts"))
    assert whole["history"] == parts["history"]
    for metrics in (whole, parts):
        metrics["models"]["characters"].pop("seconds_per_iteration")
        metrics["models"]["characters"]["beams"]["2"].pop("seconds")
    assert whole["models"] == parts["models"]

    for change, message in (
        (("--tokens", "bpe"), "the checkpoint was made with tokens ['characters'], not ['bpe']"),
        (("--sentences", 300), "the checkpoint was made with sentences 10000, not 300"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(example, monkeypatch, *options, "parts", "--resume", *change)
        assert message in capsys.readouterr().err


def test_reference_agrees(example: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("auto", "reference"):
        options = ("--iterations", 10, "--beams", 3, "--backend", backend, "--output", backend)
        assert run(example, monkeypatch, *options) == 0
    kernels, reference = (metrics_of(folder, backend)["history"] for backend in ("auto", "reference"))
    assert len(kernels) == 10
    for ours, theirs in zip(kernels, reference, strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)


def test_number_words(example: ModuleType) -> None:
    """Every number once, both words of the same one; another seed draws others."""
    pairs = example.number_words(["de", "fr"], 200, 3)
    assert len({sentence for sentence, _ in pairs}) == 200
    assert pairs == example.number_words(["de", "fr"], 200, 3) != example.number_words(["de", "fr"], 200, 4)
    english = dict(zip(example.number_words(["de", "en"], 200, 3), pairs, strict=True))
    assert all(first[0] == second[0] for first, second in english.items())


def test_file_of_pairs(example: ModuleType, folder: Path) -> None:
    """Columns behind the second are left out, spaces are made one, all translations of a sentence are known."""
    (folder / "some.tsv").write_bytes(
        "\ufeffGo.\tVa !\tCC-BY\r\n\nHi  there.\tSalut.\nGo.\tBouge !\nGo.\tVa !\nLast.\tFin.\n".encode()
    )
    pairs = example.read_pairs(Path("some.tsv"), 4)
    assert pairs == [("Go.", "Va !"), ("Hi there.", "Salut."), ("Go.", "Bouge !"), ("Go.", "Va !")]
    scores = example.scores(["Bouge !", "Salu"], [["Va !", "Bouge !"], ["Salut."]])
    assert scores == {"sentence_accuracy": 0.5, "character_error_rate": pytest.approx(2 / (7 + 6))}


def test_tokens(example: ModuleType) -> None:
    pairs = [(sentence, translation(sentence)) for sentence in SENTENCES]
    subwords, characters = (example.Tokens(name, pairs, 24) for name in ("bpe", "characters"))
    assert characters.sizes == (3 + 8, 3 + 6)  # with the space
    assert subwords.sizes[0] == 24
    assert characters.target.encode("vu xa u").tokens == list("vu▁xa▁u")
    for tokens in (subwords, characters):
        found = tokens.encode_pairs(pairs)
        for (_, target), ids, length in zip(pairs, found.target.tolist(), found.target_lengths.tolist(), strict=True):
            assert ids[length - 1 :] == [example.END] * (found.target.shape[1] - length + 1)
            assert tokens.target.decode(ids[:length]) == target
    # The accent as a character of its own is the same letter; what nobody has seen is unknown.
    assert characters.source.encode("de\u0301").ids == characters.source.encode("d\u00e9").ids
    assert characters.source.encode("z").ids == [example.UNKNOWN]


BAD_INPUT = {
    "missing": (("--data", "missing"), "--data missing cannot be read: No such file or directory"),
    "one column": (("--data", "text"), "--data text has no sentence, tab and translation in line 2"),
    "binary": (("--data", "binary"), "--data binary is not UTF-8 text:"),
    "empty": (("--data", "empty"), "--data empty: none of 0 sentences falls into the train part"),
    "few": (("--sentences", 3), "--data pairs.tsv: none of 3 sentences falls into the"),
    "tokens": (("--tokens", "words"), "argument --tokens: invalid choice: 'words'"),
    "language": (("--languages", "de", "xx"), "argument --languages: invalid choice: 'xx'"),
    "odd": (("--hidden", 33), "--hidden must be even, for the encoder has two directions, got 33"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
    "no permission": (("--output", "/sys/fastrnn"), "--output /sys/fastrnn cannot be written:"),
    "back end": (("--backend", "fortran"), "--backend fortran: backend must be"),
    "nothing to resume": (("--resume", "--output", "new"), "--resume: there is no checkpoint new/checkpoint.pt"),
    "damaged": (("--resume", "--output", "damaged"), "is not a checkpoint of this program"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(
    example: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    (folder / "text").write_text("Go.\tVa !\nNo translation.\n")
    (folder / "binary").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "empty").touch()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="2"):
        run(example, monkeypatch, *arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("translate: error: ") and message in printed.err and printed.err.count("\n") == 1


def test_a_language_that_cannot_write_all_numbers(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.number_words(["de", "am"], 300, 0)
    assert "--languages: num2words cannot write these numbers in am (TypeError" in capsys.readouterr().err
