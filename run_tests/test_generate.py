"""Writing with a trained model from the command line."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from statistics import mean

import pytest
import torch

from ref_numpy.config import SamplingConfig
from torch_impl.generate import generate
from torch_impl.sampling import sample_token
from torch_impl.training import generate_command
from torch_impl.training.checkpoint import load_model
from torch_impl.training.tokenizer import parse_tokenizer
from torch_impl.training.writing import Writer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(small_run, call_main):
    """Trains the small run, and then writes with it."""
    assert small_run("--out", "run").code == 0
    return partial(call_main, generate_command.main)


def test_it_goes_on_from_the_prompt_and_the_seed_decides(write):
    flags = ("--model", "run", "--prompt", "The quick", "--max-new-tokens", 40)
    code, text, _ = write(*flags)
    assert code == 0 and text.startswith("The quick") and text.endswith("\n")
    assert write(*flags)[1] == text
    assert write(*flags, "--seed", 1)[1] != text


def test_temperature_0_always_takes_the_likeliest(write):
    flags = ("--model", "run/last", "--temperature", 0, "--max-new-tokens", 20)
    assert write(*flags)[1] == write(*flags, "--seed", 5)[1]


@pytest.mark.parametrize(("precision", "read_in"), [("tf32", "float32"), ("float8", "bfloat16")])
def test_a_run_with_products_of_another_format_is_read_in_the_format_of_all_the_rest(
    write, precision, read_in
):
    """Trained on a GPU that has them, it once could not be used on a machine without."""
    flags, path = ("--model", "run", "--max-new-tokens", 20, "--device", "cpu"), Path("run/best/config.json")
    written = {}
    for each in (precision, read_in):
        config = json.loads(path.read_bytes())
        config["run"]["precision"] = each
        path.write_text(json.dumps(config), encoding="utf-8")
        written[each] = write(*flags)
    assert written[precision] == written[read_in] and written[precision][0] == 0


def test_best_is_taken_before_last_and_a_checkpoint_when_it_is_named(write):
    flags = ("--prompt", "a", "--max-new-tokens", 20)
    best = write("--model", "run/best", *flags)[1]
    assert write("--model", "run", *flags)[1] == best
    shutil.rmtree("run/best")
    assert write("--model", "run", *flags)[1] == write("--model", "run/last", *flags)[1]


def test_a_checkpoint_whose_writer_was_killed_between_its_renames_is_found(write):
    flags = ("--model", "run", "--max-new-tokens", 20)
    text = write(*flags)[1]
    for name in ("best.being-replaced", "best.old"):  # what an earlier version called it
        Path("run/best").rename(f"run/{name}")
        assert write(*flags)[1] == text
        Path(f"run/{name}").rename("run/best")  # reading must not tidy up under a run that writes


def test_characters_of_several_bytes_come_whole(write, monkeypatch):
    """A dash is three tokens; the terminal must never get a third of it. A lone byte is no character."""
    dash = list("–".encode())
    tokens = iter([[token] for token in [*dash, 0xE2, 0x41, 0xC3]])
    monkeypatch.setattr(generate_command, "generate_batch", lambda *_: tokens)
    written = []
    monkeypatch.setattr("builtins.print", lambda *values, **_: written.extend(values))
    assert write("--model", "run", "--prompt", "x")[0] == 0
    assert [part for part in written if part] == ["x", "–", "\ufffdA", "\ufffd"]


def test_the_prompt_is_cut_to_the_context(write):
    assert write("--model", "run", "--prompt", "long " * 50, "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "nowhere"], "nowhere is no folder"),
        (["--model", "."], "holds no finished checkpoint"),
        (["--model", "run", "--temperature", "-1"], "temperature is -1.0"),
        (["--model", "run", "--temperature", "nan"], "temperature is nan"),
        (["--model", "run", "--temperature", "1e-320"], "must be 0 (greedy) or at least 1e-9"),
        (["--model", "run", "--repetition-penalty", "1e-320"], "must lie in [1e-9, 1e9]"),
        (["--model", "run", "--top-p", "0"], "top_p is 0.0, but must lie in (0, 1]"),
        (["--model", "run", "--top-k", "-1"], "top_k is -1, but must be 0 (all tokens) or more"),
        (["--model", "run", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--model", "run", "--seed", "-1"], "--seed is -1"),
        (["--model", "run", "--device", "cuda:99"], "CUDA finds"),
        (["--model", "run", "--prompt", "\udcff"], "--prompt is not valid text"),
        (["--model", "run", "--temp", "1"], "did you mean --temperature?"),
        (["--model", "run", "--beams", "-1"], "--beams is -1, but must be 0, to draw, or more"),
        (["--model", "run", "--beams", "2", "--n-best", "3"], "n_best is 3, but must lie in [1, width 2]"),
        (["--model", "run", "--beams", "2", "--length-penalty", "nan"], "length_penalty is nan"),
        (["--model", "run", "--beams", "2", "--max-new-tokens", "0"], "a beam needs at least 1"),
        (["--model", "run", "--n-best", "2"], "--n-best is for a search; add --beams 4"),
        (["--model", "run", "--phrases", "a"], "--phrases is for a search; add --beams 4"),
        (["--model", "run", "--beams", "2", "--top-k", "2"], "--top-k is for drawing"),
        (["--model", "run", "--beams", "2", "--samples", "2"], "--samples is for drawing"),
        (["--model", "run", "--beams", "2", "--show-probabilities"], "--show-probabilities is for drawing"),
        (["--model", "run", "--beams", "2", "--phrases", ""], "--phrases '' is nothing that"),
        (
            ["--model", "run", "--beams", "2", "--max-new-tokens", "3", "--phrases", "abcd"],
            "the phrases take 4 tokens, but max_new_tokens is 3",
        ),
        (
            ["--model", "run", "--prompt", "--hello you"],
            "a value that begins with dashes is given as --prompt=--hello you",
        ),
        (["--model", "run", "--stop", ""], "--stop '' is empty, and would end a text before it begins"),
        (["--model", "run", "--stop", "\udcff"], "--stop is not valid text"),
        # Numbers that do not fit in an integer of the machine used to end in the frames of a C++ stack.
        (
            ["--model", "run", "--beams", "2", "--max-new-tokens", str(10**20)],
            "must be at most 281474976710656",
        ),
        (["--model", "run", "--beams", str(10**20)], "must be at most 281474976710656"),
        (["--model", "run", "--samples", "0"], "--samples is 0, but must be at least 1"),
        (["--model", "run", "--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (["--model", "run", "--forbidden", "999"], "--forbidden 999 is no token; ids run from 0 to 255"),
        (["--model", "run", "--forbidden", *map(str, range(256))], "--forbidden rules out every token"),
        (["--model", "run", "--prompt", "a", "--prompts", "b"], "--prompt and --prompts are both given"),
        (["--model", "run", "--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line(write, arguments, message):
    code, out, err = write(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("generate: error: ") and message in err and len(err.splitlines()) == 1


def test_a_value_may_begin_with_dashes(write):
    flags = ("--model", "run", "--max-new-tokens", 3)
    assert write(*flags, "--prompt=--hello")[1].startswith("--hello")
    for before in ("--json", "--prompt=a"):  # no value was to follow
        assert "a value" not in write(*flags, before, "--hello")[2]


def test_beams_write_the_n_best_with_their_scores(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 6, "--beams", 4)
    code, best, _ = write(*flags)
    assert code == 0 and best.startswith("The")
    several = write(*flags, "--n-best", 3)[1]
    assert several.startswith("[1] score -") and several.split("\n", 1)[1].startswith(best)
    scores = [float(line.split()[-1]) for line in several.splitlines() if line.startswith("[")]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_a_beam_of_width_1_writes_what_temperature_0_does(write):
    """Also beyond the context, of 8 tokens, where it used to see others than drawing does."""
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 40, "--json")
    beam = json.loads(write(*flags, "--beams", 1)[1])
    drawn = json.loads(write(*flags, "--temperature", 0, "--show-probabilities")[1])
    assert beam["tokens"] == drawn["tokens"]
    assert beam["score"] == pytest.approx(mean(map(log, drawn["probabilities"])), abs=1e-6)


def test_a_stop_text_ends_a_beam_and_is_not_written(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 20, "--beams", 1)
    text = write(*flags)[1].removesuffix("\n")
    stop = text[5:7]
    assert write(*flags, "--stop", stop)[1] == text[: text.index(stop, 3)] + "\n"
    assert write(*flags, "--stop", "never", "seen")[1] == text + "\n"


def test_a_damaged_checkpoint_is_named(write):
    path = Path("run/best/model.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert "model.safetensors is damaged" in write("--model", "run")[2]


def test_a_tokenizer_of_another_model_is_refused(write):
    path = Path("run/best/config.json")
    config = json.loads(path.read_bytes())
    config["model"]["vocab_size"] = 300
    path.write_text(json.dumps(config), encoding="utf-8")
    assert "has 256 tokens, but the model of config.json 300" in write("--model", "run")[2]


def test_a_reader_that_goes_away_ends_it_quietly(write, tmp_path):
    command = [sys.executable, "-m", "torch_impl.generate", "--model", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_the_library_function_is_what_the_command_line_prints(write):
    loaded = load_model(Path("run/best"), torch.float32, torch.device("cpu"))
    prompt = torch.from_numpy(loaded.tokenizer.encode("The"))
    ids = list(generate(loaded.model, prompt, 30, SamplingConfig(0.8), 3))
    text = write("--model", "run", "--prompt", "The", "--max-new-tokens", 30, "--seed", 3)[1]
    assert text == "The" + loaded.tokenizer.decode(ids) + "\n"


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_samples_differ_from_each_other_and_not_from_what_each_is_alone(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 12, "--json", "--samples", 5)
    together = lines_of(write(*flags)[1])
    assert [line["sample"] for line in together] == [0, 1, 2, 3, 4]
    assert len({line["text"] for line in together}) > 1
    assert lines_of(write(*flags, "--batch-size", 2)[1]) == together
    alone = lines_of(write(*flags[:-2])[1])
    assert alone == together[:1] and set(alone[0]) == {"prompt", "sample", "text", "tokens", "ended_by"}


def test_samples_are_numbered_for_people(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 5)
    text = write(*flags, "--samples", 2)[1]
    assert text.startswith("[1]\nThe") and "\n[2]\nThe" in text


def test_prompts_of_a_file_are_written_in_batches_and_each_as_it_is_alone(write):
    prompts = ["The quick", "a", "brown fox and more of it"]
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    flags = ("--model", "run", "--max-new-tokens", 10, "--json")
    together = lines_of(write(*flags, "--prompts", "prompts.txt", "--batch-size", 2)[1])
    assert [line["prompt"] for line in together] == prompts
    for line in together:
        assert lines_of(write(*flags, "--prompt", line["prompt"])[1]) == [line]
    shown = write(*flags[:-1], "--prompts", "prompts.txt", "--samples", 2)[1]
    assert shown.startswith("[1.1]\nThe quick") and "\n[3.2]\nbrown fox" in shown
    Path("prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    code, _, err = write(*flags, "--prompts", "prompts.txt")
    assert code == 2 and "prompts.txt, line 2 is empty" in err


def test_only_a_line_end_ends_a_prompt_of_a_file(write):
    """Prompts were cut at U+2028 and at form feeds, which stand within lines."""
    Path("prompts.txt").write_bytes("\ufeffone\u2028more\r\ntwo\x0cmore\r\n".encode())
    flags = ("--model", "run", "--max-new-tokens", 1, "--json", "--prompts", "prompts.txt")
    assert [line["prompt"] for line in lines_of(write(*flags)[1])] == ["one\u2028more", "two\x0cmore"]


def test_streams_that_are_closed_are_named(write, monkeypatch):
    """A program that is started without them has None in their place."""
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = write("--model", "run", "--prompt", "-")
    assert code == 2 and "there is none" in err
    monkeypatch.setattr("sys.stdout", None)
    assert generate_command.main(["--model", "run"]) == 2


def test_memory_that_runs_out_is_one_line(write):
    code, _, err = write("--model", "run", "--beams", 10**13, "--max-new-tokens", 2)
    assert code == 1 and err.startswith("generate: error: out of memory") and len(err.splitlines()) == 1


def test_a_model_whose_logits_are_not_numbers_is_named(write, monkeypatch):
    """The draw gave a token behind the last one, and a traceback."""
    monkeypatch.setattr(
        "torch_impl.transformer.Transformer.logits",
        lambda model, x: torch.full((*x.shape[:-1], model.config.vocab_size), torch.nan),
    )
    code, _, err = write("--model", "run", "--prompt", "a")
    assert code == 2 and "run: the model's logits are not numbers" in err and len(err.splitlines()) == 1


def test_an_answer_whose_logits_are_not_numbers_is_told(write, monkeypatch):
    """Of an encoder-decoder there was a traceback."""

    def answer(model, source, n_tokens, sampling, seed, stream, observe):
        yield sample_token(torch.full((256,), torch.nan), [], sampling, 0.5)

    monkeypatch.setattr(generate_command, "answer", answer)
    monkeypatch.setattr(generate_command, "_answers", lambda loaded: True)
    monkeypatch.setattr("ref_numpy.config.ModelConfig.begin_token", 254, raising=False)
    monkeypatch.setattr("ref_numpy.config.ModelConfig.padding_token", 255, raising=False)
    code, _, err = write("--model", "run", "--prompt", "a")
    assert code == 2 and "run: the logits are not numbers" in err and len(err.splitlines()) == 1


def test_a_prompt_may_come_through_a_pipe(write, monkeypatch):
    """An editor's mark and half of the last line's end used to be tokens of it."""
    flags = ("--model", "run", "--max-new-tokens", 8)
    for content in ("Thé quick", "Thé quick\n", "\ufeffThé quick\r\n"):  # the last, as Windows writes it
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert write(*flags, "--prompt", "-")[1] == write(*flags, "--prompt", "Thé quick")[1]
    for content, message in (
        (b"", "reads stdin, which is empty"),
        ("\ufeff\r\n".encode(), "reads stdin, which is empty"),
        (b"a\xff", "stdin is not UTF-8 text: byte 1"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        code, _, err = write(*flags, "--prompt", "-")
        assert code == 2 and message in err


def test_a_stop_text_ends_a_drawn_text_wherever_its_tokens_lie(write):
    """Bytes are tokens here, so a stop text of several is complete only with its last."""
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 30)
    text = write(*flags)[1].removesuffix("\n")
    stop = text[10:14]
    before = text[: text.index(stop, 3)]
    assert write(*flags, "--stop", "never seen", stop)[1] == before + "\n"
    [line] = lines_of(write(*flags, "--stop", stop, "--json")[1])
    assert line["ended_by"] == "stop" and line["text"] == before[3:]
    assert bytes(line["tokens"]).decode(errors="replace") == before[3:] + stop
    assert write(*flags, "--stop", text[-2:] + "and no more")[1] == text + "\n", "half a stop text is text"
    assert lines_of(write(*flags, "--json")[1])[0]["ended_by"] == "length"


def test_an_end_of_text_ends_what_is_written(write):
    tokenizer = parse_tokenizer(Path("run/best/tokenizer.json").read_bytes())
    writer = Writer(tokenizer, [], ["zz"], [7])
    for token in b"az":
        writer.feed(token, 0.5)
    assert writer.written.text == "a", "the z may be the beginning of a stop text"
    writer.feed(7, 0.25)
    assert (writer.written.text, writer.written.ended_by) == ("az", "end of text")
    assert writer.written.tokens == [*b"az", 7] and writer.written.probabilities == [0.5, 0.5, 0.25]


def test_probabilities_are_those_of_the_model_and_colour_the_text(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 5, "--temperature", 0.5)
    [line] = lines_of(write(*flags, "--show-probabilities", "--json")[1])
    loaded = load_model(Path("run/best"), torch.float32, torch.device("cpu"))
    ids = torch.tensor([[*b"The", *line["tokens"]]])
    with torch.no_grad():
        p = loaded.model(ids).double().softmax(-1)[0, 2:-1]
    want = p[torch.arange(5), torch.tensor(line["tokens"])]
    torch.testing.assert_close(torch.tensor(line["probabilities"]), want.float(), atol=1e-5, rtol=0)
    code, coloured, err = write(*flags, "--show-probabilities")
    assert code == 0 and err.startswith("probability") and "\x1b[38;5;" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == write(*flags)[1]


def test_an_answer_has_its_own_probabilities(write, monkeypatch):
    """In a batch, each answer had the probabilities of the one before from its end on."""

    def answer(model, source, n_tokens, sampling, seed, stream, observe):
        observe(torch.eye(256)[source] * 100)
        yield int(source)
        observe(torch.zeros(1, 256))  # chooses the end

    monkeypatch.setattr(generate_command, "answer", answer)
    loaded = load_model(Path("run/best"), torch.float32, torch.device("cpu"))
    model = replace(loaded.config.model, architecture="encoder-decoder")
    loaded = loaded._replace(config=replace(loaded.config, model=model))
    request = generate_command.parse(["--model", "run", "--show-probabilities"])
    *_, writers = generate_command._drawn(request, loaded, [(torch.tensor([id]), 0) for id in (65, 66)])
    assert [writer.written.probabilities for writer in writers] == [[1.0], [1.0]]


def test_every_end_token_of_a_tokenizer_ends_a_beam(write, monkeypatch):
    """A tuned GPT-2 has two, the end of a text and that of a turn; the second did not end beams."""
    flags = ("--model", "run", "--prompt", "The", "--beams", 1, "--max-new-tokens", 12, "--json")
    tokens = lines_of(write(*flags)[1])[0]["tokens"]
    monkeypatch.setattr("torch_impl.training.beams.end_tokens", lambda _: (1, tokens[-1]))
    [line] = lines_of(write(*flags)[1])
    assert line["tokens"] == tokens[: tokens.index(tokens[-1]) + 1] and line["ended_by"] == "end of text"


def test_phrases_appear_in_what_beams_write(write):
    flags = ("--model", "run", "--prompt", "The", "--max-new-tokens", 12, "--beams", 3)
    assert "qz" not in write(*flags)[1]
    assert "qz" in write(*flags, "--phrases", "qz")[1]
    [line] = lines_of(write(*flags, "--json")[1])
    assert line["score"] < 0 and line["ended_by"] == "length"
