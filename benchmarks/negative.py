"""What a run of reversed preferences does as the negative branch of guidance, by its strength.

    python benchmarks/negative.py [--out runs/negative] [--strengths 0.25 0.5 1] [--json FILE]

configs/emoji-dpo-lora.yaml twice, as it is and with data.order=reversed. Held-out captions are drawn by the base and by the
first run, each without a negative run and away from the second one, and compared with the base's own pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign import runs
from flowalign.demo import CAPTIONS, CONFIG, GUIDANCE, STEPS, held_out_captions
from flowalign.device import choose_device
from flowalign.evaluate.compare import evaluate_folders
from flowalign.evaluate.judges import load_judges

ORDERS = {"aligned": "given", "reversed": "reversed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/negative"))
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    config = configuration.load(CONFIG)
    for name, order in ORDERS.items():
        settings = [f"output={options.out / name}", f"data.order={order}", "sample.count=1"]
        runs.align(configuration.load(CONFIG, settings), resume=True)
    assert config.model is not None
    sources = {"base": config.model.checkpoint, "aligned": str(options.out / "aligned")}
    judges, figures = load_judges(config.judges, choose_device(config.train.device)), []
    base = draw(options.out, "base", sources["base"], 0.0)
    print("| drawn by | strength | style share | caption match over the base |\n|---|---|---|---|")
    for name, source in sources.items():
        for strength in (0.0, *options.strengths):
            folder = draw(options.out, name, source, strength)
            found = evaluate_folders(base, folder, judges, progress=False)["judges"]
            caption, share = found["caption_match"]["mean_difference"], found["style"]["aligned"]["share"]
            figures.append({"drawn_by": name, "strength": strength, "share": share, "caption": caption})
            interval = f"{caption['value']:+.3f} [{caption['low']:+.3f}, {caption['high']:+.3f}]"
            print(f"| {name} | {strength:g} | {share:.2f} | {interval} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def draw(out: Path, name: str, source: str, strength: float) -> Path:
    """Pictures of the held-out captions, away from the reversed run by so much."""
    folder = out / f"{name}-{strength:g}"
    away: dict[str, Any] = {"negative": str(out / "reversed"), "negative_strength": strength} if strength else {}
    settings: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "batch_size": 30, "precision": "bf16"}
    runs.generate(source, held_out_captions(CAPTIONS), out=folder, progress=False, **settings, **away)
    return folder


if __name__ == "__main__":
    main()
