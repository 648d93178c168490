"""Train adapters, pooler and head on ReDSM5's pairs; started again after a stop of any kind, it goes on where it was.

    python redsm5_nli/train.py --sample          # offline, the bundled posts, about a minute on 2 cores
    python redsm5_nli/train.py --check           # read all data, run one batch, write nothing
    python redsm5_nli/train.py                   # the real run: gemma-3-1b-it on redsm5_nli/data
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

from common.checkpoint import UserError
from common.checkpoint.environment import environment, pick_device
from common.checkpoint.progress import Best, Progress, StopSignal, TrainedParameters
from common.checkpoint.run import Run, read_results
from common.seed import seed_everything, seed_micro_batch
from redsm5_nli.cli import displayed, run_path, run_script, run_settings
from redsm5_nli.config import Config
from redsm5_nli.criteria import load_criteria
from redsm5_nli.dataset import Split, data_digests, epoch_steps, load_splits, make_loader
from redsm5_nli.evaluate import evaluate_run, validate
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import Matcher, build_model, decoder_dtype, find_collator, save_model
from redsm5_nli.report import evaluation_line, last_line, print_summary


def make_optimizer(model: Matcher, total_steps: int, config: Config) -> tuple[Optimizer, LRScheduler]:
    """AdamW on what trains, without decay on biases and magnitudes; linear warm-up, then linear decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    warmup_steps = round(config.warmup_ratio * total_steps)

    def share_of_peak(step: int) -> float:  # not 0 at the first step, which would train nothing
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return (total_steps - step) / max(1, total_steps - warmup_steps)

    return optimizer, LambdaLR(optimizer, share_of_peak)


def update(optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """One optimizer step, after which the adapters form what depends on their weights anew."""
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def refuse_non_finite(
    losses: list[float], grad_norm: float, micro_batches: list[list[int]], split: Split, step: int
) -> None:
    """End the run, naming the batch, before a loss or gradient that is not a number reaches the weights."""
    checks = [("loss", loss, rows) for loss, rows in zip(losses, micro_batches)]
    for what, value, rows in [*checks, ("gradient norm", grad_norm, chain(*micro_batches))]:
        if not math.isfinite(value):
            posts = ", ".join(dict.fromkeys(split.posts[row // len(split.groups)].id for row in rows))
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of posts {posts}; best/ is untouched. "
                "A lower learning_rate or amp off may help"
            )


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    criteria, data = load_criteria(config.criteria_file), data_digests(config)
    if not check and (results := read_results(path, run_settings(config), data)):
        print(f"finished before\n{last_line(results, displayed(path))}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    dtype = decoder_dtype(config.amp, device)
    info = environment(device)
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | decoder in {dtype}")
    if config.amp == "auto" and dtype == torch.float32:
        print("this machine has no bf16, and Gemma 3 overflows fp16: the decoder runs in fp32")

    # Data
    collator = find_collator(config, criteria)
    splits, kinds, unread = load_splits(config, collator)
    print_summary(splits, kinds, unread, criteria, config)
    train = splits["train"]
    accumulation = 1 if check else config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(len(train.lengths) / config.batch_size) / accumulation)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    model = build_model(config, device, dtype)
    weights = class_weights(config.class_weights, train.labels)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    balance = "off" if weights is None else weights.numpy().round(4)
    share = f"{trained:,} trained ({trained / parameters:.2%})"
    print(f"{parameters:,} parameters, {share} | class weights {balance} | {total_steps} steps")

    # Optimizer
    optimizer, scheduler = make_optimizer(model, total_steps, config)

    # Resume
    best, progress = Best("min" if config.metric == "loss" else "max", config.patience), Progress()
    adapted = TrainedParameters(model)
    state = dict(model=adapted, optimizer=optimizer, scheduler=scheduler, best=best, progress=progress)
    if not check:
        run = Run(path, run_settings(config), {"dtype": str(dtype)}, info, data=data)
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
            steps = epoch_steps(train.lengths, config.batch_size, accumulation, config.seed, epoch)
            steps = steps[progress.step_in_epoch : total_steps - epoch * steps_per_epoch]
            loader = iter(make_loader(train, chain(*steps), collator, config))

            for micro_batches in steps:
                model.train()
                pairs = sum(map(len, micro_batches)) * len(train.groups[0])
                tokens, losses = 0, []
                for micro_step in range(len(micro_batches)):
                    batch = next(loader)
                    tokens += int(batch["attention_mask"].sum())
                    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                    labels = batch.pop("labels")
                    seed_micro_batch(config.seed, progress.step, micro_step)

                    # Summed, and divided by the pairs of the whole step: k batches of b are one of k * b
                    loss = pair_loss(model(**batch), labels, weights).sum()
                    (loss / pairs).backward()
                    losses.append(loss.detach())

                # Clip the gradient and step
                losses = torch.stack(losses).tolist()
                grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()
                refuse_non_finite(losses, grad_norm, micro_batches, train, progress.step)
                if check:
                    print(f"check passed | loss of one batch {losses[0] / pairs:.4f} | nothing was written")
                    return None
                learning_rate = scheduler.get_last_lr()[0]
                update(optimizer, scheduler)

                # Log
                progress.add_step(sum(losses), pairs, tokens)
                bar.update()
                if progress.step % config.logging_steps == 0:
                    now = progress.step / steps_per_epoch
                    bar.write(run.log_step(progress, total_steps, now, sum(losses) / pairs, learning_rate, grad_norm))

                # Evaluate at the epoch's end
                if epoch_ended := micro_batches is steps[-1]:
                    progress.end_epoch()
                    scores, thresholds = validate(model, splits["validation"], collator, weights, config)
                    scores = {"train_loss": progress.mean_loss(), **scores}
                    run.log({"event": "evaluation", "epoch": epoch + 1, "step": progress.step, **scores})
                    if better := best.update(scores[config.metric], epoch + 1, progress.step):
                        run.save_best(partial(save_model, model, config, criteria, thresholds))
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
    scores = evaluate_run(run, model, splits, collator, config)
    progress.note_memory(device)
    results = run.finish(config.metric, best, progress, trained_parameters=trained, **scores)
    print(last_line(results, displayed(path)))


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, resumes=True, check=flag))
