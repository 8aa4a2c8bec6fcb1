"""Text from a model, one token at a time. The twin of ref_numpy/generate.py.

    python -m torch_impl.generate --model RUN_FOLDER --prompt "The history of" --temperature 0.8

writes as it goes, with the best checkpoint of a run.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Integer
from torch import Tensor

from ref_numpy.config import BeamConfig, ConfigError, SamplingConfig
from ref_numpy.masks import PADDING
from ref_numpy.rng import SAMPLE, Key
from torch_impl.kv_cache import KVCache
from torch_impl.rng import uniform
from torch_impl.sampling import sample_token
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training.beams import BeamFlags, beam_of, continuations
from torch_impl.training.writing import SamplingFlags, TextStream
from torch_impl.transformer import Transformer


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
) -> Iterator[list[int]]:
    """Yields the next token of each prompt, n_tokens times: what each would give alone.

    Token i of prompt b takes its u from (seed, i, streams[b]), by default from stream 0. Shorter texts have
    padding before them. Raises ValueError for an empty prompt, or a model that is no decoder.
    """
    config, device = model.config, model.token_embedding.weight.device
    if config.architecture != "decoder":
        raise ValueError(f"an {config.architecture} does not continue a text; only a decoder does")
    if any(prompt.numel() == 0 for prompt in prompts):
        raise ValueError("the prompt is empty, but the model needs at least one token to go on from")
    texts, streams = [prompt.tolist() for prompt in prompts], streams or [0] * len(prompts)
    past = KVCache(config, len(texts), model.compute_dtype, device)
    starts = documents = None
    for i in range(n_tokens):
        before, starts = starts, [context_start(len(text), config.context_length) for text in texts]
        if starts == before:
            new = torch.tensor([text[-1:] for text in texts], device=device)
            documents = None if documents is None else F.pad(documents, (0, 1))
        else:  # at first, and when the oldest tokens of a text fall out of sight
            contexts = [text[start:] for text, start in zip(texts, starts, strict=True)]
            new, documents = (None if part is None else part.to(device) for part in _padded(contexts))
            past.length = 0
        with torch.inference_mode():
            logits = model(new, documents=documents, past=past, last_only=True)[:, 0]  # (B, V)
        tokens = []
        for text, stream, row in zip(texts, streams, logits.cpu(), strict=True):
            u = uniform(Key(seed, SAMPLE, step=i, stream=stream), 1).item()
            tokens.append(sample_token(row, text, sampling, u))
            text.append(tokens[-1])
        yield tokens


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
) -> Iterator[int]:
    """Yields the target that an encoder-decoder writes for a source, up to its end, which is left out.

    It has at most n_tokens, and at most as many as the context is long. Token i takes its random number from
    (seed, i). Raises ValueError for a source that is empty or longer than the context length.
    """
    config, device = model.config, model.token_embedding.weight.device
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
            logits = model.decode(torch.tensor(ids, device=device)[None], memory, present)[0, -1]
        token = sample_token(logits, ids[1:], sampling, uniform(Key(seed, SAMPLE, step=i), 1).item())
        if token == config.end_token:
            return
        ids.append(token)
        yield token


@dataclass(frozen=True)
class GenerateFlags:
    """The command line of this module."""

    model: str = ""
    """Run folder (its best/ is taken, else last/), a checkpoint in one, or a folder in Hugging Face's
    layout."""
    prompt: str = ""
    """Text to go on from; without it, the model begins a paragraph. An encoder-decoder answers it instead."""
    max_new_tokens: int = 500
    """Length of what is written, in tokens."""
    seed: int = 0
    """Decides the draws; the same seed writes the same text."""
    device: str = "auto"
    """auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps."""
    sampling: SamplingFlags = SamplingFlags(temperature=0.8)  # noqa: RUF009 (it is frozen)
    search: BeamFlags = BeamFlags()  # noqa: RUF009 (it is frozen)


class Request(NamedTuple):
    """Flags that fit together, what they say of sampling or of a beam, and the checkpoint that they name."""

    flags: GenerateFlags
    sampling: SamplingConfig
    beam: BeamConfig | None
    checkpoint: Path


def parse(arguments: list[str]) -> Request:
    """Raises InputError on a mistake; exits after --help."""
    from torch_impl.training.files import InputError, find_checkpoint
    from torch_impl.training.flags import parse_flags

    flags = parse_flags(
        GenerateFlags(), arguments, "python -m torch_impl.generate", "Write text with a model."
    )
    try:
        sampling = SamplingConfig(**asdict(flags.sampling))
    except ConfigError as error:
        raise InputError(str(error)) from error
    if flags.max_new_tokens < 0:
        raise InputError(f"--max-new-tokens is {flags.max_new_tokens}, but must not be negative")
    if not 0 <= flags.seed < 2**64:
        raise InputError(f"--seed is {flags.seed}, but must lie in [0, 2**64)")
    if not flags.model:
        raise InputError("--model is missing; name a run folder, such as one under runs/")
    beam = beam_of(flags.search, flags.max_new_tokens)
    return Request(flags, sampling, beam, find_checkpoint(Path(flags.model)))


def write(request: Request) -> None:
    """Print the prompt and what the model makes of it, each character as soon as its bytes are complete."""
    from torch_impl.training.checkpoint import load_model
    from torch_impl.training.config import read_config
    from torch_impl.training.device import choose_place
    from torch_impl.training.files import InputError

    flags = request.flags
    settings = read_config(request.checkpoint).run
    place = choose_place(replace(settings, device=flags.device, compile="off"))
    loaded = load_model(request.checkpoint, place.dtype, place.device)
    model, tokenizer, architecture = loaded.model, loaded.tokenizer, loaded.config.model.architecture
    if architecture == "encoder":
        raise InputError(f"{flags.model} is an encoder, which fills gaps and does not write; train a decoder")
    answers = architecture == "encoder-decoder"
    if answers and not flags.prompt:
        raise InputError(
            "--prompt is missing; an encoder-decoder answers a source, such as one it learned from"
        )
    if answers and request.beam is not None:
        raise InputError(
            f"{flags.model} is an encoder-decoder, and beams are for decoders; leave --beams out"
        )
    try:
        prompt = torch.from_numpy(tokenizer.encode(flags.prompt or tokenizer.opening))
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt is not valid text: {error.reason} at character {error.start}") from error
    if not prompt.numel():
        raise InputError(f"--prompt {flags.prompt!r} has no word in it")
    if answers and prompt.numel() > (limit := loaded.config.model.context_length):
        raise InputError(f"--prompt has {prompt.numel()} tokens, but the model reads at most {limit}")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    if request.beam is not None:
        found = continuations(loaded, prompt, flags.max_new_tokens, request.beam, flags.search.stop)
        for number, (text, score) in enumerate(found, 1):
            print(f"[{number}] score {score:.4f}\n" * (flags.search.n_best > 1) + flags.prompt + text)
        return
    write_tokens = answer if answers else generate
    tokens = write_tokens(model, prompt, flags.max_new_tokens, request.sampling, flags.seed)
    print("" if answers else flags.prompt, end="", flush=True)
    stream = TextStream(tokenizer, [] if answers else prompt[-1:].tolist())
    for token in tokens:
        print(stream.feed(token), end="", flush=True)
    print(stream.end())


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 for a request that cannot be met, 1 for a failure, each with one line on stderr."""
    from torch_impl.training.files import InputError

    try:
        write(parse(arguments))
    except InputError as error:
        print(f"generate: error: {error}; see --help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # the reader has seen enough; nor may the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError) as error:
        print(f"generate: error: {error or 'out of memory'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
