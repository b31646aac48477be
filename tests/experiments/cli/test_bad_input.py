"""A request that cannot be met: one line on stderr, exit code 2, and a store as it was."""

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest


def sheet(**keys) -> str:
    """An experiment file as a person would write it, with these keys in place."""
    usual = {
        "question": "q",
        "base": "[base, mini]",
        "with": "[qk_norm]",
        "runtime": "{device: cpu}",
    }
    return "".join(
        f"{key}: {value}\n" for key, value in (usual | keys).items() if value is not None
    )


def refused(lab, ablab, *words: str) -> str:
    """What `ablab WORDS` says, having checked how it says it."""
    before, runs = lab.files(), sorted(lab.store.glob("runs/*"))
    ended = ablab(*words)
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.err
    assert lab.files() == before and sorted(lab.store.glob("runs/*")) == runs
    return ended.err


# -- the words on the command line: what is wrong, and what the message must hold -------------------------------------
WORDS = {
    "quickstat": ["unknown experiment 'quickstat'", "Did you mean 'quickstart'?"],
    "absent.yaml": ["cannot read absent.yaml: No such file"],
    "good.yaml optim.lrr=0.01": ["unknown path 'optim.lrr'", "Did you mean 'lr'?"],
    "good.yaml budgt.tokens=1": ["unknown path 'budgt.tokens'", "Did you mean 'budget'?"],
    "good.yaml optim.lr": ["'optim.lr' must look like path=value"],
    "good.yaml optim.lr=[1": ["'optim.lr=[1'", "not YAML"],
    "good.yaml optim.lr=fast": ["optim.lr='fast' must be a number > 0"],
    "good.yaml optim.lr=": ["optim.lr=null must be a number > 0"],
    "good.yaml optim.lr=.inf": ["optim.lr=inf must be a number > 0"],
    "good.yaml budget.tokens=100M": [
        "budget.tokens='100M' must be a whole number >= 1; write 100e6"
    ],
    "good.yaml budget.tokens=1.5B": ["write 1.5e9"],
    "good.yaml budget.tokens=10.5": ["budget.tokens=10.5 must be a whole number"],
    "good.yaml budget.tokens=10": [
        "budget.tokens=10 is less than one step of batch*context=64"
    ],
    "good.yaml model.tied=maybe": ["model.tied='maybe' must be true or false"],
    "good.yaml model.width=20": [
        "model.width=20",
        "multiple of head_dim*group=8; nearest: 16, 24",
    ],
    "good.yaml model.attention.head_dim=1": ["head_dim=1 must be even", "nearest: 2"],
    "good.yaml model.attention.heads=3 model.attention.group=2": [
        "model.attention.heads=3 is no multiple of group=2; nearest: 2, 4"
    ],
    "good.yaml schedule.warmup_steps=21": [
        "schedule.warmup_steps=21 exceeds the run's 20 steps"
    ],
    "good.yaml schedule=cosin": ["unknown kind 'cosin'", "Did you mean 'cosine'?"],
    "good.yaml schedule=adam": ["schedule cannot hold 'adam'", "cosine"],
    "good.yaml optim.chains.hidden.steps.decay.schedule=liner": [
        "must be one of constant, linear, lr",
        "Did you mean 'linear'?",
    ],
    "good.yaml with.qk_norm.scal=1": ["unknown path 'scal'", "Did you mean 'scale'?"],
    "good.yaml with.qk_nrm.scale=1": [
        "unknown path 'with.qk_nrm.scale'",
        "with.qk_norm.<dose>",
    ],
    "good.yaml design=leave_1_out": [
        "unknown design 'leave_1_out'",
        "Did you mean 'leave_one_out'?",
    ],
    "good.yaml seeds=[-1]": ["seeds=[-1] must be a list, each a whole number >= 0"],
    "good.yaml runtime.device=gpu": ["runtime.device='gpu' must be one of auto, cpu, cuda"],
    "good.yaml runtime.micro_batch=3": [
        "runtime.micro_batch=3 does not divide data.batch=4; nearest: 2, 4"
    ],
    "good.yaml --only nothing": [
        "--only 'nothing' fits no cell",
        "Cells: full, base, - qk_norm",
    ],
    "good.yaml --only base --only !base": [
        "--only 'base' --only '!base' leaves no cell to run",
        "Cells: full, base, - qk_norm",
    ],
    "good.yaml seed=3": [
        "seed=3 would be overwritten: each run has its own; write seeds: [3], or give --seeds 3"
    ],
    "good.yaml --seeds 3-1": ["--seeds '3-1' must look like 0-4 or 0,3,7"],
    "good.yaml --jobs none": ["--jobs"],
    "good.yaml --plugins missing": ["--plugins missing is not a folder"],
    "good.yaml --plugins torn": ["torn/torn.py:2 cannot be imported: NameError"],
    "good.yaml data.vocab=65": ["data.vocab=65", "tokenized with 64 ids; set data.vocab=64"],
    "good.yaml data.context=321 budget.tokens=13000": [
        "val.bin holds 321 tokens, but context=321 needs at least 322"
    ],
    "good.yaml data.name=web": [
        "no token folder",
        "ablab data tokenize TEXT --tokenizer TOKENIZER --name web",
    ],
    "good.yaml data.name=../web": [
        "data.name='../web' must be a plain folder name",
        "try 'web'",
    ],
    "empty.yaml data.name=empty": ["cannot read", "empty/meta.json"],
    "replicas.yaml --seeds 0,1000": ["seed 1000 of replicas would run in both A and B"],
}


@pytest.mark.parametrize("words", WORDS)
def test_a_wrong_word_is_named_with_the_cure(lab, ablab, words):
    (lab.root / "good.yaml").write_text(sheet())
    (lab.root / "empty.yaml").write_text(sheet())
    (lab.root / "replicas.yaml").write_text(sheet(design="replicate"))
    (lab.store / "data" / "empty").mkdir(exist_ok=True)
    (lab.root / "torn").mkdir(exist_ok=True)
    (lab.root / "torn" / "torn.py").write_text("import math\nmath.tau = undefined\n")
    said = refused(lab, ablab, "run", *words.split(" "), "--no-mlflow")
    assert all(part in said for part in WORDS[words]), said


# -- the file ----------------------------------------------------------------------------------------------------------
FILES = {
    "unknown key": (
        sheet(desgin="add_one"),
        ["unknown key 'desgin'", "Did you mean 'design'?"],
    ),
    "key twice": (sheet() + "question: r\n", ["bad.yaml:5", "'question' stands there twice"]),
    "syntax": ("question: q\nbase: [base, mini\nwith: []\n", ["bad.yaml:3 is not YAML"]),
    "a list": ("- question\n", ["bad.yaml must hold a mapping of names to values"]),
    "not text": ("question: \udcff\n", ["bad.yaml is not UTF-8 text"]),
    "no question": (sheet(question=None), ["question is missing"]),
    "base is a word": (sheet(base="mini"), ["base='mini' must be a list"]),
    "unknown config": (
        sheet(base="[base, size/70n]"),
        ["unknown config 'size/70n'", "Did you mean 'size/70m'?"],
    ),
    "near a config of one's own": (
        sheet(base="[base, minii]"),
        ["unknown config 'minii'", "Did you mean 'mini'?"],
    ),
    "mistake in a config": (
        sheet(base="[base, mini, wrong]"),
        ["wrong.yaml: unknown key 'model.widht'", "Did you mean 'width'?"],
    ),
    "no data": (sheet(base="[base]"), ["the recipe names no data"]),
    "with is a word": (
        sheet(**{"with": "qk_norm"}),
        ["with='qk_norm' must be a list of interventions"],
    ),
    "treatment": (sheet(treatment="[qk_norm]"), ["unknown key 'treatment'", "`with`"]),
    "two interventions in an item": (
        sheet(**{"with": "[{qk_norm: {}, muon: {}}]"}),
        ["with lists {'qk_norm': {}, 'muon': {}}; an item is one intervention"],
    ),
    "unknown intervention": (
        sheet(**{"with": "[qk_nrom]"}),
        ["unknown intervention 'qk_nrom'", "Did you mean 'qk_norm'?", "--plugins"],
    ),
    "intervention twice": (
        sheet(**{"with": "[qk_norm, qk_norm]"}),
        ["with names 'qk_norm' twice"],
    ),
    "unknown dose": (
        sheet(**{"with": "[{gating: {par: head}}]"}),
        ["unknown key 'with.gating.par'", "Did you mean 'per'?"],
    ),
    "wrong dose": (
        sheet(**{"with": "[{gating: {per: heads}}]"}),
        ["with.gating.per='heads' must be one of", "Did you mean 'head'?"],
    ),
    "requirement": (
        sheet(**{"with": "[normuon]"}),
        ["cell 'full'", "normuon builds on muon; add muon"],
    ),
    "unknown design": (sheet(design="loo"), ["unknown design 'loo'", "leave_one_out"]),
    "unknown metric": (
        sheet(metric="{name: val/los}"),
        ["metric val/los: which way is better is not known", "Did you mean 'val/loss'?"],
    ),
    "metric direction": (
        sheet(metric="{better: down}"),
        ["metric.better='down' must be one of lower, higher"],
    ),
    "no smallest effect": (
        sheet(equivalence="0"),
        ["equivalence=0 must be a number > 0 or null"],
    ),
    "negative smallest effect": (
        sheet(equivalence="-1.0e-3"),
        ["equivalence=-0.001 must be a number > 0 or null"],
    ),
    "infinite smallest effect": (
        sheet(equivalence=".inf"),
        ["equivalence=inf must be a number > 0 or null"],
    ),
    "smallest effect in words": (
        sheet(equivalence="small"),
        ["equivalence='small' must be a number > 0 or null"],
    ),
    "seed in set": (sheet(set="{seed: 3}"), ["seed=3 would be overwritten", "seeds: [3]"]),
    "negative study seed": (
        sheet(study="{space: {optim.lr: {log: [0.1, 1]}}, seeds: [-3]}"),
        ["study.seeds=[-3] must be a list, each a whole number >= 0"],
    ),
    "negative hours": (
        sheet(study="{space: {optim.lr: {log: [0.1, 1]}}, hours: -1}"),
        ["study.hours=-1 must be a number >= 0 or null"],
    ),
    "hard bounds": (
        sheet(study="{space: {}, hard: {optim.lr: 3}}"),
        ["study.hard={'optim.lr': 3} must be a mapping, each a list, each a number"],
    ),
    "unknown path in set": (
        sheet(set="{optim.lrr: 1}"),
        ["unknown path 'optim.lrr'", "Did you mean 'lr'?"],
    ),
    "runtime": (
        sheet(runtime="{devise: cpu}"),
        ["unknown key 'runtime.devise'", "Did you mean 'device'?"],
    ),
    "no seeds": (sheet(seeds="[]"), ["bad names no seeds"]),
}


@pytest.mark.parametrize("flaw", FILES)
def test_a_mistake_in_the_file_is_named_with_the_cure(lab, ablab, flaw):
    text, parts = FILES[flaw]
    (lab.root / "bad.yaml").write_bytes(text.encode(errors="surrogateescape"))
    (lab.root / "wrong.yaml").write_text("model: {widht: 16}\n")
    said = refused(lab, ablab, "run", "bad.yaml", "--no-mlflow")
    assert all(part in said for part in parts), said


def test_two_interventions_that_choose_one_slot_are_refused_by_name(lab, ablab):
    (lab.root / "choosers").mkdir(exist_ok=True)
    text = '''
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.parts.schedule import Constant

@register("flat", slots=("schedule",), off="cosine", source="a test")
class Flat:
    """A flat schedule."""
    def apply(self, recipe):
        return edit(recipe, "schedule", put(Constant()))
'''
    (lab.root / "choosers" / "flat.py").write_text(text)
    (lab.root / "both.yaml").write_text(sheet(**{"with": "[wsd, flat]"}))
    said = refused(lab, ablab, "run", "both.yaml", "--plugins", "choosers")
    assert "wsd and flat both choose schedule; drop one, or list them in separate cells" in said


OTHERS = {
    ("show", "good.yaml", "--cell", "ful"): ["no cell 'ful'", "Did you mean 'full'?"],
    ("show", "good.yaml", "--diff", "bas"): ["no cell 'bas'", "Did you mean 'base'?"],
    ("show", "quickstart", "--cell", "- muon"): [
        "no cell '- muon'. Did you mean '- muon (and normuon)'?"
    ],
    ("report", "good.yaml"): ["experiment 'good' has no runs"],
    ("report", "gut"): ["no experiment 'gut'"],
    ("report", "quickstrt"): ["no experiment 'quickstrt'", "Did you mean 'quickstart'?"],
    ("bench", "overhaed"): ["No such command 'overhaed'. Did you mean 'overhead'?"],
    ("new", "intervention", "My Idea"): ["'My Idea' cannot name an intervention"],
    ("new", "intervention", "muon"): ["'muon' exists already"],
    ("list", "--al"): ["No such option"],
}


def test_other_commands_refuse_the_same_way(lab, ablab):
    (lab.root / "good.yaml").write_text(sheet())
    for words, parts in OTHERS.items():
        said = refused(lab, ablab, *words)
        assert all(part in said for part in parts), said


def test_debug_shows_where_and_keeps_the_message(lab):
    ended = lab.run("run", "absent.yaml", "--debug")
    assert ended.code == 1
    assert "Traceback" in ended.err
    last = ended.err.rstrip().splitlines()[-1]
    assert last.endswith("cannot read absent.yaml: No such file or directory")


# -- what only a worker can see ----------------------------------------------------------------------------------------
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(lab):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (lab.root / "cuda.yaml").write_text(sheet(runtime="{device: cuda}"))
    before = lab.files()
    ended = lab.run("run", "cuda.yaml", "--no-mlflow", "--jobs", "1", "--quiet")
    assert ended.code == 2
    assert "runtime.device=cuda, but torch sees no GPU here" in ended.err
    assert ended.err.count("\n") == 1
    assert lab.files() == before


def test_a_token_beyond_the_vocabulary_is_refused_by_number(new_lab, write_token_folder):
    lab = new_lab()
    write_token_folder(lab.store / "data" / "wide", vocab=64, top=80)
    (lab.root / "wide.yaml").write_text(sheet(design="replicate"))
    words = ("--no-mlflow", "--jobs", "1", "--quiet", "--run-inert")
    ended = lab.run("run", "wide.yaml", "data.name=wide", *words)
    assert ended.code == 2
    assert "beyond data.vocab=64" in ended.err
    assert ended.err.startswith("error: A, seed 0: ")
    assert ended.err.count("\n") == 1


def test_tokens_overwritten_at_equal_size_between_two_calls_are_refused(
    new_lab, write_token_folder
):
    """Both calls would stand in one verdict, under one digest."""
    lab = new_lab()
    (lab.root / "good.yaml").write_text(sheet(design="replicate"))
    words = ("run", "good.yaml", "--no-mlflow", "--jobs", "1", "--quiet", "--run-inert")
    assert lab.run(*words, "--seeds", "0").code == 0
    other = write_token_folder(lab.root / "other", train=4000, seed=1)
    shutil.copyfile(other / "train.bin", lab.store / "data" / "tiny" / "train.bin")
    before = lab.files()
    ended = lab.run(*words, "--seeds", "0-1")
    assert ended.code == 2
    assert "a file was changed; restore it" in ended.err
    assert ended.err.count("\n") == 1
    assert lab.files() == before


# -- disks -------------------------------------------------------------------------------------------------------------
def test_a_store_that_cannot_be_written_is_named(lab, ablab, tmp_path):
    (lab.root / "good.yaml").write_text(sheet())
    (tmp_path / "file").write_text("")
    shutil.copytree(lab.store / "data", tmp_path / "store" / "data")
    (tmp_path / "store" / "experiments").write_text("in the way")
    words = ("run", "good.yaml", "--run-inert", "--no-mlflow", "--quiet", "--store")
    for store, what in (
        (tmp_path / "file", "no token folder"),
        (tmp_path / "store", f"cannot write {tmp_path}/store/experiments"),
    ):
        assert what in refused(lab, ablab, *words, str(store))


@pytest.fixture
def small_disk(new_lab):
    """A lab whose store holds 1 MB and is all but full; where nothing may be mounted, its files hold 20 kB at most."""
    lab, limits = new_lab(), {}
    kept = shutil.move(lab.store, lab.root / "kept")
    lab.store.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(lab.store)],
            capture_output=True,
        ).returncode
        == 0
    )
    shutil.copytree(kept, lab.store, dirs_exist_ok=True)
    if mounted:
        (lab.store / "ballast").write_bytes(bytes(900_000))
    else:
        limits["preexec_fn"] = lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, 20_000)
        )
    yield lab, limits
    if mounted:
        subprocess.run(["umount", str(lab.store)], check=True)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_when_there_is_space(small_disk):
    lab, limits = small_disk
    runtime = {"save_seconds": 0}
    lab.sheet("full", **{"with": []}, design="replicate", seeds=[0], runtime=runtime)
    words = ("run", "full.yaml", "--no-mlflow", "--jobs", "1", "--run-inert", "--quiet")
    ended = lab.run(*words, **limits)
    assert ended.code == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "cannot write" in ended.err
    assert "No space left" in ended.err or "File too large" in ended.err
    assert "free space" in ended.err
    assert list(lab.store.rglob("*.partial")) == []
    assert list(lab.store.glob("runs/*/result.json")) == []
    for path in lab.store.glob("runs/*/*.json"):
        assert json.loads(path.read_text())
    for path in lab.store.glob("runs/*/*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())
    (lab.store / "ballast").unlink(missing_ok=True)
    ended = lab.run(*words)
    assert ended.code == 0, ended.err
    assert len(lab.results("full")) == 2


def test_a_folder_without_permission_is_named(new_lab, ablab, lab):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    other = new_lab()
    other.sheet("good")
    Path(other.store).chmod(0o500)
    try:
        words = (str(other.root / "good.yaml"), "--store", str(other.store), "--run-inert")
        assert f"cannot write {other.store}" in refused(lab, ablab, "run", *words)
    finally:
        Path(other.store).chmod(0o700)
