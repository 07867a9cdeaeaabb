from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.readers import open_comparisons
from flowalign.evaluate.audit import audit
from flowalign.report.audit import write_audit_page
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.table import ScoreTable
from tests.browser import CHROMIUM, chromium

NASTY = "</script><script>alert(1)</script> & <b>bold</b>"


@pytest.fixture(scope="module")
def page(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of comparisons with something wrong in most ways."""
    folder = tmp_path_factory.mktemp("audit")
    pictures = [row["image"]["bytes"] for row in pq.read_table(emoji / "emoji.parquet").slice(2000, 20).to_pylist()]
    for place, data in enumerate(pictures):
        (folder / f"{place}.png").write_bytes(data)
    (folder / "cut.png").write_bytes(pictures[0][:80])
    rows = [(f"thing {place // 2}", f"{place}.png", f"{place + 1}.png") for place in range(0, 20, 2)]
    rows += [(NASTY, "0.png", "0.png"), ("cut", "cut.png", "3.png"), ("thing 0", "1.png", "0.png"), (" ", "4.png", "5.png")]
    lines = [json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) for prompt, chosen, rejected in rows]
    (folder / "votes.jsonl").write_text("\n".join(lines) + "\n")
    columns = {
        "image": [hashlib.sha256(data).hexdigest() for data in pictures],
        "path": [""] * 20,
        "prompt": [f"thing {place // 2}" for place in range(20)],
        "raw.quality": pa.array([float(place % 2 == 0) + place / 100 for place in range(20)]),
    }
    card = Card("quality", "", (0, 2), "higher", "MIT", "", "none", False, False, "1")
    comparisons = open_comparisons(folder / "votes.jsonl")
    found = audit(
        comparisons, "votes <1>.jsonl", table=ScoreTable(pa.table(columns), {"quality": card}), against=(comparisons, "itself")
    )
    path = write_audit_page(found, folder / "audit.html")
    (folder / "about.json").write_text(json.dumps(found.about()))
    return path


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.said = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.said += data


def test_it_loads_nothing_and_shows_text_as_it_is(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    tags = Tags(html)
    for tag, attributes in tags.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "b")
        assert attributes.get("src", "data:image/webp").startswith("data:image/webp")
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert tag != "img" or attributes["alt"]
    assert "default-src 'none'" in html
    assert NASTY in tags.said
    assert "<title>Audit of votes &lt;1&gt;.jsonl · flowalign</title>" in html


def test_every_check_is_in_the_table_with_its_verdict_and_links_lead_somewhere(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    about = json.loads((page.parent / "about.json").read_text())
    assert about["verdict"] == "bad"
    table = html.partition('<section id="checks">')[2].partition("</section>")[0]
    verdicts = re.findall(r'<tr><td><span class="badge (\w+)">', table)
    assert verdicts == [check["verdict"] for check in about["checks"]]
    assert {"ok", "bad"} <= set(verdicts)
    assert set(re.findall(r'href="#(\w+)"', html)) <= set(re.findall(r'<section id="(\w+)"', html))
    assert "unsafe: needs a table with the reward nsfw" in html


def test_agreement_and_gaps_are_drawn(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    agreement = html.partition('<section id="agreement">')[2].partition("</section>")[0]
    about = json.loads((page.parent / "about.json").read_text())
    quality = next(check for check in about["checks"] if check["name"] == "agreement")["numbers"]["rewards"]["quality"]
    # 10 votes for the even place, one against it, one between a picture and itself, one with the damaged picture left out
    assert quality["value"] == pytest.approx((10 + 0.5) / 12)
    assert f"quality {100 * quality['value']:.1f} %" in agreement
    assert "12 pairs from" in html.partition('<section id="gaps">')[2].partition("</section>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_real_browser_shows_it_without_complaint(page: Path) -> None:
    with chromium() as browser:
        browser.open(page)
        assert browser.ask("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
        assert browser.ask("document.images.length") > 0
        assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.problems == []
