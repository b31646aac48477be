"""Token effects against a regression on tokens in fp64, against other texts, and from the files that runs leave."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure
from ablab.analysis.effects.tokens import TokenEffects, sums_of, token_effect
from ablab.analysis.pages.report import read, table
from ablab.core.store.held_out import HeldOut

METRIC = "val/bits_per_byte"
LN2 = math.log(2)


class Text:
    """A held-out text of documents of unequal length, and runs that read it.

    A run's loss is the token's own, the document's bent for the arm, and noise of the token.
    """

    def __init__(self, seed: int, documents: int = 40, rows: int = 30, context: int = 32):
        draw = np.random.default_rng(seed)
        shape = (rows, context)
        ends = draw.choice(rows * context, documents - 1, replace=False)
        marks = np.zeros(rows * context, np.int32)
        marks[ends] = 1
        self.draw = draw
        self.document = np.cumsum(marks, dtype=np.int32).reshape(shape)
        self.bytes = draw.integers(0, 7, shape, dtype=np.int32)
        self.own = draw.gamma(2.0, 1.5, shape)
        self.bent = draw.normal(0.0, 0.2, self.document.max() + 1)

    def read(self, effect: float = 0.0) -> HeldOut:
        """effect: in bits a byte, of an arm; its documents are bent by it."""
        noise = self.draw.normal(0.0, 0.3, self.own.shape)
        bent = self.bent[self.document] if effect else 0.0
        nats = self.own + noise + bent + effect * LN2 * self.bytes
        return HeldOut(nats.astype(np.float16), self.bytes, self.document)


def effect_of(arm, reference, metric=METRIC):
    ours = [sums_of(one, metric) for one in arm]
    theirs = [sums_of(one, metric) for one in reference]
    return token_effect(ours, theirs)


def mean_nats(runs):
    return np.mean([run.nats.astype(float) for run in runs], axis=0).ravel()


def regression(arm, reference, metric):
    """Weighted least squares of each token's difference on a constant, with errors clustered by document."""
    apart = mean_nats(arm) - mean_nats(reference)
    sizes = np.ones(apart.shape)
    if metric == METRIC:
        sizes = LN2 * arm[0].bytes.ravel()
    counted = sizes > 0
    weight = sizes[counted]
    y = apart[counted] / weight
    cluster = arm[0].document.ravel()[counted]
    x = np.ones((len(y), 1))
    weighted = weight[:, None] * x
    bread = np.linalg.inv(x.T @ weighted)
    beta = bread @ (weighted.T @ y)
    residuals = y - x @ beta
    scores = weighted * residuals[:, None]
    groups = np.unique(cluster)
    sums = np.array([scores[cluster == group].sum(axis=0) for group in groups])
    meat = sums.T @ sums
    count = len(groups)
    covariance = bread @ meat @ bread * count / (count - 1)
    return beta[0], math.sqrt(covariance[0, 0]), count, int(counted.sum())


@pytest.mark.parametrize("metric", [METRIC, "val/loss"])
@given(seed=st.integers(0, 10_000), runs=st.integers(1, 3), documents=st.integers(2, 60))
def test_it_is_the_clustered_regression_of_the_tokens(metric, seed, runs, documents):
    text = Text(seed, documents)
    arm = [text.read(0.05) for _ in range(runs)]
    reference = [text.read() for _ in range(runs)]
    found = effect_of(arm, reference, metric)
    delta, se, count, tokens = regression(arm, reference, metric)
    assert found.delta == pytest.approx(delta, abs=1e-12)
    assert found.se == pytest.approx(se, rel=1e-9)
    assert found.documents == count
    assert found.tokens == tokens


def token_by_token(run: HeldOut) -> HeldOut:
    """As if each token were a document."""
    count = run.document.size
    return replace(run, document=np.arange(count).reshape(run.document.shape))


def test_it_tells_how_far_the_delta_lies_apart_on_other_texts():
    """Of 300 texts; tokens taken for independent would say half of it."""
    deltas = []
    errors = []
    naive = []
    for seed in range(300):
        text = Text(seed)
        arm = text.read(0.05)
        reference = text.read()
        found = effect_of([arm], [reference])
        apart = effect_of([token_by_token(arm)], [token_by_token(reference)])
        naive.append(apart.se)
        deltas.append(found.delta)
        errors.append(found.se)
    spread = np.std(deltas)
    assert np.mean(deltas) == pytest.approx(0.05, abs=3 * spread / 300**0.5)
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    assert np.mean(naive) < 0.7 * spread


def test_what_all_documents_share_is_no_error_of_the_text():
    """An arm that is worse by the same bits in every byte is so on any text."""
    text = Text(3)
    base = text.read()
    nats = base.nats.astype(np.float32) + 0.05 * LN2 * base.bytes
    found = token_effect([sums_of(replace(base, nats=nats), METRIC)], [sums_of(base, METRIC)])
    assert found.delta == pytest.approx(0.05, rel=1e-6)
    assert found.se < 1e-7


@pytest.mark.parametrize("other", ["documents", "bytes", "rows", "none"])
def test_runs_that_read_other_tokens_have_none(other):
    text = Text(0)
    arm, reference = text.read(0.05), text.read()
    match other:
        case "documents":
            reference = replace(reference, document=reference.document + 1)
        case "bytes":
            reference = replace(reference, bytes=np.roll(reference.bytes, 100))
        case "rows":
            reference = Text(1).read()
    references = [] if other == "none" else [reference]
    assert effect_of([arm], references) is None


def test_one_document_and_a_loss_beyond_float16_have_none():
    text = Text(0, documents=1)
    assert effect_of([text.read(0.05)], [text.read()]) is None
    text = Text(0)
    broken = text.read(0.05)
    broken.nats[3, 4] = np.inf
    broken.bytes[3, 4] = 1
    assert effect_of([broken], [text.read()]) is None


# ---- of an experiment ----


def kept(lab, texts) -> None:
    """Give every finished run of the experiment the losses that `texts` makes of its cell."""
    for row in lab.rows:
        record = lab.store.run(row.run)
        result = record.result()
        digest = record.keep(texts(row.cell))
        record.finish(replace(result, held_out=digest))


@pytest.fixture
def experiment(lab):
    lab.metric = METRIC
    lab.cell("full", [1.0, 1.1, 1.2], reference=None)
    lab.cell("- muon", [1.05, 1.16, 1.24])
    lab.cell("- gating", [1.01, 1.09, 1.21])
    lab.write()
    text = Text(7)
    effects = {"full": 0.0, "- muon": 0.05, "- gating": 0.01}
    kept(lab, lambda cell: text.read(effects[cell]))
    return lab


def token_effects(lab):
    runs = frame.load(lab.store, lab.name)
    tokens = TokenEffects(lab.store, runs, METRIC)
    measured = tokens.added(measure(runs, METRIC))
    return {effect.cell: effect for effect in measured}, tokens


def losses_of(lab, cell):
    records = [lab.store.run(row.run) for row in lab.rows if row.cell == cell]
    return [record.held_out(record.result().held_out) for record in records]


def test_each_arm_has_that_of_the_runs_behind_its_delta(experiment):
    effects, tokens = token_effects(experiment)
    assert effects["full"].tokens is None
    assert not tokens.damages
    reference = losses_of(experiment, "full")
    for cell in ("- muon", "- gating"):
        tokens = effects[cell].tokens
        assert tokens == effect_of(losses_of(experiment, cell), reference)
        assert effects[cell].token_error == tokens.se


def test_the_report_shows_it_beside_the_error_over_seeds(experiment):
    report = read(experiment.store, experiment.name)
    rows = {row["arm"]: row for row in table(report.effects)}
    effects, _ = token_effects(experiment)
    for cell in ("- muon", "- gating"):
        effect = effects[cell]
        assert rows[cell]["SE seeds"] == f"{effect.seed_error:.4f}"
        assert rows[cell]["SE text"] == f"{effect.token_error:.4f}"
    assert rows["full"]["SE text"] == "–"


def test_losses_that_were_lost_or_changed_are_said_once_and_cost_only_the_arms_that_need_them(
    experiment,
):
    muon = [row for row in experiment.rows if row.cell == "- muon"]
    path = experiment.store.run(muon[1].run).held_out_path
    for damage in (lambda: path.write_bytes(b"PK"), path.unlink):
        damage()
        report = read(experiment.store, experiment.name)
        errors = {effect.cell: effect.token_error for effect in report.effects}
        assert errors["- muon"] is None and errors["- gating"] > 0
        [said] = [one for one in report.warnings if "held_out.npz" in one]
        assert said.startswith("`- muon`, seed 1: ")
        assert str(path) in said


def test_runs_of_before_have_none_and_nothing_is_said(lab):
    lab.metric = METRIC
    lab.cell("full", [1.0, 1.1, 1.2], reference=None)
    lab.cell("- muon", [1.05, 1.16, 1.24])
    lab.write()
    effects, tokens = token_effects(lab)
    assert effects["- muon"].tokens is None and not tokens.damages
