"""Models of the boilerplate task."""

from pathlib import Path

from eval.models import random_model
from tt_model import TwoTowerConfig, checkpoint
from tt_model.training.boilerplate import corpus
from tt_model.training.data import train_tokenizer


def boilerplate_models(folder: Path) -> None:
    """Random models with a tokenizer of the task, in folders both (two towers) and one."""
    train_tokenizer([corpus.document(i) for i in range(40)], 300).save(str(folder / "tokenizer.json"))
    config = TwoTowerConfig(
        vocab_size=300, hidden_size=16, pattern="M*", num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8, n_groups=1, block_size=8,
    )  # fmt: skip
    checkpoint.save(random_model(config), folder / "both", tokenizer=folder, progress=False)
    checkpoint.save(random_model(config, towers="context"), folder / "one", tokenizer=folder, progress=False)
