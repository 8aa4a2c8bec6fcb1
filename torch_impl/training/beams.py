"""Beam search on the command line: python -m torch_impl.generate --model RUN_FOLDER --beams 4."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Integer
from torch import Tensor

from ref_numpy.config import BeamConfig, ConfigError
from torch_impl.beam import beam_search
from torch_impl.training.checkpoint import LoadedModel
from torch_impl.training.files import InputError
from torch_impl.training.tokenizer import Tokenizer

_END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class BeamFlags:
    """What a command line says of a search."""

    beams: int = 0
    """Width of a beam that searches for likely texts, instead of drawing tokens; 0 draws."""
    n_best: int = 1
    """With beams: texts that are written, the best first."""
    length_penalty: float = 1.0
    """With beams: the score of a text is its log-probability over its length to this power."""
    stop: tuple[str, ...] = ()
    """With beams: texts that end what is written, each looked for as the tokens that encode it."""


def beam_of(flags: BeamFlags, n_tokens: int) -> BeamConfig | None:
    """Without stop sequences, whose tokens only a tokenizer knows; None for no search. Raises InputError."""
    if flags.beams == 0:
        if flags != BeamFlags():
            raise InputError("--n-best, --length-penalty and --stop need a search; add --beams 4")
        return None
    if n_tokens < 1:
        raise InputError(f"--max-new-tokens is {n_tokens}, but a beam needs at least 1")
    try:
        return BeamConfig(flags.beams, flags.n_best, flags.length_penalty)
    except ConfigError as error:
        raise InputError(str(error)) from error


def stop_sequence(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a text. Raises InputError where they do not stand for it."""
    try:
        ids = tokenizer.encode(text).tolist()
    except UnicodeEncodeError as error:
        raise InputError(f"--stop is not valid text: {error.reason} at character {error.start}") from error
    if not ids or tokenizer.decode(ids) != text:
        raise InputError(f"--stop {text!r} is nothing that this model's tokenizer writes")
    return tuple(ids)


def continuations(
    loaded: LoadedModel, prompt: Integer[Tensor, "T"], n_tokens: int, beam: BeamConfig, stops: tuple[str, ...]
) -> list[tuple[str, float]]:
    """The n best texts that follow the prompt, without what ended them, and their scores.

    The end of text ends them, where the tokenizer has such a token. Raises InputError.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    device, limit = model.token_embedding.weight.device, model.config.context_length

    def next_logits(tokens: Integer[Tensor, "B T"], parents: Integer[Tensor, "B"]) -> Float[Tensor, "B V"]:
        return model(tokens[:, -limit:].to(device))[:, -1]

    beam = replace(
        beam,
        end_token=getattr(tokenizer, "special_tokens", {}).get(_END_OF_TEXT),
        stop_sequences=tuple(stop_sequence(stop, tokenizer) for stop in stops),
    )
    try:
        found = beam_search(next_logits, prompt.to(device), n_tokens, beam)
    except ValueError as error:
        raise InputError(str(error)) from error
    before, texts = tokenizer.decode_bytes([int(prompt[-1])]), []
    for tokens, score in found:
        ending = max((len(stop) for stop in beam.stops if tuple(tokens[-len(stop) :]) == stop), default=0)
        both = tokenizer.decode_bytes([int(prompt[-1]), *tokens[: len(tokens) - ending]])
        texts.append((both[len(before) :].decode("utf-8", errors="replace"), score))
    return texts
