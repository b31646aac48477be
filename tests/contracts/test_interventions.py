"""The contract of one intervention: what it touches, that it works, and that it works everywhere.

Each test runs for every registered intervention at its default dose; most run again for every other word that a
Literal field of the dose allows.  Requirements are added, and the reference is the requirements alone.
"""

import dataclasses
import math
from typing import get_args

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.language.declare import params
from ablab.core.language.parse import fields_of, parse
from ablab.core.language.written import dump
from ablab.core.model.layers import StageModules
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.plan import plan_for, plan_of
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import REGISTRY, at
from ablab.core.recipe.load import read_yaml
from ablab.core.recipe.recipe import Recipe, plain, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.banks import Optimizer
from ablab.core.train.probe import Probe, place_of
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
BASES = {"plain": {}, "gqa": {"model__attention__group": 2}, "tied": {"model__tied": True}}


def words(hint) -> list:
    return [
        word
        for option in get_args(hint)
        for word in ((option,) if isinstance(option, str) else words(option))
    ]


def variants():
    """(name, dose): the default, and every word that a Literal field allows besides its default."""
    for name, cls in sorted(REGISTRY.items()):
        yield name, {}
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for field, hint in fields_of(cls).items():
            yield from (
                (name, {field: word}) for word in words(hint) if word != defaults[field]
            )


def spelt(variant) -> str:
    name, dose = variant
    return name + "".join(f"-{field}={word}" for field, word in dose.items())


ALREADY = {("tied_head", "tied")}  # an intervention, and a base that it leaves as it is
every_intervention = pytest.mark.parametrize("name", sorted(REGISTRY))
every_variant = pytest.mark.parametrize("variant", list(variants()), ids=spelt)
every_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture
def arms(tiny, needs):
    """(name, dose), base paths -> the reference recipe, and the same with the intervention."""

    def of(variant, **base) -> tuple[Recipe, Recipe]:
        name, dose = variant
        return tiny(needs(name), **base), tiny([*needs(name), {name: dose}], **base)

    return of


@pytest.fixture
def arms_on(arms):
    """The same on one of the bases.

    A default dose stands on all; another word may refuse one that would make it a no-op.
    """

    def of(variant, base: str) -> tuple[Recipe, Recipe]:
        if (variant[0], base) in ALREADY:
            pytest.skip("the base has it already")
        try:
            return arms(variant, **BASES[base])
        except UserError as refusal:
            assert variant[1] and base != "plain" and "\n" not in str(refusal)
            pytest.skip(f"refused: {refusal}")

    return of


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bits: -0 is not 0."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


# ---- what it says and what it touches ----


@every_intervention
def test_says_what_it_does_whence_it_comes_and_what_off_means(name):
    about = REGISTRY[name].about
    assert about.name == name and about.slots
    for said in (about.summary, about.off, about.source):
        assert len(said.split()) > 1 and "\n" not in said and said != "no description"
    assert all(other in REGISTRY for other in about.requires + about.excludes)
    assert name not in about.requires + about.excludes


@every_variant
def test_changes_only_the_slots_that_it_claims_and_at_least_one(arms, variant):
    off, on = arms(variant)
    assert on != off
    restored = on
    for slot in on_slots(variant):
        restored = edit(restored, slot, put(at(off, slot)))
    assert restored == off


@every_intervention
def test_claims_no_slot_that_it_never_changes(arms, name):
    doses = [arms(variant) for variant in variants() if variant[0] == name]
    idle = [
        slot
        for slot in on_slots((name, {}))
        if all(at(on, slot) == at(off, slot) for off, on in doses)
    ]
    assert not idle


def on_slots(variant) -> tuple[str, ...]:
    return REGISTRY[variant[0]].about.slots


@every_variant
def test_is_alive(arms, shows, variant):
    off, on = arms(variant)
    assert shows(on) != shows(off), (
        f"INERT: {spelt(variant)} computes the same bits as without it"
    )


@every_variant
def test_is_alive_on_the_path_that_kernels_serve(arms, shows_by_kernels, variant):
    pytest.importorskip("triton")  # there is none for macOS
    off, on = arms(variant, model__width=64, model__attention__head_dim=32)
    assert shows_by_kernels(on) != shows_by_kernels(off), (
        f"INERT: {spelt(variant)} is dropped by a kernel"
    )


@every_intervention
def test_a_look_into_its_layers_tells_its_own_gates_mixes_and_gains(arms, build, batch, name):
    """By what its stages declare: the parameters of small roles that it adds, each as a number of fp64."""
    off, on = arms((name, {}))
    model = build(on, stirred=0.1)
    rows = batch(on)
    found = Probe(model, on).look(rows, torch.ones(on.data.vocab))
    assert all(map(math.isfinite, found.values()))
    shared = {path for path, _ in params(plan_of(off))}
    for path, value in model.named_parameters():
        if path not in shared and value.declared.role in ("vector", "gate"):
            place, quantity = place_of(path)
            exact = value.detach().double()
            expected = exact.mean() if value.dim() < 2 else exact.square().mean().sqrt()
            told = found[f"layer/{quantity}/{place}"]
            assert told == pytest.approx(expected.item(), rel=1e-5, abs=1e-8), path


# ---- a fair pair with its reference ----


@every_variant
def test_shared_parameters_start_alike_and_batches_are_the_same(
    arms, build, token_folder, variant
):
    """A claim on the parametrization allows another scale for the same draws; one on data.shape, steps of other sizes.

    Draws beyond a cut may be others, and so may windows drawn anew.  Nothing else: the tokens are the same, and come
    in the same order.
    """
    off, on = arms(variant)
    assert on.budget == off.budget
    theirs, ours = (dict(build(recipe).named_parameters()) for recipe in (off, on))
    shared = [
        name
        for name, value in ours.items()
        if name in theirs and theirs[name].shape == value.shape
    ]
    assert len(shared) > len(theirs) / 2
    for name in shared:
        if on.parametrization == off.parametrization:
            assert alike(ours[name], theirs[name]), name
        else:
            within = inside_the_cut(on, off, name, theirs[name])
            one, other = ours[name][within], theirs[name][within]
            scale = one.norm() / other.norm()
            torch.testing.assert_close(one, other * scale, rtol=1e-5, atol=0, msg=name)
    if on.data.shape == off.data.shape:
        assert on.steps == off.steps
    if on.data.replacement != off.data.replacement:
        return
    ours, theirs = tokens_in_order(on, token_folder), tokens_in_order(off, token_folder)
    common = min(len(ours), len(theirs))
    assert torch.equal(ours[:common], theirs[:common])
    assert on.budget.tokens - common < on.tokens_per_step


def inside_the_cut(on, off, name, drawn) -> torch.Tensor:
    """Which weights the one parametrization draws where the other lets it."""
    declared = dict(params(plan_of(on)))[name]
    cut = on.parametrization.scales(name, declared, on.model, "adam").cut
    std = off.parametrization.scales(name, declared, off.model, "adam").std
    cuts = cut and declared.fill is None
    return drawn.abs() <= (cut * std if cuts else math.inf)


def tokens_in_order(recipe, folder) -> torch.Tensor:
    """Of all steps of a run, as they are read, [tokens]."""
    tokens, batches = Tokens(recipe, folder), recipe.batches
    blocks = [tokens.rows(step, 0, batches.at(step).windows) for step in range(recipe.steps)]
    return torch.cat([block[:, :-1].flatten() for block in blocks])


@every_intervention
def test_is_neutral_at_init_exactly_when_it_says_so(arms, build, batch, name):
    off, on = arms((name, {}))
    tokens = batch(off)[:, :-1]
    assert alike(build(on)(tokens), build(off)(tokens)) == REGISTRY[name].about.neutral_at_init


# ---- one identity ----


@every_variant
def test_survives_a_round_trip_through_yaml(arms, tmp_path, variant):
    _, on = arms(variant)
    (tmp_path / "recipe.yaml").write_text(dump(plain(on)))
    again = parse(Recipe, read_yaml(tmp_path / "recipe.yaml"), "")
    assert again == on and run_id(again) == run_id(on)


# ---- the machine's promises hold ----


@every_variant
def test_compiles_without_a_graph_break(arms, build, batch, variant):
    """The eager backend: dynamo's whole work, no code generation.  Only what differs from the reference is compiled.

    Grouped heads, because then q, k and v are blocks of unequal rows, which take another path through Muon; a first
    layer and a later one.
    """
    off, on = arms(variant, model__layers=2, **BASES["gqa"])
    block = batch(on)
    if (on.model, on.parametrization, on.objective) != (
        off.model,
        off.parametrization,
        off.objective,
    ):
        expected, found = (
            loss_and_gradients(on, build, block),
            loss_and_gradients(on, build, block, backend="eager"),
        )
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    if (on.optim, on.parametrization) != (off.optim, off.parametrization):
        counter = CompileCounter()
        assert moved(
            on,
            build,
            block,
            lambda move: torch.compile(move, fullgraph=True, dynamic=False, backend=counter),
        ) == moved(on, build, block)
        assert counter.frame_count == 1, "compiled again at a later step"


def loss_and_gradients(recipe, build, block, backend=None) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    model = build(recipe, stirred=0.05)
    descend = of_rows(model, heads_of(model)[0])
    if backend:
        descend = torch.compile(descend, fullgraph=True, backend=backend)
    loss, _ = descend(block)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


@every_variant
def test_computes_the_same_whatever_was_built_before(arms, build, batch, variant):
    """Warm workers train arms in any order: what counts the arms before it would make a run depend on them."""
    off, on = arms(variant)
    block = batch(on)
    first = loss_and_gradients(on, build, block)
    plan_for.cache_clear()
    loss_and_gradients(off, build, block)
    again = loss_and_gradients(on, build, block)
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(again[name], value), name


def moved(recipe, build, block, compiled=lambda move: move) -> dict[str, list[float]]:
    """Rounded weights after steps 1, 2 and 9 of the optimizer, gradients drawn anew.

    Every role, and the matrices of one attention.
    """
    torch._dynamo.reset()
    whole = build(recipe)
    model = torch.nn.ModuleList([whole.embedding, whole.readout, whole.blocks[1].attention])
    optimizer = Optimizer(model, recipe)
    optimizer.launch = compiled(optimizer.launch.__call__)
    draw = torch.Generator().manual_seed(0)
    for t in (1, 2, 9):
        for bank in optimizer.banks:
            bank.grad.normal_(generator=draw)
        optimizer.step(t)
    return {
        name: value.detach().mul(1e5).round().tolist()
        for name, value in model.named_parameters()
    }


@every_variant
def test_a_resumed_run_ends_with_the_same_bits(arms, token_folder, tmp_path, variant):
    _, on = arms(variant)
    whole = Trainer(on, CPU, token_folder)
    while whole.step < on.steps:
        if whole.step == on.steps // 2:
            whole.save(tmp_path)
            whole.saver.wait()
        whole.advance()
    resumed = Trainer(on, CPU, token_folder)
    resumed.restore(tmp_path, pytest.fail)
    assert resumed.step == on.steps // 2 and resumed.digest() != whole.digest()
    while resumed.step < on.steps:
        resumed.advance()
    assert resumed.digest() == whole.digest()
    ours, theirs = resumed.tensors(), whole.tensors()
    assert (
        ours.keys() == theirs.keys()
        and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    )
    assert resumed.evaluate() == whole.evaluate()


@every_base
@every_variant
def test_works_with_grouped_heads_and_with_a_tied_readout(
    arms_on, shows, build, batch, variant, base
):
    off, on = arms_on(variant, base)
    assert shows(on) != shows(off)
    assert build(on, stirred=0.05)(batch(on)[:, :-1]).isfinite().all()


@every_base
@every_variant
def test_decoding_a_few_tokens_at_a_time_equals_one_forward(
    arms_on, build, batch, variant, base
):
    _, on = arms_on(variant, base)
    model, tokens = build(on, stirred=0.1), batch(on)[:, :-1]
    pieces, cache = [], None
    with torch.no_grad():
        for piece in tokens.split([5, 1, 1, 9], dim=1):
            logits, cache = model.extend(piece, cache)
            pieces.append(logits)
        torch.testing.assert_close(
            torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-5
        )


@every_variant
def test_activations_stay_bfloat16(arms, build, batch, variant):
    """One fp32 scale without a cast would promote the residual stream, and double its memory, in silence."""
    _, on = arms(variant)
    model, wide = build(on, torch.bfloat16), []

    def look(name):
        def hook(module, inputs, output):
            values = output if isinstance(output, tuple) else (output,)
            values = [
                v
                for value in values
                for v in (value.values() if isinstance(value, dict) else (value,))
            ]
            floating = [value for value in values if value.is_floating_point()]
            wide.extend(name for value in floating if value.dtype != torch.bfloat16)

        return hook

    for name, module in model.named_modules():
        if name != "embedding" and not isinstance(module, torch.nn.ModuleList | StageModules):
            module.register_forward_hook(look(name or "logits"))
    logits = model(batch(on)[:, :-1])
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and not wide
    logits.float().square().mean().backward()
    assert all(
        value.grad is None or value.grad.isfinite().all() for value in model.parameters()
    )
