"""`attack`: attacks by defences on the test split, those that see the defence included."""

from importlib import import_module
from typing import Annotated

import typer

from care_lens.cli import base
from care_lens.cli.asked import TUNING, Asked, one_process, takes_options
from care_lens.cli.base import app, start, told
from care_lens.cli.early import require_module
from care_lens.cli.options import texts


@app.command()
@told
@one_process
@takes_options(unused=TUNING, out="results/attack")
def attack(
    asked: Asked,
    defences: Annotated[
        list[str] | None,
        typer.Argument(help="Folders of saved repairs or defences, as PATH or NAME=PATH.", show_default="none"),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            help="An attack, as KIND or KIND:FIELD=VALUE,...; may be given several times.",
            show_default="pgd and autopgd",
        ),
    ] = None,
    imported: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="A module that registers attacks of yours; may be given several times.",
            metavar="MODULE",
            show_default="none",
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Harmful channels whose test requests are attacked.", show_default="the study's gradient requests"
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Requests of a channel at most.", min=1, show_default="all")] = None,
    benign: Annotated[int, typer.Option(help="Harmless requests of each benign channel beside them.", min=0)] = 4,
    adaptive: Annotated[
        bool, typer.Option("--adaptive/--no-adaptive", help="Make attacks against each defence too.")
    ] = True,
) -> None:
    """Attack the test requests, undefended and under saved defences; writes attacks.csv, attacks.md and the pictures."""
    for module in imported or ():
        require_module(module, "--import")
    start(asked.threads)
    from care_lens.core.files import write_whole
    from care_lens.pipeline.attacking import attack_study, read_attack
    from care_lens.pipeline.saved import read_defences
    from care_lens.plots import save_figure

    for module in imported or ():
        import_module(module)
    attacks = [read_attack(text) for text in by or ("pgd", "autopgd")]
    read = read_defences(defences or ())
    lvlm, study = asked.load()
    settings = asked.settings(study)
    study = settings.asked(settings.part(study))
    with asked.answering(lvlm):
        table = attack_study(
            lvlm,
            study,
            attacks,
            read,
            asked.out,
            channels=texts(channels, "--channels"),
            n=n,
            benign=benign,
            adaptive=adaptive,
            generation=settings.generation,
            batch_size=settings.batch_size,
            n_boot=settings.n_boot,
            seed=asked.seed,
        )
    text = table.to_markdown(metrics=("asr", "accuracy"))
    write_whole(asked.out / "attacks.md", text + "\n")
    save_figure(table.plot(), asked.out / "figures" / "attacks.html")
    base.console.print(text, markup=False, soft_wrap=True)
    base.console.print(f"tables, figure and attacked pictures: {asked.out}")
