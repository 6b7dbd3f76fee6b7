"""`twotower train export`: the model of a run, from the state that it last saved."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from .common import Parser, add_command, add_dtype, dtype_of
from .facts import FACTS, read_facts, weights_digest

_DESCRIPTION = """\
Write the model of a run as it was at its last save: of one that is going on, was stopped, or is complete. The run is
left as it is."""
_EPILOG = """\
examples:
  twotower train export --out run/ar
  twotower train export --out run/denoiser --to snapshots/denoiser --save-dtype bfloat16
  twotower generate --model snapshots/denoiser "def main():"

DIR appears complete or not at all. A denoiser is put beside the context tower that its run began with, which must still
be where it was."""


def add(stages: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    p = add_command(stages, "export", run, "the model of a run, at any time", _DESCRIPTION, _EPILOG)
    p.add_argument("--out", metavar="OUT", required=True, help="folder of the run")
    p.add_argument("--to", metavar="DIR", help="folder to write (default: OUT/model)")
    add_dtype(p, "--save-dtype", "what is stored (default: as computed)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def run(o: argparse.Namespace) -> None:
    """Put the model together and write it."""
    import torch

    from ..checkpoint import load, parameter_dtype, save
    from ..config import DTYPES, TwoTowerConfig
    from ..training.state import STATE, read_state, tie
    from ..two_tower import TwoTower

    out, to = Path(o.out), Path(o.to or Path(o.out) / "model")
    facts, state = read_facts(out), read_state(out)
    if facts is None or state is None:
        missing = FACTS if facts is None else STATE
        raise ValueError(f"{out}: no {missing}: expected the folder of a run that has saved")
    dtype = DTYPES[facts["dtype"]]
    config = dataclasses.replace(TwoTowerConfig.from_dict(facts["config"]), dtype=dtype)
    stage = facts["stage"]
    with torch.device("meta"):
        model = TwoTower(config, towers="context" if stage == "ar" else "both")
    if stage == "denoiser":  # its context tower is that of the model that it began with
        if "weights" in facts and weights_digest(facts["model"]) != facts["weights"]:
            raise ValueError(f"{facts['model']}: its weights are others than those that the run in {out} saw")
        load(model, facts["model"], device="cpu", dtype=dtype, towers="context", progress=not o.quiet)
    if state["settings"].get("context_tower") == "tied":
        tie(model)
    stored = state["weights"] | state.get("averages", {})
    weights = {name: value.to(parameter_dtype(name, dtype)) for name, value in stored.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    save(model, to, dtype=dtype_of(o.save_dtype), tokenizer=out, progress=not o.quiet)
    steps, whole = len(state["history"]), state["settings"]["steps"]
    print(f"{to}: after step {steps} of {whole}, loss {state['history'][-1]['loss']:.4f} nats per token")
