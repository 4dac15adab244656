"""The page in a real browser: nothing fetched, nothing complained of, all pictures shown, at the
width of a desk and of a phone, light and dark. `make test-browser`; screenshots stay in
test-artefacts/.
"""

from pathlib import Path

import pytest
from chromium import Chromium

from evals import compare, report
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from tests.evals.toy_models import Bigram, Uniform, markov_documents

pytestmark = pytest.mark.browser

ARTEFACTS = Path("test-artefacts")
OPTIONS = PerplexityOptions(contexts=(16, 32, 64), spans_per_document=4, stream_tokens=100)
DOCUMENTS, TABLE = markov_documents([300] * 24, vocab_size=12)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on three models."""
    runs = []
    for name, share in (("oracle", 0.0), ("softened", 0.1), ("uniform", 1.0)):
        out = tmp_path_factory.mktemp("run")
        model = Uniform(12) if share == 1 else Bigram(TABLE * (1 - share) + share / len(TABLE))
        perplexity.run(model, DOCUMENTS, OPTIONS, out, name=name, train_length=32, progress=False)
        runs.append(compare.load(out))
    return report.write(runs, tmp_path_factory.mktemp("page"), compare.compare(runs))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


LOOKS = {
    "desk": (1280, False),
    "desk_dark": (1280, True),
    "phone": (390, False),
    "phone_dark": (390, True),
}


@pytest.mark.parametrize("look", LOOKS)
def test_page_shows_all_it_has_and_asks_for_nothing(browser, page, look):
    width, dark = LOOKS[look]
    browser.open(page.as_uri(), width, dark=dark, phone=look.startswith("phone"))
    images = browser.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(images) == 4
    for complete, natural, shown in images:
        assert complete
        assert natural > 0
        assert 300 < shown < width
    across, down = browser.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    assert across == width, "only tables scroll sideways, inside themselves"
    assert down > 1500
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    picture = browser.screenshot()
    ARTEFACTS.mkdir(exist_ok=True)
    (ARTEFACTS / f"report_{look}.png").write_bytes(picture)
    size = [int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)]
    assert size == [across, down]

    spoken = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in spoken] == []
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def test_a_page_that_fetches_is_caught(browser, page, tmp_path):
    """The content policy stops it and the browser says so: what the test above would see."""
    fetching = tmp_path / "fetching.html"
    body = page.read_text().replace("<body>", "<body><img src='http://127.0.0.1:9/x.png'>")
    fetching.write_text(body)
    browser.open(fetching.as_uri(), 800)
    assert browser.evaluate("document.images[0].naturalWidth") == 0
    entries = [e["params"]["entry"] for e in browser.events if e["method"] == "Log.entryAdded"]
    assert any("Content Security Policy" in entry["text"] for entry in entries)
