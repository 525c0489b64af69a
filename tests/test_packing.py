"""Laws of data/packing.py: what shares a row does not attend to each other: every answer's logits are those it has alone."""

import pytest
import torch

from data import packing
from data.packing import AttentionBlocks, Sample, encode_sample, first_fit, ids_and_labels, pack
from data.scene_batches import about_image
from data.scenes import corpus
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib.tokenizer import BPETokenizer
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import IDEFICS3_AROUND, MllamaImageProcessor

TURNS = [("How many digits are there?", "3"), ("What colour is the 7?", "red"), ("Describe the picture.", "a red 7 at the top")]


@pytest.fixture(scope="module")
def processor():
    tokenizer = BPETokenizer.train(corpus(), 420, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "chatml"
    return MllamaImageProcessor(tokenizer, 4, 32, add_location_tokens=False, around_image=IDEFICS3_AROUND)


def make(processor, fusion):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 3}
    text |= {"hidden_dim": 64, "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.2}
    torch.manual_seed(0)
    join = {"image_token_id": processor.image_token_id}
    if fusion == "early":
        return MllamaForConditionalGeneration(MLLAMAConfig(vision, text, **join)).eval()
    model = CrossAttentionVLM(CrossAttentionConfig(vision, text, cross_every=2, **join)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # closed gates would hide what leaks through them
            torch.nn.init.constant_(parameter, 1.0)
    return model


def asked(question, answer):
    return [*about_image(question), {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("fusion", ["early", "cross"])
@pytest.mark.parametrize("length", [0, 300])
@torch.no_grad()
def test_packed_logits_are_those_of_each_question_alone(processor, fusion, length):
    """With length 300 three samples share a row; in it stand a sample of many turns, one of one, and one without an image."""
    if fusion == "cross":
        processor = MllamaImageProcessor(processor.tokenizer, 1, 32, add_location_tokens=False)
    model, pixels = make(processor, fusion), torch.randn(2, 3, 32, 32)
    text_only = [{"role": "user", "content": "Is there a 5?"}, {"role": "assistant", "content": "yes"}]
    conversations = [[asked(*turn) for turn in TURNS], [text_only], [asked("What is left of the red 7?", "a blue 2")]]
    seen = [[0], [], [1]]
    samples = [encode_sample(processor, turns, len(images)) for turns, images in zip(conversations, seen, strict=True)]
    packed = pack(samples, length)
    order = packed.pop("order").tolist()
    assert len(packed["input_ids"]) == (1 if length else 2)  # the two short ones share a row anyway
    labels, (B, T) = packed.pop("labels"), packed["input_ids"].shape
    logits = model(pixel_values=pixels[[i for k in order for i in seen[k]]], **packed)["logits"]
    found = 0
    for k, turns in enumerate(conversations):
        for conversation in turns:
            ids, alone_labels = ids_and_labels(processor, conversation, len(seen[k]))
            alone = model(torch.tensor([ids]), pixel_values=pixels[seen[k]] if seen[k] else None)["logits"][0]
            answers = [t for t, label in enumerate(alone_labels) if label != -100]
            rows = [(b, t) for b in range(B) for t in range(T - len(answers) + 1)
                    if labels[b, t : t + len(answers)].tolist() == [alone_labels[a] for a in answers]]  # fmt: skip
            (b, t), n = rows[0], len(answers)
            torch.testing.assert_close(logits[b, t - 1 : t + n - 1], alone[answers[0] - 1 : answers[-1]], atol=1e-5, rtol=1e-5)
            found += 1
    assert found == 5


def test_the_loss_of_packed_samples_is_the_mean_over_all_their_answer_tokens(processor):
    model, pixels = make(processor, "early"), torch.randn(1, 3, 32, 32)
    packed = pack([encode_sample(processor, [asked(*turn) for turn in TURNS], 1)])
    packed.pop("order")
    total = count = 0
    for turn in TURNS:
        ids, labels = ids_and_labels(processor, asked(*turn), 1)
        tokens = sum(label != -100 for label in labels)
        total += model(torch.tensor([ids]), pixels, labels=torch.tensor([labels]))["loss"] * tokens
        count += tokens
    torch.testing.assert_close(model(pixel_values=pixels, **packed)["loss"], total / count, atol=1e-5, rtol=1e-5)


def test_a_trunk_is_what_all_turns_begin_with(processor):
    sample = encode_sample(processor, [asked(*turn) for turn in TURNS], 1)
    rows = [ids_and_labels(processor, asked(*turn), 1) for turn in TURNS]
    assert [sample.prefix[0] + ids for ids, _ in sample.continuations] == [ids for ids, _ in rows]
    assert [sample.prefix[1] + labels for _, labels in sample.continuations] == [labels for _, labels in rows]
    assert processor.image_token_id in sample.prefix[0] and all(
        processor.image_token_id not in ids for ids, _ in sample.continuations
    )
    assert set(sample.prefix[1]) == {-100} and all(ids for ids, _ in sample.continuations)


def test_equal_questions_keep_a_token_each(processor):
    """Two equal turns would be all trunk, and the second would have no logits of its own."""
    sample = encode_sample(processor, [asked(*TURNS[0]), asked(*TURNS[0])], 1)
    assert sample.continuations[0] == sample.continuations[1] and len(sample.continuations[0][0]) > 1


def test_a_conversation_without_an_answer_is_refused(processor):
    with pytest.raises(ValueError, match="no answer"):
        encode_sample(processor, [about_image("How many?")], 1)


@pytest.mark.parametrize("lengths, room, rows", [([5, 4, 3, 2, 1], 8, 2), ([9, 1], 9, 2), ([4, 4, 4], 4, 3), ([1] * 10, 10, 1)])
def test_first_fit_loses_nothing_and_overfills_no_row(lengths, room, rows):
    placed = first_fit(lengths, room)
    assert sorted(i for row in placed for i in row) == list(range(len(lengths))) and len(placed) == rows
    assert all(sum(lengths[i] for i in row) <= room for row in placed)


def test_rows_are_as_short_as_their_number_allows():
    """Sixteen captions of COCO photos made a row of 964 tokens and one of 168, filled up to 964 as well."""
    packed = pack([Sample(([5] * 70, [-100] * 69 + [5]), []) for _ in range(16)], length=1024)
    assert packed["input_ids"].shape == (2, 560) and sorted(packed["order"].tolist()) == list(range(16))
    longest_first = pack([Sample(([5] * n, [5] * n), []) for n in (3, 3, 2, 2, 2)], length=6)  # even_rows alone makes 7
    assert longest_first["input_ids"].shape == (2, 6)


def test_padding_has_no_label_and_attends_to_no_sample():
    samples = [Sample(([5, 6, 7], [-100, 6, 7]), []), Sample(([5], [-100]), [])]
    packed = pack(samples, pad_token_id=9)
    assert packed["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]] and packed["labels"][1].tolist() == [-100] * 3
    assert packed["attention_mask"][1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_the_depth_of_a_sample_is_its_longest_conversation(processor):
    """Positions restart with every branch: a context of 512 tokens has room for an image with forty questions."""
    rows = [ids_and_labels(processor, asked(*turn), 1)[0] for turn in TURNS]
    sample = encode_sample(processor, [asked(*turn) for turn in TURNS], 1)
    assert sample.depth == max(map(len, rows)) < len(sample)
    alone = encode_sample(processor, [asked(*TURNS[0])], 1)
    assert alone.depth == len(alone) == len(rows[0])


def test_blocks_say_what_the_mask_says(processor, monkeypatch):
    """Samples of all shapes, three to a row, without images: hidden states and gradients are those of the whole mask."""
    random = torch.Generator().manual_seed(0)

    def some(most):
        ids = torch.randint(5, 300, (int(torch.randint(1, most, (), generator=random)),), generator=random).tolist()
        return ids, [-100, *ids[1:]]

    samples = [Sample(some(12), [some(9) for _ in range(n)]) for n in (12, 0, 3, 20, 1, 7)]
    packed = pack(samples, 300)
    blocks, model = packed["attention_mask"], make(processor, "early").language_model.double()
    embeds = model.embed(packed["input_ids"]).detach().requires_grad_()
    B, T = packed["input_ids"].shape
    assert blocks.mask.numel() < 0.5 * B * T * T and int(blocks.queries.max()) < B * T

    def run(mask):
        hidden = model.hidden_states(embeds, mask, packed["position_ids"])
        real = hidden[packed["labels"] != -100]
        return real, torch.autograd.grad(real.square().sum(), embeds)[0]

    monkeypatch.setattr(packing, "attention_blocks", lambda *rows: None)
    mask = pack(samples, 300)["attention_mask"]
    real = packed["input_ids"] != 0
    assert torch.equal(blocks.pattern(T)[:, 0][real], mask[:, 0][real])
    for found, known in zip(run(blocks), run(mask), strict=True):
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-5)


def test_one_conversation_a_row_needs_no_blocks(processor):
    samples = [Sample(([5] * n, [-100] + [5] * (n - 1)), []) for n in (30, 28, 25)]
    assert not isinstance(pack(samples)["attention_mask"], AttentionBlocks)


def test_no_label_stands_where_no_state_predicts_it():
    """Of a token that does not attend to the one before it: the first of a sample, and of all continuations but the first."""
    sample = Sample(([5, 6], [5, 6]), [([7, 8], [7, 8]), ([7, 9], [7, 9])])
    assert pack([sample])["labels"].tolist() == [[-100, 6, 7, 8, -100, 9]]
    bare = Sample(([], []), [([7, 8], [7, 8]), ([9], [9])])
    assert pack([sample, bare], length=9)["labels"][0, 6:].tolist() == [-100, 8, -100]
