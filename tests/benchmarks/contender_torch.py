"""Peers in PyTorch: the reference's losses and padding, and sentence-transformers.

The reference (github.com/hjq133/piccolo-embedding) is written anew here from what it computes: each
text field is padded to its longest text and encoded separately, whatever occurs twice is encoded
twice, each prefix has its own products, CoSENT is dense. In its favour: transformers' BertModel
with sdpa attention, fused AdamW, no Python loop over labels.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from common import (
    DATASETS,
    DIMS,
    LEARNING_RATE,
    LENGTH,
    MOST_SLOTS_KEPT,
    QUERY_LENGTH,
    Rows,
    Settings,
    StepReport,
    best_rate,
    encoder_flops,
    peak_size,
)
from torch import Tensor, nn

MOST_OTHER_LABELS = 10

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class _Contender:
    """What the peers share: rows, optimizer, measuring. A subclass gives the loss of a batch."""

    def __init__(self, settings: Settings, model: nn.Module, bert: nn.Module):
        self._data = Rows(settings)
        self._batch = settings.batch
        self._model = model
        self._hf_config = json.loads((Path(settings.model) / "config.json").read_text())
        bert.get_submodule("embeddings.position_embeddings").requires_grad_(False)
        model.train()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self._encoded: list[tuple[int, int]] = []
        self._tokens = 0
        self._pad_id = bert.config.pad_token_id
        bert.get_submodule("embeddings").register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._encoded.append(tuple(kwargs["input_ids"].shape))
            self._tokens += int((kwargs["input_ids"] != self._pad_id).sum())

    def _loss(self, dataset: str, rows: list[dict[str, Any]], rng: Any) -> Tensor:
        raise NotImplementedError

    def step(self, dataset: str, use: int) -> StepReport:
        self._encoded, self._tokens = [], 0
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = self._data.of(dataset, use)
        loss = self._loss(dataset, rows, self._data.rng(dataset, use))
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        return StepReport(
            value,
            time.perf_counter() - started,
            time.process_time() - cpu_started,
            slots=sum(rows * length for rows, length in self._encoded),
            tokens=self._tokens,
            flops=encoder_flops(self._hf_config, self._encoded),
        )

    def peak(self, dtype: torch.dtype = torch.float32) -> float:
        """FLOP per second of a large product."""
        x = torch.ones((peak_size(), peak_size()), dtype=dtype)
        with torch.no_grad():
            x @ x
            return best_rate(lambda: x @ x)


class Reference(_Contender):
    """The reference's step, in float32 or under bfloat16 autocast."""

    dtype = torch.float32

    def __init__(self, settings: Settings):
        torch.set_num_threads(settings.threads)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
        self._bert = transformers.BertModel.from_pretrained(
            settings.model, add_pooling_layer=False, attn_implementation="sdpa"
        ).float()
        self._scaling = nn.Linear(self._bert.config.hidden_size, DIMS[-1])
        super().__init__(settings, nn.ModuleList([self._bert, self._scaling]), self._bert)

    def peak(self) -> float:
        return super().peak(self.dtype)

    def _loss(self, dataset: str, rows: list[dict[str, Any]], rng: Any) -> Tensor:
        task = DATASETS[dataset][0]
        texts = [row["text"] for row in rows]
        if task == "similarity":
            fields = [texts, [row["text_pair"] for row in rows]]
            limits = [QUERY_LENGTH, LENGTH]
        elif task == "retrieval":
            negatives = [n for row in rows for n in _draw(row["text_neg"], 1, rng)]
            fields = [texts, [row["text_pos"] for row in rows], negatives]
            limits = [QUERY_LENGTH, LENGTH, LENGTH]
        else:
            others = [n for row in rows for n in _draw(row["text_neg"], MOST_OTHER_LABELS, rng)]
            fields = [texts, [row["text_pos"] for row in rows], others]
            limits = [LENGTH, LENGTH, LENGTH]
        inputs = [
            self._tokenizer(
                field, padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            for field, limit in zip(fields, limits, strict=True)
        ]
        recompute = sum(x["input_ids"].numel() for x in inputs) > MOST_SLOTS_KEPT
        if recompute:
            self._bert.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self._bert.activation_checkpointing_disable()
        autocast = (
            contextlib.nullcontext()
            if self.dtype == torch.float32
            else torch.autocast("cpu", self.dtype)
        )
        with autocast:
            vectors = [self._embed(x) for x in inputs]
            losses = []
            for dim in DIMS:
                parts = [F.normalize(v[:, :dim], dim=-1) for v in vectors]
                if task == "similarity":
                    scores = torch.tensor([float(row["label"]) for row in rows])
                    losses.append(0.04 * _cosent(*parts, scores))
                elif task == "retrieval":
                    losses.append(_all_pairs(*parts))
                else:
                    losses.append(0.2 * _label_contrast(*parts))
            return torch.stack(losses).mean()

    def _embed(self, inputs: Any) -> Tensor:
        mask = inputs["attention_mask"]
        hidden = self._bert(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
        return self._scaling(pooled)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts, float32 [texts, width], not normalised, without dropout."""
        self._model.eval()
        self._bert.activation_checkpointing_disable()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = np.empty((len(texts), DIMS[-1]), np.float32)
        for begin in range(0, len(order), 64):
            places = order[begin : begin + 64]
            inputs = self._tokenizer(
                [texts[i] for i in places], padding=True, truncation=True, max_length=LENGTH,
                return_tensors="pt",
            )  # fmt: skip
            found[places] = self._embed(inputs).numpy()
        self._model.train()
        return found


class ReferenceBfloat16(Reference):
    dtype = torch.bfloat16


def _draw(texts: list[str], count: int, rng: Any) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))[:count]]


def _all_pairs(query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    scores = query @ torch.cat([positive, negative]).T / 0.01
    return F.cross_entropy(scores, torch.arange(len(query)))


def _label_contrast(text: Tensor, label: Tensor, others: Tensor) -> Tensor:
    others = others.reshape(len(text), -1, others.shape[-1])
    candidates = torch.cat([label[:, None], others], dim=1)
    scores = torch.einsum("rd,rnd->rn", text, candidates) / 0.05
    return F.cross_entropy(scores, torch.zeros(len(text), dtype=torch.long))


def _cosent(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    cosines = (first * second).sum(-1) / 0.05
    differences = cosines[None, :] - cosines[:, None]
    differences = differences[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([torch.zeros(1), differences]), dim=0)


class SentenceTransformers(_Contender):
    """sentence-transformers' losses, model and collator, driven step by step.

    Its Trainer does the same per step: collate, loss, backward, clip, AdamW. Nearest losses:
    MultipleNegativesRanking (cached where a step recomputes) for retrieval, and for labels with a
    row's other labels as negative columns, so that the labels of other rows are negatives too;
    CoSENT; each under Matryoshka.
    """

    def __init__(self, settings: Settings):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses, modules
        from sentence_transformers.sentence_transformer.data_collator import (
            SentenceTransformerDataCollator,
        )

        torch.set_num_threads(settings.threads)
        encoder = modules.Transformer(settings.model, max_seq_length=LENGTH)
        hidden = encoder.get_embedding_dimension()
        scaling = modules.Dense(hidden, DIMS[-1], activation_function=nn.Identity())
        model = SentenceTransformer(
            modules=[encoder, modules.Pooling(hidden, "mean"), scaling], device="cpu"
        ).float()
        self._collate = SentenceTransformerDataCollator(model.preprocess)

        def under_prefixes(loss: nn.Module) -> nn.Module:
            return losses.MatryoshkaLoss(model, loss, DIMS, [1 / len(DIMS)] * len(DIMS))

        self._losses = {
            "similarity": under_prefixes(losses.CoSENTLoss(model, scale=20.0)),
            "retrieval": under_prefixes(losses.MultipleNegativesRankingLoss(model, scale=100.0)),
            "classification": under_prefixes(
                losses.MultipleNegativesRankingLoss(model, scale=20.0)
            ),
        }
        self._cached = {
            task: under_prefixes(losses.CachedMultipleNegativesRankingLoss(model, scale=scale))
            for task, scale in (("retrieval", 100.0), ("classification", 20.0))
        }
        self._weights = {"similarity": 0.04, "retrieval": 1.0, "classification": 0.2}
        super().__init__(settings, model, encoder.auto_model)

    def _loss(self, dataset: str, rows: list[dict[str, Any]], rng: Any) -> Tensor:
        task = DATASETS[dataset][0]
        features = []
        for row in rows:
            if task == "similarity":
                feature = {"anchor": row["text"], "positive": row["text_pair"]}
                feature["label"] = float(row["label"])
            else:
                count = 1 if task == "retrieval" else MOST_OTHER_LABELS
                drawn = enumerate(_draw(row["text_neg"], count, rng))
                feature = {"anchor": row["text"], "positive": row["text_pos"]} | {
                    f"negative_{i}": text for i, text in drawn
                }
            features.append(feature)
        batch = self._collate(features)
        labels = batch.pop("label", None)
        columns = [name for name in features[0] if name != "label"]
        inputs = [
            {key.removeprefix(f"{column}_"): value for key, value in batch.items()
             if key.startswith(f"{column}_")}
            for column in columns
        ]  # fmt: skip
        recompute = sum(x["input_ids"].numel() for x in inputs) > MOST_SLOTS_KEPT
        loss = (self._cached if recompute and task in self._cached else self._losses)[task]
        return self._weights[task] * loss(inputs, labels)
