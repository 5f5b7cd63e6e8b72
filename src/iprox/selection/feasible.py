"""What no ranking can give, told from a pool's rows and sources alone: before anything is scored."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from iprox.errors import InputError
from iprox.selection.settings import SelectionSettings, rows_in


def check_feasible(settings: SelectionSettings, rows: int, sources: Mapping[str | None, int]) -> None:
    """Refuse a selection that the pool has not the rows for.

    Args:
        settings: what to choose.
        rows: of the pool.
        sources: rows by source; under None those that name none.

    Raises:
        InputError: more rows are asked for than there are, or than caps leave; a floor or a cap is of a source that the
            pool does not have, or a floor asks for more rows of a source than it has.
    """
    count = settings.rows_of(rows)
    if count is not None and count > rows:
        raise InputError(f"{count:,} rows are to be selected, and the pool has {rows:,}; ask for fewer")
    caps = settings.caps()
    for what, names in (("floor", settings.source_floor), ("cap", caps)):
        unknown = next((name for name in names if name is not None and name not in sources), None)
        if unknown is not None:
            known = [name for name in sources if name is not None]
            near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known)[:10]) or 'none'}"
            raise InputError(f"the {what} of the source {unknown!r}: the pool has no row of it; {hint}")
    if count is None:
        return
    for name, share in settings.source_floor.items():
        if rows_in(share, count) > sources[name]:
            raise InputError(
                f"the floor of the source {name!r}, {share:g} of {count:,} rows, is more than the pool has of it "
                f"({sources[name]:,}); lower it"
            )
    most = sum(
        min(size, count if (cap := caps.get(name, caps.get(None))) is None else rows_in(cap, count))
        for name, size in sources.items()
    )
    if most < count and settings.threshold is None:
        raise InputError(
            f"{count:,} rows are to be selected, and the caps of sources leave {most:,}; ask for fewer, or loosen them"
        )
