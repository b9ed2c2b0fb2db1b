"""The atlas: its rows follow from what the repository holds, and a study becomes one."""

import json
import math

import pytest

from book import atlas, filled
from minimoe.study.counts import published


def test_the_stored_rows_are_those_that_the_repository_gives():
    assert atlas.rows().items() <= atlas.read().items()


def test_cells_are_the_numbers_of_their_sources(root):
    rows, table = atlas.read(), published()
    assert [c["value"] for c in rows["mixtral"]["cells"]["C12"]] == pytest.approx(
        [table.load(x).value for x in (1, 16, 32)], rel=1e-5
    )
    told = [c["value"] for c in rows["mixtral"]["cells"]["C13"]]
    assert told[2] == pytest.approx(50 * table.information(32)["domain_equal"], rel=1e-5)
    study = json.loads((root / "book/results/study.json").read_text())
    found = {f["claim"]: f["verdict"] for f in study["findings"]}
    assert rows["mini"]["verdicts"] == {c: found[c] for c in atlas.QUANTITIES}
    assert "verdicts" not in rows["mixtral"] and not rows["mini_untrained"]["verdicts"]
    assert (rows["mini"]["experts"], rows["mini"]["experts_per_token"]) == (8, 2)
    assert [r["labels"] for r in rows.values()][::5] == ["7 subjects", "9 domains"]


def test_a_cell_has_an_interval_or_says_why_not():
    for row in atlas.read().values():
        for claim in atlas.QUANTITIES:
            assert (claim in row["cells"]) != (claim in row["cannot_be_told"])
            shown = atlas.written(row, claim)
            assert "[" in shown or "cannot be told" in shown
            for one in row["cells"].get(claim, []):
                assert one["low"] is None or one["low"] <= one["value"] <= one["high"]
        if not any(c["low"] for cells in row["cells"].values() for c in cells):
            assert row["no_interval"]


def test_a_study_of_questions_becomes_a_row(tmp_path, monkeypatch, root, capsys):
    study = json.loads((root / "book/results/study.json").read_text())
    m = study["measurements"]
    load = {"MMLU test questions": m["load"]["MMLU questions"]}
    m |= {"text": "MMLU test questions", "load": load, "paths": []}
    m |= {"topics": m["subjects"], "information": m["information_topics"]}
    study |= {"model": "somebody/Model", "control": None}
    (tmp_path / "summary.json").write_text(json.dumps(study))
    monkeypatch.setattr(atlas, "ATLAS", tmp_path)
    atlas.main([str(tmp_path / "summary.json"), "somebody_model"])
    row = json.loads((tmp_path / "somebody_model.json").read_text())
    assert row["model"] == "somebody/Model" and row["labels"] == "57 subjects"
    assert row["cells"]["C12"][0]["value"] == pytest.approx(1.96247)
    assert "C10" in row["cannot_be_told"] and "propose it" in capsys.readouterr().out
    bits = m["information_topics"][0]
    assert math.isclose(row["cells"]["C13"][0]["value"], 50 * bits["domain"]["value"], rel_tol=1e-5)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"expected the summary\.json of a study"):
        atlas.main([str(tmp_path / "other.json"), "x"])


def test_the_page_shows_every_row_and_its_files(root):
    page = (root / "book/atlas.md").read_text()
    shown = filled.fill(page)
    for name, row in atlas.read().items():
        assert f"**{row['model']}**" in shown and f"(results/atlas/{name}.json)" in shown
    assert "(../minimoe/study/published/olmoe_1b_7b_domains.json)" in shown
