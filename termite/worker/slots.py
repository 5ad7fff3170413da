"""How a worker's job slots are shared among masters.

A plain function: everyone gets what they want while there is enough, otherwise equal shares, what one
does not want going to the others.
"""

from __future__ import annotations

from collections.abc import Mapping


def share(total: int, wants: Mapping[int, int]) -> dict[int, int]:
    """Slots granted per master key.  The sum is min(total, sum of wants); ties go to the earlier key."""
    granted = dict.fromkeys(wants, 0)
    left = total
    while left > 0:
        hungry = [key for key, want in wants.items() if granted[key] < want]
        if not hungry:
            break
        each = max(1, left // len(hungry))
        for key in hungry:
            more = min(each, wants[key] - granted[key], left)
            granted[key] += more
            left -= more
    return granted
