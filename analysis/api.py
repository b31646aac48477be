"""What a notebook asks for:  from ablab import analysis as ab.

    read_runs(), read_curves(), read_effects()   tidy pandas frames, from run folders or from an MLflow server
    read_looks()                                 what was seen inside the layers, where runtime.dynamics asked
    read_speedups()                              what arms save in tokens, FLOPs and seconds, and its trend over sizes
    read_trials()                                the same of a study
    plot_*()                                     one function a plot, each returns a matplotlib Figure

`where` names a store (a folder; by default $ABLAB_STORE, else ./ablab-store) or an MLflow tracking URI
(http://..., sqlite:///...).  The run folders are the truth; what MLflow lacks of them is NaN.
Figures are drawn without pyplot: in a notebook, `%matplotlib inline` shows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.store import Store, store_root

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ablab.analysis.effects.effect import Effect
    from ablab.analysis.effects.sizes import OverSizes
    from ablab.analysis.pictures.style import Picture
    from ablab.core.store.study_record import StudyRecord

Where = str | Path | None
DYNAMICS = ("train/loss", "train/grad_norm", "optim/lr", "tokens_per_second")
LAYERS = ("kurtosis", "rms", "attention_logit", "hidden.weight", "hidden.update")
REMOTE = ("http://", "https://", "sqlite:", "postgresql", "mysql", "mssql", "databricks")


def list_experiments(where: Where = None) -> list[str]:
    """The names that the other functions take."""
    if _is_server(where):
        from ablab.analysis.mlflow_runs import experiments_of

        return experiments_of(str(where))
    return _store(where).experiments()


def list_studies(where: Where = None) -> list[str]:
    """The names of studies that a store holds; a server holds none."""
    if _is_server(where):
        return []
    from ablab.core.store.study_record import studies

    return studies(_store(where))


def read_runs(experiment: str, where: Where = None) -> "pd.DataFrame":
    """A row a planned run: cell, reference, pair, seed, run, status, the final metrics, tokens, seconds, throughput."""
    if _is_server(where):
        from ablab.analysis.mlflow_runs import runs_of

        return runs_of(str(where), experiment)
    from ablab.analysis.effects import frame

    return frame.load(_store(where), experiment)


def read_curves(experiment: str, where: Where = None) -> "pd.DataFrame":
    """A row a logged line: cell, reference, pair, run, status, step, tokens, flops, seconds, and the logged metrics."""
    if _is_server(where):
        from ablab.analysis.mlflow_runs import curves_of

        return curves_of(str(where), experiment)
    from ablab.analysis.effects import frame

    return frame.curves(_store(where), experiment)


def read_looks(experiment: str, where: Where = None) -> "pd.DataFrame":
    """A row a look into a run (runtime.dynamics): cell, pair, run, step, tokens, and what was seen of each layer.

    Columns as `layer/kurtosis/00`, `layer/hidden.update/03`, `layer/attention.gating.factor/07`.
    """
    if _is_server(where):
        raise UserError(f"looks into layers are read from a store; {where!r} is a server")
    from ablab.analysis.effects import frame

    return frame.looks(_store(where), experiment)


def read_effects(
    experiment: str,
    where: Where = None,
    metric: str | None = None,
    better: str | None = None,
    equivalence: float | None = None,
) -> "pd.DataFrame":
    """A row a cell: delta, 95 % interval, p, Holm's p and verdict.

    metric, better, equivalence: those of the experiment, unless given.
    """
    from ablab.analysis.pages.html_tables import effects_frame

    settings = _settings(experiment, where, metric, better, equivalence)
    return effects_frame(_measured(experiment, where, settings))


def read_speedups(experiments: str | Sequence[str], where: Where = None) -> "pd.DataFrame":
    """A row an arm, unit and experiment: how many times less it costs than its reference for the loss of both.

    experiments: one, or several with the same arms at other sizes; then trend, trend_low and trend_high say by what
    factor each doubling of size multiplies the speedup.
    """
    import pandas as pd

    rows = []
    for arm in _over_sizes(experiments, where):
        trend = arm.trend
        slope = {
            "trend": trend.factor if trend else None,
            "trend_low": trend.low if trend else None,
            "trend_high": trend.high if trend else None,
        }
        for parameters, one in arm.by_size.items():
            known = {
                "cell": one.cell,
                "reference": one.reference,
                "unit": one.unit,
                "parameters": parameters,
                "factor": one.factor,
                "low": one.low,
                "high": one.high,
                "n": one.n,
                "at_least": one.at_least,
            }
            rows.append(known | slope)
    return pd.DataFrame(rows)


def read_trials(study: str, where: Where = None) -> "pd.DataFrame":
    """A row a trial of a study: cell, number, state, value, seconds, and a column for each searched path."""
    import pandas as pd

    record = _study(study, where)
    rows = []
    for trial in record.trials:
        known = {
            "cell": trial.cell,
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "seconds": trial.seconds,
        }
        rows.append(known | trial.params)
    return pd.DataFrame(rows)


# -- plots -------------------------------------------------------------------------------------------------------------
def plot_effects(
    experiment: str,
    where: Where = None,
    metric: str | None = None,
    better: str | None = None,
    equivalence: float | None = None,
) -> "Figure":
    """The forest: each arm's delta with its interval, beside the verdict.  Arguments as of `read_effects`."""
    from ablab.analysis.pictures.forest import forest
    from ablab.analysis.pictures.style import shown

    settings = _settings(experiment, where, metric, better, equivalence)
    found = _measured(experiment, where, settings)
    return shown(forest, found, settings.metric, settings.better)


def plot_curves(curves: "pd.DataFrame", metric: str = "val/loss") -> "Figure":
    """A metric against tokens, and each arm minus its reference on the same seeds.  curves: of `read_curves`."""
    from ablab.analysis.pictures.curves import curves as picture
    from ablab.analysis.pictures.style import shown

    return shown(picture, _with(curves, metric), metric)


def plot_dynamics(
    curves: "pd.DataFrame", metrics: Sequence[str] = DYNAMICS, over: str = "tokens"
) -> "Figure":
    """How training went: a panel a metric, the mean and sd over seeds of each cell.  over: tokens, flops or seconds."""
    from ablab.analysis.pictures.dynamics import dynamics
    from ablab.analysis.pictures.style import shown

    return shown(dynamics, curves, [one for one in metrics if one in curves], over)


def plot_speedups(experiments: str | Sequence[str], where: Where = None) -> "Figure":
    """Each arm's speedup over its reference against size.  Arguments as of `read_speedups`."""
    from ablab.analysis.pictures.sizes import sizes
    from ablab.analysis.pictures.style import shown

    found = _over_sizes(experiments, where)
    if not found:
        raise UserError(
            "no arm has a speedup: each needs a common seed with its reference, and two evaluations or more"
        )
    return shown(sizes, found)


def plot_layers(
    looked: "pd.DataFrame", cell: str, quantities: Sequence[str] = LAYERS
) -> "Figure":
    """What goes on inside the layers of an arm: a panel a quantity, a line a layer.  looked: of `read_looks`."""
    from ablab.analysis.pictures.layers import layers
    from ablab.analysis.pictures.style import shown

    return shown(layers, looked, cell, quantities)


def plot_rates(study: str, where: Where = None) -> "Figure":
    """A study's loss against the learning rate, each arm's best and its optimum."""
    from ablab.analysis.pictures.study_rates import rates

    return _of_study(rates, study, where)


def plot_widths(study: str, where: Where = None) -> "Figure":
    """A study's learning rate at every width, a panel an arm."""
    from ablab.analysis.pictures.study_rates import widths

    return _of_study(widths, study, where)


def plot_slices(study: str, where: Where = None) -> "Figure":
    """All finished trials against each searched axis."""
    from ablab.analysis.pictures.study_space import slices

    return _of_study(slices, study, where)


def plot_map(study: str, where: Where = None) -> "Figure":
    """The metric over the first two searched axes, a panel an arm."""
    from ablab.analysis.pictures.study_space import heat

    return _of_study(heat, study, where)


def plot_importance(study: str, where: Where = None) -> "Figure":
    """What share of the spread between an arm's trials each searched parameter explains."""
    from ablab.analysis.pictures.study_search import importance

    return _of_study(importance, study, where)


def plot_history(study: str, where: Where = None) -> "Figure":
    """A study's best value so far against the number of trials."""
    from ablab.analysis.pictures.study_search import history

    return _of_study(history, study, where)


# -- what they share ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How an experiment is judged."""

    metric: str
    better: str
    equivalence: float | None


def _settings(
    experiment: str,
    where: Where,
    metric: str | None,
    better: str | None,
    equivalence: float | None,
) -> Settings:
    """As given, else as the plan or the server's experiment says."""
    if _is_server(where):
        from ablab.analysis.mlflow_runs import settings_of

        known = Settings(*settings_of(str(where), experiment))
    else:
        plan = _store(where).read_plan(experiment)
        known = Settings(plan.metric, plan.better, plan.equivalence)
    return Settings(
        metric or known.metric,
        better or known.better,
        known.equivalence if equivalence is None else equivalence,
    )


def _measured(experiment: str, where: Where, settings: Settings) -> "list[Effect]":
    from ablab.analysis.effects.effects import measure

    found = read_runs(experiment, where)
    return measure(found, settings.metric, settings.better, settings.equivalence)


def _over_sizes(experiments: str | Sequence[str], where: Where) -> "list[OverSizes]":
    """Sizes stand in run folders alone."""
    from ablab.analysis.effects import frame
    from ablab.analysis.effects.sizes import at_size, over_sizes

    if _is_server(where):
        raise UserError(f"speedups are read from a store; {where!r} is a server")
    store = _store(where)
    found = []
    for name in [experiments] if isinstance(experiments, str) else experiments:
        plan = store.read_plan(name)
        tables = (frame.load(store, name), frame.curves(store, name))
        found.append(at_size(store, name, *tables, plan.metric, plan.better))
    return over_sizes(found)


def _is_server(where: Where) -> bool:
    return isinstance(where, str) and where.startswith(REMOTE)


def _store(where: Where) -> Store:
    root = store_root(str(where) if where else None)
    if not root.is_dir():
        raise UserError(
            f"there is no store at {root.absolute()}; make one with: ablab run quickstart --store {root}"
        )
    return Store(root)


def _study(name: str, where: Where) -> "StudyRecord":
    from ablab.core.store import study_record

    if _is_server(where):
        raise UserError(f"study {name!r} is read from a store; {where!r} is a server")
    return study_record.read(_store(where), name)


def _of_study(picture: "Picture", study: str, where: Where) -> "Figure":
    from ablab.analysis.pictures.style import shown

    return shown(picture, _study(study, where))


def _with(curves: "pd.DataFrame", metric: str) -> "pd.DataFrame":
    """Refuse a metric that nothing has logged."""
    if metric not in curves or curves[metric].isna().all():
        logged = sorted(str(name) for name in curves if "/" in str(name))
        raise UserError(f"no run has logged {metric!r}; logged are: {', '.join(logged)}")
    return curves
