"""Pictures as a viewer shows them: 8-bit RGB, upright, on white, read from the disk when they are used.

A model must see what a person sees who opens the file. :func:`shown_picture` makes that of any PIL image, and
:func:`open_picture` of a file, without holding its pixels or an open file, so that thousands of pictures cost nothing until
they are looked at. What is done, by what a file may hold:

- EXIF orientation (files only): the picture is turned.
- transparency, in any form: laid on white. Black text on a transparent page stays black text.
- 16-bit grey: divided by 257. 32-bit whole numbers and floats have no white of their own: it is 1 (floats), 255 or 65535,
  the smallest of them that no pixel exceeds (65535 for PNG and PGM, whose header says so).
- palettes, CMYK, HSV, YCbCr, LAB: converted to RGB. Colour profiles are not applied.
- animations and files of several pages: the first, and a warning says so.

    picture = open_picture("page.png")  # reads the header only
    Example("what does it say?", image=picture)
"""

import logging
import struct
import threading
import warnings
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageFile, ImageOps

from care_lens.core.errors import CareLensError

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
#: Formats whose further frames are other pictures than the first (those of MPO, which telephones write, are previews of it).
_FRAMED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
#: Pixels kept of recently used files, in bytes: about a batch of them.
_KEPT_BYTES = 64 * 2**20


class PictureError(CareLensError, ValueError):
    """A file is no picture, is damaged, or has changed since it was opened; or pixels have no meaning as a picture."""


class PictureNotFoundError(PictureError, FileNotFoundError):
    """There is no such file."""


@runtime_checkable
class PictureSource(Protocol):
    """Where the bytes of a picture come from that is no file of its own: in an archive, in a column of a table.

    It can be hashed, and pickled if the pictures are to be. ``str()`` of it names it in errors.
    """

    def read(self) -> bytes:
        """The bytes of the picture's file."""
        ...

    def stamp(self) -> tuple[int, int]:
        """Size and time of what holds it: another stamp means that it has changed since."""
        ...


def open_picture(path: str | Path | PictureSource) -> Image.Image:
    """A picture on the disk as a viewer shows it, read when its pixels are used.

    Args:
        path: Of a file in any format that Pillow reads, or a :class:`PictureSource` of the bytes of one.

    Returns:
        An RGB picture. It is a `PIL.Image.Image` and knows its size; its pixels are decoded when they are asked for, and only those of
        the last few pictures (64 MiB) stay in memory. No file is held open. Editing it in place gives it pixels of its own; the file
        stays as it is.

    Raises:
        PictureNotFoundError: If there is no such file; it is a FileNotFoundError.
        PictureError: If it is no picture. Damage behind the header, or a file that has changed since, is found when the pixels are used.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGBA", (4, 2)).save(f"{folder}/page.png")
        ...     picture = open_picture(f"{folder}/page.png")
        ...     picture.size, picture.mode, picture.getpixel((0, 0))
        ((4, 2), 'RGB', (255, 255, 255))
    """
    if not isinstance(path, (str, Path, PictureSource)):
        raise TypeError(f"path must be a str or a Path, got {type(path).__name__}")
    return PictureFile(path)


def shown_picture(image: Image.Image) -> Image.Image:
    """A PIL image as a viewer shows it, in 8-bit RGB.

    Args:
        image: Of any mode. Of an opened file the EXIF orientation counts too; its current frame is taken.

    Returns:
        The image itself where it is RGB and upright already (an opened file stays unread), else a new one. The module's
        text says what is done to which mode.

    Raises:
        PictureError: If its numbers have no meaning as a picture: negative, not finite, or above 65535.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image must be a PIL image, got {type(image).__name__}; make one with PIL.Image.fromarray or open_picture"
        )
    if isinstance(image, PictureFile):
        return image
    turned = isinstance(image, ImageFile.ImageFile) and _orientation(image) != 1
    if image.mode == "RGB" and not turned and "transparency" not in image.info:
        return image
    name = image.format
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image, name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    if image.mode == "LAB":
        return _from_lab(image)
    return _bare(image.convert("RGB"))


class PictureFile(Image.Image):
    """What :func:`open_picture` returns: an RGB image whose pixels are on the disk."""

    _path: Path | PictureSource
    _own: Any = None

    def __init__(self, path: str | Path | PictureSource) -> None:
        super().__init__()
        if isinstance(path, (str, Path)) and "\0" in str(path):
            raise PictureError(f"path must be of a file, got {str(path)!r}, which holds a null character")
        self._path = Path(path).absolute() if isinstance(path, (str, Path)) else path
        self._stamp = _stamp(self._path)
        self._size = _shown_size(self._path)
        self._mode, self.readonly = "RGB", 1

    @property
    def filename(self) -> str:
        """The path of the file, or the name of the source."""
        return str(self._path)

    # Pillow keeps an image's pixels in `im` (from version 11 on in `_im` behind it). Here they are decoded at every use, and
    # kept only where an edit in place has made them the picture's own: `readonly` makes Pillow copy them before it edits.
    @property
    def im(self) -> Any:
        """Pillow's own pixels."""
        return _recent.pixels(self._path, self._stamp, self._size) if self._own is None else self._own

    @im.setter
    def im(self, pixels: Any) -> None:
        self._own = pixels

    _im = im  # type: ignore[assignment]

    def close(self) -> None:
        """Nothing to close: no file is held open."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As PIL's; the picture goes on being read from its own file."""
        self.copy().save(fp, format, **params)

    def __eq__(self, other: object) -> bool:
        """Whether the other is an image of the same pixels."""
        if not isinstance(other, Image.Image):
            return NotImplemented
        return (self.mode, self.size) == (other.mode, other.size) and self.tobytes() == other.tobytes()

    __hash__ = None  # type: ignore[assignment]  # as of PIL's images, which compare by pixels

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is None:
            return open_picture, (str(self._path) if isinstance(self._path, Path) else self._path,)
        return Image.frombytes, (self.mode, self.size, self.tobytes())


class _Recent:
    """Decoded pixels of the files used last, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._held: OrderedDict[tuple[Path | PictureSource, tuple[int, int]], tuple[int, Any]] = OrderedDict()

    def pixels(self, path: Path | PictureSource, stamp: tuple[int, int], size: tuple[int, int]) -> Any:
        if _stamp(path) != stamp:
            raise PictureError(
                f"{path} must be as it was when it was opened, but it has changed; read the examples again"
            )
        with self._lock:
            if (path, stamp) in self._held:
                self._held.move_to_end((path, stamp))
                return self._held[path, stamp][1]
        picture = _decode(path)
        if picture.size != size:
            raise PictureError(f"{path} must be of {size} pixels as its header says, got {picture.size}; save it again")
        with self._lock:
            self._held[path, stamp] = 4 * size[0] * size[1], picture.im
            while len(self._held) > 1 and sum(n for n, _ in self._held.values()) > self._limit:
                self._held.popitem(last=False)
        return picture.im


_recent = _Recent(_KEPT_BYTES)


def _opened(path: Path | PictureSource) -> ImageFile.ImageFile:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path if isinstance(path, Path) else BytesIO(path.read()))
    except PictureError:  # of a source
        raise
    except FileNotFoundError:
        raise PictureNotFoundError(f"{path} must be a picture, but there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} must be a picture that Pillow reads ({error}); save it as PNG or JPEG") from None


def _decode(path: Path | PictureSource) -> Image.Image:
    with _opened(path) as image:
        try:
            image.load()
            picture = shown_picture(image)
            return picture.copy() if picture is image else picture
        except PictureError as error:
            raise PictureError(f"{path}: {error}") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
            raise PictureError(f"{path} must be a whole picture, but its pixels cannot be read ({error})") from None


def _shown_size(path: Path | PictureSource) -> tuple[int, int]:
    """Width and height as shown, from the header; says so where there are further frames."""
    with _opened(path) as image:
        if image.format in _FRAMED and getattr(image, "is_animated", False):
            log.warning("%s has %d frames: the first is used", path, getattr(image, "n_frames", 2))
            image.seek(0)
        width, height = image.size
        # Pillow turns TIFF itself, and gives the size of the turned picture.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def _stamp(path: Path | PictureSource) -> tuple[int, int]:
    if not isinstance(path, Path):
        return path.stamp()
    try:
        about = path.stat()
    except FileNotFoundError:
        raise PictureNotFoundError(f"{path} must be a picture, but there is no such file") from None
    except OSError as error:
        raise PictureError(f"{path} must be a picture that can be read ({error})") from None
    return about.st_size, about.st_mtime_ns


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 (upright) to 8, without decoding the pixels."""
    told = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"} & {*image.info}
    if image.format == "PNG" and not told and image.fp is not None and not _png_has_exif(image.fp):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, TypeError, SyntaxError, KeyError, struct.error):
        return 1  # viewers show a picture whose EXIF block is damaged as it is stored


def _png_has_exif(file: Any) -> bool:
    """Whether a PNG has an EXIF chunk, which may stand behind the pixels, where Pillow finds it only by decoding them."""
    here = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return True
            file.seek(length + 4, 1)
        return False
    finally:
        file.seek(here)


def _grey(image: Image.Image, name: str | None) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or (values.size and (values.min() < 0 or values.max() > 65535)):
        raise PictureError(
            f"pixels of a {image.mode!r} picture must be finite numbers of 0 to 65535, got some outside; scale them to 0 to 255 first"
        )
    highest = values.max(initial=0)
    if image.mode != "F" and (image.mode != "I" or name in ("PNG", "PPM")):
        white = 65535.0
    else:
        white = next(w for w in (1.0, 255.0, 65535.0) if highest <= w and (w > 1 or image.mode == "F"))
    grey = Image.fromarray(np.floor(values * (255 / white) + 0.5).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return _on_white(grey.convert("RGBA"))
    return grey.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGBA", image.size, "white")
    return _bare(Image.alpha_composite(page, image).convert("RGB"))


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # a part of Pillow that some builds lack

    made = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert made is not None
    return _bare(made)


def _bare(image: Image.Image) -> Image.Image:
    """Without what its file said beside the pixels, which no longer holds."""
    image.info = {}
    return image
