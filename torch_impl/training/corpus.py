"""The text of a run: what is trained on, and what is held out.

Not here: texts that do not fit into memory.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from torch_impl.training.config import RunConfig
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import Tokenizer


class Corpus(NamedTuple):
    """Text to train on and held-out text."""

    train: str
    valid: str

    def sha256(self) -> str:
        """Names the text: a resumed run must find the one that it began with."""
        parts = (hashlib.sha256(part.encode("utf-8")).hexdigest() for part in self)
        return hashlib.sha256(" ".join(parts).encode("ascii")).hexdigest()


def load_corpus(train_file: str, valid_file: str) -> Corpus:
    """The two texts. Without a training file, the embedded one; without a held-out file, the last tenth.

    Raises InputError for a file that is missing, a folder, empty, or not UTF-8 text.
    """
    text = read_text(Path(train_file)) if train_file else python_reference()
    if valid_file:
        return Corpus(text, read_text(Path(valid_file)))
    cut = len(text) * 9 // 10
    return Corpus(text[:cut], text[cut:])


def python_reference() -> str:
    """The Python language reference, as `help()` shows it: about half a megabyte in every interpreter."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError where there is none, naming the byte that is wrong."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a text file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not content:
        raise InputError(f"{path} is empty")
    if (place := content.find(0)) >= 0:
        raise InputError(f"{path} is not text: byte {place} is NUL")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}; save it as UTF-8"
        ) from error


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> list[np.ndarray]:
    """Token ids of both texts. Raises InputError for a text shorter than context_length + 1 tokens."""
    length = config.model.context_length
    texts = []
    for text, name, file in (
        (corpus.train, "training text", config.run.train_file),
        (corpus.valid, "held-out text", config.run.valid_file),
    ):
        ids = tokenizer.encode(text)
        if ids.size <= length:
            held_out = "" if file or name == "training text" else " (the last tenth of the training text)"
            raise InputError(
                f"the {name}{held_out} has {ids.size} tokens, but context_length {length} needs at least "
                f"{length + 1}; use a longer text or a --context-length below {max(ids.size, 2)}"
            )
        texts.append(ids)
    return texts
