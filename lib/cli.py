"""The command line that the scripts share: common flags, argparse types, and errors as one line."""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm

from lib.devices import DTYPES
from lib.distributed import end_processes
from lib.files import words_of
from lib.loggers import LOGS


class Parser(argparse.ArgumentParser):
    """A script's own words above its flags, as they are written, and no abbreviations of these. An empty value, which a shell
    makes of a variable that is not set, is an error: most flags would count as left out."""

    def __init__(self, doc: str | None = None, **more):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **more)
        self.register("type", None, not_empty)
        self.register("type", Path, lambda text: Path(not_empty(text)))

    def error(self, message: str):
        """One line, without argparse's twenty of usage above it."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give it a value, or leave it out")
    return text


def png_file(text: str) -> str:
    """Where a figure is to be written: no file of another kind is to be lost by it."""
    if Path(not_empty(text)).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: figures are .png files")
    return text


def argument_parser(doc: str, **defaults) -> Parser:
    """The flags that all training scripts share; `defaults` replaces some of the values below. doc: the script's own."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--data", metavar="PATH", help="where the data are (a file or a folder); without it they are downloaded or built in")
    add("--out", metavar="DIR", help="the run folder; default: runs/ and a name of its own")
    add("--epochs", type=positive_float, help="passes over the training data; default depends on the data set")
    add("--max-seconds", type=positive_float, help="end the training after so long; the schedule is fitted to it")
    add("--batch-size", type=at_most_a_million, default=64, help="samples per step, over all processes and accumulation")
    add("--grad-accum", type=positive_int, default=1, help="split each batch into so many parts, to save memory")
    add("--lr", type=positive_float, help="AdamW's peak learning rate; most matrices have Muon's, if there is --muon-lr")
    add("--weight-decay", type=not_negative_float, default=0.05, help="not for norms, biases and positions")
    add("--warmup", type=fraction, default=0.05, help="part of the run in which the learning rate rises")
    add("--clip", type=positive_float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=fraction, default=0.0, help="decay of an averaged copy of the weights, e.g. 0.999; 0: none")
    add("--seed", type=not_negative_int, default=0)
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--dtype", choices=DTYPES, help="precision of the matrix products; default fp16 on CUDA, else fp32")
    add("--compile", action="store_true", help="torch.compile the model: slower to start, faster on a GPU")
    add("--grad-checkpoint", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--fsdp", action="store_true", help="under torchrun: spread weights, gradients and averages over the processes "
        "(FSDP2), for models that do not fit")  # fmt: skip
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--workers", type=not_negative_int, default=cores, help="processes or threads that decode images, of each process")
    add("--eval-every", type=positive_int, default=500, metavar="STEPS", help="steps between evaluations")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="steps between saved states for --resume")
    add("--log", action="append", choices=LOGS, help="write the figures there as well; may be given twice")
    add("--resume", action="store_true", help="go on where the run in --out stopped, exactly")
    add("--dry-run", action="store_true", help="say how much memory a step will take, and stop; nothing is written")
    parser.set_defaults(**defaults)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the script's own words, and shows defaults where there is one and the help does not."""

    def _get_help_string(self, action):
        told = action.default in (None, False) or "default" in action.help
        return action.help if told else super()._get_help_string(action)


def number(kind, good, what):
    """An argparse type: kind(text) for which good(value) holds, else an error that says what it must be."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} must be {what}")
        return value

    return parse


positive_int = number(int, lambda v: 1 <= v < 2**31, "a whole number of at least 1 and below 2^31")
not_negative_int = number(int, lambda v: 0 <= v < 2**31, "a whole number of at least 0 and below 2^31")
at_most_a_million = number(int, lambda v: 1 <= v <= 2**20, "a whole number of at least 1 and at most 2^20")
positive_float = number(float, lambda v: 0 < v < 2.0**127, "a number above 0 and below 2^127")  # what a float32 holds
not_negative_float = number(float, lambda v: 0 <= v < 2.0**127, "a number of at least 0 and below 2^127")
fraction = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


OUT_OF_MEMORY = (
    "out of memory: lower --batch-size or --image-size, raise --grad-accum (the same step in smaller parts), pass "
    "--grad-checkpoint, or train less (finetune_vlm.py: --lora or --qlora); --dry-run says what a step takes"
)
NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted", "remote process exited")


def run_cli(main) -> None:
    """Run a script's main(): what the user got wrong becomes one line on stderr and exit code 2, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal's or a pipe's encoding lacks is written as \u..., and ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in NO_MEMORY)
        no_peer = any(words in str(error) for words in PEER_GONE)
        if os.environ.get("TRACEBACK") or (isinstance(error, RuntimeError) and not (no_memory or no_peer)):
            raise
        message = OUT_OF_MEMORY if no_memory else words_of(error)
        if no_peer:
            message = "another process of this job has ended: its error is above or in its own log"
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            message = f"process {os.environ['RANK']}: {message}"
            if not no_peer:
                get_error_handler().record_exception(error)  # torchrun ends with it
        tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)  # on a line of its own, below any progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            end_processes()
