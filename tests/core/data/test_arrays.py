"""Tokens that were made elsewhere: every layout gives the same folder, and foreign or torn arrays are named."""

import json
from pathlib import Path

import numpy
import pytest

from ablab.core.data import arrays, corpus
from ablab.core.data.arrays import Arrays, array_files
from ablab.core.data.codec import Codec
from ablab.core.errors import UserError

TEXTS = [f"{n} ships sailed to Köln; {n * n} came back." for n in range(100)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, corpus.Meta]:
    """A tokenizer, the ids of TEXTS as one array, and the folder of the text itself, its tail held out."""
    folder = tmp_path_factory.mktemp("made")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    corpus.train_tokenizer([text], folder / "bpe.json", 300)
    settings = corpus.Settings(hold_out="tail", fraction=0.1)
    meta = corpus.tokenize([text], [], folder / "bpe.json", folder / "x", settings=settings)
    ids = numpy.concatenate(
        [numpy.fromfile(folder / "x" / f"{side}.bin", "<u2") for side in ("train", "val")]
    )
    numpy.save(folder / "ids.npy", ids)
    return folder / "bpe.json", folder / "ids.npy", meta


def layouts(folder: Path, ids: numpy.ndarray, end: int) -> dict[str, Path]:
    """The same tokens in every layout, files cut between documents."""
    half = int(numpy.flatnonzero(ids == end)[40]) + 1
    starts = numpy.concatenate([[0], numpy.flatnonzero(ids == end) + 1])
    for name in ("npy", "npz", "raw", "wide"):
        (folder / name).mkdir()
    for number, part in enumerate((ids[:half], ids[half:])):
        numpy.save(folder / "npy" / f"shard_{number}.npy", part)
        numpy.save(folder / "npy" / f"offsets_shard_{number}.npy", starts[starts <= len(part)])
        numpy.savez(
            folder / "npz" / f"{number}.npz", values=part, offsets=starts[starts <= len(part)]
        )
        part.astype("<u2").tofile(folder / "raw" / f"{number}.bin")
        numpy.save(folder / "wide" / f"{number}.npy", part.astype(">i8"))
    return {name: folder / name for name in ("npy", "npz", "raw", "wide")}


def brought(tmp_path: Path, made, path: Path, name: str = "y", **more) -> corpus.Meta:
    asked = Arrays(array_files([path]), [], **{"held_out": 0.1, **more})
    return corpus.import_arrays(asked, made[0], tmp_path / "store" / name)


@pytest.mark.parametrize("layout", ["npy", "npz", "raw", "wide"])
@pytest.mark.parametrize("chunk", [arrays.CHUNK, 100])
def test_every_layout_is_the_folder_that_the_text_gives(
    made, tmp_path, monkeypatch, layout, chunk
):
    monkeypatch.setattr(arrays, "CHUNK", chunk)
    tokenizer, ids, text = made
    path = layouts(tmp_path, numpy.load(ids), text.end_of_text)[layout]
    meta = brought(tmp_path, made, path)
    same = ("digest", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    for field in (*same, "train_documents", "val_documents", "tokenizer"):
        assert getattr(meta, field) == getattr(text, field), field
    assert corpus.load_verified(tmp_path / "store" / "y") == meta


def test_named_arrays_are_held_out(made, tmp_path):
    _, ids, text = made
    whole = numpy.load(ids)
    numpy.save(tmp_path / "t.npy", whole[: text.train_tokens])
    numpy.save(tmp_path / "v.npy", whole[text.train_tokens :])
    asked = Arrays([tmp_path / "t.npy"], [tmp_path / "v.npy"])
    assert corpus.import_arrays(asked, made[0], tmp_path / "y").digest == text.digest


def test_offsets_say_where_documents_begin_when_no_end_does(made, tmp_path):
    """Ten documents of ten tokens."""
    ids = numpy.tile(numpy.arange(40, 50, dtype="<u2"), 10)
    numpy.savez(tmp_path / "a.npz", values=ids, offsets=numpy.arange(0, 100, 10))
    meta = brought(tmp_path, made, tmp_path / "a.npz", held_out=0.2)
    assert (meta.train_documents, meta.val_documents) == (8, 2)
    starts = numpy.fromfile(tmp_path / "store" / "y" / "train.starts.bin", "<i8")
    assert starts.tolist() == list(range(0, 80, 10))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            "vocabulary",
            r"a\.npy holds token 300, and .*bpe\.json has 300 ids: it was made by another",
        ),
        ("negative", r"a\.npy holds token -1, and"),
        ("torn", r"cannot read .*a\.npy: .*fetch it again"),
        ("text", r"cannot read .*a\.npy: .*fetch it again"),
        (
            "floats",
            r"a\.npy holds float64 of shape \[4\], and tokens are whole numbers in a row",
        ),
        ("square", r"a\.npy holds int64 of shape \[2, 2\]"),
        ("empty", r"a\.npy holds int64 of shape \[0\]"),
        ("offsets", r"a\.npy has 4 tokens, but its offsets reach 9: it is cut short"),
        ("one document", r"a\.npy is one document: no <\|endoftext\|> in it"),
    ],
)
def test_an_array_that_cannot_be_is_named_and_leaves_nothing(made, tmp_path, spoil, said):
    path = tmp_path / "a.npy"
    end = made[2].end_of_text
    values = {
        "vocabulary": [5, 300, end, 5],
        "negative": [5, -1, end, 5],
        "floats": [0.5, 1.0, 2.0, 3.0],
        "square": [[1, 2], [3, 4]],
        "one document": [5, 5, 5, 5],
        "empty": numpy.zeros(0, numpy.int64),
    }.get(spoil, [5, end, 6, end])
    numpy.save(path, numpy.array(values))
    if spoil == "torn":
        path.write_bytes(path.read_bytes()[:-3])
    if spoil == "text":
        path.write_text("no array")
    if spoil == "offsets":
        numpy.save(tmp_path / "offsets_a.npy", numpy.array([0, 9]))
    with pytest.raises(UserError, match=said) as refusal:
        brought(tmp_path, made, path)
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "store").iterdir()) == []


def test_raw_arrays_of_another_width_are_refused(made, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x05\x00\x00")
    with pytest.raises(
        UserError, match=r"a\.bin has 3 bytes, which is no whole number of uint16"
    ):
        brought(tmp_path, made, tmp_path / "a.bin")
    numpy.array([5, made[2].end_of_text, 6, 7], "<u4").tofile(tmp_path / "b.bin")
    meta = brought(tmp_path, made, tmp_path / "b.bin", raw="uint32", held_out=0.5)
    assert meta.train_tokens + meta.val_tokens == 4


def test_a_full_folder_is_not_written_over(made, tmp_path):
    first = brought(tmp_path, made, made[1])
    with pytest.raises(UserError, match="y exists already; delete it or choose another --name"):
        brought(tmp_path, made, made[1], held_out=0.5)
    assert corpus.load_meta(tmp_path / "store" / "y") == first


def test_files_of_another_kind_are_refused_and_folders_without_any(tmp_path):
    (tmp_path / "a.csv").touch()
    (tmp_path / "none").mkdir()
    for path, said in (
        ("a.csv", "unknown suffix"),
        ("none", "no arrays in"),
        ("b.npy", "no array"),
    ):
        with pytest.raises(UserError, match=said):
            array_files([tmp_path / path])


def test_an_end_of_text_can_be_named(made, tmp_path):
    from tokenizers import Tokenizer

    other = Tokenizer.from_file(str(made[0]))
    other.add_special_tokens(["<|end_of_text|>"])
    other.save(str(tmp_path / "two.json"))
    assert Codec(tmp_path / "two.json", "<|end_of_text|>").end == 300
    with pytest.raises(
        UserError, match=r"no token <none> .* --end-of-text: <\|endoftext\|>, <\|end_of"
    ):
        Codec(tmp_path / "two.json", "<none>")
