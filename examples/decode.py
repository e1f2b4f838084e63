"""Translate a file of sentences, a line each, with a model of translate.py, in as many processes as torchrun starts.

    python examples/translate.py
    torchrun --nproc-per-node 2 examples/decode.py --model runs/translate/bpe --input sentences.txt --output out.txt

The processes take turns at chunks of lines. Each chunk's translations are a file of their own in ``out.txt.parts``
until all are there; then ``out.txt``, in the order of the input, takes their place. The same command again, with any
number of processes, goes on where an interrupted one stopped. What is written depends on neither.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import _processes as processes
import torch
from _seq2seq import pad
from _trainer import Parser, choose_device, fail, positive_int, run_main, write_json
from tokenizers import Tokenizer
from tqdm import tqdm

from fastrnn import nn

MODEL_FILES = ("model.pt", "source.json", "target.json")


def load_model(folder: Path, device: torch.device) -> tuple[nn.Seq2Seq, Tokenizer, Tokenizer]:
    """Model and tokenizers of both languages; fails with one line if these are not what translate.py has written."""
    try:
        model = nn.Seq2Seq.load(folder / MODEL_FILES[0], map_location=device)
        source, target = (Tokenizer.from_file(str(folder / name)) for name in MODEL_FILES[1:])
    except OSError as error:
        fail(f"--model {folder}: {error.filename} cannot be read: {error.strerror}")
    except Exception as error:  # the type that tokenizers raise
        fail(f"--model {folder} is not a model of translate.py: {str(error).splitlines()[0]}")
    return model.eval(), source, target


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"--input {path} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--input {path} is not UTF-8 text: {error}")


def prepare_parts(folder: Path, job: dict[str, object]) -> None:
    """Create the folder of parts, or prove that the one there is of the same job."""
    note = folder / "job.json"
    try:
        if processes.rank() == 0 and not note.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(note, job)
        processes.wait()
        same = json.loads(note.read_text()) == job
    except (OSError, ValueError) as error:
        fail(f"{folder} cannot be used: {error}")
    if not same:
        fail(f"{folder} is of another input, model or options: remove it, or give another --output")


@torch.no_grad()
def translate(
    model: nn.Seq2Seq, source: Tokenizer, target: Tokenizer, lines: list[str], beam: int, longest: int, batch: int
) -> list[str]:
    """A translation of each line, in the same order; an empty one of a line without words."""
    tokens = [encoding.ids for encoding in source.encode_batch([line.strip() for line in lines])]
    by_length = sorted((i for i, ids in enumerate(tokens) if ids), key=lambda i: len(tokens[i]))
    device = next(model.parameters()).device
    found = [""] * len(lines)
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        padded, lengths = (tensor.to(device) for tensor in pad([tokens[i] for i in chosen], 0))
        best = model.generate(padded, lengths, beam_size=beam, max_length=longest)
        written = [row[:length] for row, length in zip(best.tokens[:, 0].tolist(), best.lengths[:, 0].tolist())]
        for i, text in zip(chosen, target.decode_batch(written), strict=True):
            found[i] = text
    return found


def main() -> int:
    parser = Parser(description="Translate a file of sentences, in several processes if wanted; can be interrupted.")
    parser.add_argument("--model", type=Path, required=True, help="folder that translate.py has written, one per model")
    parser.add_argument("--input", type=Path, required=True, help="text file, a sentence a line")
    parser.add_argument("--output", type=Path, required=True, help="text file of the translations")
    parser.add_argument("--beam", type=positive_int, default=5, help="size of the beam search (%(default)s)")
    parser.add_argument("--longest", type=positive_int, default=100, help="tokens of a translation (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=64, help="sentences at a time (%(default)s)")
    parser.add_argument("--chunk", type=positive_int, default=1024, help="lines per part of the output (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    args = parser.parse_args()
    device = choose_device(args.device)
    model, source, target = load_model(args.model, device)
    lines = read_lines(args.input)
    digest = hashlib.sha256("\n".join(lines).encode())
    for name in MODEL_FILES:
        digest.update((args.model / name).read_bytes())
    folder = args.output.with_name(args.output.name + ".parts")
    prepare_parts(folder, {"digest": digest.hexdigest()} | {n: getattr(args, n) for n in ("beam", "longest", "chunk")})

    parts = [folder / f"{i:06}.txt" for i in range(-(-len(lines) // args.chunk))]
    mine = [i for i in range(processes.rank(), len(parts), processes.count()) if not parts[i].exists()]
    for i in tqdm(mine, unit="chunk", disable=processes.rank() > 0 or None, leave=False):
        chunk = lines[i * args.chunk : (i + 1) * args.chunk]
        found = translate(model, source, target, chunk, args.beam, args.longest, args.batch)
        temporary = parts[i].with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
        os.replace(temporary, parts[i])
    processes.wait()
    if processes.rank() == 0:
        whole = folder / "whole.tmp"
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(part.read_text(encoding="utf-8") for part in parts)
        os.replace(whole, args.output)
        shutil.rmtree(folder)
        print(f"Wrote {len(lines):,} translations to {args.output}.")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    run_main(main)
