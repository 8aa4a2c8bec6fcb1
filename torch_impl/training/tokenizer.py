"""Text to token ids and back, and the file that says how: Hugging Face's tokenizer.json.

The tokenizer here takes each byte of the text's UTF-8 as a token. In the file it is a byte-level BPE without
merges, so that the ecosystem's libraries read it too.
"""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt
from numpy import ndarray as Array

from torch_impl.training.files import InputError, write_file


@runtime_checkable
class Tokenizer(Protocol):
    """What a run asks of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> UInt[Array, "N"]:
        """Token ids, in the smallest unsigned dtype that holds vocab_size - 1."""
        ...

    def decode_bytes(self, ids: UInt[Array, "N"] | list[int]) -> bytes:
        """The bytes that the ids stand for."""
        ...

    def decode(self, ids: UInt[Array, "N"] | list[int]) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, path: Path) -> None:
        """Write tokenizer.json, in one piece."""
        ...


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in vocabulary files (GPT-2's encoder.py).

    A byte whose Latin-1 character is visible stands for itself, the others for U+0100 and up, in order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + invisible.index(byte)) for byte in range(256)]


class ByteTokenizer:
    """Each byte is a token, and its id is its value."""

    vocab_size = 256

    def encode(self, text: str) -> UInt[Array, "N"]:
        """The bytes of the text's UTF-8, as uint8."""
        return np.frombuffer(bytearray(text, "utf-8"), np.uint8)

    def decode_bytes(self, ids: UInt[Array, "N"] | list[int]) -> bytes:
        """Raises ValueError for an id outside 0 to 255."""
        return (
            bytes(memoryview(ids))
            if isinstance(ids, Array) and ids.dtype == np.uint8
            else bytes(map(int, ids))
        )

    def decode(self, ids: UInt[Array, "N"] | list[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write tokenizer.json: a byte-level BPE that has no merges, id b for byte b."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {character: byte for byte, character in enumerate(byte_characters())},
                "merges": [],
            },
        }
        write_file(Path(path), json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8"))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises InputError for a damaged or foreign file."""
    try:
        content = json.loads(Path(path).read_bytes())
        model = content["model"]
        kind, vocabulary, merges = model["type"], model["vocab"], model["merges"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no tokenizer.json: {str(error) or type(error).__name__}") from error
    expected = {character: byte for byte, character in enumerate(byte_characters())}
    if kind != "BPE" or merges or vocabulary != expected:
        raise InputError(f"{path} holds a {kind} tokenizer that is not the byte tokenizer of this program")
    return ByteTokenizer()
