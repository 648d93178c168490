"""Train the emotion classifier; started again after a stop of any kind, it goes on where it was.

    python emotions/train.py --sample               # offline, the bundled texts, about a minute on 2 cores
    python emotions/train.py --check                # read all data, run one batch, write nothing
    python emotions/train.py                        # the real run, after python emotions/prepare.py
    torchrun --nproc_per_node 2 --max-restarts 3 emotions/train.py [--shard true]
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from common.checkpoint import (
    Best,
    Run,
    RunError,
    StopSignal,
    environment,
    peak_memory_bytes,
    read_last,
    run_results,
)
from common.metrics import mean_average_precision, multilabel_metrics
from common.seed import seed_everything, seed_micro_batch
from emotions.config import Config, UserError, run_config, run_path, run_script, shown
from emotions.dataset import Draw, Split, fingerprint, load_splits, make_loader, repeated_in_test
from emotions.evaluate import check_data, evaluate_run, mean_loss, predict_logits, probabilities
from emotions.gradient_health import collapse, gradient_health, parameter_group
from emotions.labels import EMOTIONS
from emotions.loss import class_weights, emotion_loss
from emotions.model import (
    MODEL_INPUTS,
    EmotionClassifier,
    autocast_dtype,
    build_model,
    load_tokenizer,
    prior_logits,
    save_model,
)
from emotions.parallel import (
    Processes,
    all_reduce,
    barrier,
    broadcast,
    end_processes,
    full_tensor,
    gradient_sync,
    load_training_state,
    parallelize,
    require_space,
    start_processes,
    training_state,
    watchdog,
)
from emotions.report import print_summary
from emotions.sampling import draw_weights, epoch_steps
from emotions.thresholds import thresholds_json, tune


def make_optimizer(
    model: EmotionClassifier, total_steps: int, config: Config, device: torch.device
) -> tuple[Optimizer, LRScheduler, torch.amp.GradScaler]:
    """AdamW without decay on biases and norms, the head at its own rate; warm-up, then decay; the scaler for fp16."""
    groups = []
    for is_head, factor in ((False, 1.0), (True, config.head_lr_factor)):
        part = [p for name, p in model.named_parameters() if (parameter_group(model, name) == "head") == is_head]
        for decayed in (True, False):  # biases and norm weights are vectors
            parameters = [p for p in part if (p.ndim >= 2) == decayed]
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": parameters, "weight_decay": decay, "lr": config.learning_rate * factor})
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    schedules = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    scheduler = schedules[config.schedule](optimizer, round(config.warmup_ratio * total_steps), total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(config.amp, device) == torch.float16)
    return optimizer, scheduler, scaler


def accumulate_gradients(
    module: nn.Module,
    micro_batches: list[dict[str, Tensor]],
    counted: list[bool],
    examples: int,
    weights: Tensor | None,
    scaler: torch.amp.GradScaler,
    config: Config,
    step: int,
    processes: Processes,
) -> list[float]:
    """Add this process's part of one optimizer step's gradient; the summed loss of each of its micro-batches.

    Losses are summed over rows and divided by the examples of the whole step in all processes, so that k micro-batches
    of b in each of w processes give the gradient of one batch of k * b * w. counted: false for a stand-in.
    """
    rank, world, device = processes
    dtype = autocast_dtype(config.amp, device)
    losses = []
    module.train()
    for micro_step, (batch, counts) in enumerate(zip(micro_batches, counted)):
        seed_micro_batch(config.seed, step, micro_step, rank)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
        with gradient_sync(module, last=micro_step == len(micro_batches) - 1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = module(**inputs)
            loss = emotion_loss(logits, batch["labels"], batch["known"], config, weights).sum() * counts
            scaler.scale(loss * (world / examples)).backward()  # the processes' gradients are averaged, not summed
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def refuse_non_finite(what: str, values: list[float], batches: list[list[Draw]], split: Split, step: int) -> None:
    """End the run, naming the batch, before a loss or gradient that is no number reaches the weights."""
    for value, draws in zip(values, batches):
        if not math.isfinite(value):
            lines = ", ".join(str(split.rows[draw.row].line) for draw in draws)
            raise UserError(
                f"the {what} is {value} at step {step + 1}, in the batch of train.jsonl lines {lines}; best/ is "
                "untouched. A lower learning_rate or amp off may help"
            )


def clip_gradient(
    model: EmotionClassifier, optimizer: Optimizer, scaler: torch.amp.GradScaler, config: Config
) -> float:
    """Take the loss scale out of the gradient and clip it; its norm before clipping."""
    scaler.unscale_(optimizer)
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)).item()


def update(optimizer: Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> bool:
    """One optimizer step, unless the scaler found an overflow. The schedule moves only if the optimizer did.

    Returns whether it did.
    """
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if stepped := scaler.get_scale() >= scale:  # the scaler lowers its scale when it skips a step
        scheduler.step()
    return stepped


def validate(
    model: EmotionClassifier,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    weights: Tensor | None,
    config: Config,
    processes: Processes,
    restart_watchdog: Callable[[], None],
) -> tuple[dict, dict]:
    """Validation scores, at .5 and at the one threshold that is best there, and all thresholds tuned there."""
    logits = predict_logits(model, split, tokenizer, config, processes, restart_watchdog)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    labels, known, probability = split.labels, split.known, probabilities(logits)
    thresholds = tune(logits.double().numpy(), labels, known, config.threshold_smoothing)
    predictions = {"f1_macro_at_half": probability >= 0.5, "f1_macro": logits.double().numpy() >= thresholds.shared}
    scores = {"loss": mean_loss(logits, split, None if weights is None else weights.cpu(), config)}
    scores |= {"map": mean_average_precision(labels, probability, known)}
    for name, cells in predictions.items():
        scores[name] = multilabel_metrics(labels, cells, EMOTIONS, known)["f1_macro"]
    return scores, thresholds_json(thresholds)


def save_last(run: Run, state: dict, best: Best) -> None:
    """The run's last.pt, if the disk has room for it beside the old one."""
    moments = [tensor for values in state["optimizer"]["state"].values() for tensor in values.values()]
    require_space(run.path, [*state["model"].values(), *moments])
    run.save_last(state, best)


def refuse_another_machine(run: Run, dtype: torch.dtype | None, world: int) -> None:
    """A run goes on with the autocast type and the number of processes that it was begun with, or not at all."""
    if (begun := run.environment.get("autocast")) != str(dtype):
        now = f"amp {run.config['amp']} means {dtype} on this machine"
        raise UserError(f"{run.path} was begun with autocast {begun}, {now}")
    if (begun := run.environment.get("processes")) != world:
        raise UserError(
            f"{run.path} was begun with {begun} processes, these are {world}: an optimizer step would have other rows. "
            "Start as many, or give another --run_dir"
        )


def last_line(results: dict, path: Path) -> str:
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (epoch {results['epoch']})"]
    honest = results["validation"]["cross_fitted"]["at_per_label"]["f1_macro"]
    parts.append(f"validation f1_macro {honest:.4f} with cross-fitted thresholds")
    if results["test"]:
        half, tuned = (results["test"][key]["f1_macro"] for key in ("at_half", "at_per_label"))
        parts.append(f"test f1_macro {half:.4f} at .5, {tuned:.4f} at the tuned thresholds")
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {shown(path)}"])


def main(config: Config, check: bool = False) -> int | None:
    # Setup
    path = run_path(config)
    processes = start_processes(config)
    rank, world, device = processes
    if not check and (results := run_results(path, run_config(config))):
        print(f"finished before\n{last_line(results, path)}")
        end_processes()
        return None
    seed_everything(config.seed, config.deterministic)
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    dtype = autocast_dtype(config.amp, device)
    print(" | ".join(f"{name} {value}" for name, value in (info | {"amp": dtype or "off", "processes": world}).items()))

    # Data
    tokenizer = load_tokenizer(config)
    splits = load_splits(config, tokenizer)
    train = splits["train"]
    print_summary(splits, repeated_in_test(splits), config)
    drawn = draw_weights(train, config)
    rows_per_epoch = round(float(drawn.sum()))
    per_step = config.gradient_accumulation_steps * world  # micro-batches
    steps_per_epoch = math.ceil(math.ceil(rows_per_epoch / config.batch_size) / per_step)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)

    # Model
    positives, known = drawn @ train.labels, drawn @ train.known
    model = build_model(config, tokenizer, prior_logits(positives, known)).to(device)
    weights = class_weights(config.class_weights, positives, known)
    parameters = sum(p.numel() for p in model.parameters())
    rows_per_step = config.batch_size * per_step
    print(f"{parameters:,} parameters | {rows_per_epoch} rows an epoch, {rows_per_step} a step | {total_steps} steps")
    weights = None if weights is None else weights.to(device)
    module = parallelize(model, config, processes)

    # Optimizer
    optimizer, scheduler, scaler = make_optimizer(model, total_steps, config, device)
    if check:
        draws = epoch_steps(train, drawn, config, 0, rank, world)[0].micro_batches[:1]
        batch = next(iter(make_loader(draws, train, tokenizer, config)))
        examples = len(batch["labels"])
        losses = accumulate_gradients(module, [batch], [True], examples, weights, scaler, config, 0, processes)
        refuse_non_finite("loss", losses, draws, train, step=0)
        print(f"check passed | loss of one batch {losses[0] / examples:.4f} | nothing was written")
        end_processes()
        return None

    # Resume
    best = Best("min" if config.metric == "loss" else "max", config.patience)
    run, state, outcome = None, None, "to be trained"
    if rank == 0:
        try:
            begun = {"data_sha256": fingerprint(splits), "autocast": str(dtype), "processes": world}
            run = Run(path, run_config(config), info | begun)
            if run.results is None:
                check_data(run, splits, config)
                refuse_another_machine(run, dtype, world)
                state = run.load_last(best)
            else:  # another process finished it meanwhile
                outcome = "finished"
        except (UserError, RunError, OSError):  # what run_script says in one line
            broadcast("refused", processes)  # the others wait for a word
            raise
    outcome = broadcast(outcome, processes)
    if outcome == "refused":
        return 1
    if outcome == "finished":
        if run:
            run.close()
            print(f"finished before\n{last_line(run.results, path)}")
        end_processes()
        return None
    if rank:
        state, _ = read_last(path / "last.pt", run_config(config), best) or (None, 0)
    step = 0
    totals = {"seconds": 0.0, "train_seconds": 0.0, "tokens": 0, "loss": 0.0, "examples": 0}
    totals |= {"skipped_steps": 0, "peak_memory_bytes": None}  # skipped since the last line
    if state:
        try:
            load_training_state(model, optimizer, (state["model"], state["optimizer"]), config.shard)
            scheduler.load_state_dict(state["scheduler"])
            scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path / 'last.pt'} does not fit {config.model}: {error}") from error
        step, totals = state["step"], state["totals"]
        print(f"resuming from step {step} of {total_steps} in {shown(path)}")
    else:
        print(f"starting in {shown(path)}")
    del state

    # Loop
    loader = None
    hidden = True if rank else None  # None: shown on a terminal
    with StopSignal() as stop, watchdog(config.stall_seconds) as restart_watchdog, tqdm(total=total_steps, initial=step, disable=hidden) as bar:
        while step < total_steps and not best.exhausted:
            restart_watchdog()
            began = time.perf_counter()
            epoch, position = divmod(step, steps_per_epoch)
            if loader is None:
                steps = epoch_steps(train, drawn, config, epoch, rank, world)
                rest = [draws for later in steps[position:] for draws in later.micro_batches]
                loader = iter(make_loader(rest, train, tokenizer, config))
            chosen, counted, examples = steps[position]
            micro_batches = [next(loader) for _ in chosen]
            losses = accumulate_gradients(
                module, micro_batches, counted, examples, weights, scaler, config, step, processes
            )
            refuse_non_finite("loss", losses, chosen, train, step)
            grad_norm = clip_gradient(model, optimizer, scaler, config)
            if not scaler.is_enabled():  # the scaler skips such a step by itself
                refuse_non_finite("gradient norm", [grad_norm], [list(chain(*chosen))], train, step)
            learning_rate = scheduler.get_last_lr()[0]
            logged = (step + 1) % config.logging_steps == 0
            health = gradient_health(model, grad_norm, config) if logged and math.isfinite(grad_norm) else {}
            totals["skipped_steps"] += not update(optimizer, scheduler, scaler)
            step += 1
            bar.update()

            seen = sum(int(batch["attention_mask"].sum()) for batch, counts in zip(micro_batches, counted) if counts)
            figures = torch.tensor([sum(losses), seen, stop.number], dtype=torch.float64)
            loss, tokens, stopped = all_reduce(figures, processes).tolist()  # stopped: a signal to any of the processes
            totals["tokens"] += int(tokens)
            totals["loss"] += loss
            totals["examples"] += examples
            totals["train_seconds"] += time.perf_counter() - began
            if logged:
                record = {"event": "step", "step": step, "epoch": round(step / steps_per_epoch, 4)}
                record |= {"loss": loss / examples, "learning_rate": learning_rate, "grad_norm": grad_norm}
                record |= {"tokens_per_second": totals["tokens"] / totals["train_seconds"]}
                if run:
                    run.log(record | {"skipped_steps": totals["skipped_steps"], "gradients": health})
                bar.write(
                    f"step {step}/{total_steps} | epoch {record['epoch']:.2f} | loss {record['loss']:.4f} | "
                    f"lr {learning_rate:.2e} | grad norm {grad_norm:.2f} | {record['tokens_per_second']:.0f} tokens/s"
                )
                if wrong := collapse(health, totals["skipped_steps"], config.logging_steps):
                    bar.write(f"warning: step {step}: {wrong}")
                totals["skipped_steps"] = 0
            epoch_ended = step % steps_per_epoch == 0 or step == total_steps
            if epoch_ended:
                loader = None
                scores, thresholds = validate(model, splits["validation"], tokenizer, weights, config, processes, restart_watchdog)
                record = {"event": "evaluation", "epoch": epoch + 1, "step": step}
                record |= {"train_loss": totals["loss"] / totals["examples"], **scores}
                totals |= {"loss": 0.0, "examples": 0}
                better = best.update(scores[config.metric], epoch + 1, step)
                if run:
                    run.log(record)
                bar.write(
                    f"epoch {epoch + 1} | train loss {record['train_loss']:.4f} | validation loss {scores['loss']:.4f}"
                    f" | f1_macro {scores['f1_macro']:.4f} at {thresholds['shared']:.3f}, "
                    f"{scores['f1_macro_at_half']:.4f} at .5 | map {scores['map']:.4f}{' | best' * better}"
                )
            totals["seconds"] += time.perf_counter() - began
            totals["peak_memory_bytes"] = peak_memory_bytes(device.type, totals["peak_memory_bytes"])
            if epoch_ended or step % config.save_steps == 0 or stopped:
                model_state, optimizer_state = training_state(model, optimizer, config.shard)
                state = {"model": model_state, "optimizer": optimizer_state, "scheduler": scheduler.state_dict()}
                state |= {"scaler": scaler.state_dict(), "step": step, "totals": totals}
                if run and epoch_ended and better:
                    require_space(path, model_state.values())
                    run.save_best(partial(save_model, model_state, model.config, tokenizer, thresholds))
                barrier(processes)
                restart_watchdog()
                if run:
                    save_last(run, state, best)
                barrier(processes)
                restart_watchdog()
            if stopped:
                bar.write(f"stopped at step {step} of {total_steps}: the same command goes on from here")
                end_processes()
                return 128 + (stop.number or signal.SIGTERM)  # the signal may have gone to another process
    if best.exhausted and step < total_steps:
        print(f"stopped by patience: {best.stale_evaluations} evaluations without a better {config.metric}")
    end_processes()
    if run is None:
        return None

    # Final evaluation
    scores = evaluate_run(run, splits, tokenizer, config, device)
    results = {"metric": config.metric, "best": best.score, "split": "validation", "epoch": best.epoch}
    results |= {"step": best.step, "seconds": totals["seconds"], "thresholds": scores["thresholds"]}
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
