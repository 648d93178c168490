"""Train the emotion classifier; started again after a stop of any kind, it goes on where it was.

    python emotions/train.py --sample               # offline, the bundled texts, under a minute on 2 cores
    python emotions/train.py --check                # read all data, run one batch, write nothing
    python emotions/train.py                        # the real run, after python emotions/prepare.py
    torchrun --nproc_per_node 2 --max-restarts 3 emotions/train.py [--shard]
"""

import math
import shutil
import signal
import sys
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment
from common.checkpoint.progress import Best, Progress, StopSignal
from common.checkpoint.run import Run, read_results
from common.seed import seed_everything, seed_micro_batch
from emotions.cli import displayed, run_path, run_script, run_settings
from emotions.config import Config
from emotions.dataset import Draw, Split, data_digests, load_splits, make_loader
from emotions.evaluate import evaluate_run, validate
from emotions.gradient_health import collapse, gradient_health, parameter_group
from emotions.loss import class_weights, emotion_loss
from emotions.model import EmotionClassifier, build_model, find_tokenizer, prior_logits, save_model
from emotions.parallel import (
    all_reduce,
    barrier,
    end_processes,
    full_tensor,
    gradient_sync,
    parallelize,
    rank_0_first,
    start_processes,
    stateful,
    watchdog,
)
from emotions.report import evaluation_line, last_line, print_summary
from emotions.sampling import draw_weights, epoch_steps


def make_optimizer(model: EmotionClassifier, total_steps: int, config: Config) -> tuple[Optimizer, LRScheduler]:
    """AdamW without decay on biases and norms, the head at its own rate; warm-up, then decay."""
    groups = []
    for is_head, factor in ((False, 1.0), (True, config.head_lr_factor)):
        part = [p for name, p in model.named_parameters() if (parameter_group(model, name) == "head") == is_head]
        rate = config.learning_rate * factor
        groups.append({"params": [p for p in part if p.ndim >= 2], "weight_decay": config.weight_decay, "lr": rate})
        groups.append({"params": [p for p in part if p.ndim < 2], "weight_decay": 0.0, "lr": rate})  # biases, norms
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    warmup_steps = round(config.warmup_ratio * total_steps)

    def share_of_peak(step: int) -> float:  # not 0 at the first step, which would train nothing
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2

    return optimizer, LambdaLR(optimizer, share_of_peak)


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> bool:
    """One optimizer step, unless the scaler finds an overflow; the schedule moves only if the optimizer did.

    Returns whether it did.
    """
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if moved := scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()
    return moved


def refuse_non_finite(losses: list[float], grad_norm: float, step: int, draws: list[list[Draw]], train: Split) -> None:
    """End the run, naming the batch, before a loss or gradient that is not a number reaches the weights."""
    checks = [("loss", loss, batch) for loss, batch in zip(losses, draws)]
    for what, value, batch in [*checks, ("gradient norm", grad_norm, chain(*draws))]:
        if not math.isfinite(value):
            lines = ", ".join(str(train.rows[draw.row].line) for draw in batch)
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of lines {lines} of train; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def log_step(run: Run, progress: Progress, health: dict, config: Config, *figures: float) -> str:
    """Log a step with the health of its gradients; returns what to print, a warning where they have collapsed."""
    skipped = progress.skipped_steps  # since the last logged step
    line = run.log_step(progress, *figures, skipped_steps=skipped, gradients=health)
    fault = collapse(health, skipped, config.logging_steps)
    return f"{line}\nwarning: step {progress.step}: {fault}" if fault else line


def require_space(path: Path, model: EmotionClassifier) -> None:
    """Raises UserError where the disk cannot take last.pt beside what is there: fp32 weights and their two moments."""
    needed = 3 * 4 * sum(p.numel() for p in model.parameters()) + 2**24
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path}: the disk has {free / 1e9:.2f} GB left, a save needs {needed / 1e9:.2f}; best/ and last.pt are "
            "unchanged: make room and start the same command again"
        )


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    rank, world, device = processes = start_processes(config.stall_seconds)
    data = data_digests(config)
    if not check and (results := read_results(path, run_settings(config), data)):
        print(f"finished before\n{last_line(results, displayed(path))}")
        return end_processes()
    seed_everything(config.seed, config.deterministic)
    dtype = autocast_dtype(config.amp, device)
    info = environment(device)
    print(" | ".join(f"{key} {value}" for key, value in info.items()) + f" | amp {dtype or 'off'} | processes {world}")

    # Data
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)
    print_summary(splits, config)
    train = splits["train"]
    drawn = draw_weights(train, config)
    positives, known = drawn @ train.labels, drawn @ train.known  # (L,) of an epoch
    rows = round(float(drawn.sum()))  # of an epoch
    accumulation = 1 if check else config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(rows / config.batch_size) / (accumulation * world))
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    model = build_model(config, prior_logits(positives, known), train.names).to(device)
    weights = class_weights(config.class_weights, positives, known)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters | {rows} rows an epoch", end=", ")
    print(f"{config.batch_size * accumulation * world} a step | {total_steps} steps")
    module = parallelize(model, config.shard, dtype, processes)

    # Optimizer
    optimizer, scheduler = make_optimizer(model, total_steps, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume
    best, progress = Best("min" if config.metric == "loss" else "max", config.patience), Progress()
    state = stateful(model, optimizer, config.shard)  # of a sharded model formed by all processes together
    state |= {"scheduler": scheduler, "scaler": scaler, "best": best, "progress": progress}
    if not check:
        same = {"autocast": str(dtype), "processes": world}
        run = rank_0_first(partial(Run, path, run_settings(config), same, info, rank == 0, data), processes)
        start = f"resuming from step {progress.step} of {total_steps}" if run.restore(state) else "starting"
        print(f"{start} in {displayed(path)}")

    # Loop
    bar = tqdm(total=total_steps, initial=progress.step, disable=rank > 0 or None)
    with StopSignal() as stop, watchdog(config.stall_seconds) as restart_watchdog, bar:
        progress.start()
        for epoch in range(progress.epoch, math.ceil(total_steps / steps_per_epoch)):
            if best.exhausted:
                bar.write(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")
                break
            # What is left of the epoch: for each optimizer step this process's micro-batches, lists of draws
            steps = epoch_steps(train, drawn, config, epoch, accumulation, rank, world)
            steps = steps[progress.step_in_epoch : total_steps - epoch * steps_per_epoch]
            loader = iter(make_loader(list(chain(*(step.micro_batches for step in steps))), train, tokenizer, config))

            for micro_batches, counted, examples in steps:
                restart_watchdog()
                model.train()
                tokens, losses = 0, []
                for micro_step, counts in enumerate(counted):
                    batch = next(loader)
                    tokens += int(batch["attention_mask"].sum()) * counts
                    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                    labels, known = batch.pop("labels"), batch.pop("known")
                    seed_micro_batch(config.seed, progress.step, micro_step, rank)

                    # Summed, and divided by the examples of the whole step; gradients are averaged over the processes:
                    # k batches of b in each of w processes are one of k * b * w. A stand-in counts nothing
                    with gradient_sync(module, last=micro_step == len(counted) - 1):
                        with torch.autocast(device.type, dtype, enabled=dtype is not None):
                            logits = module(**batch)
                        loss = emotion_loss(logits, labels, known, config, weights).sum() * counts
                        scaler.scale(loss * (world / examples)).backward()
                    losses.append(loss.detach())

                # Clip the true gradient and step; where losses are scaled, the scaler skips a step that overflows
                losses = torch.stack(losses).tolist()
                scaler.unscale_(optimizer)
                grad_norm = full_tensor(clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)).item()
                norm = 0.0 if scaler.is_enabled() else grad_norm
                refuse_non_finite(losses, norm, progress.step, micro_batches, train)
                if check:
                    print(f"check passed | loss of one batch {losses[0] / len(labels):.4f} | nothing was written")
                    return end_processes()
                learning_rate = scheduler.get_last_lr()[0]
                logged = (progress.step + 1) % config.logging_steps == 0
                health = gradient_health(model, grad_norm, config) if logged else {}
                skipped = not update(optimizer, scheduler, scaler)

                # Log what all processes did; stopped: a signal to any of them
                sums = all_reduce(torch.tensor([sum(losses), tokens, stop.number], dtype=torch.float64), processes)
                loss, tokens, stopped = sums.tolist()
                progress.add_step(loss, examples, int(tokens), skipped)
                bar.update()
                if logged:
                    figures = total_steps, progress.step / steps_per_epoch, loss / examples, learning_rate, grad_norm
                    bar.write(log_step(run, progress, health, config, *figures))

                # Evaluate at the epoch's end
                if epoch_ended := micro_batches is steps[-1].micro_batches:
                    progress.end_epoch()
                    scores, tuned = validate(model, splits["validation"], tokenizer, weights, config, dtype, processes)
                    restart_watchdog()
                    scores = {"train_loss": progress.mean_loss(), **scores}
                    run.log({"event": "evaluation", "epoch": epoch + 1, "step": progress.step, **scores})
                    if better := best.update(scores[config.metric], epoch + 1, progress.step):
                        tensors = state["model"].state_dict()
                        run.save_best(partial(save_model, tensors, model.config, tokenizer, tuned))
                    bar.write(evaluation_line(epoch + 1, scores, tuned["shared"], better))
                    progress.add_time()

                # Save
                if epoch_ended or stopped or progress.step % config.save_steps == 0:
                    restart_watchdog()
                    require_space(path, model)
                    progress.note_memory(device)
                    run.save_last(state)
                    barrier(processes)  # none ends while the first one saves
                    progress.start()
                if stopped:
                    bar.write(f"stopped at step {progress.step} of {total_steps}: the same command goes on from here")
                    end_processes()
                    return 128 + (stop.number or signal.SIGTERM)  # the signal may have gone to another process
    end_processes()

    # Final evaluation
    if rank == 0:
        scores = evaluate_run(run, splits, tokenizer, config, dtype)
        progress.note_memory(device)
        print(last_line(run.finish(config.metric, best, progress, **scores), displayed(path)))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, resumes=True, check=flag))
