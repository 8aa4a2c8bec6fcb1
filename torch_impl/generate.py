"""Text from a model, one token at a time. The twin of ref_numpy/generate.py.

    python -m torch_impl.generate --model RUN_FOLDER --prompt "The history of" --temperature 0.8

writes as it goes, with the best checkpoint of a run. (training/generate_command.py is that command.)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from ref_numpy.config import SamplingConfig
from ref_numpy.masks import PADDING
from ref_numpy.rng import SAMPLE, Key
from torch_impl.kv_cache import KVCache
from torch_impl.rng import first_uniform, uniform
from torch_impl.sampling import choose, forbidden_tokens, sample_token, seen_tokens
from torch_impl.seq2seq import Seq2Seq
from torch_impl.transformer import Transformer

Observer = Callable[[Float[Tensor, "B V"]], None]  # is shown the logits of each choice
_DRAWN_AHEAD = 256
"""Tokens whose random numbers are drawn at a time: to draw one takes a hundred operations, and so do all."""


def context_start(length: int, context_length: int) -> int:
    """Where the context of the next token begins in a text of `length` tokens: at 0 while the text fits, then
    moving on by half a context at a time."""
    step = max(context_length // 2, 1)
    return -(-max(length - context_length, 0) // step) * step


def generate(
    model: Transformer,
    prompt: Integer[Tensor, "T"],
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
) -> Iterator[int]:
    """Yields n_tokens that continue the prompt.

    Token i takes its u from (seed, i). Raises ValueError for an empty prompt, or a model that is no decoder.
    """
    for tokens in generate_batch(model, [prompt], n_tokens, sampling, seed):
        yield tokens[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Integer[Tensor, "_"]],
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    streams: Sequence[int] | None = None,
    observe: Observer | None = None,
    same_work: bool | None = None,
) -> Iterator[list[int]]:
    """Yields the next token of each prompt, n_tokens times: what each would give alone.

    Token i of prompt b takes its u from (seed, i, streams[b]), by default from stream 0. Shorter texts have
    padding before them. With same_work (by default on CUDA) all steps after the first do the same, so that on
    CUDA they are one replayed graph, and tokens are read while the next ones are computed; not so with ALiBi,
    or texts of unequal length. Raises ValueError where there are no prompts or one is empty, for a token
    outside the vocabulary, a number of streams that is not that of the prompts, a model that is no decoder,
    and logits that are not numbers.
    """
    config = model.config
    if config.architecture != "decoder":
        raise ValueError(f"an {config.architecture} does not continue a text; only a decoder does")
    if not prompts:
        raise ValueError("there are no prompts, but the model needs at least one to go on from")
    if any(prompt.numel() == 0 for prompt in prompts):
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    if streams is not None and len(streams) != len(prompts):
        raise ValueError(f"{len(streams)} streams for {len(prompts)} prompts: each needs one")
    texts = [prompt.tolist() for prompt in prompts]
    for outside in (id for text in texts for id in text if not 0 <= id < config.vocab_size):
        raise ValueError(f"token id {outside} is outside the vocabulary of {config.vocab_size}")
    writing = _Writing(model, texts, sampling, seed, streams or [0] * len(texts))
    if same_work is None:
        same_work = writing.last.device.type == "cuda"
    same_work = same_work and config.positions != "alibi" and len(set(map(len, texts))) == 1
    lengths, starts = list(map(len, texts)), None
    documents = unread = replay = None

    def read(tokens: _Sent) -> list[int]:
        for text, token in zip(texts, found := tokens.arrived(), strict=True):
            if token >= config.vocab_size:
                raise ValueError("the model's logits are not numbers, so no token can be chosen")
            text.append(token)
        return found

    for i in range(n_tokens):
        if i % _DRAWN_AHEAD == 0:
            writing.draw(i)
        before, starts = starts, [context_start(length + i, config.context_length) for length in lengths]
        if starts != before:  # at first, and when the oldest tokens of a text fall out of sight
            if unread is not None:
                yield read(unread)
            unread = None
            contexts, documents = _padded([text[start:] for text, start in zip(texts, starts, strict=True)])
            writing.past.clear()
            writing.step(contexts, documents)
            if same_work:
                writing.past.hold_shapes()
        elif same_work:
            replay = replay or writing.replayed()
            replay()
        else:
            documents = None if documents is None else F.pad(documents, (0, 1))
            writing.step(writing.last, documents)
        if observe is not None:
            observe(writing.logits)
        if unread is not None:
            yield read(unread)
        unread = _Sent(writing.last)
        if not same_work:
            yield read(unread)
            unread = None
    if unread is not None:
        yield read(unread)


class _Sent:
    """Tokens on their way to the host, which need not wait for what CUDA is given to do after them."""

    def __init__(self, tokens: Integer[Tensor, "B 1"]) -> None:
        self.tokens = tokens[:, 0].to("cpu", non_blocking=tokens.is_cuda, copy=True)
        self.sent = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def arrived(self) -> list[int]:
        if self.sent is not None:
            self.sent.synchronize()
        return self.tokens.tolist()


class _Writing:
    """Texts under way: all that their next tokens depend on, as tensors that a step changes in place."""

    def __init__(
        self,
        model: Transformer,
        texts: list[list[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int],
    ) -> None:
        device, size = model.token_embedding.weight.device, model.config.vocab_size
        self.draws_on = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.model, self.sampling = model, sampling
        self.past = KVCache(model.config, len(texts), model.compute_dtype, device)
        self.last = torch.zeros(len(texts), 1, dtype=torch.long, device=device)
        self.key, self.streams = Key(seed, SAMPLE), torch.tensor(streams, device=self.draws_on)
        self.draws = torch.zeros(_DRAWN_AHEAD, len(texts), dtype=torch.float64, device=self.draws_on)
        self.drawn = torch.zeros(1, dtype=torch.long, device=self.draws_on)  # tokens that took theirs
        self.forbidden = forbidden_tokens(sampling, size, self.draws_on)
        penalises = sampling.repetition_penalty != 1
        self.seen = seen_tokens(texts, size).to(self.draws_on) if penalises else None

    def draw(self, step: int) -> None:
        """The u of this token and the next ones."""
        if self.sampling.temperature:
            steps = torch.arange(step, step + _DRAWN_AHEAD, device=self.draws_on)[:, None]
            self.draws.copy_(first_uniform(self.key._replace(step=steps), self.streams.expand_as(self.draws)))
            self.drawn.zero_()

    @torch.inference_mode()
    def step(self, new: Integer[Tensor, "B T"], documents: Integer[Tensor, "B S"] | None = None) -> None:
        """Reads new tokens and chooses those after them: they stand in `last`, their logits in `logits`."""
        device, largest = self.last.device, self.model.config.vocab_size - 1
        documents = None if documents is None else documents.to(device)
        # V, which is no token, is told when it is read, and that may be after this.
        new = new.to(device).clamp(max=largest)
        self.logits = self.model(new, documents=documents, past=self.past, last_only=True)[:, 0]
        u = self.draws.index_select(0, self.drawn)[0] if self.sampling.temperature else 0.0
        tokens = choose(self.logits.to(self.draws_on), self.seen, self.forbidden, self.sampling, u)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None].clamp(max=largest), True)
        self.last.copy_(tokens[:, None])
        self.drawn.add_(1)

    def replayed(self) -> Callable[[], None]:
        """step(last), always the same work: on CUDA a graph of it, made now, elsewhere the step itself."""
        again = partial(self.step, self.last)
        if self.last.device.type != "cuda":
            return again
        changed = [self.last, self.drawn, self.past.place] + ([] if self.seen is None else [self.seen])
        kept, length = [tensor.clone() for tensor in changed], self.past.length

        def undo() -> None:  # at once: there may be room for a single token more
            for tensor, value in zip(changed, kept, strict=True):
                tensor.copy_(value)
            self.past.length = length

        aside = _recording_stream(self.last.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # they choose kernels and take memory, which a capture may not
                again()
                undo()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            again()
        undo()
        logits = self.logits

        def replay() -> None:
            graph.replay()
            self.logits = logits  # a step in between, when the context slides, has others
            self.past.length += 1

        return replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps memory for each stream that it was used on."""
    return torch.cuda.Stream(device)


def _padded(contexts: list[list[int]]) -> tuple[Integer[Tensor, "B T"], Integer[Tensor, "B T"] | None]:
    """Contexts in one array, padding before the shorter ones, and which places are padding, if any are."""
    longest = max(map(len, contexts))
    ids = torch.tensor([[0] * (longest - len(context)) + context for context in contexts])
    missing = torch.tensor([longest - len(context) for context in contexts])
    documents = torch.where(torch.arange(longest) < missing[:, None], PADDING, 0)
    return ids, documents if missing.any() else None


def answer(
    model: Seq2Seq,
    source: Integer[Tensor, "S"],
    n_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
    stream: int = 0,
    observe: Observer | None = None,
) -> Iterator[int]:
    """Yields the target that an encoder-decoder writes for a source, up to its end, which is left out.

    It has at most n_tokens, and at most as many as the context is long. Token i takes its u from (seed, i,
    stream). Raises ValueError for a source that is empty or longer than the context length, a model that is
    no encoder-decoder, or logits that are not numbers.
    """
    config, device = model.config, model.token_embedding.weight.device
    if config.architecture != "encoder-decoder":
        raise ValueError(f"this {config.architecture} does not answer; only an encoder-decoder does")
    if not 0 < source.numel() <= config.context_length:
        raise ValueError(f"the source has {source.numel()} tokens, not 1 to {config.context_length}")
    present = torch.ones(1, source.numel(), dtype=torch.bool, device=device)
    with torch.inference_mode():
        memory = model.encode(source.to(device).long()[None], present)
    never = (config.begin_token, config.padding_token)
    sampling = replace(sampling, forbidden=sampling.forbidden + never)
    ids = [config.begin_token]
    for i in range(min(n_tokens, config.context_length)):
        with torch.inference_mode():
            logits = model.decode(torch.tensor(ids, device=device)[None], memory, present)[0, -1].cpu()
        if observe is not None:
            observe(logits[None])
        u = uniform(Key(seed, SAMPLE, step=i, stream=stream), 1).item()
        token = sample_token(logits, ids[1:], sampling, u)
        if token == config.end_token:
            return
        ids.append(token)
        yield token


if __name__ == "__main__":
    from torch_impl.training.generate_command import main

    sys.exit(main(sys.argv[1:]))
