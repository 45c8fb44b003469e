"""Draws the timeline of a request as a PNG. Imported only for PNG output, because it needs Pillow."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.errors import InvalidInput
from services.cli.timeline import COMPLETED, HANDED_OVER, LOST, Attempt, Timeline
from services.cli.trace import note_of
from services.start_up import plain

_WIDTH, _MARGIN = 1_200, 16
_LEFT = 210
"""Horizontal position of the bars, in pixels."""

_ROW, _BAR = 44, 16
_TOP = 64
_FONT, _SMALL = 15, 12
_BACKGROUND, _INK, _FAINT, _GRID = "#ffffff", "#1f2328", "#656d76", "#d0d7de"
_WAIT = "#c8d1da"
_RUN = {COMPLETED: "#2da44e", HANDED_OVER: "#d4a72c", LOST: "#cf222e"}
_OTHER_RUN = "#0969da"
_CHECKPOINT, _DEATH, _TAKE_OVER = "#8250df", "#82071e", "#bf3989"
_TICKS = 8


def write_png(timeline: Timeline, path: Path) -> None:
    """Draw one row per attempt. Raises InvalidInput for a path that is not writable."""
    image = draw_timeline(timeline)
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise InvalidInput(f"output: {path} is not writable: {error.strerror}", field="output") from error


def draw_timeline(timeline: Timeline) -> Image.Image:
    """The timeline as an RGB image, 1,200 pixels wide."""
    rows = max(1, len(timeline.attempts))
    height = _TOP + _ROW * rows + 2 * _MARGIN + _SMALL
    image = Image.new("RGB", (_WIDTH, height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL)
    draw.text((_MARGIN, _MARGIN), plain(timeline.title), _INK, font)
    for tick in range(_TICKS + 1):
        moment = timeline.seconds * tick / _TICKS
        x = _x(moment, timeline.seconds)
        draw.line((x, _TOP, x, _TOP + _ROW * rows), _GRID)
        draw.text((x, _TOP - _SMALL - 6), f"{moment:.2f} s", _FAINT, small, anchor="ma")
    for row, attempt in enumerate(timeline.attempts):
        top = _TOP + _ROW * row + 6
        draw.text((_MARGIN, top), plain(f"{attempt.service} {attempt.number}"), _INK, font)
        _draw_attempt(draw, attempt, timeline.seconds, top)
        draw.text((_LEFT, top + _BAR + 3), plain(note_of(attempt)), _FAINT, small)
    for moment, epoch in timeline.take_overs:
        x = _x(moment, timeline.seconds)
        draw.line((x, _TOP, x, _TOP + _ROW * rows), _TAKE_OVER, 2)
        draw.text((x + 4, _TOP - 2), f"coordinator {epoch} took over", _TAKE_OVER, small)
    legend = "gray: waiting for a worker    diamond: step checkpoint    cross: worker lost"
    draw.text((_LEFT, height - _MARGIN - _SMALL), legend, _FAINT, small)
    return image


def _draw_attempt(draw: ImageDraw.ImageDraw, attempt: Attempt, seconds: float, top: int) -> None:
    end = seconds if attempt.ended is None else attempt.ended
    granted = end if attempt.granted is None else attempt.granted
    if attempt.queued is not None:
        draw.rectangle((_x(attempt.queued, seconds), top + 4, _x(granted, seconds), top + _BAR - 4), _WAIT)
    if attempt.granted is not None:
        color = _RUN.get(attempt.outcome, _OTHER_RUN)
        draw.rectangle(
            (_x(attempt.granted, seconds), top, max(_x(end, seconds), _x(granted, seconds) + 1), top + _BAR), color
        )
    middle = top + _BAR // 2
    for moment, _ in attempt.checkpoints:
        x = _x(moment, seconds)
        draw.polygon(((x, middle - 6), (x + 6, middle), (x, middle + 6), (x - 6, middle)), _CHECKPOINT, _BACKGROUND)
    if attempt.outcome == LOST:
        x = _x(end, seconds)
        draw.line((x - 7, middle - 7, x + 7, middle + 7), _DEATH, 4)
        draw.line((x - 7, middle + 7, x + 7, middle - 7), _DEATH, 4)


def _x(moment: float, seconds: float) -> int:
    share = min(1.0, moment / seconds) if seconds > 0 else 0.0
    return _LEFT + round(share * (_WIDTH - _LEFT - 3 * _MARGIN))
