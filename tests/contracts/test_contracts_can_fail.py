"""A contract that cannot fail protects nothing: flawed interventions fail the very test that is there for their flaw.

The healthy one is what `ablab new intervention` writes; each flaw is a change of a line or two of it.  All of them
stand in one folder that a pytest of its own is pointed to, as a user would: so `--plugins` is tested too.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from ablab.ablations.template import TEXT

APPLY = 'edit(recipe, "model.attention.on_heads", append(self))'
SLOTS = 'slots=("model.attention.on_heads",), neutral_at_init=True'
BUILD = "    def build(self, where: Where) -> Stage:"
SCALED = "return y * strength.exp().to(y.dtype)"
IDLE = ("start: float = 0.0 ", "start: float = 0.0\n    idle: float = 1.0 ")
FORGETS = """    count = 0

    def begin(self, weights):
        return {}

    def advance(self, state, weights, t, steps):
        type(self).count += 1
        weights[0].mul_(1 + 0.01 / self.count)

    def readout(self, state, weights):
        return weights

"""
REFUSES = """        if recipe.model.attention.on_heads:
            raise __import__("ablab.core.errors").core.errors.UserError("not beside another")
"""
# name: (the test that must fail, old, new, old, new, ...)
FLAWED = {
    "flaw_silent": ("says", '"""One line for `ablab list`."""', ""),
    "flaw_identity": ("changes_only", APPLY, "recipe"),
    "flaw_trespass": (
        "changes_only",
        APPLY,
        APPLY.replace("recipe", 'edit(recipe, "optim.lr", lambda lr: 2 * lr)'),
    ),
    # Turned off, it also gives the clipping back: OFF is no control.
    "flaw_control": (
        "changes_only",
        "return edit(",
        'recipe = edit(recipe, "optim.clip", lambda clip: None)\n        return edit(',
    ),
    "flaw_greedy": ("claims_no_slot", SLOTS, SLOTS.replace(",)", ', "model.ffn")')),
    "flaw_noop": ("is_alive", APPLY, "recipe"),
    "flaw_zero": ("is_alive", SCALED, "return y * (0 * strength).exp()"),
    "flaw_unread": ("is_alive", SCALED, "return y.clone()"),
    "flaw_seed": (
        "start_alike",
        APPLY,
        APPLY.replace("recipe", 'edit(recipe, "seed", lambda seed: seed + 1)'),
        SLOTS,
        SLOTS.replace(",)", ', "seed")'),
    ),
    "flaw_rows": (
        "start_alike",
        APPLY,
        APPLY.replace("recipe", 'edit(recipe, "data.batch", lambda rows: rows // 2)'),
    ),
    "flaw_boast": ("neutral", "start: float = 0.0", "start: float = 0.1"),
    "flaw_modesty": ("neutral", "neutral_at_init=True", "neutral_at_init=False"),
    "flaw_untyped": ("yaml", "append(self)", "append(type(self)(1))"),
    "flaw_break": (
        "compiles",
        SCALED,
        "return y * (strength.exp() if strength.sum() >= 0 else strength)",
    ),
    "flaw_forgets": (
        "resumed",
        APPLY,
        APPLY.replace("model.attention.on_heads", "after_step"),
        BUILD,
        FORGETS + BUILD,
    ),
    # What was built before in the process changes it: the order of arms matters.
    "flaw_order": (
        "built_before",
        "fill=self.start",
        "fill=self.start + 0.01 * next(BUILT)",
        "\n\ndef scale",
        '\n\nBUILT = __import__("itertools").count()\n\n\ndef scale',
    ),
    "flaw_heads": (
        "grouped",
        "on_heads",
        "on_qk",
        "scale(y, x,",
        "scale(q, k,",
        SCALED,
        "return q * strength.exp() + 0 * k, k",
    ),
    "flaw_chunk": ("decoding", SCALED, "return y * strength.exp() + y.cumsum(1)"),
    "flaw_wide": ("bfloat16", ".to(y.dtype)", ""),
    "flaw_dose": ("dose_field", *IDLE),
    "flaw_leaf": ("a_leaf", *IDLE),
    "flaw_clobbers": ("pair and gating", "append(self)", "lambda old: (self,)"),
    "flaw_refuses": (
        "pair and gating",
        "        return edit(",
        REFUSES + "        return edit(",
    ),
}
IMPORTS = "from ablab.core.language.declare"
STANDARD = 'edit(recipe, "parametrization", lambda old: Standard(embedding=0.03 + self.start))'
TWICE = """def twice(y, x, *, strength):
    return 2 * y * strength.exp().to(y.dtype)


def scale"""
CHOSEN = """    def chosen(self, where):
        return scale if self.till == "last" or where.layer else twice

"""
FAIR = {
    "fair_template": (),
    "fair_word": (
        "start: float = 0.0 ",
        'start: float = 0.0\n    till: Literal["last", "first"] = "last" ',
        "def scale",
        TWICE,
        "Stage(scale",
        "Stage(self.chosen(where)",
        BUILD,
        CHOSEN + BUILD,
        IMPORTS,
        "from typing import Literal\n\n" + IMPORTS,
    ),
    "fair_choice": (
        APPLY,
        STANDARD,
        SLOTS,
        'slots=("parametrization",)',
        IMPORTS,
        "from ablab.core.parts.parametrize import Standard\n" + IMPORTS,
    ),  # beside mup, a refusal that the declarations foretell
    "fair_exclusion": (SLOTS, SLOTS + ', excludes=("gating",)'),
    "fair_requirement": (SLOTS, SLOTS + ', requires=("normuon",)'),  # which requires muon
}

# The other two are the template's stage, of which is asked beside all what it does there.
BESIDE_ALL = "fair_template or fair_choice or fair_requirement"


def written(folder: Path, name: str, edits: tuple[str, ...]) -> None:
    text = TEXT.format(name=name, title=name, cls="Mine")
    replaced, by = edits[::2], edits[1::2]
    for old, new in zip(replaced, by, strict=True):
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)


@pytest.mark.slow
def test_flawed_interventions_fail_where_they_should_and_fair_ones_pass(tmp_path):
    for name, (_, *edits) in FLAWED.items():
        written(tmp_path, name, tuple(edits))
    for name, edits in FAIR.items():
        written(tmp_path, name, edits)
    chosen = ["(fair_ and not flaw_ and not compiles and not a_pair)"]
    chosen += ["(fair_template and compiles)", f"(a_pair and not flaw_ and ({BESIDE_ALL}))"]
    chosen += ["(a_pair and gating and (fair_word or fair_exclusion))"]
    chosen += [f"({name} and {test} and not fair_)" for name, (test, *_) in FLAWED.items()]
    outcomes = contracts(tmp_path, " or ".join(chosen))
    failed = [test for test, well in outcomes.items() if not well]
    caught = {name for name in FLAWED if any(name in test for test in failed)}
    assert caught == set(FLAWED)
    assert not [test for test in failed if "fair_" in test]
    for name in FAIR:
        assert sum(name in test for test in outcomes) > 20  # each one arrived, and is tested
    assert any("is_alive[fair_word-till=first]" in test for test in outcomes)


def contracts(folder: Path, chosen: str) -> dict[str, bool]:
    """Run the chosen contract tests on the interventions in a folder: test -> whether it passed."""
    here = Path(__file__)
    report = folder / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        here.parent,
        "--ignore",
        here,
        "--plugins",
        folder,
        "-k",
        chosen,
        "--junitxml",
        report,
    ]
    clean = dict(os.environ)
    for name in os.environ:
        if name.startswith("PYTEST_"):
            clean.pop(name)
    ended = subprocess.run(
        command,
        cwd=here.parents[2],
        env=clean,
        capture_output=True,
        text=True,
    )
    assert report.exists(), ended.stdout
    cases = xml.parse(report).iter("testcase")
    return {f"{case.get('classname')}.{case.get('name')}": well(case) for case in cases}


def well(case: xml.Element) -> bool:
    return not {"failure", "error"} & {child.tag for child in case}
