"""Gaps in a text, filled by an encoder: python -m torch_impl.generate --model RUN --prompt "a <mask> in it".

Each <mask> is one token, and each is guessed from the same look at the text, in which all of them are hidden.
Not here: gaps of several tokens, or of a number that the model decides.
"""

import json
import sys
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from torch_impl.bpe import BPETokenizer
from torch_impl.training.checkpoint import LoadedModel
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError
from torch_impl.training.flags import dashed
from torch_impl.training.terminal import show_what_can_be_shown
from torch_impl.training.tokenizer import unknown_told
from torch_impl.training.visible import visible

GAP = "<mask>"
_READ = {"model", "prompt", "prompts", "json", "device"}  # of the flags; the others say how text is written


class Filled(NamedTuple):
    """A text with the likeliest token in each gap, and for each gap the likeliest tokens."""

    text: str
    gaps: list[list[tuple[str, float]]]  # with their probabilities, the likeliest first


def fill_gaps(loaded: LoadedModel, text: str, guesses: int = 5) -> Filled:
    """What an encoder makes of a text with <mask> in the place of tokens.

    Raises InputError for a text without a gap, or with more tokens than the context holds, and for a model
    whose logits are not numbers.
    """
    config, tokenizer = loaded.config.model, loaded.tokenizer
    parts = text.split(GAP)
    if len(parts) == 1:
        raise InputError(f"{text!r} has no {GAP}, and an encoder fills gaps; write {GAP} in place of a token")
    if isinstance(tokenizer, BPETokenizer):  # whose tokens begin with the space before a word
        parts[:-1] = [part.removesuffix(" ") for part in parts[:-1]]
    ids = tokenizer.encode(parts[0]).tolist()
    for part in parts[1:]:
        ids += [config.mask_token, *tokenizer.encode(part).tolist()]
    if (limit := config.context_length) < len(ids):
        raise InputError(
            f"{text!r} has {counted(len(ids), 'token')}, but the model reads at most {limit}; shorten it"
        )
    read = torch.tensor(ids, device=loaded.model.token_embedding.weight.device)
    gaps = read == config.mask_token
    with torch.inference_mode():
        p = loaded.model(read[None])[0, gaps].cpu().double().softmax(-1)[:, : config.text_tokens]
    if not p.isfinite().all():
        raise InputError("the model's logits are not numbers; use another checkpoint")
    best = p.topk(min(guesses, config.text_tokens))
    read[gaps] = best.indices[:, 0].to(read.device)
    return Filled(
        tokenizer.decode(read.tolist()),
        [
            [(tokenizer.decode([id]), value) for id, value in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    )


def show_filled(loaded: LoadedModel, prompts: list[str], as_json: bool) -> None:
    """Print each prompt with its gaps filled, and below it what else could stand there."""
    show_what_can_be_shown()
    for prompt in prompts:
        text, gaps = fill_gaps(loaded, prompt)
        read = np.concatenate([loaded.tokenizer.encode(part) for part in prompt.split(GAP)])
        if told := unknown_told(loaded.tokenizer, read):
            print(f"generate: {visible(repr(prompt))}: {told}", file=sys.stderr)
        if as_json:
            print(json.dumps({"prompt": prompt, "text": text, "gaps": gaps}), flush=True)
            continue
        print(visible(text))
        for number, guesses in enumerate(gaps, 1):
            shown = (f"{token!r} {p:.1%}" for token, p in guesses)
            print(f"  gap {number}: {', '.join(shown)}", flush=True)


def refuse_writing(flags: Any, usual: Any) -> None:
    """Raises InputError for a flag, or one of a part, that is for writing."""
    for field in fields(flags):
        value, default = getattr(flags, field.name), getattr(usual, field.name)
        if is_dataclass(value):
            refuse_writing(value, default)
        elif value != default and field.name not in _READ:
            raise InputError(
                f"--{dashed(field.name)} is for writing, and this model is an encoder, which fills gaps; "
                "leave it out"
            )
