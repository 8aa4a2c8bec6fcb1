"""The files of tokenizers: whole, those of the ecosystem, and refused where they are damaged."""

import json
from dataclasses import FrozenInstanceError, replace
from pydoc_data.topics import topics

import pytest
import tokenizers

from ref_numpy import bpe as ref
from ref_numpy.bpe_format import (
    SPLITS,
    TokenizerError,
    from_gpt2_files,
    from_json,
    printable,
    to_gpt2_files,
    to_json,
    vocabulary_of,
)
from torch_impl import bpe

CORPUS = "\n".join(topics.values())[:100_000]  # from the language reference that every Python carries
CHAT = ["<|endoftext|>", "<user>", "<assistant>", "<system>", "<end of turn>", "<user>>", "<use"]


@pytest.fixture(scope="module")
def vocabulary():
    return bpe.train([CORPUS], 2000, CHAT)


def test_files_hold_the_whole_vocabulary(vocabulary, tmp_path):
    bpe.BPETokenizer(vocabulary).save(tmp_path / "a.json")
    ref.save(vocabulary, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert ref.load(tmp_path / "a.json") == vocabulary
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


@pytest.mark.parametrize("split", [*SPLITS.values(), None, r"\d+"])
def test_any_split_survives_the_file(split):
    learned = bpe.train([CORPUS[:2000]], 300, CHAT, split)
    assert from_json(to_json(learned)) == learned


def test_gpt2_files_are_read_with_and_without_the_version_line(vocabulary):
    vocab, merges = to_gpt2_files(vocabulary)
    assert merges.startswith("#version: 0.2\n") and "Ġ" in vocab
    for text in (merges, merges.partition("\n")[2], merges.replace("\n", "\r\n")):
        assert from_gpt2_files(vocab, text) == vocabulary


def test_gpt2_files_are_those_of_hugging_face(vocabulary, tmp_path):
    plain = vocabulary_of(dict(enumerate(vocabulary.tokens[: -len(CHAT)])), vocabulary.merges)
    for name, content in zip(("vocab.json", "merges.txt"), to_gpt2_files(plain), strict=True):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    model = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    oracle = tokenizers.Tokenizer(model)
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert oracle.encode(CORPUS[:20000]).ids == bpe.BPETokenizer(plain).encode(CORPUS[:20000]).tolist()


REAL = [
    *("<|endoftext|>", "<|im_start|>", "<fim_prefix>", "<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    *("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", *(f"madeupword000{i}" for i in range(3))),
    *(f"<extra_id_{i}>" for i in range(100)),
]
"""Special tokens that vocab.json of models in use has."""


@pytest.mark.parametrize(
    ("size", "missing", "whole"),
    [
        (400, 0, True),
        (400, 16, True),
        (400, 17, False),
        (400, 100, False),
        (2000, 20, True),
        (2000, 21, False),
    ],
)
def test_a_merges_txt_that_is_cut_short_is_refused(size, missing, whole):
    """Its text was cut into twice as many tokens, and nothing was said."""
    learned = bpe.train([CORPUS], size)
    assert len(learned.tokens) == size
    vocab, merges = to_gpt2_files(learned)
    cut = "".join(merges.splitlines(keepends=True)[: size - 255 - missing])
    if whole:
        assert len(from_gpt2_files(vocab, cut).special_tokens) == missing
        return
    made = size - 256 - missing
    told = rf"^merges\.txt makes {made:,} of the {size:,} tokens in vocab\.json; is it cut short\?$"
    with pytest.raises(TokenizerError, match=told):
        from_gpt2_files(vocab, cut)
    with pytest.raises(TokenizerError, match="is it cut short"):
        from_gpt2_files(vocab, cut[:-3])  # in the middle of a line


def test_a_small_vocabulary_may_have_special_tokens_that_are_two_of_its_tokens():
    """Files that had just been written were refused."""
    learned = bpe.train([CORPUS], 270, special_tokens=["[]", "{}", "<>", "()"])
    assert from_gpt2_files(*to_gpt2_files(learned)).special_tokens == learned.special_tokens


def test_special_tokens_have_no_merges_to_lose(vocabulary):
    """Though they be more than the tokens that might be missing."""
    plain = vocabulary_of(dict(enumerate(vocabulary.tokens[: -len(CHAT)])), vocabulary.merges, REAL)
    vocab, merges = to_gpt2_files(plain)
    assert from_gpt2_files(vocab, merges).special_tokens == plain.special_tokens
    assert len(REAL) > 0.05 * len(plain.tokens)


def edited(vocabulary, edit) -> str:
    content = json.loads(to_json(vocabulary))
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda c: c["model"].update(type="AnyOther"), "its model is AnyOther"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda c: c["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda c: c.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "not supported"),
        (lambda c: c["model"]["vocab"].pop("A"), "ids 0 to 1998"),
        (lambda c: c["model"]["vocab"].update(A=0), "same id"),
        (lambda c: c["model"]["vocab"].update(A="0"), "damaged"),
        (lambda c: c["model"]["merges"].append(["q", "QQ"]), "merge q QQ needs"),
        (lambda c: c["model"]["merges"].append(["q", "z"]), "merge q z needs"),
        (lambda c: c["model"]["merges"].append(["q"]), "damaged"),
        (lambda c: c["model"]["merges"].append(["\u4e2d", "a"]), "stands for no byte"),
        (lambda c: c["model"]["vocab"].update({"<x>": 3}), "same id"),
        (lambda c: c["added_tokens"].append({"id": 3, "content": "<x>"}), "damaged: KeyError 'single_word'"),
    ],
)
def test_damaged_or_foreign_file_is_refused(vocabulary, edit, message):
    with pytest.raises(TokenizerError, match=message):
        from_json(edited(vocabulary, edit))


def added(vocabulary, text: str, id: int | None = None, **flags: bool) -> str:
    """A file with one more added token."""
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entry = {"id": len(vocabulary.tokens) if id is None else id, "content": text} | kept | flags
    return edited(vocabulary, lambda c: c["added_tokens"].append(entry))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"special": False}, "added token '    ' is not special"),
        ({"lstrip": True}, "added token '    ' has lstrip, which is not supported"),
        ({"rstrip": True, "single_word": True}, "added token '    ' has single_word, rstrip, which"),
        ({"id": 2001}, "added token '    ' has id 2001, but its place in the vocabulary is 2000"),
        ({"id": 1999}, "added token '    ' has id 1999, but its place in the vocabulary is 2000"),
    ],
)
def test_added_tokens_that_mean_other_ids_are_refused(vocabulary, flags, message):
    """They used to be read as if they were ordinary special tokens, and gave other ids."""
    text = ".      ."
    content = added(vocabulary, "    ", **flags)
    assert tokenizers.Tokenizer.from_str(content).encode(text).ids != ref.encode(text, vocabulary)
    with pytest.raises(TokenizerError, match=message):
        from_json(content)


def test_added_tokens_come_in_their_order_or_stand_in_the_vocabulary(vocabulary):
    for content, id in (
        (added(vocabulary, "<x>", normalized=True), 2000),
        (added(vocabulary, "<user>", 1994), 1994),
    ):
        oracle = tokenizers.Tokenizer.from_str(content)
        read = from_json(content)
        text = json.loads(content)["added_tokens"][-1]["content"]
        assert read.special_tokens[text] == id == oracle.token_to_id(text)
        assert oracle.encode(f"the {text}").ids == ref.encode(f"the {text}", read, [text])
    with pytest.raises(TokenizerError, match="'<user>' has id 1995, but its place in the vocabulary is 1994"):
        from_json(added(vocabulary, "<user>", 1995))


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_files_that_shorten_or_fill_texts_are_refused(vocabulary, setting):
    """They used to be read as if they did not."""
    foreign = tokenizers.Tokenizer.from_str(to_json(vocabulary))
    foreign.enable_truncation(3) if setting == "truncation" else foreign.enable_padding(length=9)
    assert foreign.encode("a b c d").ids != ref.encode("a b c d", vocabulary)
    with pytest.raises(TokenizerError, match=f"it uses {setting} .*, which is not supported here"):
        from_json(foreign.to_str())


def test_words_taken_whole_are_read_where_merges_make_them_too(vocabulary):
    """A file with ignore_merges, as Llama 3 has it, used to be read also where this changes ids."""
    content = edited(vocabulary, lambda c: c["model"].update(ignore_merges=True))
    assert from_json(content) == vocabulary
    oracle = tokenizers.Tokenizer.from_str(content)
    assert oracle.encode(CORPUS[:20000]).ids == ref.encode(CORPUS[:20000], vocabulary)

    def unlearn(content):
        content["model"].update(ignore_merges=True)
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair != ["Ġt", "he"]]

    content = edited(vocabulary, unlearn)
    id = vocabulary.ordinary_ids[b" the"]
    assert tokenizers.Tokenizer.from_str(content).encode(" the").ids == [id]
    with pytest.raises(TokenizerError, match="ignore_merges, but its merges do not make token Ġthe"):
        from_json(content)
    pair = vocabulary.merges[0]  # two bytes
    content = json.loads(edited(vocabulary, lambda c: c["model"].update(ignore_merges=True)))
    content["model"]["merges"] = content["model"]["merges"][1:]
    with pytest.raises(TokenizerError, match=f"do not make token {printable(pair[0] + pair[1])},"):
        from_json(json.dumps(content))
    merges = [pair for pair in vocabulary.merges if pair != (b" t", b"he")]
    assert ref.encode(" the", replace(vocabulary, merges=merges)) != [id]
    content = edited(replace(vocabulary, merges=merges), lambda c: None)
    assert from_json(content).merges == merges, "where merges count, a token may be out of reach"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"t\.json cannot be read as a tokenizer"):
        ref.load(tmp_path / "t.json")


def test_a_vocabulary_is_not_changed(vocabulary):
    with pytest.raises(FrozenInstanceError):
        vocabulary.split = None


@pytest.mark.parametrize("id", [-1, 0, 1994, 2000, 2001])
def test_a_special_token_stands_at_its_place(vocabulary, id):
    """Neither before a token that comes before it in the alphabet, nor after one, nor outside."""
    with pytest.raises(TokenizerError, match=f"'<use' has id {id}, but that is not its place"):
        replace(vocabulary, special_tokens={"<use": id})


def test_special_tokens_are_written_as_hugging_face_writes_them(vocabulary):
    """Found in the text as it is, and not in what a normaliser makes of it."""
    content = to_json(vocabulary)
    again = json.loads(tokenizers.Tokenizer.from_str(content).to_str())
    assert json.loads(content)["added_tokens"] == again["added_tokens"]
    written = tokenizers.AddedToken("<user>", special=True)
    flags = {
        name: getattr(written, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    assert flags.items() <= json.loads(content)["added_tokens"][1].items()


def test_bytes_are_spelled_as_hugging_face_spells_them(vocabulary):
    spelled = [printable(bytes([byte])) for byte in range(256)]
    assert set(spelled) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) and len(set(spelled)) == 256
    assert spelled[ord(" ")] == "Ġ" and spelled[ord("a")] == "a"
    assert "Ġ" in to_json(vocabulary)  # and no \u0120


def test_the_rest_is_written_as_hugging_face_writes_it(vocabulary):
    """How text is cut, and all that a BPE can do beside, by the defaults of its own classes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(vocabulary.split), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    want, got = json.loads(made.to_str()), json.loads(to_json(vocabulary))
    assert got["pre_tokenizer"] == want["pre_tokenizer"]
    own = {"vocab": ..., "merges": ...}
    assert got["model"] | own == want["model"] | own


def test_gpt2s_own_way_to_cut_is_read(vocabulary):
    """A ByteLevel that names no pattern of its own has GPT-2's."""
    own_way = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = edited(replace(vocabulary, split=None), lambda c: c.update(pre_tokenizer=own_way))
    assert from_json(content) == vocabulary


@pytest.mark.parametrize("byte", [0, 10, 65, 255])
def test_each_byte_needs_a_token(vocabulary, byte):
    tokens = [token for token in vocabulary.tokens[:256] if token != bytes([byte])]
    with pytest.raises(TokenizerError, match=f"byte {byte} has no token"):
        vocabulary_of(dict(enumerate(tokens)), [])


def test_ids_begin_with_0(vocabulary):
    with pytest.raises(TokenizerError, match="256 tokens must have the ids 0 to 255"):
        vocabulary_of(dict(enumerate(vocabulary.tokens[:256], start=-1)), [])


def test_a_special_token_may_hold_what_spells_no_byte(vocabulary):
    """Only one that as a whole stands for an ordinary token in the files would be taken for it."""
    tokens = dict(enumerate(vocabulary.tokens[:256]))
    assert vocabulary_of(tokens, [], ["中a"]).special_tokens == {"中a": 256}
    with pytest.raises(TokenizerError, match="'Ġ' is an ordinary token as well"):
        vocabulary_of(tokens, [], ["Ġ"])


def test_a_special_token_may_be_the_first_of_all(vocabulary):
    tokens = [b"<s>", *vocabulary.tokens[: -len(CHAT)]]
    assert replace(vocabulary, tokens=tokens, special_tokens={"<s>": 0}).special_tokens == {"<s>": 0}
