"""A tokenizer from its files, and what there is to see in it."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ref_numpy.bpe_format import SPLITS, Vocabulary
from torch_impl.bpe import BPETokenizer
from torch_impl.training.bpe_corpus import encode_texts
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.flags import check_text
from torch_impl.training.text import Text
from torch_impl.training.tokenizer import BYTES, ByteTokenizer, load_gpt2_files, load_tokenizer
from torch_impl.training.visible import visible

Files = tyro.conf.Positional[tuple[Path, ...]]
_COLOURS = (41, 42, 44, 45, 46)  # backgrounds of a terminal


@dataclass
class Source:
    """Where the tokenizer comes from: --tokenizer, or --vocab with --merges."""

    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, or with vocab.json and merges.txt."""
    vocab: Path | None = None
    """GPT-2's vocab.json ..."""
    merges: Path | None = None
    """... and merges.txt."""

    def load(self) -> BPETokenizer:
        pair = (self.vocab, self.merges)
        if (self.tokenizer is None) == (pair == (None, None)) or (self.tokenizer is None and None in pair):
            raise InputError("name one tokenizer: --tokenizer FILE, or --vocab FILE with --merges FILE")
        if self.tokenizer is None:
            return load_gpt2_files(self.vocab, self.merges)
        tokenizer = load_tokenizer(self.tokenizer)
        if isinstance(tokenizer, ByteTokenizer):
            return BPETokenizer(BYTES)
        if not isinstance(tokenizer, BPETokenizer):
            raise InputError(f"{self.tokenizer} is no byte pair encoding, which alone is read here; name one")
        return tokenizer


def texts(files: tuple[Path, ...]) -> list[Text]:
    """Raises InputError where there are none, or a folder is among them."""
    if not files:
        raise InputError("no text is given; name one file or more")
    for file in files:
        if file.is_dir():
            raise InputError(f"{file} is a folder; name the text files in it")
    return [Text(file) for file in files]


@dataclass
class Inspect:
    """Show a tokenizer: its size and longest tokens, its compression of files, a text coloured by token."""

    files: Files = ()
    """UTF-8 text to measure the compression on."""
    source: tyro.conf.OmitArgPrefixes[Source] = field(default_factory=Source)
    text: str = ""
    """Text to show coloured by token; where colours are off, with a bar after each token."""
    longest: int = 10
    """How many of the longest tokens to show."""

    def run(self) -> None:
        check_text("--text", self.text)
        tokenizer = self.source.load()
        vocabulary = tokenizer.vocabulary
        specials = visible(", ".join(vocabulary.special_tokens)) or "none"
        merges = counted(len(vocabulary.merges), "merge")
        print(f"{tokenizer.vocab_size} tokens, {merges}, special tokens: {specials}")
        print(f"split: {visible(_name_of(vocabulary))}")
        print("longest tokens:")
        for id, token in sorted(enumerate(vocabulary.tokens), key=lambda item: -len(item[1]))[: self.longest]:
            print(f"  {id:>8}  {token.decode('utf-8', errors='replace')!r}")
        for path in self.files:
            n = sum(ids.size for ids in encode_texts(tokenizer, [Text(path)], (), os.cpu_count() or 1))
            size = path.stat().st_size
            print(f"{path}: {size} bytes, {n} tokens, {size / max(n, 1):.3f} bytes per token")
        if self.text:
            print(coloured(tokenizer, self.text, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def coloured(tokenizer: BPETokenizer, text: str, colour: bool) -> str:
    """The text with each token on a background of its own, or with a bar after each."""
    parts = [
        tokenizer.decode([id])
        if "\ufffd" not in tokenizer.decode([id])
        else str(tokenizer.decode_bytes([id]))
        for id in tokenizer.encode(text).tolist()
    ]
    if not colour:
        return "".join(part + "|" for part in parts)
    shades = (_COLOURS[i % len(_COLOURS)] for i in range(len(parts)))
    return "".join(f"\x1b[{shade};97m{part}\x1b[0m" for shade, part in zip(shades, parts, strict=True))


def _name_of(vocabulary: Vocabulary) -> str:
    return next(
        (name for name, pattern in SPLITS.items() if pattern == vocabulary.split), str(vocabulary.split)
    )
