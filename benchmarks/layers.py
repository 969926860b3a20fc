"""Relative output errors of methods on single linears of a model: a quick look before whole-model runs.

    python benchmarks/layers.py MODEL --calibration VALID.txt --run "gptq bits=4 group_size=64 symmetric=false" \
        --run "codebook format=codebook bits=3 group_size=channel"

A run is a method's name and fields of its target and options. For blocks 1, the middle and the last but one, and their
q_proj, o_proj, up_proj and down_proj: sqrt(tr(D G DT) / tr(W G WT)), G the Gram matrix of 16 x 512 calibration tokens,
D the change of the weight; the geometric mean over the linears, total bits per weight, and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from lilliput import methods
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.compress import Compress

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def collect(model: str, calibration: str) -> dict[str, tuple[Tensor, SiteStats, Tensor]]:
    """Weight, input statistics and mean squared gradient of the linears, by name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(calibration, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(200_000), verbose=False).input_ids[: 16 * 512]).view(16, 512)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    blocks = whole.model.layers
    chosen: dict[str, nn.Linear] = {
        f"{n}.{name}": blocks[n].get_submodule(name) for n in (1, len(blocks) // 2, len(blocks) - 2) for name in LINEARS
    }
    states = {name: fold.init(x.in_features, fold.NAMES) for name, x in chosen.items()}
    fisher = {name: torch.zeros_like(x.weight) for name, x in chosen.items()}

    def watch(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states[name] = fold.update(states[name], inputs[0].detach().flatten(0, -2))

        return see

    for name, linear in chosen.items():
        linear.register_forward_pre_hook(watch(name))
        linear.weight.requires_grad_(True)
    for sample in ids:
        whole(sample[None], labels=sample[None]).loss.backward()
        for name, linear in chosen.items():
            assert linear.weight.grad is not None
            fisher[name] += linear.weight.grad.square() / len(ids)
            linear.weight.grad = None
    return {name: (x.weight.detach(), fold.finish(states[name]), fisher[name]) for name, x in chosen.items()}


def measure(run: str, layers: dict[str, tuple[Tensor, SiteStats, Tensor]]) -> dict[str, Any]:
    """One run over all linears."""
    words = run.split()
    method = methods.get(words[0])
    assert isinstance(method.spec, Compress)
    compress = method.spec.run
    parse = YAML(typ="safe", pure=True).load
    settings = {key: parse(value) for key, value in (word.split("=", 1) for word in words[1:])}
    fields = {key: value for key, value in settings.items() if key in Target.model_fields}
    options = method.parse({key: value for key, value in settings.items() if key not in fields})
    from lilliput.formats import known

    target = known.completed(method.spec.completed(Target.model_validate(fields)))
    errors, bits, weights, seconds = [], 0, 0, 0.0
    for name, (weight, stats, fisher) in layers.items():
        began = time.process_time()
        out = compress(Layer(name, weight, fisher=fisher), stats, target, options)
        seconds += time.process_time() - began
        gram, change = stats.need("gram"), out.decode() - weight
        errors.append(math.sqrt(float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())))
        bits += method.scheme(target, options, *weight.shape).size_bits(*weight.shape)
        weights += weight.numel()
    mean = math.exp(sum(map(math.log, errors)) / len(errors))
    return {"run": run, "bits_per_weight": bits / weights, "error": mean, "cpu_seconds": seconds, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--run", action="append", default=[], required=True)
    parser.add_argument("--out")
    options = parser.parse_args()
    layers = collect(options.model, options.calibration)
    rows = []
    for run in options.run:
        rows.append(measure(run, layers))
        print(f"{rows[-1]['bits_per_weight']:6.3f} bits  {rows[-1]['error']:.4f}  {run}", flush=True)
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
