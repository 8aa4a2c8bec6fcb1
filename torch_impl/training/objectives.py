"""What a run teaches its model: to go on with a text, fill its gaps, turn sources into targets, or answer.

One class for each: where its batches come from, how well the model does, and an example.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.loss import IGNORE
from ref_numpy.rng import MASK, Key
from torch_impl.data import sample_batch
from torch_impl.generate import answer, generate
from torch_impl.masking import evaluate_masked, mask_tokens, sample_masked_batch
from torch_impl.pairs import Pairs, evaluate_pairs, make_pairs, sample_pairs
from torch_impl.train import FromHost, Sample, evaluate
from torch_impl.training.answering import make_answering
from torch_impl.training.config import RunConfig
from torch_impl.training.conversation_file import Conversations, load_conversations
from torch_impl.training.corpus import Corpus, encode_corpus, load_corpus
from torch_impl.training.counting import counted
from torch_impl.training.pair_file import encode_pairs, load_pairs
from torch_impl.training.ranks import Ranks
from torch_impl.training.telemetry import Row, faces_of_loss
from torch_impl.training.token_ids import tokens_on
from torch_impl.training.tokenizer import Tokenizer, WordTokenizer, count_unknown, tokens_per_byte
from torch_impl.transformer import Embedded

_SHOWN = 5  # pairs in sample.txt
_LINE = 40  # tokens of the line whose gaps are filled


@runtime_checkable
class Objective(Protocol):
    """What a run asks of its objective."""

    sample: Sample  # the batch of a step
    tokens_per_sequence: int
    train_tokens: Tensor  # ids of all that is trained on

    def describe(self) -> str:
        """How much there is to train on and what is held out."""
        ...

    def evaluate(self, model: Embedded, max_tokens: int | None, ranks: Ranks) -> Row:
        """val_loss in nats per token that counts, and what else there is to say of the held-out part, which
        the processes divide among them."""
        ...

    def example(self, model: Embedded, length: int) -> str:
        """What the model makes of something that it was not trained on."""
        ...

    def passage(self, length: int) -> tuple[Tensor, ...]:
        """What the model reads of the beginning of the held-out part, so many tokens at most."""
        ...


def load_for(config: RunConfig) -> Corpus:
    """What the run's files hold. Raises InputError where they cannot be used."""
    files = config.run.train_file, config.run.valid_file
    if config.model.architecture == "encoder-decoder":
        return load_pairs(*files)
    return load_conversations(*files) if config.run.content == "conversations" else load_corpus(*files)


def make_objective(
    corpus: Corpus, tokenizer: Tokenizer, config: RunConfig, cache: Path, device: torch.device
) -> Objective:
    """What a model learns from a corpus. Raises InputError where that is too short, or a line too long."""
    if config.model.architecture == "encoder-decoder":
        sides = encode_pairs(corpus, tokenizer, config)
        return Translation(
            config.model, tokenizer, *(make_pairs(*side, config.model, device) for side in sides)
        )
    if isinstance(corpus, Conversations):
        return make_answering(corpus, tokenizer, config, device)
    train_ids, valid_ids = encode_corpus(corpus, tokenizer, config, cache)
    kind = GapFilling if config.model.architecture == "encoder" else Continuation
    train, valid = tokens_on(device, train_ids), tokens_on(device, valid_ids)
    return kind(config.model, tokenizer, train, valid, corpus.valid.size(), device)


@dataclass
class _OnText:
    """A text to train on and a held-out one, as tokens."""

    config: ModelConfig
    tokenizer: Tokenizer
    train_tokens: Tensor
    valid_tokens: Tensor
    valid_bytes: int
    device: torch.device  # on which the model computes

    @property
    def tokens_per_sequence(self) -> int:
        return self.config.context_length

    def describe(self) -> str:
        n = self.valid_tokens.numel()
        where = f"; {self.device} has no room for them, so the host makes the batches" if self.on_host else ""
        return (
            f"{self.train_tokens.numel():,} tokens to train on, {n:,} held out{where}\n"
            f"{self.config.text_tokens:,} different tokens, "
            f"{self.valid_bytes / n:.2f} bytes of held-out text in each"
        )

    @property
    def on_host(self) -> bool:
        """Whether the text lies on the host, and the model does not."""
        return self.train_tokens.device.type != self.device.type

    def batches(self, sample: Sample) -> Sample:
        """They are on the device, wherever the text lies."""
        return FromHost(sample, self.device) if self.on_host else sample

    def passage(self, length: int) -> tuple[Tensor, ...]:
        return (self.valid_tokens[None, : min(length, self.config.context_length)].long(),)


@dataclass
class Continuation(_OnText):
    """A decoder: the next token of a text."""

    def __post_init__(self) -> None:
        self.sample = self.batches(partial(sample_batch, self.train_tokens, self.config.context_length))
        ids = self.valid_tokens.cpu().numpy()
        self.tokens_per_byte = tokens_per_byte(self.tokenizer, ids, self.valid_bytes)

    def describe(self) -> str:
        if self.tokens_per_byte is not None:
            return super().describe()
        unknown = count_unknown(self.tokenizer, self.valid_tokens.cpu().numpy())
        share = unknown / self.valid_tokens.numel()
        lost = f"the tokenizer does not know {unknown:,} of the held-out tokens ({share:.2%})"
        spaces = ", which keeps no spaces" if isinstance(self.tokenizer, WordTokenizer) else ""
        return f"{super().describe()}\n{lost}{spaces}: so there are no bits per byte"

    def evaluate(self, model: Embedded, max_tokens: int | None, ranks: Ranks) -> Row:
        loss = evaluate(model, self.valid_tokens, max_tokens=max_tokens, ranks=ranks)
        return faces_of_loss(loss, self.tokens_per_byte)

    def example(self, model: Embedded, length: int) -> str:
        """A passage that the model writes of its own accord."""
        prompt = torch.from_numpy(self.tokenizer.encode(self.tokenizer.opening))
        ids = generate(model, prompt, length, SamplingConfig(temperature=0.8))
        return self.tokenizer.decode(list(ids))


@dataclass
class GapFilling(_OnText):
    """An encoder: the tokens of a text that are hidden from it."""

    def __post_init__(self) -> None:
        self.sample = self.batches(partial(sample_masked_batch, self.train_tokens, self.config))

    def evaluate(self, model: Embedded, max_tokens: int | None, ranks: Ranks) -> Row:
        found = evaluate_masked(model, self.valid_tokens, max_tokens=max_tokens, ranks=ranks)
        return faces_of_loss(found.loss, None) | {"accuracy": found.accuracy}

    def example(self, model: Embedded, length: int) -> str:
        """The beginning of the held-out text with gaps, and with the likeliest token in each."""
        text = self.valid_tokens[: min(length, _LINE, self.config.context_length)].long().to(self.device)
        _, targets = mask_tokens(text, self.config, Key(0, MASK))
        gaps = targets != IGNORE
        with torch.inference_mode():
            logits = model(text.masked_fill(gaps, self.config.mask_token)[None])[0]
        filled = torch.where(gaps, logits[:, : self.config.text_tokens].argmax(-1), text)
        return "\n".join(
            f"{name} {self._marked(ids, gaps, blank)}"
            for name, ids, blank in (
                ("gaps:  ", text, True),
                ("filled:", filled, False),
                ("text:  ", text, False),
            )
        )

    def _marked(self, ids: Tensor, gaps: Tensor, blank: bool) -> str:
        """The text of the tokens in one line, with brackets around gaps."""
        runs: list[list[int]] = [[]]
        for id, gap in zip(ids.tolist(), gaps.tolist(), strict=True):
            runs += [[id], []] if gap else []
            runs[-1] += [] if gap else [id]
        texts = [self.tokenizer.decode(run) for run in runs]
        marked = [
            (f"[{' ' * len(text) if blank else text}]" if n % 2 else text) for n, text in enumerate(texts)
        ]
        space = " " if isinstance(self.tokenizer, WordTokenizer) else ""
        return space.join(filter(None, marked)).replace("\n", " ")


@dataclass
class Translation:
    """An encoder-decoder: the target of a source."""

    config: ModelConfig
    tokenizer: Tokenizer
    train: Pairs
    valid: Pairs

    def __post_init__(self) -> None:
        self.sample = partial(sample_pairs, self.train, self.config)
        self.train_tokens = torch.cat([side.flatten() for side in self.train])
        self.tokens_per_sequence = self.train.source.shape[1] + self.train.target.shape[1] - 1

    def describe(self) -> str:
        source, target = (side.shape[1] for side in self.train)
        return (
            f"{counted(len(self.train.source), 'pair')} to train on, {len(self.valid.source):,} held out\n"
            f"{self.config.text_tokens:,} different tokens; sources have at most {source} of them, targets "
            f"{target - 2}"
        )

    def evaluate(self, model: Embedded, max_tokens: int | None, ranks: Ranks) -> Row:
        found = evaluate_pairs(model, self.valid, max_tokens=max_tokens, ranks=ranks)
        return faces_of_loss(found.loss, None) | {"exact_match": found.exact_match}

    def example(self, model: Embedded, length: int) -> str:
        """The first held-out sources, what the model answers, and what was right."""
        lines = []
        for source, target in zip(*(side[:_SHOWN] for side in self.valid), strict=True):
            written = list(answer(model, self._text(source), length, SamplingConfig(temperature=0.0)))
            wanted = self._text(target)
            verdict = (
                "right" if written == wanted.tolist() else f"wrong: {self.tokenizer.decode(wanted.tolist())}"
            )
            question = self.tokenizer.decode(self._text(source).tolist())
            lines.append(f"{question} -> {self.tokenizer.decode(written)} ({verdict})")
        return "\n".join(lines)

    def passage(self, length: int) -> tuple[Tensor, ...]:
        """The first held-out source and its target, without padding."""
        filling = self.config.padding_token
        source, target = (side[0][side[0] != filling][None, :length].long() for side in self.valid)
        return source, torch.ones_like(source, dtype=torch.bool), target[:, : self.config.context_length]

    def _text(self, ids: Tensor) -> Tensor:
        return ids[ids < self.config.text_tokens]
