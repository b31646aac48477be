"""`ablab data`: text in, a listed token folder out; the shipped data configs agree with it."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ablab.core.data import corpus
from ablab.core.data.corpus import Done
from ablab.core.errors import UserError
from ablab.experiments.cli import data as data_cli
from ablab.experiments.cli import data_progress


def call(*arguments, **settings) -> str:
    words = [str(word) for word in arguments]
    result = CliRunner().invoke(data_cli.app, words, **settings)
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text" / "logs.jsonl"
    path.parent.mkdir()
    rows = [{"body": f"{n} ships sailed, {n * n} came back."} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer(text, tmp_path) -> Path:
    path = tmp_path / "t.json"
    options = ("--field", "body", "--vocab", 300, "--out", path)
    said = call("train-tokenizer", text.parent, *options)
    assert re.fullmatch(rf"{tmp_path}/t\.json: 300 ids from [\d,]+ bytes in \d+\.\d s\n", said)
    return path


def test_tokenize_then_list_reports_what_meta_holds(text, tokenizer, tmp_path):
    store = tmp_path / "store"
    options = ("--tokenizer", tokenizer, "--field", "body", "--store", store)
    said = call(
        "tokenize", f"{text.parent}/*.jsonl", *options, "--name", "logs", "--val-fraction", 0.2
    )
    meta = corpus.load_meta(store / "data" / "logs")
    assert f"{meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens" in said
    assert meta.digest in said
    [row] = json.loads(call("list", "--json", "--store", store))
    assert row == json.loads((store / "data" / "logs" / "meta.json").read_text())
    assert row["name"] == "logs"
    line = call("list", env={"ABLAB_STORE": str(store)})
    assert line.startswith("logs ")
    for word in (meta.digest, f"{meta.train_tokens:,} train", "vocab     300"):
        assert word in line


def test_files_of_no_known_format_are_passed_over_aloud(text, tokenizer, tmp_path):
    (text.parent / "more.csv").write_text("a, b")
    options = ("--tokenizer", tokenizer, "--field", "body", "--name", "x", "--store", tmp_path)
    words = [str(word) for word in ("tokenize", text.parent, *options)]
    said = CliRunner().invoke(data_cli.app, words)
    assert said.exit_code == 0
    assert "files of no known format, passed over: 1 (more.csv)" in said.output


def test_named_validation_text_is_held_out(text, tokenizer, tmp_path):
    val = tmp_path / "val.jsonl"
    val.write_text('{"body": "seven"}\n')
    call(
        "tokenize",
        text,
        "--val",
        val,
        "--tokenizer",
        tokenizer,
        "--field",
        "body",
        "--name",
        "x",
        "--store",
        tmp_path,
    )
    assert corpus.load_meta(tmp_path / "data" / "x").val_bytes == len("seven")


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "", "/abs"])
def test_a_name_that_is_no_plain_folder_name_is_refused(text, tokenizer, tmp_path, name):
    with pytest.raises(UserError, match="must be a plain folder name"):
        call("tokenize", text, "--tokenizer", tokenizer, "--name", name, "--store", tmp_path)


def test_verify_hashes_the_contents_and_names_both_digests_of_a_changed_folder(
    write_token_folder, tmp_path
):
    folder = write_token_folder(tmp_path / "data" / "x")
    digest = corpus.load_meta(folder).digest
    said = call("verify", "x", "--store", tmp_path)
    assert f"the contents have the digest that meta.json says, {digest}" in said
    (folder / "val.bin").write_bytes(bytes((folder / "val.bin").stat().st_size))
    with pytest.raises(
        UserError, match=f"meta.json says {digest}: a file was changed; restore"
    ):
        call("verify", "x", "--store", tmp_path)
    with pytest.raises(UserError, match="no token folder"):
        call("verify", "y", "--store", tmp_path)
    with pytest.raises(UserError, match="plain folder name"):
        call("verify", "../x", "--store", tmp_path)


def test_a_damaged_folder_is_listed_with_what_is_wrong(tmp_path):
    (tmp_path / "data" / "broken").mkdir(parents=True)
    (tmp_path / "data" / ".x.partial").mkdir()
    [row] = json.loads(call("list", "--json", "--store", tmp_path))
    assert row["name"] == "broken"
    assert "meta.json" in row["error"]
    assert call("list", "--store", tmp_path).startswith("broken ")


def test_an_empty_store_says_what_fills_it(tmp_path):
    none = tmp_path / "none"
    assert (
        call("list", "--store", none)
        == f"no token folders in {none}/data; fill one with `ablab data tokenize`\n"
    )
    assert json.loads(call("list", "--json", "--store", none)) == []


def test_progress_is_a_bar_on_a_terminal_and_lines_with_rate_and_time_left_elsewhere(
    monkeypatch, capsys
):
    half = Done(text=60 * 10**6, tokens=15 * 10**6, share=0.5, kept=20 * 10**6)
    clock = [100.0]
    monkeypatch.setattr(data_progress, "perf_counter", lambda: clock[0])
    with data_progress.progress() as watch:  # pytest's stdout is no terminal
        watch(half)
        assert capsys.readouterr().err == ""
        clock[0] += 20
        watch(half)
    # 40 MB in 20 s, 60 MB to go.
    assert capsys.readouterr().err == (
        "tokenizing:  50%, 60 MB of text, 15.0 M tokens, 2.0 MB/s, 30 s left\n"
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with data_progress.progress() as watch:
        watch(half)
    assert "50%" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from typer.testing import CliRunner; from ablab.experiments.cli.data import app; "
        "assert 'tokenize' in CliRunner().invoke(app, ['--help']).stdout; "
        "print({'torch', 'numpy', 'tokenizers', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "set()\n"


@pytest.mark.parametrize(
    "name, vocab", [("embedded", 4096), ("docs", 32_000), ("fineweb_edu", 32_000)]
)
def test_each_data_config_names_its_folder_its_digest_and_its_vocabulary(name, vocab):
    data = yaml.safe_load((corpus.CONFIGS / f"{name}.yaml").read_text())
    digest = data["data"].pop("digest")
    assert data == {"data": {"name": name, "vocab": vocab}}
    assert re.fullmatch("[0-9a-f]{16}", digest) if name == "embedded" else digest is None


@pytest.mark.parametrize("name", ["docs", "fineweb_edu"])
def test_the_commands_in_a_data_config_are_ones_the_program_takes(name, monkeypatch):
    taken = []

    def train_tokenizer(text, out, vocab, *rest):
        taken.append((out, vocab))
        return 1

    def tokenize(text, val, tokenizer, out, *rest):
        taken.append((tokenizer, out.name))
        return corpus.Meta(1, name, 32_000, "uint16", 0, 1, 1, 1, 1, "0" * 16)

    monkeypatch.setattr(corpus, "train_tokenizer", train_tokenizer)
    monkeypatch.setattr(corpus, "tokenize", tokenize)
    config = (corpus.CONFIGS / f"{name}.yaml").read_text()
    for command in re.findall(r"^#\s+ablab data (.+)$", config, re.M):
        call(*(word.strip("'") for word in command.split()))
    [(trained, vocab), (used, folder)] = taken
    assert trained == used
    assert (vocab, folder) == (32_000, name)


# ---- mixes ----


@pytest.fixture
def sources(tokenizer, text, tmp_path) -> Path:
    """A store with two sources of one tokenizer."""
    rows = text.read_text().splitlines(keepends=True)
    for name, taken in (("web", rows[:200]), ("code", rows[200:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(taken))
        options = ("--tokenizer", tokenizer, "--field", "body", "--val-fraction", 0.3)
        call("tokenize", path, *options, "--store", tmp_path / "store", "--name", name)
    return tmp_path / "store"


def tokens_of(store: Path, name: str) -> int:
    return corpus.load_meta(store / "data" / name).train_tokens


def test_a_mix_says_shares_and_epochs_and_becomes_a_config_that_trains(sources, tmp_path):
    from ablab.core.recipe.load import recipe_from

    there = tokens_of(sources, "code")
    path = tmp_path / "mix.json"
    path.write_text(json.dumps({"web": 600, str(sources / "data" / "code"): there}))
    said = call("mix", path, "--store", sources, "--out", tmp_path / "both.yaml")
    assert re.search(
        rf"^code +[\d.]+% +{there:,} of {there:,} tokens  1\.00 epochs$", said, re.M
    )
    small = {"data.batch": 1, "data.context": 16, "schedule.warmup_steps": 1}
    recipe = recipe_from(["base", "both"], small, beside=tmp_path)
    assert recipe.data.name == "both" and recipe.data.vocab == 300
    assert recipe.data.mix == {"web": 600.0, "code": float(there)}
    assert recipe.budget.tokens == 600 + there
    rows = json.loads(call("mix", path, "--store", sources, "--json"))
    assert [row["tokens"] for row in rows] == [there, 600]
    with pytest.raises(UserError, match="both.yaml exists already"):
        call("mix", path, "--store", sources, "--out", tmp_path / "both.yaml")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            '{"web": 1e9}',
            r"asks for 1,000,000,000 tokens of web, which has [\d,]+: [\d.]+ epochs; write epochs: ",
        ),
        ('{"web": 1, "web": 2}', "no mix: 'web' is named twice"),
        ('{"web": NaN}', "the weight of web is nan; use a finite number > 0"),
        ('{"web": -1}', "the weight of web is -1; use a finite number > 0"),
        ('{"web": "much"}', "the weight of web must be a number > 0, not 'much'"),
        ('{"web": 1, "none": 1}', "no source 'none' in .*; fill it: ablab data tokenize"),
        ("[1]", r"must hold a mapping of sources to tokens, not \[1\]"),
        ("{", "is no mix: "),
        (
            '{"weights": {"web": 1}, "token": 5}',
            "unknown key 'token'; known: weights, tokens, epochs",
        ),
        ('{"weights": 3}', "weights must be a mapping of sources to numbers, not 3"),
        ("{}", "a mix needs a source"),
    ],
)
def test_a_mix_that_cannot_be_is_one_line(sources, tmp_path, written, said):
    path = tmp_path / "mix.json"
    path.write_text(written)
    with pytest.raises(UserError, match=said) as refusal:
        call("mix", path, "--store", sources, "--out", tmp_path / "out.yaml")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out.yaml").exists()


def test_epochs_allow_what_they_say_and_a_source_counts_once(sources, tmp_path):
    path = tmp_path / "mix.yaml"
    there = tokens_of(sources, "code")
    path.write_text(f"weights: {{code: 1}}\ntokens: {2 * there}\nepochs: 2\n")
    assert "2.00 epochs" in call("mix", path, "--store", sources)
    path.write_text(f"{{web: 1, {sources}/data/web: 1}}")
    with pytest.raises(UserError, match="are one source, web; drop one"):
        call("mix", path, "--store", sources)


# ---- looking in ----


def test_show_and_decode_give_the_text_back(tokenizer, text, tmp_path):
    options = ("--tokenizer", tokenizer, "--field", "body", "--store", tmp_path)
    call("tokenize", text, *options, "--name", "x", "--hold-out", "tail", "--val-fraction", 0.1)
    said = call("show", "x", "--store", tmp_path)
    assert re.search(r"train: [\d,]+ tokens of [\d,]+ bytes, 270 documents, shards: 1", said)
    assert "0 ships sailed, 0 came back.<|endoftext|>" in said
    told = json.loads(call("show", "x", "--store", tmp_path, "--json"))
    assert told["val_documents"] == 30
    words = ("--store", tmp_path, "--document", 7)
    document = "7 ships sailed, 49 came back.<|endoftext|>\n"
    assert call("decode", "x", *words) == document
    assert call("decode", "x", *words, "--side", "val").startswith("277 ships sailed")
    ids = call("decode", "x", "--store", tmp_path, "--start", 3, "--tokens", 5, "--ids").split()
    assert len(ids) == 5
    with pytest.raises(
        UserError, match="has 270 train documents, counted from 0; no document 270"
    ):
        call("decode", "x", "--store", tmp_path, "--document", 270)
    with pytest.raises(UserError, match=r"train tokens, counted from 0; no token 10000000"):
        call("decode", "x", "--store", tmp_path, "--start", 10**7)


def test_copies_are_listed_as_such(sources):
    import shutil

    shutil.copytree(sources / "data" / "web", sources / "data" / "webtwo")
    meta = sources / "data" / "webtwo" / "meta.json"
    meta.write_text(meta.read_text().replace('"web"', '"webtwo"'))
    lines = call("list", "--store", sources).splitlines()
    assert [line.endswith("the same as web") for line in lines] == [False, False, True]


def test_a_plain_text_is_said_to_be_one_document(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree")
    words = ["tokenize", path, "--tokenizer", tokenizer, "--name", "x", "--store", tmp_path]
    refused = CliRunner().invoke(data_cli.app, list(map(str, words)))
    said = str(refused.exception)
    assert "no document fell to val" in said
    assert "each .txt is one document: 1 (a.txt); --split lines, paragraphs" in said
    call(*words, "--split", "paragraphs", "--hold-out", "tail")
    assert corpus.load_meta(tmp_path / "data" / "x").train_documents == 2
    call(*words[:-3], "y", "--store", tmp_path, "--split", r"\n\nt", "--hold-out", "tail")
    assert call("decode", "y", "--document", 1, "--store", tmp_path) == "wo<|endoftext|>\n"


def test_a_tokenizer_is_found_in_a_folder_and_one_that_is_nowhere_is_one_line(
    tokenizer, text, tmp_path, monkeypatch
):
    from ablab.core.data import hub

    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match="model holds no tokenizer.json; save one there"):
        hub.tokenizer_file(str(folder))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    assert hub.tokenizer_file(str(folder)) == folder / "tokenizer.json"
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    with pytest.raises(
        UserError, match="no tokenizer 'nobody/none': .* not in the local cache"
    ):
        hub.tokenizer_file("nobody/none")
    lacking = "the Hub cannot be reached; name files or a folder"
    if importlib.util.find_spec("datasets") is None:
        lacking = "hf:nobody/none needs the package `datasets`: pip install"
    with pytest.raises(UserError, match=lacking):
        call(
            "tokenize",
            "hf:nobody/none",
            "--tokenizer",
            folder,
            "--name",
            "x",
            "--store",
            tmp_path,
        )


def test_a_data_set_is_read_by_its_name_where_datasets_is_installed(tokenizer, text, tmp_path):
    pytest.importorskip("datasets")
    options = ("--tokenizer", tokenizer, "--field", "body", "--store", tmp_path)
    call("tokenize", f"hf:{text.parent}", *options, "--name", "hub", "--val-fraction", 0.2)
    call("tokenize", text, *options, "--name", "file", "--val-fraction", 0.2)
    digests = {corpus.load_meta(tmp_path / "data" / name).digest for name in ("hub", "file")}
    assert len(digests) == 1


def test_without_datasets_a_data_set_is_one_line(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package `datasets`: pip install 'ablab\[datasets\]'"
    ):
        call(
            "tokenize",
            f"hf:{tmp_path}",
            "--tokenizer",
            tokenizer,
            "--name",
            "x",
            "--store",
            tmp_path,
        )


def test_a_tokenizer_is_never_written_over(tokenizer, text):
    before = tokenizer.read_bytes()
    with pytest.raises(
        UserError, match="t.json exists already; delete it or choose another --out"
    ):
        call("train-tokenizer", text, "--field", "body", "--vocab", 301, "--out", tokenizer)
    assert tokenizer.read_bytes() == before
