"""The cost model counts what torch counts, and docs/scaling.md says what it says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import scaling
from bench.scaling import ETHERNET, H100, Work, exchanged, memory_needed, shapes_of, step_seconds
from lib.loss import chunked_cross_entropy
from lib.muon import orthogonal
from model import LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from siglip import SiglipVisionConfig

DOC = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def small() -> Work:
    vision = SiglipVisionConfig(image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                num_attention_heads=4, vision_use_head=False)  # fmt: skip
    text = LLAMA32Config(vocab_size=500, hidden_size=64, n_heads=4, n_kv_groups=2, n_layers=3, hidden_dim=160)
    config = MLLAMAConfig(vision, text, projector_type="linear")
    return Work("small", config, shapes_of(config), tokens=40, answers=12, batch=4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_samples_arithmetic_is_what_torch_counts(small, frozen):
    work, B = replace(small, freeze_vision=frozen), 3
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(work.config)
    model.vision_tower.requires_grad_(not frozen)
    model.language_model.token_loss = chunked_cross_entropy  # as it is trained at this size
    N = work.config.text_config.num_image_tokens
    ids = torch.randint(0, 400, (B, work.tokens))
    ids[:, :N] = 499
    model.config.image_token_id = 499
    labels = ids.clone()
    labels[:, : -work.answers] = -100
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch does not count a CPU's fused one
        model(ids, torch.randn(B, 3, 32, 32), labels=labels)["loss"].backward()
    # Less than said, by the gradient of what enters the first layer, which nobody needs.
    assert counter.get_total_flops() == pytest.approx(B * sum(work.sample_flops().values()), rel=0.02)


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (48, 16), (16, 80)])
def test_muons_arithmetic_is_what_torch_counts(small, shape):
    work = replace(small, shapes={"x.weight": torch.Size(shape)})
    with FlopCounterMode(display=False) as counter:
        orthogonal(torch.randn(1, *shape))
    assert counter.get_total_flops() == pytest.approx(work.muon_flops(), rel=0.11)


def test_what_goes_over_the_wire(small):
    every, trained = small.parameters()
    assert every == trained == sum(p.numel() for p in MllamaForConditionalGeneration(small.config).parameters())
    assert exchanged(small, 1, False) == exchanged(small, 1, True) == 0
    assert exchanged(small, 2, False) == 4 * trained
    plain = replace(small, muon=False)
    assert exchanged(plain, 1024, True) / exchanged(plain, 1024, False) == pytest.approx(1.5)  # ZeRO's well-known half as much


def test_more_gpus_and_slower_wires_are_never_more_efficient(small):
    for fsdp in (False, True):
        times = [step_seconds(small, H100, n, fsdp)["all"] for n in (1, 8, 16, 256, 1024)]
        assert times == sorted(times) or fsdp  # FSDP shares the optimiser's memory traffic
        assert step_seconds(small, ETHERNET, 16, fsdp)["all"] >= step_seconds(small, H100, 16, fsdp)["all"]
    assert memory_needed(small, 8, True) < memory_needed(small, 8, False)
    assert all(math.isfinite(value) and value >= 0 for value in step_seconds(small, H100, 64, True).values())


def test_the_page_shows_what_the_script_prints(capsys):
    scaling.main([])
    page = DOC.read_text(encoding="utf-8")
    for line in capsys.readouterr().out.splitlines():
        assert line in page, line
