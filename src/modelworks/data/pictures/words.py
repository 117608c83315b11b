"""The words and numbers that stand in the pictures."""
# ruff: noqa: SIM905 - words are easier to read and to change in a line

from __future__ import annotations

from random import Random

SHORT = "Ash Bay Cat Dan Elm Fig Gas Hay Ink Jay Kit Leo Max Ned Oak Pam Rye Sam Tea Uma Van Wax Yak Zoe".split()
"""Names under bars and points: three letters each, and each with another first letter."""
WORDS = (
    "Apple Bread Cable Delta Eagle Field Grape House Index Juice Knife Lemon Mango North Olive Paper Queen River Sugar "
    "Table Union Video Water Yield Zebra Amber Brick Cloud Dream Event Flame Glass Honey Ivory Jewel Kayak Light Metal "
    "Night Ocean Pearl Quilt Robot Storm Tiger Urban Vault Whale Youth Candle Dragon Forest Garden Hammer Island "
    "Jacket Kettle Ladder Market Nickel Orange Pencil Quartz Rocket Silver Tunnel Umpire Velvet Window"
).split()
TITLES = "Sales Costs Users Votes Trips Orders Visits Yield Output Stock".split()
GOODS = "Tea Milk Bread Rice Soap Eggs Fish Jam Salt Nuts Corn Beans Pasta Apples Honey Cheese".split()
SHOPS = (
    "Corner Shop",
    "Green Market",
    "Blue Store",
    "City Food",
    "Old Mill",
    "Daily Goods",
    "River Cafe",
    "Sun Bakery",
)
STEPS = "Start Read Check Sort Store Send Print Merge Split Clean Test Build Pack Ship Close".split()
COLUMNS = "Price Stock Sold Weight Score Count Age Rank".split()
FIELDS = ("Name", "City", "Team", "Code", "Color", "Phone")
DIALOGS = ("Save file", "Settings", "Sign in", "Delete item", "New user", "Print page", "Export", "Update")
BUTTONS = ("OK", "Cancel", "Save", "Close", "Apply", "Back", "Next", "Yes", "No")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
"""Without the signs that some typefaces draw alike: I, O, 0, 1."""


def code(random: Random) -> str:
    """Letters and digits that no language model can guess, such as ``K7-R2F``."""
    signs = "".join(random.choice(_CODE) for _ in range(random.randint(4, 6)))
    return f"{signs[:2]}-{signs[2:]}" if random.random() < 0.3 else signs


def line(random: Random) -> str:
    """One or two words, a number or a code."""
    form = random.randrange(5)
    if form == 0:
        return random.choice(WORDS)
    if form == 1:
        return f"{random.choice(SHORT)} {random.choice(WORDS)}"
    if form == 2:
        return str(random.randint(10, 99999))
    if form == 3:
        return f"{random.choice(WORDS)} {random.randint(1, 99)}"
    return code(random)


def scrap(random: Random) -> str:
    """A word, a number, a code, or letters that are no word; some in capitals."""
    form = random.randrange(20)
    if form < 7:
        return code(random)
    if form < 11:
        return str(random.randint(0, 99999))
    letters = "".join(random.choice(_LETTERS) for _ in range(random.randint(2, 7)))
    said = random.choice(WORDS) if form < 17 else letters
    return said.upper() if random.random() < 0.1 else said


def price(random: Random, highest: int = 1999) -> int:
    """In hundredths."""
    return random.randint(20, highest)


def in_hundredths(amount: int) -> str:
    """Such as ``4.05``."""
    return f"{amount // 100}.{amount % 100:02}"
