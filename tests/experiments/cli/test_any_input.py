"""Whatever is typed or stands in a file: an answer, or one line and exit code 2, in less than two seconds of a core.

`make inputs` draws 5,000 of them, other ones each time.
"""

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ablab.core.language.parse import fields_of, parse, paths_of
from ablab.core.language.written import read
from ablab.core.recipe.recipe import Recipe, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.experiments.plan.sheets import Sheet, StudySheet

sys.path.append(str(Path(__file__).parent))
from odd import JSON, ODD, TEXTS, WRITTEN, changed, many, sheet  # noqa: E402

PATHS = [
    *paths_of(Recipe),
    *(f"runtime.{name}" for name in fields_of(Runtime)),
    *(f"study.{name}" for name in fields_of(StudySheet)),
    "seeds",
    "design",
    "with.qk_norm.scale",
    "with",
    "arms",
    "arms.wide.optim.lr",
    "metric",
    "metric.name",
    "metric.better",
    "question",
    "name",
    "model.ffn.multiple",
    "optim.chains.hidden.steps.adam",
    "nonsense",
    "a..b",
    "",
]


@many
@given(path=st.sampled_from(PATHS), value=WRITTEN)
@example(path="model.layers", value="99999999999")
def test_any_override(said, path, value):
    said("show", "good.yaml", f"{path}={value}")


KEYS = st.sampled_from([*fields_of(Sheet), "with"]) | st.text(max_size=3)


@many
@given(keys=st.dictionaries(KEYS, WRITTEN, max_size=3))
@example(keys={"question": "2026-01-02"})
@example(keys={"seeds": "[" + "1, " * 30_000 + "]"})
@example(keys={"seeds": f"[{', '.join(map(str, range(9000)))}]"})
def test_any_sheet(lab, said, keys):
    text = sheet(**keys)
    (lab.root / "any.yaml").write_bytes(text.encode(errors="surrogatepass"))
    said("run", "any.yaml", "--dry-run", "--no-mlflow")


ARMS = {
    "with": [{"z_loss": {"weight": [1.0, 2.0]}}, {"qk_norm": {"a": {"scale": 2.0}, "b": {}}}],
    "design": "add_one",
    "metric": {"name": "train/loss", "better": "lower"},
    "arms": [
        {"name": "wide", "set": {"model.width": 32, "with.ema.mix": 0.5}, "with": ["ema"]},
        {"name": "wider", "without": ["ema"], "reference": "wide"},
    ],
}


@many
@given(at=st.floats(0, 1, exclude_max=True), value=JSON)
def test_any_arm_and_any_dose(lab, said, at, value):
    keys = {key: json.dumps(one) for key, one in changed(ARMS, at, value).items()}
    (lab.root / "any.yaml").write_bytes(sheet(**keys).encode(errors="surrogatepass"))
    said("run", "any.yaml", "--dry-run", "--no-mlflow")


@many
@given(content=st.binary(max_size=60) | WRITTEN.map(lambda text: text.encode(errors="replace")))
def test_any_file(lab, said, content):
    (lab.root / "any.yaml").write_bytes(content)
    said("show", "any.yaml")
    (lab.root / "own.yaml").write_bytes(content)
    (lab.root / "based.yaml").write_text(sheet(base="[base, mini, own]"))
    said("show", "based.yaml")


@many
@given(text=st.from_regex(r"[0-9]{1,20}([-,][0-9]{1,20}){0,3}", fullmatch=True) | WRITTEN)
@example(text="0-99999999999")
@example(text="1" * 5000)
def test_any_seeds(said, text):
    said("run", "good.yaml", "--dry-run", f"--seeds={text}")


@many
@given(name=WRITTEN)
def test_any_name(said, name):
    said("data", "tokenize", "good.yaml", "--tokenizer", "absent", f"--name={name}")
    said("show", name or "good.yaml")
    said("show", "good.yaml", f"--cell={name}")


def test_seeds_are_decimal_whatever_zeros_stand_before(said):
    planned = said("run", "good.yaml", "--dry-run", "--seeds", "010", "--json")
    assert {row["seed"] for row in json.loads(planned.out)["rows"]} == {10}


OCTAL = {
    "seeds=[010,011]": ["seeds=['010', '011']", "write 10, without the 0"],
    "budget.tokens=0100000": ["budget.tokens='0100000'", "write 100000, without the 0"],
    "budget.tokens=1:30:00": ["budget.tokens='1:30:00'", "write one number, without ':'"],
    "data.digest=12e3": ["data.digest=12000.0 must be a word or null", "needs quotes"],
    "optim.lr=99999999999999999999": ["write less than 2^63"],
}


@pytest.mark.parametrize("override", OCTAL)
def test_a_number_of_yaml_1_1_is_refused_with_the_cure_in_overrides_and_in_sheets(
    lab, said, override
):
    path, _, value = override.partition("=")
    key = {path: value} if path == "seeds" else {"set": f"{{{path}: {value}}}"}
    (lab.root / "octal.yaml").write_text(sheet(**key))
    for words in (("show", "good.yaml", override), ("show", "octal.yaml")):
        ended = said(*words)
        assert ended.code == 2
        assert all(part in ended.err for part in OCTAL[override]), ended.err


@many
@given(digest=st.from_regex(r"[0-9]{1,15}e[0-9]{1,15}|[0-9]{16}|0[0-9:-]{8}", fullmatch=True))
@example(digest="6e12345678901234")
@example(digest="1:30:00")
def test_what_show_prints_reads_back_to_the_same_run(said, digest):
    printed = said("show", "good.yaml", f'data.digest="{digest}"').out
    recipe = parse(Recipe, read(printed), "")
    assert recipe.data.digest == digest
    assert f"run {run_id(recipe)}" in printed.splitlines()[0]


CHECKS = {
    ("--widths", "0-99999999999"): "--widths '0-99999999999' names more than 1,000 numbers",
    ("--seeds", "x" * 1000): "--seeds 'xxx",
    ("--with", "[" * 30_000): "must list interventions as an experiment does",
    ("--with", "{[a]: b}"): "must list interventions as an experiment does",
    ("--with", "[a]"): "unknown intervention ['a']",
    ("--with", "{mup: 3}"): "with.mup must be a mapping",
}


@pytest.mark.parametrize("words", CHECKS)
def test_the_coordinate_check_refuses_in_the_same_way(said, words):
    ended = said("check", "coords", *words)
    assert ended.code == 2
    assert CHECKS[words] in ended.err


# -- text ------------------------------------------------------------------------------------------------------------
def tokenizing(said, path) -> str:
    words = ("data", "train-tokenizer", str(path), "--out", "made.json", "--vocab", "300")
    ended = said(*words)
    assert ended.code == 2
    return ended.err


@many
@given(at=st.floats(0, 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_file_is_named(lab, said, at, value, cut):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    whole = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a", "b" * 50, "a"]}), whole)
    content = bytearray(whole.getvalue())
    place = min(int(at * len(content)), len(content) - 1)
    content[place] = value
    (lab.root / "torn.parquet").write_bytes(content[:place] if cut else content)
    tokenizing(said, "torn.parquet")


def test_deep_json_is_refused_by_its_line(lab, said):
    (lab.root / "deep.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    assert "deep.jsonl:2 is not JSON" in tokenizing(said, "deep.jsonl")


def test_a_vocabulary_that_no_memory_holds_is_refused(lab, said):
    (lab.root / "one.txt").write_text("text")
    words = ("data", "train-tokenizer", "one.txt", "--out", "made.json", "--vocab")
    ended = said(*words, "99999999999")
    assert ended.code == 2
    assert "vocab=99999999999 is too large" in ended.err


LINES = (
    st.binary(max_size=40)
    | TEXTS.map(lambda text: json.dumps({"text": text}).encode())
    | WRITTEN.map(lambda text: text.encode(errors="replace"))
    | st.sampled_from([b'{"text": 3}', b'{"text": "a", "text": "b"}', b"[]", b'{"txt": "a"}'])
)


@pytest.fixture(scope="module")
def tokenizer(lab) -> dict:
    """A byte-level one of 257 ids."""
    from ablab.core.data.codec import train_tokenizer

    (lab.root / "one.txt").write_text("text")
    train_tokenizer([lab.root / "one.txt"], lab.root / "bytes.json", 257)
    return json.loads((lab.root / "bytes.json").read_text())


def tokenized(lab, said, text: str, tokenizer: str) -> None:
    words = ("data", "tokenize", text, "--tokenizer", tokenizer, "--val-fraction", "0.5")
    said(*words, "--name", "made", "--store", str(lab.store))
    shutil.rmtree(lab.store / "data" / "made", ignore_errors=True)


@many
@given(
    lines=st.lists(LINES, max_size=5),
    suffix=st.sampled_from([".jsonl", ".NDJSON", ".json", ".txt", ".jsonl.gz", ".txt.xz"]),
    packed=st.booleans(),
)
def test_any_text(lab, said, tokenizer, lines, suffix, packed):
    content = b"\n".join(lines)
    path = lab.root / f"any{suffix}"
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        tokenized(lab, said, path.name, "bytes.json")
    finally:
        path.unlink()


@many
@given(at=st.floats(0, 1), value=JSON | st.sampled_from(ODD))
def test_any_tokenizer(lab, said, tokenizer, at, value):
    odd = json.dumps(changed(tokenizer, at, value))
    (lab.root / "odd.json").write_bytes(odd.encode(errors="surrogatepass"))
    (lab.root / "two.jsonl").write_text('{"text": "one"}\n{"text": "another <|endoftext|>"}\n')
    tokenized(lab, said, "two.jsonl", "odd.json")
