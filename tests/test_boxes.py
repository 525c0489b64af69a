"""Laws of lib/boxes.py."""

import random

import pytest

from lib.boxes import box_to_loc, loc_to_box


def test_boxes_come_back_within_half_a_mark():
    assert box_to_loc((0, 0, 640, 480), 640, 480) == "<loc0000><loc0000><loc1023><loc1023>"
    assert box_to_loc((320, 0, 640, 120), 640, 480) == "<loc0000><loc0512><loc0256><loc1023>", "y before x"
    dice = random.Random(0)
    for _ in range(2000):
        width, height = dice.choice([1, 17, 640, 20_000.5]), dice.choice([1, 480, 1023, 1024])
        x = sorted(dice.choice([0, width, dice.random() * width]) for _ in range(2))
        y = sorted(dice.choice([0, height, dice.random() * height]) for _ in range(2))
        box = x[0], y[0], x[1], y[1]
        text = box_to_loc(box, width, height)
        back = loc_to_box(f"a cat {text}<seg001>", width, height)
        assert text == box_to_loc(back, width, height), "marks stay where they are"
        for value, found, side in zip(box, back, (width, height) * 2, strict=True):
            assert abs(value - found) <= side / 2046 * (1 + 1e-9)
            assert found in (0, side) or value not in (0, side), "edges are exact"


@pytest.mark.parametrize("box", [(-1, 0, 2, 2), (3, 0, 2, 2), (0, 0, 11, 2), (0, 0, float("nan"), 2)])
def test_boxes_that_are_none(box):
    with pytest.raises(ValueError, match="not .x_min"):
        box_to_loc(box, 10, 10)


@pytest.mark.parametrize("text", ["", "<loc0001>" * 3, "<loc0001><loc0001> <loc0001><loc0001>", "<loc1024>" * 4])
def test_location_tokens_that_are_no_box(text):
    with pytest.raises(ValueError, match="no four location tokens"):
        loc_to_box(text, 10, 10)
