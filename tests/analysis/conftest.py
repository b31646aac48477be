"""Synthetic experiments: stores with the records that a runner would have left."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ablab.core.store.planned import Factors, GridPlan, Planned
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store

METRIC = "val/loss"
TOKENS = 100_000_000


@dataclass
class Lab:
    """Builds one experiment cell by cell, then writes it."""

    store: Store
    name: str = "loo"
    better: str = "lower"
    metric: str = METRIC
    rows: list[Planned] = field(default_factory=list)
    treatments: dict = field(default_factory=dict)
    off: dict = field(default_factory=dict)
    equivalence: float | None = None
    factors: Factors | None = None

    def cell(
        self,
        name: str,
        values,
        reference: str | None = "full",
        speed: float = 1e5,
        points: int = 0,
        runs=None,
        first_seed: int = 0,
        **result,
    ) -> "Lab":
        """One run per value, or per status in its place; "missing" and "interrupted" leave no result."""
        for pair, value in enumerate(values):
            # Numpy scalars have no JSON form.
            value = value if isinstance(value, str) else float(value)
            seed = first_seed + pair
            run = runs[pair] if runs else f"{self.name}-{name}-{seed}".replace(" ", "_")
            self.rows.append(Planned(name, pair, seed=seed, run=run, reference=reference))
            if value != "missing":
                self._record(run, value, speed, points, result)
        return self

    def _record(self, run: str, value, speed: float, points: int, given: dict) -> None:
        record = self.store.run(run)
        number = value if isinstance(value, float) else 3.3
        record.folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(sum(run.encode()))
        done = 1.0 if isinstance(value, float) else 0.4
        for step in range(1, int(points * done) + 1):
            # A power law that ends at the final value, with evaluation noise that fades.
            part = step / points
            loss = number + 0.9 * (part**-0.3 - 1) + noise.normal(0, 0.004) * (1 - part)
            loss += 0 if done == 1 else 2 * (part / done) ** 20  # lost runs blow up first
            scalars = {
                "tokens": part * TOKENS,
                "train/loss": loss + 0.02,
                METRIC: loss,
                "val/bits_per_byte": loss / 3,
            }
            record.log(step * 100, scalars, {"seconds": part, "tokens_per_second": speed})
        if value == "interrupted":
            return
        ended = (
            {"status": FINISHED, "metrics": {self.metric: value, "raw/val/loss": value + 0.01}}
            if done == 1
            else {"status": value}
        )
        usual = {
            "run": run,
            "step": points,
            "tokens": TOKENS,
            "seconds": 60.0,
            "tokens_per_second": speed,
            "code": "c0ffee",
        }
        usual["runtime"] = {"device": "cuda", "dtype": "bfloat16"}
        record.finish(Result(**usual | ended | given))

    def size(self, parameters: int) -> "Lab":
        """What every run has recorded of its model's size."""
        for row in self.rows:
            told = json.dumps({"size": {"parameters": parameters}})
            self.store.run(row.run).about_path.write_text(told)
        return self

    def write(self) -> Store:
        question = "Which ingredients still pay?"
        self.store.write_plan(
            GridPlan(
                self.name,
                question,
                self.metric,
                self.better,
                "leave_one_out",
                self.rows,
                self.treatments,
                self.off,
                equivalence=self.equivalence,
                factors=self.factors,
            )
        )
        return self.store


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(Store(tmp_path / "store"))


@pytest.fixture
def normal() -> np.random.Generator:
    return np.random.default_rng(20250)
