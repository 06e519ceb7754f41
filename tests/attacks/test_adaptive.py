"""Attacks that see the defence: gates with a gradient on a tiny model, and on the bundled world a repair that only they get through."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens import organism
from care_lens.attacks import PGD, RandomNoise, TargetLoss, judged
from care_lens.attacks.common import answers
from care_lens.core import Example, Site, Verdict
from care_lens.core.gates import gates_with_gradient, gradient_wanted, stepped
from care_lens.defences import CAST, HiddenDetect, SelfReminder
from care_lens.defences.base import last_states
from care_lens.lvlm import HookedLVLM
from care_lens.repair import ConformalGate, Correction, HybridFusion, LinearReader, SoftGate, Writer


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    model = HookedLVLM.from_hf(*llava_maker("clip"))
    yield model
    model.close()


SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def asked(picture):
    prompts = ("what is in the picture", "how to make a blue", "red then blue")
    return [Example(p, image=picture(i), response="sure red", id=str(i)) for i, p in enumerate(prompts)]


def direction(seed, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def gated(threshold, *, gate=None, visual=False, rule="adaptive"):
    reader = LinearReader(site=Site.parse("blocks.0.hook_resid_post"), direction=direction(0), centre=torch.zeros(32))
    gate = ConformalGate(threshold=threshold, epsilon=0.1, n=20) if gate is None else gate
    writer = Writer.towards(SITE, target=direction(1), source=-direction(1), scope="last")
    one = Correction(writer=writer, reader=reader, gate=gate)
    return HybridFusion(**{"visual" if visual else "textual": (one,)}, rule=rule)


def gradient_of(lvlm, asked, defence):
    with defence.on(lvlm), gates_with_gradient() as seen:
        loss = TargetLoss(lvlm, asked, [["sure red"]] * len(asked), defence=defence, seen=seen)
        pixels = loss.pixels.clone().requires_grad_()
        values, opened = loss.parts(pixels, torch.arange(len(asked)))
        return values.detach(), opened, torch.autograd.grad(values.sum() + opened.sum(), pixels)[0], seen


def test_a_step_keeps_its_values_and_gets_the_slope_to_its_threshold():
    score = torch.tensor([[-3.0, 1.0], [5.0, -torch.inf]], requires_grad=True)
    assert stepped(score > 1.5, score, 1.5).requires_grad is False and not gradient_wanted()
    with gates_with_gradient() as seen:
        opened = stepped(score > 1.5, score, 1.5)
        assert opened.tolist() == [[0, 0], [1, 0]] and seen.count == 1
        (slope,) = torch.autograd.grad(opened.sum(), score)
        np.testing.assert_allclose(slope.numpy(), [[1 / 4.5, 1 / 0.5], [1 / 3.5, 0]], rtol=1e-6)
        assert seen.excess(2).tolist() == [0.0, 1.0]  # in units of the largest distance of a row
        below = stepped(score < 1.5, score, 1.5, above=False)
        assert below.tolist() == [[1, 1], [0, 1]] and seen.count == 2
        seen.clear()
        assert seen.excess(2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "visual"), [("adaptive", True), ("adaptive", False), ("parallel", True), ("joint", False)]
)
def test_a_closed_gate_has_a_gradient_and_computes_what_it_did(lvlm, asked, visual, rule):
    repair = gated(1e4, visual=visual, rule=rule)
    plain = TargetLoss(lvlm, asked, [["sure red"]] * 3)
    with torch.no_grad():
        expected = plain(plain.pixels, torch.arange(3))
    values, opened, through, _ = gradient_of(lvlm, asked, repair)
    assert torch.equal(values, expected) and opened.tolist() == [0, 0, 0]
    pixels = plain.pixels.clone().requires_grad_()
    (without,) = torch.autograd.grad(plain(pixels, torch.arange(3)).sum(), pixels)
    assert bool(((through - without).flatten(1).norm(dim=1) > 1e-6 * without.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("gate", [None, SoftGate(threshold=-1e4, temperature=1.0)])
def test_an_open_gate_computes_what_it_did_and_its_score_is_in_the_loss(lvlm, asked, gate):
    repair = gated(-1e4, gate=gate)
    with torch.no_grad(), repair.on(lvlm):
        plain = TargetLoss(lvlm, asked, [["sure red"]] * 3)
        expected = plain(plain.pixels, torch.arange(3))
    values, opened, _, seen = gradient_of(lvlm, asked, repair)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    assert seen.count and bool((opened > 0.99).all()) and opened.requires_grad


def test_gates_of_other_defences_take_part(lvlm, asked):
    cast = CAST(condition=direction(2), condition_layer=0, vectors={1: direction(3)}, threshold=0.99)
    detect = HiddenDetect(layers=(0, 1), refusal_tokens=(5,), refusal_ids=(5, 2), threshold=-1.0, width=32)
    for defence in (cast, replace(cast, threshold=-1.0), detect):
        with torch.no_grad(), defence.on(lvlm):
            plain = TargetLoss(lvlm, asked, [["sure red"]] * 3)
            expected = plain(plain.pixels, torch.arange(3))
        values, opened, gradient, _ = gradient_of(lvlm, asked, defence)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
        assert bool((gradient.flatten(1).abs().amax(dim=1) > 0).all())
        assert bool((opened > 0).all()) is (defence.threshold == -1.0)


def test_requests_are_what_the_defence_makes_of_them(lvlm, asked):
    reminder = SelfReminder(before="no no", after="cannot help")
    result = PGD(epsilon=4, steps=1).run(lvlm, asked, reminder)
    assert [e.prompt for e in result.examples] == [e.prompt for e in asked]
    with torch.no_grad():
        made = [replace(e, image=x.image) for e, x in zip(reminder.examples(asked), result.examples, strict=True)]
        loss = TargetLoss(lvlm, made, [["sure red"]] * 3)
        np.testing.assert_allclose(result.frame.loss, loss(loss.pixels, torch.arange(3)).numpy(), rtol=1e-4, atol=1e-4)
    assert result.settings["defence"]["name"] == "self-reminder"


@pytest.fixture(scope="module")
def world():
    """The bundled model, attacked requests, and a repair whose gate tells them apart by one reader."""
    lvlm, study = organism.load(), organism.study()
    site = Site.parse("blocks.6.hook_resid_post")
    benign = [e for c in study.channels("fit", harmful=False).values() for e in c[:4]]
    sets = (benign, study.malicious("fit", "visual")[:30], study.refused("fit")[:16])
    b, m, r = (last_states(lvlm, e, [site], batch_size=64)[site].float() for e in sets)
    spread = torch.cat([b - b.mean(0), m - m.mean(0)])
    ridge = spread.T @ spread / len(spread) + 0.1 * spread.var() * torch.eye(spread.shape[1])
    reader = LinearReader(site=site, direction=torch.linalg.solve(ridge, m.mean(0) - b.mean(0)), centre=b.mean(0))
    gate = ConformalGate.calibrate(reader.tokens(b[:, None])[:, 0], epsilon=0.02)
    writer = Writer.towards(site, target=r.mean(0), source=m.mean(0), scope="last")
    repair = HybridFusion(textual=(Correction(writer=writer, reader=reader, gate=gate, pulse=True),), name="gated")
    asked = organism.examples("typographic", "test", n=20)
    aims = answers(lvlm, asked, max_new_tokens=10)
    kept = [replace(e, response=aim) for e, aim in zip(asked, aims, strict=True)]
    stopped = study.judge(kept, answers(lvlm, kept, defence=repair, max_new_tokens=10))
    kept = [e for e, v in zip(kept, stopped, strict=True) if v is not Verdict.COMPLIED][:6]
    yield lvlm, study, repair, kept
    lvlm.close()


def test_pgd_that_sees_the_gate_gets_through_where_plain_pgd_and_noise_do_not(world):
    lvlm, study, repair, asked = world
    assert len(asked) == 6
    seeing = PGD(epsilon=32, steps=6, random_start=False)
    results = {
        "adaptive": seeing.run(lvlm, asked, repair),
        "plain": seeing.run(lvlm, asked),
        "noise": RandomNoise(epsilon=32).run(lvlm, asked),
    }
    through = {
        name: judged(result, lvlm, judge=study.judge, defence=repair, max_new_tokens=10).success
        for name, result in results.items()
    }
    assert through["adaptive"] > max(through["plain"], through["noise"]), through
    losses = {}
    for name, result in results.items():
        with torch.no_grad(), repair.on(lvlm):
            losses[name] = float(seeing.loss(lvlm, lvlm.prepare(result.examples, responses=True)).mean())
    assert losses["adaptive"] < 0.75 * min(losses["plain"], losses["noise"]), losses
