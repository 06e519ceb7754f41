"""The block on threads of the page on repairs runs as it stands, after the names that it says it takes."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from care_lens import organism
from care_lens.lvlm import HookedLVLM
from care_lens.repair import Correction, HybridFusion, Writer

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "repair.md"


def test_the_blocks_run_one_after_another(monkeypatch, capsys):
    """All but the one that says that it takes names of the reader's own; what is tuned is a repair made by hand."""
    from care_lens import evaluation

    def tuned(lvlm, study, **options):
        width = lvlm.width("blocks.1.hook_resid_post")
        writer = Writer.towards("blocks.1.hook_resid_post", target=3 * torch.ones(width), source=torch.zeros(width))
        return SimpleNamespace(repair=HybridFusion(textual=(Correction(writer=writer),)))

    monkeypatch.setattr(evaluation, "tune", tuned)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        if "AllOf(" not in block:
            exec(compile(block, str(PAGE), "exec"), names)
    assert "blocks.1.hook_resid_post" in capsys.readouterr().out
    assert not names["lvlm"](names["inputs"]).equal(names["logits"]) and names["text"]
    names["lvlm"].close()


def test_the_block_on_threads_streams_the_repaired_answer():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if "Thread(" in block]
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        width = lvlm.width("blocks.1.hook_resid_post")
        writer = Writer.towards("blocks.1.hook_resid_post", target=3 * torch.ones(width), source=torch.zeros(width))
        repair = HybridFusion(textual=(Correction(writer=writer),))
        inputs = lvlm.prepare(organism.examples("plain", "test", n=1))
        names = {"lvlm": lvlm, "repair": repair, "inputs": inputs}
        exec(compile(block, str(PAGE), "exec"), names)
        with repair.on(lvlm):
            answer = lvlm.generate(inputs, max_new_tokens=32)
        streamed = lvlm.tokenizer.decode(answer.new_tokens[0])
        assert names["text"].split() == streamed.split() != []
