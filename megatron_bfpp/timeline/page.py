"""A schedule as one HTML page that needs nothing else: the picture, and its numbers in a table. Needs jinja2."""

from typing import Any

from ..schedule.formats import title
from .canvas import least_width
from .picture import Named, picture


def page(timelines: Named, note: str = "") -> str:
    """Return the page of named timelines on one time axis. A box shows its action where the pointer rests."""
    shapes = [each.shape for _, each in timelines]
    drawn = picture(timelines, note=note).svg()
    shown = title(max(shapes, key=lambda shape: shape.num_chunks))  # not that of 1F1B, which has no chunks
    return render(
        __package__, "show.html", title=shown, timelines=timelines, picture=drawn, least_width=least_width(drawn),
        owed=any(any(each.peak_owed_weight_gradients()) for _, each in timelines),
    )  # fmt: skip


def render(package: str, template: str, **values: Any) -> str:
    """Return a page from a template in the folder `templates` of a package. Values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not for those who want no page

    loader = PackageLoader(package)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(template).render(values)
