"""Train adapters, pooler and head on ReDSM5's pairs; started again after a stop of any kind, it goes on where it was.

    python redsm5_nli/train.py --sample          # offline, the bundled posts, about a minute on 2 cores
    python redsm5_nli/train.py --check           # read all data, run one batch, write nothing
    python redsm5_nli/train.py                   # the real run: gemma-3-1b-it on redsm5_nli/data
"""

import math
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from common.checkpoint import Best, Run, StopSignal, environment, peak_memory_bytes, run_results
from common.seed import seed_everything, seed_micro_batch
from redsm5_nli.config import Config, UserError, run_config, run_path, run_script, shown
from redsm5_nli.criteria import load_criteria
from redsm5_nli.dataset import (
    Collator,
    Example,
    Split,
    epoch_batches,
    fingerprint,
    load_splits,
    make_loader,
)
from redsm5_nli.evaluate import (
    check_data,
    evaluate_run,
    predict_logits,
    probabilities,
    score_split,
    tune_thresholds,
)
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import (
    Matcher,
    build_model,
    make_collator,
    pick_device,
    save_model,
    weights_dtype,
)
from redsm5_nli.report import print_summary


def make_optimizer(model: Matcher, total_steps: int, config: Config) -> tuple[Optimizer, LRScheduler]:
    """AdamW on what trains, without decay on biases and magnitudes; linear warm-up, then linear decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup_ratio * total_steps), total_steps)
    return optimizer, scheduler


def accumulate_gradients(
    model: Matcher, micro_batches: list[dict[str, Tensor]], weights: Tensor | None, config: Config, step: int
) -> list[float]:
    """Add the gradient of one optimizer step; the summed loss of each micro-batch.

    Losses are summed over pairs and divided by the pairs of the whole step, so that k micro-batches of b give the
    gradient of one batch of k * b.
    """
    device = next(model.parameters()).device
    pairs = sum(batch["labels"].numel() for batch in micro_batches)
    losses = []
    model.train()
    for micro_step, batch in enumerate(micro_batches):
        seed_micro_batch(config.seed, step, micro_step)
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        loss = pair_loss(model(**inputs), labels, weights).sum()
        (loss / pairs).backward()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def refuse_non_finite(
    what: str, values: list[float], batches: list[list[int]], examples: list[Example], step: int
) -> None:
    """End the run, naming the batch, before a loss or gradient that is no number reaches the weights."""
    for value, rows in zip(values, batches):
        if not math.isfinite(value):
            posts = ", ".join(dict.fromkeys(examples[row].post.id for row in rows))
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of posts {posts}; best/ is untouched. "
                "A lower learning_rate or amp off may help"
            )


def clip_gradient(model: Matcher, config: Config) -> float:
    """Clip the gradient of what trains; its norm before clipping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf).item()


def update(optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """One optimizer step, after which the adapters form what depends on their weights anew."""
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def validate(
    model: Matcher, split: Split, collator: Collator, weights: Tensor | None, config: Config
) -> tuple[dict, dict]:
    """Validation scores at .5, which choose the epoch, and the thresholds that are best on these posts."""
    logits = predict_logits(model, split, collator, config)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    thresholds = tune_thresholds(probabilities(logits), split.labels, collator.criteria)
    scores = score_split(logits, split.labels, thresholds, None if weights is None else weights.cpu())
    at_half = {name: scores["at_half"][name] for name in ("f1_macro", "f1_positive", "accuracy")}
    return {"loss": scores["loss"], **at_half, "auprc": scores["auprc"]}, thresholds


def last_line(results: dict, path: Path) -> str:
    validation, test = (results[name]["at_half"]["f1_positive"] for name in ("validation", "test"))
    tuned = results["test"]["at_global"]["f1_positive"]
    return (
        f"done | {results['split']} {results['metric']} {results['best']:.4f}, f1_positive {validation:.4f} "
        f"(epoch {results['epoch']}) | test f1_positive {test:.4f} at .5, {tuned:.4f} at the tuned threshold "
        f"{results['thresholds']['global']:.4f} | {results['seconds']:.0f} s | results in {shown(path)}"
    )


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    if not check and (results := run_results(path, run_config(config))):
        print(f"finished before\n{last_line(results, path)}")
        return None
    seed_everything(config.seed, config.deterministic)
    device = pick_device()
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    dtype = weights_dtype(config.amp, device)
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | decoder in {dtype}")
    if config.amp == "auto" and dtype == torch.float32:
        print("this machine has no bf16, and Gemma 3 overflows fp16: the decoder runs in fp32")

    # Data
    criteria = load_criteria(config.criteria_file)
    collator = make_collator(config, criteria)
    splits, kinds = load_splits(config, collator)
    print_summary(splits, kinds, criteria, config)
    train, lengths = splits["train"].examples, splits["train"].lengths
    accumulation = config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(math.ceil(len(train) / config.batch_size) / accumulation)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    model = build_model(config, device)
    weights = class_weights(config.class_weights, splits["train"].labels)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.trained_state().values())
    balance = "off" if weights is None else weights.numpy().round(4)
    share = f"{trained:,} trained ({trained / parameters:.2%})"
    print(f"{parameters:,} parameters, {share} | class weights {balance} | {total_steps} steps")
    weights = None if weights is None else weights.to(device)

    # Optimizer
    optimizer, scheduler = make_optimizer(model, total_steps, config)
    if check:
        batches = epoch_batches(lengths, config.batch_size, config.seed, epoch=0)[:1]
        micro_batches = list(make_loader(train, batches, collator, config))
        losses = accumulate_gradients(model, micro_batches, weights, config, step=0)
        refuse_non_finite("loss", losses, batches, train, step=0)
        mean = losses[0] / sum(len(train[row].criteria) for row in batches[0])
        print(f"check passed | loss of one batch {mean:.4f} | nothing was written")
        return None

    # Resume
    run = Run(path, run_config(config), info | {"data_sha256": fingerprint(splits, criteria), "dtype": str(dtype)})
    if run.results:  # another process finished it meanwhile
        run.close()
        return main(config)
    check_data(run, splits, criteria, config)
    if (begun := run.environment.get("dtype")) != str(dtype):
        raise UserError(f"{path} was begun in {begun}, amp {config.amp} means {dtype} on this machine")
    best = Best("min" if config.metric == "loss" else "max", config.patience)
    step = 0
    totals = {"seconds": 0.0, "train_seconds": 0.0, "tokens": 0, "loss": 0.0, "examples": 0}
    totals |= {"peak_memory_bytes": None}
    if state := run.load_last(best):
        try:
            model.load_trained_state(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
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
                loader = iter(make_loader(train, batches[position * accumulation :], collator, config))
            group = batches[position * accumulation : (position + 1) * accumulation]
            micro_batches = [next(loader) for _ in group]
            losses = accumulate_gradients(model, micro_batches, weights, config, step)
            refuse_non_finite("loss", losses, group, train, step)
            grad_norm = clip_gradient(model, config)
            refuse_non_finite("gradient norm", [grad_norm], [list(chain(*group))], train, step)
            learning_rate = scheduler.get_last_lr()[0]
            update(optimizer, scheduler)
            step += 1
            bar.update()

            pairs = sum(batch["labels"].numel() for batch in micro_batches)
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
                scores, thresholds = validate(model, splits["validation"], collator, weights, config)
                record = {"event": "evaluation", "epoch": epoch + 1, "step": step}
                record |= {"train_loss": totals["loss"] / totals["examples"], **scores}
                totals |= {"loss": 0.0, "examples": 0}
                run.log(record)
                if better := best.update(scores[config.metric], epoch + 1, step):
                    run.save_best(partial(save_model, model, config, criteria, thresholds))
                bar.write(
                    f"epoch {epoch + 1} | train loss {record['train_loss']:.4f} | validation loss {scores['loss']:.4f}"
                    f" | f1_macro {scores['f1_macro']:.4f} | f1_positive {scores['f1_positive']:.4f}"
                    f"{' | best' * better}"
                )
            totals["seconds"] += time.perf_counter() - began
            totals["peak_memory_bytes"] = peak_memory_bytes(device.type, totals["peak_memory_bytes"])
            stopped = stop.number  # read once: a signal during the save counts at the next step
            if epoch_ended or step % config.save_steps == 0 or stopped:
                state = {"model": model.trained_state(), "optimizer": optimizer.state_dict()}
                state |= {"scheduler": scheduler.state_dict(), "step": step, "totals": totals}
                run.save_last(state, best)
            if stopped:
                bar.write(f"stopped at step {step} of {total_steps}: the same command goes on from here")
                return 128 + stopped

    if best.exhausted and step < total_steps:
        print(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")

    # Final evaluation
    scores = evaluate_run(run, model, splits, collator, config)
    results = {"metric": config.metric, "best": best.score, "split": "validation", "epoch": best.epoch}
    results |= {"step": best.step, "seconds": totals["seconds"], "thresholds": scores["thresholds"]}
    results |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
    results |= {"peak_memory_bytes": peak_memory_bytes(device.type, totals["peak_memory_bytes"])}
    results |= {"trained_parameters": trained} | {name: scores[name] for name in ("posts_cut", "validation", "test")}
    run.finish(results)
    run.close()
    print(last_line(results, path))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": "read all data, run one batch, write nothing"}
    sys.exit(run_script(main, __doc__, check=flag))
