"""Fine-tuning with TRL's SFTTrainer, for the warm-up and for training on the selection."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from iprox.data import Batch, Encoded, iter_batches
from iprox.distributed import from_first, is_sharded, own_device, processes, rank, whole_weights
from iprox.errors import InputError
from iprox.models.adapters import is_adapted
from iprox.models.cpu.shapes import RELEASE_EVERY, release_memory
from iprox.models.cpu.training import COMPILE_STEPS, fast_training
from iprox.models.loss import causal_lm_logits, causal_lm_losses, logits_in_parts
from iprox.models.saving import save_model

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model, and the learning rate that TracIn weights it with: the mean over the steps of its epoch."""

    path: str
    step: int
    epoch: float
    learning_rate: float
    loss: float


@dataclass(slots=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        checkpoints: saved models.
        history: one entry per optimizer step: step, epoch, loss, learning_rate.
        tokens: number of tokens read.
        uncompiled: why the model could not be compiled although it was requested; "" otherwise.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    uncompiled: str = ""


def train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    output: Path,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 16,
    accumulate: int = 1,
    bf16: bool = False,
    every_epoch: bool = True,
    seed: int = 0,
    store_dtype: torch.dtype | None = None,
    optimizer_state: bool = False,
    adapters_only: bool = False,
    compile_model: bool | Literal["auto"] = "auto",
    progress: Callable[[int], None] | None = None,
    tracking: Mapping[str, str] = MappingProxyType({"report_to": "none"}),
) -> TrainingResult:
    """Fine-tune a model on its supervised tokens, as TRL does, and save checkpoints.

    Uses AdamW, 3 % linear warm-up, cosine decay, and batches of similar length. Checkpoints are safetensors in
    `output/checkpoint-STEP`. TRL replaces the model's forward method, so load a checkpoint rather than use `model`
    afterwards. Several processes (`iprox.distributed`) share every batch, and take the steps that one would take.

    Args:
        model: model with float32 weights; bfloat16 is used for products only. If it has LoRA adapters
            (`iprox.models.adapters.with_lora`), only these are trained, and the frozen weights may be bfloat16.
        tokenizer: tokenizer, saved with each checkpoint.
        encoded: training examples; those without a supervised token are left out.
        output: folder for the checkpoints, created if missing.
        epochs: passes over the examples.
        learning_rate: peak learning rate.
        batch_size: examples per batch; a multiple of the number of processes.
        accumulate: batches per optimizer step.
        bf16: whether to multiply in bfloat16.
        every_epoch: whether to keep a checkpoint of every epoch rather than only the last.
        seed: seed for the order.
        store_dtype: dtype of the checkpoints; the model's own if None.
        optimizer_state: whether to keep Adam's moments with each checkpoint: eight bytes per parameter of linear
            layers.
        adapters_only: whether to save adapters alone rather than the model with the adapters merged.
        compile_model: whether to compile the decoder layers on a CPU; auto does if there are enough steps.
        progress: function called with 1 after each optimizer step.
        tracking: service that transformers logs to, as `report_to`, `project` and `run_name` of its arguments.

    Raises:
        InputError: there is nothing to train on.
        FloatingPointError: the loss is not finite; the message names the step.
    """
    rows = [example for example in encoded if example.supervised > 0]
    if not rows:
        raise InputError("no example with a supervised token to train on")
    columns = {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "labels": [row.labels.tolist() for row in rows],
        "length": [len(row.input_ids) for row in rows],
    }
    world = processes()
    device = model.device if world == 1 else own_device()
    if world > 1:  # the last row has no supervised token: it fills up what the processes cannot share equally
        for name, blank in (("input_ids", [0]), ("labels", [-100]), ("length", 1)):
            columns[name].append(blank)
    dataset = Dataset.from_dict(columns)
    output.mkdir(parents=True, exist_ok=True)
    steps = epochs * steps_per_epoch(len(rows), batch_size, accumulate)
    # transformers 5.23 renames gradient_checkpointing to activation_checkpointing and warns about the old name.
    names = {entry.name for entry in fields(SFTConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = SFTConfig(
        output_dir=str(output),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size // world,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="cosine",
        warmup_steps=int(0.03 * steps),  # the learning rate of the first of these steps is 0
        bf16=bf16,
        use_cpu=device.type == "cpu",
        # Recomputing activations saves memory, which is scarce on a GPU; on a CPU it only costs time.
        **{checkpointing: device.type == "cuda"},  # pyright: ignore[reportArgumentType]
        train_sampling_strategy="group_by_length",
        max_length=None,  # already cut, from the left of the prompt
        packing=False,
        logging_steps=1,
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # a loss that is not finite must stop the training
        save_strategy="no",  # Trainer's own checkpoints hold pickles; `_Recorder` saves safetensors
        **tracking,  # pyright: ignore[reportArgumentType]
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )
    if model.device.type == "cuda" and world == 1:
        if model.device.index:
            raise InputError(
                f"transformers trains on the first GPU it sees, not on {model.device}: choose it with "
                f"CUDA_VISIBLE_DEVICES={model.device.index} and device cuda"
            )
        # nn.DataParallel over all visible GPUs would multiply the batch size.
        arguments._n_gpu = 1
    save = functools.partial(save_model, tokenizer=tokenizer, dtype=store_dtype, adapters_only=adapters_only)
    recorder = _Recorder(output, save, every_epoch, optimizer_state, progress)
    trainer_class = _TogetherTrainer if world > 1 else SFTTrainer
    if world == 1 and model.device.type != "cuda":
        trainer_class = _SupervisedHeadTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    first = next(iter_batches(rows[:batch_size], 1 << 30))
    whole: Any = model.get_base_model() if is_adapted(model) else model  # the same layers, including adapters

    def trial() -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return causal_lm_losses(whole.train(), first).mean()

    if world > 1:
        trainer.train()
        reason = ""
    else:
        compiled = steps >= COMPILE_STEPS if compile_model == "auto" else compile_model
        with fast_training(whole, compiled, trial) as reason:
            trainer.train()
    result = recorder.result
    result.uncompiled = reason
    result.tokens = epochs * sum(len(row.input_ids) for row in rows)
    return result


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    """Return the number of optimizer steps per epoch; the last batch and the last step may be smaller."""
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def evaluate(model: PreTrainedModel, encoded: Sequence[Encoded], batch_tokens: int) -> dict[str, float]:
    """Evaluate a model on a set of examples.

    Returns:
        `loss`: mean over examples of the mean loss over their supervised tokens, in nats; `token_loss`: mean over all
        supervised tokens; `exact_match`: fraction of examples whose every supervised token is the most likely one given
        the tokens before it; `examples`; `tokens` (supervised).
    """
    example_sum = token_sum = 0.0
    examples = tokens = exact = 0
    with torch.no_grad():
        for batch in iter_batches(encoded, batch_tokens):
            count = batch.input_ids.shape[0]
            sums = torch.zeros(count, dtype=torch.float64, device=model.device)
            numbers, missed = (torch.zeros(count, dtype=torch.long, device=model.device) for _ in range(2))
            for logits, targets, rows in logits_in_parts(model, batch.to(model.device)):
                losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double()
                sums.index_add_(0, rows, losses)
                numbers += torch.bincount(rows, minlength=count)
                missed += torch.bincount(rows[logits.argmax(1) != targets], minlength=count)
            example_sum += float((sums / numbers).sum())
            token_sum += float(sums.sum())
            exact += int(((missed == 0) & (numbers > 0)).sum())
            examples += count
            tokens += int(numbers.sum())
    if examples == 0:
        raise InputError("no example with a supervised token to evaluate on")
    return {
        "loss": example_sum / examples,
        "token_loss": token_sum / tokens,
        "exact_match": exact / examples,
        "examples": examples,
        "tokens": tokens,
    }


class _SupervisedHeadTrainer(SFTTrainer):
    """TRL's loss with the head run on supervised tokens only, for devices without TRL's Triton kernel.

    There TRL computes the logits of every position, including prompts and padding, in float32 tiles: 40 % of a step on
    a 17 M-parameter model. The loss is the same: the sum over supervised tokens divided by their number.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or self.aux_loss_enabled:  # TRL adds the loss that balances experts
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        lengths = inputs["attention_mask"].sum(1)
        batch = Batch(inputs["input_ids"], inputs["labels"], lengths, list(range(len(lengths))))
        logits, targets, _ = causal_lm_logits(model, batch)
        total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


class _TogetherTrainer(SFTTrainer):
    """A trainer of several processes, whose batches together are those of one process."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = self.train_dataset["length"][:-1]  # pyright: ignore
        batch = self.args.train_batch_size * processes()
        grouped = LengthGroupedSampler(batch * self.args.gradient_accumulation_steps, lengths=list(lengths))
        return _SharedOrder(grouped, batch)


class _SharedOrder(torch.utils.data.Sampler):
    """The first process's order, filled up to whole batches with the number of the blank row, which comes last."""

    def __init__(self, order: LengthGroupedSampler, batch: int) -> None:
        self.order, self.fill = order, -len(order) % batch

    def __len__(self) -> int:
        return len(self.order) + self.fill

    def __iter__(self) -> Iterator[int]:
        return iter(from_first(list(self.order)) + [len(self.order)] * self.fill)


class _Recorder(TrainerCallback):
    """Records the loss and learning rate of each step, and saves safetensors at the end of epochs."""

    def __init__(
        self,
        output: Path,
        save: Callable[..., None],
        every_epoch: bool,
        optimizer_state: bool,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.output, self.save, self.every_epoch = output, save, every_epoch
        self.optimizer_state, self.progress = optimizer_state, progress
        self.result = TrainingResult()
        self.rate = 0.0
        self.epoch_start = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {state.global_step}; lower the learning rate"
            )
        self.result.history.append(
            {"step": state.global_step, "epoch": float(state.epoch), "loss": loss, "learning_rate": self.rate}
        )
        if self.progress is not None:
            self.progress(1)
        if state.global_step % RELEASE_EVERY == 0:
            release_memory()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = False
        last = state.global_step >= state.max_steps
        steps = self.result.history[self.epoch_start :]
        self.epoch_start = len(self.result.history)
        if not steps or not (self.every_epoch or last):
            return
        name = f"checkpoint-{state.global_step}"
        optimizer = kwargs["optimizer"] if self.optimizer_state else None
        weights = whole_weights(kwargs["model"]) if is_sharded() else None  # a job of all processes
        if rank() == 0:
            self.save(kwargs["model"], folder=self.output / name, optimizer=optimizer, state=weights)
        mean = {key: sum(step[key] for step in steps) / len(steps) for key in ("learning_rate", "loss")}
        self.result.checkpoints.append(
            Checkpoint(name, state.global_step, float(state.epoch), mean["learning_rate"], mean["loss"])
        )
