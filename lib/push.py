"""A trained model on the hub: the files of its folder that transformers opens, with a model card made from what the run left.

    python -m lib.checkpoint push runs/vlm-own user/my-vlm --dry-run      # writes the card, lists what would be uploaded
    python -m lib.checkpoint push runs/vlm-own user/my-vlm --private

Needs the huggingface_hub package, which finds the token (`hf auth login`, or HF_TOKEN in the environment). The token is never
printed. The card says what settings.json and result.json say, and nothing that is not there, a license for instance.
"""

import json
import math
import re
from pathlib import Path

from lib.chat import takes_parts
from lib.checkpoint import choose_layout, from_pretrained, is_published, open_source, understand
from lib.convert import companions
from lib.files import one_line, read_if_there, read_text, write_atomic
from lib.weights import empty_model, list_safetensors, safetensors_files
from processing_mllama import MllamaImageProcessor

TASKS = {  # what the hub calls what a model does, by model_type
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "qwen3"), "text-generation"),
    **dict.fromkeys(("llava", "idefics3", "smolvlm"), "image-text-to-text"),
    **dict.fromkeys(("siglip_text_model", "bert", "distilbert"), "feature-extraction"),
    **{"vit": "image-classification", "siglip": "zero-shot-image-classification"},
}
TOWER_TASK = "image-feature-extraction"
IMAGES = ("samples.png", "curves.png")  # which the card shows
MARK = "<!-- Written by `python -m lib.checkpoint push`, which writes it anew: delete this line to keep it. -->"
NOT_TOLD = ("out", "run", "device", "workers", "resume", "dry_run", "max_seconds", "save_every", "eval_every")
CHAT = """pipe = pipeline("{task}", model="{name}")
content = [{{"type": "image", "url": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
print(pipe(text=[{{"role": "user", "content": content}}], max_new_tokens=40))"""
ASK = """pipe = pipeline("{task}", model="{name}")
chat = [{{"role": "user", "content": "<image>\\nWhat is this?"}}]
prompt = pipe.processor.apply_chat_template(chat, add_generation_prompt=True)
print(pipe(images="photo.jpg", text=prompt, max_new_tokens=40))"""  # where the template takes texts, not lists
CALLS = {
    "text-generation": 'print(pipeline("{task}", model="{name}")("The dog jumped over the", max_new_tokens=20))',
    "feature-extraction": 'print(pipeline("{task}", model="{name}")("The dog jumped over the"))',
    "zero-shot-image-classification": 'pipe = pipeline("{task}", model="{name}")\n'
    'print(pipe("photo.jpg", candidate_labels=["a dog", "a cat"]))',
}
CALL = 'print(pipeline("{task}", model="{name}")("photo.jpg"))'


def published_kind(folder: Path) -> str:
    """The model_type of a folder that transformers opens. Raises ValueError or FileNotFoundError for any other, and for weights
    that cannot be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: push takes one that is on this disk")
    published = open_source(folder)[0]
    layout, config = understand(folder, published)
    kind = published["model_type"]
    if not is_published(kind):
        try:
            choose_layout(empty_model(layout.build, config), "published")
        except ValueError as error:
            raise ValueError(f"{folder} holds a {kind}, which only this project opens: {error}") from None
        raise ValueError(f"{folder} holds a {kind}, which only this project opens: rewrite it with lib.checkpoint convert")
    from_pretrained(folder, dtype=None)
    return kind


def told(path: Path) -> dict:
    """What settings.json or result.json says that others may want to know: of a path only its last part."""
    facts = read_if_there(path)
    found = {}
    for key, value in facts.items():
        if key not in NOT_TOLD and value not in (None, False, "", [], {}):
            value = json.dumps(value) if isinstance(value, dict | list) else value
            found[key] = re.sub(r"(^|(?<=[\s\"]))/\S*/(?=[^/\s]+)", "", value) if isinstance(value, str) else value
    return found


def table(head: str, facts: dict) -> str:
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in facts.items()]
    return "\n".join((f"| {head} | |", "|---|---|", *rows))


def model_card(folder: Path, name: str, kind: str) -> str:
    """The text of README.md: what the model is, how to open it, how it was trained and how good it is."""
    task, title = TASKS.get(kind, TOWER_TASK), name.split("/")[-1]
    tensors = list_safetensors(folder)
    parameters = sum(math.prod(shape) for _, shape, _ in tensors)
    call = (question(folder) if task == "image-text-to-text" else CALLS.get(task, CALL)).format(task=task, name=name)
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---",
        MARK,
        f"# {title}\n\nA {kind} of {parameters:,} parameters ({', '.join(sorted({stored for *_, stored in tensors}))}).",
        f"```python\nfrom transformers import pipeline\n\n{call}\n```",
    ]
    parts += [f"![{Path(image).stem}]({image})" for image in IMAGES if (folder / image).exists()]
    for file, head, words in (
        ("result.json", "figure", "Measured when training ended"),
        ("settings.json", "setting", "The settings of the run"),
    ):
        if facts := told(folder / file):
            parts.append(f"## {words}\n\n{table(head, facts)}")
    return "\n\n".join(parts) + "\n"


def question(folder: Path) -> str:
    """The call that asks about an image, in the form that the folder's chat template takes."""
    if not (folder / "tokenizer_config.json").is_file():
        return CHAT
    processor = MllamaImageProcessor.from_pretrained(folder)
    parts = not processor.tokenizer.chat_template or takes_parts(processor.tokenizer, processor.image_token)
    return CHAT if parts else ASK.replace("<image>", processor.image_token)


def push(folder: Path, name: str, private: bool = False, dry_run: bool = False) -> list[str]:
    """Write the card to folder/README.md (unless one is there that somebody else wrote) and upload the model; lines about it
    are returned. Raises ValueError or an OSError, in one line, for a folder that transformers does not open and where the hub
    does not take it."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"{name!r:.80} is no name on the hub: it must be user/name")
    kind, card = published_kind(folder), folder / "README.md"
    lines = []
    if card.exists() and MARK not in read_text(card):
        lines.append(f"{card} is not of this command: it is uploaded as it is")
    else:
        text = model_card(folder, name, kind)
        write_atomic(card, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        lines.append(f"{card} is the model card: add a license to it, and what else should be known")
    weights = [file.name for file in safetensors_files(folder)]
    wanted = ("config.json", *weights, "model.safetensors.index.json", *companions(folder), "README.md", *IMAGES)
    files = [file for file in wanted if (folder / file).exists() and (len(weights) > 1 or "index" not in file)]
    if dry_run:
        lines += [f"  {file:<40}{(folder / file).stat().st_size:>16,} bytes" for file in files]
        return [*lines, f"{len(files)} files would go to {name}{' (private)' if private else ''}; nothing was uploaded"]
    return [*lines, upload(folder, name, private, files)]


def upload(folder: Path, name: str, private: bool, files: list[str]) -> str:
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ValueError("uploading needs the huggingface_hub package: pip install huggingface_hub") from None
    # Beside these, what the package's HTTP library raises: a class that its own error is one of, whichever library it is.
    http = [kind for kind in HfHubHTTPError.__mro__ if kind not in (Exception, BaseException, object)]
    try:
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=files, commit_message=f"Upload {name}")
    except (OSError, ValueError, RuntimeError, *http) as error:
        reason = one_line(error).replace(get_token() or "\0", "(token)")[:300]
        raise OSError(f"the hub did not take {name} ({reason}): is there a network, and did you `hf auth login`?") from None
    return f"{len(files)} files are at {url}"
