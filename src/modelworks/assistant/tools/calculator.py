"""Arithmetic as people write it, exact where it can be: whole numbers and fractions, then 30 digits.

The grammar, from loose to tight: sums, products, a sign, powers (from the right), a factorial or per cent sign behind a
value, then numbers, names, functions and parentheses. Nothing of it is Python's, and everything is bounded: how long
an expression is, how deep, and how many digits a result may have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, DecimalException, localcontext
from fractions import Fraction
from typing import Any

from modelworks.assistant.tools.tool import Place, Tool
from modelworks.spec.errors import InputError

Number = Fraction | Decimal
_LONGEST, _DEEPEST = 1000, 50
_MOST_BITS = 8192
"""Of an exact number; what is larger goes on with 30 digits."""
_DIGITS = 30
_WORKING_DIGITS = 45
_MOST_EXPONENT = 9999
_TOKEN = re.compile(
    r"\s*(?:(\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\*\*|//|[-+*/^%!(),×÷·−]))"
)
_SAME = {"**": "^", "×": "*", "·": "*", "÷": "/", "−": "-"}
_CONSTANTS = {
    "pi": Decimal("3.14159265358979323846264338327950288419716939937510"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369996"),
}


def evaluate(expression: str) -> str:
    """What an expression comes to: exact, with its decimal value beside it if it is a fraction.

    Raises
    ------
    InputError
        If it isn't an expression, or has no value, with the reason.
    """
    if len(expression) > _LONGEST:
        raise InputError(f"the expression has {len(expression):,} characters; up to {_LONGEST:,} are accepted")
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = _WORKING_DIGITS, _MOST_EXPONENT, -_MOST_EXPONENT
        try:
            value = _Parser(expression).whole()
            return _written(value)
        except ZeroDivisionError:
            raise InputError("the expression divides by zero") from None
        except (DecimalException, OverflowError):
            raise InputError(
                "the expression has no value that can be written: it is too large or not a number"
            ) from None


def _written(value: Number) -> str:
    if isinstance(value, Fraction):
        if value.denominator == 1:
            digits = str(value.numerator)
            return digits if len(digits) <= 1000 else f"about {_rounded(_decimal(value))}"
        shown = _rounded(_decimal(value))
        if Fraction(Decimal(shown)) == value:
            return shown
        exact = f"{value.numerator}/{value.denominator}"
        return f"{exact} = about {shown}" if len(exact) <= 200 else f"about {shown}"
    return f"about {_rounded(value)}"


def _rounded(value: Decimal) -> str:
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = _DIGITS, _MOST_EXPONENT, -_MOST_EXPONENT
        rounded = +value
    if rounded and not -10 <= rounded.adjusted() <= _DIGITS:
        return f"{rounded.normalize():E}"
    plain = f"{rounded:f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _decimal(value: Number) -> Decimal:
    return value if isinstance(value, Decimal) else Decimal(value.numerator) / Decimal(value.denominator)


def _bounded(value: Number) -> Number:
    """An exact number that has grown too long goes on as a decimal one."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        return _decimal(value)
    return value


def _both(operate: Callable[[Any, Any], Any], left: Number, right: Number) -> Number:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return _bounded(operate(left, right))
    value: Decimal = operate(_decimal(left), _decimal(right))
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent.numerator) * bits <= _MOST_BITS:
            return base**exponent.numerator
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    return _decimal(base) ** _decimal(exponent)


def _whole(value: Number, function: str) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise InputError(f"{function} takes whole numbers")
    return value.numerator


def _factorial(value: Number) -> Number:
    number = _whole(value, "a factorial")
    if not 0 <= number <= 1000:
        raise InputError("a factorial takes 0 to 1000")
    return _bounded(Fraction(math.factorial(number)))


def _root(value: Number) -> Number:
    if value < 0:
        raise InputError("sqrt takes no negative number")
    if isinstance(value, Fraction):
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if top * top == value.numerator and bottom * bottom == value.denominator:
            return Fraction(top, bottom)
    return _decimal(value).sqrt()


def _logarithm(value: Number, base: Number | None = None) -> Number:
    if value <= 0 or (base is not None and (base <= 0 or base == 1)):
        raise InputError("a logarithm takes positive numbers, and a base other than 1")
    if base is None:
        return _decimal(value).ln()
    found = _decimal(value).log10() / _decimal(base).log10()
    near = found.to_integral_value()
    if abs(near) < 10_000 and _power(base, Fraction(int(near))) == value:
        return Fraction(int(near))
    return found


def _by_float(function: Callable[[float], float]) -> Callable[[Number], Number]:
    """A function that the machine's own numbers do, to 15 digits."""

    def call(value: Number) -> Number:
        try:
            return Decimal(f"{function(float(value)):.15g}")
        except (ValueError, OverflowError):
            raise InputError("a function was given a number outside its domain") from None

    return call


def _rounding(value: Number, places: Number = Fraction(0)) -> Number:
    digits = _whole(places, "round's number of places")
    if not -100 <= digits <= 100:
        raise InputError("round takes up to 100 places")
    # Halves go away from zero, as on paper.
    scaled = Fraction(value) * Fraction(10) ** digits
    near = math.floor(abs(scaled) + Fraction(1, 2)) * (1 if scaled >= 0 else -1)
    return Fraction(near) / Fraction(10) ** digits


def _modulo(left: Number, right: Number) -> Number:
    if right == 0:
        raise ZeroDivisionError
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    if not exact and abs(_decimal(left) / _decimal(right)) >= 10**_DIGITS:
        raise InputError(f"the remainder of so long a number is not known: it is kept to {_DIGITS} digits")
    return _both(lambda a, b: a - b * math.floor(a / b), left, right)


_FUNCTIONS: dict[str, tuple[Callable[..., Number], range]] = {
    "sqrt": (_root, range(1, 2)),
    "abs": (abs, range(1, 2)),
    "round": (_rounding, range(1, 3)),
    "floor": (lambda value: Fraction(math.floor(value)), range(1, 2)),
    "ceil": (lambda value: Fraction(math.ceil(value)), range(1, 2)),
    "min": (lambda *values: min(values), range(1, 100)),
    "max": (lambda *values: max(values), range(1, 100)),
    "sum": (lambda *values: _summed(values), range(1, 100)),
    "gcd": (lambda *values: Fraction(math.gcd(*(_whole(one, "gcd") for one in values))), range(1, 100)),
    "lcm": (lambda *values: _bounded(Fraction(math.lcm(*(_whole(one, "lcm") for one in values)))), range(1, 100)),
    "factorial": (_factorial, range(1, 2)),
    "exp": (lambda value: _decimal(value).exp(), range(1, 2)),
    "ln": (_logarithm, range(1, 2)),
    "log": (lambda value, base=Fraction(10): _logarithm(value, base), range(1, 3)),
    "log2": (lambda value: _logarithm(value, Fraction(2)), range(1, 2)),
    "log10": (lambda value: _logarithm(value, Fraction(10)), range(1, 2)),
    "mod": (_modulo, range(2, 3)),
    **{
        name: (_by_float(getattr(math, name)), range(1, 2))
        for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "degrees", "radians")
    },
}


def _summed(values: tuple[Number, ...]) -> Number:
    total: Number = Fraction(0)
    for value in values:
        total = _both(lambda a, b: a + b, total, value)
    return total


class _Parser:
    """Reads an expression by recursive descent, and computes while it reads."""

    def __init__(self, expression: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        place, text = 0, expression.rstrip()
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise InputError(f"{text[place:].strip()[:20]!r} is not understood in the expression")
            number, name, sign = found.groups()
            kind = "number" if number else "name" if name else "sign"
            self._tokens.append((kind, number or name or _SAME.get(sign, sign)))
            place = found.end()
        self._at, self._depth = 0, 0

    def whole(self) -> Number:
        if not self._tokens:
            raise InputError("the expression is empty")
        value = self._sum()
        if self._at < len(self._tokens):
            raise InputError(f"{self._tokens[self._at][1]!r} stands where the expression should have ended")
        return value

    def _next(self) -> str:
        """The sign that comes next, if one does."""
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")
        return text if kind == "sign" else ""

    def _take(self, *signs: str) -> str:
        sign = self._next()
        if sign and sign in signs:
            self._at += 1
            return sign
        return ""

    def _sum(self) -> Number:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise InputError(f"the expression is more than {_DEEPEST} levels deep")
        value = self._product()
        while sign := self._take("+", "-"):
            right = self._product()
            value = _both((lambda a, b: a + b) if sign == "+" else (lambda a, b: a - b), value, right)
        self._depth -= 1
        return value

    def _product(self) -> Number:
        value = self._signed()
        while sign := self._take("*", "/", "//", "%"):
            right = self._signed()
            if sign == "*":
                value = _both(lambda a, b: a * b, value, right)
            elif right == 0:
                raise ZeroDivisionError
            elif sign == "/":
                value = _both(lambda a, b: a / b, value, right)
            elif sign == "//":
                value = _bounded(Fraction(math.floor(_both(lambda a, b: a / b, value, right))))
            else:
                value = _modulo(value, right)
        return value

    def _signed(self) -> Number:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        value = self._powered()
        return -value if negative else value

    def _powered(self) -> Number:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise InputError(f"the expression is more than {_DEEPEST} levels deep")
        value = self._behind()
        if self._take("^"):
            value = _power(value, self._signed())
        self._depth -= 1
        return value

    def _behind(self) -> Number:
        value = self._atom()
        while True:
            if self._take("!"):
                value = _factorial(value)
            elif self._next() == "%" and not self._operand_follows():
                self._at += 1
                value = _both(lambda a, b: a / b, value, Fraction(100))
            else:
                return value

    def _operand_follows(self) -> bool:
        """Whether a value stands behind the next sign, so that a per cent sign is a remainder."""
        if self._at + 1 >= len(self._tokens):
            return False
        kind, text = self._tokens[self._at + 1]
        return kind in {"number", "name"} or text == "("

    def _atom(self) -> Number:
        if self._at >= len(self._tokens):
            raise InputError("the expression ends too early")
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            return self._number(text)
        if kind == "name":
            return self._named(text.lower())
        if text != "(":
            raise InputError(f"{text!r} stands where a value is expected")
        value = self._sum()
        self._close()
        return value

    def _number(self, text: str) -> Number:
        value = Decimal(text.replace("_", ""))
        return _bounded(Fraction(value)) if abs(value.adjusted()) <= _LONGEST else +value

    def _named(self, name: str) -> Number:
        if name in _CONSTANTS and self._next() != "(":
            return _CONSTANTS[name]
        if name not in _FUNCTIONS:
            known = ", ".join([*_CONSTANTS, *_FUNCTIONS])
            raise InputError(f"{name!r} is not known; {known} are")
        if not self._take("("):
            raise InputError(f"{name} takes its arguments in parentheses")
        values = [self._sum()]
        while self._take(","):
            values.append(self._sum())
        self._close()
        function, accepted = _FUNCTIONS[name]
        if len(values) not in accepted:
            raise InputError(f"{name} takes {accepted.start} to {accepted.stop - 1} arguments, not {len(values)}")
        return _bounded(function(*values))

    def _close(self) -> None:
        if not self._take(")"):
            raise InputError("a parenthesis is not closed")


async def _call(arguments: dict[str, Any], place: Place) -> str:
    return evaluate(arguments["expression"])


CALCULATOR = Tool(
    "calculator",
    "Computes an arithmetic expression exactly. Use it for every calculation. Knows + - * / // % ^ !, parentheses, "
    "pi, e, sqrt, abs, round, floor, ceil, min, max, sum, gcd, lcm, exp, ln, log, mod, sin, cos, tan (in radians).",
    {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "such as (3 + 4) * 2.5 ^ 2"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    _call,
)
