"""The page opens offline, shows every run, gate and verdict, and refuses what may not be shown."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from toy_models import Bigram, Uniform, markov_documents

from evals import baseline, compare, perplexity, report
from evals.perplexity import PerplexityOptions

OPTIONS = PerplexityOptions(contexts=(16, 32, 64), spans_per_document=4, stream_tokens=100)
DOCUMENTS, TABLE = markov_documents([300] * 6, vocab_size=12)


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]
        self.fetched += [tag] if tag in ("script", "link", "iframe") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    loaded = []
    for name, model in (("oracle", Bigram(TABLE)), ("uniform <flat>", Uniform(12))):
        out = tmp_path_factory.mktemp("run")
        perplexity.run(model, DOCUMENTS, OPTIONS, out, name=name, train_length=32, progress=False)
        loaded.append(compare.load(out))
    return loaded


def test_page_is_self_contained_and_shows_everything(runs, tmp_path):
    training, _ = markov_documents([2000] * 2, vocab_size=12)
    ngram = baseline.evaluate(DOCUMENTS, training, runs[0])
    path = report.write(runs, tmp_path, ngram)
    page = path.read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    # Namespaces are names, not addresses; matplotlib's SVG has no other URL.
    urls = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(
        "w3.org" in u or "purl.org" in u or "creativecommons" in u or "matplotlib.org" in u
        for u in urls
    )
    assert "<svg" in page
    assert "uniform &lt;flat&gt;" in page
    assert "<flat>" not in page
    for expected in (
        "oracle better",
        "byte 5-gram",
        "prefix_consistency",
        "unchanged_model",
        "weights_sha256",
        "data.fingerprint",
        "peak memory",
        "(few)",
    ):
        assert expected in page
    markdown = (tmp_path / "report.md").read_text()
    assert "| oracle | future_perturbation | passed |" in markdown
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_findings_name_the_verdict_at_each_context(runs):
    lines = report.findings(runs)
    assert "oracle against uniform <flat>, by context: oracle better at 16, 32, 64." in lines
    assert any(line.startswith("All ") and line.endswith(" gates passed.") for line in lines)


def test_one_run_alone_has_a_report(runs, tmp_path):
    assert "oracle" in report.write(runs[:1], tmp_path).read_text()


def test_failed_gates_and_equal_names_are_refused(runs, tmp_path):
    broken = dataclasses.replace(
        runs[0], result={**runs[0].result, "gates": [{"name": "coverage", "passed": False}]}
    )
    with pytest.raises(ValueError, match="gates failed in oracle"):
        report.write([broken], tmp_path)
    with pytest.raises(ValueError, match="runs=oracle,oracle"):
        report.write([runs[0], runs[0]], tmp_path)
    assert not (tmp_path / "report.html").exists()
