"""Sparse training in the Trainer of transformers: a small vision transformer, built from a configuration.

    python examples/frameworks/trainer.py          # half a minute on two cores
    python examples/frameworks/trainer.py --smoke  # seconds

After each epoch the Trainer evaluates u (``eval_accuracy``) and w (``eval_w_accuracy``). The model that it saves in the
end has exact zeros.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import rvsm_kernels as rk
from digits import digits
from rvsm_kernels.integrations.transformers import SparseWeightsCallback


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    images, classes = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(classes)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few epochs")
    parser.add_argument("--out", help="a folder for the model; a temporary one by default")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=10,
        )
    )
    train, test = digits()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=options.out or folder,
            num_train_epochs=3 if options.smoke else 30,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=512,
            learning_rate=2e-3,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=test,
            data_collator=collate,
            compute_metrics=accuracy,
            # The learning rate and the weight decay are those of the arguments. beta * lr is the share of the gap
            # between w and u that a step closes; what is below sqrt(2 * lam / beta) = 0.02 is zero in u.
            optimizer_cls_and_kwargs=(rk.RVSMAdamW, {"penalty": "l0", "lam": 2e-3, "beta": 10.0}),
            callbacks=[SparseWeightsCallback(evaluate="both", sparsify_at_end=True)],
        )
        trainer.train()
        row = next(row for row in reversed(trainer.state.log_history) if "eval_loss" in row)
        trainer.save_model()
        saved = ViTForImageClassification.from_pretrained(arguments.output_dir)
    print(rk.sparsity(saved))
    print(
        f"loss of u {row['eval_loss']:.3f}, of w {row['eval_w_loss']:.3f}, sparsity {row['eval_sparsity']:.1%},"
        f" accuracy of u {row['eval_accuracy']:.1%}, of w {row['eval_w_accuracy']:.1%}"
    )


if __name__ == "__main__":
    main()
