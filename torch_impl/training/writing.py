"""What the programs that write text share: the flags of sampling, and tokens as characters."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from ref_numpy.config import SamplingConfig
from torch_impl.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingFlags(SamplingConfig):
    def __post_init__(self) -> None: ...  # checked when all flags are known


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
