"""The shipped models: rivals of one size have equal parameters, batches and learning rates."""

import pytest

from launch import train as train_command
from pretrain import mixers
from pretrain.config import load_config
from pretrain.models import LanguageModelConfig, LayersConfig
from pretrain.training.catalogue import Entry, catalogue, describe_catalogue, short_layers

ROWS = {*mixers.names(), "masformer", "spade_control"}
ENCODER_DECODERS = {"local_t5", "spade_t5", "t5"}
PAPERS = {
    "block_recurrent_paper_200m",
    "bst_paper_200m",
    "bst_paper_200m_mf",
    "bst_paper_200m_mh",
    "mega_paper_wt103",
    "spade_paper_wt103",
}
# By size: vocabulary, nominal parameters (tied embedding included), reset grid, learning rate.
SIZES = {
    "tiny": (4096, 2e6, 128, 3e-3),
    "125m": (32_128, 125e6, 512, 6e-4),
    "350m": (32_128, 350e6, 512, 3e-4),
    "1.3b": (32_128, 1.3e9, 512, 2e-4),
}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Entry]:
    """Everything at the large sizes' vocabulary: one build of each model serves all tests."""
    return {entry.name: entry for entry in catalogue(32_128, seq_len=512)}


@pytest.mark.parametrize("size", SIZES)
def test_rivals_have_equal_sizes_batches_and_learning_rates(
    size: str, shipped: dict[str, Entry]
) -> None:
    vocab_size, nominal, grid, learning_rate = SIZES[size]
    if size == "tiny":
        shipped = {e.name: e for e in catalogue(vocab_size, seq_len=512, names="*_tiny")}
    rivals = {row: shipped[f"{row}_{size}"] for row in ROWS}
    parameters = {row: entry.parameters for row, entry in rivals.items()}
    assert max(parameters.values()) <= 1.03 * min(parameters.values()), parameters
    assert parameters["swa"] == pytest.approx(nominal, rel=0.15)
    assert {entry.reset_grid for entry in rivals.values()} == {grid}
    rates = {load_config([f"model={e.name}"]).optim.learning_rate for e in rivals.values()}
    assert rates == {learning_rate}


@pytest.mark.parametrize("size", ["tiny", "mini", "base"])
def test_encoder_decoders_differ_in_the_encoders_mixers_alone(
    size: str, shipped: dict[str, Entry]
) -> None:
    parameters = [shipped[f"{row}_{size}"].parameters for row in ENCODER_DECODERS]
    assert max(parameters) <= 1.005 * min(parameters), parameters
    configs = [load_config([f"model={row}_{size}"]) for row in ENCODER_DECODERS]
    for config in configs:
        config.model.encoder.layers = config.model.encoder.mixers = config.model.d_ff = None
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].objective == "span"


def test_there_is_no_other_model(shipped: dict[str, Entry]) -> None:
    """A row, size or paper's setting that is in no table here would be held to nothing."""
    rows = {f"{row}_{size}" for row in ROWS for size in SIZES}
    rows |= {f"{row}_{size}" for row in ENCODER_DECODERS for size in ("tiny", "mini", "base")}
    assert set(shipped) == rows | PAPERS | {"bst_quickstart", "swa_quickstart"}


def test_rows_with_full_attention_alone_have_a_growing_state(shipped: dict[str, Entry]) -> None:
    growing = {name.rsplit("_", 1)[0] for name, e in shipped.items() if not e.constant_state}
    assert growing == {"attention", "masformer"} | ENCODER_DECODERS


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (LayersConfig(default="swa"), "6 swa"),
        (LayersConfig(default="swa", at={0: "spade", 2: "bst"}), "spade, swa, bst, 3 swa"),
        (LayersConfig(pattern=["gss", "gss", "swa"], repeat=2), "(2 gss, swa) x 2"),
        (LayersConfig(pattern=["swa"] * 5 + ["bst"]), "5 swa, bst"),
    ],
)
def test_layers_are_told_in_short(layers: LayersConfig, text: str) -> None:
    assert short_layers(LanguageModelConfig(n_layers=6, layers=layers)) == text


def test_an_encoders_layers_are_told_first() -> None:
    config = load_config(["model=spade_t5_base"]).model
    assert short_layers(config) == "spade, 11 swa -> 12 attention"


def test_dry_run_without_a_model_lists_the_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = catalogue(32_128, 1024, "*_quickstart")  # building them all takes seconds
    monkeypatch.setattr(train_command, "catalogue", lambda *a: catalogue(*a, "*_quickstart"))
    assert train_command.main(["dry_run=true", "train.seq_len=1024"]) == train_command.FINISHED
    assert capsys.readouterr().out.strip() == describe_catalogue(entries, 32_128, 1024)


def test_the_list_says_what_a_model_is_and_costs(shipped: dict[str, Entry]) -> None:
    entry = shipped["bst_125m"]
    line = describe_catalogue([entry], 32_128, 512).splitlines()[-1]
    assert line.split()[:4] == ["bst_125m", "109,780,404", "695", "yes"]
    assert line.endswith(entry.layers)


def test_a_wrong_model_gets_the_closest_match_and_no_list(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_command.main(["dry_run=true", "model=bst_125"]) == train_command.BAD_INPUT
    printed = capsys.readouterr()
    assert "did you mean 'bst_125m'?" in printed.err
    assert not printed.out
