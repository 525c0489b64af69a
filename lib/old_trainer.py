"""Temporary, for scripts that are not yet on lib/run.py.

What the training scripts share: command line, device and precision, schedule, metrics log, progress, save and resume.

A script stays a recipe (settings, data, model, loop); this file holds the parts that are the same in each. Nothing here
calls back into a script. The order of a run is always

    run = Run(args)                         # device, seeds, folder, signals, torchrun
    trainer = Trainer(run, model, ...)      # optimiser, schedule, scaler, EMA, resume
    while not trainer.done():               # the script's own loop: loss = ...; trainer.step(loss)

and of a run in stages the last two lines again for each, with the trainer of the stage before.

Random numbers are a function of (seed, step, rank), set anew at every step: a resumed run draws the same ones as an
uninterrupted run, on any device, without having saved a generator's state.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib.devices import DTYPES
from lib.files import sweep, write_atomic, writing
from lib.memory import MOST_TRIED, along_a_line, mib, peak_bytes, step_memory
from lib.run_state import load_state, save_state

# ---- command line ----------------------------------------------------------------------------------------------------


def argument_parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all training scripts share; `defaults` replaces some of the values below. doc: the script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="PATH", help="where the data are (a file or a folder); without it they are downloaded or built in")
    add("--out", metavar="DIR", help="the run folder; default runs/<script>-<dataset>")
    add("--epochs", type=positive_float, help="passes over the training data; default depends on the data set")
    add("--max-seconds", type=positive_float, help="end the training after so long; the schedule is fitted to it")
    add("--batch-size", type=at_most_a_million, default=64, help="samples per step, over all processes and accumulation")
    add("--grad-accum", type=positive_int, default=1, help="split each batch into so many parts, to save memory")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--weight-decay", type=not_negative_float, default=0.05, help="AdamW's; not for norms, biases and positions")
    add("--warmup", type=not_negative_float, default=0.05, help="part of the run in which the learning rate rises")
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
    add("--workers", type=not_negative_int, default=cores, help="processes or threads that decode pictures, of each process")
    add("--eval-every", type=positive_int, default=500, metavar="STEPS", help="steps between evaluations")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="steps between saved states for --resume")
    add("--resume", action="store_true", help="go on where the run in --out stopped, exactly")
    add("--dry-run", action="store_true", help="say how much memory a step will take, and stop; nothing is written")
    parser.set_defaults(**defaults)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the script's own words, and shows defaults where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


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
positive_float = number(float, lambda v: 0 < v < math.inf, "a number above 0")
not_negative_float = number(float, lambda v: 0 <= v < math.inf, "a number of at least 0")
fraction = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


OUT_OF_MEMORY = (
    "out of memory: lower --batch-size, raise --grad-accum (the same step in smaller parts), pass --grad-checkpoint, or train "
    "less (finetune_vlm.py: --lora or --qlora); --dry-run says what a step takes"
)
NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted", "remote process exited")


def run_cli(main) -> None:
    """Run a script's main(): what the user got wrong becomes one line on stderr and exit code 2, not a traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in NO_MEMORY)
        no_peer = any(words in str(error) for words in PEER_GONE)
        if os.environ.get("TRACEBACK") or (isinstance(error, RuntimeError) and not (no_memory or no_peer)):
            raise
        message = OUT_OF_MEMORY if no_memory else str(error) or type(error).__name__
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
            dist.destroy_process_group()


# ---- the run ---------------------------------------------------------------------------------------------------------


def find_device(name: str | None = None) -> torch.device:
    """The device asked for, or the best there is. Raises ValueError for one that is not there."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's own ways to say that there is none
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):  # "meta" computes nothing, without a word
        raise ValueError(f"--device {name}: this machine or this build of torch has no such device")
    return device


def has_bf16_products(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for bf16 products. With AVX512-BF16 they take less than half of fp32's time
    (docs/speed.md); AMX was not measured."""
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def find_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Precision of the matrix products: the one asked for, or fp16 on CUDA, else fp32. Raises ValueError for fp16 on a CPU."""
    dtype = DTYPES[name or ("fp16" if device.type == "cuda" else "fp32")]
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("--dtype fp16 needs a GPU: on a CPU train in fp32 (the default)")
    return dtype


class Run:
    """Where and how a run happens: processes, device, precision, folder, and the wish to stop."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = find_device(args.device)
        if self.world_size > 1 and not dist.is_initialized():
            # What lies in host memory travels by gloo, and no GPU waits for it. While rank 0 evaluates, the others wait long.
            backends = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backends, timeout=timedelta(hours=3))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if args.fsdp and self.world_size == 1:
            raise ValueError("--fsdp spreads a model over processes: start it with torchrun --nproc-per-node 2 or more")
        self.whole: nn.Module | None = None  # of rank 0 under --fsdp: see place
        if args.batch_size % (self.world_size * args.grad_accum):
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be split over {self.world_size} processes x --grad-accum "
                f"{args.grad_accum}: choose a multiple of {self.world_size * args.grad_accum}"
            )
        self.asked_parts = args.grad_accum
        if args.dry_run:  # parts of one sample, so that memory can be foretold from a few of them
            if self.world_size > 1:
                raise ValueError("--dry-run is for one process: leave torchrun away, and give one process's --batch-size")
            args.grad_accum = args.batch_size
        self.dtype = find_dtype(args.dtype, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

        self.folder = Path(args.out)
        if self.is_main and not args.dry_run:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        self.state = load_state(self.folder) if args.resume else None  # what a stopped run left
        if self.state is not None:
            check_settings(args, self.state.get("settings"))
        self.stop_signal: int | None = None
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self._on_signal)

    def __str__(self) -> str:
        """How and where, for what is printed before the first step."""
        faster = self.dtype == torch.float32 and has_bf16_products(self.device)
        hint = " (--dtype bf16 would be faster on this CPU)" if faster else ""
        limit = f", at most {self.args.max_seconds:g} s" if self.args.max_seconds else ""
        return f"on {self.device} in {self.dtype}{hint}{limit} -> {self.folder}"

    def _on_signal(self, number, frame):
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not even save
        self.stop_signal = number

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def seed_step(self, step: int) -> torch.Generator:
        """Seed torch for this step and return a generator of its own for the augmentation."""
        # A prime stride keeps the streams of neighbouring steps, ranks and seeds apart.
        seed = (self.args.seed * 1_000_003 + step) * 1009 + self.rank
        torch.manual_seed(seed)
        return torch.Generator(device=self.device).manual_seed(seed + 1)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this run's device; with --fsdp sharded, rank 0 keeping a whole copy in host memory, which evaluates
        and is saved (see Trainer.evaluation)."""
        if not self.args.fsdp:
            return model.to(self.device)
        self.whole = copy.deepcopy(model) if self.is_main else None
        return shard(model, self.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in host memory."""
        values = values.detach().cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether it holds in any process."""
        return bool(self.sum(torch.tensor(float(mine))))

    def all(self, mine: bool) -> bool:
        """Whether it holds in every process."""
        return not self.any(not mine)

    def stop_if_asked(self) -> None:
        """Its watcher saves."""

    def barrier(self) -> None:
        """Wait for the other processes: leaving while rank 0 still writes would end the job under it."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block alone, then the others: they find in the cache what it has made there."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)


def everyones(run: Run, values):
    """A tensor's or list's rows of all processes, in their order."""
    if run.world_size == 1:
        return values
    if isinstance(values, torch.Tensor):
        found = [torch.empty_like(values) for _ in range(run.world_size)]
        dist.all_gather(found, values.contiguous())
        return torch.cat(found)
    found = [None] * run.world_size
    dist.all_gather_object(found, values)
    return list(itertools.chain(*found))


def resume_command(args: argparse.Namespace) -> str:
    words = [sys.executable if sys.argv[0].endswith("-c") else "python", *sys.argv]
    return shlex.join(words + ([] if args.resume else ["--resume"]))


# ---- optimiser, schedule, averages -------------------------------------------------------------------------------------


def cosine_schedule(progress: float, warmup: float = 0.05, floor: float = 0.01) -> float:
    """Factor on the peak learning rate at progress 0..1: a straight rise, then half a cosine down to `floor`
    (Loshchilov and Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest))


def parameter_groups(model: nn.Module, weight_decay: float, lr: float, muon_lr: float | None = None) -> list[dict]:
    """What is trained of a model, in groups for make_optimizers. Only matrices decay: norms, biases (both have one axis),
    tokens and positions keep their size. muon_lr: matrices go to Muon, at this learning rate, except for embeddings and a
    head, whose rows are words rather than directions."""
    matrices, decay, keep = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or "position_embedding" in name or "cls_token" in name
            words = "embed" in name or "head" in name
            group = keep if small else matrices if muon_lr and parameter.ndim == 2 and not words else decay
            group.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr": muon_lr, "muon": True},
        {"params": decay, "weight_decay": weight_decay, "lr": lr, "muon": False},
        {"params": keep, "weight_decay": 0.0, "lr": lr, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def make_optimizers(groups: list[dict], betas: tuple[float, float] = (0.9, 0.98)) -> list[torch.optim.Optimizer]:
    """AdamW for the groups of parameter_groups and Muon for those that are meant for it."""
    adam, muon = ([dict(group, initial_lr=group["lr"]) for group in groups if group["muon"] == kind] for kind in (False, True))
    optimizers = [torch.optim.AdamW(adam, betas=betas, fused=True)] if adam else []
    return optimizers + ([Muon(muon)] if muon else [])


class Muon(torch.optim.Optimizer):
    """Momentum whose step for a matrix is made orthogonal, so that it moves all directions alike, rare ones too (Jordan et
    al. 2024). Five Newton-Schulz steps push the singular values to about 1; a tall matrix [out, in] gets sqrt(out / in)
    times the learning rate. Matrices of one shape go together, and in fp32 whatever the run's precision is: see orthogonal."""

    def __init__(self, params, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                directions = [self._direction(p, group["momentum"]) for p in parameters]
                if is_sharded(directions[0]):  # each process needs all of a matrix, and makes the same step of it
                    directions = [direction.full_tensor() for direction in directions]
                steps = orthogonal(torch.stack(directions)).to(parameters[0].dtype)
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                steps = [sharded_like(step, p) for step, p in zip(steps, parameters, strict=True)]
                torch._foreach_add_(parameters, steps, alpha=-rate)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's: the average of the gradients, with this one counted once more."""
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
        gradient = parameter.grad.float()
        state["average"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["average"], momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """fp32 [K, out, in]: each matrix with its singular values brought to about 0.7 to 1.2, unless they were some hundred times
    smaller than its norm. Not in bf16: of a wide matrix the squares of the values would be lost in rounding errors, which
    these steps blow up (docs/speed.md)."""
    tall = x.shape[1] > x.shape[2]
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if tall else x
    slope, cubic, quintic = 3.4445, -4.775, 2.0315  # of s, s^3, s^5: the slope at 0 lifts small singular values fast
    if x.shape[2] < 2 * x.shape[1]:
        for _ in range(5):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=slope)
    else:  # the same for a wide matrix in half the time: steps of its square are multiplied up, and it comes in once
        square, product = x @ x.mT, torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)
        for _ in range(5):
            step = torch.baddbmm(square, square, square, beta=cubic, alpha=quintic)  # and slope times the identity
            product = torch.baddbmm(product, step, product, beta=slope)
            for _ in range(2):
                square = torch.baddbmm(square, step, square, beta=slope)
        x = product @ x
    return x.mT if tall else x


class EMA:
    """An exponential moving average of the weights. In the first steps the decay is smaller, so that it forgets the
    random start: min(decay, (1 + step) / (10 + step))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.own: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, lock=None) -> Iterator[None]:
        """Inside the block, the model has the averaged weights, and `own` has its own. lock: held while they change places."""
        lock = lock or contextlib.nullcontext()
        with torch.no_grad(), lock:
            self.own = {name: p.detach().clone() for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad(), lock:
                for name, p in model.named_parameters():
                    p.copy_(self.own[name])
                self.own = {}


# ---- a model over several processes (FSDP2) ------------------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread every parameter over the processes, rows first (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3). A block of an
    nn.ModuleList is whole while it computes; what stands outside of blocks is whole from the forward to the end of the
    backward pass, and is found so by code that runs between the two. Buffers, 4-bit weights among them, stay with each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [block for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(value) -> bool:
    return hasattr(value, "full_tensor")


def gathered(value, keep: bool):
    """A state with each sharded tensor whole and in host memory, where `keep`; elsewhere without. All processes must call it:
    tensors are gathered one at a time, in the order of the state."""
    if is_sharded(value):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(each, keep) for key, each in value.items()}
    return [gathered(each, keep) for each in value] if isinstance(value, list) else value


def sharded_like(value, own):
    """A whole tensor as this process's part of it, where `own`, of the same shape, is sharded; all else as it is."""
    if not (is_sharded(own) and torch.is_tensor(value) and value.shape == own.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


# ---- metrics -----------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one JSON object a line. Resuming at a step drops the lines of later steps, which will come again."""

    def __init__(self, path: Path, resume_at: int | None = None):
        self.path = path
        kept = [] if resume_at is None else [row for row in self.read() if row["step"] <= resume_at]
        write_atomic(path, lambda tmp: tmp.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"))

    def write(self, **values) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict]:
        """Whole lines only: the last one may have been cut by a kill. Raises ValueError for others that are no rows of ours."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        try:
            rows = [json.loads(line) for line in lines if line]
        except ValueError:
            rows = [None]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError(f"{self.path} has lines that are no JSON object with a step: it is damaged, delete it")
        return rows


def activation_bytes(model: nn.Module, losses: Iterable[torch.Tensor], device: torch.device) -> float:
    """The most memory that a forward and a backward pass take beside weights and gradients: the mean over some of these losses,
    each computed as it is asked for. The model keeps no gradients."""
    dropping = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in model.parameters() if p.requires_grad
    ]
    losses = iter(losses)
    try:
        next(losses).backward()  # what is made once and for all is not counted
        found = []
        for _ in range(MOST_TRIED):
            loss = []

            def forward_and_backward(loss=loss):
                loss.extend(islice(losses, 1))
                if loss:
                    loss[0].backward()

            peak = peak_bytes(forward_and_backward, device)
            if not loss:
                break
            found.append(peak)
    finally:
        for hook in dropping:
            hook.remove()
    if not found:
        raise ValueError("--dry-run compares several samples: give it a --batch-size of 2 or more")
    return sum(found) / len(found)


# ---- the loop's machinery ------------------------------------------------------------------------------------------------

PATIENCE = 1.0  # seconds that a signal waits for the end of a step


def save_when_asked(trainer: "Trainer") -> Callable[[], None]:
    """See to it that Ctrl-C or SIGTERM saves soon, however long a step or an evaluation takes: Python hands a signal to the
    main thread, which may be inside torch for minutes, and a cluster that wants its machine back does not wait so long. A
    thread learns of it from the descriptor that the signal itself writes to. What is returned ends the watch."""
    receive, send = os.pipe()
    os.set_blocking(send, False)
    before, asked = signal.set_wakeup_fd(send, warn_on_full_buffer=False), weakref.ref(trainer)

    def watch() -> None:
        while number := os.read(receive, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM) and (trainer := asked()) is not None:
                if not trainer.leaving.wait(PATIENCE):
                    trainer.save_early()
                del trainer
        os.close(receive)

    def end() -> None:
        signal.set_wakeup_fd(before)
        os.close(send)

    threading.Thread(target=watch, daemon=True).start()
    return end


class Trainer:
    """One optimiser step at a time: the script computes a loss, this does the rest and knows when to stop.

    The schedule runs over total_steps, or over max_seconds if that ends sooner; this and batch_size are the flags' unless
    given. `raw` is the model itself, `model` what to call for training (wrapped for several processes, compiled when asked).
    groups: see parameter_groups; batches: where the data come from, with state_dict, load_state_dict and fraction. A run in
    stages has a trainer for each, given its name and the trainer of the stage before; steps and seconds count on.
    """

    POSITION = ("stage", "first_step", "first_second", "steps_done", "seconds", "total_steps", "skipped")  # of the saved state

    def __init__(
        self, run: Run, model: nn.Module, total_steps: int, groups: list[dict], batches, unit="images",
        stage: str = "", before: "Trainer | None" = None, max_seconds: float | None = None, batch_size: int | None = None,
    ):  # fmt: skip
        args = run.args
        self.run, self.raw, self.total_steps = run, model, total_steps
        self.batches, self.unit, self.stage = batches, unit, stage
        self.max_seconds, self.batch_size = max_seconds or args.max_seconds, batch_size or args.batch_size
        for module in model.modules():
            if hasattr(module, "grad_checkpoint"):
                module.grad_checkpoint = args.grad_checkpoint
        self.optimizers, self.peaks = make_optimizers(groups), [group["lr"] for group in groups]
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.skipped = 0  # steps whose gradients overflowed in fp16
        self.ema = EMA(model, args.ema) if args.ema else None
        self.first_step, self.first_second = (before.steps_done, before.seconds) if before else (0, 0.0)
        self.steps_done, self.seconds = self.first_step, self.first_second
        self._losses, self._loss_from = torch.zeros((), device=run.device), self.steps_done  # since the last line of metrics
        self._bad_step = torch.full((), -1, dtype=torch.long, device=run.device)
        resumed = run.state is not None and run.state["stage"] == stage
        if resumed:
            self._load(run.state)
        self.model = model
        if args.compile and not args.dry_run:
            self.model = torch.compile(self.model)
        if args.fsdp and not any(is_sharded(p) for p in model.parameters()):
            raise ValueError("--fsdp is not for this script: leave it out")
        if run.world_size > 1 and not args.fsdp:  # no buffer changes in training: masks, rotary tables, 4-bit weights
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        keep = self.steps_done if resumed or before else None
        self.metrics = Metrics(run.folder / "metrics.jsonl", keep) if run.is_main and not args.dry_run else None
        # Killed in an evaluation, a run has saved the step before it but not what it found: it is to come first.
        self._due = resumed and run.any(self.metrics is not None and self._lacks_evaluation())
        self._tried: dict[int, float] = {}  # of --dry-run: bytes of activations by the number of samples
        self._since = (self.steps_done, time.perf_counter())
        self._clock = time.perf_counter()
        bar = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "desc": stage or None}
        self.bar = tqdm(total=total_steps, initial=self.steps_done - self.first_step, disable=self.metrics is None, **bar)
        self._lock = threading.RLock()  # held while what is saved changes
        self.leaving = threading.Event()  # set before the last save
        self._settle()
        # Several processes can save between two steps only: they must all agree to.
        watched = self.metrics is not None and run.world_size == 1 and os.name == "posix"
        self._end_watch = save_when_asked(self) if watched else lambda: None

    @property
    def progress(self) -> float:
        """How much of the run, or of this stage, is done, 0..1, in steps or in time, whichever is further."""
        part = (self.steps_done - self.first_step) / self.total_steps if self.total_steps else 1.0
        return max(part, (self.seconds - self.first_second) / self.max_seconds) if self.max_seconds else part

    def done(self) -> bool:
        """True at the end. After Ctrl-C or SIGTERM: save, say how to go on, leave with 128 + the signal's number."""
        if self.run.any(self.run.stop_signal is not None):
            self._save_and_leave()
            self.bar.close()
            self.run.print(f"stopped after step {self.steps_done}; go on with: {resume_command(self.run.args)}")
            sys.exit(128 + (self.run.stop_signal or signal.SIGTERM))
        # With a time limit each process has its own clock: they must agree to stop at the same step.
        over = self.progress >= 1 and not self._due
        return self.run.any(over) if self.max_seconds else over

    def _lacks_evaluation(self) -> bool:
        rows = [row for row in self.metrics.read() if row["step"] == self.steps_done and "lr" not in row]
        return not rows and self.steps_done > self.first_step and self.steps_done % self.run.args.eval_every == 0

    def evaluates(self) -> bool:
        """Whether this process is to evaluate after this step. All must ask: see _gather."""
        if self.run.args.dry_run or self.steps_done % self.run.args.eval_every:
            return False
        self._gather()
        return self.run.is_main

    def _gather(self) -> None:
        """Under --fsdp, bring the weights of rank 0's whole copy up to date, those that evaluation is to use."""
        if self.run.args.fsdp:
            newest = self.ema.weights if self.ema else dict(self.raw.named_parameters())
            whole = dict(self.run.whole.named_parameters()) if self.run.is_main else {}
            for name, weight in newest.items():
                weight = gathered(weight.detach(), self.run.is_main)
                if name in whole:
                    whole[name].data.copy_(weight)

    def step(self, losses: Iterable[torch.Tensor]) -> None:
        """One step from the losses of its grad_accum parts, each computed as it is asked for (so that only one part's
        activations live at a time). None is taken, and no loss asked for, where an evaluation is due first."""
        args, run = self.run.args, self.run
        if args.dry_run:
            return self._foretell(losses)
        if self._due:
            self._due = False
            return
        factor = cosine_schedule(max(self.progress, 1 / self.total_steps), args.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        total = torch.zeros((), device=run.device)
        for i, loss in enumerate(losses):
            last = i == args.grad_accum - 1
            waits = not last and isinstance(self.model, DistributedDataParallel)  # gradients are exchanged once a step
            sync = self.model.no_sync() if waits else contextlib.nullcontext()
            with sync:
                self.scaler.scale(loss / args.grad_accum).backward()
            total += loss.detach() / args.grad_accum
        with self._lock:
            self._take_step(total)
            if self.steps_done % 20 == 0 or self.progress >= 1:
                self._log(factor)
            self._settle()
            if self.steps_done % args.save_every == 0:
                self.save()

    def _take_step(self, loss: torch.Tensor) -> None:
        """What changes the weights, now that the gradients are there."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), self.run.args.clip)
        overflow = self.scaler.is_enabled() and not (norm.full_tensor() if is_sharded(norm) else norm).isfinite()
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        # All optimisers and all processes skip together: clipping has spread what is not finite over all gradients, and the
        # scaler would look at one optimiser's, of one process, at a time.
        self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor() if overflow else None)
        self.skipped += int(overflow)

        self.steps_done += 1
        if self.ema:
            self.ema.update(self.raw, self.steps_done)
        self._losses += loss
        self._bad_step = torch.where((self._bad_step < 0) & ~loss.isfinite(), self.steps_done, self._bad_step)
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self.bar.update()

    def _settle(self) -> None:
        """Note what the next step will change before it is taken: where the data stand, and what modules count."""
        self._data = copy.deepcopy(self.batches.state_dict())
        counting = type(self.raw).get_extra_state is not nn.Module.get_extra_state
        self._counted = {"_extra_state": self.raw.get_extra_state()} if counting else {}

    def _foretell(self, losses: Iterable[torch.Tensor]) -> None:
        """In place of a step: what it would take, from parts of one sample and, in the next call, of several."""
        args, run = self.run.args, self.run
        count, batch = args.batch_size // run.asked_parts, args.batch_size
        self._tried[batch // args.grad_accum] = activation_bytes(self.raw, losses, run.device)
        several = max(n for n in range(1, 9) if batch % n == 0 and n <= count and (n == 1 or n <= batch // 2))
        self.steps_done += 1
        if several not in self._tried:
            args.grad_accum = self.batches.grad_accum = batch // several  # some batches come in parts
            return
        activations = along_a_line(self._tried, count)
        found = step_memory(self.raw, self.optimizers, activations, 2 if args.ema else 1, wait=run.asked_parts > 1)
        there = ""
        if run.device.type == "cuda":
            there = f", of {mib(torch.cuda.mem_get_info(run.device)[1])} that there are"
        run.print(f"a step{f' of stage {self.stage}' if self.stage else ''}, MiB: {found}{there}")
        self.total_steps = self.steps_done - self.first_step  # done
        args.grad_accum = self.batches.grad_accum = batch  # for the next stage

    def _log(self, factor: float) -> None:
        """Every 20 steps: looking at a loss makes a GPU wait, so it is not done more often."""
        self._losses.copy_(self._mean_losses())
        self._check_finite()
        steps, started = self._since
        speed = (self.steps_done - steps) * self.batch_size / max(1e-9, time.perf_counter() - started)
        loss = float(self._losses) / (self.steps_done - self._loss_from)
        self._losses.zero_()
        self._loss_from = self.steps_done
        self._since = (self.steps_done, time.perf_counter())
        if self.run.is_main:
            self.metrics.write(
                step=self.steps_done,
                seconds=round(self.seconds, 2),
                epoch=round(self.batches.fraction, 3),
                loss=round(loss, 6),
                lr=factor * max(self.peaks),
                **{f"{self.unit}_per_second": round(speed, 1)},
                **({"skipped": self.skipped} if self.scaler.is_enabled() else {}),
            )
            if self.max_seconds:  # for the time left that the bar shows
                done = self.steps_done - self.first_step
                self.bar.total = max(done, round(done / min(1.0, self.progress)))
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {self.unit}/s")

    def _mean_losses(self) -> torch.Tensor:
        """Each process knows the loss of its own samples only."""
        return self.run.sum(self._losses) / self.run.world_size

    def _check_finite(self) -> None:
        """In all processes, whichever met it: none may save what another's gradients have spoiled."""
        if self.run.world_size > 1:
            self._bad_step.fill_(max(everyones(self.run, [int(self._bad_step)])))
        if self._bad_step >= 0:
            raise FloatingPointError(
                f"the loss is not finite at step {int(self._bad_step)}: try a lower --lr (now {max(self.peaks):g}) or "
                "--dtype fp32; a state saved earlier is still good for --resume"
            )

    def log(self, **figures: float) -> None:
        """Figures of an evaluation, into metrics.jsonl, unless they are there from before a kill, and onto the screen."""
        if not figures:
            return
        row = {"step": self.steps_done, "seconds": round(self.seconds, 2), **{k: round(v, 6) for k, v in figures.items()}}
        if not any(there["step"] == self.steps_done and there.keys() == row.keys() for there in self.metrics.read()):
            self.metrics.write(**row)
        self.bar.write(f"step {self.steps_done}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))

    def close(self) -> None:
        """After the last step: the state that --resume would find is the end."""
        self._save_and_leave()
        self._gather()
        self.bar.close()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Inside the block: eval mode, no gradients, averaged weights if there are any. Its time counts as training time.
        Yields the model to use there: `raw`, or under --fsdp rank 0's whole copy of it, on the device for so long."""
        whole = self.run.whole
        model = self.raw if whole is None else whole.to(self.run.device)
        model.eval()
        averaged = self.ema.applied(model, self._lock) if self.ema and whole is None else contextlib.nullcontext()
        with torch.no_grad(), averaged:
            yield model
        model.train()
        if whole is not None:
            whole.cpu()
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self._since = (self.steps_done, now)

    def save(self) -> None:
        """state.pt, by rank 0: whole tensors, whatever number of processes they are spread over, and any number can go on."""
        self._check_finite()
        if self.run.args.dry_run:
            return
        state = {
            "settings": comparable_settings(self.run.args),
            "model": self._weights(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.weights if self.ema else {},
            "batches": self._data,
            "loss_sum": self._mean_losses(),
            "loss_from": self._loss_from,
            **{key: getattr(self, key) for key in self.POSITION},
        }
        state = gathered(state, self.run.is_main) if self.run.args.fsdp else state
        if self.run.is_main:
            save_state(self.run.folder, state)

    def _weights(self) -> dict:
        """The model's state after the last whole step, in the middle of the next one and of an evaluation too."""
        state = self.raw.state_dict(keep_vars=True)
        own = self.ema.own if self.ema else {}
        names = {id(p): name for name, p in self.raw.named_parameters()} if own else {}
        return {key: own.get(names.get(id(value)), value.detach()) for key, value in state.items()} | self._counted

    def _save_and_leave(self) -> None:
        with self._lock:
            self.leaving.set()
            self._end_watch()
            self.save()

    def save_early(self) -> None:
        """From another thread, in the middle of a step or an evaluation: the state after the last whole step."""
        with self._lock:
            if not self.leaving.is_set() and self._bad_step < 0:
                with contextlib.suppress(OSError):  # done() will meet it too, and say so
                    self.save()
                    self.run.print(f"saved after step {self.steps_done}; leaving when this step or evaluation is over")

    def _load(self, state: dict) -> None:
        """Raises ValueError for a state of other data, or that does not fit the model."""
        try:
            self.batches.load_state_dict(state["batches"])  # first: other data may mean another model
            self._load_weights(state)
            self._losses.copy_(state["loss_sum"])
            self._loss_from = state["loss_from"]
            for key in self.POSITION:
                setattr(self, key, state[key])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            hint = "is it another's? Start again without --resume"
            raise ValueError(f"{self.run.folder / 'state.pt'} does not fit this run ({reason}): {hint}") from None

    def _load_weights(self, state: dict) -> None:
        own = self.raw.state_dict()
        self.raw.load_state_dict({name: sharded_like(tensor, own.get(name)) for name, tensor in state["model"].items()})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {i: {k: sharded_like(v, trained[i]) for k, v in each.items()} for i, each in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": parts})
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            weights = {name: tensor.to(self.run.device) for name, tensor in state["ema"].items()}
            self.ema.weights = {name: sharded_like(tensor, own[name]) for name, tensor in weights.items()}


def check_settings(args: argparse.Namespace, saved: dict | None) -> None:
    """Raises ValueError where the saved run was started with others."""
    if not isinstance(saved, dict):
        raise ValueError(f"{Path(args.out) / 'state.pt'} is no state of a run: start again without --resume")
    for key, value in comparable_settings(args).items():
        if saved.get(key) != value:
            raise ValueError(
                f"--{key.replace('_', '-')} is {value!r}, the run in {args.out} was started with {saved.get(key)!r}: "
                "resume with the same settings, or choose another --out"
            )


def comparable_settings(args: argparse.Namespace) -> dict:
    """The settings that must not change between a run and its resumption: all but those that say where or how often."""
    free = {"resume", "out", "data", "images", "test_data", "device", "workers", "compile", "fsdp", "max_seconds"}
    free |= {"eval_every", "save_every"}
    return {key: value for key, value in vars(args).items() if key not in free}
