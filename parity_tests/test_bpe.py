"""Byte pair encoding: both sides equal each other, Hugging Face's tokenizers and tiktoken, to the last id."""

import json
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ref_numpy import bpe as ref
from ref_numpy.bpe_format import (
    SPLITS,
    TokenizerError,
    new_vocabulary,
    printable,
    to_json,
)
from torch_impl import bpe

CORPUS = "\n".join(topics.values())  # the language reference that every Python carries
CHAT = ["<|endoftext|>", "<user>", "<assistant>", "<system>", "<end of turn>", "<user>>", "<use"]

# Text that breaks tokenizers: joined emoji, combining marks, right to left, controls, other spaces, digits.
awkward = st.sampled_from(
    [
        *["👩‍👩‍👧", "🤷🏽‍♀️", "e\u0301", "naïve", "שלום", "\u202eabc", "中文", "ſ", "\U0010ffff"],
        *["\0", "\r", "\r\n", "\n\n\n", "   ", "\t", "\x1c", "\x85", "\u00a0", "\u3000"],
        *["'S", "'ll", "’s", "²", "Ⅷ", "٣", "12345", "aaaaaaa", "----", "_", "<|", "|>", *CHAT],
    ]
)
texts = st.lists(st.one_of(st.text(max_size=20), awkward, st.sampled_from(CORPUS.split(" ")))).map("".join)
small_texts = st.lists(st.text("ab c", max_size=12), max_size=8)
patterns = st.sampled_from([*SPLITS.values(), None, r"\w+", r"(a|b)+?", r"x*"])


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train([CORPUS], 2000, CHAT)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return bpe.BPETokenizer(vocabulary)


@pytest.fixture(scope="module")
def hugging_face(vocabulary):
    return tokenizers.Tokenizer.from_str(to_json(vocabulary))


def split_by(pattern: str | None, text: str) -> list[str]:
    return [word for words in bpe.Splitter(pattern)(text) for word in words]


def trained_by_hugging_face(text: str, vocab_size: int) -> list[tuple[str, str]]:
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    oracle.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(oracle.to_str())["model"]["merges"]]


def as_tiktoken(vocabulary) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "same",
        pat_str=vocabulary.split,
        mergeable_ranks=vocabulary.ordinary_ids,
        special_tokens=vocabulary.special_tokens,
    )


# --- training -------------------------------------------------------------------------------------


def test_the_example_on_paper():
    merges = [
        merge
        for merge, _ in zip(
            ref.learn_merges(ref.count_words(["low low lower"], (), SPLITS["gpt2"])), range(3), strict=False
        )
    ]
    assert [merge.pair for merge in merges] == [(b"l", b"o"), (b"lo", b"w"), (b" ", b"low")]
    assert [merge.count for merge in merges] == [3, 3, 2]
    words = Counter(["ab1", "ab2", "ab3", "ab4", "ab5"])
    assert next(ref.learn_merges(words)).words == ["ab1", "ab2", "ab3", "ab4"]  # some, to be shown


def test_the_greatest_bytes_are_those_that_come_last_in_a_dictionary():
    """A token comes before what begins with it, even where that goes on with a zero byte."""
    words = ["a\0"] * 10 + ["xa", "xa\0"] * 3
    for side in (ref, bpe):
        learned = side.train(words, 258, (), None, "greatest bytes")
        assert learned.merges == [(b"a", b"\0"), (b"x", b"a\0")]


@given(small_texts, st.integers(256, 280), patterns, st.sampled_from(["smallest ids", "greatest bytes"]))
def test_both_sides_learn_the_same(texts, vocab_size, split, ties):
    assert bpe.train(texts, vocab_size, (), split, ties) == ref.train(texts, vocab_size, (), split, ties)


@given(
    st.lists(texts, max_size=3),
    st.sets(st.sampled_from(CHAT)),
    st.sampled_from(["gpt2", "gpt4", "whitespace"]),
)
def test_both_sides_learn_the_same_around_special_tokens(texts, special, split):
    learned = bpe.train(texts, 300, special, SPLITS[split])
    assert learned == ref.train(texts, 300, special, SPLITS[split])
    assert not any(name.encode() in token for name in special for token in learned.ordinary_ids)


@given(st.text("ab", max_size=200), st.sampled_from([0, 1, 10**9]))
def test_arrays_and_loop_learn_the_same(text, many):
    """Few letters make pairs overlap, stand side by side, and make one token in two ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_impl.training.bpe_merges._MANY", many)
        learned = bpe.train([text, "aaaa" * 5], 290, split=None)
    assert learned == ref.train([text, "aaaa" * 5], 290, split=None)


@pytest.mark.parametrize("vocab_size", [512, 4096, 10000])
def test_merges_are_those_of_hugging_face_in_their_order(vocab_size):
    learned = bpe.train([CORPUS], vocab_size)
    assert [(printable(a), printable(b)) for a, b in learned.merges] == trained_by_hugging_face(
        CORPUS, vocab_size
    )


def test_reference_learns_the_same_from_a_whole_book():
    assert ref.train([CORPUS], 4096, CHAT) == bpe.train([CORPUS], 4096, CHAT)


def test_each_merge_takes_the_most_frequent_pair():
    """Slowly, from the definition: count all pairs anew before each merge."""
    words = ref.count_words([CORPUS[:3000]], (), SPLITS["gpt2"])
    tokens = {word: ref.as_bytes(word) for word in words}
    ids = {token: id for id, token in enumerate(new_vocabulary([]).tokens)}
    for pair in bpe.train([CORPUS[:3000]], 330).merges:
        count = {}
        for word, n in words.items():
            for other in ref.pairs_of(tokens[word]):
                count[other] = count.get(other, 0) + n
        assert pair == min(count, key=lambda other: (-count[other], ids[other[0]], ids[other[1]]))
        ids.setdefault(pair[0] + pair[1], len(ids))
        tokens = {word: ref.merged(old, pair) for word, old in tokens.items()}


def test_small_corpus_ends_early():
    trace = []
    learned = ref.train(["aaab"], 1000, trace=trace.append)
    assert learned == bpe.train(["aaab"], 1000)
    assert len(learned.tokens) == 256 + len(trace) == 259
    assert trace[0] == ref.Merge((b"a", b"a"), 2, ["aaab"])


# --- encoding and decoding ------------------------------------------------------------------------


@given(texts, st.sets(st.sampled_from(CHAT)))
def test_both_sides_encode_the_same_and_decode_to_the_text(vocabulary, tokenizer, text, allowed):
    ids = tokenizer.encode(text, allowed)
    assert ids.dtype == np.uint16
    assert ids.tolist() == ref.encode(text, vocabulary, allowed)
    assert tokenizer.decode(ids) == text == ref.decode(ids.tolist(), vocabulary)


@given(st.text("ab\n <é", max_size=3000))
def test_word_by_word_and_all_at_once_are_the_same(tokenizer, text):
    words = ref.pre_tokens(text, SPLITS["whitespace"])
    ids, lengths = tokenizer._merges.encode_words(words) if words else (np.array([]), [])
    one_by_one = [tokenizer._merges.encode_word(word) for word in words]
    assert ids.tolist() == [id for word in one_by_one for id in word]
    assert list(lengths) == list(map(len, one_by_one))


@settings(max_examples=300)
@given(texts)
@example("a" * 5000)
@example(" " * 5000)
@example(" " * 5000 + "x")
def test_ids_are_those_of_hugging_face_and_tiktoken(vocabulary, tokenizer, hugging_face, text):
    special = set(vocabulary.special_tokens)
    assert tokenizer.encode(text).tolist() == as_tiktoken(vocabulary).encode_ordinary(text)
    # Hugging Face always reads special tokens; of those that begin at one place it takes the longest.
    assert tokenizer.encode(text, special).tolist() == hugging_face.encode(text).ids


@given(texts)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_is_the_same_in_other_regex_engines(split, text):
    bytes_only = new_vocabulary([], (), SPLITS[split])
    oracle = tokenizers.Tokenizer.from_str(to_json(bytes_only))
    pieces = [text[a:b] for _, (a, b) in oracle.pre_tokenizer.pre_tokenize_str(text)]
    assert split_by(SPLITS[split], text) == pieces == ref.pre_tokens(text, SPLITS[split])


@given(texts.map(lambda text: text * 40), st.integers(1, 50), st.sampled_from(list(SPLITS)))
def test_long_text_is_split_block_by_block_as_in_one_piece(text, block, split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_impl.bpe._BLOCK", block)
        patch.setattr("torch_impl.bpe._PART", 3 * block)
        assert split_by(SPLITS[split], text) == ref.pre_tokens(text, SPLITS[split])


@given(texts, patterns)
def test_a_pattern_of_the_users_own_loses_no_text(text, split):
    pieces = split_by(split, text)
    assert "".join(pieces) == text
    assert pieces == ref.pre_tokens(text, split)


def test_of_a_merge_that_is_listed_twice_the_last_place_counts():
    """As in Hugging Face's tokenizers; both sides once took the first."""
    twice = new_vocabulary([(b"a", b"b"), (b"b", b"c"), (b"x", b"y"), (b"a", b"b")])
    oracle = tokenizers.Tokenizer.from_str(to_json(twice))
    for text in ("abc", "ab", "xyabc"):
        want = oracle.encode(text).ids
        assert ref.encode(text, twice) == bpe.BPETokenizer(twice).encode(text).tolist() == want


def test_the_empty_word_has_no_tokens():
    assert ref.encode_word("", {}) == []


def test_a_tokenizer_takes_the_place_of_the_one_before(vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    for kept in (new_vocabulary([]), vocabulary):
        ref.save(kept, path)
        assert ref.load(path) == kept
    assert list(tmp_path.iterdir()) == [path]


def test_merges_go_by_rank_and_not_by_place():
    """a b c with b+c learned first: the b that stands beside a first goes to c."""
    learned = new_vocabulary([(b"b", b"c"), (b"a", b"b")])
    for ids in (bpe.BPETokenizer(learned).encode("abc").tolist(), ref.encode("abc", learned)):
        assert [learned.tokens[id] for id in ids] == [b"a", b"bc"]


@given(texts, st.integers(0, 6), st.integers(1, 3))
def test_what_is_remembered_does_not_matter(vocabulary, text, kept, waiting):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_WORDS_KEPT", kept), ("_WAITING", waiting), ("_PART", 10), ("_FEW", kept)):
            patch.setattr(f"torch_impl.bpe.{name}", value)
        tokenizer = bpe.BPETokenizer(vocabulary)
        for _ in range(2):
            assert tokenizer.encode(text).tolist() == ref.encode(text, vocabulary)


def test_a_text_that_cannot_be_encoded_leaves_no_trace(vocabulary):
    """Its words had numbers by then, and the words of the next text would have had their ids."""
    tokenizer = bpe.BPETokenizer(vocabulary)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("seen before \ud800 half")
    assert tokenizer.decode(tokenizer.encode("before half and after")) == "before half and after"


def test_threads_share_a_tokenizer_and_processes_copy_it(vocabulary):
    tokenizer = pickle.loads(pickle.dumps(bpe.BPETokenizer(vocabulary)))
    pages = list(topics.values())
    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(tokenizer.encode, pages))
    assert [tokenizer.decode(ids) for ids in encoded] == pages


def test_a_megabyte_without_a_space_is_encoded(tokenizer):
    text = "ab" * 500_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lines_of_a_file_encode_as_they_come(tokenizer):
    lines = (line for line in ["one two\n", "three <user>\n"])
    ids = list(tokenizer.encode_iterable(lines, ["<user>"]))
    assert tokenizer.special_tokens["<user>"] in ids
    assert tokenizer.decode(ids) == "one two\nthree <user>\n"


# --- special tokens -------------------------------------------------------------------------------


def test_text_of_a_user_never_becomes_a_special_token(vocabulary, tokenizer):
    special = set(vocabulary.special_tokens.values())
    text = "".join(CHAT)
    assert not special & set(tokenizer.encode(text).tolist())
    assert not special & set(ref.encode(text, vocabulary))
    assert special & set(tokenizer.encode(text, ["<user>"]).tolist()) == {vocabulary.special_tokens["<user>"]}


def test_longest_special_token_wins(vocabulary, tokenizer):
    for ids in (
        tokenizer.encode("<user>><user><use", CHAT).tolist(),
        ref.encode("<user>><user><use", vocabulary, CHAT),
    ):
        assert [vocabulary.tokens[id] for id in ids] == [b"<user>>", b"<user>", b"<use"]


def test_unknown_special_token_is_named(vocabulary, tokenizer):
    for encode in (tokenizer.encode, lambda text, allowed: ref.encode(text, vocabulary, allowed)):
        with pytest.raises(TokenizerError, match="'<nobody>' is no special token"):
            encode("text", ["<nobody>"])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [ref.train, bpe.train])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((258, ["<a>", "<b>", "<c>"]), "vocab_size is 258, but must be at least 259"),
        ((300, [""]), "empty string"),
        ((300, ["a"]), "'a' is an ordinary token"),
        ((300, ["Ġ"]), "'Ġ' is an ordinary token"),
        ((300, [], "(unclosed"), r"'\(unclosed' is no regular expression"),
    ],
)
def test_what_cannot_be_trained_is_said(train, arguments, message):
    with pytest.raises(TokenizerError, match=message):
        train(["text"], *arguments)


@pytest.mark.parametrize("id", [-1, 2000, 2**40])
def test_id_out_of_range_is_named(vocabulary, tokenizer, id):
    for decode in (tokenizer.decode, lambda ids: ref.decode(ids, vocabulary)):
        with pytest.raises(TokenizerError, match=f"id {id} is no token; ids run from 0 to 1999"):
            decode([5, id])


def test_bytes_that_are_not_utf8_are_replaced_or_refused(vocabulary, tokenizer):
    ids = (
        tokenizer.encode("é").tolist()[:1]
        if len(tokenizer.encode("é")) > 1
        else [vocabulary.ordinary_ids[b"\xc3"]]
    )
    for decode in (tokenizer.decode, lambda ids, **errors: ref.decode(ids, vocabulary, **errors)):
        assert decode(ids) == "\ufffd"
        with pytest.raises(UnicodeDecodeError):
            decode(ids, errors="strict")


def test_of_overlapping_pairs_the_left_one_is_merged():
    """aaa is aa a, and not a aa."""
    vocabulary = new_vocabulary([(b"a", b"a")], split=None)
    assert [vocabulary.tokens[id] for id in ref.encode("aaa", vocabulary)] == [b"aa", b"a"]
    assert bpe.BPETokenizer(vocabulary).encode("aaa").tolist() == ref.encode("aaa", vocabulary)
