"""Translation as a user runs it, but tiny, between invented languages: a syllable of the one is a word of the other."""

import itertools
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest

from tests.examples.conftest import BAD_OPTIONS, Program

TINY = ("--data", "pairs.tsv", "--hidden", 32, "--embedding", 16, "--batch", 32, "--dropout", 0, "--lr", 0.01)
TINY += ("--vocabulary", 24, "--device", "cpu")
WORDS = {"ba": "u", "dé": "vu", "ki": "w", "lo": "xa"}
SENTENCES = ["".join(syllables) for length in (2, 3, 4) for syllables in itertools.product(WORDS, repeat=length)]


def translation(sentence: str) -> str:
    return " ".join(WORDS[sentence[i : i + 2]] for i in range(0, len(sentence), 2))


@pytest.fixture(autouse=True)
def pairs(folder: Path) -> None:
    lines = [f"{sentence}\t{translation(sentence)}\n" for sentence in SENTENCES]
    (folder / "pairs.tsv").write_text("".join(lines), encoding="utf-8")


def test_both_kinds_of_tokens_learn(program: Program, example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = program.run("--iterations", 120)
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

    assert matplotlib.image.imread("out/alignments.png").std() > 0.05
    printed = capsys.readouterr().out
    assert Path("out/table.md").read_text() in printed
    sample = metrics["samples"][0]
    assert f"{'characters':12}{sample['found']['characters']}" in printed


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--tokens", "characters", "--iterations", 20, "--dropout", 0.3, "--beams", 2)
    program.check_resume("translate.validation_loss", *options, call=7, iteration=7)
    for change, message in (
        (("--tokens", "bpe"), "the checkpoint was made with tokens ['characters'], not ['bpe']"),
        (("--sentences", 300), "the checkpoint was made with sentences 10000, not 300"),
    ):
        assert message in program.error(*options, "--resume", *change)


def test_reference_agrees(program: Program) -> None:
    options = ("--iterations", 10, "--beams", 3, "--backend")
    kernels, reference = (program.run(*options, backend)["history"] for backend in ("auto", "reference"))
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


BAD_INPUT = BAD_OPTIONS | {
    "missing": (("--data", "missing"), "--data missing cannot be read: No such file or directory"),
    "one column": (("--data", "text"), "--data text has no sentence, tab and translation in line 2"),
    "binary": (("--data", "binary"), "--data binary is not UTF-8 text:"),
    "empty": (("--data", "empty"), "--data empty: none of 0 sentences falls into the train part"),
    "few": (("--sentences", 3), "--data pairs.tsv: none of 3 sentences falls into the"),
    "tokens": (("--tokens", "words"), "argument --tokens: invalid choice: 'words'"),
    "language": (("--languages", "de", "xx"), "argument --languages: invalid choice: 'xx'"),
    "odd": (("--hidden", 33), "--hidden must be even, for the encoder has two directions, got 33"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, folder: Path, options: tuple[object, ...], message: str) -> None:
    (folder / "text").write_text("Go.\tVa !\nNo translation.\n")
    (folder / "binary").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "empty").touch()
    assert message in program.error(*options)


def test_a_language_that_cannot_write_all_numbers(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.number_words(["de", "am"], 300, 0)
    assert "--languages: num2words cannot write these numbers in am (TypeError" in capsys.readouterr().err
