"""lib/vocabulary.py: room for new tokens changes nothing for the old ones."""

import copy

import pytest
import torch

from lib.vocabulary import resize_token_embeddings
from toys import V, close, make, make_vlm, place, random_ids, words_and_images


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_starts_as_the_mean_and_moves_no_old_logit(tied):
    ids = random_ids(3, 12)
    model = make(tie_word_embeddings=tied)
    config, before = model.config, model(ids)["logits"]
    resize_token_embeddings(model, V + 4)
    after = model(ids)["logits"]
    close(after[..., :V], before)
    close(after[..., V:], before.mean(-1, keepdim=True).expand(-1, -1, 4))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (config.vocab_size, model.config.vocab_size) == (V, V + 4)
    model(torch.full((1, 2), V + 3))
    with pytest.raises(ValueError, match="cut off 5"):
        resize_token_embeddings(model, V - 1)


def test_a_vlm_with_a_grown_vocabulary():
    vlm = make_vlm(pixel_shuffle=2)
    rows, pixels = words_and_images(4)
    ids, mask = place(rows, "left", max(map(len, rows)))
    grown = copy.deepcopy(vlm)
    resize_token_embeddings(grown, V + 3)
    assert grown.config.text_config.vocab_size == V + 3 and vlm.config.text_config.vocab_size == V
    close(grown(ids, pixels, mask)["logits"][..., :V], vlm(ids, pixels, mask)["logits"])
