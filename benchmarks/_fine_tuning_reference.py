"""LC-Rec's recipe with ``transformers`` and PEFT, as ``fine_tuning.py`` compares it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _harness import timed_parts
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments


class _Trainer(Trainer):
    """Notes each step's loss, which the Trainer's log rounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


class Recipe:
    """The model that people train, and how.

    Args:
        folder: the language model before it had codes.
        ours: a prepared AlignTokenRec, whose initial weights it takes.
        adapter: ``full`` or ``lora``.
        rate: step size.
        clip: norm of the gradient.
    """

    def __init__(self, folder: Path, ours: Any, adapter: str, rate: float, clip: float) -> None:
        self.rate, self.clip = rate, clip
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        first = len(self.tokenizer)
        self.tokenizer.add_tokens(list(ours.item_tokens.vocabulary))
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        with torch.no_grad():
            self.model.get_input_embeddings().weight[first:] = ours.code_tokens.inputs
            self.model.get_output_embeddings().weight[first:] = ours.code_tokens.outputs
        # No dropout anywhere, so that both sides compute the same.
        if adapter == "lora":
            own = dict(ours.backbone.decoder.named_parameters())
            rows = list(range(first, len(self.tokenizer)))
            self.model = get_peft_model(
                self.model,
                LoraConfig(
                    r=ours.config["lora_rank"], lora_alpha=ours.config["lora_alpha"], lora_dropout=0.0,
                    target_modules="all-linear", trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
                    task_type="CAUSAL_LM",
                ),
            )  # fmt: skip
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    if "lora_" in name:
                        weight.copy_(own[name.removeprefix("base_model.model.model.")])
        count = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        assert count == sum(weight.numel() for weight in ours.parameters() if weight.requires_grad)

    def collate(self, samples: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Prompts with answers, right-padded; only answers have labels."""
        whole = self.tokenizer(
            [prompt + answer + self.tokenizer.eos_token for prompt, answer in samples], return_tensors="pt",
            padding="longest", return_token_type_ids=False,
        )  # fmt: skip
        prompts = self.tokenizer([prompt for prompt, _ in samples], return_length=True)["length"]
        labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        asked = torch.arange(labels.shape[1]) < torch.tensor(prompts).unsqueeze(1)
        return {**whole, "labels": labels.masked_fill(asked, -100)}

    def trainer(self, samples: Sequence[tuple[str, str]], batch_size: int) -> _Trainer:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=self.rate,
                weight_decay=0.0, lr_scheduler_type="cosine", max_grad_norm=self.clip,
                train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
                use_cpu=True, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            )  # fmt: skip
        made = _Trainer(model=self.model, args=arguments, train_dataset=list(samples), data_collator=self.collate)
        made.remove_callback(PrinterCallback)
        return made

    def run(self, trainer: _Trainer) -> list[float]:
        trainer.losses.clear()
        trainer.train()
        return [float(loss) for loss in trainer.losses]

    def parts(self, samples: Sequence[tuple[str, str]], batch_size: int) -> dict[str, float]:
        """Milliseconds of processors a step, by part."""
        trainer = self.trainer(samples, batch_size)
        seconds: dict[str, float] = {}
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        trainer.data_collator = lambda rows: self.collate(rows)
        trainer.create_optimizer()
        causal._loss_function = causal.loss_function  # a property reads it
        places = [
            (trainer, "data_collator", "prompts"), (causal.model, "forward", "decoder"),
            (causal.lm_head, "forward", "head"), (causal, "_loss_function", "cross-entropy"),
            (trainer.accelerator, "backward", "backward"), (trainer.accelerator, "clip_grad_norm_", "optimizer"),
            (trainer.optimizer, "step", "optimizer"), (self.model, "zero_grad", "optimizer"),
        ]  # fmt: skip
        with timed_parts(places, seconds):
            self.run(trainer)
        steps = -(-len(samples) // batch_size)
        return {part: round(1e3 * value / steps, 1) for part, value in seconds.items()}
