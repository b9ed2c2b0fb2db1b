"""The pictures of the lessons: stored as drawn, right in their numbers, legible, and readable in light and dark."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
from matplotlib import font_manager
from PIL import ImageFont

from book import pictures
from minimoe.course import draw

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(pictures.PICTURES)
METRICS = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 100)

Box = tuple[float, float, float, float]  # left, top, right, bottom


def stored(name: str) -> str:
    return (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")


class Picture:
    """What the file of a picture holds, in the order of painting: boxes, lines, and words with the boxes they take."""

    def __init__(self, svg: str) -> None:
        root = ET.fromstring(svg)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        self.paper: Box = (0, 0, width, height)
        self.rules = re.findall(r"\.([\w-]+)\{([^}]*)\}", "".join(root.itertext()))
        self.boxes: list[tuple[Box, str]] = []
        self.lines: list[tuple[list[tuple[float, float]], str]] = []
        self.words: list[tuple[str, Box, str, str]] = []  # words, box, colour, colour of the ground
        self.sizes: set[float] = set()
        for shape in root:
            tag, at = shape.tag.partition("}")[2], shape.attrib
            if tag == "rect":
                x, y, w, h = (float(at.get(k, 0)) for k in ("x", "y", "width", "height"))
                self.boxes.append(((x, y, x + w, y + h), at["class"]))
            elif tag in ("polyline", "polygon"):
                numbers = iter(map(float, re.split("[ ,]", at["points"])))
                points = list(zip(numbers, numbers, strict=True))
                self.lines.append((points, at["class"]))
            elif tag == "text":
                size = float(at["font-size"])
                wide = METRICS.getlength(shape.text or "") * size / 100
                before = {"start": 0, "middle": 0.5, "end": 1}[at["text-anchor"]]
                left = float(at["x"]) - wide * before
                foot = float(at["y"])
                box = (left, foot - 0.76 * size, left + wide, foot + 0.24 * size)
                ground = next((css for b, css in self.boxes[::-1] if inside(box, b)), "paper")
                self.words.append((shape.text or "", box, at["class"], ground))
                self.sizes.add(size)

    def colour(self, css: str, kind: str, theme: int) -> str:
        """What a class has as its fill or stroke in light (0) or dark (1)."""
        bodies = [body for name, body in self.rules if name == css]
        assert len(bodies) == 2, css
        return dict(rule.split(":") for rule in bodies[theme].split(";"))[kind]


def inside(a: Box, b: Box, margin: float = 0) -> bool:
    return a[0] >= b[0] + margin and a[1] >= b[1] and a[2] <= b[2] - margin and a[3] <= b[3]


def apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def crosses(box: Box, start: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether a segment comes into a box, looked at in forty steps."""
    for i in range(41):
        x, y = (a + (b - a) * i / 40 for a, b in zip(start, end, strict=True))
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, 'contrast ratio'."""

    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


of_each = pytest.mark.parametrize("name", NAMES)


@of_each
def test_the_stored_file_is_what_the_command_draws_and_says_what_is_seen(name: str) -> None:
    assert stored(name) == pictures.PICTURES[name]().svg(), "run `python book/pictures.py`"
    root = ET.fromstring(stored(name))
    title, description = (root.findtext(f"{{*}}{tag}") or "" for tag in ("title", "desc"))
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"] == "title description"
    assert len(title) > 10 and len(description) > 100 and "  " not in description


def test_no_other_picture_is_stored() -> None:
    assert sorted(p.name for p in pictures.FOLDER.iterdir()) == [f"{name}.svg" for name in NAMES]


def misplaced(picture: Picture) -> list[str]:
    """Words that leave the paper or their box, lie on other words, or have a line through them."""
    found = []
    for word, box, _, _ in picture.words:
        if not inside(box, picture.paper, 3):
            found.append(f"{word!r} leaves the paper")
        for other, css in picture.boxes:
            if not apart(box, other) and not inside(box, other, 2):
                found.append(f"{word!r} does not fit into a box that is {css}")
        for points, _ in picture.lines:
            if any(crosses(box, *pair) for pair in itertools.pairwise(points)):
                found.append(f"a line crosses {word!r}")
    for (a, one, *_), (b, two, *_) in itertools.combinations(picture.words, 2):
        if not apart(one, two):
            found.append(f"{a!r} lies on {b!r}")
    return found


@of_each
def test_words_have_room_and_a_phone_shows_them_at_their_size(name: str) -> None:
    """A screen of 390 pixels leaves about 360 to the text; the browser's test measures it."""
    picture = Picture(stored(name))
    assert misplaced(picture) == []
    assert picture.paper[2] <= 360 and min(picture.sizes) >= 12


def test_words_without_room_are_found() -> None:
    sheet = draw.Sheet(100, "none", "none")
    sheet.box((10, 10, 40, 20), "contract")
    sheet.text((340, 20), "contract")
    sheet.text((200, 60), "one")
    sheet.text((205, 62), "two")
    sheet.text((100, 80), "three")
    sheet.arrow((60, 80), (140, 80))
    said = " ".join(misplaced(Picture(sheet.svg())))
    wrong = ("fit into a box", "leaves the paper", "'one' lies on 'two'", "line crosses 'three'")
    assert all(words in said for words in wrong)


@pytest.mark.parametrize("theme", (0, 1), ids=("light", "dark"))
@of_each
def test_contrast(name: str, theme: int) -> None:
    picture = Picture(stored(name))
    paper = picture.colour("paper", "fill", theme)
    for word, _, css, ground in picture.words:
        ratio = contrast(picture.colour(css, "fill", theme), picture.colour(ground, "fill", theme))
        assert ratio >= 4.5, f"{word!r} in {css} on {ground}: {ratio:.2f}"
    for css in {css for _, css in [*picture.boxes[1:], *picture.lines]}:
        kind = "fill" if css.endswith("-head") else "stroke"
        ratio = contrast(picture.colour(css, kind, theme), paper)
        assert ratio >= 3, f"{css} on paper: {ratio:.2f}"


def test_lessons_show_every_picture_and_say_what_it_says() -> None:
    image = re.compile(r"!\[([^\]]*)\]\(\.\./book/assets/pictures/([^)]+)\.svg\)")
    found: list[str] = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for told, name in image.findall("".join(cell["source"])):
                assert told == ET.fromstring(stored(name)).findtext("{*}desc"), (path.name, name)
                found.append(name)
    assert sorted(found) == NAMES


# --- the numbers, worked out without the library --------------------------------------------------

P = [[round(v, 2) for v in row] for row in pictures.PROBABILITIES.tolist()]
# two best experts of each token
CHOSEN = [sorted(range(4), key=lambda e, p=p: -p[e])[:2] for p in P]
ARRIVALS = [(t, e) for t, experts in enumerate(CHOSEN) for e in experts]


def shown(name: str) -> list[tuple[str, Box, str]]:
    return [(word, box, ground) for word, box, _, ground in Picture(stored(name)).words]


def in_rows(name: str, pattern: str) -> list[list[str]]:
    """Words that match, row by row from left to right."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for word, box, _ in shown(name):
        if re.fullmatch(pattern, word):
            rows.setdefault(round(box[1]), []).append((box[0], word))
    return [[word for _, word in sorted(row)] for _, row in sorted(rows.items())]


def test_probabilities_of_a_token_sum_to_one() -> None:
    assert all(math.isclose(sum(row), 1) for row in P)
    assert len({tuple(row) for row in P}) == len(pictures.TOKENS) == len(P)


def test_routing_matrix_has_each_tokens_weights_twice_and_they_sum_to_one() -> None:
    rows = in_rows("routing-matrix", r"0\.\d\d")
    assert len(rows) == 8
    for p, experts, row in zip(P, CHOSEN, rows, strict=True):
        weights = [f"{p[e] / sum(p[i] for i in experts):.2f}" for e in experts]
        assert math.isclose(sum(map(float, weights)), 1)
        by_expert = [w for _, w in sorted(zip(experts, weights, strict=True))]
        assert row == weights + by_expert
    load = Counter(e for _, e in ARRIVALS)
    loads = in_rows("routing-matrix", r"\d")[-1]
    assert loads == [str(load[e]) for e in range(4)] == ["6", "5", "3", "2"]


def test_the_layer_shows_the_probabilities_and_weights_of_its_token() -> None:
    t = pictures.TOKENS.index("held")
    weights = [f"{P[t][e] / sum(P[t][i] for i in CHOSEN[t]):.2f}" for e in sorted(CHOSEN[t])]
    assert in_rows("moe-layer", r"0\.\d\d") == [weights, [f"{p:.2f}" for p in P[t]]]
    assert in_rows("moe-layer", r"× .*") == [[f"× {w}" for w in weights]]


def test_tokens_fill_two_cells_of_a_row_and_experts_four_of_a_column() -> None:
    filled = {(w, box) for w, box, ground in shown("who-chooses") if ground not in ("paper", "off")}
    left = sorted((box[1], box[0], word) for word, box in filled if box[0] < 200)
    chosen = [p[e] for p, experts in zip(P, CHOSEN, strict=True) for e in sorted(experts)]
    assert [w for *_, w in left] == [f"{v:.2f}" for v in chosen]
    right = Counter(word for word, box in filled if box[0] > 200)
    best = [sorted((p[e] for p in P), reverse=True)[:4] for e in range(4)]
    assert right == Counter(f"{v:.2f}" for column in best for v in column)
    for word, box, _ in shown("who-chooses"):
        if box[0] > 340:  # the right margin: filled cells of the row beside it
            assert int(word) == sum(b[0] > 200 and abs(b[1] - box[1]) < 3 for _, b in filled)


def test_capacity_drops_who_comes_after_four() -> None:
    queues = [[pictures.TOKENS[t] for t, x in ARRIVALS if x == e] for e in range(4)]
    kept = Counter(token for queue in queues for token in queue[:4])
    dropped = Counter(token for queue in queues for token in queue[4:])
    assert dropped == {"contract": 1, "void": 2}
    words = [(w, g) for w, _, g in shown("capacity") if w in (*pictures.TOKENS, "empty")]
    assert Counter(w for w, ground in words if ground == "plain") == dropped
    assert Counter(w for w, ground in words if ground in pictures.HUES) == kept
    assert Counter(w for w, ground in words if ground == "off") == {"empty": 3}


def test_sorting_is_stable() -> None:
    rows = [w for w, b, css in shown("sort-and-group") if css in pictures.HUES and b[0] < 250]
    assert rows == [pictures.TOKENS[t] for t, _ in sorted(ARRIVALS, key=lambda a: a[1])]


def test_every_tile_has_one_expert_and_filling_only_at_its_end() -> None:
    inside = [(w, css) for w, b, css in shown("tiles") if css != "paper" and b[0] < 290]
    rows = [inside[i : i + 4] for i in range(0, len(inside), 4)]
    colours = [{css for w, css in row if w != "–"} for row in rows]
    assert colours == [{pictures.HUES[e]} for e in (0, 0, 1, 1, 2, 3)]
    assert all(css == "off" for w, css in inside if w == "–")
    words = [w for w, _ in inside if w != "–"]
    assert words == [pictures.TOKENS[t] for t, _ in sorted(ARRIVALS, key=lambda a: a[1])]
    last = [[w for w, _ in row].index("–") if "–" in dict(row) else 4 for row in rows]
    assert last == [4, 2, 4, 1, 3, 2]


def test_rows_that_cross_between_devices() -> None:
    sent = Counter((t // 4, e // 2) for t, e in ARRIVALS)
    there, stay, *_, back, _ = in_rows("expert-parallelism", r"\d+ rows")
    assert there == [f"{sent[0, 1]} rows", f"{sent[1, 0]} rows"] and back == there[::-1]
    assert stay == [f"{sent[0, 0]} rows", f"{sent[1, 1]} rows"]
    assert in_rows("expert-parallelism", r"\d+ rows.*")[3] == ["11 rows", "5 rows, then waits"]


def test_the_lattice_has_two_of_eight_in_each_of_32_layers() -> None:
    rows: dict[float, list[str]] = {}
    for box, css in Picture(stored("lattice")).boxes[1:]:
        rows.setdefault(box[1], []).append(css)
    assert [Counter(row) for row in rows.values()] == [{"off": 6, "blue-head": 2}] * 32
    assert f"{28**32:.0e}" == "2e+46" and "28³² ≈ 2 × 10⁴⁶" in shown("lattice")[-1][0]


def test_works_have_the_shares_of_those_that_are_left_or_drawn() -> None:
    rows = zip(in_rows("works", r"\d of 10"), in_rows("works", r"[01]\.\d\d"), strict=True)
    taken = [([int(word[0]) for word in row], float(share)) for row, (share,) in rows]
    assert [share for _, share in taken[1:5]] == [0.6, 0.53, 0.47, 0.4] and len(taken) == 9
    assert all(share == round(sum(row) / (10 * len(row)), 2) for row, share in taken)


def test_all_signs_alike_have_the_largest_total() -> None:
    assert in_rows("sign-flips", "total .*") == [["total +8", "total +2", "total -2"]]
    assert "2 of 16 ways reach 8" in shown("sign-flips")[-1][0]


def test_the_parts_of_mixtral_are_those_of_its_sizes() -> None:
    v, d, f, heads, e = 32_000, 4096, 14_336, 32 + 8, 8
    told = [w for w, *_ in shown("mixtral") if re.search(r"\d M|,", w)]
    expert, attention = 3 * d * f / 1e6, 2 * d * 128 * heads / 1e6
    both = f"{v * d / 1e6:.0f} M"
    held, used = f"8 × {expert:.0f} M held", f"2 × {expert:.0f} M used"
    assert told == [both, f"{attention:.1f} M", f"{e * d:,}", held, used, both]
