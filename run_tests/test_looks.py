"""Looks inside a model while it trains: what TensorBoard gets of them, and that they change nothing."""

import io
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ref_numpy.config import ModelConfig
from ref_numpy.parameters import parameter_shapes
from run_tests.conftest import content
from torch_impl.seq2seq import make_model
from torch_impl.training.attention_maps import attention_maps, draw_attention
from torch_impl.training.config import RunSettings, read_config
from torch_impl.training.events import TensorBoardEvents
from torch_impl.training.looks import look_is_due
from torch_impl.training.tokenizer import ByteTokenizer


def events_in(folder: str) -> EventAccumulator:
    return EventAccumulator(folder, size_guidance={"images": 0, "tensors": 0, "histograms": 0}).Reload()


def test_a_run_shows_samples_maps_and_histograms_and_stays_the_same(small_run, cli):
    flags = ("--n-layer", 2, "--optimizer", "muon")
    assert small_run("--out", "plain", *flags).code == 0
    assert small_run("--out", "seen", *flags, "--looks", 2).code == 0
    plain, seen = content(Path("plain")), content(Path("seen"))
    for files in (plain, seen):
        for name in ("last", "best"):
            files[str(Path(name) / "config.json")]["run"]["looks"] = None
    assert plain == seen
    assert cli("--resume", "seen", "--steps", 14).code == 0

    shown = events_in("seen/tensorboard")
    steps = [0, 8, 12, 14]
    assert [event.step for event in shown.Tensors("sample/text_summary")] == steps
    for layer in (1, 2):
        pictures = shown.Images(f"self-attention/layer {layer:02}")
        assert [event.step for event in pictures] == steps
        colours = matplotlib.image.imread(io.BytesIO(pictures[-1].encoded_image_string))
        assert colours.shape == (pictures[-1].height, pictures[-1].width, 4) and np.ptp(colours) > 0.5
    for name, shape in parameter_shapes(read_config(Path("seen/last")).model).items():
        for tag, wanted in ((f"parameters/{name}", steps), (f"gradients, averaged/{name}", steps[1:])):
            found = shown.Histograms(tag)
            assert [event.step for event in found] == wanted
            value = found[-1].histogram_value
            assert sum(value.bucket) == value.num == math.prod(shape)
    assert events_in("plain/tensorboard").Tags()["images"] == []


@given(st.integers(1, 300), st.integers(1, 100), st.integers(0, 20), st.integers(0, 300))
def test_looks_are_spread_over_the_evaluations(steps, eval_every, looks, resumed_at):
    settings = RunSettings(eval_every=eval_every, looks=looks)
    evaluations = sorted({*range(0, steps + 1, eval_every), steps})
    seen = [step for step in evaluations if look_is_due(step, steps, settings)]
    if looks == 0:
        assert seen == []
        return
    assert seen[0] == 0 and seen[-1] == steps and len(seen) <= looks + 1
    if looks >= steps:
        assert seen == evaluations
    apart = np.diff(seen)
    assert (apart <= steps / looks + eval_every).all()


def words(config: ModelConfig, *lengths: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randint(config.text_tokens, (1, n), generator=random) for n in lengths)


def maps_of(changes: dict, *lengths: int, still: bool = False) -> list:
    config = ModelConfig(vocab_size=260, context_length=16, n_layer=2, n_head=4, d_model=16, **changes)
    config = replace(config, vocab_size=256 + config.added_tokens)
    model = make_model(config)
    model.initialise(0)
    if still:  # all queries are 0, so that all scores are
        for block in model.blocks:
            torch.nn.init.zeros_(block.attention.qkv.weight)
    passage = words(config, *lengths)
    if len(passage) == 2:
        passage[1][0, 0] = config.begin_token
        passage = (passage[0], torch.ones_like(passage[0], dtype=torch.bool), passage[1])
    before = model(*passage)
    maps = attention_maps(model, ByteTokenizer(), passage)
    assert torch.equal(model(*passage), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for found in maps:
        assert found.weights.sum(-1) == pytest.approx(1, abs=1e-5) and (found.weights >= 0).all()
        assert found.weights.shape[1:] == (len(found.queries), len(found.keys))
    assert draw_attention(maps).startswith(b"\x89PNG")
    return maps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "rope", "n_kv_head": 2, "qk_norm": True},
        {"positions": "alibi"},
        {"attention_pattern": "local, full", "window": 3},
    ],
)
def test_no_head_of_a_decoder_sees_what_comes_later(changes):
    first, second = maps_of(changes, 11)
    for found in (first, second):
        assert (np.triu(found.weights, 1) == 0).all() and found.weights.shape == (4, 11, 11)
    if "window" in changes:
        assert (np.tril(first.weights, -3) == 0).all() and (np.tril(second.weights, -3) > 0).any()


def test_heads_without_a_preference_look_at_all_alike():
    for found in maps_of({}, 9, still=True):
        assert found.weights == pytest.approx(
            np.broadcast_to(np.tri(9) / np.arange(1, 10)[:, None], (4, 9, 9))
        )
    for found in maps_of({"architecture": "encoder"}, 9, still=True):
        assert found.weights == pytest.approx(np.full((4, 9, 9), 1 / 9))


def test_an_encoder_decoder_has_maps_of_three_kinds():
    maps = maps_of({"architecture": "encoder-decoder"}, 7, 5)
    kinds = ["the source looks at itself", "the target looks at itself", "the target looks at the source"]
    assert [(found.kind, found.layer) for found in maps] == [(kind, n) for kind in kinds for n in (1, 2)]
    assert [found.weights.shape[1:] for found in maps[::2]] == [(7, 7), (5, 5), (5, 7)]
    assert maps[-1].queries[0] == "<begin>" and maps[0].queries[0] != "<begin>"


@pytest.mark.filterwarnings("error")
def test_tokens_that_mean_something_to_the_picture_are_drawn_as_they_are():
    """Dollars begin a formula, and fonts lack characters."""
    maps = maps_of({}, 4)
    labels = ["$\\frac", "$x$", "漢", "\x1b"]
    assert draw_attention([found._replace(queries=labels, keys=labels) for found in maps])


@given(st.lists(st.floats(width=32), max_size=20))
def test_a_histogram_counts_every_number_that_is_one(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("events")
    events = TensorBoardEvents(folder, 0)
    events.histogram(3, "numbers", torch.tensor(numbers))
    events.close()
    most = float(np.float32(1e18))  # which is the float below 1e18
    finite = [number for number in numbers if abs(number) < most]
    told = events_in(str(folder)).Tags()["histograms"]
    assert told == ["numbers"] * bool(finite)
    if finite:
        value = events_in(str(folder)).Histograms("numbers")[0].histogram_value
        assert sum(value.bucket) == len(finite) == value.num and len(value.bucket) == len(value.bucket_limit)


def test_a_histogram_has_the_shape_of_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_impl.training.events._AT_ONCE", 1000)
    numbers = torch.randn(4321, generator=torch.Generator().manual_seed(0))
    events = TensorBoardEvents(tmp_path / "events", 0)
    events.histogram(3, "numbers", numbers.reshape(29, 149))
    events.close()
    value = events_in(str(tmp_path / "events")).Histograms("numbers")[0].histogram_value
    counts, limits = np.histogram(numbers.numpy(), 64)
    assert np.abs(np.array(value.bucket) - counts).max() <= 1  # of one that lies on a limit
    assert list(value.bucket_limit) == pytest.approx(limits[1:].tolist(), abs=1e-5)
    assert value.sum == pytest.approx(numbers.sum().item()) and value.num == 4321


def test_a_text_is_shown_as_it_is(tmp_path):
    """TensorBoard reads Markdown, of which an untrained model writes some by accident."""
    events = TensorBoardEvents(tmp_path / "events", 0)
    events.text(0, "sample", "# no heading\n<b>no tag</b>")
    events.close()
    (shown,) = events_in(str(tmp_path / "events")).Tensors("sample/text_summary")
    assert shown.tensor_proto.string_val[0] == b"    # no heading\n    <b>no tag</b>"
