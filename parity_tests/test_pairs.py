"""Pairs: the same batches on both sides, one training run, and answers that are judged rightly."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.strategies import model_configs, model_params, seeds
from parity_tests.test_train import TRAINING, require_one_trajectory, state_of
from ref_numpy.config import ModelConfig, TrainConfig
from ref_numpy.generate import SamplingConfig, answer
from ref_numpy.loss import IGNORE, cross_entropy_forward
from ref_numpy.pairs import make_pairs, sample_pairs, teacher_forced
from ref_numpy.seq2seq import seq2seq_forward
from torch_impl import pairs as fast
from torch_impl.seq2seq import Seq2Seq
from torch_impl.training.ranks import Ranks

MODEL = ModelConfig(
    "encoder-decoder", vocab_size=15, context_length=9, n_layer=1, n_head=3, d_model=12, dropout=0.1
)
PAIRED = model_configs(architectures=("encoder-decoder",))
GREEDY = SamplingConfig(temperature=0.0)


def some_ids(config: ModelConfig, seed: int, count: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sources and targets of different lengths, the shortest and the longest among them."""
    random, limit = np.random.default_rng(seed), config.context_length

    def ids(lengths: np.ndarray) -> list[np.ndarray]:
        return [random.integers(config.text_tokens, size=length) for length in lengths]

    sources, targets = random.integers(1, limit + 1, size=count), random.integers(limit, size=count)
    sources[:2], targets[:2] = (1, limit), (limit - 1, 0)
    return ids(sources), ids(targets)


def on_both_sides(config: ModelConfig, sources: list, targets: list) -> tuple:
    in_torch = [[torch.from_numpy(ids) for ids in side] for side in (sources, targets)]
    return make_pairs(sources, targets, config), fast.make_pairs(*in_torch, config)


@given(config=PAIRED, seed=seeds, step=st.integers(0, 2**32 - 1), micro_batches=st.sampled_from([1, 2, 3]))
def test_batches_are_equal(config, seed, step, micro_batches):
    training = TrainConfig(batch_size=6, micro_batches=micro_batches, seed=seed)
    pairs, fast_pairs = on_both_sides(config, *some_ids(config, seed))
    want = sample_pairs(pairs, config, step, training)
    for given_step in (step, torch.tensor(step)):
        got = fast.sample_pairs(fast_pairs, config, given_step, training)
        assert got._fields == want._fields
        for a, b in zip(got, want, strict=True):
            assert a.tolist() == b.tolist()


@given(config=PAIRED, seed=seeds)
def test_a_batch_holds_the_pairs_and_counts_each_token_of_a_target_and_its_end(config, seed):
    sources, targets = some_ids(config, seed)
    pairs, _ = on_both_sides(config, sources, targets)
    batch = teacher_forced(*pairs, config)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        n = len(target)
        assert batch.source[row, batch.present[row]].tolist() == source.tolist()
        assert batch.target_in[row, : n + 1].tolist() == [config.begin_token, *target]
        assert batch.target_out[row, : n + 1].tolist() == [*target, config.end_token]
        assert (batch.target_out[row, n + 1 :] == IGNORE).all()


def test_every_pair_is_drawn():
    config = replace(MODEL, vocab_size=1003)
    ids = [np.array([n]) for n in range(7)]
    pairs, _ = on_both_sides(config, ids, ids)
    batch = sample_pairs(pairs, config, 0, TrainConfig(batch_size=7000))
    found, counts = np.unique(batch.source, return_counts=True)
    assert found.tolist() == list(range(7))
    assert (np.abs(counts - 1000) < 6 * np.sqrt(7000 / 7 * 6 / 7)).all()
    assert (batch.target_out[..., :1] == batch.source).all()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (0, 1, "the source of pair 2 has 0 tokens, not 1 to 9"),
        (10, 1, "the source of pair 2 has 10 tokens, not 1 to 9"),
        (1, 9, "the target of pair 2 has 9 tokens, not 0 to 8"),
        (1, 10, "the target of pair 2 has 10 tokens, not 0 to 8"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_on_both_sides(source, target, message):
    for make, ones in ((make_pairs, np.ones), (fast.make_pairs, torch.ones)):
        kind = int if ones is np.ones else torch.long
        fine, odd, end = (ones(n, dtype=kind) for n in (3, source, target))
        with pytest.raises(ValueError, match=message):
            make([fine, odd], [fine, end], MODEL)
        with pytest.raises(ValueError, match="shorter"):  # a source without its target
            make([fine, fine], [fine], MODEL)
        with pytest.raises(ValueError, match="there are no pairs"):
            make([], [], MODEL)


def test_thirty_steps_agree(ours):
    """Targets of different lengths: each third of a batch counts another number of tokens."""
    sources, _ = some_ids(MODEL, 5, count=40)
    targets = [source[:-1] // 6 for source in sources]
    pairs, fast_pairs = on_both_sides(MODEL, sources, targets)
    config = replace(TRAINING, steps=30, label_smoothing=0.05)
    sample = partial(sample_pairs, pairs, MODEL)
    require_one_trajectory(ours, MODEL, config, sample, partial(fast.sample_pairs, fast_pairs, MODEL))


@settings(max_examples=3)
@given(config=PAIRED, seed=seeds, batch_size=st.sampled_from([1, 3, 8]))
def test_evaluation_judges_as_the_reference_writes(config, seed, batch_size):
    """Some targets are what the model writes of itself, and those alone are exact."""
    params = model_params(config, seed)
    sources, targets = some_ids(config, seed)
    T = config.context_length
    for row in (2, 5):
        targets[row] = np.array([*answer(params, sources[row], config, T - 1, GREEDY)], int)
    pairs, fast_pairs = on_both_sides(config, sources, targets)
    batch = teacher_forced(*pairs, config)
    logits, _ = seq2seq_forward(params, *batch[:3], config)
    loss, _ = cross_entropy_forward(logits, batch.target_out)
    exact = [
        [*answer(params, source, config, T, GREEDY)] == target.tolist()
        for source, target in zip(sources, targets, strict=True)
    ]
    got = fast.evaluate_pairs(state_of(params, config, TRAINING).model, fast_pairs, batch_size)
    assert got.loss == pytest.approx(loss, rel=1e-9)
    assert got.exact_match == np.mean(exact)


class Scripted(Seq2Seq):
    """Writes the tokens that it was told to."""

    def encode(self, source, present, key=None):
        return torch.zeros(*source.shape, self.config.d_model)

    def decode(self, target, memory, present, key=None):
        wanted = torch.tensor(self.script[: target.shape[1]]).expand(len(target), -1)
        return torch.nn.functional.one_hot(wanted, self.config.vocab_size).float()


def test_from_its_end_on_a_target_is_padding():
    """What a model writes behind the end is no part of the target, nor is a second end. Begin and padding are
    never written: a model that wants to writes the next best, here of equals the first."""
    model, padding = Scripted(MODEL), MODEL.padding_token
    model.script = [3, MODEL.begin_token, padding, MODEL.end_token, 4, MODEL.end_token, 5]
    source = torch.zeros(2, 3, dtype=torch.long)
    written = fast.greedy_targets(model, source, torch.ones_like(source).bool(), 7)
    assert written.tolist() == 2 * [[3, 0, 0, *4 * [padding]]]


def test_a_target_is_exact_where_every_token_is_right():
    model = Scripted(MODEL)
    model.script = [3, 1, MODEL.end_token, *9 * [4]]
    sources = [np.array([1])] * 4
    targets = [np.array(target) for target in ([3, 1], [3, 2], [3], [3, 1, 2])]
    _, pairs = on_both_sides(MODEL, sources, targets)
    assert fast.evaluate_pairs(model, pairs).exact_match == 1 / 4


def test_what_processes_find_adds_up_to_what_one_finds(monkeypatch):
    """Four pairs among three: two of the processes do the last one as well, which is exact, for nothing."""
    model, shares = Scripted(MODEL), []
    model.script = [3, 1, MODEL.end_token, *9 * [4]]
    targets = [np.array(target) for target in ([3, 2], [3], [3, 1, 2], [3, 1])]
    _, pairs = on_both_sides(MODEL, [np.array([1])] * 4, targets)
    monkeypatch.setattr(Ranks, "total", lambda self, share: shares.append(share) or share)
    for ranks in (Ranks(), *(Ranks(rank, 3) for rank in range(3))):
        fast.evaluate_pairs(model, pairs, batch_size=1, ranks=ranks)
    alone, *each = shares
    assert alone[-1] == 1
    assert sum(each)[1:].tolist() == alone[1:].tolist()  # what counts, and what is right


def test_an_evaluation_of_a_part_reads_the_first_pairs():
    sources, targets = some_ids(MODEL, 1)
    params = model_params(MODEL, 1)
    model = state_of(params, MODEL, TRAINING).model
    _, pairs = on_both_sides(MODEL, sources, targets)
    width = pairs.source.shape[1] + pairs.target.shape[1]
    for tokens, n in ((1, 1), (width, 1), (2 * width - 1, 1), (3 * width, 3), (5 * width, 5)):
        first = fast.Pairs(*(side[:n] for side in pairs))
        assert fast.evaluate_pairs(model, pairs, max_tokens=tokens) == fast.evaluate_pairs(model, first)
