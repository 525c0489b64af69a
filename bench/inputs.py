"""What a model is fed with, images to pixel_values and texts to tokens; and the way from `python` to the first gradient."""

import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from bench.measure import compare, transformers_class
from data.image_settings import ImageSettings
from lib.image_settings import image_settings
from lib.tokenizer import BPETokenizer
from processing_mllama import process_images

PREPARATIONS = {  # what is done with an image: transformers' processor, and its settings
    "224": ("siglip", {"size": {"height": 224, "width": 224}}),
    "224 of 256, cropped": ("clip", {"size": {"shortest_edge": 256}}),
    "tiles of 512": ("idefics3", {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}),
}


def bench_images(args, device: torch.device) -> list[dict]:
    """JPEGs from disk to pixel_values against transformers' processors: squeezed, cropped, cut into tiles, the same pixels; and
    squeezed, decoded at a fraction of their size. --source: a folder of JPEGs; without it, 16 of 640 x 480 are made."""
    transformers_class("SiglipModel")
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(Path(args.source).glob("*.jpg"))[:64] if args.source else make_photos(Path(folder), 16, args.seed)
        if not files:
            raise ValueError(f"--source {args.source} holds no .jpg files")
        rows = []
        for size, (kind, changes) in PREPARATIONS.items():
            module = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
            theirs = getattr(module, {"siglip": "Siglip", "clip": "CLIP", "idefics3": "Idefics3"}[kind] + "ImageProcessorPil")
            reference, said = theirs(**changes), {"image_processor_type": theirs.__name__.removesuffix("Pil"), **changes}
            ours, some = ImageSettings(**image_settings(said)), files[:4] if kind == "idefics3" else files

            def step(some=some, reference=reference):
                images = [[Image.open(file).convert("RGB")] for file in some]
                return [reference(image, return_tensors="pt")["pixel_values"].flatten(0, -4) for image in images]

            if not torch.equal(process_images(some, ours), torch.cat(step())):
                raise ValueError("the pixels differ: there is nothing to compare")
            for fast in (False, True) if size == "224" else (False,):
                steps = {"ours": partial(process_images, some, ours, fast=fast), "transformers": step}
                what = "images, decoded at a fraction" if fast else "images, the same pixels"
                rows.append(compare(what, steps, len(some), args.rounds, device, tensors=False, size=size, batch=len(some)))
    return rows


def make_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """JPEGs of smooth colours with some grain, which compress about as photos do."""
    random = torch.Generator().manual_seed(seed)
    for i in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 12, 16, generator=random), (480, 640), mode="bicubic")
        grain = 0.06 * torch.randn(1, 3, 480, 640, generator=random)
        pixels = ((smooth + grain).clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def bench_bpe(args, device: torch.device) -> list[dict]:
    """Byte-level BPE against the tokenizers library: learning 2,000 tokens from a text, and encoding it, in bytes a second. The
    text: --text FILE, or this project's own files."""
    transformers_class("PreTrainedTokenizerFast")
    import tokenizers

    here = Path(__file__).parents[1]
    files = [Path(args.text)] if args.text else [here / "README.md", *sorted(here.glob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def learn():
        their = tokenizers.Tokenizer(tokenizers.models.BPE())
        their.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=2000, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
        their.train_from_iterator([text], trainer)

    ours = BPETokenizer.train(text, 2000)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    if ours.encode(text) != theirs.encode(text).ids:
        raise ValueError("the two give different ids: there is nothing to compare")
    size, facts = len(text.encode()), {"size": "2000 tokens", "batch": 1, "tensors": False}
    learning = {"ours": partial(BPETokenizer.train, text, 2000), "tokenizers": learn}
    encoding = {"ours": partial(ours.encode, text), "tokenizers": partial(theirs.encode, text)}
    return [
        compare("BPE, learning (bytes)", learning, size, args.rounds, device, **facts),
        compare("BPE, encoding (bytes)", encoding, size, args.rounds, device, **facts),
    ]


FIRST_STEPS = {
    "ours": """
import torch
from model import MLLAMAConfig, MllamaForConditionalGeneration as Model
vision = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
text = {"vocab_size": 450, "hidden_size": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384}
model = Model(MLLAMAConfig(vision, {**text, "max_position_embeddings": 512}, projector_type="linear", image_token_id=449))
ids = torch.cat([torch.full((2, 16), 449), torch.randint(0, 400, (2, 32))], dim=1)
model(ids, torch.randn(2, 3, 64, 64), labels=ids)["loss"].backward()
""",
    "transformers": """
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration as Model
vision = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
          "intermediate_size": 768}
text = {"model_type": "llama", "vocab_size": 450, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 4, "intermediate_size": 384, "pad_token_id": 0}
model = Model(Idefics3Config(vision_config=vision, text_config=text, scale_factor=1, image_token_id=449, pad_token_id=0))
ids = torch.cat([torch.full((2, 16), 449), torch.randint(0, 400, (2, 32))], dim=1)
model(input_ids=ids, pixel_values=torch.randn(2, 1, 3, 64, 64), labels=ids).loss.backward()
""",
}


def bench_start(args, device: torch.device) -> list[dict]:
    """From a fresh Python to the end of the first forward and backward pass of a tiny VLM, by the same few lines."""
    transformers_class("Idefics3ForConditionalGeneration")
    run = {name: partial(subprocess.run, [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1],
                         stderr=subprocess.DEVNULL) for name, code in FIRST_STEPS.items()}  # fmt: skip
    return [compare("a first step, from nothing", run, 1, args.rounds, device, tensors=False, size="tiny", batch=2)]
