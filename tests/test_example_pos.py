"""Part-of-speech tagging as a user runs it, but tiny, on an invented language where a tag may hang on the next word.

Also what it shares with the other tagger: files, batches, fetching.
"""

import hashlib
import http.server
import importlib
import itertools
import json
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
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


@pytest.fixture(scope="module")
def pos() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("pos")


@pytest.fixture(scope="module")
def tagging(pos: ModuleType) -> ModuleType:
    return importlib.import_module("_tagging")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs run, one thread each: with more, tiny steps wait for other programs on the same cores."""
    (tmp_path / "treebank").mkdir()
    for seed, (name, count) in enumerate(zip(FILES, (200, 40, 40), strict=True)):
        (tmp_path / "treebank" / name).write_text(sentences(count, seed))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(pos: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pos.py", *map(str, (*TINY, *options))])
    return pos.main()


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_next_word_takes_two_directions(
    pos: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pos, monkeypatch, "--iterations", 100, "--output", "both") == 0
    written = metrics(folder / "both")
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
    assert matplotlib.image.imread(folder / "both" / "tags.png").std() > 0.05
    printed = capsys.readouterr().out
    assert (folder / "both" / "table.md").read_text() in printed
    assert f"{results['unidirectional']['accuracy']:.4f}" in printed


def test_resume_after_interrupt_is_the_same_run(
    pos: ModuleType,
    tagging: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--iterations", 20, "--dropout", 0.3, "--layers", 2, "--output")
    assert run(pos, monkeypatch, *options, "whole") == 0

    predict = tagging.predict
    calls = itertools.count()

    def interrupted(*arguments: object) -> list[list[str]]:
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tagging, "predict", interrupted)
        assert run(pos, patch, *options, "parts") == 130
    assert "Stopped at iteration 8; go on with: python pos.py" in capsys.readouterr().out
    assert not (folder / "parts" / "metrics.json").exists()
    assert run(pos, monkeypatch, *options, "parts", "--resume") == 0
    whole, parts = metrics(folder / "whole"), metrics(folder / "parts")
    for name in ("history", "models", "sample", "settings"):
        assert whole[name] == parts[name]

    # Neither a run with other settings nor a model of another program goes on from it.
    for other, message in (
        (("--hidden", 17), "the checkpoint was made with hidden 16, not 17"),
        (("--models", "bidirectional"), "the checkpoint was made with models ['bidirectional', 'unidirectional'], not"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run(pos, monkeypatch, *options, "parts", "--resume", *other)
        assert message in capsys.readouterr().err


def test_back_ends_agree(pos: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("cpu", "reference"):
        assert run(pos, monkeypatch, "--iterations", 20, "--backend", backend, "--output", backend) == 0
    kernels, reference = metrics(folder / "cpu"), metrics(folder / "reference")
    for a, b in zip(kernels["history"], reference["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["score"] == pytest.approx(b["score"], abs=0.01)  # a tie or two of a few hundred words


def test_lines_of_other_things_than_words_are_left_out(pos: ModuleType, tagging: ModuleType) -> None:
    rest = "\t_" * 6
    Path("file").write_text(
        f"# newdoc\n# text = don't # go\n1-2\tdon't\t_\t_{rest}\n1\tdo\t_\tAUX{rest}\n2\tn't\t_\tPART{rest}\n"
        f"2.1\tever\t_\tADV{rest}\n3\t#\t_\tSYM{rest}\n\n\n# text = go\n1\tgo\t_\tVERB{rest}"
    )
    assert tagging.read_conll(Path("file"), 10, 1, 3, pos.NO_WORD) == [
        (["do", "n't", "#"], ["AUX", "PART", "SYM"]),
        (["go"], ["VERB"]),
    ]


@pytest.mark.parametrize("model", ["bidirectional", "unidirectional"])
def test_padding_changes_nothing(
    tagging: ModuleType, pos: ModuleType, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pos.py", *map(str, TINY)])
    corpus = tagging.make_corpus("", pos.read_treebank(Path("treebank")))
    tagger = tagging.Tagger(corpus, pos.parse_arguments(), bidirectional=model == "bidirectional").eval()
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


def test_rare_words_are_hidden_in_training(
    tagging: ModuleType, pos: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pos.py", *map(str, TINY)])
    corpus = tagging.make_corpus("", pos.read_treebank(Path("treebank")))
    tagger = tagging.Tagger(corpus, pos.parse_arguments(), bidirectional=True)
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
    pos: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, server: str, capsys: pytest.CaptureFixture[str]
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
    pos: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    capsys: pytest.CaptureFixture[str],
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


def test_cache_without_permission(
    pos: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/sys/cache")  # not even root may create folders there
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("_data").data_files(None, "data", "http://127.0.0.1:1/", {"file": HASH})
    printed = capsys.readouterr().err
    assert "the cache /sys/cache/fastrnn/data cannot be written: [Errno" in printed and printed.count("\n") == 1


BAD_INPUT = {
    "no folder": (("--data", "missing"), "--data missing is not a folder; it must hold en_ewt-ud-train.conllu, en_"),
    "no file": (("--data", "empty"), "empty/en_ewt-ud-train.conllu cannot be read: No such file or directory"),
    "picture": (("--data", "picture"), "picture/en_ewt-ud-train.conllu is not UTF-8 text:"),
    "columns": (("--data", "columns"), "columns/en_ewt-ud-train.conllu, line 2: not a word and its tag in 10 columns"),
    "comments": (("--data", "comments"), "comments/en_ewt-ud-train.conllu contains no sentences"),
    "model": (("--models", "best"), "argument --models: invalid choice: 'best'"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
    "back end": (("--backend", "fortran"), "--backend fortran: backend must be"),
    "output": (("--output", "/sys/fastrnn"), "--output /sys/fastrnn cannot be written:"),
    "nothing to resume": (("--resume", "--output", "new"), "--resume: there is no checkpoint new/checkpoint.pt"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(
    pos: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    contents = {"picture": b"\x89PNG", "columns": b"# comment\nthe\tDET\n", "comments": b"# comment\n\n"}
    (folder / "empty").mkdir()
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / FILES[0]).write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run(pos, monkeypatch, *arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("pos: error: ") and message in printed.err and printed.err.count("\n") == 1
