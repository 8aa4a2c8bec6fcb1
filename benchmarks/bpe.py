"""The tokenizer beside its peers, in one run: python -m benchmarks.bpe [--text FILE] [--json FILE].

Training to 10,000 tokens, encoding and decoding, against `tokenizers`, `tiktoken` and, where it is installed,
`rustbpe`. Each figure is the best of several rounds, in which all take turns, so that a busy machine slows
all alike. "whole process" starts a Python of its own, imports and reads the file; the others are inner times.
Encoding starts from an empty cache each time, as the first text of a process does.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from benchmarks.command import check_files, command
from benchmarks.rows import row, table, write_rows
from ref_numpy import bpe as ref
from ref_numpy.bpe_format import SPLITS, Vocabulary, to_json
from torch_impl import bpe
from torch_impl.training.bpe_corpus import encode_texts
from torch_impl.training.corpus import python_reference
from torch_impl.training.files import InputError
from torch_impl.training.flags import parse_flags
from torch_impl.training.text import Text
from torch_impl.training.tokenizer import load_gpt2_files

VOCAB_SIZE = 10_000


@dataclass(frozen=True)
class Flags:
    text: str = ""
    """UTF-8 text; without it, the Python language reference."""
    vocab: str = ""
    """GPT-2's vocab.json; without it, the vocabulary that is learned."""
    merges: str = ""
    """GPT-2's merges.txt, with --vocab."""
    rounds: int = 5
    """Of which the best counts."""
    copies: int = 50
    """Of the text in the file for all cores."""
    json: str = ""
    """File that the rows are written to."""


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


def training(path: Path, rounds: int) -> Iterator[dict]:
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
    yield from (beside("train", times["ours"], name, times[name], "s") for name in times if name != "ours")
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
    yield beside("train, whole process", times["ours"], "tokenizers", times["tokenizers"], "s")


def coding(text: str, vocabulary: Vocabulary, rounds: int, copies: int) -> Iterator[dict]:
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
    yield beside("encode one text", speed["ours"], "tokenizers", speed["tokenizers"], "MB/s")
    yield beside("encode one text", speed["ours"], "tokenizers, in batches", speed["batches"], "MB/s")
    yield beside("encode one text", speed["ours"], "tiktoken", speed["tiktoken"], "MB/s")
    yield beside("encode, words known", speed["warm"], "tiktoken", speed["tiktoken"], "MB/s")
    ids_list = ids.tolist()
    times = best_of(
        rounds,
        ours=lambda: tokenizer.decode(ids),
        tokenizers=lambda: face.decode(ids_list),
        tiktoken=lambda: tik.decode(ids_list),
    )
    speed = {name: size / taken / 1e6 for name, taken in times.items()}
    yield from (
        beside("decode", speed["ours"], name, speed[name], "MB/s") for name in ("tokenizers", "tiktoken")
    )
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
    yield beside(name, speed["ours"], "tiktoken", speed["tiktoken"], "MB/s")
    yield beside(name, speed["ours"], "tiktoken, in batches", speed["tiktoken_batch"], "MB/s")


def beside(name: str, ours: float, peer: str, theirs: float, unit: str) -> dict:
    return row(f"{name}, beside {peer}", ours, theirs, unit)


def vocabulary_of(flags: Flags, text: str) -> Vocabulary:
    """That of GPT-2's files, or one learned from the text. Raises InputError where either is too little."""
    learned = bpe.train([text], VOCAB_SIZE)
    if (found := len(learned.tokens)) < VOCAB_SIZE:
        raise InputError(
            f"--text {flags.text} makes no more than {found:,} of {VOCAB_SIZE:,} tokens; take a longer one"
        )
    return load_gpt2_files(Path(flags.vocab), Path(flags.merges)).vocabulary if flags.vocab else learned


@command("benchmarks.bpe", "other rows are not measured")
def main(arguments: list[str]) -> None:
    flags = parse_flags(Flags(), arguments, "python -m benchmarks.bpe", __doc__)
    for name in ("rounds", "copies"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: there must be one at least")
    if bool(flags.vocab) != bool(flags.merges):
        raise InputError("--vocab and --merges are two halves of one vocabulary; name both, or neither")
    check_files(flags.json)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(flags.text or Path(folder) / "topics.txt")
        if not flags.text:
            path.write_text(python_reference(), encoding="utf-8", newline="")
        text = "".join(Text(path).parts())
        vocabulary = vocabulary_of(flags, text)
        rows = []
        try:
            for each in training(path, flags.rounds):
                rows.append(each)
            for each in coding(text, vocabulary, flags.rounds, flags.copies):
                rows.append(each)
        finally:  # what is measured by then is told, whatever came
            print(table(rows))
            write_rows(flags.json, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
