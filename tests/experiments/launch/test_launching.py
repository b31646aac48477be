"""What a command and a sheet say of a launcher, and what it refuses.  No cluster is started."""

import dataclasses
import socket
from types import SimpleNamespace

import pytest

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.experiments.launch.base import Site, optional, serving_of_job
from ablab.experiments.launch.named import Launching
from ablab.experiments.launch.ray import Needs, RayLauncher, check_reachable, needs_of
from ablab.experiments.launch.slurm import SlurmLauncher
from ablab.experiments.run.messages import TraceJob
from ablab.experiments.run.processes import ALONE
from ablab.experiments.run.ranks import serve_ranks
from ablab.experiments.run.this_machine import ThisMachine

SHEET = SimpleNamespace(ray={}, slurm={})


def refusal(call, *words, **named) -> str:
    with pytest.raises(UserError) as refused:
        call(*words, **named)
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


# -- words -------------------------------------------------------------------------------------------------------------
def test_without_a_word_runs_stay_on_this_machine():
    assert isinstance(Launching().of(SHEET), ThisMachine)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"launcher": "slrm"}, "Did you mean 'slurm'?"),
        ({"address": "head:6379"}, "add --launcher ray"),
        ({"slurm": ("time=5",)}, "add --launcher slurm"),
        ({"launcher": "slurm", "ray": ("num_gpus=1",)}, "add --launcher ray"),
        ({"launcher": "slurm", "slurm": ("partition",)}, "must look like KEY=VALUE"),
        ({"launcher": "slurm", "slurm": ("partitoin=gpu",)}, "Did you mean 'partition'?"),
    ],
)
def test_a_word_that_fits_nothing_is_named_with_its_cure(asked, said):
    assert said in refusal(Launching(**asked).of, SHEET)


def test_options_of_the_command_win_over_those_of_the_sheet():
    sheet = SimpleNamespace(ray={}, slurm={"partition": "cpu", "time": 30})
    asked = Launching("slurm", slurm=("partition=gpu", "gres=gpu:2"))
    assert asked.of(sheet).options == {"partition": "gpu", "time": 30, "gres": "gpu:2"}


def test_a_missing_extra_is_one_line_that_says_how_to_install_it():
    assert "pip install 'ablab[ray]'" in refusal(optional, "no_such_module", "ray")


# -- Ray ---------------------------------------------------------------------------------------------------------------
def node(alive: bool = True, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("needs", "there", "fitting"),
    [
        (Needs(0, 1), node(CPU=4), 4),
        (Needs(0, 3), node(CPU=4), 1),
        (Needs(1, 1), node(CPU=4), 0),
        (Needs(1, 1), node(CPU=16, GPU=8), 8),
        (Needs(2, 1), node(CPU=16, GPU=7), 3),
        (Needs(0.25, 1), node(CPU=16, GPU=2), 8),
        (Needs(0.4, 1), node(CPU=16, GPU=2), 4),  # no run lies on two halves
        (Needs(0.25, 4), node(CPU=16, GPU=2), 4),
        (Needs(0, 1), node(alive=False, CPU=4), 0),
    ],
)
def test_a_node_carries_as_many_runs_as_its_scarcest_resource(needs, there, fitting):
    assert needs.fit(there) == fitting


@pytest.mark.parametrize(
    ("device", "there", "settled"),
    [
        ("auto", [node(CPU=4)], Needs(0, 2)),
        ("auto", [node(CPU=4), node(CPU=4, GPU=1)], Needs(1, 2)),
        ("cpu", [node(CPU=4, GPU=1)], Needs(0, 2)),
        ("cuda", [node(CPU=4)], Needs(1, 2)),
    ],
)
def test_a_run_needs_a_gpu_where_it_would_use_one(device, there, settled):
    assert Needs().settled(Runtime(device=device, threads=2), there) == settled
    assert Needs(num_gpus=0.5).settled(Runtime(device=device), there).num_gpus == 0.5


@pytest.mark.parametrize(
    ("device", "settled"),
    [
        ("auto", Needs(4, 8)),
        ("cuda", Needs(4, 8)),
        ("cpu", Needs(0, 8)),
    ],
)
def test_a_run_of_ranks_needs_a_gpu_for_each(device, settled):
    assert Needs().settled(Runtime(device=device, threads=2, ranks=4), []) == settled


@pytest.mark.parametrize(
    "options", [{"num_gpus": -1}, {"num_gpus": 1.5}, {"num_cpus": 0, "num_gpus": 0}]
)
def test_needs_that_ray_would_refuse_or_misread_are_refused(options):
    assert refusal(needs_of, options).startswith("--ray num_")


def test_an_address_where_nobody_answers_is_refused_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert "nobody answers at" in refusal(check_reachable, f"ray://127.0.0.1:{port}")
    assert "must look like HOST:6379" in refusal(check_reachable, "head")
    assert "must look like HOST:6379" in refusal(check_reachable, "http://head:8265/")


@pytest.fixture
def cluster(monkeypatch):
    """Nodes -> a RayLauncher of a cluster that has them."""

    def of(*nodes: dict, **options) -> RayLauncher:
        ray = SimpleNamespace(nodes=lambda: list(nodes), is_initialized=lambda: True)
        monkeypatch.setattr("ablab.experiments.launch.ray.optional", lambda *words: ray)
        return RayLauncher("", options)

    return of


def test_ranks_take_a_gpu_each_of_one_node(cluster):
    two = Runtime(ranks=2)
    there = cluster(node(CPU=8, GPU=5), node(CPU=8, GPU=1))
    assert there.checked(two, []).device == "cuda"
    assert there.carried(there.checked(two, [])) == 2
    assert there.place(two) == "GPUs of the Ray cluster"
    line = refusal(cluster(node(CPU=8, GPU=1)).carried, two)
    assert "has 2 GPUs and 2 CPUs for a run; ask for less with a smaller --gpus-per-run" in line
    line = refusal(cluster(node(CPU=8, GPU=4), num_gpus=0.5).checked, two, [])
    assert line.startswith("--ray num_gpus=0.5, but --gpus-per-run 2")


# -- what the far side must find ---------------------------------------------------------------------------------------
@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr("ablab.core.store.store.SECONDS_TO_APPEAR", 0.0)
    return Site.of(Store(tmp_path / "store"), [])


def test_a_store_that_is_not_shared_or_has_moved_is_named(site, tmp_path):
    site.check()
    site.store.rename(tmp_path / "moved")
    assert str(site.store) in refusal(site.check)
    Store(site.store).leave_token()  # another store under that path
    assert str(site.store) in refusal(site.check)


def test_another_ablab_on_a_node_is_named_with_both_fingerprints(site):
    other = dataclasses.replace(site, code="0123456789ab")
    assert "another ablab" in refusal(other.check)
    assert "0123456789ab" in refusal(other.check)


def test_a_plugin_folder_that_a_node_lacks_is_named_with_the_node(site):
    lacking = dataclasses.replace(site, plugins=("/nowhere/plugins",))
    line = refusal(lacking.check)
    assert line.startswith(socket.gethostname())
    assert "/nowhere/plugins is not a folder" in line


# -- SLURM -------------------------------------------------------------------------------------------------------------
def test_a_machine_without_slurm_says_so(tmp_path):
    launcher = SlurmLauncher({"partition": "gpu"})
    line = refusal(launcher.start, Store(tmp_path), Runtime(device="cpu"), 1, [])
    assert "start this on a machine that has sbatch and srun" in line


def test_runs_use_gpus_of_slurm_where_some_are_asked_for():
    auto = Runtime()
    near = {"cluster": "local"}
    assert SlurmLauncher({"gres": "gpu:1"} | near).settled(auto, [], []).device == "cuda"
    assert SlurmLauncher({"partition": "gpu"} | near).settled(auto, [], []).device == "cpu"
    assert SlurmLauncher(near).settled(Runtime(ranks=2), [], []).device == "cuda"
    same = Runtime(kernels="same")
    assert "runtime.kernels=[attention,loss]" in refusal(SlurmLauncher().settled, same, [], [])


@pytest.mark.parametrize(
    ("ranks", "options", "gpus"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (2, {"gres": "gpu:a100:4"}, None),
        (2, {"gpus_per_node": 2}, 2),
    ],
)
def test_a_job_asks_for_a_gpu_a_rank_and_the_cores_of_all(tmp_path, ranks, options, gpus):
    launcher = SlurmLauncher({"cluster": "local"} | options)
    runtime = launcher.checked(Runtime(device="cuda", threads=3, ranks=ranks), [])
    asked = launcher._executor(tmp_path, runtime).parameters
    assert asked.get("gpus_per_node") == gpus
    assert asked["cpus_per_task"] == 3 * ranks


@pytest.mark.parametrize("options", [{"gres": "gpu:1"}, {"gpus_per_node": 1}])
def test_fewer_gpus_than_ranks_are_refused_before_a_job_is_submitted(options):
    launcher = SlurmLauncher({"cluster": "local"} | options)
    line = refusal(launcher.checked, Runtime(ranks=2), [])
    assert "ask for 2 of them" in line
    assert launcher.checked(Runtime(ranks=2, device="cpu"), []).ranks == 2


def test_ranks_that_cannot_divide_the_rows_are_refused_wherever_they_train(tiny):
    launcher = SlurmLauncher({"cluster": "local"})
    line = refusal(launcher.checked, Runtime(ranks=3, device="cpu"), [tiny()])
    assert "nearest: 2, 4" in line


def job_on(**runtime) -> TraceJob:
    return TraceJob("0123456789abcdef", {}, dataclasses.asdict(Runtime(**runtime)))


def test_the_seat_of_another_machine_starts_what_this_machine_would():
    """Ranks in a Ray actor and in a SLURM job themselves: `make cluster`."""
    assert serving_of_job(job_on(device="cpu")) == ALONE
    for ranks in (2, 4):
        there = serving_of_job(job_on(device="cpu", ranks=ranks))
        assert there.leads
        assert there.call.func is serve_ranks
        assert there.call.keywords == {"ranks": ranks, "device": "cpu"}


def test_a_machine_with_fewer_gpus_than_its_ranks_is_named(monkeypatch):
    monkeypatch.setattr("ablab.experiments.run.this_machine.gpus_for", lambda runtime: ["0"])
    line = refusal(serving_of_job, job_on(device="cuda", ranks=2))
    assert line.startswith(socket.gethostname())
    assert "there are 1 GPUs here" in line


def test_torchrun_and_a_launcher_do_not_both_start_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "start the command without torchrun" in refusal(Launching("slurm").of, SHEET)
