"""Chat templates: which of a folder's files states one, and what it writes, to the letter as transformers' apply_chat_template.

    templates = read_templates(folder)                       # by name; "default" is the one that conversations are written in
    render(templates["default"], messages, add_generation_prompt=True, bos_token="<s>")

A template is a program of whoever published the folder. It runs in jinja2's sandbox, sees texts, lists and tables, and nothing
else. `OURS` are the templates that we write into runs. How a rendered conversation becomes ids stands in chat.py.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from lib.files import need, one_line, read_if_there, read_text, write_atomic

OURS = {
    "chatml": (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        r"{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The first word of an answer is then the token that it is within a text: " red", not "re" and "d". A model that starts
    # from nothing learned most kinds of questions about scenes in half the steps.
    "chatml_spaced": (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        r"{{ (' ' if message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

# ---- which template ----------------------------------------------------------------------------------------------------


def read_templates(folder: Path, config: dict) -> dict[str, str]:
    """The chat templates of a folder, by name; {} where it has none. config: its tokenizer_config.json.

    In the order of transformers 5: of a folder with a processor, processor_config.json, chat_template.json, the .jinja files,
    and tokenizer_config.json; of one with a tokenizer alone, the .jinja files before tokenizer_config.json. Raises ValueError
    for what is no template.
    """
    found = {}
    if any((folder / f"{name}.json").is_file() for name in ("processor_config", "preprocessor_config")):
        found = in_json(folder / "processor_config.json") or in_json(folder / "chat_template.json")
    return found or jinja_files(folder) or named(config.get("chat_template"), folder / "tokenizer_config.json")


def in_json(path: Path) -> dict[str, str]:
    return named(read_if_there(path).get("chat_template"), path)


def jinja_files(folder: Path) -> dict[str, str]:
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    return {name: read_text(path) for name, path in paths.items()}


def named(value, source) -> dict[str, str]:
    """Templates by name, of the ways to write them: one text, a table of texts, a list of {"name", "template"}."""
    found = {"default": value} if isinstance(value, str) else value or {}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    texts = isinstance(found, dict) and all(isinstance(text, str) for pair in found.items() for text in pair)
    need(texts, source, f"chat_template is {value!r:.80}: it must be a text, or texts by name")
    return found


def write_templates(folder: Path, templates: dict[str, str]) -> None:
    """As transformers writes them: "default" as chat_template.jinja, others in additional_chat_templates/. What else the folder
    has of these goes."""
    others, written = folder / "additional_chat_templates", set()
    for name, text in templates.items():
        path = folder / "chat_template.jinja" if name == "default" else others / f"{name}.jinja"
        need(path.parent in (folder, others), folder, f"{name!r} is no name of a template")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda temporary, text=text: temporary.write_bytes(text.encode()))
        written.add(path)
    for stale in {path for pattern in TEMPLATE_FILES for path in folder.glob(pattern)} - written:
        stale.unlink()


# ---- what it writes ----------------------------------------------------------------------------------------------------


def render(template: str, messages: list[dict], add_generation_prompt: bool = False, **special_tokens: str) -> str:
    """A conversation as the template writes it. special_tokens: bos_token, eos_token, ..., by name. Raises ValueError in one
    line for a template that makes no sense, or that refuses the messages."""
    try:
        return compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except Exception as error:  # a template is a program, and may fail like one
        raise ValueError(f"the chat template cannot write this conversation ({one_line(error)})") from None


@lru_cache(maxsize=64)
def compiled(template: str):
    """jinja2's template with what transformers gives it: settings, functions, and the tags {% generation %} and {% break %}."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < (3, 1, 6) and template not in OURS.values():
        raise ValueError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox: `pip install -U jinja2`")

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} says which text is an answer's; it writes what is inside."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

        def inside(self, caller) -> str:
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
