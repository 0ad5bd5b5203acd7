"""Text on pictures: one font, one way to place it."""

from __future__ import annotations

from PIL import ImageDraw, ImageFont

__all__ = ["PAPER", "QUIET", "TEXT", "Rgb", "font", "shorten", "write"]

Rgb = tuple[int, int, int]
PAPER: Rgb = (255, 255, 255)
TEXT: Rgb = (28, 30, 36)
QUIET: Rgb = (108, 112, 122)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font: everywhere the same, but little more than ASCII."""
    return ImageFont.load_default(size=size)


def write(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: Rgb = TEXT,
    anchor: str = "la",
) -> None:
    """Write a text beside a place: to its right ("la"), left ("ra"), or around it ("ma")."""
    pen.text(place, text, fill=colour, font=font(size), anchor=anchor)


def shorten(text: str, room_px: int, size: int) -> str:
    """Cut the middle out of a text that is too wide."""
    face = font(size)
    if face.getlength(text) <= room_px:
        return text
    keep = len(text)
    while keep > 2 and face.getlength(text[: keep // 2] + "…" + text[-(keep // 2) :]) > room_px:
        keep -= 1
    return text[: keep // 2] + "…" + text[-(keep // 2) :]
