"""Which of two methods do people prefer: a page that does not say which is which, and the count of their votes.

The page holds pictures and prompts; which side is whose lies in the key, a file of its own. A vote is kept in the browser and
downloaded as JSON. The key and all such files give the win rates.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from generator.errors import InputError
from generator.files import make_folder, parse_json, replacing

from .judge import protocol_cameras
from .made import Made
from .page import jpeg

_FORMAT = "gaussian-atlas-blind-1"
_VIEWS, _SIZE = 4, 160
_CHOICES = ("left", "right", "same")


@dataclass(frozen=True)
class Count:
    """Votes between method A and method B."""

    methods: tuple[str, str]
    voters: int
    wins: tuple[int, int]
    same: int

    @property
    def rate(self) -> float | None:
        """Share of A among the votes that decided; None where none did."""
        decided = sum(self.wins)
        return self.wins[0] / decided if decided else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.wins[0], sum(self.wins))


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share after Wilson (1927), 95 % by default; everything from 0 to 1 where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_page(folder: str | Path, methods: tuple[str, str], first: Iterable[Made], second: Iterable[Made], seed: int = 0) -> int:
    """Write `blind.html` and, not to be shown to voters, `key.json` into `folder`; the number of pairs.

    A pair is the first object of each method for the same prompt, from the same four sides.

    Raises:
        InputError: the methods have no prompt in common, or the folder cannot be written.
    """
    folder = make_folder(folder)
    sets = []
    for several in (first, second):
        by_prompt: dict[str, Made] = {}
        for made in several:
            by_prompt.setdefault(made.prompt.text, made)
        sets.append(by_prompt)
    prompts = [text for text in sets[0] if text in sets[1]]
    if not prompts:
        raise InputError(f"{methods[0]} and {methods[1]} have no prompt in common")
    chance = random.Random(seed)
    chance.shuffle(prompts)
    # Each method is on the left as often as the other: people lean to a side.
    left = [index % 2 for index in range(len(prompts))]
    chance.shuffle(left)
    pairs = []
    for index, (text, method) in enumerate(zip(prompts, left, strict=True)):
        cameras = protocol_cameras(_VIEWS, _SIZE, seed + index)
        strips = [jpeg(_square(found[text].pictures(cameras)[0])) for found in sets]
        pairs.append({"prompt": text, "left": strips[method], "right": strips[1 - method]})
    identity = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
    key = {"format": _FORMAT, "page": identity, "methods": list(methods), "prompts": prompts, "left": left}
    for name, content in (("blind.html", _page(identity, pairs)), ("key.json", json.dumps(key, indent=1) + "\n")):
        with replacing(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return len(pairs)


def count(key_path: str | Path, votes: Sequence[str | Path]) -> Count:
    """Count downloaded votes; of one voter's several files, and several votes for a pair, the last one counts.

    Raises:
        InputError: a file cannot be read, or its votes were not cast on the key's page.
    """
    key = _read(key_path)
    methods, left = key.get("methods"), key.get("left")
    refusal = InputError(f"{key_path} is no key of a blind page")
    if key.get("format") != _FORMAT or not isinstance(key.get("page"), str):
        raise refusal
    if not isinstance(methods, list) or len(methods) != 2 or not isinstance(left, list) or any(side not in (0, 1) for side in left):
        raise refusal
    chosen: dict[tuple[str, int], str] = {}
    for path in votes:
        found = _read(path)
        if found.get("page") != key["page"]:
            raise InputError(f"{path} was not cast on the page of {key_path}")
        cast = found.get("votes")
        if not isinstance(cast, list):
            raise InputError(f"{path} holds no list of votes")
        for vote in cast:
            pair, choice = (vote.get("pair"), vote.get("choice")) if isinstance(vote, dict) else (None, None)
            # A bool is an int to Python.
            if choice not in _CHOICES or type(pair) is not int or not 0 <= pair < len(left):
                raise InputError(f"{path} holds a vote that the page cannot give: {json.dumps(vote)[:80]}")
            chosen[str(found.get("voter")), pair] = choice
    wins = [0, 0]
    for (_, pair), choice in chosen.items():
        if choice != "same":
            wins[left[pair] if choice == "left" else 1 - left[pair]] += 1
    return Count(tuple(methods), len({voter for voter, _ in chosen}), (wins[0], wins[1]), len(chosen) - sum(wins))


def text(found: Count) -> str:
    """A count in a few lines."""
    first, second = found.methods
    lines = [
        f"{sum(found.wins) + found.same} votes of {found.voters} voters: {first} {found.wins[0]}, {second} {found.wins[1]}, "
        f"no difference {found.same}"
    ]
    if found.rate is not None:
        low, high = found.interval
        lines.append(f"{first} is preferred in {found.rate:.1%} of those that decide (95 % interval {low:.1%} to {high:.1%}, Wilson)")
    return "\n".join(lines)


def _read(path: str | Path) -> dict:
    try:
        found = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def _square(pictures: torch.Tensor) -> torch.Tensor:
    """Four pictures [4, 3, H, W] as one [3, 2 H, 2 W]."""
    rows = [torch.cat(list(pictures[start : start + 2]), dim=2) for start in (0, 2)]
    return torch.cat(rows, dim=1)


def _page(identity: str, pairs: list[dict]) -> str:
    sections = []
    for index, pair in enumerate(pairs):
        buttons = "".join(f'<button data-choice="{side}"><img alt="{side}" src="{pair[side]}"></button>' for side in ("left", "right"))
        sections.append(f'<section data-pair="{index}"><h2>{html.escape(pair["prompt"])}</h2>{buttons}</section>')
    return _PAGE.replace("IDENTITY", identity).replace("COUNT", str(len(pairs))).replace("FIGURES", "".join(sections))


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Which one fits?</title><style>
body { font: 16px/1.4 system-ui, sans-serif; text-align: center; margin: 1.5rem auto; max-width: 48rem; color: #222; background: #fff }
section { display: none } section.now { display: block } img { width: 100%; display: block }
section button { width: 46%; margin: 1%; padding: 4px; border: 2px solid #ddd; background: #fff; cursor: pointer }
section button:hover { border-color: #06c } nav button { font: inherit; padding: 0.4rem 1rem; margin: 0.2rem }
</style></head><body>
<p>Which of the two objects fits the text better? Click it, or press the arrow key of its side;
the space bar says that there is no difference.</p>
FIGURES
<p id="state"></p>
<nav><button id="back">Back</button><button id="same">No difference</button><button id="save">Download the votes</button></nav>
<script>
const page = "IDENTITY", count = COUNT, store = "blind-" + page;
let state;
try { state = JSON.parse(localStorage.getItem(store)) } catch { }
state = state || { voter: [...crypto.getRandomValues(new Uint32Array(2))].map(n => n.toString(16)).join(""), votes: {} };
let now = 0;
while (now < count && state.votes[now]) now++;
const show = () => {
  document.querySelectorAll("section").forEach((s, i) => s.classList.toggle("now", i === now));
  const done = "Thank you. Please download the votes and send the file.";
  document.getElementById("state").textContent = now < count ? (now + 1) + " of " + count : done;
};
const vote = choice => {
  if (now >= count) return;
  state.votes[now++] = choice;
  try { localStorage.setItem(store, JSON.stringify(state)) } catch { }
  show();
};
document.querySelectorAll("section button").forEach(b => b.onclick = () => vote(b.dataset.choice));
document.getElementById("same").onclick = () => vote("same");
document.getElementById("back").onclick = () => { now = Math.max(0, now - 1); show() };
document.getElementById("save").onclick = () => {
  const votes = Object.entries(state.votes).map(([pair, choice]) => ({ pair: Number(pair), choice }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ page, voter: state.voter, votes })], { type: "application/json" }));
  link.download = "votes-" + state.voter + ".json";
  link.click();
};
document.onkeydown = event => {
  const choice = { ArrowLeft: "left", ArrowRight: "right", " ": "same" }[event.key];
  if (choice) { event.preventDefault(); vote(choice) }
};
show();
</script></body></html>
"""
