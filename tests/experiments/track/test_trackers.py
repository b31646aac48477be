"""One contract for all trackers, read back with each one's own reader.  What is MLflow's alone is tested apart."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.track import chosen
from ablab.experiments.track import trackers as trackers_module
from ablab.experiments.track.cards import card_of
from ablab.experiments.track.chosen import MLFLOW, TENSORBOARD, WANDB, tracked
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.tensorboard import TensorBoard
from ablab.experiments.track.tracker import View
from ablab.experiments.track.trackers import VIEWS, Trackers
from ablab.experiments.track.wandb import Wandb

ROOT = Path(__file__).parents[3]
ROWS = [
    Planned("base", 0, 0, "a" * 16, params={"optim.lr": 0.02, "with.muon": True}),
    Planned("+ gating / head", 0, 0, "b" * 16, "base", params={"optim.lr": 0.02}),
]
PLAN = GridPlan("demo@optim.lr=0.02", "Which arm helps?", "val/loss", "lower", "add_one", ROWS)
RUN = ROWS[0].run
STEPS = range(10, 101, 10)
Points = dict[str, list[tuple[int, float]]]  # arm -> steps and train/loss, as they were written


def loss(step: int) -> float:
    return 2 + 1 / step


def worker(store: Store, run: str, steps: range, seconds_a_step: float = 0.5) -> Iterator:
    """A worker's steps, as it writes each before the runner hears of it."""
    folder = store.run(run).folder
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("data: {name: web, digest: 0123abcd}\nseed: 0\n")
        (folder / "run.json").write_text(json.dumps({"started": 1.76e9}))
    for step in steps:
        seconds = step * seconds_a_step
        scalars = {"tokens": step * 1000, "train/loss": loss(step)}
        store.run(run).log(step, scalars, {"seconds": seconds})
        yield step, scalars | {"odd": float("nan")}, seconds


def train(
    store: Store, run: str, steps: range = STEPS, trackers: Trackers | None = None
) -> None:
    """To the end; beside it the runner passes on what it hears."""
    for heard in worker(store, run, steps):
        if trackers:
            trackers.log(run, *heard)
    last = steps[-1]
    metrics = {"train/loss": loss(last), "val/loss": 2.5}
    result = Result(run=run, status=FINISHED, step=last, tokens=1000 * last, metrics=metrics)
    store.run(run).finish(result)
    if trackers:
        trackers.close(run)


def killed_at(store: Store, step: int, tracker) -> None:
    """A live run that ends without a word."""
    tracker.open(card_of(store, PLAN, ROWS[0]))
    for heard in worker(store, RUN, range(10, step + 1, 10), 0.7):
        tracker.log(*heard)
    tracker.flush()


class TrackerContract:
    """What every tracker passes.  A new one inherits this, and says how its points are read."""

    name: str

    def points(self, store: Store) -> Points:
        raise NotImplementedError

    def kill(self, store: Store, step: int) -> None:
        killed_at(store, step, self.view(store).tracker())

    def view(self, store: Store, warn=print) -> View:
        return VIEWS[self.name](store, warn)

    def live(self, store: Store, said: list[str]) -> Trackers:
        return Trackers(store, PLAN, said.append, [self.name])

    @pytest.fixture
    def store(self, tmp_path, migrated, monkeypatch) -> Store:
        """With a database that is ready, which takes MLflow 3 s."""
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setenv("WANDB_MODE", "offline")
        root = tmp_path / "store"
        root.mkdir()
        (root / "mlflow.db").write_bytes(migrated[0].read_bytes())
        store = Store(root)
        store.write_plan(PLAN)
        return store

    def test_each_record_is_shown_once_while_it_trains(self, store):
        said = []
        trackers = self.live(store, said)
        for row in ROWS:
            train(store, row.run, trackers=trackers)
        trackers.finish()
        assert said == []
        expected = [(step, pytest.approx(loss(step))) for step in STEPS]
        assert self.points(store) == {row.cell: expected for row in ROWS}
        assert self.view(store).sync([]) == {
            "added": 0,
            "continued": 0,
            "current": 2,
            "missing": 0,
        }

    def test_a_killed_run_goes_on_and_no_step_is_there_twice(self, store):
        self.kill(store, 60)
        store.run(RUN).rewind(40)  # its last checkpoint
        trackers = self.live(store, said := [])
        train(store, RUN, range(50, 101, 10), trackers)
        trackers.finish()
        assert said == []
        assert [step for step, _ in self.points(store)["base"]] == list(STEPS)

    def test_sync_rebuilds_the_view_from_the_run_folders_and_sends_nothing_twice(self, store):
        for row in ROWS:
            train(store, row.run)
        view = self.view(store)
        assert view.sync([PLAN.name])["added"] == 2
        expected = [(step, pytest.approx(loss(step))) for step in STEPS]
        assert self.points(store) == {row.cell: expected for row in ROWS}
        again = view.sync([])
        assert (again["current"], again["added"], again["continued"]) == (2, 0, 0)
        assert self.points(store) == {row.cell: expected for row in ROWS}

    def test_an_interrupted_run_is_shown_as_far_as_it_went_and_then_to_its_end(self, store):
        list(worker(store, RUN, range(10, 51, 10)))
        view = self.view(store)
        assert view.sync([]) == {"added": 1, "continued": 0, "current": 0, "missing": 1}
        assert view.sync([])["current"] == 1
        assert [step for step, _ in self.points(store)["base"]] == [10, 20, 30, 40, 50]
        train(store, RUN, range(60, 101, 10))
        assert view.sync([])["continued"] == 1
        assert [step for step, _ in self.points(store)["base"]] == list(STEPS)

    def test_a_damaged_record_costs_its_run_alone(self, store):
        for row in ROWS:
            train(store, row.run)
        store.run(RUN).result_path.write_bytes(b'{"run": "\xff"}')
        found = self.view(store).sync([])
        assert (found["damaged"], found["added"]) == (1, 1)

    def test_a_tracker_that_fails_is_named_once_and_stops_nothing(self, store):
        trackers = self.live(store, said := [])
        (feed,) = trackers.feeds
        feed.view.tracker = lambda: 1 / 0
        for row in ROWS:
            train(store, row.run, trackers=trackers)
        trackers.finish()
        (line,) = said
        assert chosen.TITLES[self.name] in line
        assert "training goes on" in line and chosen.sync_command(self.name) in line
        assert "\n" not in line
        assert all(store.run(row.run).result() for row in ROWS)

    def test_a_view_that_hangs_holds_a_command_up_for_a_bounded_time(self, store, monkeypatch):
        monkeypatch.setattr(trackers_module, "FINISH_SECONDS", 0.2)
        trackers = self.live(store, said := [])
        (feed,) = trackers.feeds
        release = Event()
        feed.view.tracker = lambda: release.wait()
        train(store, RUN, trackers=trackers)
        trackers.finish()
        assert feed.thread.is_alive()
        (line,) = said
        assert "not done after 0 s" in line
        release.set()


class TestMlflow(TrackerContract):
    name = MLFLOW

    def points(self, store: Store) -> Points:
        view = MlflowView(store)
        found = {}
        for run in view.runs(PLAN.name):
            history = view.client.get_metric_history(run.info.run_id, "train/loss")
            points = sorted((one.step, one.value) for one in history)
            found[run.data.tags["ablab.cell"]] = points
        return found


class TestTensorBoard(TrackerContract):
    name = TENSORBOARD

    def events(self, store: Store, row: Planned):
        """What TensorBoard itself loads, but that it would drop of two points at a step."""
        module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        folder = TensorBoard(store).run_folder(card_of(store, PLAN, row))
        unlimited = {"scalars": 0, "tensors": 0}
        return module.EventAccumulator(
            str(folder), unlimited, purge_orphaned_data=False
        ).Reload()

    def points(self, store: Store) -> Points:
        found = {}
        view = TensorBoard(store)
        for row in ROWS:
            if view.is_there(card_of(store, PLAN, row)):
                history = self.events(store, row).Scalars("train/loss")
                found[row.cell] = [(one.step, one.value) for one in history]
        return found

    def test_it_shows_the_time_of_training_the_final_numbers_and_what_the_run_is(self, store):
        train(store, RUN)
        self.view(store).sync([])
        events = self.events(store, ROWS[0])
        assert set(events.Tags()["scalars"]) == {
            "tokens",
            "train/loss",
            "final/val/loss",
        }
        assert events.Scalars("train/loss")[3].wall_time == 1.76e9 + 40 * 0.5
        (final,) = events.Scalars("final/val/loss")
        assert (final.step, final.value) == (100, 2.5)
        (about,) = events.Tensors("about")
        assert about.tensor_proto.string_val == [b"Arm `base`, seed 0."]

    def test_its_arms_are_groups_of_the_hparams_page(self, store):
        from tensorboard.plugins.hparams import metadata

        train(store, RUN)
        self.view(store).sync([])
        told = self.events(store, ROWS[0]).summary_metadata
        begun = told[metadata.SESSION_START_INFO_TAG].plugin_data.content
        ended = told[metadata.SESSION_END_INFO_TAG].plugin_data.content
        start = metadata.parse_session_start_info_plugin_data(begun)
        assert start.group_name == "base"
        assert start.hparams["optim.lr"].number_value == 0.02
        assert start.hparams["with.muon"].bool_value
        assert metadata.parse_session_end_info_plugin_data(ended).status == 1  # success

    def test_a_sync_of_another_process_in_the_middle_of_a_run_loses_nothing(self, store):
        trackers = self.live(store, said := [])
        (feed,) = trackers.feeds
        for heard in worker(store, RUN, range(10, 51, 10)):
            trackers.log(RUN, *heard)
        reached = Event()
        feed.put(reached.set)
        assert reached.wait(60)
        assert self.view(store).sync([])["continued"] == 1
        train(store, RUN, range(60, 101, 10), trackers)
        trackers.finish()
        assert said == []
        assert [step for step, _ in self.points(store)["base"]] == list(STEPS)

    def test_a_run_that_is_no_longer_planned_leaves_and_what_is_not_ours_stays(self, store):
        for row in ROWS:
            train(store, row.run)
        view = self.view(store)
        view.sync([])
        folder = view.folder(PLAN.name)
        (folder / "mine").mkdir()
        store.write_plan(GridPlan(PLAN.name, "", "val/loss", "lower", "single", ROWS[:1]))
        view.sync([])
        assert {one.name for one in folder.iterdir()} == {"base · seed 0", "mine"}


class TestWandb(TrackerContract):
    """Offline, with the real package: it needs no network, and nothing is sent."""

    name = WANDB

    def kill(self, store: Store, step: int) -> None:
        """In a process of its own, as W&B's own half outlives what it hears from."""
        code = (
            "import os, sys, signal; from pathlib import Path; sys.path.append(sys.argv[1]); "
            "import test_trackers as here; store = here.Store(Path(sys.argv[2])); "
            "tracker = here.Wandb(store).tracker(); "
            f"here.killed_at(store, {step}, tracker); os.kill(os.getpid(), signal.SIGKILL)"
        )
        words = [sys.executable, "-c", code, str(Path(__file__).parent), str(store.root)]
        alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        ended = subprocess.run(words, env=alone, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr

    def points(self, store: Store) -> Points:
        proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
        found: Points = {}
        for path in sorted((store.root / "wandb").glob("offline-run-*/*.wandb")):
            arm = ""
            for content in records(path.read_bytes()):
                record = proto.Record.FromString(content)
                arm = record.run.run_group or arm
                # (nested_key or key) -> JSON
                items = record.history.item
                told = {one.key or "/".join(one.nested_key): one.value_json for one in items}
                if "train/loss" in told:
                    point = (int(told["_step"]), float(told["train/loss"]))
                    found.setdefault(arm, []).append(point)
        return found

    def test_a_run_has_its_settings_its_arm_and_its_summary(self, store):
        from wandb.proto import wandb_internal_pb2 as proto

        train(store, RUN)
        self.view(store).sync([])
        (path,) = (store.root / "wandb").glob("offline-run-*/*.wandb")
        told = [proto.Record.FromString(one) for one in records(path.read_bytes())]
        (run,) = {one.run.run_id: one.run for one in told if one.run.run_id}.values()
        assert (run.project, run.run_group) == (f"ablab-{PLAN.name}", "base")
        assert run.display_name == "base · seed 0"
        config = {one.key: json.loads(one.value_json) for one in run.config.update}
        assert config["optim.lr"] == 0.02
        assert config["ablab"]["run"] == RUN
        assert config["ablab"]["data.digest"] == "0123abcd"
        final = {}
        for one in told:
            final |= {item.key: item.value_json for item in one.summary.update}
        assert json.loads(final["val/loss"]) == 2.5
        assert json.loads(final["status"]) == FINISHED

    def test_what_was_sent_by_hand_stays_when_a_run_is_written_anew(self, store):
        train(store, RUN)
        view = self.view(store)
        view.sync([])
        (sent,) = view.kept(card_of(store, PLAN, ROWS[0]))
        (sent / f"run-{sent.name}.wandb.synced").touch()
        view.tracker().open(card_of(store, PLAN, ROWS[0]))
        assert sent.is_dir()

    def test_online_only_the_steps_that_the_server_lacks_are_sent(self, store, monkeypatch):
        """The server is a fake: what a resumed run says of itself, and what it is told."""
        import wandb

        train(store, RUN)
        asked, sent = {}, []

        class Resumed:
            step = 61
            dir = str(store.root)
            summary: dict = {}

            def log(self, scalars, step):
                sent.append(step)

            def finish(self, exit_code):
                sent.append(f"exit {exit_code}")

        def init(**words):
            asked.update(words)
            return Resumed()

        monkeypatch.setattr(Wandb, "is_offline", False)
        monkeypatch.setattr(wandb, "login", lambda **words: True)
        monkeypatch.setattr(wandb, "init", init)
        view = self.view(store)
        assert view.sync([])["added"] == 1
        assert sent == [70, 80, 90, 100, "exit 0"]
        assert (asked["resume"], asked["id"][:16]) == ("allow", RUN)
        assert view.sync([])["current"] == 1

    def test_without_a_key_it_says_so_asks_nobody_and_stops_nothing(self, store):
        said = trained_alone(store, {})
        assert "there is no API key; run `wandb login`, or set WANDB_MODE=offline" in said
        assert "training goes on" in said and "ablab sync --track wandb" in said

    def test_a_server_that_hangs_is_given_up(self, store):
        with socket.create_server(("127.0.0.1", 0)) as hung:
            address = f"http://127.0.0.1:{hung.getsockname()[1]}"
            about = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
            said = trained_alone(store, about | {"WANDB_INIT_TIMEOUT": "1"})
        assert "Weights & Biases failed" in said and "training goes on" in said


def trained_alone(store: Store, about: dict[str, str]) -> str:
    """What a process says that shows a run in W&B: one line, and it ends well.

    Of its own, for W&B remembers how it was set up.  about: of its environment.
    """
    code = (
        "import sys; from pathlib import Path; sys.path.append(sys.argv[1]); "
        "import test_trackers as here; store = here.Store(Path(sys.argv[2])); "
        "trackers = here.Trackers(store, here.PLAN, print, [here.WANDB]); "
        "here.train(store, here.RUN, trackers=trackers); trackers.finish()"
    )
    home = store.root.parent
    strange = [name for name in os.environ if name.startswith("WANDB")]
    environment = {name: value for name, value in os.environ.items() if name not in strange}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(store.root)],
        env=environment | {"HOME": str(home), "NETRC": str(home / "netrc")} | about,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.stderr == "" and ended.returncode == 0
    (line,) = ended.stdout.splitlines()
    return line


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, after a header of 7 bytes.

    Blocks of 32 KiB; before each fragment a checksum (4), its length (2) and what it is: whole, first, middle or last.
    """
    block = 2**15
    at, whole = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # too short for a header: padding
            at += block - at % block
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind = content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


# -- which of them -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("track", "mlflow", "found"),
    [
        (None, None, ("mlflow",)),
        (None, False, ()),
        ("tensorboard", None, ("tensorboard",)),
        ("mlflow, tensorboard,mlflow", None, ("mlflow", "tensorboard")),
        ("mlflow,wandb", False, ("wandb",)),
        ("tensorboard", True, ("mlflow", "tensorboard")),
        ("none", None, ()),
    ],
)
def test_a_choice_of_trackers_is_read(track, mlflow, found):
    assert tracked(track, mlflow) == found


def test_a_name_that_is_no_tracker_is_refused_with_its_neighbour():
    with pytest.raises(UserError, match="no tracker 'tensorbord'.*Did you mean 'tensorboard'"):
        tracked("mlflow,tensorbord")


@pytest.mark.parametrize("name", [TENSORBOARD, WANDB])
def test_a_package_that_is_missing_is_one_line_that_names_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(chosen.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"pip install 'ablab\[{name}\]'$"):
        tracked(f"mlflow,{name}")


@pytest.mark.parametrize("name", [TENSORBOARD, WANDB])
def test_each_tracker_has_its_extra(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert [one.partition(">=")[0] for one in extras[name]] == [name]


def test_a_folder_named_as_a_package_is_none(tmp_path, monkeypatch):
    """W&B leaves ./wandb where it was used."""
    (tmp_path / "wandb_of_a_user").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not chosen.is_installed("wandb_of_a_user")


def test_no_tracker_is_imported_unless_it_was_chosen(tmp_path):
    """A grid with TensorBoard alone loads neither MLflow nor W&B, nor torch; one with none loads none of them."""
    code = (
        "import sys; from pathlib import Path; sys.path.append(sys.argv[1]); "
        "import test_trackers as here; store = here.Store(Path(sys.argv[2])); "
        "trackers = here.trackers_module.trackers_for(store, here.PLAN, print, here.tracked(sys.argv[3]));"
        "here.train(store, here.RUN, trackers=trackers); store.write_plan(here.PLAN);"
        "trackers and trackers.finish(); print(*sys.modules)"
    )
    for name, loaded in ((TENSORBOARD, {TENSORBOARD}), ("none", set())):
        words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / name)]
        said = subprocess.run([*words, name], capture_output=True, text=True, check=True)
        assert set(said.stdout.split()) & {MLFLOW, TENSORBOARD, WANDB, "torch"} == loaded
