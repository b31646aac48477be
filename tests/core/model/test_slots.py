"""What a new kind of idea needs of the model: each slot with a part made here, as a user would make one.

Every part below does something that shows; in each slot it gets what the table of slots says, decoding a few tokens at
a time gives the logits of one forward, and without it nothing is built.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.nn import functional as F

from ablab.core.language.declare import Param, Stage, Table, linear, params
from ablab.core.language.part import Part
from ablab.core.model.cost import cost_of
from ablab.core.model.init import initialise
from ablab.core.model.objective import heads_of, of_rows, token_losses
from ablab.core.model.plan import plan_of
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.edit import append, edit, put
from ablab.core.recipe.recipe import check, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")


def named(kind: str):
    """The kind of a part that is registered nowhere, so that no other test meets it."""
    return field(default=kind, init=False)


# ---- parts, one for each slot ----


@dataclass(frozen=True)
class Smear(Part):
    """x_t <- x_t + g x_{t-1}; x_{-1} = 0."""

    kind: str = named("smear")

    def build(self, where):
        return Stage(smear, strength=Param((1,), "vector", fill=0.3))


def smear(x, tokens, carry, *, strength):
    assert x.shape[:2] == tokens.shape and not tokens.is_floating_point()
    nothing = torch.zeros_like(x[:, :1])
    before = carry.get("past/smear", nothing)
    shifted = torch.cat((before, x[:, :-1]), dim=1)
    carry = {**carry, "past/smear": x[:, -1:]}
    return x + strength.to(x.dtype) * shifted, carry


@dataclass(frozen=True)
class TokenValues(Part):
    """A second table, kept for the blocks."""

    kind: str = named("token_values")

    def build(self, where):
        return Stage(remember_rows, table=Param((where.vocab, where.width), "embedding"))


def remember_rows(x, tokens, carry, *, table):
    rows = F.embedding(tokens, table).to(x.dtype)
    return x, {**carry, "rows": rows}


@dataclass(frozen=True)
class AddRows(Part):
    """Before each block but the first: x <- x + lambda_l rows."""

    kind: str = named("add_rows")

    def build(self, where):
        if where.layer == 0:
            return None
        return Stage(add_rows, strength=Param((1,), "vector", fill=0.5))


def add_rows(x, carry, *, strength):
    return x + strength.to(x.dtype) * carry["rows"], carry


@dataclass(frozen=True)
class Skips(Part):
    """A U: the first layers leave what they read, the last ones take it in reverse order."""

    kind: str = named("skips")

    def build(self, where):
        partner = where.layers - 1 - where.layer
        if where.layer < partner:
            return Stage(leave, name=f"skip{where.layer}")
        if where.layer > partner:
            return Stage(take, name=f"skip{partner}")
        return None


def leave(x, carry, *, name):
    return x, {**carry, name: x}


def take(x, carry, *, name):
    return x + carry[name], carry


@dataclass(frozen=True)
class Parallel(Part):
    """Both branches read the same x."""

    kind: str = named("parallel")

    def build(self, where):
        return Stage(parallel)


def parallel(x, carry, attention, ffn):
    y, carry = attention(x, carry)
    return x + y + ffn(x), carry


@dataclass(frozen=True)
class Sandwich(Part):
    """A gain on each branch's output, declared in the block."""

    kind: str = named("sandwich")

    def build(self, where):
        gains = {
            name: Param((where.width,), "vector", fill=0.7)
            for name in ("after_mix", "after_ffn")
        }
        return Stage(sandwich, **gains)


def sandwich(x, carry, attention, ffn, *, after_mix, after_ffn):
    y, carry = attention(x, carry)
    x = x + y * after_mix.to(x.dtype)
    return x + ffn(x) * after_ffn.to(x.dtype), carry


@dataclass(frozen=True)
class Window(Part):
    """Each query sees the last `size` keys."""

    size: int = 3
    kind: str = named("window")

    def build(self, where):
        return Stage(windowed, grouped=where.heads != where.kv_heads, size=self.size)


def windowed(q, k, v, carry, start, *, grouped, size):
    assert k.shape[2] == v.shape[2] == start + q.shape[2]
    at = torch.arange(start, start + q.shape[2])[:, None]
    key = torch.arange(k.shape[2])[None]
    visible = (key <= at) & (key > at - size)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


@dataclass(frozen=True)
class HalfRope(Part):
    """The first half of the channels turns; the rest has no position."""

    kind: str = named("half_rope")

    def build(self, where):
        turned = where.head_dim // 2
        slowness = 10.0 ** torch.arange(turned // 2)
        angles = torch.arange(where.context)[:, None] / slowness
        return Stage(
            half_rope,
            cos=Table(lambda: angles.cos()),
            sin=Table(lambda: angles.sin()),
            turned=turned,
        )


def half_rope(q, k, start, *, cos, sin, turned):
    def turn(x):
        span = slice(start, start + x.shape[1])
        c = cos[span, None].to(x.dtype)
        s = sin[span, None].to(x.dtype)
        a, b = x[..., :turned].chunk(2, dim=-1)
        first, second = a * c - b * s, b * c + a * s
        return torch.cat((first, second, x[..., turned:]), dim=-1)

    return turn(q), turn(k)


@dataclass(frozen=True)
class Backout(Part):
    """The readout reads x - lambda rows."""

    kind: str = named("backout")

    def build(self, where):
        return Stage(backout, strength=Param((1,), "vector", fill=0.4))


def backout(x, carry, *, strength):
    return x - strength.to(x.dtype) * carry["rows"]


@dataclass(frozen=True)
class NextButOne(Part):
    """weight * cross-entropy of the token after the next, from the features through one more matrix."""

    weight: float = 0.5
    kind: str = named("next_but_one")

    def build(self, where):
        return Stage(next_but_one, project=linear(where.width, where.width), weight=self.weight)


def next_but_one(features, logits, targets, read, *, project, weight):
    assert logits.shape[:2] == features.shape[:2] == targets.shape
    ahead = read(project(features[:, :-1]))
    return weight * token_losses(ahead, targets[:, 1:]).sum()


# slot -> parts that stand there, and what they need elsewhere
TENANTS = {
    "smear": {"model.on_embedding": (Smear(),)},
    "two tables": {"model.on_embedding": (TokenValues(),), "model.on_block": (AddRows(),)},
    "skips": {"model.on_block": (Skips(),)},
    "parallel": {"model.block": Parallel()},
    "sandwich": {"model.block": Sandwich()},
    "window": {"model.attention.mix": Window()},
    "half rope": {"model.attention.position": HalfRope()},
    "backout": {"model.on_embedding": (TokenValues(),), "model.on_features": (Backout(),)},
    "next but one": {"objective": (NextButOne(),)},
    "all": {
        "model.on_embedding": (Smear(), TokenValues()),
        "model.on_block": (AddRows(), Skips()),
        "model.block": Sandwich(),
        "model.attention.mix": Window(5),
        "model.on_features": (Backout(),),
        "objective": (NextButOne(),),
    },
}
every_tenant = pytest.mark.parametrize("tenants", TENANTS)


@pytest.fixture
def having(tiny):
    """(name in TENANTS, base paths) -> the tiny recipe with those parts in it."""

    def of(tenants, treatment=(), **paths):
        recipe = tiny(treatment, **paths)
        for slot, held in TENANTS[tenants].items():
            change = append(*held) if isinstance(held, tuple) else put(held)
            recipe = edit(recipe, slot, change)
        return check(recipe)

    return of


def descended(model, block):
    """What a step descends on rows of tokens, int [B,T+1]: nats, 0-D."""
    descend, _ = heads_of(model)
    loss, _ = of_rows(model, descend)(block)
    return loss


def all_have_a_gradient(model) -> bool:
    return all(value.grad.abs().max() > 0 for value in model.parameters())


def logits_in_pieces(model, tokens, sizes):
    pieces, cache = [], None
    for piece in tokens.split(sizes, dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


# ---- the promises of every slot ----


@every_tenant
@pytest.mark.parametrize("group", [1, 2])
def test_decoding_a_few_tokens_at_a_time_equals_one_forward(
    having, build, batch, tenants, group
):
    recipe = having(tenants, ["value_residual", "gating"], model__attention__group=group)
    model, tokens = build(recipe, stirred=0.1), batch(recipe)[:, :-1]
    with torch.no_grad():
        whole = model(tokens)
        for sizes in ([5, 1, 1, 3, 6], [1] * 16):
            assert (logits_in_pieces(model, tokens, sizes) - whole).abs().max() < 1e-5


@every_tenant
def test_it_changes_what_is_descended_and_the_run_has_another_name(
    having, tiny, build, batch, tenants
):
    plain, recipe = tiny(), having(tenants)
    assert run_id(recipe) != run_id(plain)
    losses = []
    for one in (plain, recipe):
        losses.append(descended(build(one), batch(one)).item())
    assert abs(losses[0] - losses[1]) > 1e-4


@every_tenant
def test_the_plan_names_the_very_parameters_that_are_built_and_all_of_them_learn(
    having, build, batch, tenants
):
    recipe = having(tenants)
    model = build(recipe, stirred=0.05)
    planned = {name: one.shape for name, one in params(plan_of(recipe))}
    assert planned == {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert cost_of(recipe).parameters == sum(one.numel() for one in model.parameters())
    descended(model, batch(recipe)).backward()
    assert all_have_a_gradient(model)


@every_tenant
def test_it_compiles_without_a_graph_break_to_the_same_loss(having, build, batch, tenants):
    recipe = having(tenants, model__layers=2)
    model, block = build(recipe, stirred=0.05), batch(recipe)
    descend = of_rows(model, heads_of(model)[0])
    torch._dynamo.reset()
    compiled = torch.compile(descend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(block)[0], descend(block)[0])


@every_tenant
def test_recomputed_blocks_give_the_same_gradients(having, build, batch, tenants):
    recipe = having(tenants)
    kept, again = (build(recipe, stirred=0.05, recompute=blocks) for blocks in (0, 3))
    for model in (kept, again):
        descended(model, batch(recipe)).backward()
    for one, other in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@every_tenant
def test_a_run_trains_and_evaluates(having, token_folder, tenants):
    trainer = Trainer(having(tenants), CPU, token_folder)
    before = trainer.digest()
    for _ in range(2):
        assert trainer.advance().isfinite()
    assert trainer.digest() != before
    assert 3 < trainer.evaluate()["val/loss"] < 6


def test_nothing_is_built_for_an_empty_slot(tiny, build):
    plan, model = plan_of(tiny()), build(tiny())
    assert plan.on_embedding == plan.on_features == plan.objective == {}
    assert all(block.on_block == {} for block in plan.blocks)
    empty = [model.on_embedding, model.on_features, model.objective]
    empty += [block.on_block for block in model.blocks]
    assert all(len(list(one.modules())) == 1 for one in empty)


def test_defaults_own_no_parameter(tiny, build):
    for block in build(tiny()).blocks:
        assert not list(block.block.parameters())
        assert not list(block.attention.mix.parameters())


# ---- each slot's own promise ----


def test_the_block_of_layer_3_may_differ_from_that_of_layer_0(having):
    kinds = [list(block.on_block) for block in plan_of(having("two tables")).blocks]
    assert kinds == [[], ["add_rows"], ["add_rows"]]


def test_a_block_gets_the_branches_with_their_own_norms(having, build, batch):
    recipe = having("parallel")
    model = build(recipe, stirred=0.1)
    x = model.embed(batch(recipe)[:, :-1])
    block = model.blocks[0]
    expected = x + block.attention(x, {})[0] + block.ffn(x)
    assert torch.equal(block(x, {})[0], expected)


def test_a_window_as_long_as_the_context_is_causal_attention(tiny, build, batch):
    wide = check(edit(tiny(), "model.attention.mix", put(Window(16))))
    plain, windowed = build(tiny(), stirred=0.1), build(wide, stirred=0.1)
    tokens = batch(wide)[:, :-1]
    assert (plain(tokens) - windowed(tokens)).abs().max() < 1e-5


def test_a_window_hides_what_is_further_back(tiny, build, batch):
    """One layer, three keys: the last logits do not move with the first 13 tokens."""
    one = edit(tiny(model__layers=1), "model.attention.mix", put(Window(3)))
    model, tokens = build(one, stirred=0.1), batch(one)[:, :-1]
    changed = tokens.clone()
    changed[:, :13] = (changed[:, :13] + 1) % 64
    moved = (model(changed) - model(tokens)).abs()
    assert (moved[:, -1] == 0).all()
    assert moved[:, -2].max() > 0


def test_only_entries_of_the_past_are_kept_in_the_cache(having, build, batch):
    recipe = having("all")
    tokens = batch(recipe)[:, :-1]
    _, cache = build(recipe).extend(tokens, None)
    assert list(cache.carry) == ["past/smear"]
    assert cache.carry["past/smear"].shape == (4, 1, 32)


def test_the_objective_descends_its_sum_and_reports_cross_entropy_alone(
    having, tiny, build, batch
):
    plain, with_more = build(tiny()), build(having("next but one"))
    block = batch(tiny())
    _, reported = of_rows(plain, heads_of(plain)[0])(block)
    loss, same = of_rows(with_more, heads_of(with_more)[0])(block)
    assert torch.equal(reported, same)
    features = with_more.features(block[:, :-1]).double()
    project = with_more.objective["next_but_one"].project.weight.double()
    readout = with_more.readout.weight.double()
    logits = features[:, :-1] @ project.T @ readout.T
    expected = 0.5 * F.cross_entropy(
        logits.flatten(0, 1), block[:, 2:].flatten(), reduction="sum"
    )
    assert abs((loss - reported).item() / expected.item() - 1) < 1e-4


def test_parameters_of_the_objective_move_and_evaluation_never_runs_them(
    having, token_folder, monkeypatch
):
    trainer = Trainer(having("next but one"), CPU, token_folder)
    name = "objective.next_but_one.project.weight"
    weight = dict(trainer.model.named_parameters())[name]
    assert name in [one for bank in trainer.optimizer.banks for one in bank.names]
    before = weight.clone()
    trainer.advance()
    assert not torch.equal(weight, before)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model.objective["next_but_one"], "function", pytest.fail)
        trainer.evaluate()


# ---- names ----

TORCHS_OWN = ("half", "update", "pop", "type", "forward", "function", "training", "values")


@dataclass(frozen=True)
class Awkward(Part):
    """A part, and a bound value, that are called like an attribute of torch's modules."""

    kind: str = named("none")
    word: str = "none"

    def build(self, where):
        gain = Param((1,), "vector", fill=0.5)
        bound = {self.word: gain, f"{self.word}2": linear(8, 8)}
        return Stage(scaled, **bound)


def scaled(y, x, **bound):
    gain, project = bound.values()
    return y * gain + project(y)


@pytest.mark.parametrize("word", TORCHS_OWN)
def test_a_name_of_torchs_own_is_harmless(tiny, build, batch, word):
    part = Awkward(word=word)
    object.__setattr__(part, "kind", word)
    recipe = check(edit(tiny(), "model.attention.on_heads", append(part)))
    model, block = build(recipe, stirred=0.05), batch(recipe)
    names = [name for name, _ in params(plan_of(recipe))]
    assert f"blocks.1.attention.on_heads.{word}.{word}" in names
    assert sorted(names) == sorted(dict(model.named_parameters()))
    descend = of_rows(model, heads_of(model)[0])
    descend(block)[0].backward()
    assert all_have_a_gradient(model)
    torch._dynamo.reset()
    compiled = torch.compile(descend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(block)[0], descend(block)[0])
    again = Transformer(recipe)
    initialise(again, replace(recipe, seed=5))
    again.load_state_dict(model.state_dict())
    tokens = block[:, :-1]
    assert torch.equal(again(tokens), model(tokens))
