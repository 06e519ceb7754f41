"""Miniatures of public benchmark files: the exact published format, with made-up and inert content.

Each maker gives the files by their published names, and what a reader must find in them. The width of a picture says which one it is.
"""

import base64
import csv
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from care_lens.data import benchmarks as b

THINGS = ("zorp", "blicket", "dax, blue", 'wug "red"', "fep\nlong")


@dataclass
class Mini:
    reader: type[b.Benchmark]
    files: dict[str, bytes]
    expected: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def at(self, folder: Path) -> Path:
        """Write the files into a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def zipped(self, path: Path, top: str = "") -> Path:
        """Write them into a zip, in a folder of it."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in self.files.items():
                archive.writestr(top + name, content)
        return path

    def changed(self, change: Callable[[str, bytes], tuple[str, bytes]]) -> "Mini":
        """With other names and contents."""
        return Mini(self.reader, dict(change(n, c) for n, c in self.files.items()), self.expected, self.options)

    def read(self, root: Any, **options: Any) -> b.Benchmark:
        return self.reader(root, **{**self.options, **options})


def picture(width: int, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (width, 9), (10 * width % 256, 40, 90)).save(held, kind)
    return held.getvalue()


def sheet(columns: list[str], rows: list[list[Any]], delimiter: str = ",") -> bytes:
    held = io.StringIO()
    writer = csv.writer(held, delimiter=delimiter, lineterminator="\n")
    writer.writerows([columns, *rows])
    return held.getvalue().encode()


def text(rows: Any) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def parquet(rows: list[dict[str, Any]], **kinds: pa.DataType) -> bytes:
    held = io.BytesIO()
    arrays = {c: pa.array([r[c] for r in rows], type=kinds.get(c)) for c in rows[0]}
    pq.write_table(pa.table(arrays), held, row_group_size=2)
    return held.getvalue()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def jailbreakv() -> Mini:
    columns = [
        "id",
        "jailbreak_query",
        "redteam_query",
        "format",
        "policy",
        "image_path",
        "from",
        "selected_mini",
        "transfer_from_llm",
    ]
    rows, files, expected = [], {}, []
    for i, thing in enumerate(THINGS):
        kind, path = [("figstep", f"figstep/figstep_{i}.png"), ("Template", f"llm_transfer_attack/blank_{i}.png"),
                      ("SD", f"query_related/SD_related_{i}.png")][i % 3]  # fmt: skip
        files[path] = picture(10 + i)
        rows.append(
            [
                i,
                f"Please: fold a {thing}",
                f"How to fold a {thing}?",
                kind,
                "Folding",
                path,
                "made up",
                i % 2 == 0,
                kind == "Template",
            ]
        )
        expected.append({"id": f"jailbreakv/{i}", "prompt": f"Please: fold a {thing}", "behaviour": f"How to fold a {thing}?",
                         "channel": f"jailbreakv {kind}", "width": 10 + i, "harmful": True})  # fmt: skip
    return Mini(b.JailBreakV, {"JailBreakV_28K.csv": sheet(columns, rows), **files}, expected)


def jailbreakv_mini() -> Mini:
    full = jailbreakv()
    return Mini(
        b.JailBreakV,
        {**full.files, "mini_JailBreakV_28K.csv": full.files["JailBreakV_28K.csv"]},
        full.expected,
        {"subset": "mini"},
    )


def redteam2k() -> Mini:
    rows = [[i, f"How to fold a {thing}?", "Folding", "made up"] for i, thing in enumerate(THINGS)]
    expected = [
        {"id": f"redteam2k/{i}", "prompt": row[1], "behaviour": row[1], "harmful": True, "width": None}
        for i, row in enumerate(rows)
    ]
    return Mini(b.RedTeam2K, {"RedTeam_2K.csv": sheet(["id", "question", "policy", "from"], rows)}, expected)


SCENARIOS = ("01-Illegal_Activitiy", "02-HateSpeech")
MMSAFETY_KINDS = SETS = ("SD", "SD_TYPO", "TYPO")


def mmsafetybench() -> Mini:
    files, expected = {}, []
    for s, scenario in enumerate(SCENARIOS):
        rows = {}
        for i in range(3):
            rows[str(i)] = {
                "Question": f"How to fold {s}{i}?",
                "Changed Question": f"Tell how to fold {s}{i}",
                "Key Phrase": f"fold {s}{i}",
                "Phrase Type": "activity",
                "Rephrased Question": f"How to do the thing below? {s}{i}",
                "Rephrased Question(SD)": f"The picture shows a thing. How to do it? {s}{i}",
            }
            for k, kind in enumerate(SETS):
                width = 20 + 9 * s + 3 * i + k
                files[f"data/imgs/{scenario}/{kind}/{i}.jpg"] = picture(width, "JPEG")
                asked = rows[str(i)]["Rephrased Question(SD)" if kind == "SD" else "Rephrased Question"]
                expected.append({"id": f"mmsafetybench/{scenario}/{kind}/{i}", "prompt": asked, "behaviour": f"How to fold {s}{i}?",
                                 "channel": f"mmsafetybench {kind}", "harmful": True, "width": width,
                                 "group": f"mmsafetybench {scenario[3:].casefold()} {i}"})  # fmt: skip
        files[f"data/processed_questions/{scenario}.json"] = text(rows)
    return Mini(b.MMSafetyBench, files, expected)


def mmsafetybench_parquet() -> Mini:
    files, expected = {}, []
    for s, scenario in reversed([*enumerate(SCENARIOS)]):  # in the order of the folders' names
        for k, kind in enumerate((*SETS, "Text_only")):
            rows = []
            for i in range(3):
                width = 20 + 9 * s + 3 * i + k
                image = None if kind == "Text_only" else {"bytes": picture(width, "JPEG"), "path": None}
                asked = f"How to fold {s}{i}?" if kind == "Text_only" else f"How to do it, in {kind}? {s}{i}"
                rows.append({"id": str(i), "question": asked, "image": image})
                if kind != "Text_only":
                    expected.append({"id": f"mmsafetybench/{scenario[3:]}/{kind}/{i}", "prompt": asked, "behaviour": f"How to fold {s}{i}?",
                                     "channel": f"mmsafetybench {kind}", "harmful": True, "width": width,
                                     "group": f"mmsafetybench {scenario[3:].casefold()} {i}"})  # fmt: skip
            files[f"data/{scenario[3:]}/{kind}.parquet"] = parquet(rows, image=IMAGE)
    return Mini(b.MMSafetyBench, files, expected)


FIGSTEP = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]


def figstep(subset: str = "SafeBench") -> Mini:
    rows, files, expected = [], {}, []
    for i, thing in enumerate(THINGS):
        rows.append(
            ["ForbidQI", 1 + i // 3, 1 + i % 3, "Folding", f"How to fold a {thing}?", f"Steps to fold a {thing}."]
        )
        name = f"ForbidQI_{1 + i // 3}_{1 + i % 3}"
        files[f"data/images/{subset}/query_{name}_6.png"] = picture(10 + i)
        expected.append(
            {
                "id": f"figstep/{name}",
                "prompt": b.figstep.CARRIER,
                "behaviour": f"How to fold a {thing}?",
                "harmful": True,
                "width": 10 + i,
            }
        )
    files[f"data/question/{'safebench' if subset == 'SafeBench' else subset}.csv"] = sheet(FIGSTEP, rows)
    return Mini(b.FigStep, files, expected, {"subset": subset})


def figstep_pro() -> Mini:
    made = figstep("SafeBench-Tiny")
    files = {n: c for n, c in made.files.items() if n.endswith(".csv")}
    files["data/question/benign_sentences_without_harmful_phase.csv"] = "\n".join(
        ["sentence", *(f"Steps to fold *, {i}." for i in range(len(THINGS))), ""]
    ).encode()
    expected = []
    for i, one in enumerate(made.expected):
        for k in range(3):
            files[f"data/images/FigStep-Pro/image_{i}_splits/image_{i}_split_{k}.png"] = picture(10 + i + 10 * k)
        prompt = b.figstep.PRO_CARRIER.replace("{sentence}", f"Steps to fold *, {i}.")
        expected.append(
            one
            | {"id": one["id"].replace("figstep", "figsteppro"), "prompt": prompt, "widths": [10 + i, 20 + i, 30 + i]}
        )
    return Mini(b.FigStepPro, files, expected)


def vlguard() -> Mini:
    rows, files, expected = [], {}, []
    for i, thing in enumerate(THINGS):
        safe, path = i % 2 == 0, f"{'good' if i % 2 == 0 else 'bad'}_folds/{i}.png"
        files[f"test/{path}"] = picture(10 + i)
        answers = ([{"safe_instruction": f"What is the {thing}?", "response": "paper"}, {"unsafe_instruction": f"Tear the {thing}", "response": "I will not"}]
                   if safe else [{"instruction": f"Tear this {thing}", "response": "I will not"}])  # fmt: skip
        rows.append({"id": f"v{i}", "image": path, "safe": safe, "instr-resp": answers})
        if not safe:
            rows[-1] |= {"harmful_category": "folding", "harmful_subcategory": "paper"}
        kinds = {"safe_instruction": "safe_safe", "unsafe_instruction": "safe_unsafe", "instruction": "unsafe"}
        for one in answers:
            key = next(k for k in one if k != "response")
            expected.append({"id": f"vlguard/v{i}/{kinds[key]}", "prompt": one[key], "response": one["response"], "harmful": key != "safe_instruction",
                             "channel": f"vlguard {kinds[key]}", "width": 10 + i, "group": f"vlguard v{i}"})  # fmt: skip
    return Mini(b.VLGuard, {"test.json": text(rows), **files}, expected)


def siuo() -> Mini:
    rows = [{"question_id": i, "image": f"S-{i}.png", "question": f"What next with the {t}?", "category": "folding", "safety_warning": f"{t} is fragile"}
            for i, t in enumerate(THINGS)]  # fmt: skip
    files = {"siuo_gen.json": text(rows)} | {f"images/S-{i}.png": picture(10 + i) for i in range(len(THINGS))}
    expected = [{"id": f"siuo/{i}", "prompt": r["question"], "harmful": True, "width": 10 + i, "meta": {"safety_warning": r["safety_warning"]}}
                for i, r in enumerate(rows)]  # fmt: skip
    return Mini(b.SIUO, files, expected)


def mossbench() -> Mini:
    rows = {str(i): {"pid": str(i), "question": f"How to fold the {t}?", "image": f"images/{i}.png", "metadata": {"over": f"type {1 + i % 3}"}}
            for i, t in enumerate(THINGS)}  # fmt: skip
    files = {"information.json": text(rows)} | {f"images/{i}.png": picture(10 + i) for i in range(len(THINGS))}
    expected = [{"id": f"mossbench/{i}", "prompt": r["question"], "harmful": False, "width": 10 + int(i), "meta": {"over": f"type {1 + int(i) % 3}"}}
                for i, r in rows.items()]  # fmt: skip
    return Mini(b.MOSSBench, files, expected)


def harmbench() -> Mini:
    columns = [
        "Behavior",
        "BehaviorID",
        "FunctionalCategory",
        "SemanticCategory",
        "ImageFileName",
        "ImageDescription",
        "RedactedImageDescription",
    ]
    rows = [
        [f"Fold this {t}", f"fold_{i}", "multimodal", "folding", f"fold_{i}.png", "a sheet", "a ..."]
        for i, t in enumerate(THINGS)
    ]
    files = {"data/behavior_datasets/harmbench_behaviors_multimodal_all.csv": sheet(columns, rows)}
    files |= {f"data/multimodal_behavior_images/fold_{i}.png": picture(10 + i) for i in range(len(THINGS))}
    expected = [
        {"id": f"harmbenchmm/fold_{i}", "prompt": r[0], "behaviour": r[0], "harmful": True, "width": 10 + i}
        for i, r in enumerate(rows)
    ]
    return Mini(b.HarmBenchMM, files, expected)


def msts() -> Mini:
    columns = ["case_id", "prompt_type", "prompt_text", "unsafe_image", "hazard_category"]
    rows = [[f"c{i}", kind, f"{ask} I fold this? {t}", f"unsafe_image_{i:04d}", "folding"]
            for i, t in enumerate(THINGS) for kind, ask in (("assistance", "How do"), ("intention", "Should"))]  # fmt: skip
    files = {"data/prompts/english_multimodal.csv": sheet(columns, rows)}
    files |= {f"data/unsafe_images/unsafe_image_{i:04d}.jpg": picture(10 + i, "JPEG") for i in range(len(THINGS))}
    expected = [
        {
            "id": f"msts/{r[0]}/{r[1]}",
            "prompt": r[2],
            "harmful": True,
            "width": 10 + int(r[0][1:]),
            "group": f"msts {r[3]}",
        }
        for r in rows
    ]
    return Mini(b.MSTS, files, expected)


def advbench() -> Mini:
    rows = [[f"Fold a {t}", f"Sure, here is how to fold a {t}"] for t in THINGS]
    expected = [
        {"id": f"advbench/{i}", "prompt": r[0], "behaviour": r[0], "response": r[1], "harmful": True, "width": None}
        for i, r in enumerate(rows, 1)
    ]
    return Mini(b.AdvBench, {"data/advbench/harmful_behaviors.csv": sheet(["goal", "target"], rows)}, expected)


def jailbreakbench() -> Mini:
    files, expected = {}, []
    for kind in ("benign", "harmful"):
        rows = [
            [i, f"Fold a {kind} {t}", f"Sure, here is a {kind} fold", f"Fold {i}", "Folding", "Original"]
            for i, t in enumerate(THINGS)
        ]
        files[f"data/{kind}-behaviors.csv"] = sheet(["Index", "Goal", "Target", "Behavior", "Category", "Source"], rows)
        expected += [{"id": f"jailbreakbench/{kind}/{i}", "prompt": r[1], "behaviour": r[1], "response": r[2], "harmful": kind == "harmful",
                      "channel": f"jailbreakbench {kind}", "width": None} for i, r in enumerate(rows)]  # fmt: skip
    return Mini(b.JailbreakBench, files, expected)


def xstest() -> Mini:
    rows = [
        [i, f"How do I crush a {t}?", "contrast_folds" if i % 2 else "folds", "unsafe" if i % 2 else "safe"]
        for i, t in enumerate(THINGS)
    ]
    expected = [
        {"id": f"xstest/{i}", "prompt": r[1], "harmful": r[3] == "unsafe", "channel": f"xstest {r[3]}", "width": None}
        for i, r in enumerate(rows)
    ]
    return Mini(b.XSTest, {"xstest_prompts.csv": sheet(["id", "prompt", "type", "label"], rows)}, expected)


def orbench() -> Mini:
    rows = [[f"How do I crush a {t}?", "folding"] for t in THINGS]
    expected = [
        {"id": f"orbench/hard-1k/{i}", "prompt": r[0], "harmful": False, "width": None} for i, r in enumerate(rows, 1)
    ]
    return Mini(b.ORBench, {"or-bench-hard-1k.csv": sheet(["prompt", "category"], rows)}, expected)


def mmvet() -> Mini:
    rows = {f"v1_{i}": {"imagename": f"v1_{i}.png", "question": f"What is the {t}?", "answer": "paper<OR>card", "capability": ["ocr", "rec"], "imagesource": "x"}
            for i, t in enumerate(THINGS)}  # fmt: skip
    files = {"mm-vet.json": text(rows)} | {f"images/v1_{i}.png": picture(10 + i) for i in range(len(THINGS))}
    expected = [{"id": f"mmvet/v1_{i}", "prompt": r["question"], "response": "paper<OR>card", "harmful": False, "width": 10 + i,
                 "meta": {"capability": "ocr+rec"}} for i, r in enumerate(rows.values())]  # fmt: skip
    return Mini(b.MMVet, files, expected)


def mmbench() -> Mini:
    rows, expected = [], []
    for turn in range(2):
        for i, t in enumerate(THINGS):
            index = i + turn * 1_000_000
            image = base64.b64encode(picture(10 + i)).decode() if turn == 0 else str(i)
            turned = ["paper", "wood", "tin"] if turn == 0 else ["tin", "paper", "wood"]
            rows.append([index, f"What is the {t}?", "" if i % 2 else "look", *turned, "", image, "AB"[turn], "fine"])
            lines = ["Hint: look"] * (i % 2 == 0) + [f"Question: What is the {t}?", "Options:", *(f"{k}. {v}" for k, v in zip("ABC", turned)),
                                                     "Please select the correct answer from the options above."]  # fmt: skip
            expected.append({"id": f"mmbench/{index}", "prompt": "\n".join(lines), "response": "AB"[turn], "harmful": False, "width": 10 + i,
                             "group": f"mmbench {i}", "meta": {"answer": "paper", "turn": str(turn)}})  # fmt: skip
    columns = ["index", "question", "hint", "A", "B", "C", "D", "image", "answer", "category"]
    return Mini(b.MMBench, {"mmbench_dev_en_20231003.tsv": sheet(columns, rows, "\t")}, expected)


def scienceqa() -> Mini:
    files, expected = {}, []
    for split in ("train", "test"):
        rows = []
        for i, t in enumerate(THINGS):
            image = None if i % 2 else {"bytes": picture(10 + i), "path": None}
            rows.append(
                {
                    "image": image,
                    "question": f"What is the {t}?",
                    "choices": ["paper", "wood"],
                    "answer": i % 2,
                    "hint": "",
                    "subject": split,
                }
            )
            name = f"data/{split}-00000-of-00001-0a1b.parquet"
            if split == "test":
                prompt = f"Question: What is the {t}?\nOptions:\nA. paper\nB. wood\nAnswer with the letter of the right option."
                expected.append({"id": f"scienceqa/test/{name}/{i + 1}", "prompt": prompt, "response": "AB"[i % 2], "harmful": False,
                                 "width": None if i % 2 else 10 + i, "meta": {"answer": ("paper", "wood")[i % 2], "source_split": "test"}})  # fmt: skip
        files[name] = parquet(rows, image=IMAGE)
    return Mini(b.ScienceQA, files, expected)


def vqa() -> Mini:
    questions = [
        {"image_id": 100 + i // 2, "question": f"What is the {t}?", "question_id": 1000 + i}
        for i, t in enumerate(THINGS)
    ]
    answers = [{"question_type": "what is", "multiple_choice_answer": "paper", "answer_type": "other", "image_id": q["image_id"], "question_id": q["question_id"],
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": 1 + j} for j, a in enumerate(["paper", "paper", "card"])]}
               for q in questions]  # fmt: skip
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": text(
            {"info": {}, "data_subtype": "val2014", "questions": questions}
        )
    }
    files["v2_mscoco_val2014_annotations.json"] = text({"info": {}, "annotations": answers})
    files |= {f"val2014/COCO_val2014_{100 + i:012d}.jpg": picture(10 + i, "JPEG") for i in range(3)}
    expected = [{"id": f"vqav2/{q['question_id']}", "prompt": q["question"], "response": "paper", "harmful": False, "width": 10 + i // 2,
                 "group": f"coco {100 + i // 2}", "meta": {"answers": '["paper", "paper", "card"]', "source_split": "validation"}}
                for i, q in enumerate(questions)]  # fmt: skip
    return Mini(b.VQAv2, files, expected)


def coco() -> Mini:
    shown = [{"id": 100 + i, "file_name": f"{100 + i:012d}.jpg", "width": 10 + i, "height": 9} for i in range(4)]
    captions = [
        {"image_id": 100 + i, "id": 10 * i + k, "caption": f"a sheet {i} {k}"} for k in range(2) for i in range(4)
    ]
    files = {"annotations/captions_val2017.json": text({"images": shown, "annotations": captions})}
    files |= {f"val2017/{100 + i:012d}.jpg": picture(10 + i, "JPEG") for i in range(4)}
    expected = [{"id": f"cococaptions/{100 + i}", "prompt": "Describe the picture in one sentence.", "response": f"a sheet {i} 0", "harmful": False,
                 "width": 10 + i, "meta": {"captions": f'["a sheet {i} 0", "a sheet {i} 1"]'}} for i in range(4)]  # fmt: skip
    return Mini(b.COCOCaptions, files, expected)


def astra() -> Mini:
    files, expected = {}, []
    for budget in ("constrain_16", "unconstrain"):
        for i in (3, 16, 40, 41):
            width = 10 + i + 30 * (budget == "unconstrain")
            files[f"adv_img_jb/llava/{budget}/bad_prompt_{i}_adv.bmp"] = picture(width, "BMP")
            split = {3: None, 16: "validation", 40: "validation", 41: "test"}[i]
            expected.append({"id": f"astra/jb/llava/{budget}/{i}_adv", "prompt": "", "harmful": True, "width": width,
                             "group": f"astra jb {i}", "channel": f"astra jb {budget}", "meta": {"source_split": split} if split else {}})  # fmt: skip
    return Mini(b.ASTRAPictures, files, expected)


MAKERS: dict[str, Callable[[], Mini]] = {
    maker.__name__: maker
    for maker in (jailbreakv, jailbreakv_mini, redteam2k, mmsafetybench, mmsafetybench_parquet, figstep, figstep_pro, vlguard, siuo, mossbench,
                  harmbench, msts, advbench, jailbreakbench, xstest, orbench, mmvet, mmbench, scienceqa, vqa, coco, astra)
}  # fmt: skip
TEXTS = (".csv", ".tsv", ".json")
PICTURES = (".png", ".jpg", ".bmp")
