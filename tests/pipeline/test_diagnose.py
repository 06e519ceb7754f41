"""The diagnosis of models whose pictures are cut in tiles or keep their size: what does not correspond is left out, not fatal."""

from dataclasses import replace

import pytest
from zoo import llava_next, qwen_vl

from care_lens.core import Example, PairedExamples, UnsafeMargin
from care_lens.data import Study
from care_lens.evaluation import SubstringRefusalJudge
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline import RunSettings
from care_lens.pipeline.diagnose import measure_pairs
from care_lens.pipeline.resume import Stage

SETTINGS = replace(RunSettings().short(), n_boot=5, batch_size=4)


def study_of(pairs):
    """A study of which only the pairs are looked at."""
    return Study(
        name="pairs",
        suites={},
        seen={},
        judge=SubstringRefusalJudge(),
        outcome=UnsafeMargin(comply=(10,), refuse=(11,)),
        refusal="sorry",
        pairs=pairs,
    )


@pytest.fixture(scope="module", params=["tiled", "packed"])
def lvlm(request):
    specimen = {"tiled": llava_next, "packed": qwen_vl}[request.param].SPECIMENS[0]
    with HookedLVLM.from_hf(*specimen.make()) as made:
        yield made


def twins(picture, *sizes):
    return PairedExamples.from_pairs([
        (Example("what is red", image=picture(i, size)), Example("what is red", image=picture(i + 50, size)))
        for i, size in enumerate(sizes)
    ])  # fmt: skip


def test_pictures_of_several_sizes_and_tiles_do_not_stop_it(lvlm, picture, tmp_path, caplog):
    caplog.set_level("INFO", logger="care_lens")
    pairs = {"one size": twins(picture, (32, 32), (32, 32)), "several": twins(picture, (32, 32), (56, 28))}
    pairs["none"] = pairs["one size"][:0]
    pairs["uneven"] = PairedExamples.from_pairs([(Example("what is red"), Example("how to make a blue"))] * 2)
    pairs["longer"] = PairedExamples.from_pairs([
        (Example("what is red", image=picture(i, (32, 32))), Example("how to make a blue", image=picture(i + 50, (32, 32))))
        for i in range(2)
    ])  # fmt: skip
    effects, patches = measure_pairs(lvlm, study_of(pairs), SETTINGS, Stage(tmp_path, {}))
    assert set(effects) == {"one size", "several", "uneven", "longer"} and "'none' is empty" in caplog.text
    tiled = lvlm.family.name == "llava_next"
    assert ("vision" in set(effects["several"].frame["tower"])) is not tiled
    assert set(patches) == (set() if tiled else {"one size"})
    # The reason is that of the pair set; twins that share their picture (or have none) are asked for no map.
    assert "no patch map of 'several': its pictures are not one grid of patches" in caplog.text
    assert "no patch map of 'longer': its twins are of different lengths" in caplog.text
    assert "no patch map of 'uneven'" not in caplog.text
    assert set(effects["uneven"].frame["position"]) == {"last"}
