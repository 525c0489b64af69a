"""The drawing functions draw what they are given: numbers, names and pixels are found again in the figure."""

import io

import pytest
import torch
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text
from PIL import Image

from lib import figures


def texts(figure) -> list[str]:
    """All words of a figure: titles, labels, ticks and what is written inside."""
    figure.canvas.draw()
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def images(figure) -> list:
    return [image.get_array() for axes in figure.axes for image in axes.images]


def contrast(a, b) -> float:
    """WCAG 2's ratio of two colours, 1 to 21; 4.5 is asked of text."""
    light = []
    for colour in (a, b):
        r, g, b_ = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
        light.append(0.2126 * r + 0.7152 * g + 0.0722 * b_ + 0.05)
    return max(light) / min(light)


def ramp(*shape) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def test_every_figure_stands_on_its_own_white_ground(tmp_path):
    """So that black letters can be read on a dark page too."""
    figures.heat_map(ramp(2, 3), path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as png:
        assert png.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_shades_carry_black_letters():
    assert min(contrast(shade, "black") for shade in figures.SHADES) > 7


@pytest.mark.parametrize(
    "token, shown",
    [(" dog", "␣dog"), ("a b", "a b"), ("\n", "↵"), ("  ", "␣␣"), ("", ""), ("\x00x", "\ufffdx"), (" a ", "␣a␣")],
)
def test_blanks_of_a_token_are_seen(token, shown):
    assert figures.visible(token) == shown


def test_token_strip_writes_every_row_and_colours_by_kind():
    rows = {"token": ["The", " dog", "<image>"], "id": [504, 2767, 9]}
    figure = figures.token_strip(rows, {"token": ["word", "word", "image"]}, title="a strip")
    found = texts(figure)
    assert {"a strip", "token", "id", "The", "␣dog", "<image>", "504", "2767", "9", "word", "image"} <= set(found)
    colours = [p.get_facecolor() for p in figure.axes[0].patches]
    assert colours[0] == colours[1] != colours[2] and len({*colours[3:6]}) == 1
    assert colours[6:] == [colours[0], colours[2]]  # the legend's


def test_token_strip_goes_on_below():
    figure = figures.token_strip({"t": [str(i) for i in range(7)]}, columns=3)
    corners = [p.get_xy() for p in figure.axes[0].patches]
    assert len({y for _, y in corners}) == 3 and len({x for x, _ in corners}) == 3
    with pytest.raises(ValueError, match="colours for"):
        figures.token_strip({"t": ["x"] * 9}, {"t": range(9)})


def test_token_strip_shows_patches_where_they_are_given():
    patch = ramp(3, 2, 2).to(torch.uint8)
    figure = figures.token_strip({"t": ["a", patch, "b", patch]}, columns=3)
    assert [p.tolist() for p in images(figure)] == [patch.permute(1, 2, 0).tolist()] * 2
    boxes = [p.get_bbox() for p in figure.axes[0].patches]
    for image, box in zip(figure.axes[0].images, (boxes[1], boxes[3]), strict=True):
        left, right, low, high = image.get_extent()
        assert box.x0 < left < right < box.x1 and box.y0 < high < low < box.y1
        assert right - left == pytest.approx(low - high)  # as square as it was
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1] == 0  # an image turns the axes unless told not to


def test_heat_map_shows_its_numbers_and_names():
    values = torch.tensor([[0.25, 1.0], [0.5, 0.0]])
    figure = figures.heat_map(values, ["The", " dog"], ["one", "two"], title="who", text="{:.2f}", x="to", y="from")
    assert {"who", "␣dog", "two", "to", "from", "0.25", "1.00", "0.50", "0.00"} <= set(texts(figure))
    assert torch.equal(torch.tensor(images(figure)[0].tolist()), values)
    dark = {t.get_text(): t.get_color() for t in figure.axes[0].texts}
    assert dark["1.00"] == "black" and dark["0.00"] == "white"  # readable on either end of the scale


def test_heat_map_leaves_out_what_is_not_a_number_and_its_scale_if_asked():
    values = torch.tensor([[1.0, torch.nan], [torch.nan, 3.0]])
    figure = figures.heat_map(values, scale=False)
    drawn = figure.axes[0].images[0]
    assert drawn.get_array().mask.tolist() == [[False, True], [True, False]] and drawn.get_clim() == (1, 3)
    assert len(figure.axes) == 1 and len(figures.heat_map(values).axes) == 2


def test_bar_chart_draws_one_panel_a_group():
    figure = figures.bar_chart({"cold": [0.75, 0.25], "hot": [0.5, 0.5]}, [" fence", "moon"], form="{:.0%}")
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths == [[0.75, 0.25], [0.5, 0.5]]
    assert {"cold", "hot", "␣fence", "moon", "75%", "25%"} <= set(texts(figure))


def test_line_chart_tells_its_curves_apart_without_colour():
    series = {name: ([0, 1, 2], [k, 2 * k, 4 * k]) for k, name in enumerate("abcdef", start=1)}
    figure = figures.line_chart(series, x="step", y="loss")
    drawn = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in drawn] == [[k, 2 * k, 4 * k] for k in range(1, 7)]
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 6
    assert {"a", "f", "step", "loss"} <= set(texts(figure))
    with pytest.raises(ValueError, match="six"):
        figures.line_chart({**series, "g": ([0], [0])})


def test_stacked_bars_stand_end_to_end_and_say_their_sum():
    figure = figures.stacked_bars({"weights": [4, 2], "gradients": [3, 1]}, ["all", "lora"], title="memory", x="MiB")
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0, 4), (0, 2), (4, 3), (2, 1)]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in figure.axes[0].patches}) == 2
    assert {"memory", "MiB", "all", "lora", "weights", "gradients", "7", "3"} <= set(texts(figure))
    with pytest.raises(ValueError, match="seven"):
        figures.stacked_bars(dict.fromkeys("abcdefgh", [1]), ["all"])


def test_code_book_counts_all_values_and_marks_the_code():
    values = torch.tensor([-1.0, -0.9, 0.0, 0.1, 0.1, 1.0])
    figure = figures.code_book(values, [-1.0, 0.0, 1.0], bins=20)
    axes = figure.axes[0]
    assert sum(bar.get_height() for bar in axes.patches if bar.get_facecolor() == to_rgba(figures.SHADES[1])) == 6
    assert [line[0][0] for line in axes.collections[0].get_segments()] == [-1, 0, 1]
    assert {"0", "1", "2"} <= set(texts(figure))


def test_clouds_put_points_where_they_are():
    groups = {"words": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "patches": torch.tensor([[1.0, 1.0]])}
    figure = figures.clouds(groups, {"words": [" dog", "moon"]}, title="who is near whom")
    drawn = [[list(p) for p in points.get_offsets()] for points in figure.axes[0].collections]
    assert drawn == [points.tolist() for points in groups.values()]
    assert {"who is near whom", "words", "patches", "␣dog", "moon"} <= set(texts(figure))
    clump = [f"word{i}" for i in range(12)]
    axes = figures.clouds({"a": torch.zeros(12, 2), "b": torch.ones(1, 2)}, {"a": clump}).axes[0]
    apart = [t.xyann for t in axes.texts]
    for i, (x, y) in enumerate(apart):  # names of points that lie on one spot do not
        assert all(abs(x - a) > 20 or abs(y - b) > 8 for a, b in apart[:i])
    with pytest.raises(ValueError, match="five"):
        figures.clouds(dict.fromkeys("abcdef", torch.zeros(1, 2)))


@pytest.mark.parametrize("apart", [False, True])
def test_patch_grid_keeps_every_pixel_and_numbers_the_patches(apart):
    image = ramp(3, 4, 6).to(torch.uint8)
    figure = figures.patch_grid(image, (2, 3), apart=apart, mark=[3])
    drawn = torch.tensor(images(figure)[0].tolist())
    gap = 1 if apart else 0
    assert drawn.shape == (4 + gap, 6 + gap, 3)
    assert torch.equal(drawn[2 + gap :, 3 + gap :], image[:, 2:, 3:].permute(1, 2, 0).long())
    assert not apart or (drawn[2] == 255).all()
    assert [t.get_text() for t in figure.axes[0].texts] == ["0", "1", "2", "3"]
    framed = [p.get_xy() for p in figure.axes[0].patches if p.get_linewidth() == 3]
    assert framed == [(3 + gap, 2 + gap)]
    with pytest.raises(ValueError, match="4x6 image cannot be cut into 5x3"):
        figures.patch_grid(image, (5, 3))


def test_patch_grid_draws_the_whole_patches_of_a_photo():
    """The posts' 64 pixels on a photo of 224: nine whole patches, and a margin that is in none of them."""
    photo = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    figure = figures.patch_grid(photo, 64)
    assert torch.equal(torch.tensor(images(figure)[0].tolist()), photo[:, :192, :192].permute(1, 2, 0).long())
    assert [t.get_text() for t in figure.axes[0].texts] == [*map(str, range(9))]


def test_pca_finds_the_direction_that_was_put_in_and_keeps_its_sense():
    """Tokens that differ along one hidden line: the first component is that line. Where the first token goes to the other end,
    the decomposition turns round of itself; the image must not."""
    torch.manual_seed(0)
    where, line = torch.linspace(0, 1, 12), torch.randn(8)
    moved = torch.cat([torch.ones(1), where[1:]])
    layers = [w[:, None] * line * 10 + 0.01 * torch.randn(12, 8) for w in (where, moved)]
    parts = figures.pca(layers, (3, 4))
    assert parts.shape == (2, 3, 3, 4) and parts.min() >= 0 and parts.max() <= 1
    first = parts[:, 0].flatten(1)
    alike = [torch.corrcoef(torch.stack([row, w]))[0, 1].item() for row, w in zip(first, (where, moved), strict=True)]
    assert abs(alike[0]) > 0.99 and abs(alike[1] - alike[0]) < 0.01


def test_pca_grid_shows_image_colours_and_first_component():
    parts = torch.rand(2, 3, 4, 5)
    image = ramp(1, 4, 5).to(torch.uint8)
    figure = figures.pca_grid(image, parts, ["start", "end"])
    drawn = [torch.tensor(p.tolist()) for p in images(figure)]
    assert torch.equal(drawn[0][..., 1].to(torch.uint8), image[0])
    for i in range(2):
        assert torch.allclose(drawn[1 + 2 * i], parts[i].permute(1, 2, 0))
        assert torch.allclose(drawn[2 + 2 * i], parts[i, 0])
    assert {"start", "end"} <= set(texts(figure))


def test_pca_gif_moves_from_layer_to_layer(tmp_path):
    parts = torch.stack([torch.zeros(3, 2, 3), torch.ones(3, 2, 3)])
    data = figures.pca_gif(parts, ["first", "last"], tmp_path / "x.gif", side=60)
    assert (tmp_path / "x.gif").read_bytes() == data
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.n_frames == 8 and gif.info["loop"] == 0 and gif.size == (60, 40 + 28)
        shades = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shades.append(gif.convert("L").getpixel((30, 50)))
            assert gif.convert("L").crop((0, 0, 60, 28)).getextrema()[0] < 100  # the layer's name
    assert shades[0] < 5 and shades[4] > 250 and shades[:5] == sorted(shades[:5]) and shades[4:] == sorted(shades[4:])[::-1]


def test_curves_of_a_short_run_have_whole_steps_and_shares_from_0_to_1():
    """One evaluation at step 12 stood at 11.75 to 12.25, between -0.04 and 0.04."""
    loss, share = figures.curves([{"step": 12, "loss": 5.0, "test_exact_match": 0.0}]).axes
    assert all(float(tick).is_integer() for tick in loss.get_xticks()) and share.get_ylim() == (-0.03, 1.03)


def test_dollars_in_captions_and_class_names_are_no_formula(tmp_path):
    """ "$x_{ and $5" is a caption; it ended the drawing of a run that had been trained."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    figures.sheet(images, ["$x_{ and $5"], tmp_path / "a.png", "$a$ $_{")
    figures.confusion(torch.eye(2, dtype=torch.long), ["$x_{ and $5", "b"], tmp_path / "b.png")


def test_letters_that_the_font_lacks_are_drawn_without_a_warning_for_each(tmp_path, recwarn):
    """Captions in Chinese filled the terminal of a run with two lines a letter."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    figures.answer_sheet(images, ["\u65e5\u672c"], ["\u7b54\u3048"], [None], tmp_path / "a.png")
    assert not list(recwarn)
