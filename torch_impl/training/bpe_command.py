"""The command line of the tokenizer: python -m torch_impl.bpe train | encode | decode | inspect."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Literal

import numpy as np
import tyro

from ref_numpy.bpe_format import SPLITS, TokenizerError, to_gpt2_files, to_json
from torch_impl.bpe import check_training
from torch_impl.training.bpe_corpus import byte_bar, encode_texts, train_on_texts
from torch_impl.training.bpe_inspect import Files, Inspect, Source, texts
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, refusal, replace_file, unused_name
from torch_impl.training.flags import one_line_errors
from torch_impl.training.terminal import lead_nowhere, show_what_can_be_shown

_DECODED_AT_ONCE = 1 << 20  # ids


@dataclass
class Train:
    """Learn a vocabulary from text files."""

    files: Files
    """UTF-8 text; no token crosses from one file to the next."""
    vocab_size: int = 10000
    """Tokens in all: 256 bytes, merges, special tokens."""
    special_tokens: tuple[str, ...] = ()
    """Names that are one token each and never split; in the files they are borders between documents."""
    out: Path = Path("tokenizer.json")
    """File to write, in the format of Hugging Face's tokenizers."""
    out_gpt2: Path | None = None
    """Folder for vocab.json and merges.txt as well."""
    split: str = "gpt2"
    """How text is cut into pre-tokens: gpt2, gpt4, whitespace, or a regular expression."""
    sample: float = 1.0
    """Part of the text to learn from, spread evenly; above 0, at most 1."""
    ties: Literal["smallest ids", "greatest bytes"] = "smallest ids"
    """Which of equally frequent pairs is merged first."""
    workers: int = 0
    """Processes that split text; 0 means one per core."""
    force: bool = False
    """Replace files that exist."""

    def run(self) -> None:
        split = SPLITS.get(self.split, self.split)
        check_training(self.vocab_size, self.special_tokens, split)
        if not 0 < self.sample <= 1:
            raise InputError(f"--sample is {self.sample}, but must be above 0 and at most 1")
        targets = [self.out]
        if self.out_gpt2 is not None:
            targets += [self.out_gpt2 / "vocab.json", self.out_gpt2 / "merges.txt"]
        for target in targets:
            _refuse_existing(target, self.force)
            if not target.parent.is_dir():
                raise InputError(f"{target.parent} is no folder; make it first, or write elsewhere")
        vocabulary = train_on_texts(
            texts(self.files),
            self.vocab_size,
            self.special_tokens,
            split,
            self.ties,
            _workers(self.workers),
            self.sample,
        )
        replace_file(self.out, to_json(vocabulary).encode("utf-8"))
        if self.out_gpt2 is not None:
            for target, content in zip(targets[1:], to_gpt2_files(vocabulary), strict=True):
                replace_file(target, content.encode("utf-8"))
        print(f"{self.out}: {len(vocabulary.tokens)} tokens, {counted(len(vocabulary.merges), 'merge')}")


@dataclass
class Encode:
    """Turn text files into ids."""

    files: Files
    """UTF-8 text."""
    source: tyro.conf.OmitArgPrefixes[Source] = field(default_factory=Source)
    count: bool = False
    """Print only how many tokens there are."""
    out: Path | None = None
    """A .npy file for the ids, in the smallest unsigned dtype; without it they are printed."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the text may contain; any other is read as ordinary text."""
    workers: int = 0
    """Processes; 0 means one per core."""
    force: bool = False
    """Replace a file that exists."""

    def run(self) -> None:
        tokenizer = self.source.load()
        _refuse_existing(self.out, self.force)
        n, files = 0, texts(self.files)
        with byte_bar(files, "encoding") as bar, _id_writer(self.out, tokenizer.dtype) as write:
            for ids in encode_texts(
                tokenizer, files, self.special_tokens, _workers(self.workers), bar.update
            ):
                n += ids.size
                if self.out is not None:
                    write(ids)
                elif not self.count:
                    print(" ".join(map(str, ids.tolist())))
        if self.count:
            print(n)


@dataclass
class Decode:
    """Turn ids into text."""

    ids: tyro.conf.Positional[Path]
    """A .npy file of ids, or a text file with numbers."""
    source: tyro.conf.OmitArgPrefixes[Source] = field(default_factory=Source)
    out: Path | None = None
    """File for the text; without it the text is printed."""
    strict: bool = False
    """Refuse ids whose bytes are not UTF-8; otherwise the bytes are written as they are."""
    force: bool = False
    """Replace a file that exists."""

    def run(self) -> None:
        tokenizer = self.source.load()
        _refuse_existing(self.out, self.force)
        try:
            if self.ids.suffix == ".npy":
                ids = np.load(self.ids, mmap_mode="r", allow_pickle=False)
            else:
                ids = np.array(self.ids.read_text(encoding="utf-8").split(), np.int64)
        except (ValueError, OverflowError, EOFError, TokenError) as error:  # the last of a .npy's header
            raise InputError(f"{self.ids} holds no ids: {error}") from None
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"{self.ids} holds {ids.dtype} of shape {ids.shape}, but ids are one row of integers"
            )
        text = b"".join(
            tokenizer.decode_bytes(np.asarray(ids[start : start + _DECODED_AT_ONCE]))
            for start in range(0, ids.size, _DECODED_AT_ONCE)
        )
        if self.strict:
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{self.ids} decodes to bytes that are not UTF-8: {error}") from None
        if self.out is not None:
            replace_file(self.out, text)
        else:
            sys.stdout.buffer.write(text)


def _workers(asked: int) -> int:
    if asked < 0:
        raise InputError(f"--workers is {asked}, but must be 0 (one per core) or more")
    return asked or os.cpu_count() or 1


def _refuse_existing(path: Path | None, force: bool) -> None:
    if path is not None and path.exists() and not force:
        raise InputError(f"{path} exists already; choose another name, or replace it with --force")


@contextmanager
def _npy_rows(path: Path, dtype: np.dtype) -> Iterator:
    """Writes arrays one after the other into one .npy file, renamed into place when it is whole."""
    new = unused_name(path)
    n = 0

    def header() -> None:
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, described)  # leaves room for the number to grow

    def write(ids: np.ndarray) -> None:
        nonlocal n
        file.write(ids.tobytes())
        n += ids.size

    try:
        with new.open("wb") as file:
            header()
            yield write
            file.seek(0)
            header()
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _id_writer(path: Path | None, dtype: np.dtype):
    return nullcontext() if path is None else _npy_rows(path, dtype)


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)


def _parse(arguments: list[str]) -> Train | Encode | Decode | Inspect:
    """Exits after --help; raises InputError on a mistake."""
    try:
        with one_line_errors():
            return tyro.cli(Command, prog="python -m torch_impl.bpe", args=arguments)
    except InputError as error:
        raise InputError(f"{error}; see --help") from None


def main(arguments: list[str]) -> int:
    """Carry out a command line; 2 and one line on stderr where that cannot be done."""
    show_what_can_be_shown()
    try:
        _parse(arguments).run()
    except (TokenizerError, InputError) as error:
        message, code = str(error), 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        lead_nowhere(sys.stdout)
        return 0
    except OSError as error:
        message, code = refusal(error, "standard output"), 1
    except KeyboardInterrupt:
        message, code = "interrupted; nothing was written", 130
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return code
