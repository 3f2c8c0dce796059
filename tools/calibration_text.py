"""Writes flashpack/cli/calibration.txt, the text that `flashpack calibrate` takes where no other is given.

    python tools/calibration_text.py

Two fifths are chats with tool calls, made here by chance (with a fixed seed) in the forms that models are trained on;
the rest is tools/calibration_prose.txt (texts of ours in several languages, and several kinds of code) and pieces of
this repository. All of it is our own. As the repository changes, so would the text: it is made anew only on purpose,
because packs name its digest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROSE = ROOT / "tools" / "calibration_prose.txt"
TARGET = ROOT / "flashpack" / "cli" / "calibration.txt"
SEED = 20250201
CHATS = 0.42
"""Share of the text's bytes that are chats."""

PIECE = 4500
"""Most bytes of each of these files, cut at an end of line."""

OWN = [
    "README.md",
    "SPEC.md",
    "docs/streaming.md",
    "docs/metal.md",
    "flashpack/formats/checksums.py",
    "flashpack/formats/header.py",
    "flashpack/runtime/calibrate.py",
    "flashpack/kernels/cpu/native/recurrent.h",
    "flashpack/kernels/cpu/native/quantize.c",
    "tests/formats/test_header.py",
]

Chance = random.Random
Made = tuple[str, dict[str, Any], Any, str]
"""What the user asks, the call's arguments, what the tool answers, and what the assistant then says."""

NAMES = ["Amina", "Björn", "Chloé", "Dmitri", "Esra", "Farid", "Grażyna", "Hiro", "Ingrid", "José", "Lan", "Noor"]
TOWNS = ["Bergen", "Kyoto", "Zürich", "São Paulo", "Gdańsk", "Nairobi", "Lyon", "Perth", "Łódź", "Málaga", "Osaka"]
FOODS = ["lentil soup", "rye bread", "apple cake", "ramen", "paella", "mushroom risotto", "borscht", "dal"]
TOPICS = ["heat pumps", "tide tables", "sourdough", "train delays", "solar eclipses", "bee keeping", "old maps"]
CODE = [
    "def area(r):\n    return 3.14159 * r * r\n",
    'for i in range(3):\n    print(f"{i}: {i ** 2}")\n',
    'SELECT name FROM users WHERE age > 30 AND city = "Lyon";\n',
    "const sum = (a, b) => a + b;\nconsole.log(sum(2, 3));\n",
]


def weather(r: Chance) -> Made:
    town, days, metric = r.choice(TOWNS), r.randint(1, 7), r.random() < 0.7
    ask = r.choice(
        [
            "How is the weather in {0} for {1} days?",
            "Wie wird das Wetter in {0} ({1} Tage)?",
            "明天和以后{1}天{0}的天气",
        ]
    )
    temperature = r.randint(-8, 34)
    says = f"In {town} it will be {temperature} degrees, with {r.choice(['rain', 'sun', 'fog', 'snow'])} later."
    arguments = {"location": town, "days": days, "units": "metric" if metric else "imperial"}
    return ask.format(town, days), arguments, {"temperature": temperature, "humidity": r.randint(20, 99) / 100}, says


def event(r: Chance) -> Made:
    who, hour = r.sample(NAMES, r.randint(1, 3)), r.randint(8, 18)
    title, day = (
        r.choice(["Review", "Lunch", "Planning", "Dentist"]),
        f"2025-{r.randint(1, 12):02}-{r.randint(1, 28):02}",
    )
    ask = r.choice(["Put {0} with {1} into my calendar, {2} at {3}:30.", "Ajoute « {0} » avec {1} le {2} à {3} h 30."])
    arguments = {
        "title": title,
        "start": f"{day}T{hour:02}:30:00",
        "attendees": [{"name": name, "optional": r.random() < 0.3} for name in who],
        "reminder_minutes": r.choice([None, 5, 10, 30]),
    }
    return (
        ask.format(title, " and ".join(who), day, hour),
        arguments,
        {"id": r.randint(1000, 9999)},
        f"Done: {title}, {day}.",
    )


def recipe(r: Chance) -> Made:
    food, people = r.choice(FOODS), r.randint(2, 9)
    without = r.sample(["nuts", "gluten", "milk", "eggs", "soy"], r.randint(0, 2))
    ask = f"I want {food} for {people}" + (f", without {' or '.join(without)}." if without else ".")
    arguments = {"query": food, "servings": people, "exclude": without, "max_minutes": r.choice([20, 45, 90])}
    return (
        ask,
        arguments,
        [{"title": food.title(), "minutes": r.randint(10, 90)}],
        f"I found {food.title()} for {people}.",
    )


def search(r: Chance) -> Made:
    topic, count = r.choice(TOPICS), r.randint(2, 8)
    ask = r.choice(
        [
            "Find {1} articles about {0}.",
            "Busca {1} artículos sobre {0}.",
            "Найди {1} статьи: {0}",
            "{0}について{1}件調べて。",
        ]
    )
    arguments = {
        "query": topic,
        "limit": count,
        "filters": {"language": r.choice(["en", "es", "ru", "ja"]), "year": None},
    }
    found = [{"title": f"{topic.title()}, part {i}", "score": r.randint(50, 99) / 100} for i in range(1, 3)]
    return ask.format(topic, count), arguments, found, f'The best is "{found[0]["title"]}".'


def edit(r: Chance) -> Made:
    path = f"src/{r.choice(['main', 'util', 'shop', 'graph'])}_{r.randint(1, 40)}.{r.choice(['py', 'js', 'sql'])}"
    arguments = {"path": path, "content": r.choice(CODE), "overwrite": r.random() < 0.5}
    return f"Write this into {path}:\n{arguments['content']}", arguments, {"ok": True}, f"`{path}` is written."


def database(r: Chance) -> Made:
    least = r.randint(2, 90) * 50
    region = r.choice(["North", "South", "East"])
    sql = f"SELECT COUNT(*) FROM orders WHERE region = '{region}' AND total_cents >= {least * 100}"
    ask = f"How many orders of at least {least} euros came from the {region}?"
    number = r.randint(3, 900)
    return ask, {"sql": sql, "read_only": True}, {"rows": [[number]]}, f"{number} orders."


def transfer(r: Chance) -> Made:
    cents, name = r.randint(500, 99_999), r.choice(NAMES)
    ask = r.choice(
        ["Send {0} euros to {1}.", "Überweise {0} Euro an {1}.", "Manda {0} euro a {1}.", "请给{1}转{0}欧元。"]
    )
    arguments = {
        "recipient": {"name": name, "iban": f"XX{r.randint(10**9, 10**10 - 1)}"},
        "amount": cents / 100,
        "currency": "EUR",
    }
    return (
        ask.format(cents / 100, name),
        arguments,
        {"status": "pending"},
        f"{cents / 100} euros to {name} are on their way.",
    )


def lamp(r: Chance) -> Made:
    room, level = r.choice(["kitchen", "hall", "attic", "garden"]), r.randint(0, 100)
    arguments = {"room": room, "on": level > 0, "brightness": level, "color": f"#{r.randrange(1 << 24):06x}"}
    return (
        f"Set the lamp in the {room} to {level} %.",
        arguments,
        {"ok": True},
        f"The lamp in the {room} is at {level} %.",
    )


TOOLS: dict[str, tuple[str, Callable[[Chance], Made]]] = {
    "get_forecast": ("Forecast for a place", weather),
    "create_event": ("Create an entry in the calendar", event),
    "find_recipes": ("Search recipes", recipe),
    "web_search": ("Search the web", search),
    "write_file": ("Write a file", edit),
    "query_database": ("Run one SQL statement", database),
    "transfer_money": ("Send money", transfer),
    "set_lamp": ("Control a lamp", lamp),
}


def schema(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool as it is declared: the types of an example's arguments."""
    types = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    properties = {key: {"type": types.get(type(value), "null")} for key, value in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)[:2]}
    return {"type": "function", "function": {"name": name, "description": TOOLS[name][0], "parameters": parameters}}


def text(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def chatml(name: str, made: Made, r: Chance) -> str:
    ask, arguments, result, says = made
    system = "You are a helpful assistant."
    if r.random() < 0.25:
        system += f"\n\n# Tools\n\n<tools>\n{text(schema(name, arguments))}\n</tools>"
    turns = [("system", system), ("user", ask)]
    turns.append(("assistant", f"<tool_call>\n{text({'name': name, 'arguments': arguments})}\n</tool_call>"))
    if r.random() < 0.5:
        turns += [("user", f"<tool_response>\n{text(result)}\n</tool_response>"), ("assistant", says)]
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def openai(name: str, made: Made, r: Chance) -> str:
    ask, arguments, result, says = made
    number = f"call_{r.randrange(1 << 32):08x}"
    call = {"id": number, "type": "function", "function": {"name": name, "arguments": text(arguments)}}
    messages = [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": number, "content": text(result)},
        {"role": "assistant", "content": says},
    ]
    body = {"messages": messages} | ({"tools": [schema(name, arguments)]} if r.random() < 0.2 else {})
    return text(body, indent=r.choice([None, None, 2])) + "\n"


def plain(name: str, made: Made, r: Chance) -> str:
    ask, arguments, result, says = made
    call = {"tool": name, "input": arguments} if r.random() < 0.5 else {"name": name, "parameters": arguments}
    shown = f"```json\n{text(call, indent=2)}\n```" if r.random() < 0.5 else text(call)
    return f"User: {ask}\nAssistant: {shown}\nTool: {text(result)}\nAssistant: {says}\n"


def chats(size: int, r: Chance) -> Iterator[str]:
    """Chats of about ``size`` bytes in all; ChatML as often as the other forms together."""
    done = 0
    while done < size:
        name = r.choice(list(TOOLS))
        chat = r.choice([chatml, chatml, openai, plain])(name, TOOLS[name][1](r), r)
        done += len(chat.encode())
        yield chat


def main() -> None:
    chance = random.Random(SEED)
    prose = [piece.strip() + "\n" for piece in PROSE.read_text(encoding="utf-8").split("%%\n")]
    for name in OWN:
        start = (ROOT / name).read_text(encoding="utf-8")[:PIECE]
        prose.append(start[: start.rindex("\n") + 1])
    size = sum(len(piece.encode()) for piece in prose)
    talk = list(chats(round(size * CHATS / (1 - CHATS)), chance))
    # Between two chats, or groups of them, comes a piece of prose: no window is of one kind alone for long.
    share = -(-len(talk) // len(prose))
    chance.shuffle(prose)
    mixed = [part for i, piece in enumerate(prose) for part in (piece, *talk[i * share : (i + 1) * share])]
    TARGET.write_text("\n".join(mixed), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size} bytes, {len(talk)} chats")


if __name__ == "__main__":
    main()
