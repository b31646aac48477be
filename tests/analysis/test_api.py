"""`from ablab import analysis as ab`: frames and figures."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablab import analysis as ab
from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure
from ablab.core.errors import UserError


@pytest.fixture
def store(lab, normal):
    for cell in ("full", "- a", "- b"):
        values = list(normal.normal(3, 0.01, 3))
        lab.cell(cell, values, None if cell == "full" else "full", points=6)
    return lab.write()


def test_frames_are_those_that_reports_are_made_of(store):
    assert ab.list_experiments(store.root) == ["loo"]
    assert ab.read_runs("loo", store.root).equals(frame.load(store, "loo"))
    assert ab.read_curves("loo", str(store.root)).equals(frame.curves(store, "loo"))


def test_effects_are_a_row_a_cell(store):
    table = ab.read_effects("loo", store.root)
    effects = measure(frame.load(store, "loo"), "val/loss")
    assert list(table.cell) == ["full", "- a", "- b"]
    assert list(table.verdict) == [effect.word for effect in effects]
    assert list(table.low[1:]) == [effect.low for effect in effects[1:]]
    assert np.isnan(table.delta[0])


def test_the_other_way_round_is_the_other_verdict(lab):
    lab.cell("full", [3.0, 3.001, 3.002], None)
    lab.cell("- a", [3.1, 3.101, 3.1025])
    root = lab.write().root
    assert ab.read_effects("loo", root).verdict[1] == "helps"
    assert ab.read_effects("loo", root, better="higher").verdict[1] == "hurts"
    wide = ab.read_effects("loo", root, equivalence=0.5)
    assert wide.p_equivalent[1] < 0.05


def test_the_environment_names_the_store_where_nothing_is_given(store, monkeypatch):
    monkeypatch.setenv("ABLAB_STORE", str(store.root))
    assert ab.list_experiments() == ["loo"]


@pytest.mark.parametrize("over", ["tokens", "seconds"])
def test_dynamics_have_a_panel_a_metric(store, over):
    curves = ab.read_curves("loo", store.root)
    figure = ab.plot_dynamics(curves, ["train/loss", "val/loss", "not/logged"], over)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["train/loss (nats/token)", "val/loss (nats/token)"]


@pytest.fixture
def looked_into(store):
    """Two looks into each run of `full`, into two layers and what leaves them."""
    for row in store.read_plan("loo").rows:
        if row.cell == "full":
            for step in (300, 600):
                seen = {
                    f"layer/kurtosis/{place}": step + row.seed for place in ("00", "01", "end")
                }
                store.run(row.run).note_look(step, seen | {"train/logit": 9.0})
    return store


def test_looks_are_a_row_each_beside_the_tokens_of_their_step(looked_into):
    table = ab.read_looks("loo", looked_into.root)
    assert list(table.cell) == ["full"] * 6 and list(table.step) == [300, 600] * 3
    curves = ab.read_curves("loo", looked_into.root).set_index(["run", "step"]).tokens
    assert list(table.tokens) == [
        curves[run, step] for run, step in zip(table.run, table.step, strict=True)
    ]
    assert table["layer/kurtosis/01"].iloc[-1] == 602


def test_layers_have_a_panel_a_quantity_and_a_line_a_layer(looked_into):
    table = ab.read_looks("loo", looked_into.root)
    (axes,) = ab.plot_layers(table, "full", ["kurtosis"]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {name: [301, 601] for name in ("layer 0", "layer 1", "end")}
    with pytest.raises(UserError, match="no layer has 'rms'; seen are: kurtosis$"):
        ab.plot_layers(table, "full", ["rms"])
    with pytest.raises(UserError, match="layers of '- a'; looked at: 'full'; .*dynamics=50"):
        ab.plot_layers(table, "- a")


def test_where_nobody_looked_the_table_is_empty_and_the_plot_says_how_to(store):
    table = ab.read_looks("loo", store.root)
    assert table.empty and "step" in table
    with pytest.raises(UserError, match="looked at: none; .*runtime.dynamics=50"):
        ab.plot_layers(table, "full")


def test_each_plot_is_a_figure_that_can_be_changed(store):
    curves = ab.read_curves("loo", store.root)
    for figure in (ab.plot_effects("loo", store.root), ab.plot_curves(curves)):
        assert isinstance(figure, Figure)
        figure.axes[0].set_title("mine")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda root: ab.read_runs("no", root), "experiment 'no' has no runs"),
        (lambda root: ab.plot_rates("no", root), "study 'no' has no trials"),
        (
            lambda root: ab.plot_curves(ab.read_curves("loo", root), "val/x"),
            "no run has logged 'val/x'; logged are: .*val/loss",
        ),
        (
            lambda root: ab.plot_dynamics(ab.read_curves("loo", root), over="hours"),
            "over='hours' is no axis; choose one of tokens, flops, seconds",
        ),
        (
            lambda root: ab.plot_dynamics(ab.read_curves("loo", root), over="flops"),
            "no finished run has recorded its FLOPs",
        ),
        (lambda root: ab.plot_dynamics(ab.read_curves("loo", root), []), "none of these"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(store, ask, words):
    with pytest.raises(UserError, match=words) as refusal:
        ask(store.root)
    assert "\n" not in str(refusal.value)
