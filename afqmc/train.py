"""Train the AFQMC sentence-pair classifier; started again after a stop of any kind, it goes on where it was.

    python afqmc/train.py --sample          # offline, the bundled pairs, under a minute on 2 cores
    python afqmc/train.py --check           # read all data, run one batch, write nothing
    python afqmc/train.py                   # the real run, after python afqmc/download.py
"""

import math
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from afqmc.config import Config, UserError, run_config, run_path, run_script, shown
from afqmc.dataset import Pair, epoch_batches, fingerprint, load_splits, make_loader, token_lengths
from afqmc.eda import print_summary
from afqmc.evaluate import check_data, evaluate_run, predict_logits, probabilities, score_split, tune_threshold
from afqmc.model import (
    PairClassifier,
    autocast_dtype,
    build_model,
    class_weights,
    fgm_perturbation,
    load_tokenizer,
    pair_loss,
    pick_device,
    save_model,
)
from common.checkpoint import Best, Run, StopSignal, environment, peak_memory_bytes, run_results
from common.seed import seed_everything, seed_micro_batch


def make_optimizer(
    model: PairClassifier, total_steps: int, config: Config
) -> tuple[Optimizer, LRScheduler, torch.amp.GradScaler]:
    """AdamW without decay on biases and norms, linear warm-up then linear decay, and the loss scaler for fp16."""
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.ndim >= 2]  # biases and norm weights are vectors
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup_ratio * total_steps), total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(config.amp, device) == torch.float16)
    return optimizer, scheduler, scaler


def accumulate_gradients(
    model: PairClassifier,
    micro_batches: list[dict[str, Tensor]],
    weights: Tensor | None,
    scaler: torch.amp.GradScaler,
    config: Config,
    step: int,
) -> list[float]:
    """Add the gradient of one optimizer step; the summed loss of each micro-batch.

    Losses are summed over pairs and divided by the pairs of the whole step, so that k micro-batches of b give the
    gradient of one batch of k * b. With FGM each micro-batch adds the gradient of its perturbed loss as well.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.amp, device)
    pairs = sum(len(batch["labels"]) for batch in micro_batches)
    losses = []
    model.train()
    for micro_step, batch in enumerate(micro_batches):
        seed_micro_batch(config.seed, step, micro_step)
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        input_ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            embeddings = model.embed(input_ids)
            logits = model(embeddings, **inputs)
        if config.fgm_epsilon:
            embeddings.retain_grad()
        loss = pair_loss(logits, labels, weights, config).sum()
        scaler.scale(loss / pairs).backward()
        losses.append(loss.detach())
        if config.fgm_epsilon and (r := fgm_perturbation(embeddings.grad, config.fgm_epsilon)) is not None:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(model.embed(input_ids) + r, **inputs)
            scaler.scale(pair_loss(logits, labels, weights, config).sum() / pairs).backward()
    return torch.stack(losses).tolist()


def refuse_non_finite(what: str, values: list[float], batches: list[list[int]], pairs: list[Pair], step: int) -> None:
    """End the run, naming the batch, before a loss or gradient that is no number reaches the weights."""
    for value, rows in zip(values, batches):
        if not math.isfinite(value):
            lines = ", ".join(str(pairs[row].line) for row in rows)
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of train.json lines {lines}; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def clip_gradient(
    model: PairClassifier, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: Config
) -> float:
    """Take the loss scale out of the gradient and clip it; its norm before clipping."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf).item()


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> None:
    """One optimizer step, unless the scaler found an overflow. The schedule moves only if the optimizer did."""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()


def validate(
    model: PairClassifier,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerFast,
    weights: Tensor | None,
    config: Config,
    device: torch.device,
) -> dict:
    """Validation scores at .5, which choose the epoch, and the threshold that is best on these rows."""
    logits = predict_logits(model, pairs, tokenizer, config, device)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    threshold = tune_threshold(probabilities(logits), np.array([pair.label for pair in pairs]))
    scores = score_split(logits, pairs, threshold, None if weights is None else weights.cpu(), config)
    at_half = {name: scores["at_half"][name] for name in ("f1_macro", "accuracy")}
    tuned = {"threshold": threshold, "f1_macro_at_threshold": scores["at_threshold"]["f1_macro"]}
    return {"loss": scores["loss"], **at_half, **tuned}


def last_line(results: dict, path: Path) -> str:
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (epoch {results['epoch']})"]
    if results["test"]:
        half, tuned = (results["test"][key]["f1_macro"] for key in ("at_half", "at_threshold"))
        parts.append(f"test f1_macro {half:.4f} at .5, {tuned:.4f} at the tuned threshold {results['threshold']:.4f}")
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {shown(path)}"])


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    if not check and (results := run_results(path, run_config(config))):
        print(f"finished before\n{last_line(results, path)}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    dtype = autocast_dtype(config.amp, device)
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | amp {dtype or 'off'}")

    # Data
    tokenizer = load_tokenizer(config)
    splits = load_splits(config)
    train = splits["train"]
    print_summary(splits, tokenizer, config)
    lengths = np.minimum(token_lengths(train, tokenizer), config.max_length)
    accumulation = config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(len(train) / config.batch_size) / accumulation)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    model = build_model(config, tokenizer).to(device)
    weights = class_weights(config.class_weights, [pair.label for pair in train])
    parameters = sum(p.numel() for p in model.parameters())
    balance = "off" if weights is None else weights.numpy().round(4)
    print(f"{parameters:,} parameters | class weights {balance} | {total_steps} steps")
    weights = None if weights is None else weights.to(device)

    # Optimizer
    optimizer, scheduler, scaler = make_optimizer(model, total_steps, config)
    if check:
        batches = epoch_batches(lengths, config.batch_size, config.seed, epoch=0)[:1]
        losses = accumulate_gradients(
            model, list(make_loader(train, batches, tokenizer, config)), weights, scaler, config, step=0
        )
        refuse_non_finite("loss", losses, batches, train, step=0)
        print(f"check passed | loss of one batch {losses[0] / len(batches[0]):.4f} | nothing was written")
        return None

    # Resume
    run = Run(path, run_config(config), info | {"data_sha256": fingerprint(splits), "autocast": str(dtype)})
    if run.results:  # another process finished it meanwhile
        run.close()
        return main(config)
    check_data(run, splits, config)
    if (begun := run.environment.get("autocast")) != str(dtype):
        raise UserError(f"{path} was begun with autocast {begun}, amp {config.amp} means {dtype} on this machine")
    best = Best("min" if config.metric == "loss" else "max", config.patience)
    step = 0
    totals = {"seconds": 0.0, "train_seconds": 0.0, "tokens": 0, "loss": 0.0, "examples": 0}
    totals |= {"peak_memory_bytes": None}
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if state := run.load_last(best):
        try:
            for name, part in stateful.items():
                part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path / 'last.pt'} does not fit {config.model}: {error}") from error
        step, totals = state["step"], state["totals"]
        print(f"resuming from step {step} of {total_steps} in {shown(path)}")
    else:
        print(f"starting in {shown(path)}")

    # Loop
    loader = None
    with StopSignal() as stop, tqdm(total=total_steps, initial=step, disable=None) as bar:
        while step < total_steps and not best.exhausted:
            began = time.perf_counter()
            epoch, position = divmod(step, steps_per_epoch)
            if loader is None:
                batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
                loader = iter(make_loader(train, batches[position * accumulation :], tokenizer, config))
            group = batches[position * accumulation : (position + 1) * accumulation]
            micro_batches = [next(loader) for _ in group]
            losses = accumulate_gradients(model, micro_batches, weights, scaler, config, step)
            refuse_non_finite("loss", losses, group, train, step)
            grad_norm = clip_gradient(model, optimizer, scaler, config)
            if not scaler.is_enabled():  # the scaler skips such a step by itself
                refuse_non_finite("gradient norm", [grad_norm], [list(chain(*group))], train, step)
            learning_rate = scheduler.get_last_lr()[0]
            update(optimizer, scheduler, scaler)
            step += 1
            bar.update()

            pairs = sum(map(len, group))
            totals["tokens"] += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
            totals["loss"] += sum(losses)
            totals["examples"] += pairs
            totals["train_seconds"] += time.perf_counter() - began
            if step % config.logging_steps == 0:
                record = {"event": "step", "step": step, "epoch": round(step / steps_per_epoch, 4)}
                record |= {"loss": sum(losses) / pairs, "learning_rate": learning_rate, "grad_norm": grad_norm}
                record |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
                run.log(record)
                bar.write(
                    f"step {step}/{total_steps} | epoch {record['epoch']:.2f} | loss {record['loss']:.4f} | "
                    f"lr {learning_rate:.2e} | grad norm {grad_norm:.2f} | {record['tokens_per_second']:.0f} tokens/s"
                )
            epoch_ended = step % steps_per_epoch == 0 or step == total_steps
            if epoch_ended:
                loader = None
                scores = validate(model, splits["validation"], tokenizer, weights, config, device)
                record = {"event": "evaluation", "epoch": epoch + 1, "step": step}
                record |= {"train_loss": totals["loss"] / totals["examples"], **scores}
                totals |= {"loss": 0.0, "examples": 0}
                run.log(record)
                if better := best.update(scores[config.metric], epoch + 1, step):
                    run.save_best(partial(save_model, model, tokenizer, scores["threshold"]))
                bar.write(
                    f"epoch {epoch + 1} | train loss {record['train_loss']:.4f} | validation loss {scores['loss']:.4f}"
                    f" | f1_macro {scores['f1_macro']:.4f} | accuracy {scores['accuracy']:.4f}{' | best' * better}"
                )
            totals["seconds"] += time.perf_counter() - began
            totals["peak_memory_bytes"] = peak_memory_bytes(device.type, totals["peak_memory_bytes"])
            stopped = stop.number  # read once: a signal during the save counts at the next step
            if epoch_ended or step % config.save_steps == 0 or stopped:
                state = {name: part.state_dict() for name, part in stateful.items()}
                run.save_last(state | {"step": step, "totals": totals}, best)
            if stopped:
                bar.write(f"stopped at step {step} of {total_steps}: the same command goes on from here")
                return 128 + stopped

    if best.exhausted and step < total_steps:
        print(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")

    # Final evaluation
    scores = evaluate_run(run, splits, tokenizer, config, device)
    results = {"metric": config.metric, "best": best.score, "split": "validation", "epoch": best.epoch}
    results |= {"step": best.step, "seconds": totals["seconds"], "threshold": scores["threshold"]}
    results |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
    results |= {"peak_memory_bytes": peak_memory_bytes(device.type, totals["peak_memory_bytes"])}
    results |= {"validation": scores["validation"], "test": scores.get("test")}
    run.finish(results)
    run.close()
    print(last_line(results, path))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, check=flag))
