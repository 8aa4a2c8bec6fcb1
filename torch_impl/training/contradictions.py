"""Settings that each are right, and do not fit together."""

from pathlib import Path

from torch_impl.training.config import TOKENIZERS, RunConfig
from torch_impl.training.counting import counted
from torch_impl.training.files import InputError, find_tokenizer
from torch_impl.training.presets import PRESETS


def refuse_contradictions(config: RunConfig) -> None:
    """Raises InputError where model, tokenizer, text and word vectors do not fit together."""
    kind, expected = config.model.architecture, PRESETS[config.preset].model.architecture
    if kind != expected == "encoder-decoder":
        raise InputError(
            f"preset {config.preset} is of pairs, which a model of architecture {kind} does not read; leave "
            "--architecture out, or use another preset"
        )
    if config.run.content == "conversations":
        if kind != "decoder":
            raise InputError(
                f"--content conversations is for a decoder, and the model is an {kind}; leave --architecture "
                "out, or name another --init-from"
            )
        if config.tokenizer.tokenizer in ("characters", "words"):
            raise InputError(
                f"--tokenizer {config.tokenizer.tokenizer} cannot write every text, as conversations need; "
                "use bpe or bytes"
            )
    if kind == "encoder-decoder" and config.tokenizer.special_tokens:
        raise InputError(
            f"--special-tokens {config.tokenizer.special_tokens[0]}: pairs have none beside the "
            "encoder-decoder's own; leave them out"
        )
    name = config.tokenizer.tokenizer
    if name not in TOKENIZERS and not find_tokenizer(Path(name))[0].is_file():
        raise InputError(
            f"--tokenizer {name}: no such file; use {', '.join(TOKENIZERS)}, or the path of a "
            "tokenizer.json, or of a folder with vocab.json and merges.txt"
        )
    _check_word_vectors(config)


def _check_word_vectors(config: RunConfig) -> None:
    """Raises InputError where word vectors, tokenizer and width do not fit together."""
    file, tokenizer, width = config.start.word_vectors, config.tokenizer.tokenizer, config.model.d_model
    if not file:
        if config.training.freeze_embeddings:
            raise InputError(
                "--freeze-embeddings would freeze random numbers; give it --word-vectors, or leave it out"
            )
        return
    if tokenizer in TOKENIZERS and tokenizer != "words":
        raise InputError(
            f"--word-vectors are of words, but the tokenizer is {tokenizer}; use --tokenizer words"
        )
    from torch_impl.training.word_vectors import vector_width  # imports torch

    has = vector_width(Path(file))
    if has != width:
        raise InputError(
            f"--word-vectors {file} have {counted(has, 'number')} each, but d_model is {width}; use "
            f"--d-model {has}" + (", and an --n-head that divides it" * (has % config.model.n_head > 0))
        )
