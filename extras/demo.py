"""A page of your own machine to play with a vision-language model: drop an image or draw a scene of digits, ask, and see
where the model looked for each word of its answer.

    pip install -r requirements-demo.txt
    python -m extras.demo runs/vlm-scenes          then open http://127.0.0.1:7860; Ctrl-C ends it

The page is gradio's; all that happens behind it is the project's own: lib/conversation.py talks, attention_maps.py finds where
it looked, lib/figures draws that. It works offline, sends nothing anywhere, and only this machine can reach it.
"""

import argparse
import importlib.util
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.images import decode_image
from data.scenes import INKS, PAPERS, SceneConfig
from extras.attention_maps import attention_over_image_tokens, group_into_words
from lib import figures
from lib.checkpoint import load_vlm
from lib.cli import Parser, positive_int, run_cli
from lib.conversation import Conversation
from lib.devices import find_device
from lib.fast_decode import fast_step
from lib.files import one_line
from lib.generation import say_unlike

HOST, LARGEST, SHOWN = "127.0.0.1", 10, 384  # MiB of one upload; pixels a side of images on the page


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a vision-language model: a run folder, or what else generate.py takes")
    parser.add_argument("--port", type=positive_int, default=7860, help="of 127.0.0.1; default: 7860")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    return parser.parse_args(argv)


# ---- a drawing becomes an image ----

PEN = 1.1  # width of a stroke in cells, of which a digit is 8 high; with wider ones a trained model read fewer
FINE = 8  # points of the drawing to a side of a cell
TOUCH, DOT = 0.03, 0.12  # of the drawing's side: strokes as near as this make one digit; what is smaller than this stays small


def together(strokes: Sequence[Sequence]) -> list[tuple[str, list[np.ndarray]]]:
    """Strokes (see paint) as digits: (ink, its strokes [P, 2]), a digit being what one ink drew without a gap."""
    found: list[tuple[str, list[np.ndarray]]] = []
    for ink, points in strokes:
        line, mine, rest = np.array(points, dtype=float), [], []
        if ink not in INKS or line.ndim != 2 or line.shape[1] != 2 or not np.isfinite(line).all():
            raise ValueError(f"a stroke of ink {ink!r} and shape {list(line.shape)}: it must be [P, 2], of {', '.join(INKS)}")
        for other, lines in found:
            old = np.concatenate(lines)
            near = other == ink and np.maximum(line.min(0) - old.max(0), old.min(0) - line.max(0)).max() < TOUCH
            mine, rest = (mine + lines, rest) if near else (mine, [*rest, (other, lines)])
        found = [*rest, (ink, [*mine, line])]
    return found


def paint(strokes: Sequence[Sequence]) -> Image.Image:
    """[[ink, [[x, y], ...]], ...], with x and y from 0 to 1, as an RGB scene of the usual size.

    Each digit goes the way of the scenes' own, which were fitted to 8x8 cells, each as grey as it is full, made a little
    stronger, and enlarged to 0.25 to 0.375 of the image's side; large ones shrink about their middle. Raises ValueError
    for an ink that is not of INKS, and for a stroke that is not a list of points.
    """
    size, noise, limits = SceneConfig.size, SceneConfig.noise, SceneConfig.side
    scene = Image.new("RGB", (size, size), (sum(PAPERS["dark"]) // 2,) * 3)
    for ink, lines in together(strokes):
        low, high = np.concatenate(lines).min(axis=0), np.concatenate(lines).max(axis=0)
        middle, extent = (low + high) / 2, max((high - low).max(), DOT)
        frame, radius = Image.new("L", (10 * FINE, 10 * FINE)), PEN * FINE / 2  # 8 cells and one more all round
        pen = ImageDraw.Draw(frame)
        for line in lines:
            points = [tuple(point) for point in (((line - middle) * (8 - PEN) / extent + 5) * FINE).tolist()]
            pen.line(points, fill=255, width=round(2 * radius))
            for x, y in points:  # round ends and joints
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        share = np.clip(extent, *limits)  # of the image's side
        half, side = (high - low) / extent * share / 2, round(10 / 8 * share * size)
        corner = np.rint(np.clip(middle, half, 1 - half) * size - side / 2).astype(int).tolist()
        mask = frame.reduce(FINE).point(lambda grey: min(255, round(1.2 * grey))).resize((side, side), Image.Resampling.BICUBIC)
        scene.paste(INKS[ink], tuple(corner), mask)
    grain = np.random.RandomState(0).randint(-noise, noise + 1, (size, size, 3))
    return Image.fromarray((np.asarray(scene) + grain).clip(0, 255).astype(np.uint8))


# ---- an image, and what is said about it ----


class Talk(Conversation):
    """What was said about one image, shown before the first question; and where it looked, for the last answer's words."""

    def ask(self, question: str, follow_up: bool = False) -> Iterator[str]:
        """The answer as it grows; once it is whole, words and maps [words, tiles, h, w] are its. Without follow_up the model
        does not see what was said before. Raises ValueError where its context has no room for more."""
        if not follow_up:
            self.messages, self.new_images = [], len(self.images)
        text = ""
        for piece in super().ask(question):
            text += piece
            yield text
        self.words, self.maps = [], torch.zeros(0)
        if self.answer_ids:
            maps = attention_over_image_tokens(self.model, self.answer_ids, [self.prompt_ids], image_features=self.features)
            self.words, self.maps = group_into_words(self.answer_ids, maps, self.processor.decode)

    def seen(self) -> torch.Tensor:
        """The image as the model gets it, uint8 [3, h, w], enlarged for the page."""
        scale = max(1, SHOWN // max(self.images[0].shape))
        return self.images[0].repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)

    def overlay(self, k: int) -> np.ndarray:
        """Where it looked for word k: uint8 [h, w, 3], the hottest place as bright whatever the word's share is."""
        heat = self.maps[k, -1] / self.maps[k, -1].max().clamp(min=1e-12)  # the image whole: its global tile
        return (figures.heat_over(self.seen(), heat).numpy() * 255).round().astype(np.uint8)


# ---- the page ----

SWATCH = '<input type="radio" name="ink" value="{0}" title="{0}" aria-label="{0} ink" style="background: rgb{1}" checked>'
BOARD = f"""{"".join(SWATCH.format(ink, rgb) for ink, rgb in INKS.items())}<canvas width="384" height="384"></canvas>
<button class="undo">undo</button> <button class="clear">clear</button> one digit to a square, or to a quarter"""
BOARD_CSS = """
canvas { width: 100%; touch-action: none; cursor: crosshair; border-radius: 6px; margin: 6px 0; }
input { appearance: none; width: 30px; height: 30px; border-radius: 50%; margin: 3px; cursor: pointer; }
input:checked { outline: 3px solid #888; }
button { border: 1px solid #999; border-radius: 6px; padding: 2px 10px; cursor: pointer; }
"""
BOARD_JS = """
const canvas = element.querySelector("canvas"), to = canvas.getContext("2d"), S = canvas.width; let strokes = [];
function draw() {
  to.fillStyle = "#232323"; to.fillRect(0, 0, S, S); to.fillStyle = "#444";
  for (const at of [S / 3, 2 * S / 3]) { to.fillRect(at, 0, 1, S); to.fillRect(0, at, S, 1); }
  to.lineCap = to.lineJoin = "round"; to.lineWidth = S / 24;
  for (const [ink, points] of strokes) {
    to.strokeStyle = element.querySelector("[value=" + ink + "]").style.backgroundColor;
    to.beginPath(); for (const [x, y] of [points[0], ...points]) to.lineTo(x * S, y * S); to.stroke();
  }
}
function add(e) {
  const box = canvas.getBoundingClientRect(); canvas.setPointerCapture(e.pointerId);
  strokes.at(-1)[1].push([(e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height]); draw();
}
function send() { draw(); props.value = structuredClone(strokes); }
canvas.onpointerdown = (e) => { strokes.push([element.querySelector(":checked").value, []]); add(e); };
canvas.onpointermove = (e) => { if (canvas.hasPointerCapture(e.pointerId)) add(e); };
canvas.onlostpointercapture = send;
element.querySelector(".undo").onclick = () => { strokes.pop(); send(); };
element.querySelector(".clear").onclick = () => { strokes = []; send(); };
draw();
"""


def make_page(gr, make_talk: Callable[[], Talk], name: str):
    """gradio's Blocks, not yet launched. gr: the package itself, so that only main() imports it."""

    def begin(image: Image.Image) -> tuple:
        """Another image, another conversation."""
        talk = make_talk()
        talk.show(image)
        return talk, talk.seen().permute(1, 2, 0).numpy(), [], gr.Radio(choices=[]), None

    def dropped(path: str) -> tuple:
        try:
            return *begin(decode_image(path)), gr.skip()
        except (ValueError, OSError) as error:
            gr.Warning(f"{os.path.basename(path)} is refused: {' '.join(str(error).split())}", duration=None)
            return *[gr.skip()] * 5, None

    def asked(question: str, follow_up: bool, talk: Talk | None, history: list) -> Iterator[tuple]:
        if talk is None:
            raise gr.Error("there is no image yet: drop one, or draw one", print_exception=False)
        history.append({"role": "user", "content": question})
        try:
            for text in talk.ask(question, follow_up):
                yield "", [*history, {"role": "assistant", "content": text}], gr.Radio(choices=[]), None
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if talk.words:
            shares = talk.maps.sum(dim=(1, 2, 3)).tolist()
            choices = [(f"{word} {share:.0%}", k) for k, (word, share) in enumerate(zip(talk.words, shares, strict=True))]
            hottest = shares.index(max(shares))
            yield gr.skip(), gr.skip(), gr.Radio(choices=choices, value=hottest), talk.overlay(hottest)

    shown = {"interactive": False, "height": 300, "buttons": []}
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page, gr.Row():
        with gr.Column(scale=2):
            with gr.Tab("Drop an image"):
                file = gr.File(label=f"up to {LARGEST} MiB", file_types=["image"], height=130)
            with gr.Tab("Draw a scene"):
                board = gr.HTML([], html_template=BOARD, css_template=BOARD_CSS, js_on_load=BOARD_JS, elem_id="board")
            seen = gr.Image(label="what the model sees", elem_id="seen", **shown)
            looked = gr.Image(label="where it looked for the word", elem_id="looked", **shown)
        with gr.Column(scale=3):
            chat = gr.Chatbot(label=name, height=400, render_markdown=False, buttons=[], elem_id="chat")
            question = gr.Textbox(show_label=False, placeholder="What is in it?", submit_btn=True, elem_id="question")
            follow_up = gr.Checkbox(False, label="the model is shown the earlier questions and answers, too")
            words = gr.Radio([], label="A word, and how much of its attention went to the image", elem_id="words")
        talk = gr.State(None)
        fresh, one_by_one = [talk, seen, chat, words, looked], {"concurrency_limit": 1, "concurrency_id": "model"}
        file.upload(dropped, file, [*fresh, file], **one_by_one)
        board.change(lambda strokes: begin(paint(strokes)), board, fresh, show_progress="hidden", **one_by_one)
        question.submit(asked, [question, follow_up, talk, chat], [question, chat, words, looked], **one_by_one)
        words.input(lambda k, talk: talk.overlay(k), [words, talk], looked, show_progress="hidden", **one_by_one)
    return page


def main(argv=None) -> None:
    args = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio, which is not installed: pip install -r requirements-demo.txt")
    try:
        socket.create_server((HOST, args.port)).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"port {args.port} of {HOST} cannot be used ({one_line(error)}): choose another with --port") from None
    model, processor = load_vlm(args.run, find_device(args.device))
    say_unlike(model, processor.tokenizer)
    step = fast_step(model.language_model)
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks itself whether it is up: never by way of a proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fonts that need no fetching
    name = os.path.basename(os.path.normpath(args.run))
    make_page(gr, lambda: Talk(model, processor.tokenizer, processor, step=step), name).launch(
        server_name=HOST, server_port=args.port, share=False, max_file_size=f"{LARGEST}mb", theme=theme, ssr_mode=False,
        enable_monitoring=False, run_history=False, footer_links=[], quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"http://{HOST}:{args.port} shows {args.run}; Ctrl-C ends it", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    run_cli(main)
