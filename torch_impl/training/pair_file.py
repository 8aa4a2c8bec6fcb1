"""Pairs as text: a source, a TAB and its target on each line; from a user's files, or the dates.

Not here: quoting or escapes (a TAB or a line end inside a text), files larger than memory.
"""

import torch
from torch import Tensor

from ref_numpy.dates import date_pairs
from torch_impl.training.bpe_corpus import byte_bar
from torch_impl.training.config import RunConfig
from torch_impl.training.corpus import Corpus
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, file_text
from torch_impl.training.tokenizer import Tokenizer

Side = tuple[list[Tensor], list[Tensor]]  # ids of sources, and of their targets


def load_pairs(train_file: str, valid_file: str) -> Corpus:
    """The lines of both files, checked. Without a training file, the dates; without a held-out file, the last
    tenth of the lines, rounded up.

    Raises InputError, with its number, for a line that is no pair, and for a file that is missing, empty, not
    UTF-8, or too short to hold anything out.
    """
    if not train_file:
        training, held_out = date_pairs()
    else:
        lines = _lines(train_file)
        cut = len(lines) if valid_file else len(lines) * 9 // 10
        training, held_out = lines[:cut], lines[cut:]
    if valid_file:
        held_out = _lines(valid_file)
    if not training:
        raise InputError(
            f"{train_file} has one pair, but the last is held out; add some, or name a --valid-file"
        )
    train, valid = (Text("\n".join(lines).encode("utf-8")) for lines in (training, held_out))
    return Corpus(train, valid, train.sha256(), valid.sha256())


def _lines(file: str) -> list[str]:
    """The lines of a file, each of them a pair."""
    whole, _ = file_text(file).split(10)  # looks through it: is it text at all?
    *lines, last = b"".join(whole.blocks()).decode("utf-8").split("\n")
    lines = [line.removesuffix("\r") for line in [*lines, *([last] if last else [])]]
    for number, line in enumerate(lines, 1):
        tabs = line.count("\t")
        if not tabs:
            raise InputError(
                f"{file}, line {number} has no TAB; an encoder-decoder learns from lines of source TAB "
                "target, and --architecture decoder from plain text"
            )
        if tabs > 1:
            raise InputError(
                f"{file}, line {number} has {tabs} TABs, but a pair has one, between source and target"
            )
    return lines


def encode_pairs(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> tuple[Side, Side]:
    """Ids of the sources and targets to train on, and of the held-out ones.

    Raises InputError, with its number, for a line whose source is empty, or with more tokens than the context
    holds.
    """
    files = config.run.train_file, config.run.valid_file or config.run.train_file
    sides, line = [], 0
    for text, file, own in (
        (corpus.train, files[0], True),
        (corpus.valid, files[1], bool(config.run.valid_file)),
    ):
        line = 0 if own else line
        sources, targets = [], []
        with byte_bar([text], "encoding") as bar:
            for pair in "".join(text.parts()).split("\n"):
                line += 1
                source, target = (
                    torch.from_numpy(tokenizer.encode(part).astype("int32")) for part in pair.split("\t")
                )
                where = f"{file or 'the dates'}, line {line}"
                _check_lengths(source, target, config.model.context_length, where)
                sources.append(source)
                targets.append(target)
                bar.update(len(pair))
        sides.append((sources, targets))
    return sides[0], sides[1]


def _check_lengths(source: Tensor, target: Tensor, limit: int, where: str) -> None:
    if not len(source):
        raise InputError(f"{where} has nothing before its TAB that the tokenizer knows; give it a source")
    for name, needed, tokens in (
        ("source", len(source), counted(len(source), "token")),
        ("target", len(target) + 1, f"{counted(len(target), 'token')} and an end"),
    ):
        if needed > limit:
            raise InputError(
                f"{where}: its {name} has {tokens}, but context_length is {limit}; use --context-length "
                f"{needed} or more, or take the line out"
            )
