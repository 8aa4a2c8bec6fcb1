"""Generation: the same text from the same model and seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parity_tests.strategies import model_configs, model_params, sampling_configs, seeds
from ref_numpy.config import ModelConfig, SamplingConfig
from ref_numpy.generate import answer, context_start, generate, generate_batch
from ref_numpy.transformer import transformer_forward
from torch_impl import generate as fast
from torch_impl.pairs import greedy_targets
from torch_impl.seq2seq import make_model
from torch_impl.transformer import Transformer


def model_of(config: ModelConfig, params: dict[str, np.ndarray]) -> Transformer:
    model = Transformer(config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    return model


decoders = model_configs(architectures=("decoder",))


@given(config=decoders, seed=seeds, prompt=st.integers(1, 15), sampling=sampling_configs())
def test_parity(agree, config, seed, prompt, sampling):
    """Every token of a text, also beyond the context length, where the oldest tokens fall out of sight."""
    ids = np.random.default_rng(seed).integers(config.vocab_size, size=prompt)
    case = {"params": model_params(config, seed), "prompt": ids, "config": config, "n_tokens": 9}
    agree("generate", **case, sampling=sampling, seed=seed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("same_work", [True, False])
def test_no_token_is_chosen_where_logits_are_not_numbers(temperature, same_work):
    """The likeliest of NaN was a token. And with same_work the next step looked up what is none, before it
    was read: on a GPU that ends the process."""
    config = ModelConfig(vocab_size=7, context_length=8, n_layer=1, n_head=1, d_model=4)
    params, sampling = model_params(config, 0), SamplingConfig(temperature, repetition_penalty=1.3)
    params["norm.weight"][:] = np.nan
    with pytest.raises(ValueError, match="logits are not numbers"):
        list(generate(params, np.array([1, 2]), config, 3, sampling))
    prompts = [torch.tensor([1, 2])]
    with pytest.raises(ValueError, match="logits are not numbers"):
        list(fast.generate_batch(model_of(config, params), prompts, 3, sampling, same_work=same_work))


@given(config=decoders, seed=seeds, sampling=sampling_configs())
@settings(max_examples=8)
def test_a_batch_of_prompts_gives_what_each_gives_alone(config, seed, sampling):
    """Prompts of unequal length, one of them beyond the context; each with its own random numbers."""
    params, random = model_params(config, seed), np.random.default_rng(seed)
    prompts = [random.integers(config.vocab_size, size=size) for size in (3, 1, 13, 6)]
    streams = [0, 5, 0, 2]
    want = [
        [tokens[0] for tokens in generate_batch(params, [prompt], config, 7, sampling, seed, [stream])]
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    together = list(generate_batch(params, prompts, config, 7, sampling, seed, streams))
    assert [list(texts) for texts in zip(*together, strict=True)] == want
    tensors = [torch.from_numpy(prompt) for prompt in prompts]
    got = fast.generate_batch(model_of(config, params), tensors, 7, sampling, seed, streams)
    assert list(got) == together


@given(config=decoders, seed=seeds, sampling=sampling_configs(), prompt=st.sampled_from([1, 6, 13]))
@settings(max_examples=15)
def test_steps_that_all_do_the_same_write_the_same(ours, config, seed, sampling, prompt):
    """What CUDA replays as one graph: shapes and places do not depend on how much is written.

    A prompt that leaves room for one token has none for first runs that come one after the other.
    """
    params, random = model_params(config, seed), np.random.default_rng(seed)
    model = model_of(config, params).to(ours.runs_on("generate", "float64"))
    prompts = [torch.from_numpy(random.integers(config.vocab_size, size=prompt)) for _ in range(2)]
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    texts = {}
    for same, logits in seen.items():
        observe = lambda step, logits=logits: logits.append(step.clone())  # noqa: E731
        tokens = fast.generate_batch(model, prompts, 11, sampling, seed, [0, 3], observe, same_work=same)
        texts[same] = list(tokens)
    assert texts[True] == texts[False] and len(texts[True]) == 11
    torch.testing.assert_close(torch.stack(seen[True]), torch.stack(seen[False]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("same_work", [True, False])
def test_a_token_has_its_own_random_number_however_many_are_drawn_ahead(monkeypatch, same_work):
    """Of long texts, for which they are drawn more than once."""
    config = ModelConfig(vocab_size=50, context_length=8, n_layer=1, n_head=1, d_model=4)
    params, prompts = model_params(config, 0), [np.array([1, 2]), np.array([3, 4])]
    want = list(generate_batch(params, prompts, config, 12, SamplingConfig(), 7, [0, 2]))
    monkeypatch.setattr(fast, "_DRAWN_AHEAD", 5)
    tensors = [torch.from_numpy(prompt) for prompt in prompts]
    got = fast.generate_batch(
        model_of(config, params), tensors, 12, SamplingConfig(), 7, [0, 2], same_work=same_work
    )
    assert list(got) == want


def test_room_that_nothing_was_written_to_has_no_say(monkeypatch):
    """Memory that is new may hold NaN, which no mask takes off: once in a while a token was drawn from it."""
    config = ModelConfig(vocab_size=5, context_length=9, n_layer=1, n_head=1, d_model=4)
    model, empty = model_of(config, model_params(config, 0)), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
    prompts = [torch.tensor([1, 2])]
    same, anew = (list(fast.generate_batch(model, prompts, 5, same_work=work)) for work in (True, False))
    assert same == anew


@given(
    config=model_configs(architectures=("encoder-decoder",)),
    seed=seeds,
    length=st.integers(1, 7),
    sampling=sampling_configs(),
)
@example(
    config=ModelConfig("encoder-decoder", vocab_size=7, context_length=7, n_layer=1, n_head=2, d_model=8),
    seed=138,  # ends after two tokens, and greedily after four
    length=4,
    sampling=SamplingConfig(),
)
@example(
    config=ModelConfig("encoder-decoder", vocab_size=7, context_length=7, n_layer=1, n_head=2, d_model=8),
    seed=2,
    length=4,
    sampling=SamplingConfig(repetition_penalty=1e6),  # each token once, the first one too
)
@settings(max_examples=settings().max_examples // 3)  # without a cache, each takes its time
def test_answers_are_equal(config, seed, length, sampling):
    """They end before n_tokens where the model ends them, and where the context does."""
    if config.text_tokens < 5:
        sampling = replace(sampling, forbidden=())  # of two tokens none would be left
    params = model_params(config, seed)
    source = np.random.default_rng(seed).integers(config.text_tokens, size=length)
    want = list(answer(params, source, config, 20, sampling, seed))
    model = make_model(config, torch.float64).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    assert list(fast.answer(model, torch.from_numpy(source), 20, sampling, seed)) == want
    assert len(want) <= config.context_length and max(want, default=0) < config.text_tokens
    assert list(answer(params, source, config, 2, sampling, seed)) == want[:2]
    greedy = SamplingConfig(temperature=0.0)
    ids = torch.from_numpy(source)[None]
    written = greedy_targets(model, ids, torch.ones_like(ids, dtype=torch.bool), config.context_length)[0]
    shown = list(answer(params, source, config, config.context_length, greedy))
    assert written.tolist() == shown + [config.padding_token] * (config.context_length - len(shown))


@pytest.mark.parametrize("length", [0, 8])
def test_a_source_that_cannot_be_read_is_refused(length):
    config = ModelConfig("encoder-decoder", vocab_size=9, context_length=7, n_layer=1, n_head=1, d_model=2)
    params = model_params(config, 0)
    model = make_model(config)
    for tokens in (
        answer(params, np.zeros(length, int), config, 1),
        fast.answer(model, torch.zeros(length, dtype=torch.long), 1),
    ):
        with pytest.raises(ValueError, match=f"the source has {length} tokens, not 1 to 7"):
            next(tokens)


def test_greedy_text_is_the_most_likely_next_token_again_and_again():
    """No cache here. Context 4: it holds the whole text, then moves on by 2 tokens at a time."""
    config = ModelConfig(vocab_size=11, context_length=4, n_layer=1, n_head=1, d_model=6)
    params = model_params(config, 3)
    ids, starts = [1, 2], iter([0, 0, 0, 2, 2, 4, 4, 6])
    for token in generate(params, np.array(ids), config, 8, SamplingConfig(temperature=0.0)):
        context = np.array(ids[next(starts) :])[None]
        logits, _ = transformer_forward(params, context, config)
        assert token == logits[0, -1].argmax()
        ids.append(token)


@given(length=st.integers(1, 100), context_length=st.integers(1, 20))
@example(length=1, context_length=2)  # which moves on by single tokens, though not yet
def test_a_context_holds_at_least_half_of_what_it_could(length, context_length):
    start = context_start(length, context_length)
    assert start == fast.context_start(length, context_length)
    assert min(length, (context_length + 1) // 2) <= length - start <= context_length


def test_an_encoder_does_not_write():
    config = ModelConfig(architecture="encoder", vocab_size=3, context_length=4, n_head=1, d_model=2)
    params, message = model_params(config, 0), "an encoder does not continue a text; only a decoder does"
    model = model_of(config, params)
    for texts in (generate(params, np.array([1]), config, 1), fast.generate(model, torch.tensor([1]), 1)):
        with pytest.raises(ValueError, match=message):
            next(texts)
    with pytest.raises(ValueError, match="this encoder does not answer; only an encoder-decoder does"):
        next(answer(params, np.array([1]), config, 1))


def test_an_empty_prompt_is_refused():
    config = ModelConfig(vocab_size=3, context_length=4, n_layer=1, n_head=1, d_model=2)
    params = model_params(config, 0)
    for texts in (
        generate(params, np.array([], int), config, 1),
        fast.generate(model_of(config, params), torch.tensor([], dtype=torch.long), 1),
    ):
        with pytest.raises(ValueError, match="the prompt is empty"):
            next(texts)
    for texts in (
        generate_batch(params, [], config, 1),
        fast.generate_batch(model_of(config, params), [], 1),
    ):
        with pytest.raises(ValueError, match="there are no prompts"):
            next(texts)


@pytest.mark.parametrize("id", [-1, 5, 99])
def test_a_prompt_that_is_not_of_the_vocabulary_is_refused(id):
    """One side went on from the last token of the vocabulary instead."""
    config = ModelConfig(vocab_size=5, context_length=8, n_layer=1, n_head=1, d_model=4)
    params = model_params(config, 0)
    with pytest.raises(ValueError, match=f"token id {id} is outside the vocabulary of 5"):
        next(generate(params, np.array([1, id]), config, 1))
    with pytest.raises(ValueError, match=f"token id {id} is outside the vocabulary of 5"):
        next(fast.generate(model_of(config, params), torch.tensor([1, id]), 1))


def test_each_prompt_needs_a_stream():
    config = ModelConfig(vocab_size=5, context_length=8, n_layer=1, n_head=1, d_model=4)
    params, ids = model_params(config, 0), np.array([1])
    prompts = [torch.from_numpy(ids)] * 2
    for streams in ([0], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"{len(streams)} streams for 2 prompts"):
            next(generate_batch(params, [ids, ids], config, 1, streams=streams))
        with pytest.raises(ValueError, match=f"{len(streams)} streams for 2 prompts"):
            next(fast.generate_batch(model_of(config, params), prompts, 1, streams=streams))


def test_without_a_seed_it_is_0_and_each_prompt_has_its_stream():
    config = ModelConfig(vocab_size=7, context_length=5, n_layer=1, n_head=1, d_model=4)
    params, prompts = model_params(config, 0), [np.array([1]), np.array([2, 3])]
    assert [*generate_batch(params, prompts, config, 5)] == [
        *generate_batch(params, prompts, config, 5, seed=0)
    ]
    assert [*generate(params, prompts[0], config, 5)] == [*generate(params, prompts[0], config, 5, seed=0)]
    model, tensors = model_of(config, params), list(map(torch.from_numpy, prompts))
    assert [*fast.generate_batch(model, tensors, 5)] == [*generate_batch(params, prompts, config, 5)]
    assert [*fast.generate(model, tensors[0], 5)] == [*generate(params, prompts[0], config, 5)]
    config = replace(config, architecture="encoder-decoder")
    params = model_params(config, 0)
    answers = [[*answer(params, prompts[1], config, 5, **seed)] for seed in ({}, {"seed": 0}, {"seed": 1})]
    assert answers[0] == answers[1] != answers[2]


def test_a_source_may_be_as_long_as_the_context():
    config = ModelConfig(
        architecture="encoder-decoder", vocab_size=7, context_length=5, n_layer=1, n_head=1, d_model=4
    )
    assert len([*answer(model_params(config, 0), np.ones(5, int), config, 3)]) <= 3
