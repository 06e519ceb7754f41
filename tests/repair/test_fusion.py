import dataclasses

import pytest
import torch
from fitted import make_correction, make_subspace

from care_lens.core import Repair, TokenSpans
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair import (
    AlwaysOpen,
    ConformalGate,
    Correction,
    EnergyReader,
    HybridFusion,
    NoRepair,
    Writer,
)

SITE = "blocks.1.hook_resid_post"
OPEN, SHUT = (ConformalGate(threshold=t, epsilon=0.1, n=9) for t in (-1.0, 1e9))


def two(rule="adaptive", gates=(None, None), **options):
    """A visual and a textual correction at one site, another textual one below it."""
    visual = make_correction(seed=1, gate=gates[0])
    textual = make_correction(seed=2, gate=gates[1])
    below = make_correction("blocks.0.hook_mlp_out", seed=3, gate=gates[1])
    return HybridFusion(visual=(visual,), textual=(textual, below), rule=rule, **options)


def with_alpha(fusion, alpha):
    def scaled(corrections):
        return tuple(dataclasses.replace(c, writer=dataclasses.replace(c.writer, alpha=alpha)) for c in corrections)

    return dataclasses.replace(fusion, visual=scaled(fusion.visual), textual=scaled(fusion.textual))


def run(model, fusion, inputs):
    with fusion.on(model), torch.no_grad():
        return model(inputs)


def edits(model, fusion, inputs, site=SITE):
    """[batch, pos, d] what the repair changed at a site that it alone edits."""
    seen = []
    with torch.no_grad():
        pair = (site, lambda activation, hook: seen.append(activation.clone()))
        model.run_with_hooks(inputs, fwd_hooks=[pair, *fusion.fwd_hooks(inputs), pair])
    return seen[1] - seen[0]


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "modality", "joint"])
def test_alpha_0_and_shut_gates_are_the_model_itself_to_the_bit(model, inputs, rule):
    with torch.no_grad():
        plain, answer = model(inputs), model.generate(inputs, max_new_tokens=5)
    for repair in (with_alpha(two(rule), 0.0), two(rule, (SHUT, SHUT)), NoRepair()):
        assert torch.equal(run(model, repair, inputs), plain)
        with repair.on(model):
            assert torch.equal(model.generate(inputs, max_new_tokens=5).sequences, answer.sequences)
    assert float((run(model, two(rule), inputs) - plain).abs().max()) > 0.1


def test_repaired_logits_are_those_of_the_formula(model, inputs):
    subspace = make_subspace(SITE, seed=1)
    padding = inputs.spans.padding[..., None]

    def formula(activation, hook):
        fixed = activation - 0.7 * (activation - subspace.mean_benign) @ subspace.left @ subspace.write.T
        return torch.where(padding, activation, fixed)

    with torch.no_grad():
        expected = model.run_with_hooks(inputs, fwd_hooks=[(SITE, formula)])
    fusion = HybridFusion(visual=(Correction.care(subspace, alpha=0.7),))
    torch.testing.assert_close(run(model, fusion, inputs), expected, atol=1e-4, rtol=1e-4)


def test_modality_rule_gives_each_token_its_own_correction(model, inputs):
    visual, textual = two().visual, two().textual[:1]
    both = edits(model, HybridFusion(visual=visual, textual=textual, rule="modality"), inputs)
    image, text = inputs.spans.image, inputs.spans.text
    torch.testing.assert_close(both[image], edits(model, HybridFusion(visual=visual), inputs)[image])
    torch.testing.assert_close(both[text], edits(model, HybridFusion(textual=textual), inputs)[text])
    assert float(both[image].norm(dim=-1).min()) > 0.1 and float(both[text].norm(dim=-1).min()) > 0.1
    assert float(both[inputs.spans.padding].abs().max()) == 0


@pytest.mark.parametrize("scope", ["all", "image", "text", "prompt", "last", "generated", ("image", "last")])
def test_scope_is_what_is_touched_of_fusion_and_writer_alike(model, inputs, scope):
    names = (scope,) if isinstance(scope, str) else scope
    mask = torch.stack([inputs.spans.mask(name) for name in names]).any(dim=0)
    by_fusion = HybridFusion(visual=(make_correction(seed=1),), scope=scope)
    by_writer = HybridFusion(visual=(make_correction(seed=1, scope=scope),))
    for fusion in (by_fusion, by_writer):
        touched = (edits(model, fusion, inputs) != 0).any(dim=-1)
        assert torch.equal(touched, mask)


def test_one_shut_gate_leaves_the_other_correction_undiluted(model, inputs):
    for rule in ("adaptive", "sequential", "joint"):
        half_shut = edits(model, two(rule, (OPEN, SHUT)), inputs)
        alone = edits(model, HybridFusion(visual=two(rule).visual), inputs)
        torch.testing.assert_close(half_shut, alone)


def test_gate_opens_rows_by_their_own_score(model, inputs):
    reader = EnergyReader.from_subspace(make_subspace("blocks.0.hook_resid_post", seed=101))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[reader.site])
    scores = reader.score(cache[str(reader.site)], inputs.spans.last)
    middle = float(scores.sort().values[1])
    gate = ConformalGate(threshold=middle, epsilon=0.1, n=9)
    correction = Correction(writer=make_correction(seed=1).writer, reader=reader, gate=gate)
    touched = (edits(model, HybridFusion(textual=(correction,)), inputs) != 0).any(dim=-1)
    assert torch.equal(touched, (scores > middle)[:, None] & ~inputs.spans.padding)


def test_a_reader_at_its_writers_site_reads_what_was_there_before(model, inputs):
    reader = EnergyReader.from_subspace(make_subspace(SITE, seed=101), positions="all")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[SITE])
    highest = float(reader.score(cache[SITE], ~inputs.spans.padding).max())
    for threshold, opens in ((highest * 0.999, True), (highest * 1.001, False)):
        gate = ConformalGate(threshold=threshold, epsilon=0.1, n=9)
        first = make_correction(seed=1)
        second = dataclasses.replace(make_correction(seed=2), reader=reader, gate=gate)
        fusion = HybridFusion(visual=(first,), textual=(second,), rule="sequential")
        both, alone = edits(model, fusion, inputs), edits(model, HybridFusion(visual=(first,)), inputs)
        assert torch.allclose(both, alone, atol=1e-5) is not opens


@pytest.mark.parametrize("rule", ["adaptive", "modality", "joint", "sample"])
def test_repaired_logits_do_not_depend_on_batch_order_or_padding(model, examples, rule):
    options = {"rule": "adaptive", "weighting": "sample"} if rule == "sample" else {"rule": rule}
    fusion = two(gates=(None, ConformalGate(threshold=60.0, epsilon=0.1, n=9)), **options)
    batch = model.prepare(examples)
    together = run(model, fusion, batch)
    order = [2, 0, 1]
    permuted = run(model, fusion, model.prepare([examples[i] for i in order]))
    right = model.prepare(examples, padding_side="right")
    on_the_right = run(model, fusion, right)
    for row, example in enumerate(examples):
        alone = run(model, fusion, model.prepare(example))[0]
        kept = ~batch.spans.padding[row]
        assert float((together[row][kept] - alone).abs().max()) < 1e-5 * float(alone.abs().max())
        torch.testing.assert_close(permuted[order.index(row)], together[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(on_the_right[row][~right.spans.padding[row]], alone, atol=1e-4, rtol=1e-4)


def test_another_batch_is_refused(model, examples, inputs):
    hooks = two().fwd_hooks(inputs)
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=hooks)
        with pytest.raises(ValueError, match="other tokens"):
            other = dataclasses.replace(examples[0], prompt="how is in the picture")
            model.run_with_hooks(model.prepare([other, *examples[1:]]), fwd_hooks=hooks)
        with pytest.raises(ValueError, match="one new token a row"):
            model.run_with_hooks(model.prepare(examples[:2]), fwd_hooks=hooks)
        model.run_with_hooks(inputs, fwd_hooks=hooks)


def test_same_hooks_may_be_used_again_on_their_batch(model, inputs):
    hooks = two(gates=(OPEN, OPEN)).fwd_hooks(inputs)
    with torch.no_grad():
        first = model.run_with_hooks(inputs, fwd_hooks=hooks)
        model.generate(inputs, max_new_tokens=4, fwd_hooks=hooks)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), first)


def test_beams_and_runs_without_a_cache_are_refused(model, inputs):
    with two().on(model):
        with pytest.raises(ValueError, match="num_beams must be 1"):
            model.generate(inputs, max_new_tokens=3, num_beams=2)
        with pytest.raises(ValueError, match="decoding without a cache"):
            model.generate(inputs, max_new_tokens=3, use_cache=False)
    several = {"num_return_sequences": 2, "do_sample": True}
    with pytest.raises(ValueError, match="several returned sequences"):
        model.generate(inputs, max_new_tokens=3, fwd_hooks=two().fwd_hooks(inputs), **several)


def test_several_returned_sequences_are_repaired_as_copies_of_the_row(model, examples):
    inputs, copies = model.prepare(examples), model.prepare([e for e in examples for _ in range(2)])
    with two(gates=(OPEN, OPEN)).on(model):
        torch.manual_seed(0)
        several = model.generate(inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2)
        torch.manual_seed(0)
        by_hand = model.generate(copies, max_new_tokens=4, do_sample=True)
    assert torch.equal(several.sequences, by_hand.sequences)


def test_hooks_are_gone_after_the_block_and_after_an_exception(model, inputs):
    with torch.no_grad():
        plain = model(inputs)
    with pytest.raises(RuntimeError, match="inside"), two().on(model):
        assert not torch.equal(run(model, NoRepair(), inputs), plain)
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="beams"), two().on(model):
        model.generate(inputs, num_beams=2)
    with torch.no_grad():
        assert torch.equal(model(inputs), plain)
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_composes_with_others_hooks_in_the_order_given(model, inputs):
    fusion, subspace = HybridFusion(visual=(make_correction(seed=1),)), make_subspace(SITE, seed=1)
    kept = ~inputs.spans.padding[..., None]

    def double(activation, hook):
        return 2 * activation

    def corrected(activation):
        return torch.where(kept, subspace.apply(activation), activation)

    repair, seen = fusion.fwd_hooks(inputs), []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[spy, *repair, (SITE, double), spy])
        torch.testing.assert_close(seen[1], 2 * corrected(seen[0]), atol=1e-4, rtol=1e-4)
        model.run_with_hooks(inputs, fwd_hooks=[(SITE, double), *repair, spy])
        torch.testing.assert_close(seen[2], corrected(2 * seen[0]), atol=1e-4, rtol=1e-4)
        with fusion.on(model):
            model.run_with_hooks(inputs, fwd_hooks=[(SITE, double), spy])
            torch.testing.assert_close(seen[3], 2 * corrected(seen[0]), atol=1e-4, rtol=1e-4)
            _, cache = model.run_with_cache(inputs, sites=[SITE])
            torch.testing.assert_close(cache[SITE], corrected(seen[0]), atol=1e-4, rtol=1e-4)
            bound = model.bind(inputs)
            torch.testing.assert_close(bound(inputs.input_ids), model(inputs))


def test_gradients_reach_the_pixels_through_a_gated_repair(model, examples):
    ramp = ConformalGate(threshold=0.0, epsilon=0.1, n=9, width=1e4)
    fusion = HybridFusion(visual=(make_correction(seed=1, gate=ramp),), textual=(make_correction(seed=2, gate=SHUT),))
    inputs = model.prepare(examples)
    assert inputs.pixel_values is not None
    pixels = inputs.pixel_values.clone().requires_grad_()
    with fusion.on(model):
        model(dataclasses.replace(inputs, pixel_values=pixels))[:, -1].logsumexp(-1).sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.isfinite().all()) and float(pixels.grad.abs().max()) > 0


def test_half_precision_is_repaired_in_float32(llava_maker, examples):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip", dtype=torch.bfloat16))
    inputs = lvlm.prepare(examples)
    seen = []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    correction = make_correction(seed=1)
    with torch.no_grad():
        fusion = HybridFusion(visual=(correction,))
        lvlm.run_with_hooks(inputs, fwd_hooks=[spy, *fusion.fwd_hooks(inputs), spy])
    assert seen[1].dtype == torch.bfloat16
    exact = (seen[0].float() + correction.writer.delta(seen[0].float())).to(torch.bfloat16)
    kept = ~inputs.spans.padding
    assert torch.equal(seen[1][kept], exact[kept])


def test_reader_above_its_writer_is_refused():
    writer = make_correction("blocks.1.hook_mlp_out").writer
    reader = EnergyReader.from_subspace(make_subspace("blocks.1.hook_resid_post"))
    with pytest.raises(ValueError, match="at or before its writer"):
        Correction(writer=writer, reader=reader, gate=OPEN)
    Correction(writer=writer, reader=EnergyReader.from_subspace(make_subspace("blocks.1.hook_mlp_out")), gate=OPEN)
    with pytest.raises(ValueError, match="reader must be given"):
        Correction(writer=writer, gate=OPEN)


def one_token():
    no, yes = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.long)
    spans = TokenSpans.from_masks(image=no, padding=no, response=no, grids=[()])
    return LVLMInputs(yes, yes, None, spans)


def test_wrong_model_modality_and_options_are_refused(model):
    narrow = Writer.towards(SITE, target=torch.ones(8), source=torch.zeros(8))
    with (
        pytest.raises(ValueError, match="as wide as the model"),
        HybridFusion(visual=(Correction(writer=narrow),)).on(model),
    ):
        pass
    deep = make_correction("blocks.7.hook_resid_post")
    with pytest.raises(ValueError, match="no site"), HybridFusion(visual=(deep,)).on(model):
        pass
    textual = Correction.care(make_subspace(modality="textual"))
    assert textual.modality == "textual"
    with pytest.raises(ValueError, match="given as visual"):
        HybridFusion(visual=(textual,))
    with pytest.raises(ValueError, match="must hold a correction"):
        HybridFusion()
    with pytest.raises(ValueError, match="2 positions"):
        two().fwd_hooks(one_token())


def test_with_gate_gates_what_has_a_reader():
    fusion = two(gates=(OPEN, None)).with_gate(SHUT)
    assert [correction.gate for correction in fusion.corrections] == [SHUT, AlwaysOpen(), AlwaysOpen()]
    assert len(fusion.readers) == 1


def test_is_a_repair_of_core(model):
    for repair in (two(), NoRepair()):
        assert isinstance(repair, Repair)
        assert repair.describe()["name"] == repair.name


def test_tokens_out_of_scope_keep_even_the_sign_of_zero(model, inputs):
    fusion = HybridFusion(visual=(make_correction(seed=1),), scope="last")
    seen = []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    zero = (SITE, lambda activation, hook: -torch.zeros_like(activation))
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[zero, *fusion.fwd_hooks(inputs), spy])
    last = inputs.spans.last
    assert bool(torch.signbit(seen[0][~last]).all()) and float(seen[0][last].abs().max()) > 0
