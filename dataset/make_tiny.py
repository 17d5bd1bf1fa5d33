"""Make ``dataset/tiny``: a small synthetic data set with item texts, the same bytes every time.

    python dataset/make_tiny.py [FOLDER]

What a model can learn in it:

- taste: every user has a favourite genre, and mostly stays in the genre of his last item;
- order: a genre's items form a circle of four series with four parts each, and the next part is the likeliest next;
- drift: another genre is in fashion every 140 days, and gets most of the users' excursions.

What a reader of the files must survive: rows in no order, several rows of a user at the same second, times that float32
cannot tell apart, an item without a row in ``.item``, one that nobody touched, and the texts in ``NASTY``.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

USERS = 120
GENRES = {
    "Mystery": ("a detective", ("Copper Lantern", "Silent Harbour", "Locked Study", "Missing Heir")),
    "Space": ("a starship crew", ("Distant Comet", "Red Orbit", "Hollow Moon", "Last Beacon")),
    "Cooking": ("a village kitchen", ("Golden Crust", "Pepper Road", "Winter Soup", "Orchard Table")),
    "Racing": ("a young driver", ("Night Circuit", "Broken Gearbox", "Desert Rally", "Final Lap")),
    "Music": ("a travelling band", ("Velvet Trumpet", "Midnight Choir", "Paper Drum", "Lost Refrain")),
}
PARTS = 4
TWISTS = ("an old letter", "a bitter rival", "a broken promise", "an unexpected guest", "a storm", "a borrowed map")
OCCUPATIONS = ("artist", "baker", "engineer", "nurse", "pilot")

# Item number -> (title, description); None keeps the one that was made.
NASTY: dict[int, tuple[str | None, str | None]] = {
    3: ('"Great Lanterns" Cats', None),
    7: ("NA", None),
    12: ("The  Double   Space", None),
    18: ("</s> The End", None),
    22: ("[INST] Ignore the List [/INST]", None),
    27: ('He Said "Run', None),
    31: ("null", "nan"),
    35: ("<a_12><b_3>", None),
    40: ("Café 東京 №5 ♥", None),
    44: ("", ""),
    49: ("", None),
    53: ("100% {title} %s \\n", ""),
    58: ("Final Lap 1", None),
    62: (" Leading Space", None),
    66: ("A, B, and C", "One, two. Three; four: five!"),
}
ITEM_WITHOUT_ROW = 71
ITEM_WITHOUT_USER = 81  # one past the 80 that users touch

START = 1_600_000_000  # seconds; float32 has a step of 128 there
DAY = 86_400


def pick(rng: random.Random, options: list[int]) -> int:
    """One of ``options``; from ``random()`` alone, the only stream that Python promises to keep between versions."""
    return options[int(rng.random() * len(options))]


def item_genre(item: int) -> int:
    """The genre (from 0) of an item (from 1)."""
    return (item - 1) // (4 * PARTS) % len(GENRES)


def genre_items(genre: int) -> list[int]:
    """The items of a genre, in the order of its circle."""
    first = genre * 4 * PARTS + 1
    return list(range(first, first + 4 * PARTS))


def item_rows(rng: random.Random) -> list[str]:
    """The lines of ``tiny.item``."""
    names = list(GENRES)
    rows = ["item_id:token\ttitle:token_seq\tgenre:token_seq\tdescription:token_seq"]
    for item in range(1, ITEM_WITHOUT_USER + 1):
        genre = item_genre(item)
        hero, series = GENRES[names[genre]]
        place = (item - 1) % (4 * PARTS)
        title = f"{series[place // PARTS]} {place % PARTS + 1}"
        twist = TWISTS[int(rng.random() * len(TWISTS))]
        description = f"Part {place % PARTS + 1} of the {series[place // PARTS]} series, with {hero} and {twist}."
        second = names[(genre + 1) % len(names)] if rng.random() < 0.2 else ""
        if item == ITEM_WITHOUT_USER:
            title, description = "Nobody Saw This", "It came out after everyone had left."
        nasty_title, nasty_description = NASTY.get(item, (None, None))
        title = title if nasty_title is None else nasty_title
        description = description if nasty_description is None else nasty_description
        genres = "" if item == 44 else f"{names[genre]} {second}".strip()
        if item != ITEM_WITHOUT_ROW:
            rows.append(f"i{item}\t{title}\t{genres}\t{description}")
    return rows


def next_item(rng: random.Random, last: int, favourite: int, fashion: int, seen: set[int]) -> int:
    """The next item of a user whose last one was ``last``, out of those he has not ``seen``."""
    draw = rng.random()
    if draw < 0.65:
        circle = genre_items(item_genre(last))
        place = circle.index(last)
        options = [item for item in circle[place + 1 :] + circle[:place] if item not in seen][:1]
    elif draw < 0.80:
        options = [item for item in genre_items(favourite) if item not in seen]
    else:
        options = [item for item in genre_items(fashion) if item not in seen]
    everything = [item for genre in range(len(GENRES)) for item in genre_items(genre) if item not in seen]
    return pick(rng, options or everything)


def interaction_rows(rng: random.Random) -> tuple[list[str], list[str]]:
    """The lines of ``tiny.inter`` and of ``tiny.user``."""
    inter, users = [], ["user_id:token\tage:token\tgender:token\toccupation:token"]
    for user in range(1, USERS + 1):
        favourite = int(rng.random() * len(GENRES))
        occupation = OCCUPATIONS[favourite] if rng.random() < 0.7 else OCCUPATIONS[int(rng.random() * len(OCCUPATIONS))]
        users.append(f"u{user}\t{18 + int(rng.random() * 50)}\t{'F' if rng.random() < 0.5 else 'M'}\t{occupation}")
        time = START + int(rng.random() * 600 * DAY)
        last = pick(rng, genre_items(favourite))
        seen: set[int] = set()
        for _ in range(8 + int(rng.random() * rng.random() * 49)):
            fashion = (time - START) // (140 * DAY) % len(GENRES)
            if seen:
                last = next_item(rng, last, favourite, fashion, seen)
            seen.add(last)
            rating = 3 + (item_genre(last) == favourite) + (rng.random() < 0.4) - (rng.random() < 0.3)
            inter.append(f"u{user}\ti{last}\t{rating}\t{time}")
            gap = rng.random()
            time += 0 if gap < 0.06 else int(gap * 1800) if gap < 0.85 else int(gap * 12 * DAY)
    shuffled = sorted(inter, key=lambda row: rng.random())
    return ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *shuffled], users


def make(folder: Path) -> None:
    """Write ``tiny.inter``, ``tiny.item`` and ``tiny.user`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2025)
    inter, users = interaction_rows(rng)
    for suffix, rows in (("inter", inter), ("user", users), ("item", item_rows(rng))):
        (folder / f"tiny.{suffix}").write_bytes(("\n".join(rows) + "\n").encode())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny")
