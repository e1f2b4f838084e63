"""Part-of-speech tagging as a user runs it, but tiny, on an invented language where a tag may hang on the next word.

Also what it shares with the other tagger: files, batches, fetching.
"""

import hashlib
import http.server
import importlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.examples.conftest import BAD_OPTIONS, Program

TINY = ("--data", "treebank", "--hidden", 16, "--embedding", 8, "--letter-hidden", 8, "--batch", 16, "--dropout", 0)
TINY += ("--lr", 0.02, "--device", "cpu")
FILES = ("en_ewt-ud-train.conllu", "en_ewt-ud-dev.conllu", "en_ewt-ud-test.conllu")


def sentences(count: int, seed: int) -> str:
    """Nouns end in a and verbs in o; the word "to" is an ADP before a noun and a PART before a verb."""
    draw = random.Random(seed)
    text = ""
    for i in range(count):
        rows = []
        while len(rows) < draw.randint(1, 12):
            kind = draw.choice(("NOUN", "VERB"))
            if draw.random() < 0.5:
                rows.append(("to", "ADP" if kind == "NOUN" else "PART"))
            rows.append(("".join(draw.choices("bdgklm", k=3)) + ("a" if kind == "NOUN" else "o"), kind))
        text += f"# sent_id = {i}\n# text = {' '.join(word for word, _ in rows)}\n"
        text += "".join(f"{n}\t{word}\t_\t{tag}" + "\t_" * 6 + "\n" for n, (word, tag) in enumerate(rows, 1)) + "\n"
    return text


@pytest.fixture
def tagging() -> ModuleType:
    return importlib.import_module("_tagging")


@pytest.fixture(autouse=True)
def treebank(folder: Path) -> None:
    (folder / "treebank").mkdir()
    for seed, (name, count) in enumerate(zip(FILES, (200, 40, 40), strict=True)):
        (folder / "treebank" / name).write_text(sentences(count, seed))


def test_the_next_word_takes_two_directions(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    written = program.run("--iterations", 100)
    assert [row["iteration"] for row in written["history"]] == [*range(10, 101, 10)]
    results = written["models"]
    assert list(results) == ["bidirectional", "unidirectional", "most frequent tag"]
    both, one, baseline = (result["accuracy_by_tag"] for result in results.values())
    for tag in ("NOUN", "VERB"):
        assert min(both[tag], one[tag]) > 0.95, tag  # of words that are nearly all new: by their letters
    assert min(both["ADP"], both["PART"]) > 0.95
    # Whoever does not see the next word can be right with one of the two at most.
    assert one["ADP"] + one["PART"] < 1.4
    assert sorted((baseline["ADP"], baseline["PART"])) == [0, 1]
    assert results["bidirectional"]["accuracy_of_unseen_words"] > 0.95
    sample = written["sample"]
    assert sample["found"]["bidirectional"] == sample["true"] != sample["found"]["unidirectional"]
    assert matplotlib.image.imread("out/tags.png").std() > 0.05
    printed = capsys.readouterr().out
    assert Path("out/table.md").read_text() in printed
    assert f"{results['unidirectional']['accuracy']:.4f}" in printed


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--iterations", 20, "--dropout", 0.3, "--layers", 2)
    program.check_resume("_tagging.predict", *options, call=7, iteration=8)
    # Neither a run with other settings nor a model of another program goes on from it.
    for other, message in (
        (("--hidden", 17), "the checkpoint was made with hidden 16, not 17"),
        (("--models", "bidirectional"), "the checkpoint was made with models ['bidirectional', 'unidirectional'], not"),
    ):
        assert message in program.error(*options, "--resume", *other)


def test_back_ends_agree(program: Program) -> None:
    histories = (program.run("--iterations", 20, "--backend", name)["history"] for name in ("cpu", "reference"))
    for a, b in zip(*histories, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["score"] == pytest.approx(b["score"], abs=0.01)  # a tie or two of a few hundred words


def test_lines_of_other_things_than_words_are_left_out(example: ModuleType, tagging: ModuleType) -> None:
    rest = "\t_" * 6
    Path("file").write_text(
        f"# newdoc\n# text = don't # go\n1-2\tdon't\t_\t_{rest}\n1\tdo\t_\tAUX{rest}\n2\tn't\t_\tPART{rest}\n"
        f"2.1\tever\t_\tADV{rest}\n3\t#\t_\tSYM{rest}\n\n\n# text = go\n1\tgo\t_\tVERB{rest}"
    )
    assert tagging.read_conll(Path("file"), 10, 1, 3, example.NO_WORD) == [
        (["do", "n't", "#"], ["AUX", "PART", "SYM"]),
        (["go"], ["VERB"]),
    ]


@pytest.mark.parametrize("model", ["bidirectional", "unidirectional"])
def test_padding_changes_nothing(program: Program, example: ModuleType, tagging: ModuleType, model: str) -> None:
    corpus = tagging.make_corpus("", example.read_treebank(Path("treebank")))
    tagger = tagging.Tagger(corpus, program.parse(), bidirectional=model == "bidirectional").eval()
    sentences = corpus.parts["test"][:20]
    batch = corpus.batch(sentences, torch.device("cpu"))
    assert batch.lengths.tolist() != sorted(batch.lengths, reverse=True)
    alphabet = "".join(corpus.letters)
    together = tagger(batch)
    for i, (words, tags) in enumerate(sentences):
        assert [corpus.tags[tag] for tag in batch.tags[i, : len(words)]] == tags
        assert (batch.tags[i, len(words) :] == tagging.NO_TAG).all()
        spellings = batch.letters[batch.rows[i, : len(words)]]
        assert ["".join(alphabet[x - 1] for x in letters if x) for letters in spellings] == words
        alone = tagger(corpus.batch(sentences[i : i + 1], torch.device("cpu")))
        torch.testing.assert_close(together[i, : len(words)], alone[0], rtol=1e-4, atol=1e-5)


def test_rare_words_are_hidden_in_training(program: Program, example: ModuleType, tagging: ModuleType) -> None:
    corpus = tagging.make_corpus("", example.read_treebank(Path("treebank")))
    tagger = tagging.Tagger(corpus, program.parse(), bidirectional=True)
    batch = corpus.batch(corpus.parts["train"], torch.device("cpu"))
    share = {}
    for word in ("to", next(word for word, count in corpus.counts.items() if count == 1)):
        row = int((batch.words == corpus.words[word]).nonzero())
        seen = []
        hook = tagger.word_embedding.register_forward_pre_hook(lambda _, inputs, s=seen, r=row: s.append(inputs[0][r]))
        for _ in range(100):
            tagger(batch)
        hook.remove()
        share[word] = sum(int(x) == tagging.UNKNOWN for x in seen) / len(seen)
    often, once = share.values()
    assert often < 0.05
    assert once == pytest.approx(tagging.RARE_WORD / (tagging.RARE_WORD + 1), abs=0.2)


def test_long_words_keep_both_ends(tagging: ModuleType) -> None:
    assert tagging.shorten("a" * 40 + "b" * 40) == "a" * 12 + "b" * 12
    assert tagging.shorten("ab" * 12) == "ab" * 12


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The address of a folder with "whole", and with "cut", of which only a part arrives."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/whole", "/cut"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"0123456789" if self.path == "/whole" else b"01234")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}/"
        http_server.shutdown()
        thread.join()


HASH = hashlib.sha256(b"0123456789").hexdigest()


def test_fetched_files_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    data_files = importlib.import_module("_data").data_files
    (path,) = data_files(None, "some data", server, {"whole": HASH})
    assert path.read_bytes() == b"0123456789" and folder / "cache" in path.parents
    assert data_files(None, "some data", "http://127.0.0.1:1/", {"whole": HASH}) == [path]  # nobody answers there
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "digest", "message"),
    [
        ("cut", HASH, "cannot fetch {}cut (ChunkedEncodingError); try again, or give a folder with it by --data"),
        ("missing", HASH, "cannot fetch {}missing (HTTPError); try again, or give a folder with it by --data"),
        ("whole", HASH[::-1], "{}whole is another file than it was; give a folder with any version of it by --data"),
    ],
)
def test_failed_fetch_leaves_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: str,
    file: str,
    digest: str,
    message: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("_data").data_files(None, "data", server, {file: digest})
    printed = capsys.readouterr()
    assert printed.err.endswith(f"error: {message.format(server)}\n")
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not [path for path in (folder / "cache").rglob("*") if path.is_file()]


def test_cache_without_permission(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys/cache")  # not even root may create folders there
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("_data").data_files(None, "data", "http://127.0.0.1:1/", {"file": HASH})
    printed = capsys.readouterr().err
    assert "the cache /sys/cache/fastrnn/data cannot be written: [Errno" in printed and printed.count("\n") == 1


BAD_INPUT = BAD_OPTIONS | {
    "no folder": (("--data", "missing"), "--data missing is not a folder; it must hold en_ewt-ud-train.conllu, en_"),
    "no file": (("--data", "empty"), "empty/en_ewt-ud-train.conllu cannot be read: No such file or directory"),
    "picture": (("--data", "picture"), "picture/en_ewt-ud-train.conllu is not UTF-8 text:"),
    "columns": (("--data", "columns"), "columns/en_ewt-ud-train.conllu, line 2: not a word and its tag in 10 columns"),
    "comments": (("--data", "comments"), "comments/en_ewt-ud-train.conllu contains no sentences"),
    "model": (("--models", "best"), "argument --models: invalid choice: 'best'"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, folder: Path, options: tuple[object, ...], message: str) -> None:
    contents = {"picture": b"\x89PNG", "columns": b"# comment\nthe\tDET\n", "comments": b"# comment\n\n"}
    (folder / "empty").mkdir()
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / FILES[0]).write_bytes(content)
    assert message in program.error(*options)
