"""Conversations from files: one on each line as JSON, or all of them in one JSON array.

ref_numpy/conversation.py says what a record holds. Empty lines are skipped, other keys left alone.
Not here: files larger than memory.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ref_numpy.conversation import (
    RECORD,
    Conversation,
    ConversationError,
    Tokens,
    from_record,
    pieces,
    to_record,
)
from torch_impl.bpe import BPETokenizer
from torch_impl.training.corpus import Corpus
from torch_impl.training.files import InputError
from torch_impl.training.text import Text, file_text

_SPACE = re.compile(r"[ \t\r\n]*")  # what JSON allows between values
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Conversations(Corpus):
    """Conversations to train on and held-out ones; as text, what is said in them: a tokenizer learns it."""

    training: list[Conversation]
    held_out: list[Conversation]


def load_conversations(train_file: str, valid_file: str) -> Conversations:
    """The conversations of both files. Without a held-out file, the last tenth of them, rounded up.

    Raises InputError, with the line's number, for a malformed one; for a file that is missing, empty, not
    UTF-8 or not JSON, or too short to hold anything out.
    """
    if not train_file:
        raise InputError(
            "--train-file is missing; name a file of conversations, a JSON object with messages, or with "
            "instruction and output, on each line"
        )
    training = read_conversations(Path(train_file))
    if valid_file:
        held_out = read_conversations(Path(valid_file))
    else:
        cut = len(training) * 9 // 10
        training, held_out = training[:cut], training[cut:]
    if not training:
        raise InputError(
            f"{train_file} has one conversation, but the last is held out; add some, or name a --valid-file"
        )
    texts = [
        Text("\n".join(message.content for conversation in part for message in conversation).encode("utf-8"))
        for part in (training, held_out)
    ]
    return Conversations(*texts, *map(_sha256, (training, held_out)), training, held_out)


def _sha256(conversations: list[Conversation]) -> str:
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps(to_record(conversation)).encode("ascii") + b"\n")
    return digest.hexdigest()


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file. Raises InputError that names the file, the line and what is wrong."""
    text = "".join(file_text(path).parts())
    found = []
    for line, record in _records(text, path):
        try:
            found.append(from_record(record))
        except ConversationError as error:
            raise InputError(f"{path}, line {line}: {error}") from None
    if not found:
        raise InputError(f"{path} is empty; a conversation is a JSON object on a line of its own")
    return found


def _records(text: str, path: Path) -> Iterator[tuple[int, object]]:
    """Each record, and the number of the line on which it begins."""
    start = _skip_space(text, 0)
    if text.startswith("[", start):
        yield from _in_array(text, start + 1, path)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if (start := _skip_space(line, 0)) == len(line):
            continue
        record, end = _value(line, start, number - 1, path)
        if (rest := line[_skip_space(line, end) :]) != "":
            raise _broken(path, number, f"{rest[:20]!r} comes after the end of the record")
        yield number, record


def _in_array(text: str, start: int, path: Path) -> Iterator[tuple[int, object]]:
    """The elements of an array that is all of the text, from behind its bracket on."""
    breaks = [found.start() for found in re.finditer("\n", text)]

    def line(place: int) -> int:
        return bisect_left(breaks, place) + 1

    end = _skip_space(text, start)
    if not text.startswith("]", end):
        while True:
            start = _skip_space(text, start)
            record, end = _value(text, start, 0, path)
            yield line(start), record
            end = _skip_space(text, end)
            if not text.startswith(",", end):
                break
            start = end + 1
    if not text.startswith("]", end):
        raise _broken(path, line(end), f"after a record comes {text[end : end + 20]!r}, not a comma or ]")
    if (rest := text[_skip_space(text, end + 1) :][:20]) != "":
        raise _broken(path, line(end), f"{rest!r} comes after the end of the array")


def _skip_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


def _value(text: str, start: int, lines_before: int, path: Path) -> tuple[object, int]:
    """The JSON value that begins at a place, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _broken(path, lines_before + error.lineno, f"{error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        line = lines_before + text.count("\n", 0, start) + 1
        raise _broken(path, line, str(error)) from None


def _broken(path: Path, line: int, what: str) -> InputError:
    form = f"; a record is {RECORD}" * (line == 1)  # it may not be JSON at all
    return InputError(f"{path}, line {line} is broken JSON: {what}; mend it, or take the record out{form}")


def encode_conversations(
    conversations: list[Conversation], tokenizer: BPETokenizer, context_length: int
) -> tuple[list[Tokens], int]:
    """The conversations as pieces that the context holds, and how many exchanges are too long for it."""
    found, left_out = [], 0
    with tqdm(conversations, "encoding", unit="conversation", delay=0.5, leave=False, disable=None) as bar:
        for conversation in bar:
            # Of a piece the last token is never read, only written.
            some, too_long = pieces(
                conversation, tokenizer.encode, tokenizer.special_tokens, context_length + 1
            )
            found += some
            left_out += too_long
    return found, left_out
