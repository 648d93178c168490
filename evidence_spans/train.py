"""Train the span model; started again after a stop of any kind, it goes on where it was.

    python evidence_spans/train.py --sample          # offline, the bundled posts, about a minute on 2 cores
    python evidence_spans/train.py --check           # read all data, run one batch, write nothing
    python evidence_spans/train.py                   # the real run: SpanBERT on evidence_spans/data
"""

import math
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

from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.checkpoint.progress import Best, Progress, StopSignal
from common.checkpoint.run import Run, read_results
from common.seed import seed_everything, seed_micro_batch
from evidence_spans.cli import displayed, run_path, run_script, run_settings
from evidence_spans.config import Config
from evidence_spans.dataset import (
    Split,
    data_digests,
    epoch_steps,
    find_cautions,
    load_examples,
    make_loader,
    make_split,
)
from evidence_spans.evaluate import load_best, score_splits, validate, write_lines, write_reports
from evidence_spans.loss import span_loss
from evidence_spans.model import MODEL_INPUTS, SpanModel, build_model, find_tokenizer, save_model
from evidence_spans.report import evaluation_line, last_line, print_summary
from evidence_spans.thresholds import untuned
from evidence_spans.windows import UnfitSettings


def evaluation_steps(steps_per_epoch: int, total_steps: int, config: Config) -> set[int]:
    """The steps after which is evaluated: so many, evenly spaced, in each epoch, and the last one."""
    parts = config.evaluations_per_epoch
    in_epoch = [round(steps_per_epoch * k / parts) for k in range(1, parts + 1)]
    spaced = {epoch * steps_per_epoch + step for epoch in range(config.epochs) for step in in_epoch}
    return {step for step in spaced if 0 < step <= total_steps} | {total_steps}


def make_optimizer(model: SpanModel, total_steps: int, config: Config) -> tuple[Optimizer, LRScheduler]:
    """AdamW without decay on biases and norms; linear warm-up, then linear decay."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]  # biases and norm weights are vectors
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    warmup_steps = round(config.warmup_ratio * total_steps)

    def share_of_peak(step: int) -> float:  # not 0 at the first step, which would train nothing
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return (total_steps - step) / max(1, total_steps - warmup_steps)

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


def refuse_non_finite(
    losses: list[float], grad_norm: float, micro_batches: list[list[int]], train: Split, step: int
) -> None:
    """End the run, naming the batch, before a loss or gradient that is not a number reaches the weights."""
    checks = [("loss", loss, rows) for loss, rows in zip(losses, micro_batches)]
    for what, value, rows in [*checks, ("gradient norm", grad_norm, chain(*micro_batches))]:
        if not math.isfinite(value):
            names = ", ".join(dict.fromkeys(train.examples[train.owners[row]].id for row in rows))
            raise UnfitSettings(
                f"the {what} is {value} at step {step + 1}, in the batch of examples {names}; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def main(config: Config, check: bool = False, pause_after: int = 0) -> int | None:
    """pause_after: return after so many epochs, without a final evaluation; the schedule is the whole run's."""
    # Setup
    path = run_path(config)
    data = data_digests(config)
    if not check and (results := read_results(path, run_settings(config), data)):
        print(f"finished before\n{last_line(results, displayed(path))}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    dtype = autocast_dtype(config.amp, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    info = environment(device)
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | amp {dtype or 'off'}")

    # Data
    tokenizer = find_tokenizer(config)
    examples, source = load_examples(config)
    splits = {name: make_split(rows, tokenizer, config) for name, rows in examples.items()}
    cautions = find_cautions(examples)
    print_summary(splits, source, cautions, config)
    train = splits["train"]
    decoding = untuned(train.windows, source.questions, config)
    accumulation = 1 if check else config.gradient_accumulation_steps
    steps_per_epoch = len(epoch_steps(train, accumulation, config, 0))
    total_steps = min(steps_per_epoch * config.epochs, config.max_steps or math.inf)
    evaluate_after = evaluation_steps(steps_per_epoch, total_steps, config)

    # Model
    model = build_model(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", end=" | ")
    print(f"answers of at most {decoding.max_answer_length} tokens | {total_steps} steps")

    # Optimizer
    optimizer, scheduler = make_optimizer(model, total_steps, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume
    best, progress = Best("max", config.patience), Progress()
    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, best=best, progress=progress)
    if not check:
        run = Run(path, run_settings(config), {"autocast": str(dtype)}, info, data=data)
        start = f"resuming from step {progress.step} of {total_steps}" if run.restore(state) else "starting"
        print(f"{start} in {displayed(path)}")
        if source.not_found:
            write_lines(path / "not_found.jsonl", source.not_found)

    # Loop
    with StopSignal() as stop, tqdm(total=total_steps, initial=progress.step, disable=None) as bar:
        progress.start()
        for epoch in range(progress.epoch, pause_after or config.epochs):
            if best.exhausted or progress.step == total_steps:
                break
            # What is left of the epoch: for each optimizer step its micro-batches, lists of row numbers
            left = slice(progress.step_in_epoch, total_steps - epoch * steps_per_epoch)
            steps = epoch_steps(train, accumulation, config, epoch)[left]
            loader = iter(make_loader(train.windows, chain(*steps), tokenizer, config))

            for micro_batches in steps:
                model.train()
                windows, tokens, losses = sum(map(len, micro_batches)), 0, []
                for micro_step in range(len(micro_batches)):
                    batch = next(loader)
                    tokens += int(batch["attention_mask"].sum())
                    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                    seed_micro_batch(config.seed, progress.step, micro_step)

                    # Summed, and divided by the windows of the whole step: k batches of b are one of k * b
                    with autocast():
                        logits = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
                    loss = span_loss(*logits, batch).sum()
                    scaler.scale(loss / windows).backward()
                    losses.append(loss.detach())

                # Clip the true gradient and step; where losses are scaled, the scaler skips a step that overflows
                losses = torch.stack(losses).tolist()
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()
                finite_norm = 0.0 if scaler.is_enabled() else grad_norm
                refuse_non_finite(losses, finite_norm, micro_batches, train, progress.step)
                if check:
                    print(f"check passed | loss of one batch {losses[0] / windows:.4f} | nothing was written")
                    return None
                learning_rate = scheduler.get_last_lr()[0]
                skipped = not update(optimizer, scheduler, scaler)

                # Log
                progress.add_step(sum(losses), windows, tokens, skipped)
                bar.update()
                now = epoch + progress.step_in_epoch / steps_per_epoch
                if progress.step % config.logging_steps == 0:
                    bar.write(run.log_step(progress, total_steps, now, sum(losses) / windows, learning_rate, grad_norm))
                if micro_batches is steps[-1]:
                    progress.end_epoch()

                # Evaluate
                if evaluated := progress.step in evaluate_after:
                    scores, decoding = validate(model, splits["validation"], tokenizer, decoding, config, dtype)
                    scores = {"epoch": round(now, 2), "train_loss": progress.mean_loss(), **scores}
                    run.log({"event": "evaluation", "step": progress.step, **scores})
                    if better := best.update(scores[config.metric], scores["epoch"], progress.step):
                        run.save_best(partial(save_model, model, tokenizer, decoding))
                    bar.write(evaluation_line(scores, better))
                    progress.add_time()

                # Save
                stopped = stop.number  # read once: a signal during the save counts at the next step
                if evaluated or stopped or progress.step % config.save_steps == 0:
                    progress.note_memory(device)
                    run.save_last(state)
                    progress.start()
                if stopped:
                    bar.write(f"stopped at step {progress.step} of {total_steps}: the same command goes on from here")
                    return 128 + stopped
                if best.exhausted and progress.step < total_steps:
                    bar.write(f"stopped by patience: {config.patience} evaluations without a better {config.metric}")
                    break

    if pause_after:
        return run.close()

    # Final evaluation
    scores, rows = score_splits(splits, load_best(path, config), cautions, config, dtype)
    write_reports(run, splits["test"], scores, rows, config)
    progress.note_memory(device)
    scores["not_found"] = len(source.not_found)
    results = run.finish(config.metric, best, progress, **scores)
    print(last_line(results, displayed(path)))


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, resumes=True, check=flag))
