"""The page opens offline, shows every run, gate and verdict, and refuses what may not be shown."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from evals import compare, report
from evals.perplexity import baseline
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from tests.evals.toy_models import Bigram, Uniform, markov_documents

OPTIONS = PerplexityOptions(contexts=(16, 32, 64), spans_per_document=4, stream_tokens=100)
DOCUMENTS, TABLE = markov_documents([300] * 6, vocab_size=12)


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.images = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        addresses = [v for k, v in attributes if k in ("src", "href", "srcset", "data", "poster")]
        self.images += [v for v in addresses if v.startswith("data:image/svg+xml;base64,")]
        self.fetched += [v for v in addresses if not v.startswith(("#", "data:"))]
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
    everyone = [*runs, ngram]
    path = report.write(everyone, tmp_path, compare.compare(everyone))
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
    assert len(parser.images) == page.count("<img") == 4
    assert all(b"<svg" in base64.b64decode(image.partition(",")[2]) for image in parser.images)
    assert "default-src 'none'" in page, "and the browser is told to fetch nothing"
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
    lines = report.findings(runs, compare.compare(runs))
    assert lines[0].startswith(
        "oracle against uniform <flat>, by context: oracle better at 16, 32, 64 (by "
    )
    assert "; oracle better in stream (by " in lines[0]
    assert any(line.startswith("All ") and line.endswith(" gates passed.") for line in lines)


@pytest.mark.parametrize(
    ("gain", "band", "words"),
    [
        (0.02, [0.01, 0.03], "its loss is 0.0200 nat per token lower (it gains)"),
        (-0.02, [-0.03, -0.01], "its loss is 0.0200 nat per token higher (it degrades)"),
        (-0.02, [-0.05, 0.01], "is 0.0200 nat per token higher (no difference shown)"),
        (-2e-6, [-3e-6, -1e-6], "is the same to 0.0001 nat per token (no difference shown)"),
    ],
)
def test_a_gain_is_said_as_what_the_loss_does(runs, gain, band, words):
    result = json.loads(json.dumps(runs[0].result))
    for metric in result["metrics"]:
        if metric["name"] == "gain_beyond_training":
            metric.update(value=gain, band95=band)
    (line,) = [
        line
        for line in report.findings([dataclasses.replace(runs[0], result=result)], [])
        if "instead of 32" in line
    ]
    assert words in line


def test_differences_have_one_sign_in_table_and_plot(runs):
    comparisons = compare.compare(runs)
    (difference,) = report._differences(comparisons, runs[0])
    assert difference.label == "oracle - uniform <flat>"
    assert all(point["value"] < 0 for point in difference.points), "the oracle is better"
    (row, *_) = report._verdict_table(comparisons)[2]
    assert row[4] == f"{difference.points[0]['value']:+.4f}"


def test_numbers_of_other_tokens_do_not_stand_beside_each_other(runs, tmp_path):
    """Both have a pass `stream`, one over 100 tokens of each document and one over 50."""
    options = dataclasses.replace(OPTIONS, stream_tokens=50)
    perplexity.run(
        Uniform(12), DOCUMENTS, options, tmp_path, name="short", train_length=32, progress=False
    )
    rows = report.level_table([runs[0], compare.load(tmp_path)])[2]
    by_protocol = {row[0]: row for row in rows}
    assert by_protocol["stream"][4] == "-"
    assert by_protocol["fixed(4)"][4] != "-"


def test_an_evaluation_on_the_training_text_says_so(runs):
    result = json.loads(json.dumps(runs[0].result))
    assert "(held out;" in report._lead(runs)
    result["model"] |= {"training_path": "toy", "training_split": "validation"}
    assert "TRAINING TEXT of oracle" in report._lead([dataclasses.replace(runs[0], result=result)])


def test_one_run_alone_has_a_report(runs, tmp_path):
    assert "oracle" in report.write(runs[:1], tmp_path).read_text()


def test_failed_gates_are_refused(runs, tmp_path):
    broken = dataclasses.replace(
        runs[0], result={**runs[0].result, "gates": [{"name": "coverage", "passed": False}]}
    )
    with pytest.raises(ValueError, match="gates failed in oracle"):
        report.write([broken], tmp_path)
    assert not (tmp_path / "report.html").exists()
