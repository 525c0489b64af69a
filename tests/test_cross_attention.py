"""extras/cross_attention.py. What holds for both ways to join images and words: tests/core/test_model.py."""

import pytest
import torch

from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib.trace import record
from toys import IMAGE, TEXT, VISION, V, block_pattern, close, grads, make_vlm, random_ids


@pytest.fixture(scope="module")
def cross():
    return make_vlm(cross=True)


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_cross_attention_starts_as_the_text_model_and_its_gates_learn():
    torch.manual_seed(0)
    vlm = CrossAttentionVLM(CrossAttentionConfig(VISION, TEXT, cross_every=2, image_token_id=IMAGE))
    assert vlm.config.text_config.num_image_tokens == 1
    ids = torch.cat([torch.tensor([[IMAGE], [IMAGE]]), random_ids(2, 8)], dim=1)
    out = vlm(ids, PIXELS, labels=ids)
    assert torch.equal(out["logits"], vlm.language_model(ids)["logits"])
    out["loss"].backward()
    gates = {name: grad for name, grad in grads(vlm).items() if name.endswith("gate")}
    assert len(gates) == 4 and all(grad.abs() > 0 for grad in gates.values())


def test_only_tokens_at_or_after_an_image_see_it(cross):
    ids = random_ids(1, 12)
    ids[0, 3] = ids[0, 8] = IMAGE
    both, text = cross(ids, PIXELS)["logits"][0], cross.language_model(ids)["logits"][0]
    first_changed = cross(ids, torch.stack([PIXELS[0] + 1, PIXELS[1]]))["logits"][0]
    second_changed = cross(ids, torch.stack([PIXELS[0], PIXELS[1] + 1]))["logits"][0]
    close(both[:3], text[:3])
    close(second_changed[:8], both[:8])
    for changed, since in ((text, 3), (first_changed, 3), (second_changed, 8)):
        assert ((changed - both)[since:].abs().amax(-1) > 1e-3).all()


def test_packed_samples_see_their_own_images_only(cross):
    ids = random_ids(2, 12)
    ids[0, 0] = ids[0, 6] = ids[1, 7] = IMAGE
    pattern, positions = block_pattern((5, 4, 3))
    pixels = torch.cat([PIXELS, PIXELS[:1] + 1])
    packed = cross(ids, pixels, attention_mask=pattern, position_ids=positions.expand(2, -1))["logits"]
    of_sample = {(0, 0): pixels[:1], (0, 5): pixels[1:2], (1, 5): pixels[2:]}
    for row in (0, 1):
        for span in (slice(0, 5), slice(5, 9), slice(9, 12)):
            close(packed[row, span], cross(ids[row : row + 1, span], of_sample.get((row, span.start)))["logits"][0])


def test_a_placeholder_without_a_row_of_its_own_is_a_zero_vector():
    outside = make_vlm(cross=True, image_token_id=V)
    ids = random_ids(2, 6)
    ids[:, 2] = V
    with record(outside, "language_model.model.layers.0.input", "language_model.model.cross_layers.0.input") as seen:
        assert outside(ids, PIXELS)["logits"].isfinite().all()
    embeds = seen["language_model.model.cross_layers.0.input"]
    assert embeds[:, 2].abs().max() == 0 and embeds[:, 3].abs().max() > 0


def test_a_cache_takes_images_once(cross):
    cache = cross.new_cache(2, 8)
    ids = torch.tensor([[IMAGE, 4], [IMAGE, 5]])
    cross(ids, PIXELS, cache=cache)
    with pytest.raises(ValueError, match="holds images already"):
        cross(ids, PIXELS, cache=cache)
