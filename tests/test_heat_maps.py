"""The picture of a step's statistics: what its cells say, by their place and colour."""

import numpy as np
import pytest

from gpt_pretrain.train.writers import heat_maps
from gpt_pretrain.train.writers.heat_maps import draw, panels_of, pictures_of


def statistics(num_layers=12, **changes) -> dict[str, float]:
    """As a run writes them: names in alphabetical order, so that layer 10 comes before layer 2."""
    scalars = {"train/loss": 1.0}
    for layer in range(num_layers):
        for site, factor in (("attn_out", 1), ("block_in", 2), ("mlp_out", 3)):
            for kind, value in (("max_abs", 9.0), ("mean", (-1) ** layer * 0.1), ("rms", 1.0), ("std", 0.9)):
                scalars[f"statistics/activations/{layer}/{site}/{kind}"] = (layer + 1) * factor * value
        scalars[f"statistics/gradients/layers/{layer}"] = 0.5 + layer
    for part in ("ln_f", "token_embedding"):
        scalars[f"statistics/gradients/{part}"] = 0.25
    return dict(sorted((scalars | changes).items()))


def test_rows_are_layers_and_columns_are_sites_in_the_order_of_the_model():
    rows, panels = panels_of(statistics())
    assert rows == [*map(str, range(12)), "ln_f", "token_embedding"]
    named = {panel.title: panel for panel in panels}
    assert set(named) == {*(f"activations: {kind}" for kind in ("max_abs", "mean", "rms", "std")), "gradients"}
    rms = named["activations: rms"]
    assert rms.columns == ("block_in", "attn_out", "mlp_out")
    np.testing.assert_allclose(rms.values[:12], [[2 * n, n, 3 * n] for n in range(1, 13)])
    assert rms.values.mask[12:].all() and named["gradients"].values[:, 0].tolist() == [*np.arange(12) + 0.5, 0.25, 0.25]


def test_a_cell_has_the_colour_of_its_value_by_the_logarithm_where_values_span_more_than_tenfold():
    _, panels = panels_of(statistics())
    colours = heat_maps._colours(next(panel for panel in panels if panel.title.endswith("rms")))
    assert colours[0, 1].tolist() == [68, 1, 84] and colours[11, 2].tolist() == [253, 231, 37]  # 1 and 36
    np.testing.assert_allclose(colours[5, 1], [33, 145, 140], atol=1)  # 6, in the middle of both by its logarithm
    few = panels_of({f"statistics/gradients/layers/{layer}": value for layer, value in enumerate((1.0, 2.0, 3.0))})[1]
    np.testing.assert_allclose(heat_maps._colours(few[0])[1, 0], [33, 145, 140])


def test_signed_values_are_around_white_and_what_is_not_finite_is_magenta():
    mean = "statistics/activations/0/block_in/mean"
    _, panels = panels_of({mean: -2.0, mean.replace("/0/", "/1/"): 0.0, mean.replace("/0/", "/2/"): 1.0})
    low, zero, high = heat_maps._colours(panels[0])[:, 0]
    assert low.tolist() == [33, 102, 172] and zero.tolist() == [247, 247, 247] and high[0] > high[1]
    _, panels = panels_of({mean: float("nan"), mean.replace("/0/", "/1/"): 1.0})
    assert heat_maps._colours(panels[0])[:, 0].tolist()[0] == [255, 0, 255]
    picture = pictures_of({mean: float("inf")})[heat_maps.NAME]
    assert ((picture == (255, 0, 255)).all(-1)).sum() > 300


@pytest.mark.parametrize("num_layers", [1, 12, 48])
def test_the_picture_has_a_place_for_each_cell_and_what_is_written_stays_inside(num_layers):
    scalars = statistics(num_layers)
    picture = pictures_of(scalars)[heat_maps.NAME]
    height, width, channels = picture.shape
    assert (channels, picture.dtype) == (3, np.uint8) and height < 70 + 15 * (num_layers + 3) and width < 1200
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()  # nothing is cut off
    rows, panels = panels_of(scalars)
    corners = {
        tuple(map(int, colour)) for panel in panels for colour in heat_maps._colours(panel)[:num_layers].reshape(-1, 3)
    }
    assert corners <= {tuple(map(int, pixel)) for pixel in picture.reshape(-1, 3)}
    changed = draw(["9" * len(row) for row in rows], panels)
    assert changed.shape != picture.shape or (changed != picture).any()  # names of rows can be seen


def test_no_statistics_no_picture():
    assert pictures_of({"train/loss": 1.0, "statistics/other": 2.0}) == {}
