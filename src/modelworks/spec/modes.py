"""The two ways to answer that every assistant here has, and what a model is told first in each.

It is short: small models answer worse to a long one.
"""

from __future__ import annotations

REGULAR, FUN = "regular", "fun"
BUILT_IN = {
    REGULAR: "You are a helpful assistant.",
    FUN: "You are a witty assistant with a dry sense of humor. Be candid and irreverent, and still answer the "
    "question. Tease ideas, never people: no cruelty, no slurs.",
}
"""What a model is told first in the modes that are ours."""
