"""What a subspace writes towards, against plain Hugging Face weights and the Jacobian of its head."""

import math

import pytest
import torch
from zoo import gemma3, llama4, qwen_vl

from care_lens.lvlm import HookedLVLM
from care_lens.mediation import neuron_directions, writes_towards
from care_lens.plots import plot_writing
from care_lens.subspace import SafetySubspace

SITE = "blocks.1.hook_resid_post"


def subspace_of(width, site=SITE, rank=2):
    generator = torch.Generator().manual_seed(0)
    benign, malicious = (torch.randn(90, width, generator=generator) for _ in range(2))
    malicious[:, :3] *= 3
    return SafetySubspace.fit(benign, malicious + 0.3, rank=rank, site=site)


@pytest.mark.parametrize("directions", ["write", "basis", "read"])
def test_tokens_of_directions_are_derivatives_of_the_plain_head(llava_maker, directions):
    plain, _ = llava_maker("clip")
    norm, head = plain.model.language_model.norm, plain.lm_head
    with HookedLVLM.from_hf(*llava_maker("clip")) as lvlm:
        subspace = subspace_of(lvlm.width(SITE))
        found = writes_towards(lvlm, subspace, directions=directions, k=3).frame
        vocabulary = lvlm.tokenizer.convert_ids_to_tokens(range(head.weight.shape[0]))
    jacobian = torch.autograd.functional.jacobian(lambda h: head(norm(h)), subspace.mean_benign)
    for j in range(2):
        u = getattr(subspace, directions)[:, j]
        change = jacobian @ (u / u.norm())
        change = change - change.mean()
        part = found[(found["kind"] == "token") & (found["of"] == f"direction {j}")]
        best = change.topk(3)
        assert part[part["sign"] == "+"]["unit"].tolist() == [vocabulary[i] for i in best.indices]
        assert part[part["sign"] == "+"]["value"].tolist() == pytest.approx(best.values.tolist(), rel=1e-4)
        worst = (-change).topk(3)
        assert part[part["sign"] == "-"]["unit"].tolist() == [vocabulary[i] for i in worst.indices]
        spread = float(change.std()) * math.sqrt(2 * math.log(len(change)))
        assert part["chance"].iloc[0] == pytest.approx(spread, rel=1e-4)


def test_points_have_the_logits_of_the_lens(llava_maker):
    plain, _ = llava_maker("clip")
    target = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with HookedLVLM.from_hf(*llava_maker("clip")) as lvlm:
        found = writes_towards(lvlm, subspace_of(32), points={"refusal": target}, neurons=False, k=1).frame
        assert set(found["of"]) == {"direction 0", "direction 1", "benign mean", "malicious mean", "refusal"}
        with torch.no_grad():
            logits = plain.lm_head(plain.model.language_model.norm(target))
        best = found[(found["of"] == "refusal") & (found["sign"] == "+")].iloc[0]
        assert best["unit"] == lvlm.tokenizer.convert_ids_to_tokens(int(logits.argmax()))
        assert best["value"] == pytest.approx(float(logits.max() - logits.mean()), rel=1e-4)
        with pytest.raises(ValueError, match="width 32"):
            writes_towards(lvlm, subspace_of(32), points={"refusal": target[:5]})


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_the_neuron_that_was_hidden_in_a_direction_comes_first(llava_maker, tower):
    plain, _ = llava_maker("siglip")
    if tower == "language":
        site, weight = SITE, plain.model.language_model.layers[2].mlp.down_proj.weight
    else:
        site, weight = "vision.blocks.0.hook_mlp_out", plain.model.vision_tower.encoder.layers[1].mlp.fc2.weight
    column = weight.detach()[:, 7]
    with HookedLVLM.from_hf(*llava_maker("siglip")) as lvlm:
        rows = torch.randn(400, len(column), generator=torch.Generator().manual_seed(0))
        # "mean" with the identity as metric: the direction is the difference of the means itself.
        subspace = SafetySubspace.fit(
            rows, rows + 5 * column, contrast="mean", metric="identity", projection="orthogonal", rank=1, site=site
        )
        found = writes_towards(lvlm, subspace, k=2)
        best = found.frame.query("kind == 'neuron' and sign == '+'").iloc[0]
        place = "blocks.2" if tower == "language" else "vision.blocks.1"
        assert best["unit"] == f"{place}.mlp.hook_post[7]" and best["layer"] == (2 if tower == "language" else 1)
        assert best["value"] == pytest.approx(1.0, abs=1e-4) and best["value"] > best["chance"]
        assert ("token" in set(found.frame["kind"])) is (tower == "language")
        assert len(plot_writing(found, kind="neuron").data) == 1
        if tower == "vision":
            with pytest.raises(ValueError, match="no tokens in the vision tower"):
                found.plot()
        else:
            assert len(found.plot().data) == 3


@pytest.mark.parametrize("make", [gemma3.make_gemma3, qwen_vl.SPECIMENS[0].make, llama4.make_llama4])
def test_other_families(make):
    with HookedLVLM.from_hf(*make()) as lvlm:
        found = writes_towards(lvlm, subspace_of(lvlm.width(SITE)), k=2).frame
        assert found["value"].notna().all() and "token" in set(found["kind"])
        wide = {site: write.shape for site, write in neuron_directions(lvlm)}
        assert set(wide) == set(lvlm.sites(tower="language", component="mlp.hook_post"))
        assert all(shape == (lvlm.width(SITE), lvlm.width(site)) for site, shape in wide.items())


def test_half_precision_ranks_alike(llava_maker):
    model, processor = llava_maker("clip")
    with HookedLVLM.from_hf(model.to(torch.bfloat16), processor) as lvlm:
        found = writes_towards(lvlm, subspace_of(32), k=1).frame
        assert found["value"].notna().all()


def test_what_has_no_stream_is_refused(llava_maker):
    with HookedLVLM.from_hf(*llava_maker("clip")) as lvlm:
        with pytest.raises(ValueError, match="must name its site"):
            writes_towards(lvlm, subspace_of(32, site=None))
        with pytest.raises(ValueError, match="stream that tokens and neurons share"):
            writes_towards(lvlm, subspace_of(48, site="blocks.1.mlp.hook_post"))
        lvlm.hf_model.model.language_model.layers[0].mlp.down_proj.weight  # noqa: B018
        linear = lvlm.bridge.blocks[0].mlp.out.original_component
        linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="neurons=False"):
            writes_towards(lvlm, subspace_of(32))
