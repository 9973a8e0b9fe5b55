"""Draws how much longer a step takes than it must, as bars: schedules side by side, in several settings."""

from ..schedule.names import SCHEDULES
from .canvas import WIDTH, Box, Drawing, Lines, Words, round_step

_LEFT, _TOP, _HEIGHT = 50, 58, 220  # pixels
_BAR = 36


def bars(title: str, about: str, settings: list[tuple[list[str], dict[str, float]]], note: str = "") -> Drawing:
    """Draw a group of bars for each setting.

    settings: the lines below a group, and for each word of SCHEDULES its step time over the lower bound, at least 1.
    """
    words = list(dict.fromkeys(word for _, ratios in settings for word in ratios))
    drawing = Drawing(f"{title}. {about}")
    add, foot = drawing.shapes.append, _TOP + _HEIGHT
    add(Words(16, 24, title, 15, is_bold=True))
    add(Words(16, 42, about, kind="soft"))
    most = max(ratio for _, ratios in settings for ratio in ratios.values()) - 1
    step = round_step(most / 6)
    for tick in range(int(most / step) + 1):
        y = foot - _HEIGHT * tick * step / most
        add(Lines([(_LEFT, y, WIDTH - 14, y)], "idle" if tick else "soft"))
        add(Words(_LEFT - 8, y + 4, f"{tick * step:.0%}", 11, "soft", anchor="end"))
    pitch = (WIDTH - 14 - _LEFT) / len(settings)
    for place, (lines, ratios) in enumerate(settings):
        middle = _LEFT + pitch * (place + 0.5)
        for index, word in enumerate(words):
            if word not in ratios:
                continue
            more = ratios[word] - 1
            x, high = middle + _BAR * (index - len(words) / 2), max(_HEIGHT * more / most, 1.5)
            add(Box(x + 1, foot - high, _BAR - 2, high, "bar", SCHEDULES[word].color, f"{word}: {more:.1%}"))
            add(Words(x + _BAR / 2, foot - high - 4, _percent(more), 11, anchor="middle"))
        for row, line in enumerate(lines):
            add(Words(middle, foot + 17 + 15 * row, line, 12, "soft" if row else "ink", anchor="middle"))
    drawing.height = foot + 17 + 15 * max(len(lines) for lines, _ in settings) + 8
    drawing.legend(
        [(f"{word}: {SCHEDULES[word].about}", [Box(0, 0, 14, 12, "key", SCHEDULES[word].color)]) for word in words], 16
    )
    drawing.note(note, 16)
    return drawing


def _percent(part: float) -> str:
    """Return two digits: 24%, 6.2%, 0%."""
    return f"{part * 100:.1f}%" if 0.0005 <= part < 0.0995 else f"{part * 100:.0f}%"
