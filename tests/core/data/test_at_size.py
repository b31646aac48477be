"""Text at size: any number of processes, blocks and kills give the same folder; words looked up are words encoded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unicodedata import category

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ablab.core.data import assembly, blocks, corpus, parts
from ablab.core.data.blocks import Reading, Skipped, cut
from ablab.core.data.codec import Codec
from ablab.core.data.corpus import Settings
from ablab.core.data.folder import Meta, Shard
from ablab.core.data.tokens import Mapped
from ablab.core.errors import UserError

TEXTS = [
    f"{n} ships sailed to Köln; {n * n} came back, said the 船長 🙂.\n\n\tThe end of log {n}."
    for n in range(200)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus.train_tokenizer([write(folder / "text.jsonl", TEXTS)], folder / "bpe.json", 400)
    return folder / "bpe.json"


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All that a folder holds but the notes of when it was hashed."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


# ---- words ----


@pytest.fixture(scope="module")
def codecs(tokenizer, tmp_path_factory) -> list[Codec]:
    """With GPT-2's split alone, behind digits one by one, behind digits together."""
    folder = tmp_path_factory.mktemp("codecs")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [
        gpt2,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), gpt2]),
    ]
    found = []
    for number, split in enumerate(splits):
        changed = Tokenizer.from_file(str(tokenizer))
        changed.pre_tokenizer = split
        changed.save(str(folder / f"{number}.json"))
        found.append(Codec(folder / f"{number}.json"))
    return found


NO_SIGN = ("Cn", "Co", "Cs")  # unassigned, private, half of a pair
PROSE = st.text(
    st.sampled_from("ab Z9 07 \n\t'sdmtrvel.,(é船½²٣\u00a0\u2028\x85\x1c_-"), max_size=60
)


@settings(max_examples=150)
@given(st.lists(PROSE | st.text(max_size=30), min_size=1, max_size=4))
@example(["don't  'll 12  34\n\n x", "\n  9", " 7\n", "", "''s"])
@example(["a\u00a0\n\nb", "!\n !", "\x1c a", "x\x1f"])
def test_words_looked_up_are_the_ids_of_the_library(codecs, texts):
    for codec in codecs:
        assert codec.words
        expected = numpy.concatenate([codec.encode_plainly(text) for text in texts])
        for _ in range(2):  # learnt, and known
            ids, size = codec.encode(texts)
            assert ids.dtype == expected.dtype and numpy.array_equal(ids, expected)
            assert size == sum(len(text.encode()) for text in texts)


def test_white_space_is_the_same_for_python_and_for_the_library(codecs):
    """The four separators are white space for Python alone; texts with them are not split here."""
    split = codecs[0].tokenizer.pre_tokenizer
    every = [chr(code) for code in range(0x110000)]
    blank = [
        sign for sign in every if category(sign)[0] in "ZC" and category(sign) not in NO_SIGN
    ]
    others = set()
    for sign in blank:
        # Two of white space part in one and one; two other signs stay together.
        pieces = split.pre_tokenize_str(f"!{sign}{sign}!\n")
        if (len(pieces) == 5) != (sign.isspace() and sign != " "):
            others.add(sign)
    assert len(blank) > 200
    assert others == {"\x1c", "\x1d", "\x1e", "\x1f"}


@pytest.mark.parametrize(
    "spoil", ["another pattern", "a token of several words", "an added word"]
)
def test_a_tokenizer_that_splits_otherwise_is_asked_for_whole_texts(tokenizer, tmp_path, spoil):
    changed = Tokenizer.from_file(str(tokenizer))
    if spoil == "an added word":
        changed.add_tokens(["ships sailed"])
    elif spoil == "another pattern":
        every = pre_tokenizers.Split(Regex(r"\S+\s*"), "isolated")
        changed.pre_tokenizer = pre_tokenizers.Sequence(
            [every, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        changed.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
    changed.save(str(tmp_path / "t.json"))
    codec = Codec(tmp_path / "t.json")
    assert codec.words is None
    ids, _ = codec.encode(TEXTS[:3])
    whole = [changed.encode(text).ids for text in TEXTS[:3]]
    assert ids.tolist() == [number for one in whole for number in [*one, codec.end]]


def test_a_full_table_of_words_is_begun_anew(codecs, monkeypatch):
    monkeypatch.setattr("ablab.core.data.words.MOST_WORDS", 5)
    ids = [codecs[0].encode([text])[0].tolist() for text in TEXTS[:20]]
    assert ids == [codecs[0].encode_plainly(text).tolist() for text in TEXTS[:20]]
    assert len(codecs[0].words.words.number) < 40


# ---- blocks ----

PARTED = st.lists(
    st.sampled_from(["a", "b c", "é", " ", "", "\n", "\r\n", "--", "-"]), max_size=30
)


@settings(max_examples=150)
@given(
    PARTED, st.integers(1, 12), st.sampled_from(["lines", "paragraphs", "--", "\n--\n", None])
)
def test_where_a_text_is_cut_leaves_no_trace(tmp_path_factory, pieces, size, split):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes("".join(pieces).encode())
    reading = Reading(split=split)

    def read(block_size: int) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "BLOCK", block_size)
            found = [
                text
                for block in cut(path, reading)
                for text in blocks.texts(block, reading, Skipped())
            ]
        return [text for text in found if text]

    assert read(size) == read(10**6)


def test_a_text_is_parted_by_lines_blank_lines_or_words(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n one\r\ntwo\r\n \t\r\n\r\nthree\n\n\n\nfour")
    parted = {
        split: list(corpus.documents([path], split=split))
        for split in ("lines", "paragraphs", "t", None)
    }
    assert parted["lines"] == [" one", "two", "three", "four"]
    assert parted["paragraphs"] == [" one\r\ntwo", "three", "four"]
    assert parted["t"] == ["\n one\r\n", "wo\r\n \t\r\n\r\n", "hree\n\n\n\nfour"]
    assert parted[None] == [path.read_bytes().decode()]


def test_rows_without_text_are_passed_over_up_to_a_number_and_listed(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS[:50])
    with open(path, "a") as file:
        file.write('{"text": 7}\nno json\n{"body": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:53 has no key .* only: body"):
        corpus.tokenize(
            [path], [], tokenizer, tmp_path / "x", 0.2, settings=Settings(skip_bad=2)
        )
    meta = corpus.tokenize(
        [path], [], tokenizer, tmp_path / "x", 0.2, settings=Settings(skip_bad=3)
    )
    assert meta.skipped == 3
    listed = (tmp_path / "x" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0].split(" ")[0] for line in listed] == [
        f"{path}:51",
        f"{path}:52",
        f"{path}:53",
    ]
    good = write(tmp_path / "good.jsonl", TEXTS[:50])
    assert corpus.tokenize([good], [], tokenizer, tmp_path / "y", 0.2).digest == meta.digest


def test_the_tail_is_held_out_where_it_is_asked_for(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 700)
    text = write(tmp_path / "a.jsonl", TEXTS)
    tail = Settings(hold_out="tail", fraction=0.1)
    corpus.tokenize([text], [], tokenizer, tmp_path / "x", settings=tail)
    named = write(tmp_path / "t.jsonl", TEXTS[:180]), write(tmp_path / "v.jsonl", TEXTS[180:])
    apart = corpus.tokenize(named[:1], named[1:], tokenizer, tmp_path / "y")
    assert corpus.load_meta(tmp_path / "x").digest == apart.digest
    starts = numpy.fromfile(tmp_path / "x" / "val.starts.bin", "<i8")
    ids = numpy.fromfile(tmp_path / "x" / "val.bin", "<u2")
    assert starts.tolist() == [0, *(numpy.flatnonzero(ids == apart.end_of_text) + 1)[:-1]]
    assert (apart.train_documents, apart.val_documents, len(starts)) == (180, 20, 20)


# ---- processes and kills ----

TOKENIZE = """
import os, signal, sys
from ablab.core.data import blocks, corpus

blocks.BLOCK = 1500


def watch(done):
    print(done.text, flush=True)
    if done.text > stop:
        os.kill(os.getpid(), getattr(signal, how))


if __name__ == "__main__":
    _, text, tokenizer, out, jobs, stop, how = sys.argv
    stop = int(stop)
    settings = corpus.Settings(jobs=int(jobs), shard_tokens=2000)
    corpus.tokenize([text], [], tokenizer, out, 0.3, progress=watch, settings=settings)
"""


def start(folder: Path, *words) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(TOKENIZE)
    command = [sys.executable, script, *words]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A text, and the folder that one process makes of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = write(folder / "text.jsonl", TEXTS * 2)
    assert start(folder, text, tokenizer, folder / "x", 1, 10**9, "SIGKILL").wait(60) == 0
    return text, bytes_of(folder / "x")


def test_several_processes_make_the_same_folder(undisturbed, tokenizer, tmp_path):
    text, expected = undisturbed
    assert start(tmp_path, text, tokenizer, tmp_path / "x", 3, 10**9, "SIGKILL").wait(120) == 0
    assert bytes_of(tmp_path / "x") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "x"}


@pytest.mark.parametrize(("jobs", "how"), [(1, "SIGKILL"), (2, "SIGKILL"), (1, "SIGINT")])
def test_a_call_that_was_stopped_goes_on_from_what_is_done(
    undisturbed, tokenizer, tmp_path, monkeypatch, jobs, how
):
    text, expected = undisturbed
    process = start(tmp_path, text, tokenizer, tmp_path / "x", jobs, 8000, how)
    assert process.wait(120) in (-signal.SIGKILL, -signal.SIGINT, 1, 130)
    finished = {path.name for path in (tmp_path / ".x.partial" / "parts").glob("*.npz")}
    assert finished and not (tmp_path / "x").exists()
    monkeypatch.setattr(blocks, "BLOCK", 1500)
    redone = []
    encode = parts.encode

    def counted(named, *rest):
        redone.append(named.name)
        return encode(named, *rest)

    monkeypatch.setattr("ablab.core.data.workers.encode", counted)
    corpus.tokenize(
        [text], [], tokenizer, tmp_path / "x", 0.3, settings=Settings(shard_tokens=2000)
    )
    assert redone and not finished & set(redone)
    assert bytes_of(tmp_path / "x") == expected
    assert not (tmp_path / ".x.partial").exists()


def test_a_torn_part_is_done_again(undisturbed, tokenizer, tmp_path, monkeypatch):
    text, expected = undisturbed
    start(tmp_path, text, tokenizer, tmp_path / "x", 1, 8000, "SIGKILL").wait(120)
    first = min((tmp_path / ".x.partial" / "parts").glob("*.npz"))
    os.truncate(first, first.stat().st_size // 2)
    monkeypatch.setattr(blocks, "BLOCK", 1500)
    corpus.tokenize(
        [text], [], tokenizer, tmp_path / "x", 0.3, settings=Settings(shard_tokens=2000)
    )
    assert bytes_of(tmp_path / "x") == expected


def test_what_is_done_of_another_text_or_by_other_settings_is_not_taken(
    undisturbed, tokenizer, tmp_path, monkeypatch
):
    text, _ = undisturbed
    start(tmp_path, text, tokenizer, tmp_path / "x", 1, 8000, "SIGKILL").wait(120)
    monkeypatch.setattr(blocks, "BLOCK", 1500)
    other = corpus.tokenize([text], [], tokenizer, tmp_path / "x", 0.5)
    assert other.digest == corpus.tokenize([text], [], tokenizer, tmp_path / "y", 0.5).digest


def test_a_call_that_fails_leaves_no_lock(tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(UserError, match="bad.jsonl:1 is not JSON"):
        corpus.tokenize([bad], [], tokenizer, tmp_path / "data" / "x", 0.5)
    assert list((tmp_path / "data").iterdir()) == []


# ---- shards ----


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_tokens_in_several_shards_read_as_one_row(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("shards")
    ids = numpy.arange(sum(sizes), dtype="<u2") % 5
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    shards = []
    for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        name = assembly.shard_name("train", number)
        ids[begin : begin + size].tofile(folder / name)
        shards.append(Shard(name, "train", size, 1, ""))
    meta = Meta(1, "x", 5, "uint16", 4, len(ids), 1, 1, 1, "", tuple(shards))
    mapped = Mapped(folder, meta, "train")
    assert len(mapped) == len(ids)
    first = data.draw(st.integers(0, len(ids) - 1))
    count = data.draw(st.integers(1, len(ids) - first))
    assert mapped.take([first, 0], count).tolist() == [
        ids[first : first + count].tolist(),
        ids[:count].tolist(),
    ]
    documents = mapped.documents(numpy.arange(len(ids)), end_of_text=4)
    assert documents.tolist() == [place // 5 for place in range(len(ids))]


# ---- the manifest ----


def test_the_manifest_counts_and_names_what_is_there(tokenizer, tmp_path):
    text = write(tmp_path / "a.jsonl", TEXTS)
    shuffled = write(tmp_path / "b.jsonl", TEXTS[::-1])
    first = corpus.tokenize([text], [], tokenizer, tmp_path / "x", 0.2)
    other = corpus.tokenize([shuffled], [], tokenizer, tmp_path / "y", 0.2)
    assert first.text == other.text and first.digest != other.digest
    assert first.train_documents + first.val_documents == 200
    assert sum(shard.documents for shard in first.shards) == 200
    assert first.tokenizer == Codec(tokenizer).digest
    for shard in first.shards:
        assert (tmp_path / "x" / shard.file).stat().st_size == 2 * shard.tokens
    Tokenizer.from_file(str(tokenizer)).save(str(tmp_path / "compact.json"), pretty=False)
    assert Codec(tmp_path / "compact.json").digest == first.tokenizer


def test_a_changed_shard_is_named(tokenizer, tmp_path):
    text = write(tmp_path / "a.jsonl", TEXTS)
    cut_up = Settings(fraction=0.2, shard_tokens=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 700)
        corpus.tokenize([text], [], tokenizer, tmp_path / "x", settings=cut_up)
    path = tmp_path / "x" / assembly.shard_name("train", 2)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.2\.bin was changed; restore it"):
        corpus.verify(tmp_path / "x")
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train\.2\.bin has [\d,]+ bytes, but meta\.json says"):
        corpus.load_meta(tmp_path / "x")
