"""What bfpp doctor says of all that the plugin relies on in Megatron and torch: the table of integration/relied_on/."""

from itertools import groupby

from .line import Facts, Line, fail, ok, section, warn


def seam_lines(facts: Facts) -> list[Line]:
    """List every place by what needs it, and whether it fits; a line for each that does not."""
    lines = []
    for part, seams in groupby(section(facts, "megatron").get("seams", []), key=lambda seam: seam["needed_by"]):
        all_of_it = list(seams)
        fits = [_short(seam["place"]) for seam in all_of_it if not seam["misfit"]]
        lines.append(ok(f"seams of {part}", f"{len(fits)} of {len(all_of_it)} fit: {', '.join(fits)}"))
        for seam in all_of_it:
            if seam["misfit"]:
                judge = warn if seam["is_optional"] else fail
                lines.append(judge(f"seam of {part}", f"{seam['misfit']}; {seam['why']}", seam["remedy"]))
    return lines


def _short(place: str) -> str:
    """Return the last two names of a place: the module's and the function's."""
    return ".".join(place.split(".")[-2:])
