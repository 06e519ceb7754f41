"""One process of a job that captures, attacks and evaluates on a tiny model; the tests call it in one process and in two."""

from dataclasses import replace
from pathlib import Path

import torch


def rows():
    """Examples without id and group; the last ones have no picture, and batches of their own."""
    from zoo.pictures import make_picture

    from care_lens.core import Example

    words = "what is red", "how to make a blue picture", "help user then first no yes", "sorry"
    return [
        Example(
            f"{words[i % 4]} {i}", image=make_picture(i) if i < 7 else None, response="sure red", harmful=i % 2 == 0
        )
        for i in range(11)
    ]


def named():
    """The same with ids."""
    return [replace(e, id=f"e{i}") for i, e in enumerate(rows())]


def suites():
    """The same by channel."""
    return {"attack": [e for e in named() if e.harmful], "benign": [e for e in named() if not e.harmful]}


def job(folder: Path) -> dict[str, object] | None:
    """The rows, moments, pictures and the table; None in processes other than the first."""
    from zoo.tiny import make_llava

    from care_lens.attacks import pgd
    from care_lens.attacks.sharded import attack_sharded
    from care_lens.capture import capture_moments_sharded, capture_sharded
    from care_lens.evaluation import GenerationSettings, SubstringRefusalJudge, evaluate_sharded
    from care_lens.lvlm import HookedLVLM

    torch.set_num_threads(1)
    sites = ["blocks.1.hook_resid_post", "vision.blocks.0.hook_mlp_out"]
    common = {"batch_size": 2, "progress": False, "wait": 400.0}
    with HookedLVLM.from_hf(*make_llava()) as lvlm:
        captured = capture_sharded(lvlm, rows(), sites, directory=folder / "capture", **common)
        label = ["benign" if i % 3 else "bad" for i in range(11)]
        moments = {
            keep: capture_moments_sharded(
                lvlm, rows(), sites, label=label, keep=keep, directory=folder / f"moments {keep}", **common
            )
            for keep in ("rows", "sums")
        }

        def attack(part, home):
            found = pgd(
                lvlm, part, epsilon=8, steps=2, seed=1, batch_size=2, progress=False, checkpoint=home / "pgd.jsonl"
            )
            return found.apply(part)

        attacked = attack_sharded(
            attack, named()[:5], directory=folder / "attack", settings={"epsilon": 8}, block=2, wait=400.0
        )
        tables = {
            name: evaluate_sharded(
                lvlm, suites(), {"none": None}, judge=SubstringRefusalJudge(), directory=folder / name, settings=settings,
                n_boot=50, **common,
            )
            for name, settings in {
                "greedy": GenerationSettings(max_new_tokens=4),
                "sampled": GenerationSettings(max_new_tokens=4, do_sample=True, temperature=1.5),
            }.items()
        }  # fmt: skip
    if captured is None:
        return None
    return {"captured": captured, "moments": moments, "attacked": attacked, "tables": tables}
