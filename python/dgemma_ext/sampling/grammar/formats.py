"""Patterns of the formats of strings in JSON schemas."""

from __future__ import annotations

from dgemma_ext.sampling.grammar.pattern import Pattern, characters, concat, literal, optional, repeat, separated, union

_DIGIT = characters((0x30, 0x39))
_LETTER = ((0x41, 0x5A), (0x61, 0x7A))
_ALPHANUMERIC = characters(*_LETTER, (0x30, 0x39))
_HEX = characters((0x30, 0x39), (0x61, 0x66))


def _digits(count: int) -> Pattern:
    return repeat(_DIGIT, count, count)


def _numbers(least: int, most: int) -> Pattern:
    """Numbers of two digits."""
    return union([literal(f"{number:02}") for number in range(least, most + 1)])


def _date() -> Pattern:
    """Years of four digits; 29 February is left out, which not every year has."""
    days = [("02", 28), *((f"{month:02}", 30) for month in (4, 6, 9, 11))]
    days += [(f"{month:02}", 31) for month in (1, 3, 5, 7, 8, 10, 12)]
    month_and_day = union([concat(literal(f"{month}-"), _numbers(1, last)) for month, last in days])
    year = union([concat(characters((0x31, 0x39)), _digits(3))])
    return concat(year, literal("-"), month_and_day)


def _time() -> Pattern:
    hour, minute = _numbers(0, 23), _numbers(0, 59)
    zone = union([literal("Z"), concat(characters("+-"), hour, literal(":"), minute)])
    fraction = optional(concat(literal("."), repeat(_DIGIT, 1, 6)))
    return concat(hour, literal(":"), minute, literal(":"), minute, fraction, zone)


def _label() -> Pattern:
    inner = concat(repeat(characters(*_LETTER, (0x30, 0x39), "-"), 0, 30), _ALPHANUMERIC)
    return concat(_ALPHANUMERIC, optional(inner))


def _email() -> Pattern:
    word = repeat(characters(*_LETTER, (0x30, 0x39), "_+-"), 1)
    domain = concat(repeat(concat(_label(), literal(".")), 1), repeat(characters(*_LETTER), 2, 10))
    return concat(separated(word, literal("."), 1), literal("@"), domain)


def _uuid() -> Pattern:
    groups = [repeat(_HEX, count, count) for count in (8, 4, 4, 4, 12)]
    return concat(*[part for group in groups for part in (literal("-"), group)][1:])


def _ipv4() -> Pattern:
    part = union([literal(str(number)) for number in range(256)])
    return separated(part, literal("."), 4, 4)


def formats() -> dict[str, Pattern]:
    """Name of a format → the pattern of its texts, which need no escapes in a JSON string."""
    return {
        "date": _date(),
        "time": _time(),
        "date-time": concat(_date(), literal("T"), _time()),
        "uuid": _uuid(),
        "email": _email(),
        "ipv4": _ipv4(),
    }
