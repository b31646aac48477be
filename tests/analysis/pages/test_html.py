import base64
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ablab.analysis.effects import frame
from ablab.analysis.pages import html, report
from ablab.analysis.pages.html import rounded
from ablab.core.store.evaluation import Evaluation, Part
from ablab.core.store.evaluation import write as write_evaluation
from ablab.core.store.planned import Factors

FULL = [3.000, 3.001, 3.002]
WITHOUT = [3.020, 3.022, 3.021]
PACKED = re.compile(r'<script type="text/plain" id="plotly-packed">.*?</script>', re.DOTALL)
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
CSV = re.compile(r'download="([^"]*)" href="data:text/csv;charset=utf-8;base64,([^"]*)"')


def written(lab, folder):
    """Where the page is."""
    store = lab.write()
    found = report.read(store, lab.name, mixed=True)
    return html.write(store, found, frame.curves(store, lab.name), folder)


def page(lab, folder) -> str:
    """The page without plotly.js, and without the places where a narrow column may break a name."""
    return PACKED.sub("", written(lab, folder).read_text()).replace("<wbr>", "")


def data(text: str) -> dict:
    return json.loads(DATA.search(text)[1])


def test_the_first_thing_after_the_question_is_the_answer(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- muon", WITHOUT)
    text = page(lab, tmp_path)
    question = text.index("Which ingredients still pay?</h1>")
    answer = text.index("<code>muon</code> helps (by 0.0200 nats/token)")
    assert question < answer < text.index("<table")


def test_nothing_is_asked_of_any_network(lab, tmp_path):
    lab.cell("full", FULL, None, points=5)
    text = page(lab, tmp_path)
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', text)
    assert addresses
    assert all(one.startswith(("data:", "#")) for one in addresses)
    assert not re.search(r"@import|url\(", text)


def test_charts_and_csv_say_what_the_report_says(lab, tmp_path):
    lab.cell("full", FULL, None, points=5)
    lab.cell("- muon", WITHOUT, points=5)
    effect = report.read(lab.write(), "loo").effects[1]
    text = page(lab, tmp_path)
    (arm,) = data(text)["forest"]
    assert (arm["delta"], arm["low"], arm["high"]) == (effect.delta, effect.low, effect.high)
    tables = {name: base64.b64decode(held).decode() for name, held in CSV.findall(text)}
    verdicts = pd.read_csv(pd.io.common.StringIO(tables["loo-verdicts.csv"]))
    assert verdicts.delta.iloc[1] == pytest.approx(effect.delta)
    assert list(verdicts.verdict) == ["reference", "helps"]
    runs = pd.read_csv(pd.io.common.StringIO(tables["loo-runs.csv"]))
    assert set(runs.run) == {planned.run for planned in lab.rows}


def test_a_curve_has_its_band_and_the_difference_its_own(lab, tmp_path):
    lab.cell("full", FULL, None, points=5)
    lab.cell("- muon", WITHOUT, points=5)
    found = data(page(lab, tmp_path))
    reference, arm = found["curves"]["val/loss"]
    assert reference["cell"] == "full"
    assert arm["mean"][-1] == pytest.approx(np.mean(WITHOUT))
    assert arm["sd"][-1] == pytest.approx(np.std(WITHOUT, ddof=1), rel=1e-2)
    assert arm["runs"] == 3
    assert arm["token_flops"] is None
    (difference,) = found["differences"]
    assert difference["mean"][-1] == pytest.approx(0.02, rel=1e-4)
    assert difference["sd"][-1] == pytest.approx(
        np.std(np.subtract(WITHOUT, FULL), ddof=1), rel=1e-2
    )


def test_evaluations_stand_on_both_pages_and_nothing_does_without_any(lab, tmp_path):
    """full has 3 of 4 right, - muon 2 of 4 on the same items."""
    lab.cell("full", FULL, None)
    lab.cell("- muon", WITHOUT)
    assert "Evaluations" not in page(lab, tmp_path)
    for planned in lab.rows:
        record = lab.store.run(planned.run)
        record.finish(replace(record.result(), weights="w"))
        right = [1.0, 1.0, float(planned.cell == "full"), 0.0]
        asked = Evaluation("blimp", "eval/blimp", "centered", [Part("t", right)], "d1ge57", "w")
        write_evaluation(record.folder, asked)
    text = page(lab, tmp_path)
    section = text[text.index('<section id="evaluations">') :].partition("</section>")[0]
    assert "eval/blimp" in section and "0.7500" in section and "−0.2500" in section
    markdown = report.write(lab.write(), lab.name, tmp_path / "md").read_text()
    assert "| `eval/blimp` | - muon | 0.5000 |" in markdown
    assert "eval/blimp d1ge57" in markdown
    told = report.as_json(report.read(lab.write(), lab.name))["evaluations"]
    assert [one["mean"] for one in told] == [0.75, 0.5]


def test_what_was_lost_is_shown_with_its_reason(lab, tmp_path):
    lab.cell("full", FULL, None, points=5)
    lab.cell("- a", [3.1, 3.2, "diverged"], points=5, error="the loss was not finite")
    text = page(lab, tmp_path)
    lost = text.split('id="failures"')[1].split("</section>")[0]
    assert "the loss was not finite" in lost
    assert [line["status"] for line in data(text)["lost"]] == ["diverged"]


def test_runs_of_two_codes_stand_out_in_the_provenance(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- a", WITHOUT, code="beef")
    text = page(lab, tmp_path)
    sources = text.split('id="provenance"')[1]
    assert '<td class="mixed">c0ffee (3 runs); beef (3 runs)</td>' in sources
    assert "the runs mix code fingerprints" in text.split('id="verdicts"')[0]


def test_how_far_the_store_is_to_be_trusted_stands_in_the_provenance(lab, tmp_path):
    lab.cell("full", FULL, None)
    lab.cell("- a", WITHOUT)
    sources = page(lab, tmp_path).split('id="provenance"')[1]
    said = report.read(lab.store, lab.name).provenance
    assert len(said) == 2
    for sentence in said:
        assert sentence.replace("`", "")[:40] in re.sub("</?code>", "", sources)


def test_names_are_text_wherever_they_stand(lab, tmp_path):
    name = "</script><b>&amp;\"'"
    lab.cell("full", FULL, None, points=3)
    lab.cell(name, WITHOUT, points=3)
    text = page(lab, tmp_path)
    assert name not in text
    assert name in data(text)["cells"]


def test_a_report_without_logs_has_its_tables(lab, tmp_path):
    lab.cell("only", FULL, None)
    text = page(lab, tmp_path)
    assert "<code>only</code> 3.0010" in text
    assert 'id="chart-curves"' not in text
    assert 'id="chart-forest"' not in text


@pytest.mark.parametrize("value", [3.14159265, -0.000123456789, 1234567.89, 0.1, 0.0])
def test_a_rounded_number_keeps_its_digits_and_no_others(value):
    (short,) = rounded(np.array([value]))
    assert short == float(f"{value:.6g}")
    assert len(str(short)) <= len(f"{value:.6g}") + 2


def test_no_number_is_null():
    assert rounded(np.array([np.nan, np.inf, 1.0])) == [None, None, 1.0]


def test_a_crossed_design_shows_its_factors_and_what_two_do_together(lab, tmp_path):
    """Each alone lowers the loss by .1; both together by .05: the pair costs .15, of which half is the interaction."""
    levels = {"base": (-1, -1), "+ a": (1, -1), "+ b": (-1, 1), "full": (1, 1)}
    for (cell, _), value in zip(levels.items(), (3.0, 2.9, 2.9, 2.95), strict=True):
        noise = (0.0, 0.001, -0.001, 0.0005)
        lab.cell(cell, [value + one for one in noise], None if cell == "base" else "base")
    factors = Factors(
        names={"a": ["off", "on"], "b": ["off", "on"]},
        levels={cell: dict(zip("ab", at, strict=True)) for cell, at in levels.items()},
        interactions=[["a", "b"]],
    )
    store = lab.write()
    store.write_plan(replace(store.read_plan("loo"), factors=factors))
    found = report.read(store, "loo")
    path = html.write(store, found, frame.curves(store, "loo"), tmp_path)
    text = PACKED.sub("", path.read_text()).replace("<wbr>", "")
    square = data(text)["interactions"]
    assert square["names"] == ["a", "b"]
    assert square["z"][0][1] == square["z"][1][0] == pytest.approx(0.075)
    assert square["z"][0][0] is None
    assert "<td>a x b</td>" in text.replace(' class=""', "")


def test_the_effect_in_compute_is_a_row_an_arm(lab, tmp_path):
    lab.cell("full", FULL, None, points=20)
    lab.cell("- muon", WITHOUT, points=20)
    section = page(lab, tmp_path).split('id="speedups"')[1].split("</section>")[0]
    assert "- muon" in section
    assert " x [" in section


# In a browser.


@pytest.fixture
def address(lab, normal, tmp_path):
    lab.cell("full", list(normal.normal(3, 0.002, 3)), None, points=20)
    lab.cell("- a_rather_long_name (and another)", list(normal.normal(3.1, 0.1, 3)), points=20)
    lab.cell("- muon", list(normal.normal(2.9, 0.002, 3)), points=20)
    lab.cell("- lost", [3.1, "diverged", "missing"], points=20)
    return written(lab, tmp_path).as_uri()


def drawn(page) -> int:
    """Lines of the curves, once the charts are there."""
    page.wait_for_selector("body[data-drawn=yes]")
    return page.locator("#chart-curves .scatterlayer .trace").count()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_a_reader_sees_it_whole_without_a_network(visit, address, width, scheme):
    page = visit(address, width, scheme)
    assert drawn(page) > 4
    assert page.locator("#chart-forest .scatterlayer .trace").count() == 4
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, re.findall(r"\d+", paper)))
    assert bright > 600 if scheme == "light" else bright < 150
    assert [one for one in page.asked if not one.startswith(("file:", "data:"))] == []
    assert page.faults == []


def test_a_heading_sorts_and_a_name_hides_its_curve(visit, address):
    page = visit(address)
    before = drawn(page)
    page.locator("#verdicts th button", has_text="difference").click()
    first = page.locator("#verdicts tbody tr").first
    assert "muon" in first.inner_text()
    first.locator(".pick").click()
    page.wait_for_function(
        "count => document.querySelectorAll('#chart-curves .scatterlayer .trace').length < count",
        arg=before,
    )
    page.locator("#axis").select_option("seconds")
    page.get_by_text("seconds of training").first.wait_for()
    page.locator("#minus").check()
    page.get_by_text("difference (nats/token)").first.wait_for()
    assert page.faults == []
