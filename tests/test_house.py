"""The rules of the house, read from the source: who may import whom, what is loaded when, how packed a line may be."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tokenize
import zipfile
from collections import Counter
from pathlib import Path
from token import COMMENT, DEDENT, ENCODING, ENDMARKER, INDENT, NEWLINE, NL

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "core", "ablations", "analysis", "experiments", "configs")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# A folder may import itself and what stands here.
MAY_IMPORT = {
    "kernels": set(),
    "core": {"kernels"},
    "ablations": {"kernels", "core"},
    "analysis": {"core"},
    "experiments": {"kernels", "core", "ablations", "analysis"},
    "configs": set(),
}
READ_ONLY_CORE = {  # all that analysis may use of core
    "ablab.core.store.evaluation",
    "ablab.core.store.held_out",
    "ablab.core.store.ledger",
    "ablab.core.store.metrics",
    "ablab.core.store.planned",
    "ablab.core.store.record",
    "ablab.core.store.registration",
    "ablab.core.store.result",
    "ablab.core.store.store",
    "ablab.core.store.study_record",
    "ablab.core.errors",
    "ablab.core.store.files",
}
TORCH = {  # the files that work on tensors; everything else can be imported, listed and hashed without torch
    "ablations/checks/coords.py",
    "ablations/checks/liveness.py",
    "ablations/checks/timeline.py",
    "core/data/tokens.py",
    "core/interop/exporting.py",
    "core/interop/importing.py",
    "core/interop/modeling_ablab.py",
    "core/interop/score.py",
    "core/interop/speaking.py",
    "core/interop/weights.py",
    "core/interop/widening.py",
    "core/model/decode.py",
    "core/model/init.py",
    "core/model/layers.py",
    "core/model/objective.py",
    "core/model/transformer.py",
    "core/runtime/compilation.py",
    "core/runtime/replay.py",
    "core/runtime/world.py",
    "core/train/banks.py",
    "core/train/checkpoint.py",
    "core/train/cutting.py",
    "core/train/dealing.py",
    "core/train/dynamics.py",
    "core/train/evaluate.py",
    "core/train/fully_sharded.py",
    "core/train/handover.py",
    "core/train/probe.py",
    "core/train/run.py",
    "core/train/saving.py",
    "core/train/scattered.py",
    "core/train/sharded.py",
    "core/train/step.py",
    "core/train/stopwatch.py",
    "core/train/trainer.py",
    "experiments/bench/ceilings.py",
    "experiments/bench/checkpoint.py",
    "experiments/bench/clocks.py",
    "experiments/bench/decode.py",
    "experiments/bench/hugging_face.py",
    "experiments/bench/nanochat.py",
    "experiments/bench/peer.py",
    "experiments/bench/peers.py",
    "experiments/bench/kernels/attention.py",
    "experiments/bench/kernels/case.py",
    "experiments/bench/kernels/comparison.py",
    "experiments/bench/kernels/cross_entropy.py",
    "experiments/bench/kernels/feed_forward.py",
    "experiments/bench/kernels/fp8_projection.py",
    "experiments/bench/kernels/fp8_swiglu.py",
    "experiments/bench/kernels/linear_cross_entropy.py",
    "experiments/bench/kernels/measure.py",
    "experiments/bench/kernels/newton_schulz.py",
    "experiments/bench/kernels/optimizer_step.py",
    "experiments/bench/kernels/residual_norm.py",
    "experiments/bench/kernels/swiglu.py",
    "experiments/bench/kernels/swiglu_epilogue.py",
    "experiments/bench/overhead.py",
    "experiments/bench/phases.py",
    "experiments/bench/plain_loop.py",
    "experiments/bench/scale.py",
    "experiments/bench/step.py",
    "kernels/ahead.py",
    "kernels/attention.py",
    "kernels/attention_backward.py",
    "kernels/attention_forward.py",
    "kernels/cross_entropy.py",
    "kernels/fp8.py",
    "kernels/fp8_cast.py",
    "kernels/fp8_cross_entropy.py",
    "kernels/fp8_linear_cross_entropy.py",
    "kernels/fp8_projection.py",
    "kernels/fp8_swiglu.py",
    "kernels/linear_cross_entropy.py",
    "kernels/newton_schulz.py",
    "kernels/optimizer_step.py",
    "kernels/residual_norm.py",
    "kernels/swiglu.py",
    "kernels/swiglu_epilogue.py",
    "kernels/swiglu_quack.py",
}
# Inside a folder: a room may import itself, errors.py, and what stands here.
ROOMS: dict[str, dict[str, set[str]]] = {
    "core": {
        "errors": set(),
        "language": set(),
        "store": {"language"},
        "parts": {"language"},
        "recipe": {"language", "parts"},
        "model": {"language", "parts", "recipe"},
        "data": {"language", "recipe", "store"},
        "runtime": {"language", "parts", "recipe", "model"},
        "fusion": {"language", "parts", "recipe", "model", "runtime"},
        "interop": {"language", "parts", "recipe", "model", "data", "store"},
        "train": {"language", "parts", "recipe", "model", "data", "runtime", "fusion", "store"},
    },
    "analysis": {
        "effects": set(),
        "tuning": {"effects"},
        "pictures": {"effects", "tuning"},
        "pages": {"effects", "tuning", "pictures"},
        "mlflow_runs": {"effects"},
        "api": {"effects", "tuning", "pictures", "pages", "mlflow_runs"},
        "": {"api"},
    },
    "experiments": {
        "text": set(),
        "evaluate": {"text"},
        "plan": {"text", "evaluate"},
        "track": {"text"},
        "run": {"text", "evaluate", "plan", "track"},
        "launch": {"text", "plan", "track", "run"},
        "tune": {"text", "evaluate", "plan", "track", "run"},
        "bench": {"text", "plan", "track", "run", "tune"},
        "cli": {"text", "evaluate", "plan", "track", "run", "launch", "tune", "bench"},
    },
}
HEAVY = {"torch", "mlflow", "optuna"}
ENVIRONMENT = {  # below experiments/, who touches an environment variable, and why; none of them runs in a step
    "core/store/store.py:store_root": "$ABLAB_STORE, where to write",
    "core/fusion/places.py:places": "$TRITON_INTERPRET, which lets kernels run on a CPU",
    "core/runtime/runtime.py:visible_gpus": "$CUDA_VISIBLE_DEVICES, counted without torch",
    "core/train/trainer.py:top": "sets what cuBLAS reads once, so that it repeats its bits",
}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    dotted = shown(path.with_suffix("")).replace("/", ".")
    return f"ablab.{dotted}".removesuffix(".__init__")


TREES = {path: ast.parse(path.read_text()) for path in MODULES}
NAMES = {module_of(path) for path in MODULES}


def imported(node: ast.AST) -> list[str]:
    """Modules named by an import statement; `from ablab.core.recipe import edit` names ablab.core.recipe.edit."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import of {node.module}"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [one for one in inner if one in NAMES] or [node.module]
    return []


def imports(path: Path) -> set[str]:
    nodes = ast.walk(TREES[path])
    return {name for node in nodes for name in imported(node)}


def at_import(tree: ast.AST):
    """Every statement that runs when the module is imported.

    Not the bodies of functions, nor what only type checkers see.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(node)


def functions(tree: ast.AST):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


# ---- who may import whom ----


def test_imports_point_one_way():
    strays = []
    for path in MODULES:
        folder = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("ablab.") else folder
            if other != folder and other not in MAY_IMPORT[folder]:
                strays.append(f"{shown(path)} imports {name}")
            if folder == "analysis" and other == "core" and name not in READ_ONLY_CORE:
                strays.append(f"{shown(path)} imports {name}, which analysis may not")
    assert not strays


def room_of(module: str) -> tuple[str, str]:
    """Folder and room; a file that stands in no room is a room of its own."""
    _, folder, *rest = module.split(".")
    return folder, rest[0] if rest else ""


def climbing(importer: str, name: str) -> str | None:
    """What is wrong with a module that imports another one of its folder; None: nothing."""
    folder, room = room_of(importer)
    other_folder, other = room_of(name)
    if folder not in ROOMS or folder != other_folder or other in (room, "errors"):
        return None
    if other in ROOMS[folder].get(room, set()):
        return None
    return f"{folder}/{room} imports ablab.{folder}.{other}"


def test_rooms_of_a_folder_import_one_way():
    found = set()
    for path in MODULES:
        found |= {climbing(module_of(path), name) for name in imports(path) & NAMES}
    assert found == {None}


def test_the_rule_of_rooms_sees_a_climb_a_peer_and_an_unknown_room():
    assert climbing("ablab.core.parts.norm", "ablab.core.recipe.edit")
    assert climbing("ablab.core.data.corpus", "ablab.core.fusion.places")
    assert climbing("ablab.core.store.record", "ablab.core.recipe.recipe")
    assert climbing("ablab.core.attic.old", "ablab.core.recipe.edit")
    assert climbing("ablab.experiments.run.worker", "ablab.experiments.cli.main")
    assert not climbing("ablab.core.recipe.edit", "ablab.core.language.part")
    assert not climbing("ablab.core.recipe.edit", "ablab.core.recipe.recipe")
    assert not climbing("ablab.core.store.record", "ablab.core.errors")
    assert not climbing("ablab.experiments.run.worker", "ablab.core.train.trainer")


@pytest.mark.parametrize("folder", ROOMS)
def test_the_table_of_rooms_has_no_circle(folder):
    """A row names only rows above it."""
    above: set[str] = set()
    for room, below in ROOMS[folder].items():
        assert below <= above, room
        above.add(room)


def test_no_bare_folder_is_imported():
    """`import core` would work from a checkout and nowhere else."""
    assert not [
        f"{shown(path)}: {name}"
        for path in MODULES
        for name in imports(path)
        if name.split(".")[0] in FOLDERS
    ]


def test_no_circle_even_through_imports_inside_functions():
    graph = {module_of(path): imports(path) & NAMES for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]):
        if name in trail:
            circle = trail[trail.index(name) :]
            raise AssertionError(" -> ".join((*circle, name)))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


SEEN_AND_UNSEEN = """
if TYPE_CHECKING:
    import torch
try:
    import mlflow
except ImportError: pass
class A:
    import optuna
def f():
    import torch
"""


def test_what_runs_at_import_is_told_from_what_does_not():
    tree = ast.parse(SEEN_AND_UNSEEN)
    found = [name for node in at_import(tree) for name in imported(node)]
    assert found == ["mlflow", "optuna"]


@pytest.mark.parametrize(
    "line",
    ["from ablab.core.recipe import edit", "from ablab.core.recipe.edit import put"],
)
def test_an_import_names_the_module_however_it_is_written(line):
    (statement,) = ast.parse(line).body
    assert imported(statement) == ["ablab.core.recipe.edit"]


# ---- what is loaded when ----


def test_torch_mlflow_and_optuna_are_imported_at_the_top_of_no_other_file():
    heavy = {
        shown(path)
        for path in MODULES
        for node in at_import(TREES[path])
        for name in imported(node)
        if name.split(".")[0] in HEAVY
    }
    assert heavy == TORCH


SLOW_TO_LOAD = {"pandas", "matplotlib", "scipy", "pyarrow", "tokenizers"}
RUNS_AND_LISTS_MODULES = """
import sys
from ablab.experiments.cli.main import main
sys.argv = ["ablab", *sys.argv[1:]]
try: main()
except SystemExit as end: assert not end.code
print("\\nLOADED", *sys.modules)
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["list"], ["run", "--help"], ["bench", "step", "--help"]],
    ids=" ".join,
)
def test_a_light_command_loads_nothing_heavy(words):
    command = [sys.executable, "-c", RUNS_AND_LISTS_MODULES, *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    said, _, listed = result.stdout.rpartition("\nLOADED ")
    loaded = set(listed.split())
    assert "ablab" in said or "Interventions" in said or "Usage" in said
    assert "ablab.experiments.cli.main" in loaded
    assert not loaded & (HEAVY | SLOW_TO_LOAD)


def test_no_environment_variable_is_touched_below_experiments_but_by_those_listed():
    """A forward or a step that reads one would compute different things under one name."""
    below = [path for path in MODULES if shown(path).split("/")[0] not in ABOVE]
    readers = {reader for path in below for reader in readers_of_environment(path)}
    assert readers == set(ENVIRONMENT)


ABOVE = ("experiments", "configs")


def readers_of_environment(path: Path):
    """FILE:FUNCTION, or FILE:top, of whatever names the environment."""
    inside = {
        id(node): function.name
        for function in functions(TREES[path])
        for node in ast.walk(function)
    }
    for node in ast.walk(TREES[path]):
        words = {getattr(node, key, "") for key in ("attr", "id", "name")}
        if words & {"environ", "getenv", "environb"}:
            yield f"{shown(path)}:{inside.get(id(node), 'top')}"


# ---- how packed a thing may be ----

TOKENS = {  # mean of a code line; lines of 25 and more, in per cent
    "sources": (9.0, 3.0),
    "tests": (10.0, 5.0),
}
DENSE = 25
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NOT_COUNTED = (COMMENT, NL, NEWLINE, INDENT, DEDENT, ENCODING, ENDMARKER)


def tokens_of(source: str) -> list[int]:
    """Tokens on each code line; the text of a multi-line string does not count."""
    counts: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        spans_lines = token.type == tokenize.STRING and token.start[0] != token.end[0]
        if token.type not in NOT_COUNTED and not spans_lines:
            counts[token.start[0]] += 1
    return list(counts.values())


@pytest.mark.parametrize("which", TOKENS)
def test_a_line_says_one_thing(which):
    """The models of the field stand at 6 to 8 tokens a code line, and 0.2 to 2.5 % of lines with 25 or more."""
    paths = MODULES if which == "sources" else TESTS
    lines = [count for path in paths for count in tokens_of(path.read_text())]
    dense = [count for count in lines if count >= DENSE]
    most, most_dense = TOKENS[which]
    assert sum(lines) / len(lines) <= most
    assert 100 * len(dense) / len(lines) <= most_dense


def test_what_packs_a_line_is_counted():
    source = 'x = 1  # one\n"""\nall of this\nis one string"""\n\ny = [a, b]\n'
    assert tokens_of(source) == [3, 7]


def test_no_line_is_wider_than_120_columns():
    wide = []
    for path in [*MODULES, *TESTS]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > 120:
                wide.append(f"{shown(path)}:{number}")
    assert not wide


def test_a_commit_is_checked_by_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = config["repos"][0]["hooks"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        ["make", "--dry-run", "lint"],
        cwd=ROOT,
        env=alone,  # a make that is asked by another says where it is
        capture_output=True,
        text=True,
        check=True,
    )
    lint = [line.removesuffix(" .") for line in made.stdout.splitlines()]
    assert [hook["entry"] for hook in hooks] == lint[-len(hooks) :]


# ---- what is shipped ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command = [*build, "--outdir", copy / "dist", copy]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_every_module_and_every_data_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    # catalog/results/ is evidence for readers of the repository, and stays there.
    folders = ("experiments/catalog", "analysis/pages/web")
    beside = [path for folder in folders for path in (ROOT / folder).iterdir()]
    beside += (ROOT / "configs").rglob("*")
    beside += (ROOT / "experiments/track").glob("*.js")
    data = [path for path in beside if path.is_file() and path.suffix != ".pyc"]
    assert held == {f"ablab/{shown(path)}" for path in (*MODULES, *data)}


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A folder of a user's own, and a function that runs the wheel's `ablab` there."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("elsewhere")

    def ablab(*words):
        command = [sys.executable, "-c", RUNS_FROM_THE_WHEEL, site, *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return folder, ablab


def test_the_wheel_runs_where_nothing_else_of_ablab_is(elsewhere):
    _, ablab = elsewhere
    listed = ablab("list")
    assert listed.returncode == 0
    assert not listed.stderr
    interventions = (ROOT / "ablations/interventions").glob("[!_]*.py")
    experiments = (ROOT / "experiments/catalog").glob("*.yaml")
    for path in [*interventions, *experiments]:
        assert f"  {path.stem} " in listed.stdout
    described = ablab("show", "quickstart")  # reads base, size and data configs
    assert described.returncode == 0
    assert "f1114b0699edd867" in described.stdout


OWN_CONFIG = """
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: tiny, vocab: 64, context: 16, batch: 4, held_out: 320}
budget: {tokens: 320}
schedule: {warmup_steps: 1}
"""
OWN_SHEET = """
question: Does my idea run beside my code?
base: [base, mini]
with: [my_idea]
design: single
seeds: [0]
"""


def test_the_wheel_trains_a_users_own_idea_by_a_sheet_beside_it(elsewhere, write_token_folder):
    folder, ablab = elsewhere
    write_token_folder(folder / "ablab-store" / "data" / "tiny")
    (folder / "mini.yaml").write_text(OWN_CONFIG)
    (folder / "mine.yaml").write_text(OWN_SHEET)
    made = ablab("new", "intervention", "my_idea")
    assert "in a checkout of ablab" in made.stdout, made.stderr
    words = ("--plugins", "plugins", "--no-mlflow", "--run-inert", "--json", "--quiet")
    ended = ablab("run", "mine.yaml", *words)
    assert ended.returncode == 0, ended.stderr
    (run,) = json.loads(ended.stdout)["outcome"]["trained"]
    recipe = (folder / "ablab-store" / "runs" / run / "recipe.yaml").read_text()
    assert "my_idea" in recipe


# This checkout may be installed editable.
RUNS_FROM_THE_WHEEL = """
import sys
sys.meta_path = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
_, site, *words = sys.argv
sys.path.insert(0, site)
sys.argv = ["ablab", *words]
from ablab.experiments.cli import main as cli
assert cli.__file__.startswith(site), cli.__file__
cli.main()
"""
