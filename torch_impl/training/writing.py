"""What the programs that write text share: the flags of sampling, tokens as characters, texts that end, and
the forms in which they are shown."""

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ref_numpy.config import SamplingConfig
from ref_numpy.conversation import END_OF_TURN
from torch_impl.training.files import InputError
from torch_impl.training.terminal import show_what_can_be_shown
from torch_impl.training.tokenizer import Tokenizer
from torch_impl.training.visible import visible

T = TypeVar("T")

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", END_OF_TURN)


@dataclass(frozen=True)
class SamplingFlags(SamplingConfig):
    def __post_init__(self) -> None: ...  # checked when all flags are known


def check_forbidden(forbidden: Sequence[int], vocab_size: int, never: Sequence[int] = ()) -> None:
    """Raises InputError for an id that is no token, or where only those are left that are never chosen."""
    for id in forbidden:
        if not 0 <= id < vocab_size:
            raise InputError(f"--forbidden {id} is no token; ids run from 0 to {vocab_size - 1}")
    if len({*forbidden, *never}) == vocab_size:
        raise InputError("--forbidden rules out every token that could be written; leave one")


def chosen(tokens: Iterator[T], model: str) -> Iterator[T]:
    """The tokens that a model of this name chooses. Raises InputError where its logits are not numbers."""
    try:
        yield from tokens
    except ValueError as error:
        raise InputError(f"{model}: {error}") from error


# How answers are drawn where nothing else is said: closer to the likeliest than what is written freely.
ANSWERING = SamplingFlags(temperature=0.7, top_p=0.95)


class TextStream:
    """The text of tokens that come one by one, each character as soon as its bytes are complete.

    `before` are tokens that the text follows on; bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._before = tokenizer, list(before[-1:])
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """What can be shown now that this token has come; perhaps nothing yet."""
        known = self._tokenizer.decode_bytes(self._before)
        both = self._tokenizer.decode_bytes([*self._before, token])  # between two words there is a space
        self._before = [token]
        return self._decoder.decode(both[len(known) :])

    def end(self) -> str:
        """What is left of a character that has not become whole."""
        return self._decoder.decode(b"", final=True)


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that stand for the end of a text, of those that a tokenizer has."""
    known = getattr(tokenizer, "special_tokens", {})
    return tuple(known[name] for name in _ENDS if name in known)


@dataclass
class Written:
    """A text that a model has written after a prompt. Its tokens go on to the one that ended it."""

    pieces: list[tuple[str, float | None]] = field(
        default_factory=list
    )  # with the probability of their last token
    tokens: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)  # of the tokens, where they are asked for
    ended_by: str = ""  # "length", "stop", "end of text"; empty while it goes on
    score: float | None = None  # of a beam

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class Writer:
    """Makes a text of tokens that come one by one, and holds back what may be the beginning of a stop text.

    It is fed until `written.ended_by` says something. What written.pieces holds can be shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str], ends: Sequence[int]
    ) -> None:
        self._stream, self._stops, self._ends = TextStream(tokenizer, before), stops, ends
        self._held: list[tuple[str, float | None]] = []
        self.written = Written()

    def feed(self, token: int, probability: float | None) -> None:
        """One token more, of a text that has not ended."""
        self.written.tokens.append(token)
        if probability is not None:
            self.written.probabilities.append(probability)
        if token in self._ends:
            self.end("end of text")
        else:
            self._add(self._stream.feed(token), probability)

    def end(self, reason: str) -> None:
        """No token will come; what was held back is no stop text."""
        if not self.written.ended_by:
            self._add(self._stream.end(), None)
        if not self.written.ended_by:
            self._release(sum(len(text) for text, _ in self._held))
            self.written.ended_by = reason

    def _add(self, text: str, probability: float | None) -> None:
        self._held.append((text, probability))
        held = "".join(text for text, _ in self._held)
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self._release(min(found))
            self.written.ended_by = "stop"
        else:
            self._release(len(held) - max((_overlap(held, stop) for stop in self._stops), default=0))

    def _release(self, length: int) -> None:
        while length > 0:
            text, probability = self._held.pop(0)
            self.written.pieces.append((text[:length], probability))
            if rest := text[length:]:
                self._held.insert(0, (rest, probability))
            length -= len(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


class Printer:
    """Shows texts on stdout: as they are, coloured by probability, or as lines of JSON.

    A text that goes on from its prompt is shown with it; an answer is not.
    """

    def __init__(self, as_json: bool, coloured: bool, prompts: int, samples: int, answers: bool) -> None:
        if sys.stdout is None:
            raise InputError("there is no standard output to write to")
        show_what_can_be_shown()
        self._as_json, self._coloured = as_json, coloured
        self._prompts, self._samples, self._answers = prompts, samples, answers
        self._safe = visible if sys.stdout.isatty() else str
        if coloured and not as_json:
            scale = "".join(_colour(f" {tenth / 10:.1f}", tenth / 10) for tenth in range(0, 11, 2))
            print(f"probability{scale}", file=sys.stderr)

    def stream(self, prompt: str, growing: Iterator[list[Writer]]) -> None:
        """A single text, as it grows."""
        if self._as_json:
            *_, [writer] = growing
            self.show(prompt, 0, 0, writer.written)
            return
        print("" if self._answers else self._safe(prompt), end="", flush=True)
        shown = 0
        for (writer,) in growing:
            pieces = writer.written.pieces
            print(*map(self._piece, pieces[shown:]), sep="", end="", flush=True)
            shown = len(pieces)
        print(flush=True)

    def show(self, prompt: str, number: int, sample: int, written: Written) -> None:
        """One text of several, whole; number and sample count from 0."""
        if self._as_json:
            line = {"prompt": prompt, "sample": sample, "text": written.text, "tokens": written.tokens}
            line["ended_by"] = written.ended_by
            line |= {"probabilities": written.probabilities} if written.probabilities else {}
            line |= {} if written.score is None else {"score": written.score}
            print(json.dumps(line), flush=True)
            return
        which = [str(number + 1)] * (self._prompts > 1) + [str(sample + 1)] * (self._samples > 1)
        if which:
            score = "" if written.score is None else f" score {written.score:.4f}"
            print(f"[{'.'.join(which)}]{score}")
        print(
            "" if self._answers else self._safe(prompt), *map(self._piece, written.pieces), sep="", flush=True
        )

    def _piece(self, piece: tuple[str, float | None]) -> str:
        text, probability = piece
        text = self._safe(text)
        return _colour(text, probability) if self._coloured and probability is not None else text


def _colour(text: str, probability: float) -> str:
    """The text for a terminal, from red for 0 to green for 1 (the 6 x 6 x 6 cube of xterm's colours)."""
    green = round(5 * probability)
    return f"\x1b[38;5;{16 + 36 * (5 - green) + 6 * green}m{text}\x1b[0m" if text else ""
