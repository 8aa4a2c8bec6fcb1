"""A model that answers: what of a conversation its context holds, and the answer token by token."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, takewhile

import torch

from ref_numpy.config import SamplingConfig
from ref_numpy.conversation import END_OF_TURN, ROLE_TOKENS, SPECIAL_TOKENS, Conversation, turn_tokens
from ref_numpy.rng import SAMPLE, Key
from torch_impl.bpe import BPETokenizer
from torch_impl.kv_cache import KVCache
from torch_impl.rng import uniform
from torch_impl.sampling import sample_token
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import Tokenizer
from torch_impl.transformer import Embedded, Transformer


def _too_long(size: int, opening: int, limit: int) -> str:
    """What is wrong with a message of so many tokens, behind a system message of so many."""
    room = limit - opening - 4  # for the message: its role and end, the answer's role and a token of it
    if room < 1:
        return f"the system message of {opening} tokens leaves no room in the context of {limit}; shorten it"
    beside = f" beside the system message of {opening}" if opening else ""
    return (
        f"the message has {size} tokens, and the context of {limit} holds {room} at most{beside}; shorten it"
    )


class Dialogue:
    """A model, its tokenizer, and the keys and values of what it has read last.

    Raises InputError for a model that was not tuned on conversations.
    """

    def __init__(self, model: Embedded, tokenizer: Tokenizer) -> None:
        known = getattr(tokenizer, "special_tokens", {})
        if not isinstance(model, Transformer) or any(token not in known for token in SPECIAL_TOKENS):
            raise InputError(
                "the model was not tuned on conversations: its tokenizer has no "
                f"{', '.join(token for token in SPECIAL_TOKENS if token not in known)}; tune it with "
                "train_gpu.py chat --init-from"
            )
        assert isinstance(tokenizer, BPETokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.end = known[END_OF_TURN]
        self._never = tuple(id for id in known.values() if id != self.end)  # an answer is plain text
        self._device = model.token_embedding.weight.device
        self._past = KVCache(model.config, 1, model.compute_dtype, self._device)
        self._read: list[int] = []  # the tokens whose keys and values are in the cache

    def prompt(self, conversation: Conversation, n_tokens: int) -> tuple[list[int], int]:
        """The tokens that an answer to the last message follows on, and how many exchanges they leave out.

        The oldest exchanges fall away, until there is room for an answer of n_tokens, or for one of half the
        context; the system message stays. Raises InputError where there is no room even so.
        """
        turns = [
            turn_tokens(message, self.tokenizer.encode, self.tokenizer.special_tokens).ids.tolist()
            for message in conversation
        ]
        opening, rest = turns[: conversation[0].role == "system"], turns[conversation[0].role == "system" :]
        limit = self.model.config.context_length
        room = limit - min(n_tokens, limit // 2)
        left_out = 0
        while len(rest) > 1 and sum(map(len, opening + rest)) > room:
            rest = rest[2:]
            left_out += 1
        ids = [*chain(*opening, *rest), self.tokenizer.special_tokens[ROLE_TOKENS["assistant"]]]
        if len(ids) >= limit:
            raise InputError(_too_long(len(rest[-1]) - 2, sum(map(len, opening)), limit))
        return ids, left_out

    def answer(
        self, prompt: list[int], n_tokens: int, sampling: SamplingConfig, seed: int, stream: int = 0
    ) -> Iterator[int]:
        """Yields the tokens of an answer, and the end of the turn if it comes.

        It has at most n_tokens, and no more than the context holds; it is never empty, and has no special
        token. Token i draws its random number from (seed, i, stream). What the prompt begins with as the last
        one did is not read again.
        """
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._read, prompt[:-1], strict=False))
        )
        del self._read[same:]
        new, special = prompt[same:], set(self.tokenizer.special_tokens.values())
        seen = [id for id in prompt if id not in special]
        first, later = (
            replace(sampling, forbidden=sampling.forbidden + never)
            for never in ((*self._never, self.end), self._never)
        )
        for i in range(min(n_tokens, self.model.config.context_length - len(prompt) + 1)):
            self._past.length = len(self._read)  # whatever became of an answer that was stopped
            with torch.inference_mode():
                ids = torch.tensor([new], device=self._device)
                logits = self.model(ids, past=self._past, last_only=True)[0, 0]
            self._read += new
            u = uniform(Key(seed, SAMPLE, step=i, stream=stream), 1).item()
            token = sample_token(logits.cpu(), seen, later if i else first, u)
            yield token
            if token == self.end:
                return
            seen.append(token)
            new = [token]
