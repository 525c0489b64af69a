"""Laws of llmvit.py: every backbone reads images, every embedder teaches the encoder, frozen means frozen."""

import functools
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from extras import llmvit
from extras.llmvit import (
    LLMVIT,
    DirectEmbedder,
    EmbedderConfig,
    EncoderConfig,
    KNNEmbedder,
    PatchEncoder,
    ViTEncoder,
    gaussian_kl,
    nearest_words,
)
from extras.llmvit_backbones import LanguageClassifier, NoLanguageModel, get_classification_model
from gpt import GPT, GPTConfig
from lib.checkpoint import from_pretrained
from lib.files import read_json, write_json
from model import Linear_LORA, Llama3ForCausalLM, LLAMA32Config
from toys import shaken

K, V, D = 5, 40, 32
ENCODER = {"img_size": 12, "patch_size": 4, "in_channels": 1, "hidden_dim": 16, "num_encoder_layers": 1, "nhead": 2}
LLAMA = {"vocab_size": V, "hidden_size": D, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 48}
HUGGING_FACE = {
    "Bert": {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "DistilBert": {"dim": D, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "Roberta": {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "GPT2": {"n_embd": D, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
    "Llama": {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}


def ours(kind: str, pooling: str = "last", **changes) -> LanguageClassifier:
    torch.manual_seed(1)
    if kind == "gpt":
        config = {"vocab_size": V, "context_length": 16, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
        lm = GPT(GPTConfig(**{**config, **changes}))
    else:
        lm = Llama3ForCausalLM(LLAMA32Config(**{**LLAMA, **changes}))
    return LanguageClassifier(lm, K, pooling)


def theirs(kind: str, **changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(vocab_size=V, num_labels=K, **{**HUGGING_FACE[kind], **changes})
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


BACKBONES = {f"{kind} {how}": functools.partial(ours, kind, how) for kind in ("gpt", "llama") for how in ("last", "mean")}
BACKBONES |= {kind: functools.partial(theirs, kind) for kind in HUGGING_FACE}


PUBLISHED = {"Bert": "ForMaskedLM", "DistilBert": "ForMaskedLM", "GPT2": "LMHeadModel", "Llama": "ForCausalLM"}


def make(backbone: nn.Module | None = None, embedder: str = "knn", encoder: dict | None = None, **options) -> LLMVIT:
    backbone = ours("llama") if backbone is None else backbone
    torch.manual_seed(0)
    config = embedder if isinstance(embedder, EmbedderConfig) else EmbedderConfig(embedder)
    return LLMVIT(backbone, EncoderConfig(**{**ENCODER, **(encoder or {})}), config, **options)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 1, 12, 12, generator=generator), torch.arange(6) % K


def vectors(M=20, words=V, width=D, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, width, generator=generator), torch.randn(words, width, generator=generator)


# ---- backbones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_reads_images_and_teaches_the_encoder(name, batch):
    images, labels = batch
    model = make(BACKBONES[name](), embedder=EmbedderConfig("knn", temperature=1.0))
    out = model(images, labels)
    assert out["logits"].shape == (6, K)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.norm.parameters())
    model.eval()
    with torch.no_grad():
        whole, one_by_one = model(images)["logits"], torch.cat([model(image[None])["logits"] for image in images])
    torch.testing.assert_close(whole, one_by_one, atol=1e-5, rtol=1e-4)  # the batch is no padding and no neighbour


def published(folder, kind: str):
    """A folder of transformers with three layers; the first two of them as transformers reads them."""
    tf = pytest.importorskip("transformers")
    settings = {key: 3 if "layer" in key else value for key, value in HUGGING_FACE[kind].items()}
    shaken(getattr(tf, kind + PUBLISHED[kind])(getattr(tf, f"{kind}Config")(vocab_size=V, **settings))).save_pretrained(folder)
    return tf.AutoModel.from_pretrained(folder, num_hidden_layers=2).eval()


@pytest.mark.parametrize("kind", PUBLISHED)
@torch.no_grad()
def test_the_first_layers_of_a_published_folder_compute_what_transformers_computes(tmp_path, kind):
    theirs, x = published(tmp_path, kind), torch.randn(2, 9, D)
    ours = get_classification_model(tmp_path, depth=2, num_classes=K).eval()
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    hidden = theirs(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours(x)["logits"], ours.score(hidden.mean(dim=1)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="--lm-layers 12: the language model has 3"):
        get_classification_model(tmp_path, depth=12)


def test_a_folder_of_the_older_spelling_and_one_with_relative_positions(tmp_path):
    """bert-base-uncased says gamma and beta for what is weight and bias elsewhere."""
    tf = pytest.importorskip("transformers")
    theirs = shaken(tf.BertModel(tf.BertConfig(vocab_size=V, **HUGGING_FACE["Bert"])))
    theirs.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {re.sub("|".join(old), lambda m: old[m[0]], k): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    ids = torch.arange(12).view(2, 6)
    ours = from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.hidden_states(ours.embed(ids)), theirs(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="600 tokens exceed the context length of 512"):
        ours.hidden_states(torch.zeros(1, 600, D))
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="position_embedding_type is 'relative_key': only 'absolute'"):
        from_pretrained(tmp_path)


def test_the_demo_of_the_post(tmp_path):
    """DistilBERT with LoRA in 4 bits reads digits: the encoder, the head and the corrections learn."""
    published(tmp_path, "DistilBert")
    model = LLMVIT(
        model=get_classification_model(
            tmp_path, depth=2, num_classes=10, lora_config={"rank": 16, "alpha": 32, "dropout": 0.05}, qlora=True
        ),
        img_processor_config=EncoderConfig(in_channels=1),
        embedder_config=EmbedderConfig("max"),
    )
    out = model(torch.randn(3, 1, 28, 28), torch.tensor([1, 2, 3]))
    out.loss.backward()
    learns = {name.rpartition(".")[2] for name, p in model.model.decoder.named_parameters() if p.grad is not None}
    assert learns == {"lora_a", "lora_b"} and out.logits.shape == (3, 10)
    kinds = {type(m.linear).__name__ for m in model.modules() if isinstance(m, Linear_LORA)}
    assert kinds == {"Linear4bit"}
    assert all(p.grad is not None for p in [*model.encoder.parameters(), *model.model.score.parameters()])


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_returned_in_training_and_evaluation(training, batch):
    """The blueprint returned None in evaluation."""
    images, labels = batch
    model = make().train(training)
    out = model(images, labels)
    torch.testing.assert_close(out["loss"], F.cross_entropy(out["logits"], labels))
    soft = F.one_hot(labels, K).float()
    torch.testing.assert_close(model(images, soft)["loss"], out["loss"])
    assert "loss" not in model(images)
    assert make(criterion=lambda logits, labels: logits.sum() * 0 + 7)(images, labels)["loss"] == 7


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_pooling_reads_what_it_says(kind, batch):
    """The last position has seen all others, the first nothing but itself."""
    x = torch.randn(2, 9, D)
    changed = x.clone()
    changed[:, 0] += torch.randn(D)
    for pooling in ("last", "mean"):
        model = ours(kind, pooling).eval()
        read = []
        model.score.register_forward_pre_hook(lambda module, given, read=read: read.append(given[0]))
        assert (model(x)["logits"] - model(changed)["logits"]).abs().max() > 1e-5
        assert read[0].shape == (2, D)
    hidden = model.decoder(inputs_embeds=x) if kind == "llama" else None
    if hidden is not None:
        torch.testing.assert_close(read[0], hidden.mean(dim=1))


def test_our_gpt_computes_what_it_computes_elsewhere():
    lm = GPT(GPTConfig(vocab_size=V, context_length=16, hidden_size=D, num_hidden_layers=2, num_attention_heads=2)).eval()
    x = torch.randn(2, 9, D)
    read = lm.hidden_states(x)[:, -1]
    model = LanguageClassifier(lm, K).eval()
    torch.testing.assert_close(model(x)["logits"], model.score(read))


def test_a_pad_token_is_given_in_a_config_of_its_own(batch):
    """Without one, transformers refuses a batch; the caller's config stays as it is."""
    backbone = theirs("GPT2")
    config = backbone.config
    assert config.pad_token_id is None
    make(backbone)(batch[0])
    assert config.pad_token_id is None


def test_without_a_language_model_the_mean_is_classified(batch):
    images, labels = batch
    model = make(NoLanguageModel(D, K), "direct", {"embed_dim": D})
    torch.testing.assert_close(model(images)["logits"], model.model.score(model.encoder(images).mean(dim=1)))
    with pytest.raises(ValueError, match="no words"):
        model.words(images)
    with pytest.raises(ValueError, match="knn embedder needs word embeddings"):
        make(NoLanguageModel(D, K), "knn", {"embed_dim": D})


# ---- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, cls", [("vit", ViTEncoder), ("patch_embed", PatchEncoder)])
def test_encoders(kind, cls, batch):
    model = make(encoder={"type": kind})
    assert type(model.encoder) is cls and model.encoder(batch[0]).shape == (6, 9, D)
    changed = batch[0].clone()
    changed[:, :, -4:, -4:] += 1  # the last patch
    moved = (model.encoder(batch[0]) - model.encoder(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == ([True] * 9 if kind == "vit" else [False] * 8 + [True])


@pytest.mark.parametrize("kind", ["vit", "patch_embed"])
def test_sizes_that_patches_do_not_divide_are_padded_and_said(kind):
    size = {"type": kind, "img_size": (13, 10), "patch_size": (4, 3)}
    with pytest.warns(UserWarning, match="13x10 image: 3 rows below and 2 columns"):
        model = make(encoder=size)
    assert (model.config.grid, model.config.padding) == ((4, 4), (3, 2))
    images = torch.randn(2, 1, 13, 10)
    whole = make(encoder={**size, "img_size": (16, 12)})
    assert whole.config.padding == (0, 0)
    torch.testing.assert_close(model(images)["logits"], whole(F.pad(images, (0, 2, 0, 3)))["logits"])
    assert model.words(images)["ids"].shape == (2, 4, 4, 1)


def test_vectors_start_around_the_words_mean_and_as_spread_as_they_are():
    backbone, scale = ours("llama"), torch.linspace(0.1, 9, D)
    words = backbone.get_input_embeddings().weight.data
    words.copy_(7 + torch.randn(V, D) * scale)
    x = make(backbone).encoder(torch.randn(500, 1, 12, 12)).detach().flatten(0, 1)
    assert (x.mean() - 7).abs() < 1
    assert torch.corrcoef(torch.stack([x.std(0), words.std(0)]))[0, 1] > 0.9
    assert LLMVIT.embedding_loss(x, words) < 0.5 < 5 < LLMVIT.embedding_loss(torch.randn_like(x), words)


# ---- embedders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("metric", llmvit.METRICS)
def test_the_search_is_exact_in_chunks_of_any_size(metric, k, chunk, monkeypatch):
    x, words = vectors()
    monkeypatch.setattr(llmvit, "SEARCH_FLOATS", chunk * len(x))
    far = torch.cdist(x.double(), words.double())
    if metric != "cdist":
        far = -F.cosine_similarity(x.double()[:, None], words.double()[None], dim=-1)
    assert torch.equal(nearest_words(x, words, k, metric), far.argsort(dim=1)[:, :k])


def test_a_vocabulary_of_128k_fits():
    """All distances of 3,136 vectors to 128,256 words are 1.6 GB; the search keeps 16 MiB of them."""
    x, words = vectors(M=3136, words=128_256, width=4)
    peak = []
    original = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        peak.append(self.numel())
        return original(self, *args, **kwargs)

    torch.Tensor.topk = watched
    try:
        ids = nearest_words(x, words, k=4)
    finally:
        torch.Tensor.topk = original
    assert max(peak) <= llmvit.SEARCH_FLOATS and len(peak) > 10
    some = torch.arange(0, 3136, 300)
    assert torch.equal(ids[some], torch.cdist(x[some].double(), words.double()).argsort(dim=1)[:, :4])


def test_knn_mixes_by_distance():
    x, words = vectors()
    out = KNNEmbedder(EmbedderConfig("knn", k=3, temperature=0.5))(x, words)
    distance, ids = torch.cdist(x, words).sort(dim=1)
    share = (-distance[:, :3] / 0.5).softmax(dim=1)
    torch.testing.assert_close(out, (share[..., None] * words[ids[:, :3]]).sum(dim=1), atol=1e-5, rtol=1e-4)
    cold = KNNEmbedder(EmbedderConfig("knn", k=3, temperature=1e-4))(x, words)
    torch.testing.assert_close(cold, words[ids[:, 0]], atol=1e-4, rtol=1e-4)


def test_knns_gradient_is_that_of_its_formula():
    x, words = (t.double() for t in vectors(M=3, words=12, width=5))
    embedder = KNNEmbedder(EmbedderConfig("knn", k=4, temperature=0.7))
    ids = nearest_words(x, words, 4)

    def formula(x, words):
        chosen = words[ids]
        share = (-(x[:, None] - chosen).norm(dim=-1) / 0.7).softmax(dim=-1)
        return (share[..., None] * chosen).sum(dim=1)

    gradients = []
    for f in (embedder, formula):
        inputs = [t.clone().requires_grad_() for t in (x, words)]
        gradients.append(torch.autograd.grad((f(*inputs) ** 3).sum(), inputs))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)  # distances are fp32
    assert gradients[0][0].abs().min() > 0


@pytest.mark.parametrize("kind, metric", [("max", "cosine_similarity"), ("max", "cdist"), ("knn", "cdist")])
def test_one_word_is_that_word_and_passes_the_gradient_straight(kind, metric):
    x, words = vectors()
    x.requires_grad_()
    out = llmvit.EMBEDDERS[kind](EmbedderConfig(kind, k=1, similarity_metric=metric))(x, words)
    near = F.cosine_similarity(x[:, None], words[None], dim=-1) if "cos" in metric else -torch.cdist(x, words)
    torch.testing.assert_close(out, words[near.argmax(dim=1)])
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)


def test_direct_changes_nothing():
    x, words = vectors()
    assert DirectEmbedder(EmbedderConfig("direct"))(x, words) is x


@pytest.mark.parametrize("embedder", llmvit.EMBEDDERS)
def test_training_lowers_the_loss_through_each_embedder_with_the_backbone_frozen(embedder, batch):
    images, labels = batch
    model = make(ours("llama", initializer_range=0.5), EmbedderConfig(embedder, temperature=1.0), always_freeze_backbone=True)
    nn.init.normal_(model.model.score.weight)
    optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=1e-2)
    first = model(images, labels)["loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(images, labels)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


# ---- the loss between distributions --------------------------------------------------------------------------------------


def test_gaussian_kl_is_torchs():
    torch.manual_seed(0)
    (m1, m2), (v1, v2) = torch.randn(2, D), torch.rand(2, D) + 0.1
    a, b = (torch.distributions.Normal(m, v.sqrt()) for m, v in ((m1, v1), (m2, v2)))
    torch.testing.assert_close(gaussian_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(a, b).mean())
    assert gaussian_kl(m1, v1, m1, v1).abs() < 1e-6


def test_the_embedding_loss_is_added_with_its_weight_and_pulls_vectors_to_the_words(batch):
    images, labels = batch
    plain, weighted = make(embedder="direct"), make(embedder="direct", embedding_loss_weight=0.5)
    for model in (plain, weighted):
        nn.init.constant_(model.encoder.norm.bias, 3.0)
    out = weighted(images, labels)
    torch.testing.assert_close(out["loss"], plain(images, labels)["loss"] + 0.5 * out["embedding_loss"])
    x, words = weighted.encoder(images).flatten(0, 1), weighted.model.get_input_embeddings().weight
    closed = gaussian_kl(x.mean(0), x.var(0, correction=0), words.mean(0), words.var(0, correction=0))
    torch.testing.assert_close(out["embedding_loss"], closed)
    gradient = torch.autograd.grad(out["embedding_loss"], [weighted.encoder.norm.bias, words], allow_unused=True)
    assert (gradient[0] > 0).all() and gradient[1] is None  # the vectors move to the words, not the words to them
    assert "embedding_loss" in weighted.eval()(images, labels)


# ---- freezing --------------------------------------------------------------------------------------------------------


def train_steps(model, batch, steps):
    """One AdamW over all parameters, with a weight decay that would show. Gives each step's moved parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(*batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def is_backbone(name):
    return name.startswith("model.") and "score" not in name and "classifier" not in name


@pytest.mark.parametrize("name", ["llama last", "gpt mean", "DistilBert", "Roberta", "GPT2"])
def test_freezing_really_freezes_and_ends_after_its_steps(name, batch):
    """The blueprint's freezing named an attribute that did not exist. All but the head stays, bit for bit, under weight
    decay, too; from then on it moves."""
    model = make(BACKBONES[name](), "max", frozen_backbone_steps=3)
    for step, moved in enumerate(train_steps(model, batch, 5)):
        assert any("score" in n or "classifier" in n for n in moved) and any(n.startswith("encoder") for n in moved)
        assert any(is_backbone(n) for n in moved) == (step >= 3), step
    assert not model.frozen and all(p.requires_grad for p in model.parameters())


def test_always_frozen_never_moves(batch):
    model = make(embedder="max", always_freeze_backbone=True)
    assert not any(is_backbone(n) for moved in train_steps(model, batch, 4) for n in moved)


def test_evaluation_and_what_was_frozen_before_do_not_count(batch):
    backbone = ours("llama")
    backbone.decoder.layers[0].requires_grad_(False)
    model = make(backbone, "max", frozen_backbone_steps=2).eval()
    for _ in range(5):
        model(*batch)
    assert model.frozen and model.frozen_steps_done == 0
    model.train()
    moved = list(train_steps(model, batch, 4))[-1]
    assert any(is_backbone(n) for n in moved) and not any("layers.0" in n for n in moved)


def test_a_frozen_backbone_drops_nothing_out_and_an_unfrozen_one_does(batch):
    model = make(ours("llama", dropout=0.5), "max", frozen_backbone_steps=2)
    model.train()
    assert torch.equal(model(batch[0])["logits"], model(batch[0])["logits"])
    assert not model.frozen and not torch.equal(model(batch[0])["logits"], model(batch[0])["logits"])


@pytest.mark.parametrize("done", [1, 3])
def test_counting_survives_the_state_dict(done, batch):
    model, other = make(embedder="max", frozen_backbone_steps=3), make(embedder="max", frozen_backbone_steps=3)
    list(train_steps(model, batch, done))
    other.load_state_dict(model.state_dict())
    assert other.frozen == model.frozen == (done < 3) and other.frozen_steps_done == done
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_dict_holds_each_word_once():
    for kind in ("gpt", "llama"):
        state = make(ours(kind)).state_dict()
        assert sum(tensor.shape == (V, D) for tensor in state.values()) == 1


# ---- words -----------------------------------------------------------------------------------------------------------


class Letters:
    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)


@pytest.mark.parametrize("embedder", llmvit.EMBEDDERS)
def test_words_are_the_nearest_ones_of_each_patch(embedder, batch):
    model = make(embedder=embedder, encoder={"img_size": (12, 8)}).eval()
    images = batch[0][:, :, :, :8]
    found = model.words(images, Letters(), k=3)
    x, words = model.encoder(images), model.model.get_input_embeddings().weight
    if embedder == "max":
        far = -F.cosine_similarity(x[:, :, None], words[None, None], dim=-1)
    else:
        far = torch.cdist(x, words)
    assert torch.equal(found["ids"], far.argsort(dim=-1)[..., :3].view(6, 3, 2, 3))
    assert found["words"][4][2][1][0] == Letters().decode([int(found["ids"][4, 2, 1, 0])])
    assert "words" not in model.words(images)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: EncoderConfig(type="cnn"), "'cnn': it must be vit or patch_embed"),
        (lambda: EncoderConfig(patch_size=0), "patch_size is 0"),
        (lambda: EmbedderConfig("nearest"), "'nearest': it must be knn or max or direct"),
        (lambda: EmbedderConfig("max", similarity_metric="dot"), "similarity_metric is 'dot'"),
        (lambda: EmbedderConfig(k=0), "k is 0"),
        (lambda: EmbedderConfig(temperature=0.0), "temperature 0.0"),
        (lambda: make(encoder={"embed_dim": 16}), "embed_dim is 16, the language model's width 32"),
        (lambda: make(ours("gpt"), encoder={"img_size": 20}), "5x5 patches is 25 words, the language model reads at most 16"),
        (lambda: make(nn.Linear(2, 2)), "no get_input_embeddings"),
        (lambda: make(embedder=EmbedderConfig(k=99))(torch.zeros(1, 1, 12, 12)), "k is 99, but there are 40 words"),
        (lambda: make()(torch.zeros(1, 3, 12, 12)), r"\[1, 3, 12, 12\]: it must be \[batch, 1, 12, 12\]"),
        (lambda: LanguageClassifier(nn.Linear(2, 2), K), "must be a GPT, Llama3ForCausalLM or Bert"),
        (lambda: ours("gpt", "first"), "pooling is 'first'"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_head_that_cannot_be_found_is_refused_only_where_it_matters(batch):
    backbone = ours("llama")
    backbone.answer, backbone.score = backbone.score, nn.Identity()
    backbone.forward = lambda inputs_embeds: {"logits": backbone.answer(backbone.decoder(inputs_embeds=inputs_embeds)[:, -1])}
    make(backbone)(*batch)
    with pytest.raises(ValueError, match="no head called score or classifier"):
        make(backbone, frozen_backbone_steps=1)


def test_robertas_first_positions_are_taken():
    """Its positions start after the padding id."""
    options = {"max_position_embeddings": 10, "pad_token_id": 1}
    with pytest.raises(ValueError, match="reads at most 8"):
        make(theirs("Roberta", **options))
    make(theirs("Roberta", **{**options, "max_position_embeddings": 11}))(torch.zeros(2, 1, 12, 12))
