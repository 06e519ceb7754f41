"""What the sections of a report share: the run with its channels and defences in order, tables by channel, places of figures."""

import html
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from care_lens.evaluation import GenerationStore
from care_lens.pipeline.gradient import ADAPTIVE, ANSWER, CLEAN, NOISE, OPENING
from care_lens.pipeline.report_page import shown_figure
from care_lens.pipeline.report_words import DEFENCES, NOTHING, interval, table
from care_lens.pipeline.run import Run
from care_lens.pipeline.saved import UNDEFENDED

#: What the channels of the run itself are, whatever the study.
GRADIENT = {
    CLEAN: "Plain requests that the undefended model refuses, over clean pictures: the starting points of the gradient attack.",
    NOISE: "The same under random noise of the attack's size: a control.",
    OPENING: "The same under PGD on the picture, made against the undefended model for the first word of a compliant answer.",
    ANSWER: "The same under PGD made for the whole compliant answer.",
    ADAPTIVE: "PGD through a copy of the repair whose gates have gradients; the worst picture found for each request.",
}


class ReportParts:
    """What the sections of the page are made of.

    Args:
        run: The results.
        images: The figures, by file name.
        store: The answers; None: no examples of them are shown.
    """

    def __init__(self, run: Run, images: Mapping[str, go.Figure], store: GenerationStore | None) -> None:
        self.run = run
        self.attacks = list(run.study.channels("test", harmful=True))
        self.benign = list(run.study.channels("test", harmful=False))
        self.seen = [c for channels in run.study.seen.values() for c in channels]
        frame = run.proof.table.frame
        self.gradient = [c for c in dict.fromkeys(frame["channel"]) if c in GRADIENT]
        self.defences = [str(name) for name in dict.fromkeys(frame["defence"])]
        self.repair = run.choice.repair.name
        self.answers = {(a.defence, a.channel, a.id): a for a in store.answers()} if store is not None else {}
        self.images = images

    def drawn(self, prefix: str, label: str) -> str:
        """The figures whose name begins so, each under a title where there are several."""
        names = [name for name in self.images if name.startswith(prefix)]
        told = {name: name.removeprefix(prefix).strip("_").replace("_", " ") for name in names}
        return "\n".join(
            (f"<h4>{html.escape(told[name])}</h4>" if len(names) > 1 and told[name] else "")
            + shown_figure(name, f"{label} {told[name]}")
            for name in names
        )

    def by_channel(
        self, frame: pd.DataFrame, metric: str, channels: Sequence[str], *, caption: str, shares: bool = True
    ) -> str:
        """A table of channels by defences."""
        kept = pd.DataFrame(frame[frame["metric"] == metric])
        names = sorted(dict.fromkeys(kept["defence"]), key=lambda name: (name != UNDEFENDED, name != self.repair))
        cells = {(row["defence"], row["channel"]): row for row in kept.to_dict("records")}
        rows = []
        for channel in channels:
            here = [cells.get((name, channel)) for name in names]
            counts = sorted({int(row["n"]) for row in here if row is not None})
            if counts:
                n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
                rows.append([channel, n, *("not run" if row is None else interval(row, shares=shares) for row in here)])
        if not rows:
            return f"<p>{html.escape(caption)}: {NOTHING}.</p>"
        own = names.index(self.repair) + 2 if self.repair in names else None
        missing = int(kept["missing"].sum()) if "missing" in kept.columns else 0
        caption += f" Answers that could not be had: {missing}." if missing else ""
        head = ["channel", "n", *(DEFENCES.get(str(name), str(name)) for name in names)]
        return table(head, rows, caption=caption, strong=own)
