"""A/A arms of a store, and how often they are told apart."""

import pytest

from ablab.analysis.effects.aa import FalseAlarms, false_alarms


def twins(lab, name: str, difference: float, seeds: int = 6):
    """A and B on seeds of their own, apart by `difference`."""
    lab.name = name
    lab.rows = []
    lab.treatments = {"A": {}, "B": {}}
    values = [3 + 0.01 * i for i in range(seeds)]
    lab.cell("A", values, reference=None)
    lab.cell("B", [value + difference for value in values], "A", first_seed=1000)
    return lab.write()


def test_arms_with_the_treatment_of_their_reference_on_other_seeds_are_counted(lab):
    twins(lab, "quiet", 0.0)
    store = twins(lab, "loud", 1.0)
    found = false_alarms(store)
    assert found.arms == 2
    assert found.alarms == ("loud: B",)
    assert str(found).startswith(
        "1 of 2 A/A arms in this store are told apart, 50% (95 % interval"
    )


def test_arms_that_differ_in_treatment_or_share_their_seeds_are_no_a_a_arms(lab):
    lab.treatments = {"full": {"a": {}}, "- a": {}, "again": {"a": {}}}
    lab.cell("full", [3.0, 3.1, 3.2], reference=None).cell(
        "- a", [9.0, 9.1, 9.2], first_seed=1000
    )
    lab.cell("again", [9.0, 9.1, 9.2])
    assert false_alarms(lab.write()).arms == 0


def test_too_few_seeds_are_no_arm_and_a_store_without_arms_says_how_to_have_some(lab):
    found = false_alarms(twins(lab, "few", 1.0, seeds=2))
    assert found.arms == 0
    assert "design: replicate measures it" in str(found)


def test_a_plan_that_cannot_be_read_costs_the_others_nothing(lab):
    store = twins(lab, "quiet", 0.0)
    store.plan_path("broken").write_text("{")
    assert false_alarms(store).arms == 1


@pytest.mark.parametrize(
    ("alarms", "arms", "low", "high"),
    # Clopper and Pearson's intervals as R's binom.test prints them
    [(0, 20, 0.0, 0.1684), (1, 20, 0.0013, 0.2487), (3, 3, 0.2924, 1.0)],
)
def test_the_interval_of_the_rate_is_exact(alarms, arms, low, high):
    found = FalseAlarms(arms, tuple("x" * alarms))
    assert found.interval == pytest.approx((low, high), abs=1e-4)
