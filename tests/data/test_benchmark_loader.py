import pytest

from data.benchmark_loader import SHAPES, main


def test_the_benchmark_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.benchmark_loader.N_SHARDS", (1, 3))  # Every file is synced to disk.
    sizes = ["tokens=500000", "seconds=0.01", "documents=2000", "index=300000"]
    assert main([*sizes, "threads=1"]) == 0
    out = capsys.readouterr().out
    # Four corpora and the mixture, for which one lane is too few.
    assert out.count("\n| windows |") == len(SHAPES) * 5
    assert out.count("\n| lanes |") == len(SHAPES) * 5 - 1
    assert "\n| 30,000 | 256 |" in out
    assert "windows over 300,000 documents" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokns=1", "tokns=1: not known; did you mean tokens=?"),
        ("seconds=soon", "seconds=soon: must be a number"),
        ("threads=1,x", "threads=1,x: must be whole numbers with commas between"),
    ],
)
def test_bad_input_is_one_clear_line(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith(f"benchmark_loader: {message}")
