"""A published table, from public files: look through the files, learn, answer, judge, print.

    look(recipe, "files").require()  # before any GPU time, see care_lens.pipeline.recipe_look
    result = reproduce(recipe, "files", "results/table", lvlm=lvlm, judge=judge)
    print(result.markdown)

What is learned from and what is tested never shares a behaviour. Several processes share the answers
(:mod:`care_lens.core.processes`); the first learns, judges and prints. A stopped job goes on.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.files import in_use, load_artifact, save_artifact, swept, write_whole
from care_lens.core.identity import digest, examples_digest, model_fingerprint
from care_lens.core.outcome import Judge, Repair
from care_lens.core.processes import WAIT, Process, done, is_done, wait_for
from care_lens.core.results import package_versions
from care_lens.defences import PublishedCARE, load_defence
from care_lens.evaluation import (
    CaptionGrader,
    ChoiceGrader,
    ClassifierJudge,
    DefenceTable,
    Grader,
    OpenAnswerGrader,
    SubstringRefusalJudge,
    VQAGrader,
    evaluate_sharded,
    paper_table,
    with_answers,
)
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.recipe import Recipe, RecipeDefence, RecipeJudge
from care_lens.pipeline.recipe_parts import Parts, read_parts
from care_lens.pipeline.saved import UNDEFENDED

log = logging.getLogger(__name__)


_STEP = "fitted"


@dataclass(frozen=True)
class Reproduction:
    """What :func:`reproduce` made.

    Attributes:
        table: Defences by columns, with all metrics.
        markdown: The table of attack success, with the published figures, then those of utility and over-refusal, then the notes.
        latex: The same for LaTeX.
        folder: Where ``table.md``, ``table.tex``, ``table.json`` and the answers are.
    """

    table: DefenceTable
    markdown: str
    latex: str
    folder: Path


def load_recipe_judge(judge: RecipeJudge) -> Judge:
    """The judge of a recipe.

    Raises:
        OSError: If a classifier cannot be loaded.
        JudgeError: If its card prints no template.
    """
    if judge.kind == "classifier":
        assert judge.model is not None
        return ClassifierJudge.from_pretrained(
            judge.model, template=judge.template, revision=judge.revision, dtype=judge.dtype, device_map=judge.device
        )
    return SubstringRefusalJudge.published() if judge.kind == "published-substrings" else SubstringRefusalJudge()


def _graders(recipe: Recipe) -> dict[str, Grader]:
    makers = {
        "choice": ChoiceGrader,
        "circular": lambda: ChoiceGrader(circular=True),
        "open-answer": OpenAnswerGrader,
        "vqa": VQAGrader,
        "caption": CaptionGrader,
    }
    return {title: makers[s.grader]() for title, s in recipe.utility.items() if s.grader != "judge"}


def reproduce(
    recipe: Recipe,
    files: str | Path,
    out: str | Path,
    *,
    lvlm: HookedLVLM,
    judge: Judge | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    process: Process | None = None,
    progress: bool = True,
    wait: float | int = WAIT,
) -> Reproduction | None:
    """Make the table of a recipe.

    Args:
        recipe: Which table.
        files: The folder that the roots of its sources are in.
        out: Folder of the job; what is there already is not made again.
        lvlm: The recipe's model.
        judge: Instead of the recipe's, which is loaded otherwise, in the first process.
        limit: At most so many examples a column, for a quick look.
        batch_size: Examples at a time.
        process: Which process of a job this is; None: as the environment says.
        progress: Whether the first process shows progress bars.
        wait: Seconds that processes wait for each other.

    Returns:
        The table; None in processes other than the first.

    Raises:
        RecipeError, BenchmarkError: As :func:`read_parts`.
        AnswersError: If too many harmless requests cannot be answered.
        FitError: If there are too few examples for the ranks of the recipe.
        ArtifactError: If the folder holds a job of another recipe, model or files.
        ProcessError: If another process does not finish.
    """
    process, out = process or Process.current(), Path(out)
    parts = read_parts(recipe, files, limit=limit)
    job = digest(
        [
            {
                key: value
                for key, value in json.loads(json.dumps(asdict(recipe), default=str)).items()
                if key != "notes"
            },
            examples_digest([*parts.malicious, *parts.benign, *(e for some in parts.tested.values() for e in some)]),
            model_fingerprint(lvlm.hf_model),
            batch_size,
        ]
    )
    if process.first:
        _require_same_job(out, recipe, job)
    defences = _defences(recipe, files, out, lvlm, parts, job, batch_size, process, progress, wait)
    if judge is None and process.first:
        judge = load_recipe_judge(recipe.judge)
    table = evaluate_sharded(
        lvlm,
        parts.tested,
        {UNDEFENDED: None, **defences},
        judge=judge or SubstringRefusalJudge(),  # judging is the first process's work
        directory=out / "answers",
        settings=recipe.generation,
        process=process,
        batch_size=batch_size,
        seed=recipe.seed,
        progress=progress,
        wait=wait,
        graders=_graders(recipe),
        fidelity=False,
        n_boot=recipe.n_boot,
    )
    if table is None:
        return None
    notes = [*recipe.notes, *([f"At most {limit} examples a column: not figures to quote."] if limit else [])]
    table = replace(table, settings={**table.settings, "recipe": recipe.name, "notes": notes})
    with in_use(out):
        swept(out)  # what a kill has left; the other processes have finished their part
    table.save(out, "table")
    made = {form: _printed(recipe, table, form, notes) for form in ("markdown", "latex")}
    write_whole(out / "table.md", made["markdown"])
    write_whole(out / "table.tex", made["latex"])
    return Reproduction(table, made["markdown"], made["latex"], out)


def _require_same_job(out: Path, recipe: Recipe, job: str) -> None:
    """Refuse the folder of another job; note this one."""
    content = {"job": job, "recipe": recipe.name, "versions": package_versions()}
    try:
        _, held = load_artifact(out, "job", kind="reproduction", schema=1)
    except FileNotFoundError:
        save_artifact(out, "job", kind="reproduction", schema=1, data={}, content=content)
        return
    if held["job"] != job:
        raise ArtifactError(
            f"{out} must be empty or of the same recipe, files, model and limit, got a job of {held['recipe']!r} that differs in one of "
            "them; choose another --out"
        )


def _defences(
    recipe: Recipe,
    files: str | Path,
    out: Path,
    lvlm: HookedLVLM,
    parts: Parts,
    job: str,
    batch_size: int,
    process: Process,
    progress: bool,
    wait: float | int,
) -> dict[str, Repair]:
    """The defences of a recipe: the first process fits them, and all read them from the folder."""
    homes = {name: out / "defences" / f"{number:02d}" for number, name in enumerate(recipe.defences)}
    fitted = {name: d for name, d in recipe.defences.items() if d.kind == "published_care"}
    whole = Process()  # the note is of the job, whatever the number of its processes
    if fitted and is_done(out, _STEP, whole, of=job) is None:
        # the requests are shared, the fit is the first process's work
        answered = with_answers(
            lvlm, [*parts.malicious, *parts.benign], refused=(), directory=out / "fit", batch_size=batch_size,
            settings=replace(recipe.generation, do_sample=False, temperature=None, top_p=None, top_k=None),
            seed=recipe.seed, process=process, progress=progress, wait=wait,
        )  # fmt: skip
        if process.first:
            _fit(fitted, homes, lvlm, answered, batch_size, progress)
            done(out, _STEP, whole, of=job)
    if fitted:
        wait_for(out, _STEP, whole, of=job, seconds=wait)
    found: dict[str, Repair] = {}
    for name, defence in recipe.defences.items():
        home = homes[name] if defence.kind == "published_care" else Path(files) / str(defence.folder)
        found[name] = replace(_saved(home), name=name)
    return found


def _fit(
    defences: Mapping[str, RecipeDefence],
    homes: Mapping[str, Path],
    lvlm: HookedLVLM,
    answered: Sequence[Example],
    batch_size: int,
    progress: bool,
) -> None:
    """Fit and save published CARE; rows that differ in strengths alone share one fit."""
    from care_lens.data.answers import COMPLIANT_ANSWERS, REFUSAL_ANSWERS

    made: dict[Any, PublishedCARE] = {}
    for name, defence in defences.items():
        key = (defence.kept, defence.layers, defence.rank, defence.beta)
        if key not in made:
            made[key] = PublishedCARE.fit(
                lvlm,
                benign=[e for e in answered if not e.harmful],
                malicious=[e for e in answered if e.harmful],
                refusals=REFUSAL_ANSWERS,
                compliances=COMPLIANT_ANSWERS,
                layers=defence.layers,
                rank=defence.rank,
                beta=defence.beta,
                faults=defence.kept,
                batch_size=batch_size,
                progress=progress,
            )
        replace(made[key], name=name, **defence.strengths()).save(homes[name])


def _saved(folder: Path) -> Any:
    if (folder / "repair.json").is_file():
        from care_lens.repair import HybridFusion

        return HybridFusion.load(folder)
    return load_defence(folder)


def _printed(recipe: Recipe, table: DefenceTable, form: Any, notes: Sequence[str]) -> str:
    """The table of attack success with the quoted figures, then one of the other metrics, then the notes."""
    parts = [
        paper_table(
            table,
            form=form,
            metrics=("asr",),
            channels=[*recipe.columns],
            against=UNDEFENDED,
            quoted={"": recipe.quoted} if recipe.quoted else None,
            label="tab:asr",
        )
    ]
    graded = {grader.metric for grader in _graders(recipe).values()}
    wanted = {title: "refusal" for title, s in recipe.utility.items() if s.grader == "judge"}
    right = [title for title in recipe.utility if title not in wanted]
    if right:
        metrics = tuple(sorted(graded))
        parts.append(
            paper_table(table, form=form, metrics=metrics, channels=right, against=UNDEFENDED, label="tab:utility")
        )
    if wanted:
        parts.append(
            paper_table(
                table, form=form, metrics=("refusal",), channels=[*wanted], against=UNDEFENDED, label="tab:refusal"
            )
        )
    said = [*notes]
    if recipe.quoted:
        said.insert(0, f"Quoted figures are those of {recipe.quoted_from}; they were not measured here.")
    elif not any("quoted" in note for note in notes):
        said.insert(0, "No published figures are quoted.")
    if form == "markdown":
        return f"# {recipe.name}\n\n" + "\n".join(parts) + "\n" + "".join(f"- {note}\n" for note in said)
    return "\n".join(parts) + "".join(f"% {note}\n" for note in said)
