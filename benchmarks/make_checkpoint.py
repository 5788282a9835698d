"""Makes a synthetic base and a LoRA adapter for it: `python -m benchmarks.make_checkpoint SHAPE DIR`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from benchmarks.configs import WEIGHT_STD, adapter_config, llama_config, tokenizer
from benchmarks.random_shard import RandomBlock, RandomTensor, write_random_shard
from benchmarks.recipe import DTYPE_CODES, Recipe, add_recipe_options, parse_recipe
from benchmarks.shapes import SHAPES

RECIPE_FILE: Final = "recipe.json"
LORA_B_STD: Final = 0.01


def write_json(path: Path, value: object, *, sort_keys: bool = False) -> None:
    """Write `value` the way transformers writes its configs."""
    path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def base_tensors(recipe: Recipe) -> list[RandomTensor]:
    """Return the base's tensors in registration order; norms lie around one, everything else around zero."""
    return [
        RandomTensor(name, DTYPE_CODES[recipe.dtype], tensor_shape, float("norm" in name), WEIGHT_STD)
        for name, tensor_shape in recipe.shape.tensors()
    ]


def adapter_tensors(recipe: Recipe) -> Iterator[RandomTensor]:
    """Yield A as PEFT initialises it and B as training might leave it.

    Shapes:
        lora_A: (rank, in_features)
        lora_B: (out_features, rank)
    """
    for module_path, (out_features, in_features) in recipe.target_modules():
        prefix = f"base_model.model.{module_path}"
        lora_a_std = 1 / math.sqrt(3 * in_features)
        yield RandomTensor(f"{prefix}.lora_A.weight", "F32", (recipe.rank, in_features), 0.0, lora_a_std)
        yield RandomTensor(f"{prefix}.lora_B.weight", "F32", (out_features, recipe.rank), 0.0, LORA_B_STD)


def split_into_shards(tensors: list[RandomTensor], shard_count: int) -> dict[str, list[RandomTensor]]:
    """Cut `tensors`, in order, into files of about equal size, named as transformers names them.

    A tensor goes where its first byte falls, so one larger than a shard may leave fewer files than asked for.
    """
    total_bytes = sum(tensor.byte_count for tensor in tensors)
    cuts: dict[int, list[RandomTensor]] = {}
    offset = 0
    for tensor in tensors:
        cuts.setdefault(offset * shard_count // total_bytes, []).append(tensor)
        offset += tensor.byte_count
    if len(cuts) == 1:
        return {"model.safetensors": tensors}
    return {f"model-{i:05}-of-{len(cuts):05}.safetensors": cut for i, cut in enumerate(cuts.values(), start=1)}


def write_index(directory: Path, shards: dict[str, list[RandomTensor]]) -> None:
    """Write the index of a sharded checkpoint, in transformers' layout."""
    tensors = [tensor for shard in shards.values() for tensor in shard]
    metadata = {
        "total_parameters": sum(tensor.element_count for tensor in tensors),
        "total_size": sum(tensor.byte_count for tensor in tensors),
    }
    weight_map = {tensor.name: shard_name for shard_name, shard in shards.items() for tensor in shard}
    index = {"metadata": metadata, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index, sort_keys=True)


def write_base(directory: Path, recipe: Recipe, block: RandomBlock) -> None:
    """Write the base checkpoint into the new `directory`."""
    directory.mkdir()
    write_json(directory / "config.json", llama_config(recipe.shape, recipe.dtype))
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(directory / "tokenizer.json", tokenizer())
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    shards = split_into_shards(base_tensors(recipe), recipe.shard_count)
    for shard_name, tensors in shards.items():
        write_random_shard(directory / shard_name, tensors, block)
    if len(shards) > 1:
        write_index(directory, shards)


def write_adapter(directory: Path, recipe: Recipe, block: RandomBlock) -> None:
    """Write the adapter into the new `directory`."""
    directory.mkdir()
    write_json(directory / "adapter_config.json", adapter_config(recipe))
    write_random_shard(directory / "adapter_model.safetensors", list(adapter_tensors(recipe)), block)


def has_recipe(directory: Path, recipe: Recipe) -> bool:
    """Whether `directory` was completed from the same recipe."""
    path = directory / RECIPE_FILE
    if not path.is_file():
        return False
    # Recipes from before a base had a choice of dtype do not say it.
    made_from = json.loads(path.read_text(encoding="utf-8"))
    return {"dtype": "bfloat16", "targets": [], **made_from} == {**asdict(recipe), "targets": list(recipe.targets)}


def make_checkpoint(directory: Path, recipe: Recipe) -> bool:
    """Make `directory` with base/, adapter/ and the recipe, unless it is there already.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: `directory` holds something else, which is not ours to delete.
    """
    if has_recipe(directory, recipe):
        return False
    if directory.exists():
        raise FileExistsError(f"{directory.name!r} exists and was made otherwise; remove it or name another")
    # Built beside its place and renamed: a directory that exists is complete.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    block = RandomBlock(recipe.seed)
    write_base(partial / "base", recipe, block)
    write_adapter(partial / "adapter", recipe, block)
    write_json(partial / RECIPE_FILE, asdict(recipe))
    partial.rename(directory)
    return True


def main() -> None:
    """Read the command line and make the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    add_recipe_options(parser)
    options = parser.parse_args()
    recipe = parse_recipe(options)
    try:
        is_new = make_checkpoint(options.directory, recipe)
    except FileExistsError as error:
        parser.error(str(error))
    done = "made" if is_new else "reused"
    print(f"{done} {options.directory}: {recipe.base_bytes / 1e9:.2f} GB of base tensors")


if __name__ == "__main__":
    main()
