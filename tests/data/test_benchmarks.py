"""Every reader on miniature files in the published format: as a folder and a zip, with byte order marks, Windows line ends, wrong case."""

import pickle
from collections import Counter
from pathlib import PurePosixPath

import pytest
from miniatures import MAKERS, PICTURES, TEXTS

from care_lens.core import Example
from care_lens.data import benchmarks
from care_lens.data.benchmarks import behaviour_key

MADE = {name: maker() for name, maker in MAKERS.items()}
#: Those whose pictures are files that a table names.
NAMED = [n for n, mini in MADE.items() if n != "astra" and any(name.endswith(PICTURES) for name in mini.files)]
TOLD = [n for n, mini in MADE.items() if any(name.endswith(TEXTS) for name in mini.files)]


@pytest.fixture
def mini(request):
    return MADE[request.param]


def check(rows, mini):
    """The examples are those expected, in order, each with its own picture."""
    assert not rows.problems and len(rows) == len(mini.expected) == rows.n_rows
    for example, wanted in zip(rows, mini.expected, strict=True):
        wanted = dict(wanted)
        width, meta = wanted.pop("width"), wanted.pop("meta", {})
        assert [image.width for image in example.images] == wanted.pop("widths", [] if width is None else [width])
        if wanted.get("behaviour"):
            wanted.setdefault("group", behaviour_key(wanted["behaviour"]))
        wanted = {"response": None, "behaviour": None, "channel": type(rows).name, **wanted}
        got = {name: getattr(example, name) for name in wanted}
        if wanted["channel"] == type(rows).name:
            got["channel"] = got["channel"].split(" ")[0]
        assert isinstance(example, Example) and got == wanted
        assert meta.items() <= example.meta.items() and example.group
        assert example.meta["benchmark"] == type(rows).name and example.meta["row"]
        if example.images:
            assert example.meta["picture"]


def unmark(mini):
    return mini.changed(lambda n, c: (n, b"\xef\xbb\xbf" + c if n.endswith(TEXTS) else c))


def windows(mini):
    return mini.changed(lambda n, c: (n, c.replace(b"\n", b"\r\n") if n.endswith(TEXTS) else c))


@pytest.mark.parametrize("mini", MADE, indirect=True)
def test_a_folder(mini, tmp_path):
    rows = mini.read(mini.at(tmp_path))
    check(rows, mini)
    assert not rows.notes and len(rows.to_dataframe()) == len(rows)
    assert {row["file"] for _, row in rows.to_dataframe().iterrows()} <= {*rows.tables, "pictures"}
    assert repr(rows) == f"{type(rows).__name__}({len(rows)} examples)"


@pytest.mark.parametrize("mini", MADE, indirect=True)
def test_a_zip_with_a_folder_around_it(mini, tmp_path):
    rows = mini.read(mini.zipped(tmp_path / "all.zip", "top-main/"))
    check(mini.changed(lambda n, c: (n, c)).read(tmp_path / "all.zip"), relocated(mini))
    assert not rows.notes
    again = pickle.loads(pickle.dumps(rows[0]))
    assert [i.size for i in again.images] == [i.size for i in rows[0].images]


def relocated(mini):
    """Ids of scienceqa name the file."""
    made = mini.changed(lambda n, c: (n, c))
    made.expected = [e | {"id": e["id"].replace("test/data/", "test/top-main/data/")} for e in mini.expected]
    return made


@pytest.mark.parametrize("mini", NAMED, indirect=True)
def test_a_folder_with_its_pictures_in_a_zip_of_their_own(mini, tmp_path):
    names = [name for name in mini.files if name.endswith(PICTURES)]
    alone = mini.changed(lambda n, c: (n, c))
    alone.files = {n: mini.files[n] for n in names}
    alone.zipped(tmp_path / "pictures.zip", "downloaded/")
    alone.files = {n: c for n, c in mini.files.items() if n not in names}
    alone.at(tmp_path / "a")
    check(mini.read(tmp_path / "a", pictures=tmp_path / "pictures.zip"), mini)
    (tmp_path / "pictures.zip").rename(tmp_path / "a" / "pictures.zip")
    check(mini.read(tmp_path / "a"), mini)


@pytest.mark.parametrize("mini", TOLD, indirect=True)
def test_byte_order_marks_and_windows_line_ends(mini, tmp_path):
    marked = unmark(windows(mini))
    check(mini.read(marked.at(tmp_path)), mini)


@pytest.mark.parametrize("mini", TOLD, indirect=True)
def test_line_ends_of_old_macs(mini, tmp_path):
    old = unmark(mini.changed(lambda n, c: (n, c.replace(b"\n", b"\r") if n.endswith(TEXTS) else c)))
    check(mini.read(old.at(tmp_path)), mini)


@pytest.mark.parametrize("mini", [*NAMED, "astra"], indirect=True)
def test_pictures_of_another_case_are_found_and_noted(mini, tmp_path):
    def shout(name, content):
        path = PurePosixPath(name)
        return (str(path.with_name(path.name.upper())) if name.endswith(PICTURES) else name), content

    other = mini.changed(shout)
    rows = mini.read(other.at(tmp_path))
    assert not rows.problems
    if mini.reader is benchmarks.ASTRAPictures:  # here the names are the table
        assert Counter(i.width for e in rows for i in e.images) == Counter(e["width"] for e in mini.expected)
        return
    check(rows, mini)
    if mini.reader is not benchmarks.FigStepPro:
        assert {note[-1] for note in rows.notes} == {"case"} and len(rows.notes) == len(rows)


@pytest.mark.parametrize("mini", NAMED, indirect=True)
def test_what_is_missing_is_listed_and_everything_else_is_read(mini, tmp_path):
    names = sorted(name for name in mini.files if name.endswith(PICTURES))
    empty, gone = names[0], names[-1]
    broken = mini.changed(lambda n, c: (n, b"" if n == empty else c))
    del broken.files[gone]
    rows = mini.read(broken.at(tmp_path))
    assert len(rows) + len(rows.problems) == rows.n_rows == len(mini.expected)
    kinds = {problem.kind for problem in rows.problems}
    assert kinds == {"empty picture", "missing picture"} and len(rows) == sum(1 for _ in rows)
    assert [*rows.problems_dataframe()["kind"]] == [p.kind for p in rows.problems]
    assert all(problem.do and problem.what and problem.row for problem in rows.problems)
    assert {e.id for e in rows} < {e["id"] for e in mini.expected}
