"""Strengths that change over the answer, and gates that open gradually."""

import dataclasses
import math

import pytest
import torch
from fitted import make_correction
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reading import answered
from unchecking import unchecked

from care_lens.core.identity import repair_fingerprint
from care_lens.lvlm import HookedLVLM
from care_lens.repair import (
    BakeError,
    ConformalGate,
    ConstantSchedule,
    Correction,
    ExponentialDecay,
    FirstTokens,
    HybridFusion,
    LinearDecay,
    RepairError,
    SoftGate,
    TooFewCalibrationError,
    bake,
    kinds,
    register_kind,
)
from care_lens.repair.gate import openness
from care_lens.repair.schedule import strength_at

SITE = "blocks.1.hook_resid_post"
NEW = 6
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW}
SCHEDULES = {
    "constant": (ConstantSchedule(0.25), lambda k: 0.25),
    "linear": (LinearDecay(tokens=4, end=0.2), lambda k: max(1 - 0.8 * k / 4, 0.2)),
    "first": (FirstTokens(2), lambda k: float(k <= 2)),
    "exponential": (ExponentialDecay(half_life=1.5), lambda k: 0.5 ** (k / 1.5)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_hand(name):
    schedule, formula = SCHEDULES[name]
    steps = torch.tensor([[0, 1, 2, 3], [4, 5, 50, 100_000]])
    expected = torch.tensor([[formula(int(k)) for k in row] for row in steps])
    torch.testing.assert_close(strength_at(schedule, steps), expected)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 10**6),
    end=st.floats(0, 1),
    half=st.floats(1e-3, 1e30),
    steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=6),
)
def test_a_strength_is_a_share_that_is_full_in_the_prompt_and_never_grows(tokens, end, half, steps):
    step = torch.tensor(sorted(steps))
    for schedule in (LinearDecay(tokens=tokens, end=end), FirstTokens(tokens), ExponentialDecay(half_life=half)):
        strength = strength_at(schedule, step)
        assert bool(((strength >= 0) & (strength <= 1)).all()) and bool((strength.diff() <= 0).all())
        assert float(strength_at(schedule, torch.tensor([0]))) == 1.0


def pair(schedule, **options):
    """A visual and a textual correction of which the textual one has the schedule."""
    said = dataclasses.replace(make_correction(SITE, seed=2, alpha=0.8), schedule=schedule)
    return HybridFusion(
        visual=(make_correction("blocks.0.hook_mlp_out", seed=1),), textual=(said,), **{"rule": "sequential", **options}
    )


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_strength_of_each_token_by_loops(model, examples, name):
    """Rows with answers of different lengths, which generation goes on with."""
    schedule, formula = SCHEDULES[name]
    inputs = model.prepare(examples, responses=True)
    fusion = dataclasses.replace(pair(schedule), visual=())
    (hooks,) = [fn for site, fn in fusion.fwd_hooks(inputs) if site == SITE]
    writer = fusion.textual[0].writer
    lengths = inputs.spans.response.sum(dim=1)
    assert len({*lengths.tolist()}) > 1
    h = torch.randn(*inputs.input_ids.shape, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # a second whole batch starts afresh
        edited, count = hooks(h, None), torch.zeros(len(examples), dtype=torch.long)
        for row in range(len(examples)):
            for pos in range(h.shape[1]):
                if bool(inputs.spans.padding[row, pos]):
                    assert torch.equal(edited[row, pos], h[row, pos])
                    continue
                count[row] += int(inputs.spans.response[row, pos])
                expected = h[row, pos] + 0.8 * formula(int(count[row])) * writer.delta(h[row, pos])
                torch.testing.assert_close(edited[row, pos], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(count, lengths)
        for more in range(1, 4):
            step = torch.randn(len(examples), 1, 32, generator=torch.Generator().manual_seed(more))
            edited = hooks(step, None)
            for row in range(len(examples)):
                expected = step[row, 0] + 0.8 * formula(int(lengths[row]) + more) * writer.delta(step[row, 0])
                torch.testing.assert_close(edited[row, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["adaptive", "sequential", "joint"])
@pytest.mark.parametrize("name", ["linear", "first", "exponential"])
def test_cached_generation_equals_a_teacher_forced_run(model, inputs, name, rule):
    fusion = pair(SCHEDULES[name][0], rule=rule)
    if rule == "joint":
        fusion = dataclasses.replace(fusion, visual=(make_correction(SITE, seed=1, alpha=0.8),))
    with fusion.on(model):
        generation = model.generate(inputs, **OPTIONS, output_logits=True)
        logits = model(answered(inputs, generation.new_tokens))[:, -NEW - 1 : -1]
    logits[:, :, model.tokenizer.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), generation.new_tokens)


@torch.no_grad()
def test_strength_0_is_the_model_as_it_is_to_the_bit(model, examples):
    inputs = model.prepare(examples, responses=True)
    bare = model(inputs)
    none, prompt = (HybridFusion(textual=pair(s).textual) for s in (ConstantSchedule(0.0), FirstTokens(0)))
    with none.on(model):
        assert torch.equal(model(inputs), bare)
        repaired = model.generate(model.prepare(examples), **OPTIONS).new_tokens
    assert torch.equal(repaired, model.generate(model.prepare(examples), **OPTIONS).new_tokens)
    seen = []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    model.run_with_hooks(inputs, fwd_hooks=[spy, *prompt.fwd_hooks(inputs), spy])
    edited = (seen[0] != seen[1]).any(-1)
    assert torch.equal(edited, inputs.spans.prompt)


@torch.no_grad()
def test_rows_in_a_batch_alone_attached_and_after_an_error_are_the_same(llava_maker, examples):
    plain, processor = llava_maker("clip")
    model = HookedLVLM.from_hf(plain, processor)
    soft = SoftGate(threshold=40.0, temperature=8.0)
    gated = make_correction(
        SITE, seed=3, gate=soft, positions=("last", "generated"), reader_site="blocks.0.hook_mlp_out"
    )
    fusion = dataclasses.replace(
        pair(LinearDecay(tokens=5)), visual=(dataclasses.replace(gated, schedule=ExponentialDecay(3.0)),)
    )
    said = fusion.textual[0]  # strong enough to change what is said
    strong = dataclasses.replace(said.writer, target=40 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    fusion = dataclasses.replace(fusion, textual=(dataclasses.replace(said, writer=strong),))
    begun = [
        dataclasses.replace(example, prefill=begin)
        for example, begin in zip(examples, ("sure", None, "how to"), strict=True)
    ]

    def tokens(lvlm, some):
        return lvlm.generate(lvlm.prepare(some), **OPTIONS).new_tokens

    bare = tokens(model, begun)
    with fusion.on(model):
        together = tokens(model, begun)
        assert torch.equal(together, torch.cat([tokens(model, [one]) for one in begun]))
    assert not torch.equal(together, bare)
    fail = (SITE, lambda activation, hook: (_ for _ in ()).throw(RuntimeError("in the middle")))
    with pytest.raises(RuntimeError, match="in the middle"), fusion.on(model):
        model.run_with_hooks(model.prepare(begun), fwd_hooks=[fail])
    assert torch.equal(tokens(model, begun), bare)
    model.unwrap()
    with fusion.attach(plain, processor) as handle:
        assert torch.equal(tokens(handle.lvlm, begun), together)
        with pytest.raises(RuntimeError, match="in the middle"):
            handle.lvlm.run_with_hooks(handle.lvlm.prepare(begun), fwd_hooks=[fail])
    with HybridFusion(textual=pair(ConstantSchedule(0.0)).textual).attach(plain, processor) as handle:
        assert torch.equal(tokens(handle.lvlm, begun), bare)


@torch.no_grad()
def test_the_record_tells_gate_and_strength_apart(model, inputs):
    soft = SoftGate(threshold=40.0, temperature=8.0)
    gated = make_correction(SITE, seed=3, gate=soft, positions="last", reader_site="blocks.0.hook_mlp_out", alpha=0.5)
    fusion = HybridFusion(textual=(dataclasses.replace(gated, schedule=LinearDecay(tokens=4)),))
    with fusion.recording(model) as seen:
        model.generate(inputs, max_new_tokens=4, min_new_tokens=4)
    frame = seen.to_dataframe()
    for _, row in frame.groupby("row"):
        gate = row.gate_textual.tolist()
        assert gate == pytest.approx([gate[0]] * len(gate)) and 0 < gate[0] < 1
        answer = row[row.span == "generated"]
        assert answer.strength_textual.tolist() == pytest.approx([gate[0] * 0.5 * s for s in (0.75, 0.5, 0.25)])
        prompt = row[row.span != "generated"].strength_textual
        assert prompt.tolist() == pytest.approx([gate[0] * 0.5] * len(prompt))
    assert (frame.strength_visual == 0).all()


def test_described_fingerprinted_saved_loaded_explained_and_not_baked(model, tmp_path, examples):
    found = {}
    for name, (schedule, _) in SCHEDULES.items():
        fusion = pair(schedule)
        fusion.save(tmp_path / name)
        loaded = HybridFusion.load(tmp_path / name)
        assert loaded.textual[0].schedule == schedule and loaded.visual[0].schedule is None
        assert repair_fingerprint(loaded) == repair_fingerprint(fusion) and loaded.describe() == fusion.describe()
        found[name] = repair_fingerprint(fusion)
        plan = fusion.explain()
        assert plan.frame.schedule.tolist() == ["", str(schedule)] and f"alpha 0.8, {schedule}; sequential" in str(plan)
        with pytest.raises(BakeError, match="changes over the answer") as error:
            bake(fusion, model, tmp_path / "baked", examples=examples)
        assert list(error.value.reasons) == [f"textual[0] at {SITE}"]
    assert len({*found.values(), repair_fingerprint(pair(None))}) == 5
    assert repair_fingerprint(pair(LinearDecay(tokens=4, end=0.3))) not in found.values()


def test_a_schedule_of_ones_own(tmp_path, model, inputs):
    @register_kind
    @dataclasses.dataclass(frozen=True)
    class EveryOther:
        def __call__(self, step):
            return (step % 2 == 0).float()

    try:
        fusion = pair(EveryOther())
        fusion.save(tmp_path)
        loaded = HybridFusion.load(tmp_path)
        with torch.no_grad():
            a, b = (model.run_with_hooks(inputs, fwd_hooks=f.fwd_hooks(inputs)) for f in (fusion, loaded))
        assert torch.equal(a, b) and loaded.explain().frame.schedule[1] == "EveryOther"
    finally:
        kinds._KINDS.pop("EveryOther")
    with unchecked():
        for wrong in (
            lambda k: k.float() + 2,
            lambda k: -k.float() - 1,
            lambda k: 1.0,
            lambda k: k,
            lambda k: k[:0].float(),
        ):
            with pytest.raises(RepairError, match="must return"):
                strength_at(wrong, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearDecay(tokens=0), "tokens must be"),
        (lambda: LinearDecay(tokens=True), "tokens must be"),
        (lambda: LinearDecay(tokens=3, end=1.5), "end must be in"),
        (lambda: FirstTokens(-1), "tokens must be"),
        (lambda: ExponentialDecay(half_life=0), "half_life must be"),
        (lambda: ExponentialDecay(half_life=math.nan), "half_life must be"),
        (lambda: ConstantSchedule(2.0), "strength must be in"),
        (lambda: Correction(writer=make_correction().writer, schedule=0.5), "schedule must be a function"),
        (lambda: SoftGate(threshold=math.inf, temperature=1.0), "threshold must be"),
        (lambda: SoftGate(threshold=0.0, temperature=0.0), "temperature must be"),
        (lambda: SoftGate(threshold=0.0, temperature=1.0, closed_to=math.nan), "closed_to must be"),
        (lambda: SoftGate(threshold=0.0, temperature=1.0, epsilon=0.1, n=9), "must be given together"),
        (lambda: SoftGate(threshold=0.0, temperature=1.0, closed_to=0.0, n=9), "must be given together"),
        (lambda: SoftGate(threshold=0.0, temperature=1.0, closed_to=0.0, epsilon=2.0, n=9), "epsilon must be"),
        (lambda: SoftGate(threshold=0.0, temperature=1.0, closed_to=0.0, epsilon=0.1, n=0), "n must be"),
    ],
)
def test_refused(make, match):
    with unchecked(), pytest.raises(RepairError, match=match):
        make()


def test_a_soft_gate_is_the_formula_and_shut_to_the_bit_where_it_says_so():
    score = torch.tensor([-math.inf, -1e30, 0.0, 1.0, 1.5, 3.0, 1e30, math.inf, math.nan])
    gate = SoftGate(threshold=1.5, temperature=0.5)
    expected = [0, 0, *(1 / (1 + math.exp(-(s - 1.5) / 0.5)) for s in (0.0, 1.0, 1.5, 3.0)), 1, 1, 1]
    assert gate(score).tolist() == pytest.approx(expected)
    shut = dataclasses.replace(gate, closed_to=1.0)
    assert shut(score).tolist() == pytest.approx([0, 0, 0, 0, *expected[4:]])
    assert torch.equal(openness(shut, score), shut(score)) and float(shut(score)[3]) == 0.0
    leaf = torch.tensor([1.5, 0.5], requires_grad=True)
    shut(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == pytest.approx([0.5, 0.0])
    ramp = ConformalGate(threshold=1.0, epsilon=0.1, n=9, width=1e-60)  # less than float32 can hold
    assert ramp(torch.tensor([0.5, 1.0, 1.5])).tolist() == [0, 0, 1]


def test_a_calibrated_soft_gate_touches_whom_the_hard_one_touches():
    scores = torch.randn(99, generator=torch.Generator().manual_seed(0))
    hard, soft = (
        ConformalGate.calibrate(scores, epsilon=0.05),
        SoftGate.calibrate(scores, epsilon=0.05, temperature=0.25),
    )
    more = torch.linspace(-3, 6, 1001)
    assert torch.equal(hard(more) > 0, soft(more) > 0) and (soft.epsilon, soft.n) == (0.05, 99)
    assert soft.threshold == pytest.approx(hard.threshold + 1.0) and soft.closed_to == hard.threshold
    assert SoftGate.calibrate(scores, epsilon=0.05, temperature=0.25, threshold=9.0).threshold == 9.0
    with pytest.raises(TooFewCalibrationError):
        SoftGate.calibrate(scores[:9], epsilon=0.05, temperature=0.25)


@torch.no_grad()
def test_a_soft_gate_multiplies_the_strength_is_saved_and_explained(model, inputs, tmp_path):
    gate = SoftGate.calibrate(torch.arange(19.0), epsilon=0.1, temperature=2.0)
    gated = make_correction(SITE, gate=gate, reader_site="blocks.0.hook_mlp_out", positions="last")
    fusion = HybridFusion(textual=(gated,))
    fusion.save(tmp_path)
    loaded = HybridFusion.load(tmp_path)
    assert loaded.textual[0].gate == gate and repair_fingerprint(loaded) == repair_fingerprint(fusion)
    told = str(fusion.explain())
    assert "SoftGate above 25 (epsilon 0.1, 19 benign prompts)" in told
    assert "half open at its threshold, temperature 2, shut up to 17" in told
    seen = []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    _, cache = model.run_with_cache(inputs, sites=["blocks.0.hook_mlp_out"])
    model.run_with_hooks(inputs, fwd_hooks=[spy, *fusion.fwd_hooks(inputs), spy])
    score = gated.reader.score(cache["blocks.0.hook_mlp_out"], inputs.spans.last)
    for row in range(len(score)):
        g = 0.0 if float(score[row]) <= 17 else 1 / (1 + math.exp(-(float(score[row]) - 25) / 2))
        real = ~inputs.spans.padding[row]
        expected = seen[0][row][real] + g * gated.writer.delta(seen[0][row][real])
        torch.testing.assert_close(seen[1][row][real], expected, atol=1e-4, rtol=1e-4)
