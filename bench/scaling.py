"""What training costs, and what it will cost on more GPUs: a model of it in a page, and a measurement that can prove it wrong.

    python -m bench.scaling              the figures and tables of docs/scaling.md: from 8 to 1,024 GPUs
    python -m bench.scaling measure      efficiency of two processes on this machine, one thread each (DDP and FSDP2)

A step takes as long as its arithmetic at a part of the GPU's peak (or its memory traffic, where that takes longer), and after
it what every process repeats for itself (Muon's Newton-Schulz steps), what of the exchange of weights and gradients does not
fit behind the arithmetic, and what the GPU waits for its batch. Bytes over the wire: Thakur et al. 2005 (rings), Rajbhandari
et al. 2020 (ZeRO); activations: Korthikanti et al. 2022. Axes: T tokens of a sample, N patches, D width, V vocabulary, n GPUs.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lib.cli import Parser, positive_float, positive_int, run_cli
from model import LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from siglip import SiglipVisionConfig

# ---- what a step is made of --------------------------------------------------------------------------------------------


def shapes_of(config: MLLAMAConfig) -> dict[str, torch.Size]:
    """Of all parameters, without their memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in MllamaForConditionalGeneration(config).named_parameters()}


@dataclass(frozen=True)
class Work:
    """A model in training. tokens: of a sample, image included; answers: those with a label; batch: samples a GPU a step."""

    name: str
    config: MLLAMAConfig
    shapes: dict[str, torch.Size]
    tokens: int
    answers: int
    batch: int
    freeze_vision: bool = False
    muon: bool = True

    def parameters(self) -> tuple[int, int]:
        """(all, those that train)."""
        every = sum(shape.numel() for shape in self.shapes.values())
        frozen = sum(shape.numel() for name, shape in self.shapes.items() if name.startswith("vision_tower"))
        return every, every - frozen * self.freeze_vision

    def matrices(self, part: str) -> int:
        """Weights of a part that every one of its tokens is multiplied with."""
        looked_up = ("embed_tokens", "position_embedding")
        chosen = [name for name in self.shapes if name.startswith(part) and not any(word in name for word in looked_up)]
        return sum(self.shapes[name].numel() for name in chosen if len(self.shapes[name]) > 1)

    def sample_flops(self) -> dict[str, float]:
        """Of one sample, forward and backward: 2 a weight and token forward, twice that backward; attention 4 T^2 D a layer (a
        mask is looked at, not skipped); the head only at answers, and once more as the loss is recomputed."""
        vision, text = self.config.vision_config, self.config.text_config
        N, T, wide = math.prod(vision.grid), self.tokens, text.n_heads * text.head_dim
        tower = 2 * N * self.matrices("vision_tower") + 4 * N * N * vision.hidden_size * vision.num_hidden_layers
        decoder = 2 * T * self.matrices("language_model.model") + 4 * T * T * wide * text.n_layers
        return {
            "vision tower": tower * (1 if self.freeze_vision else 3),
            "projector": 3 * 2 * text.num_image_tokens * self.matrices("multi_modal_projector"),
            "decoder": 3 * decoder,
            "head": 4 * 2 * self.answers * text.vocab_size * text.hidden_size,
        }

    def muon_flops(self) -> float:
        """Five Newton-Schulz steps of each matrix [a, b], a <= b: 4 a^2 b + 2 a^3 a step; of a wide one (see
        lib.muon.orthogonal) the steps work on its square."""
        total = 0.0
        for name, shape in self.shapes.items():
            # As lib.optim.parameter_groups chooses Muon's.
            trains = self.muon and not (self.freeze_vision and name.startswith("vision_tower"))
            if trains and len(shape) == 2 and "embed" not in name and "head" not in name:
                a, b = sorted(shape)
                total += 5 * (4 * a * a * b + 2 * a**3) if b < 2 * a else 4 * a * a * b + 5 * 8 * a**3
        return total

    def memory_bytes(self) -> tuple[float, float]:
        """(once a step, for each sample), through a GPU's memory: weights as fp32 and in half precision, gradients, AdamW's 28
        bytes a parameter; 34 bytes a token, layer and unit of width, written and read again."""
        vision, text = self.config.vision_config, self.config.text_config
        every, trained = self.parameters()
        kept = 0 if self.freeze_vision else math.prod(vision.grid) * vision.hidden_size * vision.num_hidden_layers
        return 10 * every + (8 + 28) * trained, 2 * 34 * (kept + self.tokens * text.hidden_size * text.n_layers)


LLAVA_7B = MLLAMAConfig(
    SiglipVisionConfig(image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                       num_attention_heads=16, vision_use_head=False),
    LLAMA32Config(vocab_size=32064, hidden_size=4096, n_heads=32, n_kv_groups=32, n_layers=32, hidden_dim=11008,
                  tie_word_embeddings=False), vision_feature_layer=-2,
)  # fmt: skip
SMOL = MLLAMAConfig(
    SiglipVisionConfig(**{**SiglipVisionConfig.PRESETS["base-p16-224"], "vision_use_head": False}),
    LLAMA32Config(**LLAMA32Config.PRESETS["smollm2-135m"]), projector_type="linear",
)  # fmt: skip


def works() -> list[Work]:
    """`--size smol`, all of it trained, most of it by Muon; LLaVA-1.5 7B with its tower frozen, by AdamW."""
    return [
        Work("222M", SMOL, shapes_of(SMOL), tokens=260, answers=60, batch=32),
        Work("7B", LLAVA_7B, shapes_of(LLAVA_7B), tokens=700, answers=100, batch=16, freeze_vision=True, muon=False),
    ]


# ---- how long it takes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Figures of data sheets, but for `busy`, which is assumed, and the last two, which were measured on one core of another
    machine (docs/scaling.md). Rates are per GPU and direction."""

    name: str
    peak: float  # FLOP/s, half precision
    peak_fp32: float  # FLOP/s of fp32 matrices on tensor cores (TF32), which Muon uses
    memory: float  # bytes/s
    room: float  # bytes
    inside: float  # bytes/s to GPUs of the same machine
    outside: float  # bytes/s to other machines
    decode: float  # images/s by one GPU's share of the cores, while it computes
    pack: float  # samples/s that a process tokenises and packs, while its GPU waits
    per_machine: int = 8
    busy: float = 0.4  # of a peak that is reached
    latency: float = 20e-6  # seconds for a message between machines


H100 = Cluster("8 x H100 SXM a machine, 400 Gb/s InfiniBand a GPU", 989e12, 494e12, 3.35e12, 80e9, 450e9, 50e9, 14 * 187, 364)
ETHERNET = replace(H100, name="the same, 100 Gb/s Ethernet a machine", outside=12.5e9 / 8)


def exchanged(work: Work, n: int, fsdp: bool) -> float:
    """Bytes that each GPU sends in a step, and receives as many. DDP: gradients, around a ring twice. FSDP: weights are
    gathered for the forward and again for the backward pass, gradients scattered, all in fp32; for Muon its directions too."""
    every, trained = work.parameters()
    around = (n - 1) / n
    if not fsdp:
        return 2 * around * 4 * trained
    return around * 4 * (2 * every + trained + trained * work.muon)


def step_seconds(work: Work, cluster: Cluster, n: int, fsdp: bool) -> dict[str, float]:
    """The parts of a step that come one after the other; "all" is their sum."""
    fixed, each = work.memory_bytes()
    products = work.batch * sum(work.sample_flops().values()) / (cluster.peak * cluster.busy)
    traffic = (fixed / (n if fsdp else 1) + work.batch * each) / cluster.memory
    speed = cluster.inside if n <= cluster.per_machine else cluster.outside
    rounds = (3 if fsdp else 1) * 2 * math.ceil(math.log2(n)) if n > 1 else 0
    wire = exchanged(work, n, fsdp) / speed + rounds * cluster.latency
    parts = {"arithmetic": max(products, traffic), "muon": work.muon_flops() / (cluster.peak_fp32 * cluster.busy)}
    behind = parts["arithmetic"] * (1.0 if fsdp else 2 / 3)  # gradients are exchanged during the backward pass
    parts["network"] = max(0.0, wire - behind)
    parts["decoding"] = max(0.0, work.batch / cluster.decode - sum(parts.values()))  # goes on during all this
    parts["packing"] = work.batch / cluster.pack
    return parts | {"all": sum(parts.values())}


def memory_needed(work: Work, n: int, fsdp: bool) -> float:
    """Bytes: weights, gradients and AdamW's two averages in fp32, and the activations."""
    every, trained = work.parameters()
    return (4 * every + 12 * trained) / (n if fsdp else 1) + work.batch * work.memory_bytes()[1] / 2


def bottleneck(parts: dict[str, float]) -> str:
    """What takes most time beside the arithmetic, and its share."""
    what = max(("muon", "network", "decoding", "packing"), key=parts.get)
    return f"{what} {parts[what] / parts['all']:.0%}"


def table(cluster: Cluster, chosen: list[Work], sizes=(8, 16, 64, 256, 1024), strong: bool = False) -> str:
    """Markdown: efficiency, samples a second, bottleneck. Weak scaling: each GPU keeps its batch, and is compared with one GPU;
    strong: all share the batch of 8, and are compared with these."""
    lines = [f"| {cluster.name} | " + " | ".join(f"{n:,} GPUs" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for work in chosen:
        for fsdp in (False, True):
            cells = []
            for n in sizes:
                local = replace(work, batch=work.batch * 8 // n) if strong else work
                if not local.batch or memory_needed(local, n, fsdp) > cluster.room:
                    cells.append("does not fit" if local.batch else "no sample left")
                    continue
                parts = step_seconds(local, cluster, n, fsdp)
                speed = n * local.batch / parts["all"]
                base = 8 if strong else 1
                best = n * work.batch / step_seconds(work, cluster, base, fsdp)["all"]
                cells.append(f"{min(1, speed / best):.0%}, {speed:,.0f}/s, {bottleneck(parts)}")
            lines.append(f"| {work.name}, {'FSDP' if fsdp else 'DDP'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(work: Work) -> str:
    flops, (every, trained) = work.sample_flops(), work.parameters()
    parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in flops.items())
    sent = " and ".join(f"{exchanged(work, 1024, fsdp) / 1e9:.1f} GB ({'FSDP' if fsdp else 'DDP'})" for fsdp in (False, True))
    return (
        f"{work.name}: {every / 1e6:,.0f} M parameters, {trained / 1e6:,.0f} M train. A sample of {work.tokens} tokens: "
        f"{sum(flops.values()) / 1e9:,.0f} GFLOP ({parts}) and {work.memory_bytes()[1] / 1e9:.2f} GB through memory. A step: "
        f"{work.memory_bytes()[0] / 1e9:.1f} GB for the weights, {work.muon_flops() / 1e9:,.0f} GFLOP for Muon, "
        f"{sent} sent by each of many GPUs."
    )


# ---- measured ----------------------------------------------------------------------------------------------------------


def rate(n: int, batch: int, flags: list[str], seconds: float) -> float:
    """Images a second of n processes with one thread each: the median over the run's lines of metrics, the first left out."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        script = [str(Path(__file__).parents[1] / "train_vit.py"), *"--size small --device cpu --workers 1".split(), *flags]
        script += ["--batch-size", str(batch), "--max-seconds", str(seconds), "--out", folder, "--eval-every", "1000000"]
        words, environment = [sys.executable, *torchrun, *script], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"a trial run failed: {' '.join(done.stderr.split())[-300:]}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row][1:]
    if not rates:
        raise ValueError(f"{seconds:g} s are too short for 40 steps: give more --seconds")
    return statistics.median(rates)


def measure(seconds: float, batch: int) -> str:
    """Markdown: two processes against one, with as large a batch each (weak scaling) and with half of it (strong)."""
    lines = ["| processes | batch | images/s | efficiency |", "|---|---|---|---|"]
    alone = rate(1, batch, [], seconds)
    lines.append(f"| 1 | {batch} | {alone:,.0f} | |")
    for name, flags in (("DDP", []), ("FSDP", ["--fsdp"])):
        for size in (2 * batch, batch):
            found = rate(2, size, flags, seconds)
            lines.append(f"| 2, {name} | 2 x {size // 2} | {found:,.0f} | {found / (2 * alone):.0%} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="?", choices=["predict", "measure"], default="predict")
    parser.add_argument("--seconds", type=positive_float, default=60.0, help="of each of the five trial runs")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="of one process")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.what == "measure":
        print(measure(args.seconds, args.batch_size))
        return
    chosen = works()
    print("\n\n".join(map(describe, chosen)))
    for strong, what in enumerate(("Weak scaling: each GPU keeps its batch", "Strong scaling: all share the batch of 8 GPUs")):
        print(f"\n{what}\n")
        print("\n\n".join(table(cluster, chosen, strong=bool(strong)) for cluster in (H100, ETHERNET)))


if __name__ == "__main__":
    run_cli(main)
