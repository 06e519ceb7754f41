"""The bundled model on a GPU: capture, subspaces, repairs, mediation, attacks and the four steps, against the CPU.

On a machine without a GPU all of it is skipped; ``CARE_LENS_TEST_DEVICE=cpu`` runs it on the CPU, to try the tests.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from on_device import DEVICE, exact, needs_device, require_equal

from care_lens import organism
from care_lens.attacks import pgd
from care_lens.attacks.pixels import to_pixels
from care_lens.capture import capture
from care_lens.core import PairedExamples
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import mediate
from care_lens.pipeline import RunSettings
from care_lens.pipeline.choose import choose
from care_lens.pipeline.learn import capture_fit
from care_lens.repair import ConformalGate, Correction, HybridFusion, LinearReader, Writer
from care_lens.subspace import SafetySubspace

pytestmark = needs_device
CHANNELS = ("plain", "typographic", "wrapper", "benign plain", "benign typographic")
SITE = "blocks.2.hook_resid_post"


@pytest.fixture(autouse=True)
def exactly():
    with exact():
        yield


@pytest.fixture(scope="module")
def here():
    """The bundled model on the CPU."""
    with organism.load() as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def there():
    """The same on the device, loaded as the README says."""
    with HookedLVLM.from_pretrained(organism.path(), device_map=DEVICE) as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def asked():
    return [example for channel in CHANNELS for example in organism.examples(channel, "test", n=8)]


@pytest.fixture(scope="module")
def captured(here, there):
    """Rows of benign and malicious requests from both devices: device -> (benign, malicious)."""
    kinds = [organism.examples(channel, "fit", n=40) for channel in ("benign typographic", "typographic")]
    with exact():
        held = [[capture(m, rows, [SITE], progress=False).rows(SITE, "last") for rows in kinds] for m in (here, there)]
    return held


def cosines(first, second):
    """Principal cosines of two column spans."""
    overlap = np.linalg.qr(first)[0].T @ np.linalg.qr(second)[0]
    return np.linalg.svd(overlap, compute_uv=False)


def basis(subspace):
    return subspace.basis.double().cpu().numpy()


@torch.no_grad()
def test_it_is_where_it_was_asked_for_and_answers_as_on_the_cpu(here, there, asked):
    assert there.device.type == torch.device(DEVICE).type
    inputs = there.prepare(asked)
    assert inputs.input_ids.device == there.device == inputs.pixel_values.device == inputs.spans.image.device
    expected = here.prepare(asked)
    torch.testing.assert_close(there(inputs).cpu(), here(expected), rtol=1e-3, atol=1e-3)
    assert there.generate(inputs, max_new_tokens=14).texts == here.generate(expected, max_new_tokens=14).texts


def test_load_takes_a_device_and_a_dtype(asked):
    with organism.load(device_map=DEVICE, dtype=torch.bfloat16) as lvlm:
        assert lvlm.device.type == torch.device(DEVICE).type and lvlm.dtype == torch.bfloat16
        assert len(lvlm.generate(lvlm.prepare(asked[:2]), max_new_tokens=2).texts) == 2


def test_captured_rows_are_those_of_the_cpu(captured):
    for ours, theirs in zip(captured[1], captured[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("contrast", ["covariance", "second_moment"])
def test_a_subspace_fitted_on_the_device_is_that_of_the_cpu(captured, contrast):
    options = {"rank": 6, "shrinkage": 0.1, "contrast": contrast}
    expected = SafetySubspace.fit(*captured[0], **options)
    made = SafetySubspace.fit(*(rows.to(DEVICE) for rows in captured[1]), **options)
    assert made.basis.device.type == torch.device(DEVICE).type
    assert cosines(basis(made), basis(expected)).min() > 1 - 1e-4
    np.testing.assert_allclose(made.eigenvalues.cpu(), expected.eigenvalues, rtol=1e-3)
    rows = captured[1][1]
    ours, theirs = made.apply(rows.to(DEVICE), alpha=1.0), made.to("cpu").apply(rows.cpu(), alpha=1.0)
    assert ours.device.type == torch.device(DEVICE).type
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def corrections(captured):
    """A gated and an open correction, fitted on the CPU: what is loaded from a file is there."""
    benign, malicious = (rows.cpu() for rows in captured[0])
    subspace = SafetySubspace.fit(benign, malicious, rank=6, shrinkage=0.1, contrast="covariance", site=SITE)
    reader = LinearReader.from_subspace(SafetySubspace.fit(benign, malicious, rank=1, contrast="mean", site=SITE))
    gate = ConformalGate.calibrate((benign - reader.centre) @ reader.direction, epsilon=0.1)
    writer = Writer.towards("blocks.3.hook_resid_post", target=benign.mean(0), source=malicious.mean(0), scope="last")
    return subspace, reader, gate, writer


def fusion(corrections, alpha, rule="adaptive", gate=None):
    subspace, reader, calibrated, writer = corrections
    return HybridFusion(
        visual=(Correction(writer=replace(writer, alpha=alpha), reader=reader, gate=gate or calibrated),),
        textual=(Correction.care(subspace, alpha=alpha),),
        rule=rule,
    )


@torch.no_grad()
@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "modality", "joint"])
def test_a_repair_of_strength_0_changes_no_bit_and_one_of_strength_1_acts_as_on_the_cpu(
    here, there, asked, corrections, rule
):
    inputs = there.prepare(asked)
    clean, answer = there(inputs), there.generate(inputs, max_new_tokens=5)
    with fusion(corrections, 0.0, rule).on(there):
        require_equal(there(inputs), clean)
        assert torch.equal(there.generate(inputs, max_new_tokens=5).sequences, answer.sequences)
    repair = fusion(corrections, 1.0, rule)
    with repair.on(there):
        ours, told = there(inputs), there.generate(inputs, max_new_tokens=5).sequences
    expected = here.prepare(asked)
    with repair.on(here):
        theirs, said = here(expected), here.generate(expected, max_new_tokens=5).sequences
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)
    assert (ours - clean).abs().max() > 0.1
    assert (told.cpu() == said).all(dim=1).double().mean() > 0.9  # a tie of two tokens may fall either way
    require_equal(there(inputs), clean)


@torch.no_grad()
def test_a_recording_on_the_device_is_that_of_the_cpu(here, there, asked, corrections):
    frames = []
    for model in (here, there):
        with fusion(corrections, 1.0).recording(model) as seen:
            model(model.prepare(asked[8:12]))
        frames.append(seen.to_dataframe())
    numbers = frames[0].select_dtypes("number").columns
    np.testing.assert_allclose(frames[1][numbers], frames[0][numbers], rtol=1e-3, atol=1e-3)


def test_mediation_on_the_device_is_that_of_the_cpu(here, there):
    pairs = organism.pairs("typographic", "fit")[:4]
    assert isinstance(pairs, PairedExamples)
    sites = ["vision.blocks.1.hook_resid_post", "projector.hook_out", "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z"]
    options = {"outcome": organism.outcome(), "sites": sites, "n_boot": 50, "progress": False}
    for replay in (True, False):
        found = [mediate(m, pairs, positions=("text", "last"), replay=replay, **options) for m in (here, there)]
        theirs, ours = (result.frame for result in found)
        place = ["mediator", "position", "effect"]
        assert ours[place].equals(theirs[place]) and len(ours) >= 18
        kept = theirs["effect"].isin(["TE", "NIE", "NDE", "TIE"])
        np.testing.assert_allclose(ours["value"][kept], theirs["value"][kept], rtol=1e-4, atol=1e-3)
        assert theirs["value"][kept].abs().max() > 0.1


def test_a_gradient_attack_on_the_device_finds_pictures_that_are_within_the_bound(here, there, corrections):
    rows = [replace(e, response="sure") for e in organism.examples("typographic", "test", n=4)]
    options = {"targets": ["first"], "epsilon": 16, "steps": 8, "random_start": False, "progress": False}
    ours, theirs = pgd(there, rows, **options), pgd(here, rows, **options)
    np.testing.assert_allclose(ours.clean_losses, theirs.clean_losses, rtol=1e-3, atol=1e-4)
    assert (ours.losses <= ours.clean_losses).all() and ours.losses.mean() < ours.clean_losses.mean()
    moved = (to_pixels(ours.images) - to_pixels([e.image for e in rows])).abs().amax()
    assert 0 < float(moved) <= 16
    # Signs of tiny gradients may differ between devices, the pictures with them; what they achieve hardly does.
    np.testing.assert_allclose(ours.losses.mean(), theirs.losses.mean(), rtol=0.2, atol=0.1)
    through = pgd(there, rows, repair=fusion(corrections, 1.0), **options)
    assert np.isfinite(through.losses).all()


def test_the_steps_of_the_readme_choose_a_repair_on_the_device(there):
    study = organism.study().limited(12)
    settings = replace(
        RunSettings().short(),
        limit=12,
        learn_limit=None,
        reader_ranks=(0,),
        candidates=1,
        epsilons=(0.02,),
        benign_loss=1.0,
    )
    choice = choose(there, study, capture_fit(there, study, settings), settings)
    attack = there.prepare(organism.examples("typographic", "test", n=6))
    before = there.generate(attack, max_new_tokens=14).texts
    with choice.repair.on(there):
        after = there.generate(attack, max_new_tokens=14).texts
    assert len(before) == len(after) == 6 and before != after
