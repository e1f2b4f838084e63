"""The sequence tagger of flair on its own contextual embeddings, which come from a character language model's LSTM."""

import copy
import random
from pathlib import Path

import pytest
import torch
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import FlairEmbeddings
from flair.models import LanguageModel, SequenceTagger
from flair.trainers import ModelTrainer
from torch import Tensor, nn

import fastrnn
from tests.drop_in.comparison import compare

TAGS = {"the": "D", "a": "D", "dog": "N", "cat": "N", "moon": "N", "sees": "V", "barks": "V", "small": "A", "old": "A"}


def sentences(seed: int, count: int = 16) -> list[Sentence]:
    draw, made = random.Random(seed), []
    for _ in range(count):
        made.append(Sentence(draw.choices(list(TAGS), k=draw.randint(3, 20))))
        for token in made[-1]:
            token.add_label("pos", TAGS[token.text])
    return made


def corpus() -> Corpus:
    train, dev, test = (FlairDatapointDataset(sentences(seed, 8)) for seed in range(3))
    return Corpus(train=train, dev=dev, test=test)


def made(rnn: str) -> SequenceTagger:
    letters = Dictionary()
    for letter in "abcdefghijklmnopqrstuvwxyz \n":
        letters.add_item(letter)
    embeddings = FlairEmbeddings(LanguageModel(letters, is_forward_lm=True, hidden_size=64, nlayers=1), fine_tune=True)
    return SequenceTagger(
        embeddings,
        corpus().make_label_dictionary("pos", add_unk=False),
        "pos",
        rnn_type=rnn,
        hidden_size=128,
        rnn_layers=1,
        word_dropout=0.0,
        locked_dropout=0.0,
    )


def crf_loss(tagger: SequenceTagger, batch: list[Sentence]) -> tuple[None, Tensor]:
    for sentence in batch:
        sentence.clear_embeddings()
    return None, tagger.forward_loss(batch)[0]


@pytest.mark.parametrize("rnn", ["LSTM", "GRU"])
def test_outputs_and_gradients(rnn: str) -> None:
    model = made(rnn)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    batches = [sentences(seed) for seed in range(3)]
    compare(f"flair SequenceTagger, {rnn}", model, ours, crf_loss, batches)
    inputs = model._prepare_tensors(sorted(batches[0], key=len, reverse=True))
    torch.testing.assert_close(ours(*inputs), model(*inputs))
    text = fastrnn.explain(ours, *inputs)
    assert f"rnn ({rnn}), layer 0 reverse" in text and "cpu (backend='auto')" in text


def test_training_saving_and_tagging(tmp_path: Path) -> None:
    model = made("LSTM")
    ours = fastrnn.accelerate(copy.deepcopy(model))
    for name, tagger in (("torch", model), ("ours", ours)):
        torch.manual_seed(0)
        random.seed(0)
        ModelTrainer(tagger, corpus()).train(tmp_path / name, max_epochs=2, mini_batch_size=4, learning_rate=0.1)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), msg=name)
    ours.save(tmp_path / "ours.pt")
    loaded = SequenceTagger.load(tmp_path / "ours.pt")
    assert type(loaded.rnn) is nn.LSTM
    tagged = [sentences(5) for _ in range(2)]
    for tagger, batch in zip((ours, loaded), tagged):
        tagger.predict(batch, label_name="found")
    assert [[t.get_label("found").value for t in s] for s in tagged[0]] == [
        [t.get_label("found").value for t in s] for s in tagged[1]
    ]
