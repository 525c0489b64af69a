"""A training run: device, precision, processes, folder; its steps, which are logged, saved and resumed; evaluations.

The loop stands in the script, which calls the model, `backward` and the optimizers; this file hides what is the same in each:

    run = Run(args)
    model = run.place(model)
    for step in run.steps(stage, total_steps, batches, optimizers):
        if run.evaluates(step):
            with run.evaluation() as eval_model:
                run.log(test_accuracy=...)
        set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
        run.seed_step(step)
        for batch in run.parts(with_shares(run, next(batches))):
            with run.autocast():
                loss = run.model(**batch)
            run.scaler.scale(loss).backward()
            run.loss += loss.detach()
        run.clip_and_step(optimizers, args.clip)      # before it, where run.logs(step): run.log_with(grad_norm=...)

Random numbers are a function of (seed, step, rank), set anew at every step: a resumed run draws the same ones as an
uninterrupted run, on any device, without having saved a generator's state.
"""

import argparse
import contextlib
import copy
import math
import os
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

from lib.devices import find_device, find_dtype, has_bf16_products, to_device
from lib.distributed import all_gather, data_parallel, gathered, is_sharded, shard, sharded_like, start_processes
from lib.folder_lock import take_folder
from lib.loggers import check_installed, open_logs
from lib.memory import DryRun, mib, recompute_blocks
from lib.metrics import Metrics
from lib.optim import EMA
from lib.run_state import (
    check_folder,
    check_settings,
    comparable_settings,
    kept_state,
    load_state,
    remove_earlier,
    resume_command,
    save_state,
)

LOG_EVERY = 20  # steps: looking at a loss makes a GPU wait, so it is not done more often


class StopAskedFor(Exception):
    """Raised between the batches of an evaluation, caught where the evaluation ends."""


class Run:
    """`raw` is the model itself, `model` what to call for training (wrapped for several processes, compiled when asked), and
    `loss` the loss of this step, to which its parts are added."""

    # ---- where and how ----

    def __init__(self, args: argparse.Namespace):
        """Raises ValueError for settings that do not go together, and for a folder that cannot be resumed from."""
        self.args = args
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = find_device(args.device)
        if self.world_size > 1 and not dist.is_initialized():
            start_processes(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if args.fsdp and self.world_size == 1:
            raise ValueError("--fsdp spreads a model over processes: start it with torchrun --nproc-per-node 2 or more")
        if args.batch_size % (self.world_size * args.grad_accum):
            raise ValueError(
                f"--batch-size {args.batch_size} cannot be split over {self.world_size} processes x --grad-accum "
                f"{args.grad_accum}: choose a multiple of {self.world_size * args.grad_accum}"
            )
        if args.dry_run and self.world_size > 1:
            raise ValueError("--dry-run is for one process: leave torchrun away, and give one process's --batch-size")
        self.dtype = find_dtype(args.dtype, self.device)
        self.dry = DryRun(args, self.device) if args.dry_run else None

        self.folder, self.began = Path(args.out), time.time()
        if not args.dry_run:
            check_folder(self.folder, args)
            if self.is_main:
                take_folder(self.folder)
        self.settings = comparable_settings(args)  # as they were given: a script may fit some to its data
        self.state = load_state(self.folder) if args.resume else None  # what a stopped run left
        if self.state is not None:
            check_settings(self.folder, self.settings, self.state.get("settings"))
        self.metrics: Metrics | None = None  # of rank 0
        if args.log:
            check_installed(args.log)
        self.whole: nn.Module | None = None  # of rank 0 under --fsdp: see place
        self.steps_done, self.seconds, self.skipped = 0, 0.0, 0  # skipped: steps whose gradients overflowed in fp16
        self.stop_signal: int | None = None
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self._on_signal)

    def compare_data(self, **known_by) -> None:
        """Facts about the data that a resumed run must find again, such as its classes. Raises ValueError."""
        self.settings |= known_by
        for name, value in known_by.items() if self.state is not None else ():
            if (then := self.state["settings"].get(name)) != value:
                raise ValueError(f"cannot resume: {name} are {value!r:.200}, when the run was started they were {then!r:.200}")

    def __str__(self) -> str:
        """How and where, for what is printed before the first step."""
        faster = self.dtype == torch.float32 and has_bf16_products(self.device)
        hint = " (--dtype bf16 would be faster on this CPU)" if faster else ""
        limit = f", at most {self.args.max_seconds:g} s" if self.args.max_seconds else ""
        return f"on {self.device} in {self.dtype}{hint}{limit} -> {self.folder}"

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this run's device; with --fsdp sharded, rank 0 keeping a whole copy in host memory, which evaluates
        and is saved (see evaluation)."""
        self.whole = copy.deepcopy(model) if self.args.fsdp and self.is_main else None
        if self.args.grad_checkpoint:
            recompute_blocks(model)
        self.raw = shard(model, self.device) if self.args.fsdp else model.to(self.device)
        return self.raw

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

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)

    # ---- several processes ----

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

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def finish(self) -> None:
        """The end of a script. Leaving while rank 0 still writes would end the job under it."""
        if self.metrics is not None:
            self.metrics.finish(self.steps_done)
            if not self.args.resume:
                remove_earlier(self.folder, self.began)
        self.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block alone, then the others: they find in the cache what it has made there."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    # ---- the loop ----

    def steps(
        self, stage: str, total_steps: int, batches, optimizers: list[torch.optim.Optimizer], unit: str = "images",
        batch_size: int | None = None, max_seconds: float | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The numbers of the steps of a stage, counted on from the stages before. A resumed run skips the stages and steps that
        it has behind it. The state is saved every --save-every steps and at the end.

        It ends after total_steps, or after max_seconds if that is sooner; this and batch_size are the flags' unless given.
        batches: where the data come from, with state_dict, load_state_dict and fraction. Ctrl-C or SIGTERM ends the run, with
        the exit code 128 + the signal's number, after the step is done and saved. Raises FloatingPointError, naming the step,
        after a loss that is not finite.
        """
        if self.state is not None and self.state["stage"] != stage:
            return
        self._begin(stage, total_steps, batches, optimizers, unit, batch_size, max_seconds)
        while not self._is_over():
            self.loss.zero_()
            yield self.steps_done
            if self.dry is None:
                self._end_step()
        self._save()
        self._gather()
        self.bar.close()
        self.model = self.raw  # the wrapper keeps the processes' group alive: see end_processes

    def _begin(self, stage, total_steps, batches, optimizers, unit, batch_size, max_seconds) -> None:
        args = self.args
        self.stage, self.total_steps, self.batches, self.optimizers, self.unit = stage, total_steps, batches, optimizers, unit
        self.batch_size, self.max_seconds = batch_size or args.batch_size, max_seconds or args.max_seconds
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema = EMA(self.raw, args.ema) if args.ema else None
        self.first_step, self.first_second, self.skipped = self.steps_done, self.seconds, 0
        self.loss = torch.zeros((), device=self.device)
        self._losses, self._loss_from = torch.zeros((), device=self.device), self.steps_done  # since the last line of metrics
        self._bad_step = torch.full((), -1, dtype=torch.long, device=self.device)
        self._more_figures: dict[str, float] = {}
        resumed = self.state is not None
        if resumed:
            self._load(self.state)
            self.state = None
        if self.dry is not None:
            self.total_steps = max(2, total_steps)  # it compares two
            self.dry.begin(self.raw, batches)
        elif self.is_main and self.metrics is None:
            logs = open_logs(args.log, self.folder, vars(args), resumed) if args.log else ()
            self.metrics = Metrics(self.folder / "metrics.jsonl", self.steps_done if resumed else None, logs)
        self.raw.train()
        self.model = torch.compile(self.raw) if args.compile and self.dry is None else self.raw
        if args.fsdp and not any(is_sharded(p) for p in self.raw.parameters()):
            raise ValueError("--fsdp is not for this script: leave it out")
        if self.world_size > 1 and not args.fsdp:
            self.model = data_parallel(self.model)
        self._clock = time.perf_counter()
        self._since = (self.steps_done, self._clock)
        bar = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "desc": stage or None}
        self.bar = tqdm(total=total_steps, initial=self.steps_done - self.first_step, disable=self.metrics is None, **bar)

    def _part_done(self) -> float:
        part = (self.steps_done - self.first_step) / self.total_steps if self.total_steps else 1.0
        return max(part, (self.seconds - self.first_second) / self.max_seconds) if self.max_seconds else part

    @property
    def progress(self) -> float:
        """How much of this stage is done, 0..1, in steps or in time, whichever is further; in the first step one step's share,
        so that a learning rate that rises from 0 is not 0."""
        return max(self._part_done(), 1 / self.total_steps)

    def parts(self, parts: Iterable) -> Iterator:
        """The parts of gradient accumulation, each moved to the device when its turn comes. Several processes exchange their
        gradients at the last one."""
        if self.dry is not None:
            parts = self.dry.parts(parts)
        for number, part in enumerate(parts, start=1):
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = number == self.args.grad_accum
            yield to_device(part, self.device)

    def clip_and_step(self, optimizers: list[torch.optim.Optimizer], clip: float) -> None:
        """Scale the gradients of `raw` (all its parameters together) down to the norm `clip` if theirs is larger, let each
        optimizer step, and drop the gradients.

        Where a gradient overflowed in fp16, all optimizers and all processes skip the step together: clipping has spread what
        is not finite over all gradients, and the scaler would look at one optimizer's, of one process, at a time."""
        if self.dry is not None:
            return self._estimate_memory()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), clip)
        overflow = self.scaler.is_enabled() and not (norm.full_tensor() if is_sharded(norm) else norm).isfinite()
        for optimizer in optimizers:
            if not overflow:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor() if overflow else None)
        self.skipped += int(overflow)
        self.steps_done += 1
        if self.ema:
            self.ema.update(self.raw, self.steps_done)

    def _estimate_memory(self) -> None:
        """What a dry run does in place of a step."""
        self.steps_done += 1
        if found := self.dry.step(self.batches, self.optimizers, averaged=self.ema is not None):
            on_cuda = self.device.type == "cuda"
            there = f", of {mib(torch.cuda.mem_get_info(self.device)[1])} that there are" if on_cuda else ""
            self.print(f"a step{f' of stage {self.stage}' if self.stage else ''}, MiB: {found}{there}")
            self.total_steps = self.steps_done - self.first_step  # done

    def _end_step(self) -> None:
        self._losses += self.loss
        self._bad_step = torch.where((self._bad_step < 0) & ~self.loss.isfinite(), self.steps_done, self._bad_step)
        self._count_time()
        self.bar.update()
        if self.steps_done % LOG_EVERY == 0 or self._part_done() >= 1:
            self._log()
        if self.steps_done % self.args.save_every == 0:
            self._save()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _is_over(self) -> bool:
        if self.any(self.stop_signal is not None):
            self._save_and_exit()
        # With a time limit each process has its own clock: they must agree to stop at the same step.
        over = self._part_done() >= 1
        return self.any(over) if self.max_seconds else over

    # ---- Ctrl-C, SIGTERM ----

    def _on_signal(self, number, frame):
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not even save
        self.stop_signal = number

    def stop_if_asked(self) -> None:
        """To be called between the batches of an evaluation, which may take long: leaves it if a signal asked for that. Several
        processes stop between two steps only: they must agree."""
        if self.stop_signal is not None and self.world_size == 1:
            raise StopAskedFor

    def _save_and_exit(self) -> None:
        self._save()
        self.bar.close()
        self.print(f"stopped after step {self.steps_done}; go on with: {resume_command(self.args)}")
        sys.exit(128 + (self.stop_signal or signal.SIGTERM))

    # ---- metrics ----

    def logs(self, step: int) -> bool:
        """Whether metrics.jsonl gets a line after this step, so that what is costly to know is computed for it alone."""
        return (step + 1) % LOG_EVERY == 0 or step + 1 == self.first_step + self.total_steps

    def log_with(self, **figures: float) -> None:
        """More figures for the line after this step: see logs."""
        self._more_figures |= {name: round(float(value), 6) for name, value in figures.items()}

    def _log(self) -> None:
        self._losses.copy_(self._mean_losses())
        self._check_finite()
        steps, started = self._since
        speed = (self.steps_done - steps) * self.batch_size / max(1e-9, time.perf_counter() - started)
        loss = float(self._losses) / (self.steps_done - self._loss_from)
        self._losses.zero_()
        self._loss_from = self.steps_done
        self._since = (self.steps_done, time.perf_counter())
        if self.is_main:
            self.metrics.write(
                step=self.steps_done,
                seconds=round(self.seconds, 2),
                epoch=round(self.batches.fraction, 3),
                loss=round(loss, 6),
                lr=max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups),
                **{f"{self.unit}_per_second": round(speed, 1)},
                **({"skipped": self.skipped} if self.scaler.is_enabled() else {}),
                **self._more_figures,
            )
            if self.max_seconds:  # for the time left that the bar shows
                done = self.steps_done - self.first_step
                self.bar.total = max(done, round(done / min(1.0, self._part_done())))
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {self.unit}/s")
        self._more_figures = {}

    def _mean_losses(self) -> torch.Tensor:
        """Each process knows the loss of its own samples only."""
        return self.sum(self._losses) / self.world_size

    def _check_finite(self) -> None:
        """In all processes, whichever met it: none may save what another's gradients have spoiled."""
        if self.world_size > 1:
            self._bad_step.fill_(max(all_gather([int(self._bad_step)])))
        if self._bad_step >= 0:
            flags = "--lr, --muon-lr" if hasattr(self.args, "muon_lr") else "--lr"
            raise FloatingPointError(
                f"the loss is not finite at step {int(self._bad_step)}: try a lower {flags} or --weight-decay, or --dtype fp32"
                f"{kept_state(self.folder)}"
            )

    def _check_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """What the last step has spoiled shows in no loss."""
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.steps_done}: try a lower --lr or --muon-lr{kept_state(self.folder)}"
                )

    def log(self, **figures: float) -> None:
        """Figures of an evaluation, into metrics.jsonl and onto the screen."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after step {self.steps_done}: try a lower --lr or --weight-decay")
        if figures:
            rounded = {name: round(value, 6) for name, value in figures.items()}
            self.metrics.write(step=self.steps_done, seconds=round(self.seconds, 2), **rounded)
            self.bar.write(f"step {self.steps_done}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))

    # ---- evaluation ----

    def evaluates(self, step: int) -> bool:
        """Whether this process evaluates before this step. All must ask: see _gather. A run that is stopped in an evaluation
        does it again when it resumes."""
        if self.dry is not None or step == self.first_step or step % self.args.eval_every:
            return False
        self._check_finite()
        self._gather()
        return self.is_main

    def _gather(self) -> None:
        """Under --fsdp, bring the weights of rank 0's whole copy up to date, those that evaluation uses."""
        if self.args.fsdp:
            newest = self.ema.weights if self.ema else dict(self.raw.named_parameters())
            whole = dict(self.whole.named_parameters()) if self.is_main else {}
            for name, weight in newest.items():
                weight = gathered(weight.detach(), self.is_main)
                if name in whole:
                    whole[name].data.copy_(weight)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Inside the block: eval mode, no gradients, averaged weights if there are any. Its time counts as training time.
        Yields the model to use there: `raw`, or under --fsdp rank 0's whole copy of it, on the device for so long."""
        whole = self.whole
        model = self.raw if whole is None else whole.to(self.device)
        model.eval()
        averaged = self.ema.applied(model) if self.ema and whole is None else contextlib.nullcontext()
        try:
            with torch.no_grad(), averaged:
                yield model
        except StopAskedFor:
            self._save_and_exit()
        model.train()
        if whole is not None:
            whole.cpu()
        self._count_time()
        self._since = (self.steps_done, self._clock)

    # ---- state ----

    SAVED = ("stage", "first_step", "first_second", "steps_done", "seconds", "skipped")  # attributes

    def _save(self) -> None:
        """state.pt, by rank 0: whole tensors, whatever number of processes they are spread over, and any number can go on."""
        self._check_finite()
        if self.dry is not None:
            return
        state = {
            "settings": self.settings,
            "model": self.raw.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.weights if self.ema else {},
            "batches": self.batches.state_dict(),
            "loss_sum": self._mean_losses(),
            "loss_from": self._loss_from,
            **{key: getattr(self, key) for key in self.SAVED},
        }
        state = gathered(state, self.is_main) if self.args.fsdp else state
        if self.is_main:
            self._check_weights(state["model"])
            save_state(self.folder, state)

    def _load(self, state: dict) -> None:
        """Raises ValueError for a state of other data, or that does not fit the model."""
        try:
            self.batches.load_state_dict(state["batches"])  # first: other data may mean another model
            self._load_weights(state)
            self._losses.copy_(state["loss_sum"])
            self._loss_from = state["loss_from"]
            for key in self.SAVED:
                setattr(self, key, state[key])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            hint = "is it another's? Start again without --resume"
            raise ValueError(f"{self.folder / 'state.pt'} does not fit this run ({reason}): {hint}") from None

    def _load_weights(self, state: dict) -> None:
        own = self.raw.state_dict()
        self.raw.load_state_dict({name: sharded_like(tensor, own.get(name)) for name, tensor in state["model"].items()})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {i: {k: sharded_like(v, trained[i]) for k, v in each.items()} for i, each in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": parts})
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            weights = {name: tensor.to(self.device) for name, tensor in state["ema"].items()}
            self.ema.weights = {name: sharded_like(tensor, own[name]) for name, tensor in weights.items()}
