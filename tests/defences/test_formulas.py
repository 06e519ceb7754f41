"""Each baseline against its formula by hand, on small tensors."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from concept_erasure import LeaceFitter
from sklearn.linear_model import LogisticRegression

from care_lens.core import Site
from care_lens.defences import (
    ASTRA,
    CAA,
    CAST,
    LEACE,
    ActAdd,
    AlphaSteer,
    CARESubspace,
    CoCA,
    FitError,
    HiddenDetect,
    MeanAblation,
    MeanDifference,
    NoRefusalDirectionError,
    NoSafetyLayersError,
    PublishedCARE,
    RefusalDirection,
    SafeSteer,
    ShiftDC,
    WrongModelError,
    random_directions,
)
from care_lens.defences.alphasteer import null_projector, null_steering
from care_lens.defences.astra import blackened, decisive_patches, target_outcomes
from care_lens.defences.cast import best_threshold, condition_score
from care_lens.defences.leace import eraser
from care_lens.defences.refusal_direction import _filtered
from care_lens.defences.safesteer import steering_direction
from care_lens.repair import Correction, HybridFusion, RepairError, Writer, explain, read_scores

RESID = "blocks.1.hook_resid_post"


def rows_of(lvlm, examples, site=RESID, span="last"):
    """[n, d] mean over a span of each example by itself, in float64."""
    rows = []
    for example in examples:
        inputs = lvlm.prepare(example, responses=span == "response")
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=[site])
        rows.append(cache[site][0][inputs.spans.mask(span)[0]].double().mean(0))
    return torch.stack(rows)


def before_and_after(lvlm, defence, inputs, site=RESID):
    seen = []
    spy = (site, lambda a, hook: seen.append(a.clone()))
    with torch.no_grad():
        lvlm.run_with_hooks(inputs, fwd_hooks=[spy, *defence.fwd_hooks(inputs, lvlm), spy])
    return seen


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_difference_of_means_and_caa(world_model, kinds, requests):
    made = MeanDifference.fit(world_model, refused=kinds["refused"], complied=kinds["malicious"], layer=1, alpha=0.5)
    expected = rows_of(world_model, kinds["refused"]).mean(0) - rows_of(world_model, kinds["malicious"]).mean(0)
    torch.testing.assert_close(made.vector.double(), expected, atol=1e-5, rtol=1e-4)
    inputs = world_model.prepare(requests, responses=True)
    before, after = before_and_after(world_model, made, inputs)
    there = ~inputs.spans.padding[..., None]
    torch.testing.assert_close(after - before, 0.5 * made.vector * there, atol=1e-5, rtol=1e-4)
    rows = [random(n, 24, seed=n) for n in (3, 5)]
    of = MeanDifference.of_rows(*rows, site=made.site, alpha=0.5, name="by rows")
    torch.testing.assert_close(of.vector, (rows[0].sum(0) / 3 - rows[1].sum(0) / 5).float())
    assert (of.site, of.alpha, of.scope, of.name) == (made.site, 0.5, "all", "by rows")
    with pytest.raises(FitError, match="must be finite"):
        MeanDifference.of_rows(rows[0], rows[1] * float("nan"), site=made.site)
    caa = CAA.fit(world_model, malicious=kinds["malicious"], refusal="sorry i cannot", layer=1)
    refused = [dataclasses.replace(e, response="sorry i cannot") for e in kinds["malicious"]]
    expected = (
        rows_of(world_model, refused, span="response") - rows_of(world_model, kinds["malicious"], span="response")
    ).mean(0)
    torch.testing.assert_close(caa.vector.double(), expected, atol=1e-5, rtol=1e-4)
    before, after = before_and_after(world_model, caa, inputs)
    touched = (inputs.spans.last | inputs.spans.response)[..., None]
    torch.testing.assert_close(after - before, caa.vector * touched, atol=1e-5, rtol=1e-4)


def test_actadd_is_added_at_the_first_positions(world_model, requests):
    made = ActAdd.fit(world_model, towards="sorry i cannot", away="the first letters are", layer=1, alpha=2.0)
    inputs = world_model.prepare(requests)
    before, after = before_and_after(world_model, made, inputs, str(made.site))
    for row in range(len(requests)):
        first = int((~inputs.spans.padding[row]).nonzero()[0])
        n = len(made.vectors)
        found = (after - before)[row]
        torch.testing.assert_close(found[first : first + n], 2.0 * made.vectors, atol=1e-5, rtol=1e-4)
        assert not bool(found[:first].any()) and not bool(found[first + n :].any())
    with pytest.raises(FitError, match="must differ"):
        ActAdd.fit(world_model, towards="the", away="the", layer=1)


def test_mean_ablation_puts_the_benign_mean(world_model, kinds, requests):
    made = MeanAblation.fit(world_model, benign=kinds["benign"], sites=[RESID], scope="text")
    mean = rows_of(world_model, kinds["benign"], span="text").mean(0).float()
    inputs = world_model.prepare(requests)
    before, after = before_and_after(world_model, made, inputs)
    expected = torch.where(inputs.spans.text[..., None], mean, before)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shrinkage", ["none", "ledoit_wolf"])
def test_leace_is_the_closed_form_and_erases(shrinkage):
    benign, malicious = random(40, 7), random(30, 7, seed=1) + torch.arange(7.0) / 3
    made = eraser(benign, malicious, shrinkage=shrinkage)
    rows = torch.cat([benign, malicious]).numpy()
    if shrinkage == "none":
        z = np.r_[np.zeros(40), np.ones(30)]
        covariance = np.cov(rows.T, bias=True)
        values, vectors = np.linalg.eigh(covariance)
        whiten = (vectors / np.sqrt(values)) @ vectors.T
        cross = whiten @ ((rows - rows.mean(0)).T @ (z - z.mean()) / 70)[:, None]
        projector = np.linalg.pinv(whiten) @ cross @ np.linalg.pinv(cross) @ whiten
        expected = rows - (rows - rows.mean(0)) @ projector.T
        erased = rows + made.edit(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(erased, expected, atol=1e-10)
    shift = (malicious + made.edit(malicious)).mean(0) - (benign + made.edit(benign)).mean(0)
    assert float(shift.abs().max()) < 1e-10
    assert float(made.read @ made.write) == pytest.approx(1)
    with pytest.raises(FitError, match="same mean"):
        eraser(benign, benign, shrinkage=shrinkage)


def test_leace_is_that_of_concept_erasure():
    benign, malicious = random(60, 9), 1.5 * random(50, 9, seed=1) + torch.arange(9.0) / 4
    rows, z = torch.cat([benign, malicious]), torch.cat([torch.zeros(60), torch.ones(50)]).long()
    fitter = LeaceFitter.fit(rows, z, shrinkage=False, constrain_cov_trace=False)
    made = eraser(benign, malicious, shrinkage="none")
    fresh = random(20, 9, seed=2)
    torch.testing.assert_close(fresh + made.edit(fresh), fitter.eraser(fresh), atol=1e-8, rtol=1e-8)


def test_alphasteer_solves_the_ridge_problem_in_the_null_space(world_model, kinds, requests):
    benign, malicious, r = random(5, 8), random(6, 8, seed=1) + 1, random(8, seed=2)
    projector = null_projector(benign, 3 / 8)
    assert float((benign @ projector).abs().max()) < 1e-9  # 5 rows leave 3 of 8 directions
    x, targets = (malicious @ projector).numpy(), np.tile(r.numpy(), (6, 1))
    p = projector.numpy()
    d = np.linalg.pinv(x.T @ x + 10 * p.T @ p, rcond=1e-12) @ x.T @ targets
    made = null_steering(benign, malicious, r, null_share=3 / 8)
    h = random(4, 8, seed=3)
    np.testing.assert_allclose(((h @ made.read)[:, None] * r).numpy(), h.numpy() @ p @ d, atol=1e-9)
    defence = AlphaSteer(
        steerings={1: dataclasses.replace(made, read=random(24), direction=random(24, seed=5))}, alpha=0.3
    )
    inputs = world_model.prepare(requests, responses=True)
    before, after = before_and_after(world_model, defence, inputs)
    edit = 0.3 * (before @ random(24).float())[..., None] * random(24, seed=5).float()
    torch.testing.assert_close(after - before, edit * inputs.spans.prompt[..., None], atol=1e-4, rtol=1e-3)
    with pytest.raises(FitError, match="must leave a direction"):
        null_projector(benign, 0.1)


def test_cast_decides_row_by_row_and_caps_the_norm(world_model, requests):
    h, c = random(3, 6), random(6, seed=1)
    p = torch.outer(c, c) / (c @ c)
    expected = torch.stack([torch.cosine_similarity(x, torch.tanh(p @ x), dim=0) for x in h])
    torch.testing.assert_close(condition_score(h, c), expected)
    assert best_threshold(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.6, 0.8])) == (pytest.approx(0.45), True)
    assert best_threshold(torch.tensor([0.6, 0.8]), torch.tensor([0.1, 0.2]))[1] is False
    made = CAST(
        condition=random(24).float(), condition_layer=1, vectors={1: 5 * random(24, seed=1).float()}, threshold=0.0
    )
    inputs = world_model.prepare(requests)
    with torch.no_grad():
        _, cache = world_model.run_with_cache(inputs, sites=[RESID])
    scores = condition_score(cache[RESID][inputs.spans.last], made.condition)
    made = dataclasses.replace(made, threshold=float(scores.sort().values[1:3].mean()))
    before, after = before_and_after(world_model, made, inputs)
    steered = before + made.vectors[1]
    capped = steered * (before.norm(dim=-1) / steered.norm(dim=-1)).clamp(max=1)[..., None]
    where = (scores > made.threshold)[:, None] & ~inputs.spans.padding
    assert 0 < int((scores > made.threshold).sum()) < len(requests)
    torch.testing.assert_close(after, torch.where(where[..., None], capped, before), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="not known there yet"):
        dataclasses.replace(made, condition_layer=2)


def test_safesteer_by_hand(world_model, kinds, requests):
    differences = random(6, 5)
    v = np.linalg.svd(differences.numpy())[2][:2]
    mean = differences.numpy().mean(0)
    u = 2 * v.T @ v @ mean + 0.5 * (mean - v.T @ v @ mean)
    np.testing.assert_allclose(steering_direction(differences, rank=2).numpy(), u / np.linalg.norm(u), atol=1e-12)
    made = SafeSteer.fit(world_model, benign=kinds["benign"], malicious=kinds["malicious"], layer=1, prefix="not the")
    made = dataclasses.replace(made, steps=2)
    b, m = rows_of(world_model, kinds["benign"]), rows_of(world_model, kinds["malicious"])
    classifier = LogisticRegression(max_iter=2000).fit(np.r_[b, m], [0] * len(b) + [1] * len(m))
    inputs = world_model.prepare(requests, responses=True)
    before, after = before_and_after(world_model, made, inputs)
    p = classifier.predict_proba(before[inputs.spans.last].double().numpy())[:, 1]
    amount = 0.5 * (2 * torch.tensor(p).float() - 1)[:, None] * before.norm(dim=-1)
    step = inputs.spans.response.long().cumsum(1)
    where = (inputs.spans.last | inputs.spans.response) & (step < 2)
    torch.testing.assert_close(after - before, (amount * where)[..., None] * made.direction, atol=1e-3, rtol=1e-2)


def test_astra_by_hand(world_model, kinds, requests):
    made = ASTRA(vector=random(24).float(), reference=0.1 * random(24, seed=1).float(), layer=1, alpha=3.0)
    inputs = world_model.prepare(requests, responses=True)
    before, after = before_and_after(world_model, made, inputs)
    for row, position in (inputs.spans.last | inputs.spans.response).nonzero().tolist():
        h = before[row, position].numpy()
        v, h0 = made.vector.numpy(), made.reference.numpy()
        c = np.clip((h - h0) @ v / np.linalg.norm(h - h0) / np.linalg.norm(v), 0, 1)
        expected = h - 3.0 * c * np.linalg.norm(h) * v / np.linalg.norm(v)
        np.testing.assert_allclose(after[row, position].numpy(), expected, atol=1e-4, rtol=1e-3)
    untouched = ~(inputs.spans.last | inputs.spans.response)
    assert torch.equal(after[untouched], before[untouched])
    with torch.no_grad():
        logits = world_model(inputs)
    found = target_outcomes(logits, inputs.spans, inputs.input_ids)
    at = inputs.spans.response[1].nonzero()[:-1, 0].tolist()
    total = 0.0
    for position in at:
        z = logits[1, position - 1].double().numpy()
        y = int(inputs.input_ids[1, position])
        total += -np.log1p(np.exp(-(z[y] - np.log(np.exp(np.delete(z, y)).sum()))))
    assert float(found[1]) == pytest.approx((total - np.log(1 - np.exp(total))) / len(at), rel=1e-6)


def test_astra_finds_the_patches_that_decide():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(80, 12, generator=generator) < 0.5).double()
    chosen = decisive_patches(masks, 3 * masks[:, 4] + 2 * masks[:, 7] - masks[:, 2])
    assert chosen.nonzero()[:, 0].tolist() == [4, 7]
    assert decisive_patches(masks, 3 * masks[:, 4] + 2 * masks[:, 7], top=1).nonzero()[:, 0].tolist() == [4]
    assert not bool(decisive_patches(masks, torch.ones(80, dtype=torch.float64)).any())
    from PIL import Image

    picture = Image.new("RGB", (20, 10), "white")
    kept = torch.tensor([[True, False, True], [True, True, False]])
    pixels = np.array(blackened(picture, kept, 8))
    assert pixels[:8, 8:16].max() == 0 and pixels[8:, 16:].max() == 0
    assert pixels[:8, :8].min() == pixels[8:, 8:16].min() == 255


def test_shiftdc_removes_the_pictures_shift_along_the_direction(world_model, kinds, requests):
    made = ShiftDC.fit(
        world_model, unsafe=kinds["refused"], safe=kinds["benign"], layers=[1], caption_prompt="what is it", caption_tokens=3,
        alpha=0.7,
    )  # fmt: skip
    s = made.directions[1]
    assert float(s.norm()) == pytest.approx(1, abs=1e-5)
    inputs = world_model.prepare(requests)
    before, after = before_and_after(world_model, made, inputs)
    for row, example in enumerate(requests):
        last = inputs.spans.last_index()[row]
        expected = before[row].clone()
        if example.image is not None:
            asked = world_model.prepare(dataclasses.replace(example, prompt="what is it", response=None))
            caption = world_model.generate(asked, max_new_tokens=3).texts[0]
            told = dataclasses.replace(example, prompt=f"{caption} {example.prompt}", image=None)
            m = before[row, last] - rows_of(world_model, [told])[0].float()
            expected[last] = expected[last] - 0.7 * (m @ s) * s
        torch.testing.assert_close(after[row], expected, atol=1e-4, rtol=1e-3)
    bare = dataclasses.replace(inputs, examples=())
    with pytest.raises(ValueError, match="which examples they are of"):
        made.fwd_hooks(bare, world_model)
    with pytest.raises(WrongModelError, match="must be given it"):
        made.fwd_hooks(inputs)


def test_coca_is_its_formula_at_every_step(world_model, requests):
    made = CoCA(prefix="not the first", alpha=2.0)
    warned = [dataclasses.replace(e, prompt=f"not the first {e.prompt}") for e in requests]
    plain, safe = (world_model.prepare(e, responses=True) for e in (requests, warned))
    with torch.no_grad():
        z, z_safe = world_model(plain), world_model(safe)
        with made.on(world_model):
            found = world_model(plain)
            _, cache = world_model.run_with_cache(plain, sites=[RESID])
        _, undefended = world_model.run_with_cache(plain, sites=[RESID])
    assert torch.equal(cache[RESID], undefended[RESID]), "the second branch must not be recorded"
    for row in range(len(requests)):
        a, b = plain.spans.last_index()[row], safe.spans.last_index()[row]
        n = 1 + int(plain.spans.response[row].sum())
        expected = z_safe[row, b : b + n] + 2.0 * (z_safe[row, b : b + n] - z[row, a : a + n])
        torch.testing.assert_close(found[row, a : a + n], expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(found[row, :a], z[row, :a])


def test_hiddendetect_scores_and_refuses(world_model, kinds, requests):
    made = HiddenDetect(layers=(0, 2), refusal_tokens=(60, 70), refusal_ids=(60, 61, 62, 2), threshold=0.0, width=24)
    scores = made.scores(world_model, requests)
    weight = world_model.hf_model.get_output_embeddings().weight.detach()
    for row, example in enumerate(requests):
        cosines = []
        for layer in range(3):
            h = rows_of(world_model, [example], f"blocks.{layer}.hook_resid_post")[0].float()
            normed = h / (h.square().mean() + 1e-6).sqrt() * world_model.hf_model.model.language_model.norm.weight
            z = normed @ weight.T
            cosines.append(float((z[60] + z[70]) / (z.norm() * 2**0.5)))
        assert float(scores[row]) == pytest.approx(np.trapezoid(cosines), abs=1e-4)
    made = dataclasses.replace(made, threshold=float(scores.sort().values[1:3].mean()))
    with made.on(world_model):
        answers = world_model.generate(world_model.prepare(requests), max_new_tokens=6).new_tokens
    plain = world_model.generate(world_model.prepare(requests), max_new_tokens=6).new_tokens
    for row, flagged in enumerate((scores > made.threshold).tolist()):
        if flagged:
            assert answers[row, :4].tolist() == [60, 61, 62, 2]
        else:
            n = min(answers.shape[1], plain.shape[1])
            assert torch.equal(answers[row, :n], plain[row, :n])


def test_hiddendetect_gates_a_repair_by_its_own_decision(world_model, requests, tmp_path):
    made = HiddenDetect(layers=(0, 2), refusal_tokens=(60, 70), refusal_ids=(60, 61, 62, 2), threshold=0.0, width=24)
    scores = made.scores(world_model, requests)
    made = dataclasses.replace(made, threshold=float(scores.sort().values[1:3].mean()))
    reader, gate = made.reader(world_model), made.gate()
    torch.testing.assert_close(
        read_scores(world_model, requests, [reader], progress=False)[:, 0], scores, atol=1e-4, rtol=1e-4
    )
    writer = Writer.towards("blocks.2.hook_resid_post", target=torch.ones(24), source=torch.zeros(24), scope="last")
    HybridFusion(textual=(Correction(writer=writer, reader=reader, gate=gate),), name="gated").save(tmp_path)
    repair = HybridFusion.load(tmp_path)
    assert repair.describe()["textual"][0]["gate"] == {"kind": "ThresholdGate", "threshold": made.threshold}
    assert len({id(leaf.lens) for leaf in repair.readers[0].leaves}) == 1
    inputs = world_model.prepare(requests)
    flagged = scores > made.threshold
    assert 0 < int(flagged.sum()) < len(requests)
    assert (explain(repair, world_model, inputs).readings.gate > 0).tolist() == flagged.tolist()
    seen = []
    spy = ("blocks.2.hook_resid_post", lambda a, hook: seen.append(a.clone()))
    with torch.no_grad():
        world_model.run_with_hooks(inputs, fwd_hooks=[spy, *repair.fwd_hooks(inputs), spy])
    assert (seen[0] != seen[1]).any(-1).any(-1).tolist() == flagged.tolist()
    with pytest.raises(RepairError, match="threshold must be"):
        HiddenDetect.always(world_model, refusal="sorry i cannot").gate()


def test_hiddendetect_chooses_blocks_and_threshold_and_says_when_there_are_none(world_model, kinds):
    weight = world_model.hf_model.get_output_embeddings().weight.detach()
    norm = world_model.hf_model.model.language_model.norm.weight
    gaps = []
    for layer in range(4):
        means = []
        for name in ("malicious", "benign"):
            h = rows_of(world_model, kinds[name], f"blocks.{layer}.hook_resid_post").float()
            z = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm @ weight.T
            means.append((z / z.norm(dim=-1, keepdim=True)).mean(0))
        gaps.append(means[0] - means[1])
    better = torch.stack([gap > gaps[3] + 1e-4 for gap in gaps[:3]])
    worse = torch.stack([gap < gaps[3] - 1e-4 for gap in gaps[:3]])
    fit = {"benign": kinds["benign"], "malicious": kinds["malicious"], "refusal": "sorry i cannot"}
    token = int((better[0] & worse[1] & better[2]).nonzero()[0])
    found = HiddenDetect.fit(world_model, **fit, refusal_tokens=[token], false_positives=0.2)
    assert found.layers == (0, 2)
    assert 0 < float((found.scores(world_model, kinds["benign"]) >= found.threshold).float().mean()) <= 0.4
    assert found.refusal_ids == (*world_model.tokenizer("sorry i cannot", add_special_tokens=False)["input_ids"], 2)
    with pytest.raises(NoSafetyLayersError, match="two blocks or more"):
        HiddenDetect.fit(world_model, **fit, refusal_tokens=[int(worse.all(0).nonzero()[0])])


def test_sites_of_leace_are_where_it_acts(world_model, kinds):
    made = LEACE.fit(world_model, benign=kinds["benign"], malicious=kinds["malicious"], sites=[RESID], scope="last")
    assert made.widths() == {Site.parse(RESID): 24}
    inputs = world_model.prepare(kinds["malicious"][:3] + kinds["benign"][:3])
    before, after = before_and_after(world_model, made, inputs)
    of = made.erasers[Site.parse(RESID)]
    expected = before + torch.where(inputs.spans.last[..., None], of.edit(before), 0.0)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(FitError, match="at least one site"):
        LEACE.fit(world_model, benign=kinds["benign"], malicious=kinds["malicious"], sites=[])


def test_the_data_filter_of_the_refusal_direction(world_model, kinds):
    everything = [*kinds["refused"], *kinds["benign"]]
    with torch.no_grad():
        p = torch.stack([world_model(world_model.prepare(e))[0, -1].double().softmax(-1) for e in everything])
    tokens: list[int] = []
    for seed in range(
        50
    ):  # token sets whose mass is above one half for some requests of each kind and below for others
        order = torch.randperm(p.shape[1], generator=torch.Generator().manual_seed(seed))
        above = p[:, order].cumsum(dim=1) > 0.5
        mixed = [part.any(0) & ~part.all(0) for part in (above[:6], above[6:])]
        if bool((mixed[0] & mixed[1]).any()):
            tokens = order[: int((mixed[0] & mixed[1]).nonzero()[0]) + 1].tolist()
            break
    mass = p[:, tokens].sum(1)
    refused = [e for e, m in zip(kinds["refused"], mass[:6], strict=True) if m > 0.5]
    answered = [e for e, m in zip(kinds["benign"], mass[6:], strict=True) if m < 0.5]
    assert 0 < len(refused) < 6 and 0 < len(answered) < 9
    assert _filtered(world_model, kinds["refused"], tokens, "harmful", 4) == refused
    assert _filtered(world_model, kinds["benign"], tokens, "harmless", 4) == answered
    with pytest.raises(NoRefusalDirectionError, match="data filter left nothing"):
        RefusalDirection.fit(
            world_model, harmful=kinds["refused"], harmless=answered, harmful_validation=refused, harmless_validation=answered,
            refusal_tokens=[int(p.sum(0).argmin())], filter_data=True, progress=False,
        )  # fmt: skip


def test_controls_of_random_directions_keep_norms_and_singular_values(world_model, kinds):
    site = Site.parse(RESID)
    added = MeanDifference(vector=3 * random(24).float(), site=site, alpha=0.7)
    beside = random_directions(added, seed=1)
    assert float(beside.vector.norm()) == pytest.approx(float(added.vector.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(beside.vector, added.vector, dim=0))) < 0.6
    assert (beside.alpha, beside.site, beside.name) == (0.7, site, "random directions of difference of means")
    assert torch.equal(random_directions(added, seed=1).vector, beside.vector)
    assert not torch.equal(random_directions(added, seed=2).vector, beside.vector)
    prompts = ActAdd(vectors=random(3, 24).float(), site=site)
    torch.testing.assert_close(random_directions(prompts).vectors.norm(dim=1), prompts.vectors.norm(dim=1))
    columns = random(24, 4, seed=7).float()  # another draw than the control's
    held = CARESubspace(columns=columns, mean=random(24, seed=3).float(), eigenvalues=torch.ones(4))
    care = PublishedCARE(visual={1: held}, textual={2: held})
    of = random_directions(care)
    for moved in (of.visual[1], of.textual[2]):
        torch.testing.assert_close(moved.columns.T @ moved.columns, columns.T @ columns, atol=1e-4, rtol=1e-4)
        assert torch.equal(moved.mean, held.mean) and not torch.allclose(moved.columns, columns, atol=0.1)
    with pytest.raises(FitError, match="must add a vector"):
        random_directions(CoCA(prefix="the"))


def test_the_control_that_refuses_everything_does(world_model, requests):
    made = HiddenDetect.always(world_model, refusal="sorry i cannot")
    with made.on(world_model):
        answers = world_model.generate(world_model.prepare(requests), max_new_tokens=6)
    assert answers.texts == ["sorry i cannot"] * len(requests)
    with pytest.raises(FitError, match="refusal must have a token"):
        HiddenDetect.always(world_model, refusal="")


@torch.no_grad()
def test_a_vector_after_a_block_is_one_before_the_next_to_the_bit(world_model, requests):
    """What a run called a refusal direction at the input of block 2 is a difference of means at the output of block 1."""
    vector = random(24).float()
    table = pd.DataFrame([{"position": -1, "layer": 2, "bypass": 0.0, "induce": 0.0, "kl": 0.0, "kept": True}])
    before = RefusalDirection(direction=vector, layer=2, position=-1, candidates=table, coefficient=0.5)
    after = MeanDifference(vector=vector, site=Site.parse(RESID), alpha=0.5)
    inputs = world_model.prepare(requests)
    found = []
    for defence in (before, after):
        with defence.on(world_model):
            found.append(world_model(inputs))
    assert torch.equal(*found) and not torch.equal(found[0], world_model(inputs))
