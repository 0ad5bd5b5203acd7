"""The commands ``wsi annotate``: thin over ``curation``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_pipeline.command import plain_errors

__all__ = ["annotate_command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)


@click.group("annotate")
def annotate_command() -> None:
    """Annotate crops of slides: begin one, draw it, correct it, check them all."""


@annotate_command.command("new")
@click.argument("out", type=_OUT)
@click.option("--slide", "slide_path", required=True, type=_FILE, help="The slide.")
@click.option("--at", "centre", required=True, type=(float, float), help="Centre, level-0 px.")
@click.option("--side-um", required=True, type=float, help="Side of the square in micrometres.")
@click.option(
    "--label",
    "labels",
    required=True,
    multiple=True,
    help="nuclei, gland or lumen; repeat at will.",
)
@click.option("--objects", type=_FILE, help="Predictions to begin with: the slide's objects table.")
@click.option("--mpp", type=float, help="Micrometres per level-0 pixel.  [default: the slide's]")
@click.option(
    "--part", default="train", show_default=True, type=click.Choice(["train", "validation"])
)
@click.option("--tissue", default="", help="What is to be seen.")
@click.option("--note", default="", help="What else a reader should know.")
@click.option("--by", default="", help="Who begins.")
@click.option("--overwrite", is_flag=True, help="Throw away what is in OUT.")
def new_command(out: Path, overwrite: bool, slide_path: Path, **what: Any) -> None:  # noqa: ANN401
    """Begin the crop OUT.geojson, with a model's predictions or empty."""
    with plain_errors():
        from wsi_pipeline.curation.crops import write_crop
        from wsi_pipeline.curation.start import new_crop

        _check_name(out)
        _check_free(out, overwrite)
        crop = new_crop(out.stem, slide_path, **what)
        write_crop(crop, out)
    click.echo(_summary(out, crop))


@annotate_command.command("draw")
@click.argument("crop_path", metavar="CROP", type=_FILE)
@click.argument("out", type=_OUT)
@click.option("--slides", required=True, type=_FOLDER, help="Folder of the slides.")
@click.option("--zoom", type=float, help="Screen pixels a 0.5-um pixel.  [default: to ~1400 px]")
@click.option(
    "--part", "region", type=(float, float, float, float), help="x0 y0 x1 y1 in ruler pixels."
)
@click.option("--context", default=10.0, show_default=True, help="Ruler pixels around the crop.")
@click.option(
    "--plain",
    default="no",
    show_default=True,
    type=click.Choice(["no", "beside", "alone"]),
    help="The pixels without outlines: not, at the left of the outlined ones, or alone.",
)
@click.option("--ids/--no-ids", default=True, show_default=True, help="Numbers of the objects.")
@click.option("--grid/--no-grid", default=True, show_default=True, help="Lines every 50 px.")
def draw_command(crop_path: Path, out: Path, slides: Path, **how: Any) -> None:  # noqa: ANN401
    """Draw CROP.geojson as OUT.png."""
    with plain_errors():
        from wsi_pipeline.curation.crops import read_crop
        from wsi_pipeline.curation.overlay import Look, draw_crop, find_slide

        if out.suffix.lower() != ".png":
            raise click.ClickException(f"a picture's file ends in .png, not {out.name}")
        if out.exists() and out.samefile(crop_path):
            raise click.ClickException(f"{out} is the crop itself")
        crop = read_crop(crop_path)
        draw_crop(crop, find_slide(crop, slides), out, Look(**how))
    click.echo(str(out))


@annotate_command.command("apply")
@click.argument("crop_path", metavar="CROP", type=_FILE)
@click.argument("corrections", type=_FILE)
@click.option("--by", required=True, help="Who corrected.")
@click.option("--out", "-o", type=_OUT, help="The next round.  [default: in place of CROP]")
@click.option("--overwrite", is_flag=True, help="Throw away another crop that is in --out.")
def apply_command(
    crop_path: Path, corrections: Path, by: str, out: Path | None, overwrite: bool
) -> None:
    """Correct CROP.geojson by the verbs in the text CORRECTIONS.

    \b
    A place is x,y in ruler pixels of the drawn crop (0.5 um from its top-left corner).
      delete ID...                        merge ID ID...
      delete-in x0 y0 x1 y1 [KIND]        split ID x,y x,y ...
      add KIND x,y x,y x,y ...            grow ID... PX
      redraw ID x,y x,y x,y ...           kind ID... KIND
      ellipse KIND x,y MAJOR MINOR DEG    ignore x0 y0 x1 y1 [LABEL]
                                          ignore-polygon x,y x,y x,y ... [LABEL]
    One a line; # begins a comment. A line that cannot be applied stops everything.
    """  # noqa: D301 - click reads the character itself
    with plain_errors():
        from wsi_pipeline.curation.corrections import apply_corrections
        from wsi_pipeline.curation.crops import read_crop, write_crop

        target = out or crop_path
        _check_name(target)
        if not (target.exists() and target.samefile(crop_path)):
            _check_free(target, overwrite)
        text = corrections.read_text(encoding="utf-8-sig")
        after = apply_corrections(read_crop(crop_path), text, by=by)
        write_crop(after.crop.renamed(target.stem), target)
    for note in after.notes:
        click.echo(note)
    click.echo(_summary(target, after.crop))


@annotate_command.command("check")
@click.argument("folder", type=_FOLDER)
@click.option("--slides", type=_FOLDER, help="Folder of the slides, to compare their sizes.")
@click.option(
    "--mpp",
    "sizes",
    multiple=True,
    metavar="SLIDE=UM",
    help="Micrometres per level-0 pixel of a slide that says wrong ones; repeat at will.",
)
def check_command(folder: Path, slides: Path | None, sizes: tuple[str, ...]) -> None:
    """Check all crops of FOLDER, alone and together, and count their objects."""
    with plain_errors():
        from wsi_pipeline.curation.checking import check_crops

        if sizes and slides is None:
            raise click.UsageError("--mpp is of the slides in --slides")
        for line in check_crops(folder, slides, mpp=_pixel_sizes(sizes)):
            click.echo(line)


def _pixel_sizes(values: tuple[str, ...]) -> dict[str, float]:
    try:
        return {name: float(mpp) for name, mpp in (value.rsplit("=", 1) for value in values)}
    except ValueError as error:
        raise click.UsageError(f"--mpp wants SLIDE=UM, not {', '.join(values)}") from error


def _check_name(path: Path) -> None:
    if path.suffix != ".geojson":
        raise click.ClickException(f"a crop's file is named NAME.geojson, not {path.name}")


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise click.ClickException(f"{path} is there already; --overwrite throws it away")


def _summary(path: Path, crop: Any) -> str:  # noqa: ANN401 - a Crop, imported late
    counts = {kind: sum(o.kind == kind for o in crop.outlines) for kind in (*crop.kinds, "ignore")}
    objects = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{path}: round {len(crop.history) - 1}, {objects}"
