"""Image files that strangers send, read within bounds: what one claims to be is checked before anything is decoded."""

import io
import warnings

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 2**25  # more than a photograph has
_ENOUGH = "send a smaller one: models look at a few megapixels at most"


class ImageError(ValueError):
    """A file that is no image, or not one that is read; fit for the client to read."""


def read_image(data: bytes) -> Image.Image:
    """The picture in a file, upright, in RGB; of an animation its first frame. ImageError if it is none of FORMATS, has
    more than MAX_PIXELS or is damaged."""
    image = _opened(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"the image has {width} x {height} pixels, more than {MAX_PIXELS}; {_ENOUGH}"
        )
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own
        raise ImageError(f"the image is damaged: {str(error)[:200]}") from error


def _opened(data: bytes) -> Image.Image:
    """Its header read, nothing decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is less
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more than {MAX_PIXELS} pixels; {_ENOUGH}") from None
    except Exception as error:
        raise ImageError(f"this is no image that is read: {', '.join(FORMATS)}") from error
