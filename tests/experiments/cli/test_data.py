"""`ablab data`: text in, a listed token folder out; the shipped data configs agree with it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ablab.core.data import corpus
from ablab.core.errors import UserError
from ablab.experiments.cli import data as data_cli


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


def test_progress_is_drawn_on_a_terminal_only(monkeypatch):
    with data_cli._progress() as progress:
        assert progress is None  # pytest's stdout is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with data_cli._progress() as progress:
        assert callable(progress)
        progress(10**6)


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
