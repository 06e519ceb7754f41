"""Pictures are what a viewer shows, and cost nothing until they are looked at."""

import copy
import gc
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps

from care_lens.core import Example, PictureError, PictureNotFoundError, examples_digest, open_picture, shown_picture
from care_lens.core import pictures as module

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_a_plain_picture_is_itself(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    picture = open_picture(path)
    assert isinstance(picture, Image.Image) and picture.size == (7, 5)
    assert np.array_equal(pixels(picture), RGB)
    assert picture == Image.fromarray(RGB) and Image.fromarray(RGB) == picture
    assert shown_picture(picture) is picture
    memory = Image.fromarray(RGB)
    assert shown_picture(memory) is memory
    assert Example("x", image=picture).image is picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", stored, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    wanted = stored if orientation == 1 else stored.transpose(turn[orientation])
    picture = open_picture(path)
    assert picture.size == wanted.size
    near = 30 if suffix == "jpg" else 0
    assert np.abs(pixels(picture).astype(int) - np.asarray(wanted).astype(int)).mean() <= near
    with Image.open(path) as opened:
        assert picture == Example("x", image=opened).image


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()[6:]
    chunk = struct.pack(">I4s", len(content), b"eXIf") + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    whole = saved(tmp_path / "a.png", Image.fromarray(RGB)).read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    picture = open_picture(tmp_path / "a.png")
    assert picture.size == (5, 7)
    assert np.array_equal(pixels(picture), np.rot90(RGB, -1))


def text_page(mode):
    """Black text on a transparent page."""
    page = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    draw = ImageDraw.Draw(page)
    draw.text((2, 2), "make", fill=(0, 0, 0, 255))
    draw.line((2, 18, 30, 18), fill=(0, 0, 0, 255))
    return page if mode == "RGBA" else page.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_black_text_on_a_transparent_page_stays_legible(mode):
    page = text_page("LA").convert("La") if mode == "La" else text_page(mode)
    alpha = np.asarray(text_page("RGBA"))[..., 3].astype(float)
    seen = pixels(Example("read", image=page).image).astype(float)
    assert np.abs(seen - (255 - alpha)[..., None]).max() <= 1  # alpha 255: black; 0: white
    assert seen.min() == 0 and seen.max() == 255


def test_transparent_palettes(tmp_path):
    page = Image.new("P", (4, 1))
    page.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    page.putdata([0, 1, 2, 3])
    wanted = np.array([[[255, 255, 255], [255, 127, 127], [0, 255, 0], [0, 0, 255]]])
    png = open_picture(saved(tmp_path / "a.png", page, transparency=bytes([0, 128, 255, 255])))
    assert np.abs(pixels(png).astype(int) - wanted).max() <= 1
    gif = open_picture(saved(tmp_path / "a.gif", page, transparency=0))
    wanted[0, 1] = [255, 0, 0]
    assert np.array_equal(pixels(gif), wanted)
    grey = open_picture(saved(tmp_path / "g.png", Image.fromarray(np.array([[0, 10]], np.uint8)), transparency=0))
    assert pixels(grey)[0, :, 0].tolist() == [255, 10]


@pytest.mark.parametrize(("suffix", "kind"), [("png", "uint16"), ("tif", "uint16"), ("pgm", "uint16")])
def test_sixteen_bit_grey(tmp_path, suffix, kind):
    values = np.array([[0, 257, 32896, 65535]], kind)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(values))
    assert pixels(open_picture(path))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(open_picture(path))[0, :, 2].tolist() == [0, 1, 128, 255]


def test_floats_and_whole_numbers(tmp_path):
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert pixels(open_picture(saved(tmp_path / "a.tif", Image.fromarray(unit))))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(shown_picture(Image.fromarray(unit * 255)))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(shown_picture(Image.fromarray(np.array([[0, 128, 255]], np.int32))))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert pixels(shown_picture(Image.fromarray(np.array([[0, 65535]], np.int32))))[0, :, 0].tolist() == [0, 255]
    for wrong in ([[-1.0, 0.0]], [[float("nan")]], [[float("inf")]], [[70000.0]]):
        with pytest.raises(PictureError, match="0 to 65535"):
            shown_picture(Image.fromarray(np.array(wrong, np.float32)))


def test_other_colour_spaces(tmp_path):
    image = Image.fromarray(RGB)
    for mode, near in (("CMYK", 0), ("YCbCr", 4), ("HSV", 8)):
        made = shown_picture(image.convert(mode))
        assert np.abs(pixels(made).astype(int) - RGB.astype(int)).max() <= near, mode
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    # Eight bits of LAB do not hold every saturated colour.
    differ = np.abs(pixels(open_picture(saved(tmp_path / "lab.tif", lab))).astype(int) - RGB.astype(int))
    assert np.median(differ) <= 2 and differ.max() <= 20
    assert np.array_equal(pixels(open_picture(saved(tmp_path / "cmyk.tif", image.convert("CMYK")))), RGB)
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert pixels(open_picture(saved(tmp_path / "bits.png", bits)))[0, :, 1].tolist() == [0, 255]


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_the_first_of_several_frames_and_a_word_about_it(tmp_path, caplog, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    picture = open_picture(path)
    assert picture.getpixel((3, 3)) == (255, 0, 0)
    assert "3 frames: the first" in caplog.text


def test_files_that_are_no_pictures_are_named(tmp_path):
    with pytest.raises(PictureNotFoundError, match=r"gone\.png"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(PictureError, match=r"text\.png must be a picture"):
        open_picture(tmp_path / "text.png")
    with pytest.raises(PictureError, match="must be a picture"):
        open_picture(tmp_path)
    path = saved(tmp_path / "cut.png", Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:3000])
    cut = open_picture(path)
    with pytest.raises(PictureError, match=r"cut\.png must be a whole picture"):
        cut.tobytes()


def test_a_file_that_changes_behind_a_picture_is_noticed(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    picture = open_picture(path)
    assert picture.tobytes() == RGB.tobytes()
    Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))).save(path)
    with pytest.raises(PictureError, match="has changed"):
        picture.tobytes()
    path.unlink()
    with pytest.raises(PictureNotFoundError, match="no such file"):
        picture.resize((2, 2))


def test_edits_in_place_stay_with_the_picture(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    picture, other = open_picture(path), open_picture(path)
    ImageDraw.Draw(picture).point((0, 0), "red")
    picture.putpixel((1, 0), (1, 2, 3))
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == ((255, 0, 0), (1, 2, 3))
    assert np.array_equal(pixels(other), RGB) and np.array_equal(pixels(open_picture(path)), RGB)
    assert picture != other
    assert copy.deepcopy(picture) == picture and pickle.loads(pickle.dumps(picture)) == picture
    assert pickle.loads(pickle.dumps(other)) == other and len(pickle.dumps(other)) < 400
    other.thumbnail((3, 3))
    assert other.size == (3, 2) and np.asarray(other).shape == (2, 3, 3)
    other.close()


def test_pillow_works_on_it_as_on_any_image(tmp_path):
    memory = Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8)))
    picture = open_picture(saved(tmp_path / "a.png", memory))
    for work in (
        lambda i: i.resize((9, 11)), lambda i: i.crop((1, 1, 9, 9)), lambda i: i.convert("L"), lambda i: i.copy(),
        lambda i: i.rotate(30), lambda i: i.transpose(Image.Transpose.ROTATE_90), lambda i: ImageOps.invert(i),
        lambda i: i.split()[1], lambda i: i.quantize(8), lambda i: Image.blend(i, memory, 0.5),
    ):  # fmt: skip
        assert work(picture).tobytes() == work(memory).tobytes()
    assert picture.getbbox() == memory.getbbox() and picture.getextrema() == memory.getextrema()
    assert examples_digest([Example("a", image=picture)]) == examples_digest([Example("a", image=memory)])
    assert picture.histogram() == memory.histogram()
    picture.save(tmp_path / "b.png")
    assert open_picture(tmp_path / "b.png") == picture


def test_no_file_stays_open_and_few_pixels_stay_in_memory(tmp_path, monkeypatch):
    recent = module._Recent(limit=4 * 64 * 64 * 5)
    monkeypatch.setattr(module, "_recent", recent)
    for i in range(40):
        saved(tmp_path / f"{i}.png", Image.new("RGB", (64, 64), (i, 0, 0)))
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    held = [Example("x", image=open_picture(tmp_path / f"{i}.png")) for i in range(40)]
    for _ in range(2):
        assert [e.image.getpixel((9, 9))[0] for e in held] == list(range(40))
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after < before + 20  # of 40 files; what else a worker of the tests opens meanwhile is not theirs
    assert len(recent._held) == 5


MEASURE = """
import resource, sys
from PIL import Image
from care_lens.data import read_examples
from care_lens.core import examples_digest
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_examples(sys.argv[1])
for row in rows:
    row.image.tobytes()
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_reading_all_pictures_of_a_folder_takes_the_memory_of_a_batch(tmp_path):
    Image.new("RGB", (760, 760), "red").save(tmp_path / "a.png")
    for i in range(200):
        os.link(tmp_path / "a.png", tmp_path / f"{i}.png")
    lines = "".join(f'{{"prompt": "p", "image": "{i}.png"}}\n' for i in range(200))
    (tmp_path / "e.jsonl").write_text(lines)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "e.jsonl"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 120 * 1024  # KiB; 444 MB were taken when pixels were held
