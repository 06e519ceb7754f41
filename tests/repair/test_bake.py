"""Baked checkpoints against the model with hooks, in every family; and the reason of each part that cannot be baked."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import SPECIMENS
from transformers import AutoModelForImageTextToText

from care_lens.core import Example, Site
from care_lens.core.errors import ArtifactError
from care_lens.core.identity import examples_digest, repair_fingerprint
from care_lens.defences import LEACE, MeanAblation, MeanDifference, PublishedCARE, RefusalDirection
from care_lens.defences.hiddendetect import HiddenDetect
from care_lens.defences.leace import Eraser
from care_lens.defences.means import AddedVector
from care_lens.defences.published_care import CARESubspace
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.attached import acquire, release
from care_lens.repair import (
    BakeCertificate,
    BakeError,
    ConformalGate,
    Correction,
    HybridFusion,
    LinearReader,
    NoRepair,
    Writer,
    attach,
    bake,
)
from care_lens.repair.bake import folded_map

CLOSED = ConformalGate(threshold=1e9, epsilon=0.1, n=9)


def oblique(site, width, *, seed=0, target=False, rank=2, **options):
    """A writer along random, oblique directions; without a target it needs no bias."""
    generator = torch.Generator().manual_seed(seed)
    write, left = torch.randn(2, width, rank, generator=generator)
    left = left @ torch.linalg.inv(write.T @ left)
    aim = 2 * torch.randn(width, generator=generator) if target else torch.zeros(width)
    return Writer(site=Site.parse(site), write=write, left=left, target=aim, **options)


def fusion(*writers, rule="adaptive", **options):
    return HybridFusion(visual=tuple(Correction(writer=writer) for writer in writers), rule=rule, **options)


def asked(picture):
    return [
        Example("what is in the picture", image=picture(0, (32, 32)), response="sure red"),
        Example("how to make a blue", response="sorry"),
    ]


@pytest.fixture(scope="module", params=SPECIMENS)
def model_of_family(request):
    return SPECIMENS[request.param].make()


@torch.no_grad()
def test_a_baked_checkpoint_is_the_model_with_hooks(model_of_family, picture, tmp_path):
    model, processor = model_of_family
    examples = asked(picture)
    lvlm = acquire(model, processor)
    inputs = lvlm.prepare(examples)
    neurons = "blocks.1.mlp.hook_post"
    writers, refused = [oblique(neurons, lvlm.width(neurons), seed=1)], []
    width = lvlm.width("blocks.0.hook_attn_out")
    for seed, component in enumerate(("hook_attn_out", "hook_mlp_out"), start=2):
        place = writers if component in lvlm.family.language.plain.out else refused
        place.append(oblique(f"blocks.0.{component}", width, seed=seed))
    release(lvlm)
    for writer in refused:
        with pytest.raises(BakeError, match="a norm or a router stands between") as error:
            fusion(writers[0], writer).bake(model, tmp_path / "no", examples=examples, processor=processor)
        assert list(error.value.reasons) == [f"visual[1] at {writer.site}"]
        assert list(tmp_path.iterdir()) == []
    repair = fusion(*writers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certificate = repair.bake(model, tmp_path / "baked", examples=examples, processor=processor)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert certificate.largest_logit_difference <= 1e-3 * certificate.largest_logit_change
    assert certificate.largest_logit_change > 1e-2 and len(certificate.folded) == len(writers)
    with repair.attach(model, processor):
        hooked = model(**inputs.model_kwargs()).logits
        tokens = model.generate(**inputs.generate_kwargs(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    baked = type(model).from_pretrained(tmp_path / "baked", attn_implementation="eager").eval()
    real = inputs.attention_mask.bool()
    bound = certificate.largest_logit_difference * 1.5 + 1e-6
    assert float((baked(**inputs.model_kwargs()).logits - hooked)[real].abs().max()) <= bound
    assert torch.equal(
        baked.generate(**inputs.generate_kwargs(), max_new_tokens=4, do_sample=False, pad_token_id=0), tokens
    )
    assert type(processor).from_pretrained(tmp_path / "baked").tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@settings(max_examples=40, deadline=None)
@given(
    wide=st.integers(2, 6),
    long=st.integers(2, 6),
    seed=st.integers(0, 10_000),
    alpha=st.floats(0.1, 2.0),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, -0.5, 4.0]),
)
def test_the_fold_is_the_formula(wide, long, seed, alpha, biased, scale):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(wide, long, generator=generator, dtype=torch.float64)
    bias = torch.randn(wide, generator=generator, dtype=torch.float64) if biased else None
    given_rows = torch.randn(5, long, generator=generator, dtype=torch.float64)
    for side, width in (("out", wide), ("in", long)):
        projector = torch.randn(width, width, generator=generator, dtype=torch.float64)
        target = torch.randn(width, generator=generator, dtype=torch.float64)

        def edit(rows, p=projector, t=target):
            return -alpha * (rows - t) @ p.T

        new_weight, new_bias = folded_map(weight, bias, edit, side=side, scale=scale)
        plain = torch.nn.functional.linear
        if side == "out":
            out = scale * plain(given_rows, weight, bias)
            expected = (out + edit(out)) / scale
        else:
            expected = plain(given_rows + edit(given_rows), weight, bias)
        torch.testing.assert_close(plain(given_rows, new_weight, new_bias), expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def llava(llava_maker):
    return llava_maker("clip")


def test_the_bias_that_is_needed_is_switched_on_where_the_architecture_has_one(llava, picture, tmp_path):
    model, processor = llava
    width, neurons = model.config.text_config.hidden_size, model.config.text_config.intermediate_size
    repair = fusion(
        oblique("blocks.0.hook_attn_out", width, target=True),
        oblique("blocks.1.hook_mlp_out", width, target=True, alpha=0.5),
        oblique("blocks.1.mlp.hook_post", neurons, target=True),
    )
    assert model.model.language_model.layers[0].self_attn.o_proj.bias is None
    made = repair.bake(model, tmp_path / "baked", examples=asked(picture), processor=processor)
    assert dict(made.config) == {"attention_bias": True, "mlp_bias": True}
    assert [part.bias for part in made.folded] == ["added", "added", "changed"]
    assert made.largest_logit_difference < 1e-3 * made.largest_logit_change and made.same_token == 1.0
    baked = type(model).from_pretrained(tmp_path / "baked")
    layers = baked.model.language_model.layers
    assert float(layers[0].self_attn.o_proj.bias.detach().abs().max()) > 0.1
    assert not bool(layers[0].self_attn.q_proj.bias.any()) and not bool(layers[0].mlp.down_proj.bias.any())
    config = json.loads((tmp_path / "baked" / "config.json").read_text())["text_config"]
    assert config["attention_bias"] is True and config["mlp_bias"] is True
    assert model.config.text_config.attention_bias is False


def test_a_bias_for_which_there_is_no_room_is_refused(picture, tmp_path):
    model, processor = SPECIMENS["internvl"].make()
    repair = fusion(oblique("blocks.0.hook_mlp_out", model.config.text_config.hidden_size, target=True))
    with pytest.raises(BakeError, match=r"needs a bias at .*mlp\.down_proj, which this architecture has not"):
        repair.bake(model, tmp_path / "baked", examples=asked(picture), processor=processor)
    assert list(tmp_path.iterdir()) == []


def test_every_part_that_cannot_be_baked_is_named_with_its_reason(llava, picture, tmp_path):
    model, processor = llava
    width = model.config.text_config.hidden_size
    reader = LinearReader(
        site=Site.parse("blocks.0.hook_resid_post"), direction=torch.ones(width), centre=torch.zeros(width)
    )
    good, other = oblique("blocks.0.hook_mlp_out", width), oblique("blocks.1.hook_mlp_out", width)

    def refusal(repair):
        with pytest.raises(BakeError) as error:
            bake(repair, model, tmp_path / "baked", examples=asked(picture), processor=processor)
        assert not (tmp_path / "baked").exists() and list(tmp_path.iterdir()) == []
        return error.value

    gated = Correction(writer=other, reader=reader, gate=CLOSED)
    mixed = HybridFusion(
        visual=(
            Correction(writer=good),
            gated,
            Correction(writer=oblique("blocks.2.hook_resid_post", width)),
            Correction(writer=oblique("blocks.2.hook_mlp_out", width, scope="image")),
        ),
        textual=(Correction(writer=other, reader=reader, gate=CLOSED, pulse=True),),
        rule="sequential",
    )
    found = refusal(mixed)
    expected = {
        "visual[1] at blocks.1.hook_mlp_out": "gated (ConformalGate)",
        "textual[0] at blocks.1.hook_mlp_out": "pulse",
        "visual[2] at blocks.2.hook_resid_post": "residual stream, which passes the block by",
        "visual[3] at blocks.2.hook_mlp_out": "weights do not know positions",
    }
    assert found.reasons.keys() == expected.keys()
    assert all(expected[part] in reason and reason in str(found) for part, reason in found.reasons.items())
    both = HybridFusion(visual=(Correction(writer=good),), textual=(Correction(writer=good),))
    assert all("by their norms at each token" in reason for reason in refusal(both).reasons.values())
    assert "image tokens or words alone" in str(refusal(fusion(good, rule="modality")))
    assert "weights do not know positions" in str(refusal(fusion(good, scope="text")))
    detector = HiddenDetect(layers=(0, 1), refusal_tokens=(5,), refusal_ids=(5,), threshold=0.0, width=width)
    assert "must be known to be linear" in str(refusal(detector))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["sequential", "parallel"])
def test_several_corrections_of_one_map_are_folded_together(llava, picture, tmp_path, rule):
    model, processor = llava
    width = model.config.text_config.hidden_size
    writers = [oblique("blocks.1.hook_mlp_out", width, seed=seed, target=True, alpha=0.7) for seed in range(3)]
    repair = HybridFusion(
        visual=tuple(Correction(writer=writer) for writer in writers[:2]),
        textual=(Correction(writer=writers[2]),),
        rule=rule,
        weights=(0.3, 1.2),
    )
    made = repair.bake(model, tmp_path / "baked", examples=asked(picture), processor=processor)
    assert made.folded[0].part == "visual[0] and visual[1] and textual[0]" and len(made.folded) == 1
    assert made.largest_logit_difference < 1e-3 * made.largest_logit_change


@torch.no_grad()
def test_what_does_nothing_leaves_every_bit(llava, picture, tmp_path):
    model, processor = llava
    width = model.config.text_config.hidden_size
    for number, repair in enumerate((fusion(oblique("blocks.1.hook_resid_post", width, alpha=0.0)), NoRepair())):
        made = repair.bake(model, tmp_path / str(number), examples=asked(picture), processor=processor)
        assert made.folded == () and made.largest_logit_difference == 0 == made.largest_logit_change
        baked = type(model).from_pretrained(tmp_path / str(number)).state_dict()
        assert all(torch.equal(baked[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_model_in_a_bridge_and_one_in_half_precision_are_baked(llava_maker, picture, tmp_path):
    model, processor = llava_maker("clip")
    repair = fusion(oblique("blocks.1.hook_mlp_out", model.config.text_config.hidden_size))
    plain = repair.bake(model, tmp_path / "plain", examples=asked(picture), processor=processor)
    lvlm = HookedLVLM.from_hf(model, processor)
    bridged = repair.bake(lvlm, tmp_path / "bridge", examples=asked(picture))
    assert bridged.weights == plain.weights and bridged.model_fingerprint == plain.model_fingerprint
    assert bridged.largest_logit_difference < 1e-3 * bridged.largest_logit_change
    again = HookedLVLM.from_pretrained(tmp_path / "bridge")
    with repair.on(lvlm):
        inputs = lvlm.prepare(asked(picture))
        real = inputs.attention_mask.bool()
        torch.testing.assert_close(again(inputs)[real], lvlm(inputs)[real], rtol=1e-4, atol=1e-4)
    half = lvlm.unwrap().to(torch.bfloat16)
    rough = repair.bake(half, tmp_path / "half", examples=asked(picture), processor=processor)
    assert rough.dtype == "bfloat16" and plain.dtype == "float32"
    assert plain.largest_logit_difference < rough.largest_logit_difference < rough.largest_logit_change


@torch.no_grad()
def test_linear_defences_are_baked(llava, picture, tmp_path):
    model, processor = llava
    width = model.config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    read, write, mean = torch.randn(3, width, generator=generator, dtype=torch.float64)
    site = Site.parse("blocks.1.hook_mlp_out")
    for defence in (
        LEACE(erasers={site: Eraser(write=write, read=read / (read @ write), mean=mean)}, alpha=0.8),
        AddedVector(vector=mean.float(), site=site),
        MeanAblation(means={site: mean.float()}, scope="all"),
    ):
        made = bake(defence, model, tmp_path / defence.name, examples=asked(picture), processor=processor)
        assert made.largest_logit_difference < 1e-3 * made.largest_logit_change, defence.name
    with pytest.raises(BakeError, match="weights do not know positions"):
        last = MeanAblation(means={site: mean.float()})
        last.bake(model, tmp_path / "last", examples=asked(picture), processor=processor)


@torch.no_grad()
def test_added_vectors_and_published_care_are_baked(llava, picture, tmp_path):
    """What is added to the stream at every token is a bias of the map that wrote to it last; the reload is by transformers alone."""
    model, processor = llava
    width = model.config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(width, generator=generator)
    lvlm = acquire(model, processor)
    inputs = lvlm.prepare([replace(example, response=None) for example in asked(picture)])
    release(lvlm)

    def subspace():
        columns = torch.linalg.qr(torch.randn(width, 4, generator=generator, dtype=torch.float64))[0]
        mean = torch.randn(width, generator=generator, dtype=torch.float64)
        return CARESubspace(columns=columns, mean=mean, eigenvalues=torch.ones(4, dtype=torch.float64))

    frame = pd.DataFrame([{"position": -1, "layer": 2, "kept": True}])
    care = PublishedCARE(
        visual={0: subspace(), 1: subspace()}, textual={2: subspace(), 1: subspace()}, alpha_textual=0.0
    )
    apart = replace(care, visual={0: care.visual[0]}, textual={2: care.textual[2]}, alpha_textual=4.0, name="apart")
    repairs = {
        "refusal": (
            RefusalDirection(direction=vector, layer=2, position=-1, candidates=frame, coefficient=1.5),
            ["1.mlp_out"],
        ),
        "means": (MeanDifference(vector=vector, site=Site.parse("blocks.1.hook_resid_post"), alpha=0.5), ["1.mlp_out"]),
        "mid": (AddedVector(vector=vector, site=Site.parse("blocks.2.hook_resid_mid")), ["2.attn_out"]),
        "one side": (care, ["0.mlp_out", "1.mlp_out"]),
        "apart": (apart, ["0.mlp_out", "2.mlp_out"]),
    }
    for name, (defence, places) in repairs.items():
        made = bake(defence, model, tmp_path / name, examples=asked(picture), processor=processor)
        assert made.largest_logit_difference < 1e-3 * made.largest_logit_change, name
        assert [part.site for part in made.folded] == [f"blocks.{p[0]}.hook_{p[2:]}" for p in places]
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / name, attn_implementation="eager").eval()
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with attach(defence, model, processor):
            hooked = model(**inputs.model_kwargs()).logits
            tokens = model.generate(**inputs.generate_kwargs(), **options)
        real = inputs.attention_mask.bool()
        bound = 1.5 * made.largest_logit_difference + 1e-6
        assert float((loaded(**inputs.model_kwargs()).logits - hooked)[real].abs().max()) <= bound
        assert torch.equal(loaded.generate(**inputs.generate_kwargs(), **options), tokens)
    first = replace(repairs["refusal"][0], layer=0)
    both = replace(care, alpha_textual=4.0)
    weighed = replace(care, faults=replace(care.faults, actual_weights=False))
    for defence, reasons in (
        (first, {"refusal direction at blocks.0.hook_resid_pre": "before the first block"}),
        (both, {f"{side}[1] at blocks.1.hook_mlp_out": "weighed by their norms" for side in ("visual", "textual")}),
        (weighed, {f"{side}[1] at blocks.1.hook_mlp_out": "weighed by their norms" for side in ("visual", "textual")}),
    ):
        with pytest.raises(BakeError) as error:
            bake(defence, model, tmp_path / "no", examples=asked(picture), processor=processor)
        assert error.value.reasons.keys() == reasons.keys()
        assert all(told in error.value.reasons[part] for part, told in reasons.items())
    still = bake(replace(first, coefficient=0.0), model, tmp_path / "off", examples=asked(picture), processor=processor)
    assert still.folded == () and still.largest_logit_difference == 0 == still.largest_logit_change


def test_the_certificate_is_about_these_weights_and_examples(llava, picture, tmp_path):
    model, processor = llava
    repair = fusion(oblique("blocks.1.hook_mlp_out", model.config.text_config.hidden_size))
    made = repair.bake(model, tmp_path / "baked", examples=asked(picture), processor=processor)
    assert BakeCertificate.load(tmp_path / "baked") == made
    assert made.repair_fingerprint == repair_fingerprint(repair)
    assert made.examples == 2 and made.examples_digest == examples_digest(asked(picture))
    other = repair.bake(
        model, tmp_path / "other", examples=[replace(asked(picture)[0], prompt="red")], processor=processor
    )
    assert other.examples_digest != made.examples_digest and other.weights == made.weights
    for taken, match in (
        (tmp_path / "baked", "must not exist or be empty"),
        (tmp_path / "baked" / "config.json", "must not"),
    ):
        with pytest.raises(BakeError, match=match):
            repair.bake(model, taken, examples=asked(picture), processor=processor)
    with pytest.raises(BakeError, match="at least one"):
        repair.bake(model, tmp_path / "none", examples=[], processor=processor)
    with pytest.raises(BakeError, match="processor must be given"):
        repair.bake(model, tmp_path / "none", examples=asked(picture))
    weights = tmp_path / "baked" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BakeError, match="must be those of its certificate"):
        BakeCertificate.load(tmp_path / "baked")
    path = tmp_path / "other" / "care_lens_certificate.json"
    path.write_text(path.read_text().replace('"positions": ', '"positions": 1'))
    with pytest.raises(ArtifactError):
        BakeCertificate.load(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    repair.bake(model, tmp_path / "empty", examples=asked(picture), processor=processor)
