"""The joint rule, weights for each row, and the record of a repair at work."""

import dataclasses

import pytest
import torch
from fitted import make_correction, make_subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from unchecking import unchecked

from care_lens.repair import ConformalGate, Correction, HybridFusion, RepairError, Writer
from care_lens.repair.fuse import GatedWriter, joint_edit

SITE = "blocks.1.hook_resid_post"
OPEN, SHUT = (ConformalGate(threshold=t, epsilon=0.1, n=9) for t in (-1.0, 1e9))


def pair(**options):
    return HybridFusion(visual=(make_correction(seed=1),), textual=(make_correction(seed=2),), **options)


@pytest.mark.parametrize("projection", ["orthogonal", "oblique"])
@given(seed=st.integers(0, 10**6), overlap=st.integers(0, 3), alpha=st.sampled_from([0.5, 1.0]))
@settings(max_examples=12, deadline=None)
def test_joint_edit_is_the_projection_onto_the_span_of_both(projection, seed, overlap, alpha):
    rng = torch.Generator().manual_seed(seed)
    seen = Writer.from_subspace(make_subspace(seed=seed % 97, projection="orthogonal"), alpha=alpha)
    said = Writer.from_subspace(make_subspace(seed=seed % 97 + 100, projection="orthogonal"), alpha=alpha)
    if overlap:  # some directions of one are those of the other
        basis = torch.linalg.qr(torch.cat([seen.write[:, :overlap], said.write[:, overlap:]], dim=1)).Q
        said = dataclasses.replace(said, write=basis, left=basis)
    if projection == "oblique":
        seen, said = (
            dataclasses.replace(w, left=w.write + torch.linalg.qr(w.write, mode="complete").Q[:, -3:] * 0.3)
            for w in (seen, said)
        )
    h = torch.randn(2, 4, 32, generator=rng) * 3
    image = torch.tensor([[True, True, False, False]] * 2)
    edit = joint_edit(h, [GatedWriter(seen, torch.ones(2, 4))], [GatedWriter(said, torch.ones(2, 4))], image=image)
    after = h + edit
    target = torch.where(image[..., None], seen.target, said.target).to(h)
    if projection == "orthogonal":
        q, s, _ = torch.linalg.svd(torch.cat([seen.write, said.write], dim=1).double(), full_matrices=False)
        q = q[:, s > 1e-4]
        expected = -alpha * (h.double() - target) @ q @ q.T
        torch.testing.assert_close(edit.double(), expected, atol=1e-4, rtol=1e-3)
    if overlap == 0:  # all coordinates of both arrive together
        for writer in (seen, said):
            gap, before = (after - target) @ writer.left.float(), (h - target) @ writer.left.float()
            torch.testing.assert_close(gap, (1 - alpha) * before, atol=2e-3, rtol=2e-3)


def test_joint_differs_from_a_sum_where_directions_overlap(model, inputs):
    one = make_correction(seed=1)
    twice = HybridFusion(visual=(one,), textual=(one,), rule="joint")
    with torch.no_grad():
        with HybridFusion(visual=(one,)).on(model):
            alone = model(inputs)
        with twice.on(model):
            joint = model(inputs)
        with dataclasses.replace(twice, rule="parallel", weights=(1.0, 1.0)).on(model):
            summed = model(inputs)
    torch.testing.assert_close(joint, alone, atol=1e-4, rtol=1e-4)
    assert float((summed - alone).abs().max()) > 0.1


def test_joint_refuses_what_is_no_single_projection():
    with pytest.raises(RepairError, match="one correction per modality"):
        HybridFusion(visual=(make_correction(seed=1), make_correction(seed=3)), rule="joint")
    with pytest.raises(RepairError, match="one alpha"):
        HybridFusion(visual=(make_correction(seed=1, alpha=0.5),), textual=(make_correction(seed=2),), rule="joint")
    with unchecked(), pytest.raises(RepairError, match="weighting"):
        pair(weighting="row")
    with pytest.raises(RepairError, match="adaptive"):
        pair(rule="parallel", weighting="sample")


def test_weights_for_each_row_are_those_of_the_formula(model, inputs):
    fusion = pair(weighting="sample")
    visual, textual = (c.writer for c in fusion.corrections)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[SITE])
        with fusion.recording(model) as seen:
            model(inputs)
    h, spans = cache[SITE], inputs.spans
    asked = (~spans.padding & ~spans.response)[..., None]
    v, t = ((w.delta(h) * asked).flatten(1).norm(dim=1) for w in (visual, textual))
    expected = v / (v + t)
    frame = seen.to_dataframe()
    for row in range(len(h)):
        weights = frame[frame.row == row].weight_visual
        assert weights.to_numpy() == pytest.approx(float(expected[row]), abs=1e-5)
    assert len(set(expected.tolist())) == len(expected)


def test_the_row_weight_holds_for_generated_tokens(model, inputs):
    with pair(weighting="sample").recording(model) as seen:
        model.generate(inputs, max_new_tokens=4)
    frame = seen.to_dataframe()
    assert {"generated"} < set(frame.span)
    spread = frame.groupby("row").weight_visual.agg(lambda w: w.max() - w.min())
    assert float(spread.max()) < 1e-6
    with pair().recording(model) as each:
        model.generate(inputs, max_new_tokens=4)
    assert float(each.to_dataframe().groupby("row").weight_visual.std().min()) > 1e-3


def test_an_answer_that_is_given_has_no_part_in_the_row_weight(model, examples):
    answered = [dataclasses.replace(example, response="yes it is") for example in examples]
    fusion = pair(weighting="sample")
    with torch.no_grad():
        with fusion.recording(model) as asked:
            model(model.prepare(examples))
        with fusion.recording(model) as told:
            model(model.prepare(answered, responses=True))
    before, after = (seen.to_dataframe().groupby("row").weight_visual.agg(["min", "max"]) for seen in (asked, told))
    assert "generated" in set(told.to_dataframe().span)
    assert (after["max"] - after["min"]).max() < 1e-6
    assert after["max"].to_numpy() == pytest.approx(before["max"].to_numpy(), abs=1e-5)


def test_rows_whose_prompt_is_not_edited_have_the_weights_of_their_tokens(model, inputs):
    frames = []
    for weighting in ("sample", "token"):
        with pair(weighting=weighting, scope="generated").recording(model) as seen:
            model.generate(inputs, max_new_tokens=4)
        frames.append(seen.to_dataframe())
    sample, token = frames
    new = sample.span == "generated"
    assert sample.edit_norm[new].min() > 0 and sample.edit_norm[~new].max() == 0
    assert sample.weight_visual.to_numpy() == pytest.approx(token.weight_visual.to_numpy(), abs=1e-6)


def test_positions_of_the_record_count_each_token_once(model, inputs):
    with pair().recording(model) as seen:
        new = model.generate(inputs, max_new_tokens=4, min_new_tokens=4).new_tokens
    lengths = (~inputs.spans.padding).sum(dim=1)
    for row, frame in seen.to_dataframe().groupby("row"):
        asked = int(lengths[row])
        steps = new.shape[1] - 1  # the last token is given to nobody
        assert frame.position.tolist() == list(range(asked + steps))
        assert frame.span.tolist()[asked:] == ["generated"] * steps


def test_the_record_ends_where_a_row_s_answer_does(model, inputs):
    """The end of an answer and the padding after it are no tokens of it, as in a trace of scores."""
    settings = model.hf_model.generation_config
    before = settings.eos_token_id
    with pair().on(model):
        plain = model.generate(inputs, max_new_tokens=6, min_new_tokens=6).new_tokens
    # A token at which answers end at different places; -1 where a row has none.
    places = {t: [row.tolist().index(t) if t in row else -1 for row in plain] for t in plain.unique().tolist()}
    end = max(places, key=lambda t: (len(set(places[t])), max(places[t])))
    try:
        with pair().recording(model) as seen:
            settings.eos_token_id = end
            new = model.generate(inputs, max_new_tokens=6).new_tokens
            frame = seen.to_dataframe()
    finally:
        settings.eos_token_id = before
    ends = [(row == end).nonzero()[:, 0].tolist() for row in new]
    expected = [min(found[0] if found else len(row), len(row) - 1) for found, row in zip(ends, new, strict=True)]
    assert len(set(expected)) > 1, "answers must end apart"
    assert [int(((frame.row == row) & (frame.span == "generated")).sum()) for row in range(len(new))] == expected


def test_the_heat_map_shows_the_image_tokens(model, inputs):
    with torch.no_grad(), pair().recording(model) as seen:
        model(inputs)
    frame = seen.to_dataframe()
    row = int((inputs.spans.padding.sum(dim=1) * inputs.spans.image.any(dim=1)).argmax())
    assert int(inputs.spans.padding[row].sum()) > 0  # what stands before the row must not shift the picture
    shown = [trace.z for trace in seen.plot(row=row).data if trace.type == "heatmap"]
    here = frame[(frame.row == row) & (frame.span == "image")].sort_values("position")
    assert shown[0].flatten() == pytest.approx(here.edit_norm.to_numpy())


def test_the_record_is_what_was_done_and_changes_nothing(model, inputs):
    gated = dataclasses.replace(pair().visual[0], reader=make_correction(seed=1, gate=SHUT).reader, gate=SHUT)
    fusion = HybridFusion(visual=(gated,), textual=(make_correction(seed=2),))
    changed = []
    with torch.no_grad():
        with fusion.on(model):
            expected = model(inputs)
        keep = (SITE, lambda a, hook: changed.append(a.clone()))
        model.run_with_hooks(inputs, fwd_hooks=[keep, *fusion.fwd_hooks(inputs), keep])
        with fusion.recording(model) as seen:
            assert torch.equal(model(inputs), expected)
    frame = seen.to_dataframe()
    real = ~inputs.spans.padding
    norms = (changed[1] - changed[0]).norm(dim=-1)
    assert len(frame) == int(real.sum())
    for row in range(len(norms)):
        here = frame[frame.row == row].sort_values("position")
        assert here.edit_norm.to_numpy() == pytest.approx(norms[row][real[row]].numpy(), rel=1e-3, abs=1e-4)
        assert (here.span == "image").sum() == int(inputs.spans.image[row].sum())
    assert float(frame.gate_visual.max()) == 0 and float(frame.gate_textual.min()) == 1
    assert float(frame.weight_visual.max()) == 0 and float(frame.weight_textual.min()) == 1
    figure = seen.plot(row=0)
    assert sum(trace.type == "heatmap" for trace in figure.data) == len(inputs.spans.grids[0])
    with pytest.raises(RepairError, match="row 99"):
        seen.plot(row=99)


def test_nothing_is_recorded_after_the_block(model, inputs):
    with pair().recording(model) as seen:
        pass
    with torch.no_grad():
        model(inputs)
    assert len(seen) == 0 and seen.to_dataframe().empty
    with pytest.raises(RepairError, match="inside the block"):
        seen.plot()


def test_corrections_survive_the_file(tmp_path):
    for fusion in (pair(rule="joint"), pair(weighting="sample")):
        fusion.save(tmp_path / fusion.rule)
        loaded = HybridFusion.load(tmp_path / fusion.rule)
        assert (loaded.rule, loaded.weighting) == (fusion.rule, fusion.weighting)
        assert isinstance(loaded.visual[0], Correction)
