"""A GPT-2 of about a million parameters that learns to continue the remarks the demo ships.

It is small enough to train in seconds and real enough to generate: byte-level BPE tokens of its
own (so many that common words are whole, since seconds of training cannot teach spelling), a
language-modelling head tied to its embeddings, an end-of-text token it learns to emit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard_server.demo.finetune import ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["train_storyteller"]

_END_OF_TEXT = "<|endoftext|>"
_VOCABULARY_SIZE = 3072
_CONTEXT_TOKENS = 64
_BATCH_TOKENS = 32
_BATCH_SIZE = 16
_STEPS = 250
_LEARNING_RATE = 5e-3


def train_storyteller(
    sentences: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    progress: ProgressCallback = lambda _: None,
) -> float:
    """Train on `sentences` and write a transformers folder for text generation.

    Args:
        sentences: what to learn, one text each.
        folder: an existing empty folder; gets config.json, generation_config.json,
            model.safetensors and the tokenizer's files.
        seed: of initialization, batches and dropout.
        progress: told the share that is done.

    Returns:
        The cross entropy in nats per token, averaged over the last tenth of training.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _train_tokenizer(sentences)
    end = tokenizer.convert_tokens_to_ids(_END_OF_TEXT)
    assert isinstance(end, int)
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=_CONTEXT_TOKENS,
                n_embd=128,
                n_layer=3,
                n_head=4,
                # It sees every sentence a few times only: nothing to guard against.
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        encoded = [tokenizer(text)["input_ids"] for text in sentences]
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.1
        )
        model.train()
        stream = torch.empty(0, dtype=torch.int64)
        for step in range(_STEPS):
            needed = _BATCH_SIZE * _BATCH_TOKENS
            while len(stream) < needed:
                order = torch.randperm(len(encoded)).tolist()
                flat = [token for index in order for token in (end, *encoded[index])]
                stream = torch.cat([stream, torch.tensor(flat)])
            batch, stream = stream[:needed].view(_BATCH_SIZE, -1), stream[needed:]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress((step + 1) / _STEPS)
    model.train(mode=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-(_STEPS // 10) :]
    return sum(last) / len(last)


def _train_tokenizer(sentences: Sequence[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY_SIZE,
            special_tokens=[_END_OF_TEXT],
            # All 256 bytes, so that there is no text it cannot read.
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Its constructor carries no annotations.
    make: Any = PreTrainedTokenizerFast
    tokenizer_with_names: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        model_max_length=_CONTEXT_TOKENS,
    )
    return tokenizer_with_names
