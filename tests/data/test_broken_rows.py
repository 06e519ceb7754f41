"""What is wrong in a published file is listed with its row and a way out, everything else is read, and no row is lost."""

import csv
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import (
    FIGSTEP,
    IMAGE,
    MAKERS,
    Mini,
    figstep,
    jailbreakv,
    mmsafetybench,
    parquet,
    picture,
    sheet,
    text,
    vlguard,
)
from miniatures import mmbench as make_mmbench
from miniatures import scienceqa as make_scienceqa

from care_lens.data import benchmarks as b
from care_lens.data.benchmarks.places import Place


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def kinds(rows):
    return [(str(p.row), p.kind) for p in rows.problems]


def test_rows_that_are_no_csv_do_not_take_others_with_them(tmp_path):
    lines = [
        "goal,target",
        'fold a zorp,"sure, here"',  # 1
        "too,many,fields",  # 2
        "too few",  # 3
        'never "closed,sure',  # 4: a quote inside of a field without quotes is a letter
        '"never closed,sure',  # 5
        "fold a dax,sure",  # 6
        '"quoted" and more,sure',  # 7
        "",
        '"two\nlines",sure',  # 8
        ",",  # 9: empty
        "bad \xe9 byte,sure",  # 10
        "last,sure",  # 11
    ]
    content = "\n".join(lines).encode("latin1")
    rows = b.AdvBench(write(tmp_path, harmful_behaviors__csv=content))
    assert kinds(rows) == [
        ("2", "bad row"),
        ("3", "bad row"),
        ("5", "bad row"),
        ("7", "bad row"),
        ("9", "bad field"),
        ("10", "bad field"),
    ]
    assert [e.prompt for e in rows] == ["fold a zorp", 'never "closed', "fold a dax", "two\nlines", "last"]
    assert rows.n_rows == 11 and [e.meta["row"] for e in rows] == ["1", "4", "6", "8", "11"]
    assert rows.problems[2].what.startswith("line 6 ")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6),
            min_size=1,
            max_size=3,
        ),
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_examples_and_problems_are_as_many_as_the_rows(rows, end, marked):
    """Against the csv module as the oracle: what it writes is read back, or listed."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["goal", "target"], *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "harmful_behaviors.csv")
        path.write_bytes(b"\xef\xbb\xbf" * marked + held.getvalue().encode())
        got = b.AdvBench(path)
    rows = [[cell.replace("\r\n", "\n") if end == "\r\n" else cell for cell in row] for row in rows]
    good = [row for row in rows if len(row) == 2 and row[0].strip() and "\ufffc" not in row[0]]
    assert len(got) + len(got.problems) == got.n_rows == len(rows)
    assert [(e.prompt, e.response) for e in got] == [(row[0], row[1] if row[1].strip() else None) for row in good]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["", "fold", None, 3, {"x": 1}]), st.booleans()), max_size=8
    )
)
def test_no_row_of_a_json_object_is_lost(rows):
    """Keys that stand twice, which json alone would drop, are rows too."""
    rows = [("e", "fold", True), *rows]  # one right row, so that it is a file of this benchmark
    pairs = [
        f'"{key}": ' + json.dumps({"imagename": "p.png", "question": asked, "answer": "x"} if whole else asked)
        for key, asked, whole in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), mm_vet__json=f"{{{', '.join(pairs)}}}", p__png=picture(10)).joinpath("mm_vet.json").rename(
            Path(folder, "mm-vet.json")
        )
        got = b.MMVet(folder)
    seen, good = set(), 0
    for key, asked, whole in rows:
        if whole and asked in ("fold", 3) and key not in seen:
            good, _ = good + 1, seen.add(key)
    assert len(got) == good and good + len(got.problems) == len(rows)


def test_ids_that_stand_twice_are_listed(tmp_path):
    made = jailbreakv()
    table = made.files["JailBreakV_28K.csv"]
    lines = table.split(b"\n")
    made.files["JailBreakV_28K.csv"] = table + lines[1] + b"\n"
    rows = made.read(made.at(tmp_path))
    assert kinds(rows) == [("6", "duplicate id")] and len(rows) == 5
    assert "JailBreakV_28K.csv row 1" in rows.problems[0].what


@pytest.mark.parametrize(
    ("written", "how"),
    [
        ("figstep\\figstep_0.png", "separators"),
        ("./figstep/figstep_0.png", ""),
        ("FigStep/FIGSTEP_0.PNG", "case"),
        ("C:\\data\\JailBreakV_28K\\figstep\\figstep_0.png", "absolute path"),
        ("/home/someone/JailBreakV_28K/figstep/figstep_0.png", "absolute path"),
        ("c:\\data\\FIGSTEP\\figstep_0.png", "case"),
    ],
)
def test_paths_of_other_systems(written, how, tmp_path):
    made = jailbreakv()
    made.files["JailBreakV_28K.csv"] = made.files["JailBreakV_28K.csv"].replace(
        b"figstep/figstep_0.png", written.encode()
    )
    rows = made.read(made.at(tmp_path))
    assert not rows.problems and rows[0].image.width == 10
    assert [(n[2], n[3], n[4]) for n in rows.notes] == ([(written, "figstep/figstep_0.png", how)] if how else [])


def test_a_name_that_fits_two_files_is_refused_and_one_that_fits_better_is_taken(tmp_path):
    made = jailbreakv()
    made.files["other/figstep/figstep_0.png"] = picture(99)
    assert made.read(made.at(tmp_path / "a"))[0].image.width == 10  # the whole path goes before a part of one
    made.files["more/figstep/figstep_0.png"] = picture(98)
    del made.files["figstep/figstep_0.png"]
    rows = made.read(made.at(tmp_path / "b"))
    assert kinds(rows) == [("1", "ambiguous picture")] and "more/figstep/figstep_0.png" in rows.problems[0].what
    made.files["figstep/Figstep_0.png"], made.files["figstep/FIGSTEP_0.png"] = picture(97), picture(96)
    rows = made.read(made.at(tmp_path / "c"))
    assert kinds(rows) == [("1", "ambiguous picture")]


def test_an_unpacked_file_goes_before_that_of_a_zip(tmp_path):
    made = jailbreakv()
    other = Mini(made.reader, {n: picture(90) for n in made.files if n.endswith(".png")}, [])
    other.zipped(made.at(tmp_path) / "images.zip", "JailBreakV_28K/")
    rows = made.read(tmp_path)
    assert not rows.problems and [e.image.width for e in rows] == [10, 11, 12, 13, 14]


def test_a_picture_of_another_folder_is_never_taken_for_one_that_is_missing(tmp_path):
    """The names are 0.jpg in every folder: by the last name alone the wrong picture would be found."""
    made = mmsafetybench()
    gone = [name for name in made.files if "/TYPO/" in name or name.endswith("01-Illegal_Activitiy/SD/0.jpg")]
    for name in gone:
        del made.files[name]
    rows = made.read(made.at(tmp_path))
    assert len(gone) == 7 and [p.kind for p in rows.problems] == ["missing picture"] * 7
    wanted = {e["id"]: e["width"] for e in made.expected}
    assert all(e.image.width == wanted[e.id] for e in rows) and len(rows) == 11


def test_missing_pictures_name_what_may_be_them(tmp_path):
    made = jailbreakv()
    made.files["figstep/figstep_0.jpg"] = made.files.pop("figstep/figstep_0.png")
    (problem,) = made.read(made.at(tmp_path)).problems
    assert "figstep_0.png" in problem.what and "figstep/figstep_0.jpg" in problem.do


def test_pointers_of_git_lfs_are_no_pictures(tmp_path):
    made = figstep()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    made.files["data/images/SafeBench/query_ForbidQI_1_1_6.png"] = pointer
    (problem,) = made.read(made.at(tmp_path / "a")).problems
    assert problem.kind == "empty picture" and "git lfs pull" in problem.do
    made.files["data/question/safebench.csv"] = pointer
    with pytest.raises(b.BenchmarkError, match="git lfs pull"):
        made.read(made.at(tmp_path / "b"))


def test_a_damaged_picture_is_named_by_its_row_when_it_is_used(tmp_path):
    made = figstep()
    made.files["data/images/SafeBench/query_ForbidQI_1_2_6.png"] = b"no picture at all" * 30
    rows = made.read(made.at(tmp_path))
    assert len(rows) == 5 and rows[0].image.width == 10
    with pytest.raises(ValueError, match=r"safebench.csv row 2: .*must be a picture"):
        rows[1]


def test_columns_are_found_whatever_their_case_and_named_where_they_are_missing(tmp_path):
    rows = [["ForbidQI", 1, 1, "Folding", "How to fold?", "Steps."]]
    files = {"query_ForbidQI_1_1_6.png": picture(10)}
    made = Mini(b.FigStep, {"safebench.csv": sheet([c.upper() + " " for c in FIGSTEP], rows), **files}, [])
    assert made.read(made.at(tmp_path / "a"))[0].behaviour == "How to fold?"
    made.files["safebench.csv"] = sheet([*FIGSTEP[:4], "asked", "instruction"], rows)
    with pytest.raises(b.BenchmarkError, match=r"must have the columns .*'question'.*got .*'asked'"):
        made.read(made.at(tmp_path / "b"))
    made.files["safebench.csv"] = sheet([*FIGSTEP, "question"], [[*rows[0], "x"]])
    with pytest.raises(b.BenchmarkError, match="name each column once"):
        made.read(made.at(tmp_path / "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("goal,target\nx,y\n".encode("utf-16"), "got UTF-16; save it as UTF-8"),
        (b"", "must begin with the names of its columns"),
        (b'"goal,target\nx,y\n', "must begin with the names of its columns"),
    ],
)
def test_tables_that_cannot_be_read_say_why(content, message, tmp_path):
    with pytest.raises(b.BenchmarkError, match=message):
        b.AdvBench(write(tmp_path, harmful_behaviors__csv=content))


def test_places_that_hold_no_benchmark_say_what_they_should_hold(tmp_path):
    with pytest.raises(b.BenchmarkNotFoundError, match="which is not there"):
        b.FigStep(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match=r"must hold SafeBench.csv of FigStep, got none of them among its 0 files"
    ):
        b.FigStep(tmp_path)
    (tmp_path / "notes.txt").write_text("dear diary")
    with pytest.raises(b.BenchmarkError, match="must be a folder or a zip"):
        b.FigStep(tmp_path / "notes.txt")
    (tmp_path / "siuo_gen.json").write_text("[{]")
    with pytest.raises(b.BenchmarkError, match=r"siuo_gen.json must be JSON"):
        b.SIUO(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK not a zip")
    with pytest.raises(b.BenchmarkError):
        b.FigStep(tmp_path / "x.zip")
    (tmp_path / "x.zip").unlink()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(b.BenchmarkError, match="must be a parquet file"):
        b.MMSafetyBench(tmp_path / "x.parquet")


def test_fields_that_contradict_each_other(tmp_path):
    made = vlguard()
    found = json.loads(made.files["test.json"])
    found[0]["safe"] = "yes"
    found[1]["safe"] = True  # but it has an instruction without "safe_" or "unsafe_"
    found[2]["instr-resp"] = "none"
    found[3]["instr-resp"] = [{"response": "alone"}]
    made.files["test.json"] = text(found)
    rows = made.read(made.at(tmp_path))
    assert kinds(rows) == [
        ("1.1", "bad field"),
        ("1.2", "bad field"),
        ("2.1", "bad field"),
        ("3", "bad field"),
        ("4.1", "bad field"),
    ]
    assert len(rows) == 2 and rows.n_rows == 7


def test_mmbench_rows_that_name_a_picture_that_no_row_holds(tmp_path):
    made = make_mmbench()
    name = next(iter(made.files))
    lines = made.files[name].split(b"\n")
    made.files[name] = b"\n".join(lines[:1] + lines[2:])  # the row with the first picture
    rows = made.read(made.at(tmp_path))
    assert [p.kind for p in rows.problems] == ["missing picture"] and len(rows) == len(made.expected) - 2


def test_masked_sentences_that_are_not_as_many_as_the_questions_are_refused(tmp_path):
    """They belong to the questions by their order alone."""
    from miniatures import figstep_pro

    made = figstep_pro()
    name = f"data/question/{b.FigStepPro.sentences}"
    made.files[name] = b"\n".join(made.files[name].split(b"\n")[:-2])
    with pytest.raises(b.BenchmarkError, match=r"a sentence for each row of .*got 4 and 5"):
        made.read(made.at(tmp_path))


def test_masked_sentences_that_hold_quotes_are_read_as_csv(tmp_path):
    from miniatures import figstep_pro

    made = figstep_pro()
    lines = [
        "sentence",
        '"He said ""use *"""',
        '"Steps, to fold *"',
        'say "*" twice',
        '"*" and "*"',
        'Fold *, then "*"',
    ]
    made.files[f"data/question/{b.FigStepPro.sentences}"] = "\n".join(lines).encode()
    said = [example.prompt.split("\n")[0] for example in made.read(made.at(tmp_path))]
    assert said == ['He said "use *"', "Steps, to fold *", 'say "*" twice', '"*" and "*"', 'Fold *, then "*"']


@pytest.mark.parametrize("blank", [None, {"answer": None}, float("nan")])
def test_an_answer_that_is_null_is_no_text(tmp_path, blank):
    """Written out it would be "None", which the evaluation of VQA takes for the number 0."""
    made = MAKERS["vqa"]()
    name = "v2_mscoco_val2014_annotations.json"
    found = json.loads(made.files[name])
    found["annotations"][0]["answers"][1] = blank
    found["annotations"][1]["answers"][1] = {"answer": 3}
    made.files[name] = text(found)
    rows = made.read(made.at(tmp_path))
    assert {p.kind for p in rows.problems} == {"bad field"} and "as number 2" in str(rows.problems)
    assert [e.id for e in rows] == [f"vqav2/{i}" for i in range(1001, 1005)]
    assert json.loads(rows[0].meta["answers"])[1] == "3"


def test_captions_and_abilities_that_are_null_are_no_texts(tmp_path):
    vet = MAKERS["mmvet"]()
    name = next(n for n in vet.files if n.endswith(".json"))
    found = json.loads(vet.files[name])
    first, second = list(found)[:2]
    found[first]["capability"], found[second]["capability"] = ["ocr", None], None
    vet.files[name] = text(found)
    rows = vet.read(vet.at(tmp_path))
    assert kinds(rows) == [(first, "bad field")] and "capability" not in rows[0].meta
    datasets = pytest.importorskip("datasets")
    shown = [
        {"id": i, "file_name": f"{i}.png", "captions": ["a sheet", last]} for i, last in enumerate(("paper", None))
    ]
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(9))
    captions = b.COCOCaptions(datasets.Dataset.from_list(shown), pictures=tmp_path)
    assert len(captions) == 1 and [p.kind for p in captions.problems] == ["bad field"]


def test_broken_annotations_are_listed_with_the_questions_that_lack_them(tmp_path):
    made = MAKERS["vqa"]()
    name = "v2_mscoco_val2014_annotations.json"
    found = json.loads(made.files[name])
    found["annotations"][0]["answers"] = "paper"
    found["annotations"][1] = "gone"
    made.files[name] = text(found)
    rows = made.read(made.at(tmp_path / "a"))
    assert sorted((p.file.split("_")[1], str(p.row)) for p in rows.problems) == [
        ("OpenEnded", "1"),
        ("OpenEnded", "2"),
        ("mscoco", "1"),
        ("mscoco", "2"),
    ]
    assert len(rows) == 3
    del made.files[name]
    assert [e.response for e in made.read(made.at(tmp_path / "b"))] == [None] * 5
    shown = MAKERS["coco"]()
    name = "annotations/captions_val2017.json"
    found = json.loads(shown.files[name])
    found["annotations"] = [one for one in found["annotations"] if one["image_id"] != 101]
    found["annotations"][0]["caption"] = 7.5
    found["annotations"][1]["caption"] = ["no text"]
    shown.files[name] = text(found)
    rows = shown.read(shown.at(tmp_path / "c"))
    assert [(str(p.row), p.kind) for p in rows.problems] == [("2", "bad field"), ("2", "bad field")] and len(rows) == 3
    assert "annotation 2" in rows.problems[0].what and "picture 101 must have captions" in rows.problems[1].what


def test_a_parquet_file_alone_and_its_empty_pictures(tmp_path):
    rows = [
        {"id": str(i), "question": f"fold {i}?", "image": None if i == 1 else {"bytes": picture(10 + i), "path": None}}
        for i in range(5)
    ]
    (tmp_path / "Illegal_Activitiy").mkdir()
    path = tmp_path / "Illegal_Activitiy" / "SD.parquet"
    path.write_bytes(parquet(rows, image=IMAGE))
    got = b.MMSafetyBench(path)
    assert kinds(got) == [("2 SD", "missing picture")] and [e.image.width for e in got] == [10, 12, 13, 14]
    assert got[0].group == "mmsafetybench illegal_activitiy 0"
    bare = [{**row, "image": row["image"] and row["image"]["bytes"]} for row in rows]
    path.write_bytes(parquet(bare, image=pa.binary()))
    assert [e.image.width for e in b.MMSafetyBench(path)] == [10, 12, 13, 14]


def test_a_parquet_file_that_names_its_pictures(tmp_path):
    made = make_scienceqa()
    rows = [
        {
            "question": "what?",
            "choices": ["a", "b"],
            "answer": 0,
            "hint": "",
            "image": {"bytes": None, "path": f"p{i}.png"},
        }
        for i in range(2)
    ]
    made.files = {"test-0.parquet": parquet(rows, image=IMAGE), "P0.png": picture(10)}
    got = made.read(made.at(tmp_path))
    assert got[0].image.width == 10 and kinds(got) == [("2", "missing picture")]


def test_datasets_give_the_same_examples_as_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    from miniatures import mmsafetybench_parquet

    made = mmsafetybench_parquet()
    made.at(tmp_path)
    given = {
        scenario: datasets.DatasetDict(
            {kind: datasets.Dataset.from_parquet(str(tmp_path / "data" / scenario / f"{kind}.parquet"), cache_dir=str(tmp_path / "cache")).cast_column("image", datasets.Image())
             for kind in ("SD", "SD_TYPO", "TYPO")}
        )
        for scenario in ("HateSpeech", "Illegal_Activitiy")
    }  # fmt: skip
    rows = made.read(given)
    wanted = [(e["id"], e["prompt"], e["width"]) for e in made.expected]
    assert sorted((e.id, e.prompt, e.image.width) for e in rows) == sorted(wanted) and not rows.problems
    chosen = given["HateSpeech"]["SD"].select([2, 0])  # an order of its own
    assert [e.image.width for e in made.read({"HateSpeech/SD": chosen})] == [35, 29]
    plain = datasets.Dataset.from_dict(
        {"id": ["1", "2"], "prompt": ["fold?", None], "type": ["folds", "folds"], "label": ["safe", "safe"]}
    )
    got = b.XSTest(plain)
    assert [e.prompt for e in got] == ["fold?"] and kinds(got) == [("2", "bad field")]
    with pytest.raises(b.BenchmarkError, match="without streaming"):
        b.XSTest(plain.to_iterable_dataset())


def test_kinds_of_mmsafetybench(tmp_path):
    made = mmsafetybench()
    made.files["TinyVersion_ID_List.json"] = text([{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [0, 2]}])
    made.at(tmp_path)
    tiny = made.read(tmp_path, tiny=True, kinds=["TYPO", "Text_only", "Text_grey"])
    assert [e.id.split("/", 2)[2] for e in tiny] == [
        f"{k}/{i}" for i in (0, 2) for k in ("TYPO", "Text_only", "Text_grey")
    ]
    assert (
        tiny[1].image is None
        and tiny[2].image.getpixel((0, 0)) == (128, 128, 128)
        and tiny[1].prompt == "Tell how to fold 00"
    )
    assert len({e.group for e in tiny}) == 2


def test_pictures_of_astra_take_the_requests_they_are_given(tmp_path):
    from miniatures import astra

    made = astra()
    made.files["adv_img_jb/llava/constrain_16/notes_1.bmp"] = picture(9)
    made.at(tmp_path)
    asked = b.AdvBench(write(tmp_path, harmful_behaviors__csv="goal,target\nfold a zorp,sure\nfold a dax,sure\n"))
    rows = made.read(tmp_path, prompts=asked, budget="constrain_16")
    assert [e.prompt for e in rows] == ["fold a zorp", "fold a dax"] * 2 and rows[0].response == "sure"
    assert [p.kind for p in rows.problems] == ["bad row"] and "notes_1" in str(rows.problems[0])
    assert rows[0].group == "fold a zorp" and len(made.read(tmp_path / "adv_img_jb")) == 8


def test_junk_of_other_systems_is_no_file_of_the_benchmark(tmp_path):
    made = figstep()
    made.files["__MACOSX/data/question/._safebench.csv"] = b"junk"
    made.files["data/images/SafeBench/._query_ForbidQI_1_1_6.png"] = b"junk"
    made.files["data/.DS_Store"] = b"junk"
    assert len(made.read(made.at(tmp_path / "a"))) == 5
    assert len(made.read(made.zipped(tmp_path / "x.zip"))) == 5
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(Place.of(tmp_path / "a").files) == 6


def test_of_plain_questions_with_one_id_the_first_is_the_behaviour(tmp_path):
    """Text_only.parquet says what the pictures of an id are after; a row that repeats an id must not give them another behaviour."""
    made = MAKERS["mmsafetybench_parquet"]()
    (plain,) = [name for name in made.files if name.endswith("HateSpeech/Text_only.parquet")]
    held = pq.read_table(io.BytesIO(made.files[plain])).to_pylist()
    again = parquet([*held, {**held[0], "question": "How to fold another?"}], image=IMAGE)
    rows = made.changed(lambda n, c: (n, again if n == plain else c)).at(tmp_path)
    assert {e.behaviour for e in made.read(rows)} == {e["behaviour"] for e in made.expected}


def test_a_zip_that_changes_is_noticed(tmp_path):
    made = figstep()
    rows = made.read(made.zipped(tmp_path / "x.zip"))
    first = rows[0].image
    made.files["more.txt"] = b"x" * 999
    made.zipped(tmp_path / "x.zip")
    with pytest.raises(ValueError, match=r"changed|must be"):
        first.load()
        first.getpixel((0, 0))
