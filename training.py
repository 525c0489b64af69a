"""What the training scripts share: command line, device and precision, schedule, metrics log, progress, save and resume.

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
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import load_state, save_state, write_atomic

# ---- command line ----------------------------------------------------------------------------------------------------


def argument_parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """The flags that all training scripts share; `defaults` replaces some of the values below. doc: the script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="PATH", help="where the data are (a file or a folder); without it they are downloaded or built in")
    add("--out", metavar="DIR", help="the run folder; default runs/<script>-<dataset>")
    add("--epochs", type=positive_float, help="passes over the training data; default depends on the data set")
    add("--max-seconds", type=positive_float, help="end the training after so long; the schedule is fitted to it")
    add("--batch-size", type=positive_int, default=64, help="samples per step, over all processes and accumulation")
    add("--grad-accum", type=positive_int, default=1, help="split each batch into so many parts, to save memory")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--weight-decay", type=not_negative_float, default=0.05, help="AdamW's; not for norms, biases and positions")
    add("--warmup", type=not_negative_float, default=0.05, help="part of the run in which the learning rate rises")
    add("--clip", type=positive_float, default=1.0, help="largest norm of the gradient")
    add("--ema", type=not_negative_float, default=0.0, help="decay of an averaged copy of the weights, e.g. 0.999; 0: none")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="precision of the matrix products; default fp16 on CUDA, else fp32")
    add("--compile", action="store_true", help="torch.compile the model: slower to start, faster on a GPU")
    add("--grad-checkpoint", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--workers", type=not_negative_int, default=os.cpu_count() or 1, help="processes or threads that decode pictures")
    add("--eval-every", type=positive_int, default=500, metavar="STEPS", help="steps between evaluations")
    add("--save-every", type=positive_int, default=500, metavar="STEPS", help="steps between saved states for --resume")
    add("--resume", action="store_true", help="go on where the run in --out stopped, exactly")
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
        if value is None or not math.isfinite(value) or not good(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return parse


positive_int = number(int, lambda v: v >= 1, "a whole number of at least 1")
not_negative_int = number(int, lambda v: v >= 0, "a whole number of at least 0")
positive_float = number(float, lambda v: v > 0, "a number above 0")
not_negative_float = number(float, lambda v: v >= 0, "a number of at least 0")


def run_cli(main) -> None:
    """Run a script's main(): what the user got wrong becomes one line on stderr and exit code 2, not a traceback."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of memory: lower --batch-size, raise --grad-accum, or pass --grad-checkpoint"
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
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's own ways to say that there is none
        raise ValueError(f"--device {name}: this machine or this build of torch has no such device") from None
    return device


class Run:
    """Where and how a run happens: processes, device, precision, folder, and the wish to stop."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = find_device(args.device)
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if args.batch_size % (self.world_size * args.grad_accum):
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be split over {self.world_size} processes x --grad-accum "
                f"{args.grad_accum}: choose a multiple of {self.world_size * args.grad_accum}"
            )
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
        if self.dtype is None:
            self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("--dtype fp16 needs a GPU: on a CPU train in fp32 (the default)")
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

        self.folder = Path(args.out)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.state = load_state(self.folder) if args.resume else None  # what a stopped run left
        if self.state:
            check_settings(args, self.state["settings"])
        self.stop_signal: int | None = None
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self._on_signal)

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

    def barrier(self) -> None:
        """Wait for the other processes: leaving while rank 0 still writes would end the job under it."""
        if self.world_size > 1:
            dist.barrier()

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)


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
    times the learning rate. Matrices of one shape go together and in fp32: on a CPU torch.optim.Muon, one matrix at a time
    and in bf16, took 30 times as long."""

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
                steps = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in parameters]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(steps.to(parameters[0].dtype)), alpha=-rate)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's: the average of the gradients, with this one counted once more."""
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter, dtype=torch.float32)
        gradient = parameter.grad.float()
        state["average"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["average"], momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """[K, out, in]: each matrix with its singular values brought to about 0.7 to 1.2, unless they were some hundred times
    smaller than its norm."""
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

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, the model has the averaged weights."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(own[name])


# ---- metrics -----------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one JSON object a line. Resuming at a step drops the lines of later steps, which will come again."""

    def __init__(self, path: Path, resume_at: int | None = None):
        self.path = path
        kept = "" if resume_at is None else "".join(row + "\n" for row in self._lines() if json.loads(row)["step"] <= resume_at)
        write_atomic(path, lambda tmp: tmp.write_text(kept, encoding="utf-8"))

    def _lines(self) -> Iterable[str]:
        """Whole lines only: the last one may have been cut by a kill."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text(encoding="utf-8").split("\n")[:-1] if line]

    def write(self, **values) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self._lines()]


# ---- the loop's machinery ------------------------------------------------------------------------------------------------


class Trainer:
    """One optimiser step at a time: the script computes a loss, this does the rest and knows when to stop.

    The schedule runs over total_steps, or over max_seconds if that ends sooner; this and batch_size are the flags' unless
    given. `raw` is the model itself, `model` what to call for training (wrapped for several processes, compiled when asked).
    groups: see parameter_groups; batches: where the data come from, with state_dict, load_state_dict and fraction. A run in
    stages has a trainer for each, given its name and the trainer of the stage before; steps and seconds count on.
    """

    POSITION = ("stage", "first_step", "first_second", "steps_done", "seconds", "total_steps")  # of the saved state

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
        self.ema = EMA(model, args.ema) if args.ema else None
        self.first_step, self.first_second = (before.steps_done, before.seconds) if before else (0, 0.0)
        self.steps_done, self.seconds = self.first_step, self.first_second
        self._losses, self._loss_from = torch.zeros((), device=run.device), self.steps_done  # since the last line of metrics
        self._bad_step = torch.full((), -1, dtype=torch.long, device=run.device)
        resumed = run.state is not None and run.state["stage"] == stage
        if resumed:
            self._load(run.state)
        self.model = model
        if args.compile:
            self.model = torch.compile(self.model)
        if run.world_size > 1:
            self.model = DistributedDataParallel(self.model)
        keep = self.steps_done if resumed or before else None
        self.metrics = Metrics(run.folder / "metrics.jsonl", keep) if run.is_main else None
        self._since = (self.steps_done, time.perf_counter())
        self._clock = time.perf_counter()
        bar = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "desc": stage or None}
        self.bar = tqdm(total=total_steps, initial=self.steps_done - self.first_step, disable=not run.is_main, **bar)

    @property
    def progress(self) -> float:
        """How much of the run, or of this stage, is done, 0..1, in steps or in time, whichever is further."""
        part = (self.steps_done - self.first_step) / self.total_steps
        return max(part, (self.seconds - self.first_second) / self.max_seconds) if self.max_seconds else part

    def done(self) -> bool:
        """True at the end. After Ctrl-C or SIGTERM: save, say how to go on, leave with 128 + the signal's number."""
        if self._agree(self.run.stop_signal is not None):
            self.save()
            self.bar.close()
            self.run.print(f"stopped after step {self.steps_done}; go on with: {resume_command(self.run.args)}")
            sys.exit(128 + (self.run.stop_signal or signal.SIGTERM))
        # With a time limit each process has its own clock: they must agree to stop at the same step.
        over = self.progress >= 1
        return self._agree(over) if self.max_seconds else over

    def _agree(self, mine: bool) -> bool:
        if self.run.world_size == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.run.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def step(self, losses: Iterable[torch.Tensor]) -> None:
        """One step from the losses of its grad_accum parts, each computed as it is asked for (so that only one part's
        activations live at a time)."""
        args, run = self.run.args, self.run
        factor = cosine_schedule(max(self.progress, 1 / self.total_steps), args.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        total = torch.zeros((), device=run.device)
        for i, loss in enumerate(losses):
            last = i == args.grad_accum - 1
            sync = contextlib.nullcontext() if last or run.world_size == 1 else self.model.no_sync()
            with sync:
                self.scaler.scale(loss / args.grad_accum).backward()
            total += loss.detach() / args.grad_accum
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.raw.parameters(), args.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

        self.steps_done += 1
        if self.ema:
            self.ema.update(self.raw, self.steps_done)
        self._losses += total
        self._bad_step = torch.where((self._bad_step < 0) & ~total.isfinite(), self.steps_done, self._bad_step)
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self.bar.update()
        if self.steps_done % 20 == 0 or self.progress >= 1:
            self._log(factor)
        if self.steps_done % args.save_every == 0:
            self.save()

    def _log(self, factor: float) -> None:
        """Every 20 steps: looking at a loss makes a GPU wait, so it is not done more often."""
        if self.run.world_size > 1:  # each process knows the loss of its own samples only
            dist.all_reduce(self._losses)
            self._losses /= self.run.world_size
            dist.all_reduce(self._bad_step, op=dist.ReduceOp.MAX)
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
            )
            if self.max_seconds:  # for the time left that the bar shows
                done = self.steps_done - self.first_step
                self.bar.total = max(done, round(done / min(1.0, self.progress)))
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {self.unit}/s")

    def _check_finite(self) -> None:
        if self._bad_step >= 0:
            raise FloatingPointError(
                f"the loss is not finite at step {int(self._bad_step)}: try a lower --lr (now {max(self.peaks):g}) or "
                "--dtype fp32; a state saved earlier is still good for --resume"
            )

    def log(self, **figures: float) -> None:
        """Figures of an evaluation, into metrics.jsonl and onto the screen."""
        self.metrics.write(step=self.steps_done, seconds=round(self.seconds, 2), **{k: round(v, 6) for k, v in figures.items()})
        self.bar.write(f"step {self.steps_done}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))

    def close(self) -> None:
        """After the last step: the state that --resume would find is the end."""
        self.save()
        self.bar.close()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside the block: eval mode, no gradients, averaged weights if there are any. Its time counts as training time."""
        self.raw.eval()
        with torch.no_grad(), self.ema.applied(self.raw) if self.ema else contextlib.nullcontext():
            yield
        self.raw.train()
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self._since = (self.steps_done, now)

    def save(self) -> None:
        self._check_finite()
        if not self.run.is_main:
            return
        save_state(
            self.run.folder,
            {
                "settings": comparable_settings(self.run.args),
                "model": self.raw.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.weights if self.ema else {},
                "batches": self.batches.state_dict(),
                "loss_sum": self._losses,
                "loss_from": self._loss_from,
                **{key: getattr(self, key) for key in self.POSITION},
            },
        )

    def _load(self, state: dict) -> None:
        self.raw.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.weights = {name: tensor.to(self.run.device) for name, tensor in state["ema"].items()}
        self.batches.load_state_dict(state["batches"])
        self._losses.copy_(state["loss_sum"])
        self._loss_from = state["loss_from"]
        for key in self.POSITION:
            setattr(self, key, state[key])


def check_settings(args: argparse.Namespace, saved: dict) -> None:
    """Raises ValueError where the saved run was started with others."""
    for key, value in comparable_settings(args).items():
        if saved.get(key) != value:
            raise ValueError(
                f"--{key.replace('_', '-')} is {value!r}, the run in {args.out} was started with {saved.get(key)!r}: "
                "resume with the same settings, or choose another --out"
            )


def comparable_settings(args: argparse.Namespace) -> dict:
    """The settings that must not change between a run and its resumption: all but those that say where or how often."""
    free = {"resume", "out", "data", "images", "test_data", "device", "workers", "compile", "max_seconds"}
    free |= {"eval_every", "save_every"}
    return {key: value for key, value in vars(args).items() if key not in free}
