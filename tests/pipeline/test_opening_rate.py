"""How often a gate opens is counted alike beside the answers and from them."""

from dataclasses import replace

import pytest
import torch

from care_lens import organism
from care_lens.core import Site
from care_lens.evaluation import GenerationStore, generate_all
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline import RunSettings
from care_lens.pipeline.prove import opening_rate
from care_lens.repair import ConformalGate, Correction, HybridFusion, LinearReader, Writer, read_scores


def test_a_run_that_was_stopped_before_it_counts_as_one_that_was_not(tmp_path):
    """A score above the threshold where nothing is edited counts in neither."""
    settings = replace(RunSettings(), max_new_tokens=3, batch_size=16, n_boot=50)
    study = organism.study().limited(1)
    benign = [replace(e, channel=c) for c, some in study.channels("test", harmful=False).items() for e in some]
    options = {"max_new_tokens": 3, "progress": False, "batch_size": 16}
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        site = Site.parse("blocks.1.hook_resid_post")
        row = torch.randn(lvlm.hf_model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
        reader = LinearReader(site=site, direction=row, centre=0 * row, positions="generated")
        scores = read_scores(lvlm, benign, [reader], max_new_tokens=3, progress=False).amax(1)
        gate = ConformalGate(threshold=float(scores.median()), epsilon=0.1, n=20)
        for alpha, expected in ((1.0, float((scores > gate.threshold).double().mean())), (0.0, 0.0)):
            writer = Writer.towards(site, target=row, source=-row, scope="generated", alpha=alpha)
            one = HybridFusion(textual=(Correction(writer=writer, reader=reader, gate=gate, pulse=True),))
            beside, path = GenerationStore(), tmp_path / f"{alpha}.jsonl"
            generate_all(lvlm, benign, store=beside, watched=[one], **options)
            generate_all(lvlm, benign, store=GenerationStore(path), **options)
            later = GenerationStore(path)  # knows the answers and nothing of gates
            assert None in later.opened_for(one, benign) and None not in beside.opened_for(one, benign)
            rates = [opening_rate(lvlm, study, one, settings, store=store) for store in (beside, later)]
            assert rates[0] == rates[1] and rates[0]["n"] == len(benign) == len(later)
            assert rates[0]["value"] == pytest.approx(expected)
    assert 0.2 < float((scores > gate.threshold).double().mean()) < 0.8
