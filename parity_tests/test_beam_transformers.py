"""Beam search against that of transformers, on random models that are made there and read here.

Its `early_stopping` "never", False and True are `exact`, `estimate` and `full`; its num_beams=1 is greedy, as
a beam of width 1 is here. Where it differs: stop sequences of tokens, and phrases, it does not have; its sums
are of float32.
"""

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

from ref_numpy import beam as plain
from ref_numpy.config import BeamConfig
from torch_impl import beam as fast
from torch_impl.interop import from_hf
from torch_impl.transformer import Transformer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

MAPPED = {"exact": "never", "estimate": False, "full": True}
END, PADDING = 1, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[tuple[GPT2LMHeadModel, Callable]]:
    """Random models there, and here read from their folders: they write sequences of every length."""
    made = []
    for seed in range(4):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 7, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3}
        config = GPT2Config(**sizes, initializer_range=0.4, tie_word_embeddings=False)
        config.bos_token_id, config.eos_token_id = None, END
        folder = tmp_path_factory.mktemp("hf")
        GPT2LMHeadModel(config).eval().save_pretrained(folder)
        made.append((GPT2LMHeadModel.from_pretrained(folder).eval(), from_hf(folder)))
    return made


def search_with(model: Transformer, prompt: list[int], n_tokens: int, config: BeamConfig) -> list:
    def next_logits(tokens, parents):
        return model(tokens)[:, -1]

    return fast.beam_search(next_logits, torch.tensor(prompt), n_tokens, config)


PROMPTS = ([3, 6], [5, 2, 4, 0])


def agree_with_transformers(models, config: BeamConfig, n_tokens: int, prompts=PROMPTS, **options) -> None:
    """The n best of both sides are those of generate(), with their scores."""
    for (theirs, ours), prompt in product(models, prompts):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=config.width,
            num_return_sequences=config.n_best,
            length_penalty=config.length_penalty,
            early_stopping=MAPPED[config.early_stopping],
            eos_token_id=config.end_token,
            pad_token_id=PADDING,
            max_new_tokens=n_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )

        def next_logits(tokens, parents, ours=ours):
            return ours(torch.from_numpy(tokens))[:, -1].detach().numpy()

        found = search_with(ours, prompt, n_tokens, config)
        assert plain.beam_search(next_logits, np.array(prompt), n_tokens, config) == found
        for hypothesis, row, score in zip(found, out.sequences, out.sequences_scores, strict=True):
            tokens, padding = np.split(row[len(prompt) :].numpy(), [len(hypothesis.tokens)])
            assert hypothesis.tokens == tokens.tolist() and np.isin(padding, [PADDING, -1]).all()
            assert hypothesis.score == pytest.approx(score.item(), rel=1e-5)


@pytest.mark.parametrize("stopping", MAPPED)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [2, 5])
def test_beams_are_those_of_transformers(models, width, alpha, stopping):
    agree_with_transformers(models, BeamConfig(width, width - 1, alpha, stopping, END), 12)


@pytest.mark.parametrize("stopping", MAPPED)
def test_a_beam_of_width_1_is_the_greedy_search_of_transformers(models, stopping):
    for (theirs, ours), prompt in product(models, PROMPTS):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": PADDING, "eos_token_id": END}
        want = theirs.generate(ids, max_new_tokens=12, do_sample=False, **options)
        config = BeamConfig(1, early_stopping=stopping, end_token=END)
        assert search_with(ours, prompt, 12, config)[0].tokens == want[0, len(prompt) :].tolist()


def test_the_three_ways_to_stop_are_three(models):
    """Or the comparison above would not tell which is which; and sequences end before the last token."""
    found = {}
    for stopping in MAPPED:
        config = BeamConfig(2, length_penalty=1.0, early_stopping=stopping, end_token=END)
        found[stopping] = [
            search_with(ours, prompt, 12, config)[0] for _, ours in models for prompt in PROMPTS
        ]
        assert len({len(hypothesis.tokens) for hypothesis in found[stopping]}) > 1
    assert all(found[one] != found[two] for one, two in combinations(MAPPED, 2))


def test_forbidden_tokens_are_those_that_transformers_suppresses(models):
    config = BeamConfig(4, 2, end_token=END, forbidden=(0, 4))
    agree_with_transformers(models, config, 8, suppress_tokens=[0, 4])


class EndsWith(StoppingCriteria):
    """What transformers lacks: a stop sequence of tokens, after the prompt alone."""

    def __init__(self, stop: tuple[int, ...], start: int) -> None:
        self.stop, self.start = torch.tensor(stop), start

    def __call__(self, ids: torch.Tensor, scores: object, **options) -> torch.Tensor:
        length = len(self.stop)
        if ids.shape[1] < self.start + length:
            return torch.zeros(len(ids), dtype=torch.bool)
        return (ids[:, -length:] == self.stop).all(dim=1)


@pytest.mark.parametrize("stopping", MAPPED)
def test_stop_sequences_are_what_a_stopping_criterion_makes_of_them(models, stopping):
    """Each model with a pair of tokens that it likes to write."""
    for theirs, ours in models:
        prompt = torch.tensor([[4, 6]])
        free = theirs.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        stop = tuple(free[0, 4:6].tolist())
        config = BeamConfig(3, 2, 1.0, stopping, stop_sequences=(stop,))
        criteria = StoppingCriteriaList([EndsWith(stop, 2)])
        agree_with_transformers(
            [(theirs, ours)], config, 9, prompts=(prompt[0].tolist(),), stopping_criteria=criteria
        )
