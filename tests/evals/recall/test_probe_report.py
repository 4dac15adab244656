"""What a reader of the heat map and the tables sees is what the metrics say."""

import matplotlib.colors
import pytest
from matplotlib.figure import Figure

from evals import plots
from evals.recall import probe_report

CHANCE = 0.1


def cell(length, depth, value, interval, name="accuracy", probe="passkey"):
    return {
        "probe": probe,
        "name": name,
        "length": length,
        "depth": depth,
        "value": value,
        "ci95": interval,
        "ci95_by_trial": interval,
        "chance": CHANCE,
    }


METRICS = [
    cell(256, 0.0, 1.0, [0.9, 1.0]),
    cell(256, 1.0, 0.12, [0.06, 0.2]),
    cell(512, 0.0, CHANCE, [0.05, 0.17]),
    cell(512, 1.0, 0.01, [0.0, 0.05]),
]


@pytest.fixture
def heat_map():
    figure = Figure()
    axis = figure.subplots()
    plots.draw_heat_map(figure, axis, METRICS, "passkey", train_length=256)
    return figure, axis


def test_white_is_chance_blue_above_and_red_below(heat_map):
    _, axis = heat_map
    (image,) = axis.get_images()
    red, _, blue, _ = image.to_rgba(image.get_array()).transpose(2, 0, 1)
    # Rows are depths, columns lengths.
    assert blue[0, 0] > red[0, 0] + 0.2
    assert red[1, 1] > blue[1, 1] + 0.2
    assert min(red[0, 1], blue[0, 1]) > 0.95


def test_what_may_be_chance_is_grey_and_slanted(heat_map):
    _, axis = heat_map
    shown = {text.get_position(): text for text in axis.texts}
    assert {place: text.get_text() for place, text in shown.items()} == {
        (0, 0): "100",
        (0, 1): "12",
        (1, 0): "10",
        (1, 1): "1",
    }
    grey = matplotlib.colors.to_rgba(plots.REFERENCE_COLOUR)
    for place, undecided in {(0, 0): False, (0, 1): True, (1, 0): True, (1, 1): False}.items():
        assert (shown[place].get_style() == "italic") == undecided
        assert (matplotlib.colors.to_rgba(shown[place].get_color()) == grey) == undecided


def test_chance_is_marked_and_the_training_length_parts_the_columns(heat_map):
    figure, axis = heat_map
    (line,) = axis.get_lines()
    assert line.get_xdata()[0] == 0.5
    bar = next(other for other in figure.axes if other is not axis)
    assert "chance 10" in [label.get_text() for label in bar.get_yticklabels()]
    assert any(line.get_ydata()[0] == CHANCE for line in bar.get_lines())


def test_pooled_metrics_are_told_from_those_of_a_depth():
    pooled = cell(256, None, 0.5, [0.3, 0.7])
    loss = cell(256, None, 2.0, [1.0, 3.0], "nll_first", "induction")
    result = {"metrics": [*METRICS, pooled, loss]}
    assert probe_report.select(result, "passkey", "accuracy") == METRICS
    assert probe_report.select(result, "passkey", "accuracy", pooled=True) == [pooled]
    assert probe_report.select(result, "induction", "nll_first") == [loss]
