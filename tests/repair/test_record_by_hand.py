"""What a recording and a trace say of every token, against plain torch hooks on a plain Hugging Face model, run over prompt and answer at once."""

import numpy as np
import pytest
import torch
from fitted import WIDTH, make_subspace

from care_lens.core import Site
from care_lens.repair import Correction, HybridFusion, LinearDecay, LinearReader, SoftGate, Writer, read_scores

READ, WRITE, NEW = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", 5
VISUAL, TEXTUAL = SoftGate(threshold=0.5, temperature=1.0), SoftGate(threshold=0.2, temperature=2.0)
ALPHAS = (1.0, 0.5)


def reader(seed, positions):
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return LinearReader(
        site=Site.parse(READ), direction=direction, centre=torch.zeros(WIDTH), positions=positions, pooling="max"
    )


@pytest.fixture(scope="module")
def readers():
    return reader(3, "image"), reader(4, ("text", "generated"))


@pytest.fixture(scope="module")
def subspaces():
    return make_subspace(WRITE, modality="visual", seed=1), make_subspace(WRITE, modality="textual", seed=2)


def fusion(readers, subspaces, *, alphas=ALPHAS, gates=(VISUAL, TEXTUAL)):
    schedules = (LinearDecay(tokens=4, end=0.25), None)
    sides = [
        Correction(
            writer=Writer.from_subspace(subspace, alpha=alpha), reader=read, gate=gate, schedule=schedule,
            modality=subspace.modality,
        )
        for subspace, alpha, read, gate, schedule in zip(subspaces, alphas, readers, gates, schedules, strict=True)
    ]  # fmt: skip
    return HybridFusion(visual=(sides[0],), textual=(sides[1],))


def blocks_of(plain):
    return next(m for name, m in plain.named_modules() if name.endswith("language_model.layers"))


def run(plain, inputs, answer, hooks):
    """Logits [pos, vocab] of one prompt with the beginning of its answer, with functions of the stream after a block."""
    ids = torch.cat([inputs.input_ids, torch.tensor([answer], dtype=torch.long)], dim=1)
    given = {"pixel_values": inputs.pixel_values} if inputs.pixel_values is not None else {}

    def on(block, function):
        def hook(module, args, output):
            new = function((output[0] if isinstance(output, tuple) else output)[0])
            if new is None:
                return None
            return (new[None], *output[1:]) if isinstance(output, tuple) else new[None]

        return blocks_of(plain)[block].register_forward_hook(hook)

    handles = [on(block, function) for block, function in hooks]
    try:
        with torch.no_grad():
            return plain(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def running(scores, n):
    """The score that stands at each token: that of the whole prompt in it, and the largest so far in the answer."""
    prompt = scores[:n].max()
    return torch.cat(
        [prompt.repeat(n), torch.maximum(scores[n:].cummax(0).values, prompt) if len(scores) > n else scores[n:]]
    )


def scores_of(stream, readers, image):
    """[2, pos] own scores; -inf where a reader does not look."""
    seen, said = ((stream.double() @ one.direction.double()) for one in readers)
    return torch.stack([torch.where(image, seen, -torch.inf), torch.where(~image, said, -torch.inf)])


def edit_of(stream, standing, n, subspaces):
    """What is recorded of every token, and the edit [pos, d]: all from the formula."""
    x, step = stream.double(), (torch.arange(len(stream)).double() - n + 1).clamp(min=0)
    gates = [
        torch.sigmoid((score - gate.threshold) / gate.temperature)
        for score, gate in zip(standing, (VISUAL, TEXTUAL), strict=True)
    ]
    strengths = [gates[0] * (1 - 0.75 * (step / 4).clamp(max=1)), gates[1]]
    units = [
        -s[:, None] * ((x - one.mean_benign.double()) @ (one.write.double() @ one.left.double().T).T)
        for s, one in zip(strengths, subspaces, strict=True)
    ]
    visual, textual = (unit.norm(dim=1) for unit in units)
    weight = torch.where(visual + textual > 0, visual / (visual + textual), 0.0)
    edit = weight[:, None] * ALPHAS[0] * units[0] + (1 - weight)[:, None] * ALPHAS[1] * units[1]
    return edit, {
        "gate_visual": gates[0], "gate_textual": gates[1],
        "strength_visual": ALPHAS[0] * strengths[0], "strength_textual": ALPHAS[1] * strengths[1],
        "weight_visual": weight, "weight_textual": 1 - weight, "edit_norm": edit.norm(dim=1),
    }  # fmt: skip


def test_gates_weights_and_norms_of_every_token_of_prompt_and_answer(model, llava_maker, examples, readers, subspaces):
    plain, repair = llava_maker("clip")[0], fusion(readers, subspaces)
    inputs = model.prepare(examples)
    with torch.no_grad(), repair.recording(model) as seen:
        made = model.generate(inputs, max_new_tokens=NEW, do_sample=False)
    frame = seen.to_dataframe()
    acted = 0.0
    for row, example in enumerate(examples):
        alone, here = model.prepare([example]), frame[frame.row == row].sort_values("position")
        n, held = alone.input_ids.shape[1], {}
        answer = made.sequences[row, -NEW:].tolist()[: len(here) - n]
        image = torch.cat([alone.spans.image[0], torch.zeros(len(answer), dtype=torch.bool)])

        def look(stream, held=held, image=image, n=n):
            held["standing"] = [running(one, n) for one in scores_of(stream, readers, image)]

        def write(stream, held=held, n=n):
            edit, held["told"] = edit_of(stream, held["standing"], n, subspaces)
            return (stream.double() + edit).to(stream.dtype)

        logits = run(plain, alone, answer, [(0, look), (1, write)])
        assert logits.argmax(-1)[n - 1 : -1].tolist() == answer
        for name, expected in held["told"].items():
            np.testing.assert_allclose(here[name].to_numpy(), expected.numpy(), atol=2e-4, rtol=1e-4, err_msg=name)
        assert here.span.tolist() == [
            "generated" if at >= n else "image" if there else "text" for at, there in enumerate(image.tolist())
        ]
        acted = max(acted, float(here.edit_norm.max()))
        assert len(seen.plot(row=row).data) >= 5
    assert acted > 0.1


def test_a_trace_is_what_the_stream_holds(model, llava_maker, examples, readers):
    plain = llava_maker("clip")[0]
    trace = read_scores(model, examples, list(readers), max_new_tokens=NEW, trace=True, progress=False)
    for row, example in enumerate(examples):
        alone = model.prepare([example])
        n, found = alone.input_ids.shape[1], trace.rows[row]
        given = {"pixel_values": alone.pixel_values} if alone.pixel_values is not None else {}
        ids = plain.generate(
            input_ids=alone.input_ids,
            attention_mask=torch.ones_like(alone.input_ids),
            **given,
            max_new_tokens=NEW,
            do_sample=False,
        )
        answer = ids[0, n : found.own.shape[1]].tolist()
        image, held = torch.cat([alone.spans.image[0], torch.zeros(len(answer), dtype=torch.bool)]), {}
        run(plain, alone, answer, [(0, lambda stream, held=held: held.update(stream=stream.clone()))])
        own = scores_of(held["stream"], readers, image)
        torch.testing.assert_close(found.own.double(), own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            found.score.double(), torch.stack([running(one, n) for one in own]), atol=1e-4, rtol=1e-4
        )


def test_what_does_nothing_leaves_every_bit_of_an_attached_models_scores(
    llava_maker, examples, readers, subspaces, model
):
    (bare, _), (attached, processor) = llava_maker("clip"), llava_maker("clip")
    shut = SoftGate(threshold=0.0, temperature=1.0, closed_to=1e9)
    batch = model.prepare(examples)
    options = {
        **batch.model_kwargs(), "max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = bare.generate(**options)
    attached.generate(**options)  # transformers puts hooks of its own on a model that is run
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in attached.modules()]
    outer = fusion(readers, subspaces, alphas=(0.0, 0.0)).attach(attached, processor)
    with fusion(readers, subspaces, gates=(shut, shut)).attach(attached, processor):
        found = attached.generate(**options)
        with pytest.raises(ValueError, match="num_beams must be 1"):
            attached.generate(**options, num_beams=2)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, expected.scores, strict=True))
    with pytest.raises(KeyError), fusion(readers, subspaces).attach(attached, processor):
        changed = attached.generate(**options)
        raise KeyError
    assert not torch.equal(changed.scores[0], expected.scores[0])
    assert torch.equal(attached.generate(**options).scores[-1], expected.scores[-1])
    outer.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in attached.modules()] == hooks
