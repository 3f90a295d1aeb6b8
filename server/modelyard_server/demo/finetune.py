"""Fine-tunes of all-MiniLM-L6-v2 that take seconds: frozen lower layers, trained upper ones.

The hidden states below the trained layers do not change while training, so they are computed once
for all sentences and every step starts from them. The frozen tensors stay byte-identical to those
of the base model, as in fine-tunes people deploy, which lets a server hold them once.

The classifier of BERT reads the first token alone, and the base model was trained to put what it
knows into the mean of all tokens. With queries of zero every token attends to all others alike, so
the uppermost layers start as that mean and learn from there.

A few hundred sentences are little for a model of 22 million parameters. Three things keep it from
learning them by heart: label smoothing (Szegedy et al. 2016), hiding a share of the tokens from
attention in each step, and keeping the moving average of the weights instead of the last ones
(Polyak averaging).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard_server.demo.text import Labelled

if TYPE_CHECKING:
    import torch
    from transformers import BertForSequenceClassification

__all__ = ["FineTuned", "ProgressCallback", "Recipe", "finetune", "split_held_out"]

ProgressCallback = Callable[[float], None]
"""Called with the share of the work that is done, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a fine-tune is trained.

    `trained_layers` counts from the top. `learning_rate` is the peak for the layers; the pooler
    and the new head learn `head_rate_factor` times as fast. `averaging_layers`, from the top too,
    start with queries of zero. `hidden_token_share` is the share of tokens that a step's attention
    does not see.
    """

    trained_layers: int = 2
    averaging_layers: int = 2
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-4
    head_rate_factor: float = 5.0
    label_smoothing: float = 0.05
    hidden_token_share: float = 0.15
    average_decay: float = 0.9
    held_out_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuned:
    """What a fine-tune came to. `held_out_accuracy` is over sentences it never saw."""

    labels: tuple[str, ...]
    trained_on: int
    held_out: int
    held_out_accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batchable:
    """Sentences at the border of the frozen layers.

    hidden [n, length, 384] float32, mask [n, 1, 1, length] float32 (0 or the lowest number, to
    be added to attention scores), tokens [n] and labels [n] int64.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor


def split_held_out(
    rows: Sequence[Labelled], *, share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Rows to train on and rows held out: `share` of every label's, chosen by `seed`."""
    chooser = random.Random(seed)
    train: list[Labelled] = []
    held_out: list[Labelled] = []
    for label in sorted({row.label for row in rows}):
        own = [row for row in rows if row.label == label]
        chooser.shuffle(own)
        border = round(len(own) * share)
        held_out += own[:border]
        train += own[border:]
    return train, held_out


def finetune(
    rows: Sequence[Labelled],
    *,
    base: Path,
    folder: Path,
    recipe: Recipe,
    progress: ProgressCallback = lambda _: None,
) -> FineTuned:
    """Train a text classifier on `rows` and write it as a transformers folder.

    Args:
        rows: labelled sentences; the labels, sorted, become the classes.
        base: folder of the base model, a BertModel with tokenizer.
        folder: an existing empty folder; gets config.json with the labels' names,
            model.safetensors and the tokenizer's files.
        recipe: how to train.
        progress: told the share that is done.
    """
    import torch
    from transformers import AutoTokenizer

    started = time.perf_counter()
    labels = tuple(sorted({row.label for row in rows}))
    train_rows, held_out_rows = split_held_out(rows, share=recipe.held_out_share, seed=recipe.seed)
    # Dropout draws from torch's global generator: seed it for ourselves, and give it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _with_new_head(base, labels)
        _start_as_mean(model, recipe.averaging_layers)
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        train = _run_frozen_layers(model, tokenizer, train_rows, labels, recipe.trained_layers)
        progress(0.15)
        held_out = _run_frozen_layers(
            model, tokenizer, held_out_rows, labels, recipe.trained_layers
        )
        progress(0.2)
        _train(model, train, recipe, lambda share: progress(0.2 + 0.75 * share))
        with torch.inference_mode():
            predicted = _run_trained_layers(
                model, held_out.hidden, held_out.mask, recipe.trained_layers
            ).argmax(dim=1)
        accuracy = (predicted == held_out.labels).float().mean().item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress(1.0)
    return FineTuned(
        labels=labels,
        trained_on=len(train_rows),
        held_out=len(held_out_rows),
        held_out_accuracy=accuracy,
        seconds=time.perf_counter() - started,
    )


def _with_new_head(base: Path, labels: tuple[str, ...]) -> BertForSequenceClassification:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(
        base,
        local_files_only=True,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        architectures=["BertForSequenceClassification"],
    )
    model = BertForSequenceClassification(config)
    # position_ids is a buffer older versions saved; it is computed today.
    missing, unexpected = model.bert.load_state_dict(load_file(base / "model.safetensors"), False)
    if missing or set(unexpected) - {"embeddings.position_ids"}:
        raise ValueError(f"the base model does not fit: {missing + unexpected}")
    model.train(mode=False)
    return model


def _start_as_mean(model: BertForSequenceClassification, layer_count: int) -> None:
    import torch

    layers = model.bert.encoder.layer
    with torch.no_grad():
        for layer in layers[len(layers) - layer_count :]:
            query = layer.get_submodule("attention.self.query")
            for weight in query.parameters():
                weight.zero_()


def _run_frozen_layers(
    model: BertForSequenceClassification,
    tokenizer: Callable[..., dict[str, torch.Tensor]],
    rows: Sequence[Labelled],
    labels: tuple[str, ...],
    trained_layers: int,
) -> _Batchable:
    import torch

    encoded = tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
    attended = encoded["attention_mask"]
    mask = (1.0 - attended[:, None, None, :].float()) * torch.finfo(torch.float32).min
    layers = model.bert.encoder.layer
    # no_grad, not inference_mode: training starts from these tensors.
    with torch.no_grad():
        hidden = model.bert.embeddings(
            encoded["input_ids"], token_type_ids=encoded["token_type_ids"]
        )
        for layer in layers[: len(layers) - trained_layers]:
            hidden = layer(hidden, mask)
    return _Batchable(
        hidden=hidden,
        mask=mask,
        tokens=attended.sum(dim=1),
        labels=torch.tensor([labels.index(row.label) for row in rows]),
    )


def _run_trained_layers(
    model: BertForSequenceClassification,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    trained_layers: int,
) -> torch.Tensor:
    layers = model.bert.encoder.layer
    for layer in layers[len(layers) - trained_layers :]:
        hidden = layer(hidden, mask)
    assert model.bert.pooler is not None
    logits: torch.Tensor = model.classifier(model.dropout(model.bert.pooler(hidden)))
    return logits


def _train(
    model: BertForSequenceClassification,
    data: _Batchable,
    recipe: Recipe,
    progress: ProgressCallback,
) -> None:
    import torch

    layers = model.bert.encoder.layer
    upper = [
        weight
        for layer in layers[len(layers) - recipe.trained_layers :]
        for weight in layer.parameters()
    ]
    assert model.bert.pooler is not None
    head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    head_rate = recipe.learning_rate * recipe.head_rate_factor
    optimizer = torch.optim.AdamW(
        [{"params": upper, "lr": recipe.learning_rate}, {"params": head, "lr": head_rate}],
        weight_decay=0.01,
    )
    count = len(data.labels)
    steps = recipe.epochs * -(-count // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.learning_rate, head_rate], total_steps=steps, pct_start=0.1
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    trained = upper + head
    averages = [weight.detach().clone() for weight in trained]
    done = 0
    model.train()
    for _ in range(recipe.epochs):
        # Sentences of about the same length together: padding is a third of the work otherwise.
        order = torch.argsort(data.tokens + 6 * torch.rand(count))
        batches = [
            order[first : first + recipe.batch_size] for first in range(0, count, recipe.batch_size)
        ]
        for index in torch.randperm(len(batches)).tolist():
            batch = batches[index]
            length = int(data.tokens[batch].max())
            mask = data.mask[batch, :, :, :length]
            hide = torch.rand(mask.shape) < recipe.hidden_token_share
            hide[..., 0] = False
            mask = mask.masked_fill(hide, torch.finfo(mask.dtype).min)
            logits = _run_trained_layers(
                model, data.hidden[batch, :length], mask, recipe.trained_layers
            )
            loss = loss_of(logits, data.labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for average, weight in zip(averages, trained, strict=True):
                average.lerp_(weight.detach(), 1 - recipe.average_decay)
            done += 1
            progress(done / steps)
    model.train(mode=False)
    with torch.no_grad():
        for average, weight in zip(averages, trained, strict=True):
            weight.copy_(average)
