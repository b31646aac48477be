"""Token folders: every byte accounted for, every format read, nothing half-written, nothing leaked."""

import gzip
import hashlib
import json
import lzma
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ablab.core.data import blocks, corpus, parts
from ablab.core.data.codec import END, Codec
from ablab.core.data.documents import passed_over
from ablab.core.errors import UserError

TEXTS = [
    f"{n} ships sailed to Köln; {n * n} came back, said the 船長 🙂.\nThe end of log {n}."
    for n in range(200)
]
HARD = ["\x00\x7f", "a\u200d🏴‍☠️\U0010ffff", "é" * 9, " \n\t ", f"x{END}y", "'s don't \r\n"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 300 ids, so that most multi-byte characters split between tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus.train_tokenizer([write(folder / "text.jsonl", TEXTS)], folder / "bpe.json", 300)
    return folder / "bpe.json"


def write(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def read_ids(folder: Path, side: str) -> numpy.ndarray:
    return numpy.fromfile(folder / f"{side}.bin", "<u2")


def spell(tokenizer: Path) -> dict[int, bytes]:
    """Id -> bytes, by the definition of the alphabet: printable Latin-1 is itself, the rest counts up from 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {chr(b): b for b in plain}
    byte |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in plain)}
    vocab = Tokenizer.from_file(str(tokenizer)).get_vocab()
    return {
        number: bytes(byte[c] for c in token) for token, number in vocab.items() if token != END
    }


# ---- bytes ----


@settings(max_examples=150)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
@example(HARD)
def test_ids_spell_exactly_the_bytes_of_any_unicode_text(tokenizer, texts):
    codec = Codec(tokenizer)
    spelling = spell(tokenizer)
    ids, size = codec.encode(texts)
    ends = numpy.flatnonzero(ids == codec.end)
    spelt = b"".join(spelling.get(int(i), b"\n<END>\n") for i in ids)
    assert spelt == b"".join(text.encode() + b"\n<END>\n" for text in texts)
    assert len(ends) == len(texts)
    assert codec.token_bytes[ids].sum() == size == sum(len(text.encode()) for text in texts)


def test_token_bytes_are_the_spelling_of_each_id_and_zero_for_the_end_of_text(tokenizer):
    codec = Codec(tokenizer)
    assert codec.token_bytes[codec.end] == 0
    assert {i: n for i, n in enumerate(codec.token_bytes) if i != codec.end} == {
        i: len(b) for i, b in spell(tokenizer).items()
    }


def test_a_character_split_over_three_tokens_still_counts_three_bytes(tmp_path):
    corpus.train_tokenizer([write(tmp_path / "a.jsonl", ["x"])], tmp_path / "bytes.json", 257)
    codec = Codec(tmp_path / "bytes.json")
    ids, size = codec.encode(["船"])
    assert size == 3
    assert codec.token_bytes[ids].tolist() == [1, 1, 1, 0]


def test_the_end_of_text_written_inside_a_document_is_text(tokenizer):
    ids, size = Codec(tokenizer).encode([f"a{END}b"])
    assert (ids == 0).tolist() == [False] * (len(ids) - 1) + [True]
    assert size == len(END) + 2


def test_truncation_padding_and_special_prefixes_of_a_borrowed_tokenizer_are_ignored(
    tokenizer, tmp_path
):
    borrowed = Tokenizer.from_file(str(tokenizer))
    borrowed.enable_truncation(3)
    borrowed.enable_padding(length=50)
    borrowed.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    borrowed.save(str(tmp_path / "borrowed.json"))
    assert (
        Codec(tmp_path / "borrowed.json").encode(HARD)[0].tolist()
        == Codec(tokenizer).encode(HARD)[0].tolist()
    )


@pytest.mark.parametrize("spoil", ["normalizer", "prefix space", "unknown bytes"])
def test_a_tokenizer_that_changes_the_text_is_refused(tokenizer, tmp_path, spoil):
    changed = json.loads(tokenizer.read_text())
    if spoil == "normalizer":
        changed["normalizer"] = {"type": "Lowercase"}
        text = "İ"  # lower case is i and a combining dot: two bytes become three
    elif spoil == "prefix space":
        changed["pre_tokenizer"]["add_prefix_space"], text = True, "x"
    else:
        changed["model"].update(vocab={"a": 1, END: 0}, merges=[])
        text = "ab"
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"changes the text at byte \d .*: \d bytes became \d"):
        Codec(tmp_path / "changed.json").encode([text])


KEEP_LENGTH = {
    "lower case": ({"type": "Lowercase"}, "A log", "0 b'A log' to b'a log'"),
    "digits": (
        {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "0"},
        "the year 1900",
        "9 b'1900' to b'0000'",
    ),
    "composed": ({"type": "Replace", "pattern": {"String": "ä"}, "content": "ö"}, "ä", "1"),
}


@pytest.mark.parametrize("normalizer, text, change", KEEP_LENGTH.values(), ids=KEEP_LENGTH)
def test_a_tokenizer_that_changes_the_text_but_keeps_its_length_is_refused(
    tokenizer, tmp_path, normalizer, text, change
):
    changed = json.loads(tokenizer.read_text()) | {"normalizer": normalizer}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    codec = Codec(tmp_path / "changed.json")
    with pytest.raises(UserError, match=rf"changes the text at byte {change}") as error:
        codec.encode(["same", text])
    assert len(str(error.value)) - len(str(tmp_path)) < 300


def test_two_changes_that_cancel_in_a_batch_are_still_refused(tokenizer, tmp_path):
    """A tokenizer that drops one byte here and adds one there has the right sum."""
    changed = json.loads(tokenizer.read_text())
    shorter = {"type": "Replace", "pattern": {"String": "xx"}, "content": "x"}
    longer = {"type": "Replace", "pattern": {"String": "y"}, "content": "yy"}
    changed["normalizer"] = {"type": "Sequence", "normalizers": [shorter, longer]}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    for texts in (["xx", "y"], ["xxy"]):
        with pytest.raises(UserError, match="changes the text"):
            Codec(tmp_path / "changed.json").encode(texts)


def test_an_end_of_text_that_is_not_special_is_refused(tokenizer, tmp_path):
    """It would count thirteen bytes a document, and end one wherever it is quoted."""
    changed = json.loads(tokenizer.read_text())
    changed["added_tokens"][0]["special"] = False
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"no token <\|endoftext\|> that is special"):
        Codec(tmp_path / "changed.json")


def test_a_tokenizer_must_exist_be_byte_level_and_know_the_end_of_text(tokenizer, tmp_path):
    word = Tokenizer(models.BPE({"日本": 0, END: 1}, []))
    word.save(str(tmp_path / "word.json"))
    endless = Tokenizer(models.BPE({"a": 0}, []))
    endless.save(str(tmp_path / "endless.json"))
    messages = {
        "word": "not byte-level: token '日本'",
        "endless": r"no token <\|endoftext\|>",
        "none": "cannot read",
    }
    for file, message in messages.items():
        with pytest.raises(UserError, match=message):
            Codec(tmp_path / f"{file}.json")


# ---- documents ----


def pack(path: Path, content: bytes) -> Path:
    path.write_bytes(
        {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}.get(path.suffix, bytes)(
            content
        )
    )
    return path


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def table(texts: list, field: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(
        pyarrow.table({"id": list(range(len(texts))), field: texts}), sink, row_group_size=3
    )
    return sink.getvalue().to_pybytes()


def twice(texts: list) -> bytes:
    """A table with two columns `text`."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table([texts, texts], ["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_every_format_gives_back_the_texts_in_order(tmp_path, suffix, packed):
    texts = HARD[:1] if suffix == ".txt" else HARD
    lines = "\n\n".join(
        json.dumps({"body": text, "id": 1}, ensure_ascii=False) for text in texts
    ).encode()
    content = {".parquet": table(texts, "body"), ".txt": texts[0].encode()}.get(suffix, lines)
    assert (
        list(
            corpus.documents([pack(tmp_path / f"sample.10BT{suffix}{packed}", content)], "body")
        )
        == texts
    )


def test_folders_and_globs_stand_for_their_files_sorted_and_each_once(tmp_path):
    for name in ("b.jsonl", "a/c.jsonl", "a.jsonl", ".cache/x.jsonl"):
        write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("passed over")
    assert list(corpus.documents([tmp_path])) == ["a/c.jsonl", "a.jsonl", "b.jsonl"]
    assert list(corpus.documents([f"{tmp_path}/*.jsonl", tmp_path / "b.jsonl"])) == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_linked_folders_are_read_and_a_link_to_a_folder_above_ends(tmp_path):
    write(tmp_path / "elsewhere" / "b.jsonl", ["behind a link"])
    write(tmp_path / "text" / "a.jsonl", ["plain"])
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "text")
    assert list(corpus.documents([tmp_path / "text"])) == ["plain", "behind a link"]


def test_one_file_counts_once_under_every_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "text" / "a.jsonl", ["once"])
    (tmp_path / "text" / "linked.jsonl").symlink_to(file)
    (tmp_path / "hard.jsonl").hardlink_to(file)
    spellings = ["text", "text/a.jsonl", "./text/../text/a.jsonl", file, "hard.jsonl", "t*/*"]
    assert list(corpus.documents(spellings)) == ["once"]


def test_a_file_of_the_training_text_is_no_validation_text_under_another_name(
    tokenizer, tmp_path
):
    file = write(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").hardlink_to(file)
    with pytest.raises(UserError, match=r"b\.jsonl was named as training and as validation"):
        corpus.tokenize([file], [tmp_path / "b.jsonl"], tokenizer, tmp_path / "x")


def test_a_text_both_packed_and_plain_is_refused_as_doubled(tmp_path):
    plain = write(tmp_path / "a.jsonl", ["x"])
    pack(tmp_path / "a.jsonl.gz", plain.read_bytes())
    with pytest.raises(UserError, match=r"a\.jsonl and a\.jsonl\.gz are one text"):
        corpus.documents([tmp_path])


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.Json", "a.jsonl.GZ", "a.NDJSON.xz"])
def test_suffixes_are_known_in_any_case_and_spelling(tmp_path, name):
    packing = {"GZ": gzip.compress, "xz": lzma.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(packing(b'{"text": "read"}'))
    assert list(corpus.documents([tmp_path])) == ["read"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}')
    assert list(corpus.documents([tmp_path])) == ["plain\ufeff", "line"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        list(corpus.documents([tmp_path]))


def test_a_link_to_nothing_is_no_text_that_may_be_missed(tmp_path):
    write(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"cannot read .*b\.jsonl: No such file"):
        corpus.documents([tmp_path])


def test_what_is_passed_over_in_a_folder_can_be_asked(tmp_path):
    write(tmp_path / "a.jsonl", ["x"])
    for name in ("b.csv", "c.jsonl.bz2", ".hidden.csv"):
        (tmp_path / name).touch()
    assert [file.name for file in passed_over([tmp_path])] == ["b.csv", "c.jsonl.bz2"]


def test_documents_of_no_characters_are_skipped(tmp_path):
    assert list(corpus.documents([write(tmp_path / "a.jsonl", ["", "x", ""])])) == ["x"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.jsonl", None, r"no text at .*none\.jsonl; name a file"),
        ("a.csv", b"x", r"a\.csv: unknown suffix; known: \.jsonl"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 1}',
            r"a\.jsonl:2 has no key 'text', only: body, id; choose one",
        ),
        ("a.jsonl", b"[1]", r"a\.jsonl:1 has no key 'text', only: a list"),
        ("a.jsonl", b'{"text": 7}', r"a\.jsonl:1: 'text' must be text, not 7"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 is not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "x", "text": "y"}',
            r"a\.jsonl:1 is not JSON \(two values under the key 'text'\)",
        ),
        ("a.jsonl", b"[" * 30_000, r"a\.jsonl:1 is not JSON"),
        ("a.parquet", twice(["x"]), r"a\.parquet has 2 columns 'text', and one must hold"),
        ("a.jsonl.gz", b'{"text": "x"}', r"cannot read .*a\.jsonl\.gz"),
        (
            "a.jsonl.xz",
            lzma.compress(b'{"text": "x"}' * 99)[:-20],
            r"cannot read .*a\.jsonl\.xz",
        ),
        ("a.parquet", b"not a table", r"a\.parquet is not Parquet"),
        ("a.parquet", table(["x"], "body"), r"a\.parquet has no column 'text', only: id, body"),
        (
            "a.parquet",
            table(["x", "y", "z", None]),
            r"a\.parquet row 4: 'text' must be text, not None",
        ),
        ("a.parquet", table(["x"])[:0], r"a\.parquet is not Parquet"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_its_cure(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(corpus.documents([tmp_path / name]))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) - len(str(tmp_path)) < 300


# ---- training a tokenizer ----


def test_training_twice_gives_the_same_file_with_the_asked_vocabulary(tokenizer, tmp_path):
    read = corpus.train_tokenizer(
        [write(tmp_path / "text.jsonl", TEXTS)], tmp_path / "again.json", 300
    )
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()
    trained = Tokenizer.from_file(str(tokenizer))
    assert read == sum(len(text.encode()) for text in TEXTS)
    assert trained.get_vocab_size() == 300
    assert trained.token_to_id(END) == 0


def test_training_stops_at_the_document_that_reaches_max_bytes(tmp_path):
    text = write(tmp_path / "text.jsonl", ["é" * 10] * 5)
    assert corpus.train_tokenizer([text], tmp_path / "t.json", 257, max_bytes=30) == 40


def test_a_vocabulary_that_cannot_be_had_is_refused(tmp_path):
    text = write(tmp_path / "text.jsonl", ["abc"])
    with pytest.raises(UserError, match="vocab=256 is too small"):
        corpus.train_tokenizer([text], tmp_path / "t.json", 256)
    with pytest.raises(UserError, match="3 bytes of text yield only 259 ids, not 4096"):
        corpus.train_tokenizer([text], tmp_path / "t.json", 4096)
    with pytest.raises(UserError, match=r"text\.jsonl:1 has no key 'body'"):
        corpus.train_tokenizer([text], tmp_path / "t.json", 300, field="body")
    assert not (tmp_path / "t.json").exists()


# ---- token folders ----


def test_a_token_folder_holds_the_texts_and_meta_counts_them(tokenizer, tmp_path):
    train = write(tmp_path / "train.jsonl", TEXTS[:150])
    val = write(tmp_path / "val.jsonl", TEXTS[150:])
    meta = corpus.tokenize([train], [val], tokenizer, tmp_path / "data" / "logs")
    folder = tmp_path / "data" / "logs"
    plain = Tokenizer.from_file(str(tokenizer))
    for side, texts in (("train", TEXTS[:150]), ("val", TEXTS[150:])):
        expected = [number for text in texts for number in [*plain.encode(text).ids, 0]]
        assert read_ids(folder, side).tolist() == expected
        assert getattr(meta, f"{side}_tokens") == len(expected)
        assert getattr(meta, f"{side}_bytes") == sum(len(text.encode()) for text in texts)
    parts = [(folder / name).read_bytes() for name in ("train.bin", "val.bin")]
    lengths = numpy.load(folder / "token_bytes.npy")
    said = (
        b"uint16"
        + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        + lengths.tobytes()
    )
    assert meta.digest == hashlib.sha256(said).hexdigest()[:16]
    assert (meta.name, meta.vocab, meta.end_of_text, lengths.dtype, lengths.shape) == (
        "logs",
        300,
        0,
        "int32",
        (300,),
    )
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert corpus.load_meta(folder) == meta


def test_the_sizes_of_blocks_batches_and_shards_leave_no_trace(
    tokenizer, tmp_path, monkeypatch
):
    text = write(tmp_path / "text.jsonl", TEXTS)
    whole = corpus.tokenize([text], [], tokenizer, tmp_path / "whole", 0.2)
    monkeypatch.setattr(parts, "BATCH", 100)
    monkeypatch.setattr(blocks, "BLOCK", 300)
    said = []
    cut = corpus.tokenize(
        [text],
        [],
        tokenizer,
        tmp_path / "cut",
        0.2,
        progress=said.append,
        settings=corpus.Settings(shard_tokens=1000),
    )
    assert (cut.digest, cut.text) == (whole.digest, whole.text)
    done = [one.text for one in said]
    assert done == sorted(set(done)) and len(done) > 30
    assert done[-1] == whole.train_bytes + whole.val_bytes
    assert said[-1].share == 1
    assert len(cut.shards) > 5
    for side in ("train", "val"):
        joined = b"".join((tmp_path / "cut" / file).read_bytes() for file in cut.files(side))
        assert joined == (tmp_path / "whole" / f"{side}.bin").read_bytes()


def test_ids_above_65535_are_kept_in_32_bits(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, END, *(f"{'Ġ' * 20}{n}" for n in range(65_536 - 257)), "ab"]
    wide = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("a", "b")]))
    wide.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wide.decoder = decoders.ByteLevel()
    wide.add_special_tokens([END])
    wide.save(str(tmp_path / "wide.json"))
    text = write(tmp_path / "text.jsonl", ["ab"]), write(tmp_path / "val.jsonl", ["a"])
    meta = corpus.tokenize(text[:1], text[1:], tmp_path / "wide.json", tmp_path / "wide")
    assert (meta.dtype, meta.vocab) == ("uint32", 65_537)
    assert numpy.fromfile(tmp_path / "wide" / "train.bin", "<u4").tolist() == [65_536, 256]
    assert corpus.load_meta(tmp_path / "wide") == meta


def sides(folder: Path, tokenizer: Path) -> dict[str, list[str]]:
    plain = Tokenizer.from_file(str(tokenizer))
    return {
        side: plain.decode(read_ids(folder, side), skip_special_tokens=False).split(END)[:-1]
        for side in ("train", "val")
    }


def test_the_held_out_side_of_a_document_survives_reordering_and_binds_its_copies(
    tokenizer, tmp_path
):
    for name, texts in {"a": TEXTS, "b": TEXTS[::-1] + TEXTS[:100]}.items():
        corpus.tokenize(
            [write(tmp_path / f"{name}.jsonl", texts)], None, tokenizer, tmp_path / name, 0.25
        )
    first = sides(tmp_path / "a", tokenizer)
    second = sides(tmp_path / "b", tokenizer)
    assert set(first["val"]) == set(second["val"])
    assert set(first["train"]) == set(second["train"])
    assert not set(second["val"]) & set(second["train"])
    # 50 expected of 200 at 0.25; four standard deviations are 24.
    assert 30 <= len(first["val"]) <= 70


@pytest.mark.parametrize(
    "val, fraction, message",
    [
        (["val.jsonl"], 0.1, r"val_fraction=0\.1 were both given; drop one"),
        (["train.jsonl"], None, r"train\.jsonl was named as training and as validation text"),
        ([], 1.5, r"val_fraction=1\.5 must lie between 0 and 1"),
        ([], 1e-9, "no document fell to val; give more text"),
        (["none.jsonl"], None, "no text at"),
    ],
)
def test_a_held_out_side_that_cannot_be_is_refused_and_leaves_nothing(
    tokenizer, tmp_path, val, fraction, message
):
    write(tmp_path / "train.jsonl", TEXTS[:3]), write(tmp_path / "val.jsonl", TEXTS[3:5])
    held_out = [tmp_path / name for name in val]
    with pytest.raises(UserError, match=message):
        corpus.tokenize(
            [tmp_path / "train.jsonl"], held_out, tokenizer, tmp_path / "out" / "x", fraction
        )
    assert not list((tmp_path / "out").glob("[!.]*"))
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_full_folder_is_never_written_over(tokenizer, tmp_path):
    text = write(tmp_path / "text.jsonl", TEXTS)
    meta = corpus.tokenize([text], [], tokenizer, tmp_path / "x", 0.5)
    with pytest.raises(UserError, match="exists already; delete it or choose another --name"):
        corpus.tokenize([text], [], tokenizer, tmp_path / "x", 0.1)
    assert corpus.load_meta(tmp_path / "x") == meta


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tokenizer, tmp_path):
    text = write(tmp_path / "text.jsonl", TEXTS)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for the full disk: write() fails after 4096 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/data/x: File too large"):
            corpus.tokenize([text], [], tokenizer, tmp_path / "data" / "x", 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [file.name for file in (tmp_path / "data").iterdir()] in ([], [".x.lock"])


def python(script: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_a_kill_half_way_leaves_no_folder_and_the_next_try_succeeds(tokenizer, tmp_path):
    text = write(tmp_path / "text.jsonl", TEXTS)
    script = """
import os, signal, sys
from ablab.core.data import blocks, corpus
blocks.BLOCK = 1000
_, text, tokenizer, out = sys.argv
die = lambda done: os.kill(os.getpid(), signal.SIGKILL)
corpus.tokenize([text], [], tokenizer, out, 0.5, progress=die)
"""
    out = tmp_path / "data" / "x"
    assert python(script, text, tokenizer, out).wait(120) == -signal.SIGKILL
    assert not out.exists()
    assert len(list((out.parent / ".x.partial" / "parts").glob("*.npz"))) == 1
    meta = corpus.tokenize([text], [], tokenizer, out, 0.5)
    assert corpus.load_meta(out) == meta
    assert not (out.parent / ".x.partial").exists()


@pytest.mark.parametrize(
    "damage", ["folder", "meta.json", "json", "schema", "type", "train.bin", "token_bytes.npy"]
)
def test_a_damaged_token_folder_is_named_with_its_cure(tokenizer, tmp_path, damage):
    folder = tmp_path / "store" / "data" / "x"
    if damage != "folder":
        corpus.tokenize([write(tmp_path / "text.jsonl", TEXTS)], [], tokenizer, folder, 0.5)
    meta = folder / "meta.json"
    match damage:
        case "meta.json" | "token_bytes.npy":
            (folder / damage).unlink()
        case "json":
            meta.write_text("{")
        case "schema":
            meta.write_text(meta.read_text().replace('"schema": 1', '"schema": 2'))
        case "type":
            meta.write_text(meta.read_text().replace('"vocab": 300', '"vocab": "many"'))
        case "train.bin":
            (folder / damage).write_bytes((folder / damage).read_bytes()[:-2])
    message = {
        "folder": rf"no token folder .*/x; fill it: ablab data tokenize TEXT .* --name x --store {tmp_path / 'store'}$",
        "train.bin": r"train\.bin has [\d,]+ bytes, but meta\.json says [\d,]+; delete the folder and fill it again",
        "token_bytes.npy": r"token_bytes\.npy has 0 bytes, but meta\.json says 1,328",
    }.get(damage, r"cannot read .*meta\.json: .*; delete the folder and fill it again")
    with pytest.raises(UserError, match=message):
        corpus.load_meta(folder)


# ---- the embedded text ----


@pytest.fixture
def tiny_configs(tokenizer, tmp_path, monkeypatch) -> Path:
    """A configs/data folder of 200 short texts in place of the shipped one, with its digest pinned."""
    configs = tmp_path / "configs"
    for side, texts in (("train", TEXTS[:150]), ("val", TEXTS[150:])):
        pack(
            configs / "embedded" / f"{side}.jsonl.xz",
            write(configs / "embedded" / f"{side}.jsonl", texts).read_bytes(),
        )
    (configs / "embedded" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    monkeypatch.setattr(corpus, "CONFIGS", configs)
    train = configs / "embedded" / "train.jsonl"
    val = configs / "embedded" / "val.jsonl"
    digest = corpus.tokenize([train], [val], tokenizer, tmp_path / "x").digest
    (configs / "embedded.yaml").write_text(
        f"data: {{name: embedded, digest: {digest}, vocab: 300}}"
    )
    return configs


def test_the_embedded_text_is_tokenized_once_and_found_afterwards(
    tiny_configs, tmp_path, monkeypatch
):
    folder = corpus.ensure_embedded(tmp_path)
    assert folder == tmp_path / "data" / "embedded"
    assert corpus.load_meta(folder).name == "embedded"
    monkeypatch.setattr(corpus, "_fill_embedded", None)
    assert corpus.ensure_embedded(tmp_path) == folder


def test_a_digest_other_than_the_pinned_one_is_refused_before_and_after_filling(
    tiny_configs, tmp_path
):
    pinned = (tiny_configs / "embedded.yaml").read_text()
    (tiny_configs / "embedded.yaml").write_text(
        "data: {name: embedded, digest: 0123456789abcdef, vocab: 300}"
    )
    with pytest.raises(
        UserError,
        match=r"not 0123456789abcdef as pinned .* tokenizers \d.* splits text differently",
    ):
        corpus.ensure_embedded(tmp_path)
    assert not (tmp_path / "data" / "embedded").exists()
    (tiny_configs / "embedded.yaml").write_text(pinned)
    corpus.ensure_embedded(tmp_path)
    (tiny_configs / "embedded.yaml").write_text(
        "data: {name: embedded, digest: 0123456789abcdef, vocab: 300}"
    )
    with pytest.raises(UserError, match="embedded.yaml pins 0123456789abcdef; delete it"):
        corpus.ensure_embedded(tmp_path)


def test_two_processes_that_ask_at_once_fill_the_embedded_folder_once(tiny_configs, tmp_path):
    script = """
import sys, time
from pathlib import Path
from ablab.core.data import corpus
corpus.CONFIGS, store, fill = Path(sys.argv[1]), Path(sys.argv[2]), corpus._fill_embedded
def slow(*arguments):
    print("filled")
    time.sleep(1)
    return fill(*arguments)
corpus._fill_embedded = slow
(store / f"ready{sys.argv[3]}").touch()
while len(list(store.glob("ready*"))) < 2:
    time.sleep(0.01)
print(corpus.load_meta(corpus.ensure_embedded(store)).digest)
"""
    pair = [python(script, tiny_configs, tmp_path, number) for number in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in pair]
    digest = yaml.safe_load((tiny_configs / "embedded.yaml").read_text())["data"]["digest"]
    assert [process.returncode for process in pair] == [0, 0]
    assert sorted(said, key=len) == [[digest], ["filled", digest]]


def test_the_shipped_text_and_tokenizer_are_the_ones_that_were_pinned():
    shipped = corpus.CONFIGS / "embedded"
    for side in ("train", "val"):
        content = lzma.decompress((shipped / f"{side}.jsonl.xz").read_bytes())
        assert (
            f"{hashlib.sha256(content).hexdigest()}  {side}.jsonl\n"
            in (shipped / "build.sh").read_text()
        )
    codec = Codec(shipped / "tokenizer.json")
    ids, size = codec.encode(list(corpus.documents([shipped / "val.jsonl.xz"])))
    assert (codec.vocab, len(ids), size) == (4096, 88_527, 305_950)


def test_importing_the_module_loads_nothing_heavy():
    script = """
import sys, ablab.core.data.corpus
print({'torch', 'numpy', 'tokenizers', 'pyarrow', 'yaml'} & set(sys.modules))
"""
    assert python(script).communicate(timeout=120)[0].strip() == "set()"
