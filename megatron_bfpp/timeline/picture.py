"""Draws timelines below each other on one time axis: what every rank computes, sends, receives, gathers and reduces."""

from collections.abc import Sequence

from ..schedule import Op, Span, Timeline
from ..schedule.formats import title as sizes
from ..schedule.names import SCHEDULES
from ..schedule.replay import Prediction
from .canvas import WIDTH, Box, Drawing, Lines, Words, round_step, text_width
from .measured import Measured
from .planned import collectives

Named = Sequence[tuple[str, Timeline]]  # name, timeline

_LEFT, _RIGHT, _TOP = 76, 14, 48  # pixels: the ranks' names, the margin, the titles of a panel
_ROW, _LANE, _GAP = 21, 14, 7  # pixels: what a rank computes, its collectives, before the next rank
_SHADES = {  # colours of the first chunk and the last one
    Op.F: ((191, 217, 245), (24, 84, 160)),
    Op.B: ((193, 230, 196), (24, 110, 62)),
    Op.I: ((176, 226, 222), (8, 104, 110)),
    Op.W: ((233, 226, 208), (158, 146, 118)),  # calm: no other rank waits for it
}
NAMES = {Op.F: "forward", Op.B: "backward", Op.I: "input's gradient", Op.W: "weights' gradient"}
_COLLECTIVES = {Op.REDUCE_GRAD: ("reduction", "#7048e8", "#ffffff"), Op.UNSHARD: ("gather", "#d0bfff", "#1f2328")}

UNKNOWN = "waits for messages are unknown: Megatron's own loop does not show them"


def picture(timelines: Named, unit: str = "forward units", forward: float = 1.0, note: str = "") -> Drawing:
    """Draw named timelines. A name of names.SCHEDULES brings its colour and what it stands for.

    unit, forward: of all times, and how long a forward is in it; wide schedules get at least 3 pixels per forward.
    note: a line at the foot, such as what messages cost.
    """
    end = max(timeline.step_time for _, timeline in timelines)
    scale = max((WIDTH - _LEFT - _RIGHT) / end, 3.0 / forward)
    lines = [_headline(name, each, timelines[0], unit) for name, each in timelines]
    drawing = Drawing("; ".join(lines), round(_LEFT + end * scale + _RIGHT))
    for place, ((name, timeline), headline) in enumerate(zip(timelines, lines, strict=True)):
        panel = _Panel(drawing, timeline, scale)
        panel.titles(name, headline)
        panel.ranks()
        if place and timeline.step_time < timelines[0][1].step_time:
            panel.until(timelines[0][1].step_time)
    _axis(drawing, scale, end)
    _legend(drawing, timelines, unit)
    drawing.note(note, _LEFT)
    return drawing


def _headline(name: str, timeline: Timeline, first: tuple[str, Timeline], unit: str) -> str:
    words = f"{name}: step {timeline.step_time:.6g} {unit}, bubble {timeline.bubble_fraction:.1%}"
    if timeline is first[1]:
        return words
    change = timeline.step_time / first[1].step_time - 1
    if abs(change) < 0.0005:
        return f"{words}, as long as {first[0]}"
    return f"{words}, {abs(change):.1%} {'shorter' if change < 0 else 'longer'} than {first[0]}"


def shade(op: Op, chunk: int, chunks: int) -> tuple[str, bool]:
    """Return the colour of a chunk, and whether it wants white text on it."""
    part = chunk / max(1, chunks - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(*_SHADES[op], strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", 0.3 * red + 0.6 * green + 0.1 * blue < 140


class _Panel:
    """One timeline, drawn at the foot of a drawing."""

    def __init__(self, drawing: Drawing, timeline: Timeline, scale: float):
        self.drawing, self.timeline, self.scale, self.shape = drawing, timeline, scale, timeline.shape
        self.top = drawing.height + _TOP
        self.has_lane = isinstance(timeline, Prediction) and bool(_ops(timeline))
        self.pitch = _ROW + _GAP + (_LANE if self.has_lane else 0)
        self.add = drawing.shapes.append
        drawing.height = self.top + self.shape.pp_size * self.pitch

    def x(self, time: float) -> float:
        return _LEFT + time * self.scale

    def y(self, pp_rank: int) -> float:
        return self.top + pp_rank * self.pitch

    def titles(self, name: str, headline: str) -> None:
        known = SCHEDULES.get(name)
        about = f"{known.about}; {sizes(self.shape)}" if known else sizes(self.shape)
        if known:
            self.add(Box(_LEFT, self.top - 38, 5, 30, "schedule", known.color))
        x = _LEFT + (12 if known else 0)
        self.add(Words(x, self.top - 26, headline, 14, is_bold=True))
        self.add(Words(x, self.top - 9, about, kind="soft"))
        if isinstance(self.timeline, Measured) and self.timeline.exposed_p2p is None:
            after = x + text_width(about, 12) + 20
            self.add(Words(after, self.top - 9, UNKNOWN, kind="warning"))

    def ranks(self) -> None:
        if isinstance(self.timeline, Prediction):
            self._messages(self.timeline)  # first: they pass behind the rows
            for pp_rank in range(self.shape.pp_size):
                for span in collectives(self.timeline, pp_rank):
                    self._collective(span, self.y(pp_rank) + _ROW + 1)
        for pp_rank, spans in enumerate(self.timeline.spans):
            y = self.y(pp_rank)
            self.add(Words(_LEFT - 8, y + 15, f"pp_rank {pp_rank}", anchor="end"))
            self.add(Box(_LEFT, y, self.timeline.step_time * self.scale, _ROW, "idle"))
            for span in spans:
                self._compute(span, y)
        if isinstance(self.timeline, Measured):
            self._waits(self.timeline)

    def until(self, first_s: float) -> None:
        """Mark where the step of the first panel ends."""
        x = self.x(first_s)
        self.add(Lines([(x, self.top - 4, x, self.drawing.height - _GAP + 4)], "soft", 1.2, "4 3"))

    def _messages(self, predicted: Prediction) -> None:
        """Draw a line from each send to its arrival, if messages take time."""
        if not takes_time(predicted):
            return
        lines = []
        for each in predicted.messages:
            source, target = self.shape.rank_of(each.send.stage), self.shape.rank_of(each.receive.stage)
            ends = (_ROW, 0) if target > source else (0, _ROW)
            lines.append((self.x(each.sent), self.y(source) + ends[0], self.x(each.arrived), self.y(target) + ends[1]))
        self.add(Lines(lines, "message", max(0.3, min(0.8, 0.08 * self.scale))))

    def _collective(self, span: Span, y: float) -> None:
        name, color, ink = _COLLECTIVES[span.action.op]
        whole = f"{name}, chunk {self.shape.chunk_of(span.action.stage)}"
        self._bar(span, Box(0, y, 0, _LANE - 1, name, color, whole), (whole, name, name[0].upper()), 10, ink)

    def _compute(self, span: Span, y: float) -> None:
        stage, op, microbatch = span.action
        chunk = self.shape.chunk_of(stage)
        color, is_dark = shade(op, chunk, self.shape.num_chunks)
        box = Box(0, y, 0, _ROW, op.value, color, f"{span.action} (chunk {chunk})")
        self._bar(span, box, (str(microbatch),), 10.5, "#ffffff" if is_dark else "#1f2328")

    def _bar(self, span: Span, box: Box, labels: tuple[str, ...], size: float, ink: str) -> None:
        """Add a box from the start to the end of a span, with the longest of its labels that fits."""
        x, wide = self.x(span.start), (span.end - span.start) * self.scale
        about = f"{box.about}: {span.start:.6g} to {span.end:.6g}"
        self.add(box._replace(x=x, width=max(wide - 0.8, 0.8), about=about))
        label = next((each for each in labels if text_width(each, size) + 2 <= wide), None)
        if label is not None:
            middle = x + wide / 2 - 0.4
            self.add(Words(middle, box.y + box.height / 2 + 0.36 * size, label, size, color=ink, anchor="middle"))

    def _waits(self, measured: Measured) -> None:
        """Draw bars along the foot of the rows, which leaves the actions that wait to be seen."""
        for pp_rank, waits in enumerate(measured.waits):
            y = self.y(pp_rank) + _ROW - 5
            for action, kind, start, end in waits:
                if (end - start) * self.scale >= 0.3:
                    about = f"waits for {action}: {end - start:.6g}"
                    self.add(Box(self.x(start), y, (end - start) * self.scale, 5, f"wait-{kind}", "", about))


def takes_time(predicted: Prediction) -> bool:
    """Return whether any message is later than its send and its receive."""
    return any(each.arrived > max(each.sent, each.posted) for each in predicted.messages)


def _ops(predicted: Prediction) -> set[Op]:
    """Return which collectives take time."""
    ranks = range(predicted.shape.pp_size)
    return {span.action.op for pp_rank in ranks for span in collectives(predicted, pp_rank)}


def _axis(drawing: Drawing, scale: float, end: float) -> None:
    """Draw ticks at least 60 pixels apart, at round numbers."""
    y, step = drawing.height, round_step(60 / scale)
    for count in range(int(end / step) + 1):
        x = _LEFT + count * step * scale
        drawing.shapes.append(Box(x - 0.5, y, 1, 4, "soft"))
        drawing.shapes.append(Words(x, y + 16, f"{count * step:g}", 11, "soft", anchor="middle"))
    drawing.height += 30


def _legend(drawing: Drawing, timelines: Named, unit: str) -> None:
    """Name what is drawn, and only that."""
    chunks = max(each.shape.num_chunks for _, each in timelines)
    shown = sorted({0, *(chunk * (chunks - 1) // 3 for chunk in range(4)), chunks - 1})
    entries: list[tuple[str, list[Box | Lines]]] = []
    run = {span.action.op for _, each in timelines for spans in each.spans for span in spans}
    for op, name in NAMES.items():
        if op not in run:
            continue
        colors = [shade(op, chunk, chunks)[0] for chunk in shown]
        boxes: list[Box | Lines] = [Box(15 * place, 0, 14, 12, "key", color) for place, color in enumerate(colors)]
        entries.append((f"{name}, first chunk to last" if chunks > 1 else name, boxes))
    predicted = [each for _, each in timelines if isinstance(each, Prediction)]
    if any(map(takes_time, predicted)):
        entries.append(("message", [Lines([(0, 1, 16, 11)], "message", 1.2)]))
    drawn = {op for each in predicted for op in _ops(each)}
    for op, (name, color, _) in _COLLECTIVES.items():
        if op in drawn:
            of = "gradients" if op is Op.REDUCE_GRAD else "parameters"
            entries.append((f"{name} of a chunk's {of}", [Box(0, 0, 16, 12, "key", color)]))
    kinds = {wait.kind for _, each in timelines if isinstance(each, Measured) for rank in each.waits for wait in rank}
    for kind, name in (("p2p", "waits for a message"), ("dp", "waits for a gather or reduction")):
        if kind in kinds:
            entries.append((name, [Box(0, 4, 16, 5, f"wait-{kind}")]))
    entries += [("idle", [Box(0, 0, 16, 12, "idle")]), (f"number: micro-batch; time in {unit}", [])]
    drawing.legend(entries, _LEFT)
