"""The pictures of the concept pages: ``python docs/concept_pictures.py`` writes them into docs/figures (kaleido and a Chromium needed).

Results are figures of the gallery in the style of a paper; the two diagrams are drawn here.
"""

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
#: By file: the entry of the gallery and its columns.
RESULTS = {
    "mediation": ("effects", 2),
    "lens": ("lens", 2),
    "subspaces": ("spectrum_heldout", 2),
    "defences": ("tradeoff", 2),
    "evaluation": ("asr_column", 1),
    "intervals": ("uncertainty", 2),
}
_INK, _BLUE, _ORANGE, _SOFT = "#1C2430", "#0072B2", "#D55E00", "#EEF2F7"


def _box(x: int, y: int, wide: int, high: int, *lines: str, colour: str = _INK, fill: str = "#FFFFFF") -> str:
    middle, first = x + wide / 2, y + high / 2 - 8 * (len(lines) - 1) + 4.5
    words = "".join(
        f'<text x="{middle:g}" y="{first + 16 * k:g}" text-anchor="middle" fill="{colour}">{escape(line)}</text>'
        for k, line in enumerate(lines)
    )
    return f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="5" fill="{fill}" stroke="{colour}"/>{words}'


def _arrow(x: int, y: int, to_x: int, to_y: int, colour: str = _INK) -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{colour}" stroke-width="1.5" marker-end="url(#{colour[1:]})"/>'


def _words(x: int, y: int, text: str, colour: str = _INK, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(wide: int, high: int, *parts: str) -> str:
    heads = "".join(
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        for colour in (_INK, _BLUE, _ORANGE)
    )
    ground = f'<rect width="{wide}" height="{high}" fill="#FFFFFF"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
        f'font-family="Arial, Helvetica, sans-serif" font-size="13"><defs>{heads}</defs>{ground}{"".join(parts)}</svg>\n'
    )


def sites() -> str:
    """Both towers, and what the sites are called along them."""
    return _svg(
        720, 300,
        _box(20, 190, 80, 44, "picture", fill=_SOFT), _arrow(100, 212, 136, 212),
        _box(140, 180, 150, 64, "vision tower", "blocks 0, 1, ..."), _arrow(290, 212, 326, 212),
        _box(330, 190, 90, 44, "projector"), _arrow(420, 212, 456, 120),
        _box(20, 60, 80, 44, "prompt", fill=_SOFT), _arrow(100, 82, 456, 82),
        _box(460, 50, 150, 84, "language tower", "blocks 0, 1, ..."), _arrow(610, 92, 646, 92),
        _box(650, 70, 60, 44, "answer", fill=_SOFT),
        _words(215, 266, "vision.hook_embed", _BLUE), _words(215, 284, "vision.blocks.3.hook_mlp_out", _BLUE),
        _words(375, 162, "projector.hook_in", _BLUE), _words(375, 178, "projector.hook_out", _BLUE),
        _words(535, 24, "blocks.12.hook_mlp_out", _BLUE), _words(535, 42, "blocks.12.attn.hook_z", _BLUE),
        _words(280, 72, "text tokens"), _words(470, 190, "image tokens", anchor="start"),
    )  # fmt: skip


def repair() -> str:
    """Reader, gate and writer of one correction, along the blocks."""
    block = [_box(30 + 130 * k, 150, 90, 44, f"block {name}") for k, name in enumerate(("5", "6", "7", "..."))]
    arrows = [_arrow(120 + 130 * k, 172, 156 + 130 * k, 172) for k in range(4)]
    return _svg(
        720, 300,
        *block, *arrows, _box(560, 150, 80, 44, "answer", fill=_SOFT),
        _box(215, 30, 110, 50, "reader", "score r", colour=_BLUE), _arrow(270, 150, 270, 84, _BLUE),
        _arrow(325, 55, 376, 55, _BLUE), _box(380, 30, 150, 50, "gate", "value g from 0 to 1", colour=_BLUE),
        _arrow(412, 80, 412, 228, _ORANGE), _box(330, 232, 170, 50, "writer", "h \N{MINUS SIGN} \N{GREEK SMALL LETTER ALPHA} g W L\N{MODIFIER LETTER CAPITAL T} (h \N{MINUS SIGN} τ)", colour=_ORANGE),
        _arrow(390, 232, 390, 177, _ORANGE),
        _words(260, 116, "reads the prompt, or the answer", _BLUE, "end"), _words(512, 254, "edits where g > 0,", _ORANGE, "start"),
        _words(512, 272, "at its own site", _ORANGE, "start"),
    )  # fmt: skip


DIAGRAMS = {"sites": sites, "repair": repair}


def main() -> None:
    """Write all of them."""
    import gallery_figures

    from care_lens.plots import paper

    for name, draw in DIAGRAMS.items():
        (HERE / "figures" / f"{name}.svg").write_text(draw(), encoding="utf-8")
    for name, (entry, columns) in RESULTS.items():
        paper(gallery_figures.ENTRIES[entry][2](), columns=columns).write_image(HERE / "figures" / f"{name}.svg")


if __name__ == "__main__":
    main()
