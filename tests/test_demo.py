"""Laws of extras/demo.py: drawn digits become like the scenes' own, an answer streams and is generate.py's, a bad call is one
line; and of the page in a browser: an image, an answer, where it looked; what is no image is refused; all stays at home."""

import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.scenes import INKS, PAPERS
from extras import demo
from lib.checkpoint import from_pretrained, load_vlm, save_pretrained
from lib.cli import run_cli
from lib.conversation import Conversation
from lib.tokenizer import BPETokenizer
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import MllamaImageProcessor
from vit_scratch import ViTConfig, ViTModel

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
LACKING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
LACKING += [] if CHROMIUM else ["chromium"]
TEXT = "What is in the image? a red 3 at the top left, a blue 7 at the top right "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a small untrained VLM whose answers depend on what it sees."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = BPETokenizer.train(TEXT * 20, vocab_size=290, special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = "chatml"
    tokenizer.add_special_tokens(["<image>"])
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"hidden_size": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "max_position_embeddings": 120}
    config = MLLAMAConfig(
        vision | {"image_size": 32, "patch_size": 8}, words | {"vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), projector_type="linear", pixel_shuffle=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    save_pretrained(model, folder)
    processor = MllamaImageProcessor(tokenizer, config.text_config.num_image_tokens, 32, add_location_tokens=False)
    processor.save_pretrained(folder)
    return folder


# ---- a drawing becomes an image -------------------------------------------------------------------------------------


def seven(x: float, y: float, height: float) -> list:
    """Strokes of a 7 with its bar, in two pieces; (x, y) its middle."""
    bar = [[x - height / 5, y], [x + height / 5, y]]
    return [[[x - height / 3, y - height / 2], [x + height / 3, y - height / 2], [x, y + height / 2]], bar]


def inked(image: Image.Image) -> np.ndarray:
    """bool [h, w]: where it is far from its paper."""
    return np.abs(np.asarray(image).astype(int) - sum(PAPERS["dark"]) // 2).max(axis=2) > 60


def test_an_empty_drawing_is_dark_paper():
    pixels = np.asarray(demo.paint([]))
    assert pixels.shape == (64, 64, 3) and not inked(demo.paint([])).any()
    assert PAPERS["dark"][0] <= pixels.mean() <= PAPERS["dark"][1] and pixels.std() > 3  # grain, as the scenes have


@pytest.mark.parametrize("ink", INKS)
def test_a_digit_lies_where_it_was_drawn_in_its_ink(ink):
    image = demo.paint([[ink, line] for line in seven(0.75, 0.25, 0.3)])
    rows, columns = np.nonzero(inked(image))
    assert rows.max() < 32 <= columns.min() and abs((rows.min() + rows.max()) / 2 - 16) < 2
    strongest = np.asarray(image).astype(int)[inked(image)]
    assert min(np.abs(strongest - INKS[ink]).max(axis=1)) <= 20


@pytest.mark.parametrize("height, expected", [(0.2, 0.25), (0.3, 0.3), (0.6, 0.375), (0.95, 0.375)])
def test_a_digit_is_as_large_as_the_scenes_are(height, expected):
    rows, _ = np.nonzero(inked(demo.paint([["cyan", line] for line in seven(0.5, 0.5, height)])))
    assert abs((rows.max() - rows.min() + 1) / 64 - expected) < 0.06


def test_large_and_larger_are_the_same_image():
    large, larger = (demo.paint([["red", line] for line in seven(0.5, 0.5, height)]) for height in (0.5, 0.9))
    assert large == larger


def test_a_digit_drawn_at_the_edge_stays_whole():
    whole = inked(demo.paint([["red", line] for line in seven(0.5, 0.5, 0.4)])).sum()
    assert abs(inked(demo.paint([["red", line] for line in seven(0.95, 0.05, 0.4)])).sum() - whole) < 0.15 * whole


def test_strokes_of_one_ink_that_touch_are_one_digit():
    strokes = [["red", line] for line in seven(0.2, 0.2, 0.3)] + [["red", line] for line in seven(0.8, 0.8, 0.3)]
    strokes += [["blue", line] for line in seven(0.2, 0.2, 0.3)]
    found = demo.together(strokes)
    assert sorted((ink, len(lines)) for ink, lines in found) == [("blue", 2), ("red", 2), ("red", 2)]
    bridge = ["red", [[0.2, 0.2], [0.8, 0.8]]]
    assert sorted(len(lines) for _, lines in demo.together([*strokes, bridge])) == [2, 5]


def test_a_tap_or_a_trifle_does_not_become_a_digit():
    assert 0 < inked(demo.paint([["yellow", [[0.5, 0.5]]]])).sum() < 0.2 * 16**2
    rows, _ = np.nonzero(inked(demo.paint([["yellow", line] for line in seven(0.5, 0.5, 0.03)])))
    assert rows.max() - rows.min() < 12


@pytest.mark.parametrize("stroke", [["gold", [[0, 0]]], ["red", []], ["red", [[0.1, 0.2, 0.3]]], ["red", [[0, float("nan")]]]])
def test_what_is_no_stroke_is_refused(stroke):
    with pytest.raises(ValueError, match="must be"):
        demo.paint([stroke])


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_talk(run):
    model, processor = load_vlm(run)

    def make(kind=demo.Talk):
        talk = kind(model, processor.tokenizer, processor, max_new_tokens=12)
        talk.show(ROOT / "assets" / "scene.png")
        return talk

    return make


@pytest.mark.parametrize("follow_up", [False, True])
def test_an_answer_grows_and_is_that_of_generate(make_talk, follow_up):
    talk, reference = make_talk(), make_talk(Conversation)
    for question in ("What is it?", "And what is left of it?"):
        if not follow_up:
            reference = make_talk(Conversation)
        growing = list(talk.ask(question, follow_up))
        assert len(growing) > 3 and all(after.startswith(before) for before, after in itertools.pairwise(growing))
        assert growing[-1] == "".join(reference.ask(question)) == reference.messages[-1]["content"] != ""
        assert talk.messages == reference.messages


def test_there_is_a_map_for_each_word_on_the_image_the_model_sees(make_talk):
    talk = make_talk()
    *_, answer = talk.ask("What is it?")
    assert "".join(talk.words).split() == "".join(answer.split()).split() and talk.maps.shape[:2] == (len(talk.words), 1)
    assert talk.seen().shape == (3, 384, 384)  # 32 pixels, twelve times as large
    images = [talk.overlay(k) for k in range(len(talk.words))]
    assert all(image.shape == (384, 384, 3) for image in images)
    assert len({image.tobytes() for image in images}) == len(images)
    for k, image in enumerate(images):
        row, column = divmod(int(talk.maps[k, 0].argmax()), talk.maps.shape[3])
        step = 384 // talk.maps.shape[3]
        bright = image.astype(int).sum(axis=2)
        assert bright[row * step : (row + 1) * step, column * step : (column + 1) * step].max() == bright.max()


def test_a_question_too_many_is_one_line(make_talk):
    talk = make_talk()
    with pytest.raises(ValueError, match="context") as refused:
        list(talk.ask("What is it? " * 60))
    assert "\n" not in str(refused.value) and list(talk.ask("What is it?", follow_up=True))


# ---- bad calls -------------------------------------------------------------------------------------------------------


def refusal(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: demo.main([str(word) for word in argv]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error:") and error.count("\n") == 1
    return error


@pytest.fixture
def with_gradio(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)


def test_without_gradio_it_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert "pip install -r requirements-demo.txt" in refusal(capsys, run)
    assert "gradio==" in (ROOT / "requirements-demo.txt").read_text()


def free_port() -> int:
    with socket.create_server((demo.HOST, 0)) as probe:
        return probe.getsockname()[1]


def test_a_taken_port_is_one_line(run, capsys, with_gradio):
    with socket.create_server((demo.HOST, 0)) as taken:
        assert "choose another with --port" in refusal(capsys, run, "--port", taken.getsockname()[1])
    assert "choose another with --port" in refusal(capsys, run, "--port", 70000)


def test_a_run_that_is_not_there_or_sees_nothing_is_one_line(run, tmp_path, capsys, with_gradio):
    port = ["--port", free_port()]
    assert "there is no folder ./nowhere" in refusal(capsys, "./nowhere", *port)
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_pretrained(ViTModel(ViTConfig(**sizes)), tmp_path / "vit")
    assert "which does not answer questions about images" in refusal(capsys, tmp_path / "vit", *port)
    save_pretrained(from_pretrained(run).language_model, tmp_path / "lm")
    shutil.copy(run / "tokenizer.json", tmp_path / "lm")
    assert "which does not answer questions about images" in refusal(capsys, tmp_path / "lm", *port)


# ---- the page, in a browser ------------------------------------------------------------------------------------------

# What python runs first in the server: whatever would leave this machine is written down and refused.
WATCH = """
import os, socket

def watched(real, host_of):
    def call(*args, **rest):
        host = host_of(*args)
        if host not in (None, "", "127.0.0.1", "localhost", "::1"):
            with open(os.environ["ABROAD"], "a") as file:
                print(host, file=file)
            raise OSError("not here")
        return real(*args, **rest)
    return call

socket.getaddrinfo = watched(socket.getaddrinfo, lambda host, *rest: host)
socket.socket.connect = watched(socket.socket.connect, lambda self, to: to[0] if isinstance(to, tuple) else None)
"""


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """The address of a page for the run, by `python -m extras.demo`, as a user calls it."""
    if LACKING:
        pytest.skip(f"the page is tested in a browser: {', '.join(LACKING)} not installed")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "ABROAD": str(folder / "abroad")}
    environment |= {"GRADIO_TEMP_DIR": str(folder / "files"), "HTTP_PROXY": "http://10.0.0.1:9"}
    call = [sys.executable, "-m", "extras.demo", run, "--port", str(port)]
    with open(folder / "said", "w") as said:
        server = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=said, text=True, cwd=folder)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port} shows {run}; Ctrl-C ends it\n", (
            folder / "said"
        ).read_text()
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", port=port, pid=server.pid)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        finally:
            server.kill()
    assert not (folder / "abroad").exists(), (folder / "abroad").read_text()
    assert "Traceback" not in (folder / "said").read_text()


@pytest.fixture(scope="module")
def browser(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    """The page in a browser of its own, which may not load anything from elsewhere, and does not try to."""
    context, asked = browser.new_context(), []  # nothing in it is cached
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.address)
    page.wait_for_selector("#question textarea")
    yield page
    context.close()
    assert len(asked) > 5
    assert not [url for url in asked if not url.startswith((served.address, "data:", "blob:"))]


def ask(page, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def source(page, name: str) -> str:
    return page.get_attribute(f"#{name} img", "src")


def test_a_dropped_image_an_answer_that_streams_and_where_it_looked(page):
    page.set_input_files("input[type=file]", ROOT / "assets" / "scene.png")
    page.wait_for_selector("#seen img")
    page.evaluate("""() => {
        window.texts = new Set();
        const note = () => window.texts.add([...document.querySelectorAll("#chat .bot .message-content")].at(-1)?.innerText);
        const all = {subtree: true, childList: true, characterData: true};
        new MutationObserver(note).observe(document.querySelector("#chat"), all);
    }""")
    ask(page, "What is in the picture?")
    page.wait_for_selector("#looked img")
    assert "What is in the picture?" in page.inner_text("#chat")
    assert len(page.evaluate("[...window.texts]")) > 3  # it came piece by piece
    words = page.locator("#words input")
    assert words.count() > 1 and page.locator("#words input:checked").count() == 1
    before = source(page, "looked")
    other = next(k for k in range(words.count()) if not words.nth(k).is_checked())
    words.nth(other).check()
    page.wait_for_function("before => document.querySelector('#looked img').src !== before", arg=before)
    assert source(page, "looked") != before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.png", b"a text, renamed", "notes.png is refused: not an image in a format that is read here"),
        ("cut.png", (ROOT / "assets" / "scene.png").read_bytes()[:900], "cut.png is refused: cannot be decoded"),
        ("notes.txt", b"a text", "Invalid file type"),
        ("large.png", b"\x89PNG" + bytes(demo.LARGEST << 20), "exceed the maximum allowed size of 10"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_in_one_line(page, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    page.set_input_files("input[type=file]", tmp_path / name)
    line = page.locator("[data-testid=toast-body] .toast-text, [data-testid=toast-body]").last
    line.wait_for()
    assert message in line.inner_text() and page.locator("#seen img").count() == 0
    ask(page, "What is it?")
    page.get_by_text("there is no image yet").wait_for()


def test_the_server_refuses_too_large_an_upload_itself(served):
    import httpx  # comes with gradio

    files = {"files": ("large.png", bytes((demo.LARGEST << 20) + 1))}
    assert httpx.post(f"{served.address}/gradio_api/upload", files=files, trust_env=False, timeout=60).status_code == 413


def test_a_scene_is_drawn_and_asked_about(page):
    page.get_by_role("tab", name="Draw a scene").click()
    box = page.locator("#board canvas").bounding_box()
    shown = []
    for ink, x, y in (("red", 0.25, 0.25), ("cyan", 0.75, 0.75)):
        page.locator(f"#board [value={ink}]").check()
        for line in seven(x, y, 0.3):
            (start, *rest) = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in line]
            page.mouse.move(*start)
            page.mouse.down()
            for point in rest:
                page.mouse.move(*point)
            page.mouse.up()
        page.wait_for_function("old => !old.includes(document.querySelector('#seen img')?.src ?? old[0])", arg=[*shown, None])
        shown.append(page.locator("#seen img").evaluate("img => img.src"))
    # A busy browser hands the last line over late: another image, which would end the conversation below.
    page.wait_for_function("""async () => {
        const now = () => document.querySelector("#seen img").src, before = now();
        await new Promise(done => setTimeout(done, 2000));
        return now() === before;
    }""")
    ask(page, "What is left of it?")
    page.wait_for_selector("#looked img")
    page.locator("#board .clear").click()  # another image, another conversation
    page.wait_for_function("() => !document.querySelector('#chat').innerText.includes('What is left of it?')")
    assert page.locator("#words input").count() == 0


def test_it_listens_on_this_machine_only(served):
    listening = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    addresses = {
        line[1].split(":")[0] for line in listening if line[3] == "0A" and int(line[1].split(":")[1], 16) == served.port
    }
    assert addresses == {"0100007F"}
