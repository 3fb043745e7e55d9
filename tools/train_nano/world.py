# SPDX-License-Identifier: Apache-2.0
"""The random content of an exercise: records, variables, tables, and the questions about them.

Every piece of context is a text that starts with a newline and does not end with one. The tokenizer
cuts before each newline, so pieces may be encoded one by one and concatenated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .words import CITIES, DICT_KEYS, DOMAINS, FIRST_NAMES, LAST_NAMES, STREETS, WORDS

BEGIN, END, PAD, QUESTION, ANSWER = "<|begin|>", "<|end|>", "<|pad|>", "<|question|>", "<|answer|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, QUESTION, ANSWER)
KINDS = ("tool_call", "quote", "variable", "key")

# What each request turns into: the calls in order, each with its arguments. An argument names a field
# of the order, of the customer the order points to, or of the item the order points to.
TOOLS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "refund": (("refund", ("order", "customer", "amount")), ("mail", ("email", "name"))),
    "ship": (
        ("ship", ("order", "customer", "item")),
        ("label", ("name", "address")),
        ("pick", ("sku", "depot")),
    ),
    "charge": (("charge", ("order", "customer", "amount")), ("pay", ("token", "email"))),
    "visit": (("visit", ("order", "customer")), ("route", ("address", "name", "email"))),
    "restock": (("restock", ("order", "item", "amount")), ("pick", ("depot", "sku"))),
}
REQUESTS = ("{tool} order {key}", "please {tool} order {key} now", "the request is to {tool} order {key}")


@dataclass(frozen=True)
class QA:
    """One question about the context.

    Attributes:
        kind: one of `KINDS`.
        question: the text between the question and the answer marks.
        answer: the expected text, without the end mark.
    """

    kind: str
    question: str
    answer: str

    def render(self) -> tuple[str, str]:
        """Returns the prompt part and the answer part as they stand in a sequence."""
        return f"\n{QUESTION}{self.question}{ANSWER}", f"{self.answer}{END}"


@dataclass
class World:
    """Context pieces and the questions that can be asked about them.

    Attributes:
        pieces: texts to scatter over the context.
        questions: for each kind, the questions whose evidence lies in `pieces`.
    """

    pieces: list[str] = field(default_factory=list)
    questions: dict[str, list[QA]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _hex(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789abcdef", k=count))


def _email(rng: random.Random) -> str:
    name = f"{rng.choice(FIRST_NAMES)}.{rng.choice(LAST_NAMES)}".lower()
    return f"{name}{_digits(rng, 2)}@{rng.choice(DOMAINS)}.example"


def _address(rng: random.Random) -> str:
    street = f"{rng.choice(WORDS).title()} {rng.choice(STREETS)}"
    return f"{rng.randint(1, 999)} {street}, {rng.choice(CITIES)}"


def _sku(rng: random.Random) -> str:
    return "".join(rng.choices("BCDFGHJKLMNPQRSTVWXZ", k=2)) + "-" + _digits(rng, 5)


def _keys(rng: random.Random, count: int) -> list[str]:
    """Unique keys such as `amber-417`; about one in ten shares its word with another key."""
    words = rng.sample(WORDS, min(count, len(WORDS)))
    keys = [f"{word}-{_digits(rng, 3)}" for word in words]
    for i in range(1, len(keys)):
        if rng.random() < 0.1:
            word, number = keys[i - 1].split("-")
            keys[i] = f"{word}-{(int(number) + rng.randint(1, 999)) % 1000:03d}"
    return list(dict.fromkeys(keys))


def _record(rng: random.Random, table: str, key: str, fields: dict[str, str]) -> str:
    items = list(fields.items())
    rng.shuffle(items)
    body = ", ".join(f'"{name}": "{value}"' for name, value in items)
    return f'\n{table}["{key}"] = {{{body}}}'


def add_records(world: World, rng: random.Random, orders: int) -> None:
    """Adds order, customer and item records, and one tool-call question an order.

    An order names its customer and item by key; what the later calls need stands only in those records.
    """
    order_keys, customer_keys, item_keys = (
        _keys(rng, max(2, n)) for n in (orders, round(orders * 0.9), round(orders * 0.7))
    )
    customers = {
        key: {
            "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
            "email": _email(rng),
            "address": _address(rng),
            "token": _hex(rng, 8),
        }
        for key in customer_keys
    }
    items = {key: {"sku": _sku(rng), "depot": rng.choice(CITIES)} for key in item_keys}
    for key, fields in customers.items():
        world.pieces.append(_record(rng, "customers", key, fields))
    for key, fields in items.items():
        world.pieces.append(_record(rng, "items", key, fields))
    for key in order_keys:
        order = {
            "customer": rng.choice(customer_keys),
            "item": rng.choice(item_keys),
            "amount": f"{rng.randint(10, 9999)}.{_digits(rng, 2)}",
        }
        world.pieces.append(_record(rng, "orders", key, order))
        known = {"order": key, **order, **customers[order["customer"]], **items[order["item"]]}
        tool = rng.choice(tuple(TOOLS))
        calls = [
            "{" + ", ".join([f'"tool": "{name}"', *(f'"{arg}": "{known[arg]}"' for arg in args)]) + "}"
            for name, args in TOOLS[tool]
        ]
        request = rng.choice(REQUESTS).format(tool=tool, key=key)
        world.questions["tool_call"].append(QA("tool_call", request, "\n".join(calls)))


def _names(rng: random.Random, count: int) -> list[str]:
    names = {f"{rng.choice(WORDS)}_{rng.choice(WORDS)}": None for _ in range(count)}
    return list(names)


def _value(rng: random.Random) -> str:
    makers: tuple[Callable[[], str], ...] = (
        lambda: f'"{rng.choice(WORDS)}-{_digits(rng, 4)}"',
        lambda: f"{rng.randint(1, 9)}{_digits(rng, 5)}",
        lambda: f'"{_hex(rng, 6)}"',
        lambda: f'"{rng.choice(WORDS)}/{rng.choice(WORDS)}.{rng.choice(WORDS)}"',
    )
    return rng.choice(makers)()


def _groups(rng: random.Random, names: Sequence[str]) -> list[list[str]]:
    """Shuffled groups of three names, the last of two or three where there are fewer."""
    order = list(names)
    rng.shuffle(order)
    groups = [order[i : i + 3] for i in range(0, len(order), 3)]
    return [group for group in groups if len(group) > 1 or len(order) == 1]


def add_variables(world: World, rng: random.Random, count: int) -> None:
    """Adds assignments, and questions that ask for several of them at once."""
    values = {name: _value(rng) for name in _names(rng, max(2, count))}
    world.pieces.extend(f"\n{name} = {value}" for name, value in values.items())
    for group in _groups(rng, tuple(values)):
        answer = "\n".join(f"{name} = {values[name]}" for name in group)
        world.questions["variable"].append(QA("variable", f"show the variables {', '.join(group)}", answer))


def add_tables(world: World, rng: random.Random, count: int) -> None:
    """Adds dictionaries that share their keys, and questions for some keys of one dictionary."""
    for name in _names(rng, max(2, count)):
        keys = rng.sample(DICT_KEYS, rng.randint(4, 7))
        table = {key: _value(rng) for key in keys}
        body = ", ".join(f'"{key}": {value}' for key, value in table.items())
        world.pieces.append(f"\n{name} = {{{body}}}")
        chosen = rng.sample(keys, 3)
        answer = "{" + ", ".join(f'"{key}": {table[key]}' for key in chosen) + "}"
        world.questions["key"].append(QA("key", f"look up {', '.join(chosen)} in the table {name}", answer))


def add_functions(world: World, rng: random.Random, count: int, bodies: Sequence[str]) -> None:
    """Adds short real functions under fresh names, and questions that ask to quote one.

    Args:
        bodies: function texts whose name is written `@@`.
    """
    for name, body in zip(_names(rng, count), rng.sample(bodies, min(count, len(bodies))), strict=False):
        text = body.replace("@@", name, 1)
        # The empty line ends the function even if the source after it is indented.
        world.pieces.append(f"\n{text}\n")
        world.questions["quote"].append(QA("quote", f"quote the function {name}", text))
