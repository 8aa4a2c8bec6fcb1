"""The tokenizer beside its peers, in one run: python -m benchmarks.bpe [--text FILE] [--json FILE].

Training to 10,000 tokens, encoding and decoding, against `tokenizers`, `tiktoken` and, where it is installed,
`rustbpe`. Each figure is the best of several rounds, in which all take turns, so that a busy machine slows
all alike. "whole process" starts a Python of its own, imports and reads the file; the others are inner times.
Encoding starts from an empty cache each time, as the first text of a process does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import tiktoken
import tokenizers

from ref_numpy import bpe as ref
from ref_numpy.bpe_format import SPLITS, from_gpt2_files, to_json
from torch_impl import bpe
from torch_impl.training.bpe_corpus import encode_texts
from torch_impl.training.text import Text

VOCAB_SIZE = 10_000
_PEER_PROCESS = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=int(sys.argv[2]), initial_alphabet=alphabet, show_progress=False)
tokenizer.train([sys.argv[1]], trainer)
tokenizer.save(sys.argv[3])
"""


def best_of(rounds: int, **contestants: Callable[[], object]) -> dict[str, float]:
    """Shortest time of each contestant in seconds; they take turns."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in times.items()}


def hugging_face_trainer(path: Path) -> Callable[[], object]:
    def run() -> None:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train(
            [str(path)],
            tokenizers.trainers.BpeTrainer(
                vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
            ),
        )

    return run


def training(path: Path, rounds: int) -> list[dict]:
    def read() -> str:
        return path.read_text(encoding="utf-8")

    contestants = {
        "ours": lambda: bpe.train([read()], VOCAB_SIZE),
        "tokenizers": hugging_face_trainer(path),
    }
    if find_spec("rustbpe"):
        import rustbpe

        contestants["rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator(
            [read()], VOCAB_SIZE, pattern=SPLITS["gpt2"]
        )
    times = best_of(rounds, **contestants)
    times |= best_of(1, reference=lambda: ref.train([read()], VOCAB_SIZE))
    rows = [row("train", times["ours"], name, times[name], "s") for name in times if name != "ours"]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "tokenizer.json")
        size = str(VOCAB_SIZE)
        ours = ["-m", "torch_impl.bpe", "train", str(path), "--vocab-size", size, "--out", out, "--force"]
        peer = ["-c", _PEER_PROCESS, str(path), size, out]
        times = best_of(
            rounds,
            ours=lambda: subprocess.run([sys.executable, *ours], check=True, capture_output=True),
            tokenizers=lambda: subprocess.run([sys.executable, *peer], check=True, capture_output=True),
        )
    return [*rows, row("train, whole process", times["ours"], "tokenizers", times["tokenizers"], "s")]


def coding(text: str, vocabulary, rounds: int, copies: int) -> list[dict]:
    tokenizer = bpe.BPETokenizer(vocabulary)
    face = tokenizers.Tokenizer.from_str(to_json(vocabulary))
    tik = tiktoken.Encoding(
        "same", pat_str=vocabulary.split, mergeable_ranks=vocabulary.ordinary_ids, special_tokens={}
    )
    ids = tokenizer.encode(text)
    assert ids.tolist() == tik.encode_ordinary(text) == face.encode(text, add_special_tokens=False).ids
    paragraphs = text.split("\n\n")
    size = len(text.encode("utf-8"))

    def cold() -> np.ndarray:
        tokenizer.forget()
        return tokenizer.encode(text)

    times = best_of(
        rounds,
        ours=cold,
        warm=lambda: tokenizer.encode(text),
        tokenizers=lambda: face.encode(text),
        batches=lambda: face.encode_batch_fast(paragraphs),
        tiktoken=lambda: tik.encode_to_numpy(text),
    )
    speed = {name: size / taken / 1e6 for name, taken in times.items()}
    rows = [
        row("encode one text", speed["ours"], "tokenizers", speed["tokenizers"], "MB/s"),
        row("encode one text", speed["ours"], "tokenizers, in batches", speed["batches"], "MB/s"),
        row("encode one text", speed["ours"], "tiktoken", speed["tiktoken"], "MB/s"),
        row("encode, words known", speed["warm"], "tiktoken", speed["tiktoken"], "MB/s"),
    ]
    ids_list = ids.tolist()
    times = best_of(
        rounds,
        ours=lambda: tokenizer.decode(ids),
        tokenizers=lambda: face.decode(ids_list),
        tiktoken=lambda: tik.decode(ids_list),
    )
    speed = {name: size / taken / 1e6 for name, taken in times.items()}
    rows += [row("decode", speed["ours"], name, speed[name], "MB/s") for name in ("tokenizers", "tiktoken")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.txt"
        path.write_text(text * copies, encoding="utf-8", newline="")
        cores = os.cpu_count() or 1
        times = best_of(
            2,
            ours=lambda: np.concatenate(list(encode_texts(tokenizer, [Text(path)], workers=cores))),
            tiktoken=lambda: tik.encode_to_numpy(path.read_text(encoding="utf-8")),
            tiktoken_batch=lambda: tik.encode_ordinary_batch([text] * copies, num_threads=cores),
        )
    speed = {name: size * copies / taken / 1e6 for name, taken in times.items()}
    name = f"encode a file of {size * copies / 1e6:.0f} MB on {cores} cores"
    return [
        *rows,
        row(name, speed["ours"], "tiktoken", speed["tiktoken"], "MB/s"),
        row(name, speed["ours"], "tiktoken, in batches", speed["tiktoken_batch"], "MB/s"),
    ]


def row(name: str, ours: float, peer: str, theirs: float, unit: str) -> dict:
    """ratio above 1: ours is ahead."""
    ratio = theirs / ours if unit == "s" else ours / theirs
    return {"name": f"{name}, beside {peer}", "ours": ours, "peer": theirs, "ratio": ratio, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bpe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text; without it, Python's language reference")
    parser.add_argument("--vocab", type=Path, help="GPT-2's vocab.json; without it, the trained vocabulary")
    parser.add_argument("--merges", type=Path, help="GPT-2's merges.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=50, help="of the text in the file for all cores")
    parser.add_argument("--json", type=Path, help="where the rows are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.text or Path(folder) / "topics.txt"
        if options.text is None:
            path.write_text("\n".join(topics.values()), encoding="utf-8", newline="")
        text = path.read_text(encoding="utf-8")
        rows = training(path, options.rounds)
        if options.vocab:
            merges = options.merges.read_text(encoding="utf-8")
            vocabulary = from_gpt2_files(options.vocab.read_bytes(), merges)
        else:
            vocabulary = bpe.train([text], VOCAB_SIZE)
        rows += coding(text, vocabulary, options.rounds, options.copies)
    for each in rows:
        print(
            f"{each['name']:66} {each['ours']:9.3f} {each['peer']:9.3f} {each['unit']:4}"
            f" {each['ratio']:6.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
