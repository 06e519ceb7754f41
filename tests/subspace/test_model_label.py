"""What a model is called where others read it: never a path of somebody's disk."""

import pytest
import torch

from care_lens.repair import Correction, HybridFusion, Writer
from care_lens.subspace import ModelIdentity, SafetySubspace


@pytest.mark.parametrize(
    ("name", "hub", "label"),
    [
        ("org/model", "org/model", "org/model"),
        ("LlavaForConditionalGeneration", None, "LlavaForConditionalGeneration"),
        ("/home/me/models/tuned-7b/", None, "tuned-7b"),
        ("./models/tuned", None, "tuned"),
        ("~/tuned", None, "tuned"),
        ("C:\\models\\tuned", None, "tuned"),
        ("a/b/c", None, "c"),
        ("/home/me/.cache/hub/models--org--a-model/snapshots/0123ab", "org/a-model", "org/a-model"),
    ],
)
def test_labels(name, hub, label):
    identity = ModelIdentity(name, "main")
    assert (identity.hub_name, identity.label) == (hub, label)
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    subspace = SafetySubspace.fit(rows, 3 * rows.flip(0), rank=1, model=identity)
    assert label in repr(subspace) and label in subspace.card()
    assert (f"base_model: {hub}" in subspace.card()) == (hub is not None) and "/home/me" not in subspace.card()
    writer = Writer.towards("blocks.1.hook_mlp_out", target=torch.ones(4), source=torch.zeros(4))
    plan = HybridFusion(textual=(Correction(writer=writer),), model=identity).explain()
    assert plan.made_for.startswith(f"{label} (") and "/home/me" not in str(plan)


def test_a_folder_of_two_parts_that_is_there_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelIdentity("models/tuned").hub_name is None and ModelIdentity("models/tuned").label == "tuned"
