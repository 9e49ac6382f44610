"""The colour scale of all pictures: dark is high entropy, bright is low entropy."""

from __future__ import annotations

from bisect import bisect_right

# In nats, a factor of about three apart. Positions below a third of the sampler's usual bound on the sum (0.1) are
# nearly settled; positions above 3 choose among some twenty tokens or more.
BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# The colours from below the first bound to above the last: yellow to blue in even steps of lightness (about 9 in
# CIELAB's L*), which stay in order in grey and for every form of colour blindness.
COLOURS = ("#f6f3c4", "#cfe2ae", "#9ccda8", "#6bb6a8", "#4d9da8", "#4183a0", "#466891", "#4a4e74")

# Pictures have their own background: on a light terminal the scale would be reversed.
BACKGROUND = "#10141a"
FOREGROUND = "#ffffff"
CAPTION = "#9aa7b8"

LEGEND = "above 3 | 3 to 1 | to 0.3 | to 0.1 | to 0.03 | to 0.01 | to 0.003 | below"


def entropy_colour(entropy: float) -> str:
    """The colour of an entropy in nats."""
    return COLOURS[bisect_right(BOUNDS, entropy)]


def token_style(entropy: float, accepted: bool, pinned: bool = False) -> str:
    """The style of one token of a draft."""
    colour = FOREGROUND if pinned else entropy_colour(entropy)
    return " ".join((*(("bold",) if pinned else ()), *(("underline",) if accepted and not pinned else ()), colour))
