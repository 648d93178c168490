"""Train the AFQMC sentence-pair classifier; started again after a stop of any kind, it goes on where it was.

    python afqmc/train.py --sample          # offline, the bundled pairs, under a minute on 2 cores
    python afqmc/train.py --check           # read all data, run one batch, write nothing
    python afqmc/train.py                   # the real run, after python afqmc/download.py
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

from afqmc.cli import displayed, run_path, run_script, run_settings
from afqmc.config import Config
from afqmc.dataset import Pair, data_digests, epoch_steps, load_splits, make_loader
from afqmc.evaluate import evaluate_run, validate
from afqmc.loss import class_weights, pair_loss
from afqmc.model import PairClassifier, build_model, fgm_perturbation, find_tokenizer, save_model
from afqmc.report import evaluation_line, last_line, print_summary
from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.checkpoint.progress import Best, Progress, StopSignal
from common.checkpoint.run import Run, read_results
from common.seed import seed_everything, seed_micro_batch


def make_optimizer(model: PairClassifier, total_steps: int, config: Config) -> tuple[Optimizer, LRScheduler]:
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
    losses: list[float], grad_norm: float, micro_batches: list[list[int]], pairs: list[Pair], step: int
) -> None:
    """End the run, naming the batch, before a loss or gradient that is not a number reaches the weights."""
    checks = [("loss", loss, rows) for loss, rows in zip(losses, micro_batches)]
    for what, value, rows in [*checks, ("gradient norm", grad_norm, chain(*micro_batches))]:
        if not math.isfinite(value):
            lines = ", ".join(str(pairs[row].line) for row in rows)
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of the training lines {lines}; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path, data = run_path(config), data_digests(config)
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
    splits = load_splits(config, tokenizer)
    print_summary(splits, config)
    train, validation = splits["train"], splits["validation"]
    lengths = train.lengths.clip(max=config.max_length)
    accumulation = 1 if check else config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(len(lengths) / config.batch_size) / accumulation)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    model = build_model(config, train.names).to(device)
    weights = class_weights(config.class_weights, train)
    balance = "off" if weights is None else weights.numpy().round(4)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters | class weights {balance} | {total_steps} steps")

    # Optimizer
    optimizer, scheduler = make_optimizer(model, total_steps, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Resume
    best, progress = Best("min" if config.metric == "loss" else "max", config.patience), Progress()
    state = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, best=best, progress=progress)
    if not check:
        run = Run(path, run_settings(config), {"autocast": str(dtype)}, info, data=data)
        start = f"resuming from step {progress.step} of {total_steps}" if run.restore(state) else "starting"
        print(f"{start} in {displayed(path)}")

    # Loop
    with StopSignal() as stop, tqdm(total=total_steps, initial=progress.step, disable=None) as bar:
        progress.start()
        for epoch in range(progress.epoch, math.ceil(total_steps / steps_per_epoch)):
            if best.exhausted:
                bar.write(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")
                break
            # What is left of the epoch: for each optimizer step its micro-batches, lists of row numbers
            steps = epoch_steps(lengths, config.batch_size, accumulation, config.seed, epoch)
            steps = steps[progress.step_in_epoch : total_steps - epoch * steps_per_epoch]
            loader = iter(make_loader(train, chain(*steps), config))

            for micro_batches in steps:
                model.train()
                pairs, tokens, losses = sum(map(len, micro_batches)), 0, []
                for micro_step, rows in enumerate(micro_batches):
                    batch = next(loader)
                    tokens += int(batch["attention_mask"].sum())
                    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                    input_ids, labels = batch.pop("input_ids"), train.labels[rows].to(device)
                    seed_micro_batch(config.seed, progress.step, micro_step)

                    # Summed, and divided by the pairs of the whole step: k batches of b are one of k * b
                    with autocast():
                        embeddings = model.embed(input_ids)
                        logits = model(input_ids, **batch, embeddings=embeddings)
                    if config.fgm_epsilon:
                        embeddings.retain_grad()
                    loss = pair_loss(logits, labels, weights, config).sum()
                    scaler.scale(loss / pairs).backward()
                    losses.append(loss.detach())

                    # FGM adds the gradient of the loss a step of length epsilon up the hill
                    if config.fgm_epsilon and (r := fgm_perturbation(embeddings.grad, config.fgm_epsilon)) is not None:
                        with autocast():
                            logits = model(input_ids, **batch, embeddings=model.embed(input_ids) + r)
                        scaler.scale(pair_loss(logits, labels, weights, config).sum() / pairs).backward()

                # Clip the true gradient and step; where losses are scaled, the scaler skips a step that overflows
                losses = torch.stack(losses).tolist()
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()
                finite_norm = 0.0 if scaler.is_enabled() else grad_norm
                refuse_non_finite(losses, finite_norm, micro_batches, train.pairs, progress.step)
                if check:
                    print(f"check passed | loss of one batch {losses[0] / pairs:.4f} | nothing was written")
                    return None
                learning_rate = scheduler.get_last_lr()[0]
                progress.add_step(sum(losses), pairs, tokens, skipped=not update(optimizer, scheduler, scaler))
                bar.update()

                # Log
                if progress.step % config.logging_steps == 0:
                    now = progress.step / steps_per_epoch
                    bar.write(run.log_step(progress, total_steps, now, sum(losses) / pairs, learning_rate, grad_norm))

                # Evaluate at the epoch's end
                if epoch_ended := micro_batches is steps[-1]:
                    progress.end_epoch()
                    scores = validate(model, validation, weights, config, dtype)
                    scores["train_loss"] = progress.mean_loss()
                    run.log({"event": "evaluation", "epoch": epoch + 1, "step": progress.step, **scores})
                    if better := best.update(scores[config.metric], epoch + 1, progress.step):
                        run.save_best(partial(save_model, model, tokenizer, scores.get("threshold")))
                    bar.write(evaluation_line(epoch + 1, scores, better))
                    progress.add_time()

                # Save
                stopped = stop.number  # read once: a signal during the save counts at the next step
                if epoch_ended or stopped or progress.step % config.save_steps == 0:
                    progress.note_memory(device)
                    run.save_last(state)
                    progress.start()
                if stopped:
                    bar.write(f"stopped at step {progress.step} of {total_steps}: the same command goes on from here")
                    return 128 + stopped

    # Final evaluation
    scores = evaluate_run(run, splits, config, dtype)
    progress.note_memory(device)
    print(last_line(run.finish(config.metric, best, progress, **scores), displayed(path)))


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, resumes=True, check=flag))
