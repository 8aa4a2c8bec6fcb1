"""Beam search on the command line: python -m torch_impl.generate --model RUN_FOLDER --beams 4."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from jaxtyping import Float, Integer
from torch import Tensor

from ref_numpy.config import BeamConfig, ConfigError
from torch_impl.beam import beam_search
from torch_impl.generate import context_start
from torch_impl.kv_cache import KVCache
from torch_impl.training.checkpoint import LoadedModel
from torch_impl.training.files import InputError
from torch_impl.training.flags import check_text, dashed
from torch_impl.training.tokenizer import Tokenizer
from torch_impl.training.writing import Written, end_tokens


@dataclass(frozen=True)
class BeamFlags:
    """A search for likely texts, instead of drawing one."""

    beams: int = 0
    """Width of a beam that searches for likely texts, instead of drawing tokens; 0 draws."""
    n_best: int = 1
    """With beams: texts that are written, the best first."""
    length_penalty: float = 1.0
    """With beams: the score of a text is its log-probability over its length to this power."""
    early_stopping: Literal["exact", "estimate", "full"] = "exact"
    """With beams: when to stop: the best are certain; they probably are; as many as beams are finished."""
    phrases: tuple[str, ...] = ()
    """With beams: texts that must appear in what is written, at most 8, looked for as the tokens that encode
    them."""


def beam_of(flags: BeamFlags, n_tokens: int, forbidden: tuple[int, ...]) -> BeamConfig | None:
    """Without stop sequences and phrases, whose tokens only a tokenizer knows; None for no search.

    Raises InputError or ConfigError.
    """
    if flags.beams == 0:
        for field in fields(flags):
            if getattr(flags, field.name) != field.default:
                raise InputError(f"--{dashed(field.name)} is for a search; add --beams 4")
        return None
    if flags.beams < 0:
        raise InputError(f"--beams is {flags.beams}, but must be 0, to draw, or more")
    if n_tokens < 1:
        raise InputError(f"--max-new-tokens is {n_tokens}, but a beam needs at least 1")
    return BeamConfig(
        flags.beams, flags.n_best, flags.length_penalty, flags.early_stopping, forbidden=forbidden
    )


def tokens_of(flag: str, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a flag's text. Raises InputError where they do not stand for it."""
    check_text(flag, text)
    ids = tokenizer.encode(text).tolist()
    if not ids or tokenizer.decode(ids) != text:
        raise InputError(f"{flag} {text!r} is nothing that this model's tokenizer writes")
    return tuple(ids)


def continuations(
    loaded: LoadedModel,
    prompt: Integer[Tensor, "T"],
    n_tokens: int,
    beam: BeamConfig,
    stops: tuple[str, ...],
    phrases: tuple[str, ...],
) -> list[Written]:
    """The n best texts that follow the prompt, without what ended them.

    The end of text ends them, where the tokenizer has such a token. Raises InputError.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    device, limit = model.token_embedding.weight.device, model.config.context_length

    past, start = KVCache(model.config, 1, model.compute_dtype, device), 0

    def next_logits(tokens: Integer[Tensor, "B T"], parents: Integer[Tensor, "B"]) -> Float[Tensor, "B V"]:
        nonlocal start
        before, start = start, context_start(tokens.shape[1], limit)
        if start != before:  # the oldest fall out of sight, as where tokens are drawn, and all places change
            past.clear()
        past.reorder(parents)
        return model(tokens[:, start + past.length :].to(device), past=past, last_only=True)[:, 0]

    ends = tuple((token,) for token in end_tokens(tokenizer))
    try:
        beam = replace(
            beam,
            stop_sequences=(*ends, *(tokens_of("--stop", stop, tokenizer) for stop in stops)),
            phrases=tuple(tokens_of("--phrases", phrase, tokenizer) for phrase in phrases),
        )
        found = beam_search(next_logits, prompt.to(device), n_tokens, beam)
    except (ConfigError, ValueError) as error:
        raise InputError(str(error)) from error
    before, texts = tokenizer.decode_bytes([int(prompt[-1])]), []
    for tokens, score in found:
        stop = max((stop for stop in beam.stops if tuple(tokens[-len(stop) :]) == stop), key=len, default=())
        both = tokenizer.decode_bytes([int(prompt[-1]), *tokens[: len(tokens) - len(stop)]])
        text = both[len(before) :].decode("utf-8", errors="replace")
        reason = "length" if not stop else "end of text" if stop in ends else "stop"
        texts.append(Written([(text, None)], tokens, ended_by=reason, score=score))
    return texts
