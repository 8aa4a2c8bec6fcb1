"""A model that answers: the tokens that it reads of a conversation, and those that it may write."""

from itertools import chain

import pytest
import torch

from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.conversation import SPECIAL_TOKENS, Message, turn_tokens
from torch_impl.generate import generate_batch
from torch_impl.training.dialogue import Dialogue
from torch_impl.training.files import InputError
from torch_impl.training.growth import with_chat_tokens
from torch_impl.training.tokenizer import ByteTokenizer, CharacterTokenizer
from torch_impl.transformer import initialised

TOKENIZER = with_chat_tokens(ByteTokenizer())
SYSTEM, USER, ASSISTANT, END = (TOKENIZER.special_tokens[token] for token in SPECIAL_TOKENS)


def dialogue_of(context_length: int = 64) -> Dialogue:
    """With a model that has learned nothing."""
    config = ModelConfig(vocab_size=260, context_length=context_length, n_layer=2, n_head=2, d_model=16)
    return Dialogue(initialised(config, 5), TOKENIZER)


def prompt_of(*turns: tuple[str, str]) -> list[int]:
    special = TOKENIZER.special_tokens
    ids = [turn_tokens(Message(*turn), TOKENIZER.encode, special).ids.tolist() for turn in turns]
    return [*chain(*ids), ASSISTANT]


def test_an_answer_is_what_generate_writes_without_special_tokens():
    """Over several turns with one cache, each with a stream of its own."""
    dialogue, turns = dialogue_of(64), []
    forbidden = SamplingConfig(1.5, forbidden=(SYSTEM, USER, ASSISTANT, END))
    for n, text in enumerate(("Hi", "What is it?", "Well")):
        prompt, left_out = dialogue.prompt([*turns, Message("user", text)], 12)
        got = list(dialogue.answer(prompt, 12, SamplingConfig(1.5, forbidden=(END,)), seed=3, stream=n))
        want = generate_batch(dialogue.model, [torch.tensor(prompt)], 12, forbidden, seed=3, streams=[n])
        assert got == [token for (token,) in want]
        assert left_out == (0, 0, 1)[n]
        turns += [Message("user", text), Message("assistant", TOKENIZER.decode(got))]


def test_what_was_read_is_not_read_again(monkeypatch):
    dialogue, read = dialogue_of(64), []
    forward = dialogue.model.forward
    monkeypatch.setattr(
        dialogue.model, "forward", lambda ids, **how: (read.append(ids.numel()), forward(ids, **how))[1]
    )
    greedy = SamplingConfig(temperature=0.0)
    first = prompt_of(("user", "Hello"))
    said = [*dialogue.answer(first, 6, greedy, seed=0)]
    assert read == [len(first), 1, 1, 1, 1, 1]
    read.clear()
    longer = [*first, *said, END, *prompt_of(("user", "b"))]
    again = next(dialogue.answer(longer, 6, greedy, seed=0))
    assert read == [len(longer) - len(first) - 5]  # the last token that was written had not been read
    assert next(dialogue_of(64).answer(longer, 6, greedy, seed=0)) == again


def test_an_answer_ends_where_the_context_does():
    dialogue = dialogue_of(24)
    prompt = prompt_of(("user", "Hello"))
    answer = list(dialogue.answer(prompt, 99, SamplingConfig(forbidden=(END,)), seed=0))
    assert len(prompt) + len(answer) == 25


def test_the_end_is_not_the_first_token_and_special_tokens_are_never_written():
    """With weights that make the four special tokens the likeliest of all."""
    dialogue = dialogue_of(24)
    with torch.no_grad():
        dialogue.model.token_embedding.weight[256:] *= 50
    for seed in range(5):
        answer = list(dialogue.answer(prompt_of(("user", "x")), 8, SamplingConfig(), seed))
        assert answer[0] < 256 and all(id == END or id < 256 for id in answer)


def test_a_model_without_the_tokens_of_conversations_has_no_dialogue():
    with pytest.raises(InputError, match="tune it with train_gpu"):
        Dialogue(initialised(ModelConfig(vocab_size=2), 0), CharacterTokenizer("a"))
