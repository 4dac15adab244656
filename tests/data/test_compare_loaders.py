from pathlib import Path

import pytest

from data.compare_loaders import (
    CompareArguments,
    Datasets,
    Layout,
    Longspan,
    Peer,
    blocks_of,
    main,
    resumes,
    table,
    tokens_per_second,
    verdict,
)
from data.shards import Corpus

T, BATCH, UNIT = 64, 8, 64
LAYOUTS = [Layout(2, 0), Layout(1, 0), Layout(4, 0)]


@pytest.mark.parametrize("peer", [Longspan(), Datasets(0)])
def test_a_resume_is_judged_by_what_it_reads(peer: Peer, corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    peer.export(corpus, T, UNIT, folder)
    assert tokens_per_second(peer, folder, Layout(1, 0), BATCH, 0.02, 20) > 0
    same, fewer, more = resumes(peer, folder, BATCH, LAYOUTS[0], LAYOUTS, seed=0)
    if isinstance(peer, Longspan):
        assert (same, fewer, more) == ("exact", "exact", "exact")
    else:
        assert same == "exact"
        assert "repeated" in fewer, "datasets' state belongs to one number of ranks"
        assert "lost" in more


def test_peers_read_the_tokens_of_the_corpus(corpus: Corpus, tmp_path: Path) -> None:
    peer = Datasets(0)
    peer.export(corpus, T, UNIT, tmp_path / "peer")
    run = peer.open(tmp_path / "peer", Layout(1, 0), 0, BATCH, None)
    found = [row.tobytes() for tokens in run.batches for row in tokens]
    assert found == [row.tobytes() for row in blocks_of(corpus, T, UNIT).astype("int64")]


def test_verdicts() -> None:
    before, expected = [[b"a", b"b"]], [[b"c", b"d"], [b"e", b"f"]]
    cases = {
        "exact": expected,
        "same batches, other ranks": [[b"d", b"c"], [b"e", b"f"]],
        "each sample once, other batches": [[b"c", b"e"], [b"d", b"f"]],
        "1 lost, 0 repeated of 6": [[b"c", b"d"], [b"e"]],
        "0 lost, 2 repeated of 6": [[b"a", b"b"], *expected],
        "1 lost, 1 repeated of 6": [[b"c", b"d"], [b"e", b"e"]],
    }
    assert {verdict(seen, expected, before): seen for seen in cases.values()} == cases


def test_the_table_names_what_is_not_installed(corpus: Corpus) -> None:
    absent = Datasets(0)
    absent.needs = ("no_such_module",)
    arguments = CompareArguments(
        corpus=str(corpus.path), seq_len=T, batch=BATCH, workers=0, seconds=0.01, repeats=2
    )
    head, _, ours, missing = table(arguments, [Longspan(), absent])
    assert head.count("|") == ours.count("|") == missing.count("|")
    assert ours.count("exact") == 4
    assert "not installed: no_such_module (`pip install 'longspan[compare]'`)" in missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "corpus: missing"),
        (["corpus=nowhere"], "corpus nowhere: no manifest.json"),
        (["corpsu=x"], "corpsu=x: not known; did you mean corpus=?"),
        (["batch=many"], "batch=many: "),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"compare_loaders: {message}")


def test_a_corpus_too_small_for_the_layouts_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="1048576 samples of 65 are needed; take a smaller"):
        blocks_of(corpus, T, 2**20)
