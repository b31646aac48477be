"""Runs that share a GPU train in turn, or at once: what was measured decides, unless a person does."""

import os

import pytest

from ablab.core.runtime.runtime import Runtime, settle
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.capacity import default_jobs
from ablab.experiments.run.sharing import (
    MEASURED,
    pays,
    why_at_once,
    with_turns,
)

BRIEF = {"budget__tokens": 10**6, "schedule__warmup_steps": 5}


@pytest.fixture
def experiment(monkeypatch):
    """experiment(name, gpus=..., path=value): as it is planned where these GPUs are seen."""

    def planned(name, gpus="0", **overrides):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
        paths = {path.replace("__", "."): value for path, value in overrides.items()}
        return load(name, paths, lambda data: None)

    return planned


@pytest.mark.parametrize("point", MEASURED, ids=lambda point: f"{point.what}, {point.jobs}")
def test_the_rule_says_of_each_measured_point_what_was_measured(point):
    assert pays(point.flops, point.steps) == (point.faster > 1)


@pytest.mark.parametrize(
    ("name", "overrides", "jobs"),
    [
        ("quickstart", {}, 4),
        ("quickstart", {"runtime__turns": True}, 1),
        ("quickstart", {"runtime__turns": False, "budget__tokens": 10**8}, 4),
        ("quickstart", {"budget__tokens": 10**6}, 1),  # 1,953 steps of 2.5 ms
        ("quickstart", {"metric": {"name": "tokens_per_second", "better": "higher"}}, 1),
        ("quickstart", {"metric": {"name": "peak_bytes", "better": "lower"}}, 1),
        ("quickstart", {"runtime__compile": None}, 1),  # of compiled arms nothing was measured
        ("quickstart", {"model__width": 128}, 1),  # nor of larger ones
        ("loo_70m", {}, 1),
        ("loo_70m", {"runtime__compile": False, **BRIEF}, 1),  # 1.9 s of training, and large
    ],
)
def test_runs_train_at_once_where_they_are_short_and_their_pace_is_not_judged(
    experiment, name, overrides, jobs
):
    asked = experiment(name, **overrides)
    runtime = with_turns(asked)
    assert default_jobs(runtime) == jobs
    assert runtime.turns == (jobs == 1)
    by_itself = "runtime__turns" not in overrides and jobs > 1
    assert bool(why_at_once(asked)) == by_itself


def test_without_a_gpu_there_are_no_turns_to_speak_of(experiment):
    asked = experiment("quickstart", gpus="-1")
    assert with_turns(asked).turns
    assert default_jobs(with_turns(asked)) == 16
    assert why_at_once(asked) == ""


def test_a_run_alone_is_settled_in_turn():
    assert settle(Runtime(device="cpu"), rows=4).turns is True
    assert settle(Runtime(device="cpu", turns=False), rows=4).turns is False


def test_a_forecast_says_why_they_train_at_once(ablab, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    dry = ("run", "quickstart", "--dry-run")
    said = "They train at once, not in turn (runtime.turns): a run trains for 0.5 s on a GPU"
    told = ablab(*dry).out
    assert "on 1 GPU, 4 at a time" in told and said in told
    assert said not in ablab(*dry, "--jobs", "1").out
    assert said not in ablab(*dry, "runtime.turns=true").out
