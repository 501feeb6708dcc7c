"""One picture, from the bytes of a file to pixels of one size; bytes that are no picture are a sentence, no traceback.

Notable choices:

* The format is told by the content, never by a file's suffix, and is one of `FORMATS`: readers that start other
  programs, such as that of EPS, are never asked.
* A picture is refused by the size that its header says, before a pixel of it is decoded.
* Pixels are turned as the camera's note (EXIF) says; transparency lies on white; 16 bits of grey are scaled to 8; of
  an animation the first frame counts; CMYK becomes RGB by formula, without colour profiles.
* Another size is reached with bicubic interpolation that averages over all pixels it leaves out, as Pillow does it.
"""

import io
import warnings
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_BYTES = 100_000_000  # of a file
MOST_PIXELS = 50_000_000  # of a picture: 0.2 GB while it is decoded

# What Pillow says of odd files goes to no terminal: a picture is read or refused, and a message is ours.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decoded(content: bytes, *, height: int, width: int, fit: Fit = "crop") -> tuple[NDArray[np.uint8] | None, str]:
    """Return the pixels of a picture, (height, width, 3), and what is wrong with it ('' if nothing).

    Args:
        content: of a file in one of `FORMATS`.
        height: of the result, in pixels.
        width: of the result.
        fit: how another shape becomes this one: crop cuts off what is too long, in equal parts of both ends; pad adds
            white to what is too short; stretch changes the proportions.

    >>> pixels, problem = decoded(b"GIF89a, cut short", height=8, width=8)
    >>> pixels is None, problem
    (True, 'the picture is damaged or cut short')
    >>> decoded(b"a letter", height=8, width=8)[1]
    'no picture: its content is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, whatever its name says'
    """
    if not content:
        return None, "the file is empty"
    if len(content) > MOST_BYTES:
        return None, f"it has {len(content) / 1e6:,.0f} MB, expected at most {MOST_BYTES // 10**6}"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                return None, _too_large(f"{image.width} x {image.height} pixels")
            plain, problem = _on_white(image)
            return (None, problem) if plain is None else (_pixels(plain, height, width, fit), "")
    except UnidentifiedImageError:
        known = any(content.startswith(start) for start in _STARTS)
        return None, "the picture is damaged or cut short" if known else (
            f"no picture: its content is none of {', '.join(FORMATS)}, whatever its name says"
        )
    except Image.DecompressionBombError:
        return None, _too_large("many times as many pixels")
    except Exception:  # each format's reader has errors of its own for damaged bytes
        return None, "the picture is damaged or cut short"


_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def _too_large(found: str) -> str:
    return f"the picture has {found}, expected at most {MOST_PIXELS // 10**6} million: make it smaller"


def _on_white(image: Image.Image) -> tuple[Image.Image | None, str]:
    """Return the first frame upright, in RGB of 8 bits."""
    image.load()
    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("I", "F"):
        return None, "its pixels are numbers of 32 bits, which do not say what is white: save it with 8 or 16 bits"
    if turned.mode.startswith("I;16"):
        grey = (np.asarray(turned).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB"), ""
    if turned.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in turned.info:
        above = turned.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        white.alpha_composite(above)
        return white.convert("RGB"), ""
    return turned.convert("RGB"), ""


def _pixels(image: Image.Image, height: int, width: int, fit: Fit) -> NDArray[np.uint8]:
    size, smooth = (width, height), Image.Resampling.BICUBIC
    if fit == "stretch":
        sized = image.resize(size, smooth)
    elif fit == "pad":
        sized = ImageOps.pad(image, size, smooth, color="white")
    else:
        sized = ImageOps.fit(image, size, smooth)
    return np.asarray(sized, dtype=np.uint8)
