"""Several experiments over sizes: Markdown, page, terminal, JSON."""

import json
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats

from ablab import analysis as ab
from ablab.analysis.pages import sizes, sizes_html
from ablab.core.errors import UserError

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
NAMES = ("small", "large")


@pytest.fixture
def store(lab):
    """An arm that is better at both sizes, by more at the large one."""
    for name, parameters, gain in (("small", 1_000_000, 0.05), ("large", 4_000_000, 0.12)):
        own = replace(lab, name=name, rows=[])
        own.cell("full", [3.0, 3.01, 3.02], None, points=12)
        own.cell("+ x", [3.0 - gain, 3.01 - gain, 3.021 - gain], points=12)
        own.size(parameters)
        own.write()
    return lab.store


def test_the_page_and_the_text_say_the_trend_of_the_speedups(store, tmp_path):
    found = sizes.read(store, ["large", "small"])
    text = sizes.write_markdown(found, tmp_path).read_text()
    (line,) = [one for one in text.splitlines() if one.startswith("- `+ x`: speedup in tokens")]
    small, large = (
        ab.read_speedups(name, store.root).query("unit == 'tokens'") for name in NAMES
    )
    doubled = math.sqrt(large.factor.item() / small.factor.item())
    assert f"each doubling of size multiplies it by {doubled:.2f} [" in line
    assert line.endswith("the effect grows with size.")
    assert "**`+ x`: the effect grows with size.**" in text
    assert (tmp_path / "sizes.png").stat().st_size > 10_000
    page = sizes_html.write(found, tmp_path).read_text()
    drawn = json.loads(DATA.search(page)[1])["sizes"]
    (tokens,) = [one for one in drawn if one["unit"] == "tokens"]
    assert tokens["parameters"] == [1_000_000, 4_000_000]
    assert tokens["factor"] == pytest.approx(
        [small.factor.item(), large.factor.item()], rel=1e-5
    )
    assert "each doubling of size multiplies it by" in page


def test_the_interval_is_welchs_over_the_two_doublings(store):
    (tokens, _) = sizes.as_json(sizes.read(store, NAMES))["arms"]
    small, large = (size["logs"] for size in tokens["sizes"])
    theirs = stats.ttest_ind(large, small, equal_var=False).confidence_interval(0.95)
    expected = [math.exp(end / 2) for end in theirs]
    assert [tokens["trend"]["low"], tokens["trend"]["high"]] == pytest.approx(expected)
    assert json.dumps(tokens, allow_nan=False)


def test_a_notebook_gets_a_row_an_arm_unit_and_size(store):
    table = ab.read_speedups(NAMES, store.root)
    assert list(table.parameters[:2]) == [1_000_000, 4_000_000]
    assert table.trend.notna().all() and (table.trend_low < table.trend).all()
    assert set(table.unit) == {"tokens", "seconds"}
    alone = ab.read_speedups("small", store.root)
    assert alone.trend.isna().all()
    figure = ab.plot_speedups(NAMES, store.root)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["in tokens", "in seconds"]


def test_experiments_that_cannot_stand_together_are_refused(store, lab):
    other = replace(lab, name="other", metric="val/bits_per_byte", rows=[])
    other.cell("full", [1.0, 1.01], None, points=3).size(9)
    other.write()
    with pytest.raises(
        UserError, match="'small' is judged by val/loss .* by val/bits_per_byte"
    ):
        sizes.read(store, ["small", "other"])
    newer = replace(lab, name="newer", rows=[])
    newer.cell("full", [3.0, 3.01], None, points=3, code="beef").size(9)
    newer.write()
    with pytest.raises(UserError, match="mix code fingerprints.*--mixed"):
        sizes.read(store, ["small", "newer"])
    mixed = sizes.read(store, ["small", "newer"], mixed=True)
    assert "mix code fingerprints" in mixed.warnings[0]
    assert "not at every size: `+ x`" in mixed.warnings
    assert mixed.answer.startswith("No arm has a speedup at two sizes")
    assert pd.DataFrame(sizes.table(mixed)).columns[0] == "arm"


def test_names_and_overrides_are_told_apart_on_the_command_line():
    from ablab.experiments.cli.asked import experiments_of

    words = ["optim.lr=0.1", "b@model.width=64", "c.yaml", "with.x.y=a@b"]
    assert experiments_of("a", words) == [
        ("a", ["optim.lr=0.1"]),
        ("b@model.width=64", []),
        ("c.yaml", ["with.x.y=a@b"]),
    ]


def test_in_a_browser_the_chart_has_a_line_an_arm_in_the_unit_that_is_chosen(
    store, tmp_path, visit
):
    page = visit(sizes_html.write(sizes.read(store, NAMES), tmp_path).as_uri())
    page.wait_for_selector("body[data-drawn=yes]")
    title = page.locator("#chart-sizes .ytitle")
    assert title.text_content() == "speedup in tokens"
    page.select_option("#speedup-unit", "seconds")
    title.filter(has_text="speedup in seconds").wait_for()
    assert page.locator("#chart-sizes .errorbars").count() == 1
    assert not page.faults
    assert {one.partition(":")[0] for one in page.asked} <= {"file", "data"}
