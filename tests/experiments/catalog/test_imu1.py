"""The IMU-1 recipes: their settings, and imu1_released against the released formulas, transcribed in fp64.

Formulas from github.com/thepowerfuldeez/sample_efficient_gpt at d92a350: transformer/{core,attention,transformer}.py,
training/{trainer,optimizer}.py, training/optimizers/{normuon_cwd,muon_triton}.py.  An iteration is a micro-batch; of
two, the second moves the weights.  Newton-Schulz in fp64, where they have bf16.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ablab.core.model.cost import cost_of
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.parts.transforms import Now
from ablab.core.recipe.recipe import Recipe
from ablab.core.train.banks import Optimizer
from ablab.core.train.step import TrainingStep
from ablab.experiments.plan.experiment import load

LAYERS, WIDTH, HEADS, KV, DIM, HIDDEN, VOCAB = 3, 48, 6, 2, 8, 128, 64
STEPS = 30
ITERATIONS = 2 * STEPS
SMALL = {
    "model.width": WIDTH,
    "model.attention.head_dim": DIM,
    "model.layers": LAYERS,
    "data.vocab": VOCAB,
    "data.digest": "0" * 16,
    "with.muon.warmup_steps": 40,
    "stages.stable.with.wsd.warmup_steps": 25,
    "stages.stable.with.wsd.idle_steps": 6,
}
CONTEXTS = {"stable": 12, "decay": 14, "midtrain": 18}
ROWS = 4
for name, context in CONTEXTS.items():
    SMALL |= {
        f"stages.{name}.data.context": context,
        f"stages.{name}.data.batch": ROWS,
        f"stages.{name}.budget.tokens": STEPS * ROWS * context,
    }


@dataclass(frozen=True)
class Settings:
    """Of one stage, as configs/imu1_base.yaml has them; steps in iterations, of which this stage begins at `first`."""

    first: int
    matrix_lr: float
    other_lr: float
    decays: bool
    floor: float = 0.0
    idle: int = 6
    warmup: int = 25

    def factor(self, iteration: int, iterations: int = ITERATIONS) -> float:
        """On both learning rates, of the stage's so many iterations: get_wsd_lr."""
        if self.decays:
            u = (iteration - self.first) / iterations
            return self.floor + (1 - math.sqrt(u)) * (1 - self.floor)
        if iteration < self.idle:
            return 0.0
        return min((iteration - self.idle) / self.warmup, 1.0)


SETTINGS = {
    "stable": Settings(0, 1.1e-2, 6e-3, decays=False),
    "decay": Settings(ITERATIONS, 1.15e-2, 6e-3, decays=True, floor=0.25),
    "midtrain": Settings(2 * ITERATIONS, 3e-3, 2e-3, decays=True, floor=0.33),
}


def momentum_at(iteration: int) -> float:
    """It is set while iteration < 40 (theirs: 300), and then stays."""
    return 0.85 + min(max(min(iteration, 39), 1), 40) / 40 * (0.95 - 0.85)


# -- the model ---------------------------------------------------------------------------------------------------------
def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotated(x: Tensor) -> Tensor:
    """x: [B,H,T,D]; channel i turns with channel i + D/2."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-2 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    angle = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), rates)
    a, b = x[..., :half], x[..., half:]
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.cat(turned, dim=-1)


def logits_of(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """tokens: [B,T] -> [B,T,V]."""
    x = w["embedding.table"][tokens]
    values = None
    for i in range(LAYERS):
        block = {
            name.removeprefix(f"blocks.{i}."): value
            for name, value in w.items()
            if name.startswith(f"blocks.{i}.")
        }
        scale = (i + 1) ** -0.5
        normed = rms(x, 1e-5) * block["attention.norm.gain"] * scale
        attended, mixed = attention(block, normed, values)
        values = mixed if values is None else values
        x = x + attended
        normed = rms(x, 1e-5) * block["ffn.norm.gain"] * scale
        gate, up = (normed @ block["ffn.inner.gate_up.weight"].T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block["ffn.inner.down.weight"].T
    return rms(x, 1e-5) * w["norm.gain"] @ w["readout.weight"].T


def attention(w: dict[str, Tensor], x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """x: normed [B,T,W]; first: what layer 1 attended with, None in layer 1.  Returns the branch, the values."""
    rows, count = x.shape[:2]
    projected = x @ w["attention.qkv.weight"].T
    q, k, v = projected.split([HEADS * DIM, KV * DIM, KV * DIM], dim=-1)
    q, k, v = (one.view(rows, count, -1, DIM).transpose(1, 2) for one in (q, k, v))
    k, v = (one.repeat_interleave(HEADS // KV, dim=1) for one in (k, v))
    mix = "attention.on_values.value_residual."
    own, other = w[f"{mix}own"], w[f"{mix}first"]
    joined = own * v + other * (v if first is None else first)
    v = w[f"{mix}scale"] * joined * torch.rsqrt(own**2 + other**2 + 1e-8)
    q = rms(rotated(q), 1e-6) * w["attention.on_qk.qk_norm.q_gain"]
    k = rms(rotated(k), 1e-6)
    scores = q @ k.mT / math.sqrt(DIM)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    heads = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v
    gate = 2 * torch.sigmoid(x @ w["attention.on_heads.gating.project.weight"].T)
    joined = (heads.transpose(1, 2) * gate[..., None]).flatten(2)
    return joined @ w["attention.out.weight"].T, v


def loss_of(w: dict[str, Tensor], rows: Tensor) -> Tensor:
    logits = logits_of(w, rows[:, :-1])
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, rows[:, 1:, None]).squeeze(-1)
    return (lse - picked + 1e-6 * lse.square()).mean()


# -- the optimizer -----------------------------------------------------------------------------------------------------
POLAR = (
    (7.2086, -15.5131, 9.0178),
    (3.9623, -2.5813, 0.4542),
    (3.9466, -2.5765, 0.4544),
    (3.8991, -2.5671, 0.4566),
    (3.7186, -2.5308, 0.4653),
    (3.1390, -2.3073, 0.4733),
    (2.1715, -1.5246, 0.3885),
)


def polar(g: Tensor) -> Tensor:
    x = g.mT if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for a, b, c in POLAR:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


@dataclass
class Released:
    """Weights and optimizer state, fp64."""

    weights: dict[str, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]  # of matrices along their longer side
    updates: int = 0

    def train(self, settings: Settings, micro_batches: list[Tensor]) -> None:
        """Every micro-batch of a stage, [B,T+1] each."""
        total: dict[str, Tensor] = {}
        for i, rows in enumerate(micro_batches):
            iteration = settings.first + i
            w = {name: value.detach().requires_grad_() for name, value in self.weights.items()}
            grads = torch.autograd.grad(loss_of(w, rows) / 2, list(w.values()))
            for name, grad in zip(w, grads, strict=True):
                total[name] = total.get(name, 0) + grad
            if (iteration + 1) % 2 == 0:
                self.updates += 1
                for name, grad in total.items():
                    self.move(name, grad, settings, iteration)
                total = {}

    def move(self, name: str, grad: Tensor, settings: Settings, iteration: int) -> None:
        factor = settings.factor(iteration)
        if grad.dim() < 2 or name in ("embedding.table", "readout.weight"):
            self.adam(name, grad, settings.other_lr * factor)
        else:
            self.normuon(name, grad, settings.matrix_lr * factor, momentum_at(iteration))

    def adam(self, name: str, grad: Tensor, lr: float) -> None:
        mean = 0.95 * self.mean[name] + 0.05 * grad
        square = 0.99 * self.square[name] + 0.01 * grad**2
        step = lr * math.sqrt(1 - 0.99**self.updates) / (1 - 0.95**self.updates)
        self.weights[name] = self.weights[name] - step * mean / (square.sqrt() + 1e-8)
        self.mean[name], self.square[name] = mean, square

    def normuon(self, name: str, grad: Tensor, lr: float, momentum: float) -> None:
        w = self.weights[name]
        mean = momentum * self.mean[name] + (1 - momentum) * grad
        v = polar((1 - momentum) * grad + momentum * mean)
        axis = -1 if w.shape[0] >= w.shape[1] else -2
        square = 0.95 * self.square[name] + 0.05 * v.square().mean(axis, keepdim=True)
        normed = v * torch.rsqrt(square.clamp(min=1e-10))
        normed = normed * v.norm() / normed.norm()
        decayed = w * torch.eq(torch.signbit(normed), torch.signbit(w))
        rate = lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        self.weights[name] = w - lr * 0.1 * decayed - rate * normed
        self.mean[name], self.square[name] = mean, square


# -- side by side ------------------------------------------------------------------------------------------------------
@dataclass
class Ours:
    """A stage of imu1_released as ablab trains it, fp32."""

    recipe: Recipe
    model: torch.nn.Module
    step: TrainingStep

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().double() for name, value in self.model.named_parameters()}

    def released(self) -> Released:
        """The same weights and state, for the other side to go on from.

        Our second moments are of the polar factor times sqrt(max(1, rows / columns)), theirs of the bare one.
        """
        mean, square = {}, {}
        for bank in self.step.optimizer.banks:
            kept = {name: one for state in bank.state.values() for name, one in state.items()}
            rows, columns = (*bank.weight.shape[1:], 1)[:2]
            scaled = max(1.0, rows / columns) if "square0" in kept else 1.0
            second = kept.get("square0", kept.get("square")) / scaled
            for i, name in enumerate(bank.names):
                mean[name], square[name] = kept["mean"][i].double(), second[i].double()
        return Released(self.weights, mean, square, self.recipe.before.steps)


@pytest.fixture(scope="module")
def stages():
    runs = load("imu1_released", SMALL).runs([0])
    return {run.stage: run.recipe for run in runs[0].chain}


def micro_batches(name: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(list(CONTEXTS).index(name))
    shape = (ROWS // 2, CONTEXTS[name] + 1)
    return [torch.randint(VOCAB, shape, generator=draw) for _ in range(ITERATIONS)]


def begun(recipe, build, before: Ours | None) -> Ours:
    """Weights and optimizer state of the stage before, or those of the seed."""
    model = build(recipe)
    if before:
        model.load_state_dict(before.model.state_dict())
    descend, _ = heads_of(model)
    optimizer = Optimizer(model, recipe)
    step = TrainingStep(of_rows(model, descend), optimizer, recipe, recipe.tokens_per_step)
    if before:
        for name, value in optimizer.tensors().items():
            value.copy_(before.step.optimizer.tensors()[name])
    return Ours(recipe, model, step)


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of two parameters of a name."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in ours
    )


@dataclass(frozen=True)
class Distances:
    """Relative, at the start of a stage (logits), after its first step that moves, after all of its steps."""

    logits: float
    one_step: float
    all_steps: float


@pytest.fixture(scope="module")
def distances(stages, build):
    """Stage -> how far the two are apart; each stage begins on both sides with what ablab's last one left."""
    found = {}
    before = None
    for name, recipe in stages.items():
        ours = begun(recipe, build, before)
        theirs = ours.released()
        batches = micro_batches(name)
        rows = batches[0][:, :-1]
        expected = logits_of(theirs.weights, rows)
        logits = (ours.model(rows).double() - expected).norm() / expected.norm()
        settings = SETTINGS[name]
        first = next(t for t in range(1, STEPS) if settings.factor(settings.first + 2 * t - 1))
        early = ours.released()
        early.train(settings, batches[: 2 * first])
        theirs.train(settings, batches)
        for t in range(1, STEPS + 1):
            ours.step.take(t, batches[2 * t - 2 : 2 * t])
            if t == first:
                one_step = furthest(ours.weights, early.weights)
        all_steps = furthest(ours.weights, theirs.weights)
        found[name] = Distances(logits.item(), one_step, all_steps)
        before = ours
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_each_stage_computes_the_released_formulas(distances, name):
    """Measured: logits 4e-7, one step 5e-7, thirty steps 1e-4 (stage 1, whose second moments begin at 0) to 8e-7."""
    found = distances[name]
    assert found.logits < 1e-5
    assert 0 < found.one_step < 1e-5
    assert found.all_steps < 5e-4


# -- their settings ----------------------------------------------------------------------------------------------------
FULL = {
    "stable": Settings(0, 1.1e-2, 6e-3, decays=False, idle=500, warmup=2500),
    "decay": Settings(100_000, 1.15e-2, 6e-3, decays=True, floor=0.25),
    "midtrain": Settings(200_000, 3e-3, 2e-3, decays=True, floor=0.33),
}
UNTIL = {"stable": 100_000, "decay": 200_000, "midtrain": 265_000}


@pytest.mark.parametrize("name", FULL)
def test_the_learning_rates_of_every_step_are_the_released_ones(name):
    settings = FULL[name]
    recipe = recipes_of("imu1_released")[name]
    iterations = UNTIL[name] - settings.first
    assert 2 * recipe.steps == iterations
    matrices = recipe.optim.lr * recipe.optim.chains["hidden"].lr
    assert matrices == pytest.approx(settings.matrix_lr, rel=1e-12)
    assert recipe.optim.lr == settings.other_lr
    scaled = replace(settings, first=0)
    for t in [*range(1, 2000), *range(2000, recipe.steps + 1, 997), recipe.steps]:
        factor = recipe.schedule.multiplier(t, recipe.steps)
        assert factor == pytest.approx(scaled.factor(2 * t - 1, iterations), abs=1e-12)


def recipes_of(name):
    (run,) = load(name).runs([0])
    return {one.stage: one.recipe for one in run.chain}


def test_the_rise_of_momentum_ends_one_iteration_early():
    momentum = recipes_of("imu1_released")["stable"].optim.chains["hidden"].steps[0]
    for t in (1, 2, 75, 149, 150, 151, 50_000):
        iteration = min(2 * t - 1, 299)
        kept = momentum.keep(Now(torch.tensor(float(t)), None, None)).item()
        assert kept == pytest.approx(0.85 + 0.1 * iteration / 300, abs=1e-7)
    assert kept == pytest.approx(0.94967, abs=1e-5)


@pytest.mark.parametrize("name", ["imu1", "imu1_scratch", "imu1_released"])
def test_the_recipes_have_the_shape_and_the_tokens_of_the_settings(name):
    recipes = recipes_of(name)
    model = recipes["stable"].model
    heads = (model.width, model.layers, model.heads, model.kv_heads, model.attention.head_dim)
    assert heads == (1152, 30, 18, 6, 64)
    assert model.tied == (name != "imu1_released")
    assert cost_of(recipes["stable"]).parameters == pytest.approx(
        482e6 if model.tied else 538.6e6, rel=1e-3
    )
    rows = [(one.data.context, one.data.batch, one.steps) for one in recipes.values()]
    assert rows == [(768, 768, 50_000), (896, 624, 50_000), (1152, 384, 32_500)]
    assert recipes["midtrain"].before.steps == 100_000
    (ema,) = recipes["midtrain"].after_step
    # Every 2,500 iterations, 1,250 steps.
    last = [32_500 - 1250 * back for back in range(ema.checkpoints)]
    assert ema.snapshots(32_500) == sorted(last)
    assert ema.checkpoints == (6 if name == "imu1_released" else 10)


# Millions of tokens a source: 1226_stable.json, 1227_decay.json and 0101_midtrain.json of the release's history.
PUBLISHED = {
    "stable": {
        "dclm_edu": 27_000,
        "finemath_4": 5_000,
        "stack_updated": 2_000,
        "finewiki_en": 8_400,
        "zyda_2": 4_300,
        "cosmopedia_edu": 2_400,
        "datashop_science_qa": 1_000,
        "megamath_web_pro": 5_000,
        "python_edu": 12_000,
        "finepdfs_edu": 8_000,
    },
    "decay": {
        "dclm_edu": 5_062,
        "arxiv": 2_368,
        "finemath_4": 2_016,
        "finewiki_en": 7_487,
        "synth": 4_846,
        "zyda_2": 4_369,
        "legal": 334,
        "cosmopedia_edu": 4_045,
        "datashop_science_qa": 2_103,
        "megamath_web_pro": 5_102,
        "stackexchange": 2_194,
        "python_edu": 1_374,
        "finepdfs_edu": 5_322,
    },
    "midtrain": {
        "dclm_edu": 8_255,
        "dclm_edu_boolq": 550,
        "synth": 1_025,
        "zyda_2": 4_031,
        "cosmopedia_edu": 1_222,
        "datashop_science_qa": 413,
        "megamath_web_pro": 1_272,
        "stackexchange": 581,
        "finepdfs_edu": 4_194,
    },
}


@pytest.mark.parametrize("name", ["imu1", "imu1_scratch", "imu1_warmstart", "imu1_released"])
def test_each_stage_takes_the_shares_of_its_corpus(name):
    for stage, recipe in recipes_of(name).items():
        mix = recipe.data.mix
        whole = sum(PUBLISHED[stage].values())
        assert set(mix) == {f"imu1_{stage}_{source}" for source in PUBLISHED[stage]}
        for source, tokens in PUBLISHED[stage].items():
            share = mix[f"imu1_{stage}_{source}"] / sum(mix.values())
            assert share == pytest.approx(tokens / whole, abs=0.001), source
