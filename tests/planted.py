"""Models in which one layer really runs twice: as an ordinary, deeper checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

ADDS = ("o_proj", "down_proj")  # what writes to the residual stream


def deeper_model(source: Path, out: Path, layer: int, gate: float) -> Path:
    """Write the Hugging Face model `source` with `layer` standing twice, the second time scaled by `gate`."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] += 1
    if "layer_types" in config:
        config["layer_types"].append(config["layer_types"][0])
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    made = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        room, kind, *rest = name.split(".")
        if kind != "layers":
            made[name] = tensor
            continue
        number, role = int(rest[0]), ".".join(rest[1:])
        made[f"{room}.layers.{number + (number > layer)}.{role}"] = tensor
        if number == layer:
            scale = gate if role.split(".")[-2] in ADDS else 1.0
            made[f"{room}.layers.{number + 1}.{role}"] = tensor * scale
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    return out
